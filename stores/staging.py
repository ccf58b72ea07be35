"""Staging: finished blocks wait here, each in a file of its own, until their shard is written.

A block is a few clips of one column. It is on disk, whole, before anyone is told of it, so a
killed build loses the blocks in flight and no more; the next one finds the rest here. What was
learnt of the clips while decoding (`facts`) waits beside, until the table of clips holds it.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stores import atomic
from stores.identity import digest

FOLDER = ".staging"
FACTS = "facts"


@dataclass(frozen=True)
class StagedBlock:
    """Cells of one column: rows int64 [n], row keys uint8 [n, 16], stored bits [n, *cell]."""

    rows: np.ndarray
    keys: np.ndarray
    cells: np.ndarray


def put(store: Path, fingerprint: str, block: StagedBlock) -> Path:
    """Stage cells of the column of that fingerprint. Returns the file."""
    buffer = io.BytesIO()
    np.savez(buffer, rows=block.rows, keys=block.keys, cells=block.cells)
    name = digest({"rows": block.rows.tolist(), "keys": block.keys.tobytes().hex()})[:24]
    file = store / FOLDER / fingerprint / f"{name}.npz"
    atomic.write(store, file, buffer.getbuffer())
    return file


def files(store: Path, fingerprint: str) -> list[Path]:
    """Staged blocks of a column, in a stable order."""
    return sorted((store / FOLDER / fingerprint).glob("*.npz"))


def rows_and_keys(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which cells a staged block holds, without reading their values."""
    with np.load(file, allow_pickle=False) as archive:
        return archive["rows"], archive["keys"]


def get(file: Path) -> StagedBlock:
    """A staged block.

    Raises:
        ValueError: The file is damaged (its checksum does not fit).
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            return StagedBlock(archive["rows"], archive["keys"], archive["cells"])
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it and build again") from error


def put_facts(store: Path, facts: list[dict[str, Any]]) -> None:
    """Keep what was learnt of some clips, one JSON object each, until the table holds it."""
    name = digest(facts)[:24]
    atomic.write(store, store / FOLDER / FACTS / f"{name}.json", json.dumps(facts).encode())


def all_facts(store: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((store / FOLDER / FACTS).glob("*.json")):
        yield from json.loads(file.read_bytes())


def drop(store: Path, files: list[Path]) -> None:
    """Remove staged files, and the folders that this leaves empty."""
    for file in files:
        file.unlink(missing_ok=True)
    for folder in (*{file.parent for file in files}, store / FOLDER):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def facts_files(store: Path) -> list[Path]:
    return sorted((store / FOLDER / FACTS).glob("*.json"))
