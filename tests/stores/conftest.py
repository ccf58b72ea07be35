"""Fixtures of small stores, written without a pipeline.

`store` has two columns of three clips, whose last cell is missing. `write_rows` writes a table of
clips and some rows of a column.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from varve.stores import FeatureStore, clips
from varve.stores.columns import Column, ColumnSpec

T, D = 4, 3


def values_of(row: int, dtype: str = "float16") -> np.ndarray:
    """Return the cell of a row, in numbers that float16 and bfloat16 represent exactly."""
    return np.arange(T * D, dtype=np.float32).reshape(T, D) + 16 * row


def bits_of(row: int, dtype: str) -> np.ndarray:
    values = values_of(row)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


@pytest.fixture(params=["float16", "float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def store(tmp_path, dtype) -> FeatureStore:
    opened = FeatureStore.create(tmp_path / "s.zarr")
    rows = [clips.blank(f"a/{name}.mp4", label, "train") for name, label in
            [("x", "wave"), ("y", "clap"), ("z", "wave")]]  # fmt: skip
    for i, row in enumerate(rows[:2]):
        row |= {"digest": f"{i}" * 64, "status": "ready"}
    rows[2] |= {"status": "quarantined", "reason": "corrupt", "detail": "no frame decodes"}
    table = pd.DataFrame(rows).astype(clips.COLUMNS).rename_axis(index="row")
    clips.write(opened.path, table)
    keys = clips.row_keys(table)
    for backbone, fingerprint, frames in [("net:tag", "ab" * 32, 4), ("net:tag", "cd" * 32, 5)]:
        attributes = {"frames": {"frames": frames, "view": 0}}
        spec = ColumnSpec(backbone, "blocks.0:cls", fingerprint, (T, D), dtype, attributes)
        column = Column(opened.path, spec)
        column.create(3)
        cells = np.stack([bits_of(row, dtype) for row in range(2)])
        column.write_shard(0, np.arange(2), cells, keys[:2], 3)
    return FeatureStore.open(opened.path)


@pytest.fixture(autouse=True, scope="module")
def no_flush():
    """Do not flush to the disk, which takes most of the time: no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., None]:
    """Return a function that writes clips and rows of a column, one shard after another."""

    def write(store: Path, column: Column, rows: np.ndarray, count: int, cells_of: Callable):
        """Write a table of `count` ready clips; `cells_of(rows)` returns their stored bits."""
        table = pd.DataFrame(
            clips.blank(f"{i}.mp4", "wave", "train") | {"digest": f"{i:064d}", "status": "ready"}
            for i in range(count)
        )
        table = table.astype(clips.COLUMNS).rename_axis(index="row")
        clips.write(store, table)
        column.create(count)
        keys = clips.row_keys(table)
        for shard in np.unique(rows // column.spec.shard_clips):
            in_shard = rows[rows // column.spec.shard_clips == shard]
            column.write_shard(int(shard), in_shard, cells_of(in_shard), keys[in_shard], count)

    return write
