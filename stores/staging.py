"""Staging: finished blocks wait here, each in a file of its own, until their shard is written.

A block is a few clips of one column. It is on disk, whole, before anyone is told of it, so a
killed build loses the blocks in flight and no more; the next one finds the rest here. What was
learnt of the clips while decoding (`facts`) waits beside, until the table of clips holds it.
"""

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from varve.stores import atomic
from varve.stores.identity import digest

FOLDER = ".staging"
FACTS = "facts"


@dataclass(frozen=True)
class StagedBlock:
    """Cells of one column: rows int64 [n], row keys uint8 [n, 16], stored bits [n, *cell]."""

    rows: np.ndarray
    keys: np.ndarray
    cells: np.ndarray


def put(store: Path, place: str, block: StagedBlock) -> Path:
    """Stage cells of the column of that place (`ColumnSpec.place`). Returns the file."""
    buffer = io.BytesIO()
    np.savez(buffer, rows=block.rows, keys=block.keys, cells=block.cells)
    name = digest({"rows": block.rows.tolist(), "keys": block.keys.tobytes().hex()})[:24]
    file = store / FOLDER / place / f"{name}.npz"
    atomic.write(store, file, buffer.getbuffer())
    return file


def files(store: Path, place: str) -> list[Path]:
    """Staged blocks of a column, in a stable order."""
    return sorted((store / FOLDER / place).glob("*.npz"))


def rows_and_keys(file: Path) -> list[tuple[int, np.ndarray]]:
    """Which cells a staged block holds. A damaged file holds none: its cells are computed again."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                return []
        with np.load(file, allow_pickle=False) as archive:
            return list(zip(archive["rows"].tolist(), archive["keys"], strict=True))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        return []


def get(file: Path) -> StagedBlock:
    """A staged block that `rows_and_keys` has found whole."""
    with np.load(file, allow_pickle=False) as archive:
        return StagedBlock(archive["rows"], archive["keys"], archive["cells"])


def put_facts(store: Path, facts: list[dict[str, Any]]) -> None:
    """Keep what was learnt of some clips, one JSON object each, until the table holds it."""
    name = digest(facts)[:24]
    atomic.write(store, store / FOLDER / FACTS / f"{name}.json", json.dumps(facts).encode())


def all_facts(store: Path) -> Iterator[dict[str, Any]]:
    """What builds before have learnt and not entered. A damaged file is passed over."""
    for file in facts_files(store):
        with contextlib.suppress(ValueError):
            yield from json.loads(file.read_bytes())


def drop(store: Path, files: list[Path]) -> None:
    """Remove staged files, and the folders that this leaves empty."""
    for file in files:
        file.unlink(missing_ok=True)
    root = store / FOLDER
    for folder in {file.parent for file in files} | {root}:
        while folder.is_relative_to(root) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def facts_files(store: Path) -> list[Path]:
    return sorted((store / FOLDER / FACTS).glob("*.json"))
