"""Atomic writes: a reader sees the old bytes or the new ones, even after a power cut.

Every write goes to a temporary file in `.tmp/`, is flushed to the disk, and is renamed to its path;
the folder's entry is flushed too. A killed process leaves files in `.tmp/` only. The next process
that takes the same lock (the store's, or that of its references) empties it.
"""

import os
import shutil
import uuid
from pathlib import Path

TEMPORARY = ".tmp"


def write(store: Path, target: Path, *pieces: bytes | memoryview) -> None:
    """Replace the file `target` in `store` by the concatenation of `pieces`.

    Raises:
        OSError: The write failed (disk full, no permission). Nothing was changed.
    """
    temporary = store / TEMPORARY / uuid.uuid4().hex
    _make(store, temporary.parent)
    _make(store, target.parent)
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def update(store: Path, target: Path, data: bytes) -> None:
    """Write a file as `write` does, unless it has these bytes already."""
    if not target.exists() or target.read_bytes() != data:
        write(store, target, data)


def clear_temporary(store: Path) -> None:
    """Remove the files of killed writers. The caller has the lock under which they wrote."""
    shutil.rmtree(store / TEMPORARY, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(store: Path, folder: Path) -> None:
    """Make `folder` and its parents below `store`, and flush each entry to the disk."""
    if folder.is_dir():
        return
    if folder != store:
        _make(store, folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
