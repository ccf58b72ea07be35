"""Staging area: files of finished blocks that are not yet in a shard.

A block is the cells of some clips of one column. Its file is complete before the block is
reported, so a killed build loses only the blocks in flight; the next build uses the others. The
facts about the clips that decoding found are staged in the same way, until they are in the table
of clips.
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
from varve.stores.digests import digest

FOLDER = ".staging"
FACTS = "facts"


@dataclass(frozen=True)
class StagedBlock:
    """Cells of one column: rows int64 [n], row keys uint8 [n, 16], stored bits [n, *cell]."""

    rows: np.ndarray
    keys: np.ndarray
    cells: np.ndarray


def put(store: Path, column: str, block: StagedBlock) -> Path:
    """Stage cells of a column (`ColumnSpec.relative_path`), and return their file."""
    buffer = io.BytesIO()
    np.savez(buffer, rows=block.rows, keys=block.keys, cells=block.cells)
    name = digest({"rows": block.rows.tolist(), "keys": block.keys.tobytes().hex()})[:24]
    file = store / FOLDER / column / f"{name}.npz"
    atomic.write(store, file, buffer.getbuffer())
    return file


def files(store: Path, column: str) -> list[Path]:
    """Return the staged blocks of a column (`ColumnSpec.relative_path`), in a stable order."""
    return sorted((store / FOLDER / column).glob("*.npz"))


def rows_and_keys(file: Path) -> list[tuple[int, np.ndarray]]:
    """Return the row and the row key of each staged cell.

    A damaged file has no cells, so that they are computed again.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                return []
        with np.load(file, allow_pickle=False) as archive:
            return list(zip(archive["rows"].tolist(), archive["keys"], strict=True))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        return []


def get(file: Path) -> StagedBlock:
    """Read a staged block that `rows_and_keys` has checked."""
    with np.load(file, allow_pickle=False) as archive:
        return StagedBlock(archive["rows"], archive["keys"], archive["cells"])


def put_facts(store: Path, facts: list[dict[str, Any]]) -> None:
    """Stage facts about some clips, one JSON object per clip, until they are in the table."""
    name = digest(facts)[:24]
    atomic.write(store, store / FOLDER / FACTS / f"{name}.json", json.dumps(facts).encode())


def all_facts(store: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the facts that are not yet in the table. A damaged file is skipped."""
    for file in facts_files(store):
        with contextlib.suppress(ValueError):
            yield from json.loads(file.read_bytes())


def drop(store: Path, files: list[Path]) -> None:
    """Remove staged files, and the folders that are then empty."""
    for file in files:
        file.unlink(missing_ok=True)
    root = store / FOLDER
    for folder in {file.parent for file in files} | {root}:
        while folder.is_relative_to(root) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def facts_files(store: Path) -> list[Path]:
    """Return the files of staged facts, in a stable order."""
    return sorted((store / FOLDER / FACTS).glob("*.json"))
