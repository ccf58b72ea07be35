"""Fixtures of tests of several folders: a small store of vectors, made without a network."""

import gc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from varve.pipeline import registry
from varve.stores import FeatureStore, clips
from varve.stores.columns import Column, ColumnSpec
from varve.stores.digests import digest

# An example takes as long as a busy machine lets it.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")
T, D, TRAIN, TEST = 3, 12, 7, 3


def vectors_in_a_store(
    path: Path, features=("pool",), classes=CLASSES, dtype="float32"
) -> FeatureStore:
    """A store of vectors around a direction of their class, without any network."""
    opened = FeatureStore.create(path)
    rows, values = [], []
    for number, label in enumerate(classes):
        centre = np.random.default_rng([number, 5]).normal(size=(T, D))
        for i in range(TRAIN + TEST):
            content = {"digest": digest({"clip": [number, i]}), "status": "ready"}
            split = "train" if i < TRAIN else "test"
            rows.append(clips.blank(f"{label}/{i}.mp4", label, split) | content)
            noise = np.random.default_rng([number, i, 6]).normal(size=(T, D))
            values.append(centre + 0.4 * noise)
    table = pd.DataFrame(rows).astype(clips.COLUMNS).rename_axis(index="row")
    clips.write(opened.path, table)
    cells = np.stack(values).astype(dtype)
    for name in features:
        attributes = {
            "frames": {"frames": T, "view": 0},
            "stages": [{"stage": name, "precision": "float32"}],
        }
        key = digest({"feature": name, "dtype": dtype})
        spec = ColumnSpec("net:tag", name, key, (T, D), dtype, attributes)
        column = Column(opened.path, spec)
        column.create(len(table))
        column.write_shard(0, np.arange(len(table)), cells, clips.row_keys(table), len(table))
    opened.set_attributes(
        {
            "classes": list(classes),
            "dataset": "/videos",
            "backbones": {"net:tag": ["net:/weights/tag.pt"]},
            "request": {"backbones": ["net:/weights/tag.pt"], "keep": list(features), "frames": T,
                        "dtype": dtype},
        }
    )  # fmt: skip
    return FeatureStore.open(opened.path)


def pytest_collection_finish():
    """Exempt the modules that all tests share from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def plugins_of_a_test_are_its_own():
    """Forget the plugin files that a test loaded: workers of later tests would load them too."""
    loaded = dict(registry._LOADED)
    yield
    registry._LOADED.clear()
    registry._LOADED.update(loaded)


@pytest.fixture(scope="session")
def make_vector_store():
    return vectors_in_a_store


@pytest.fixture(scope="session")
def vector_store(tmp_path_factory) -> FeatureStore:
    """Sixty clips of six classes, a vector a frame. Not to be changed."""
    return vectors_in_a_store(tmp_path_factory.mktemp("vectors") / "s.zarr")
