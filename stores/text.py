"""Text features of class names, kept beside the video features.

`text/<backbone>/<short fingerprint>` is a small Zarr array (classes, D), float32; its attributes
hold the class names in order and what they were made with. The fingerprint covers the names, so
another set of classes is another array; rows of names met before are taken over.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from varve.stores import atomic
from varve.stores.columns import group_json, node_name
from varve.stores.identity import digest
from varve.stores.remote import Place, open_array

FOLDER = "text"


@dataclass(frozen=True)
class TextFeatures:
    """float32 [C, D], a row per class, L2-normalised."""

    classes: tuple[str, ...]
    values: np.ndarray


def held(store: Place, backbone: str, key: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every class's feature that the store has under `key`, by class name."""
    found: dict[str, np.ndarray] = {}
    for path, attributes in _arrays(store, backbone):
        if attributes["key"] == key:
            values = np.asarray(open_array(path)[:])
            found |= dict(zip(attributes["classes"], values, strict=True))
    return found


def read(store: Place, backbone: str, classes: list[str]) -> TextFeatures:
    """The features of exactly these classes, in this order.

    Raises:
        LookupError: The store has none for this backbone, or lacks a class; it says which.
    """
    best: dict[str, np.ndarray] = {}
    for path, attributes in _arrays(store, backbone):
        if set(classes) <= set(attributes["classes"]):
            values = np.asarray(open_array(path)[:])
            best = dict(zip(attributes["classes"], values, strict=True))
    if not best:
        have = [backbone for backbone in _backbones(store)]
        raise LookupError(
            f"no text features of {backbone} for these {len(classes)} classes; the store has text "
            f"of {', '.join(have) or 'no backbone'}. Build with a CLIP backbone and without "
            "--no-text."
        )
    return TextFeatures(tuple(classes), np.stack([best[name] for name in classes]))


def write(store: Path, backbone: str, key: Mapping[str, Any], features: TextFeatures) -> None:
    """Keep a set of class features. Values come first, so there is a whole array or none."""
    attributes: dict[str, Any] = {"key": dict(key), "classes": list(features.classes)}
    path = store / FOLDER / node_name(backbone) / digest(attributes)[:16]
    memory: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(memory), shape=features.values.shape, dtype="float32",
        chunks=features.values.shape, compressors=[Crc32cCodec()], filters=None,
        fill_value=np.nan, attributes=attributes, dimension_names=["class", "channel"],
    )  # fmt: skip
    array[:] = features.values
    for parent in (path.parent.parent, path.parent):
        if not (parent / "zarr.json").exists():
            atomic.write(store, parent / "zarr.json", group_json({}))
    for name, data in sorted(memory.items()):  # "c/0/0" comes before "zarr.json"
        atomic.write(store, path / name, data.to_bytes())


def _arrays(store: Place, backbone: str) -> list[tuple[Place, dict[str, Any]]]:
    found: list[tuple[Place, dict[str, Any]]] = []
    folder = store / FOLDER / node_name(backbone)
    for metadata in folder.glob("*/zarr.json"):
        found.append((metadata.parent, json.loads(metadata.read_bytes())["attributes"]))
    return sorted(found, key=lambda one: str(one[0]))


def _backbones(store: Place) -> list[str]:
    return sorted(path.parent.name for path in (store / FOLDER).glob("*/zarr.json"))
