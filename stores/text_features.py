"""Text features of class names, stored beside the video features.

`text/<backbone>/<short fingerprint>` is a small Zarr array (classes, D) of float32. Its attributes
have the class names in order and the key of their computation. The fingerprint covers the names:
another set of classes is another array, into which the rows of known names are copied.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from varve.stores import atomic
from varve.stores.columns import in_memory, make_groups, node_name
from varve.stores.digests import digest
from varve.stores.locations import Location, open_array

FOLDER = "text"


@dataclass(frozen=True)
class TextFeatures:
    """Text features of C classes: `values` is float32 [C, D], one L2-normalised row per class."""

    classes: tuple[str, ...]
    values: np.ndarray


def stored(store: Location, backbone: str, key: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the stored features that were computed under `key`, by class name."""
    features: dict[str, np.ndarray] = {}
    for path, attributes in _arrays(store, backbone):
        if attributes["key"] == key:
            values = np.asarray(open_array(path)[:])
            features |= dict(zip(attributes["classes"], values, strict=True))
    return features


def read(store: Location, backbone: str, classes: list[str]) -> TextFeatures:
    """Return the features of exactly these classes, in this order.

    Raises:
        LookupError: No stored array of this backbone has all the classes. The message lists the
            backbones that have text features.
    """
    rows: dict[str, np.ndarray] = {}
    for path, attributes in _arrays(store, backbone):
        if set(classes) <= set(attributes["classes"]):
            values = np.asarray(open_array(path)[:])
            rows = dict(zip(attributes["classes"], values, strict=True))
    if not rows:
        others = sorted(path.parent.name for path in (store / FOLDER).glob("*/zarr.json"))
        raise LookupError(
            f"no text features of {backbone} for these {len(classes)} classes; the store has text "
            f"of {', '.join(others) or 'no backbone'}. Build with a CLIP backbone and without "
            "--no-text."
        )
    return TextFeatures(tuple(classes), np.stack([rows[name] for name in classes]))


def write(store: Path, backbone: str, key: Mapping[str, Any], features: TextFeatures) -> None:
    """Store the features of some classes, metadata last, so that no array is partial.

    Features of the same text tower from other prompts are removed afterwards: `read` finds features
    by the names of their classes alone.
    """
    attributes: dict[str, Any] = {"key": dict(key), "classes": list(features.classes)}
    path = store / FOLDER / node_name(backbone) / digest(attributes)[:16]
    if not (path / "zarr.json").exists():
        _write(store, path, attributes, features)
    for other, known in _arrays(store, backbone):
        if known["key"] != attributes["key"] and known["key"].get("text") == key.get("text"):
            assert isinstance(other, Path)
            (other / "zarr.json").unlink()  # first, so that no array is partial
            shutil.rmtree(other)


def _write(store: Path, path: Path, attributes: Mapping[str, Any], features: TextFeatures) -> None:
    shape = features.values.shape
    array, memory = in_memory(
        shape=shape, dtype="float32", chunks=shape, fill_value=np.nan,
        attributes=dict(attributes),
        dimension_names=["class", "channel"],
    )  # fmt: skip
    array[:] = features.values
    make_groups(store, path)
    for name, data in sorted(memory.items()):  # "c/0/0" comes before "zarr.json"
        atomic.write(store, path / name, data.to_bytes())


def _arrays(store: Location, backbone: str) -> list[tuple[Location, dict[str, Any]]]:
    files: list[Location] = list((store / FOLDER / node_name(backbone)).glob("*/zarr.json"))
    return [
        (file.parent, json.loads(file.read_bytes())["attributes"])
        for file in sorted(files, key=str)
    ]
