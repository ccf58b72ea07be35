"""Atomic files: a reader sees the old bytes or the new ones, a power cut included.

Every write goes to a temporary file under a `.tmp/`, is flushed to the disk, and takes its place by
a rename; the folder's entry is flushed too. What a killed process leaves behind lies in `.tmp/`
alone, and the next who has the same lock empties it: a store's own, or that of its references.
"""

import os
import shutil
import uuid
from pathlib import Path

TEMPORARY = ".tmp"


def write(store: Path, target: Path, *pieces: bytes | memoryview) -> None:
    """Put `pieces`, one after the other, in place of `target`, inside `store`.

    Raises:
        OSError: Nothing was changed (disk full, no permission).
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


def clear_temporary(store: Path) -> None:
    """Remove what killed writers left. Only for the holder of the lock under which they wrote."""
    shutil.rmtree(store / TEMPORARY, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(store: Path, folder: Path) -> None:
    """Make `folder` and its parents below `store`, each one's entry flushed to the disk."""
    if folder.is_dir():
        return
    if folder != store:
        _make(store, folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
