"""The bytes of a clip: a video file, or a folder of frames in natural order. Light to import."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def natural_key(path: str) -> tuple[Any, ...]:
    """Return a sort key by which paths sort folder by folder, and numbers by their value.

    Of numbers that differ in their padding alone, the path itself decides.

    >>> sorted(["b/f1", "a/f10.jpg", "a/f2.jpg", "a/f010b.jpg"], key=natural_key)
    ['a/f2.jpg', 'a/f10.jpg', 'a/f010b.jpg', 'b/f1']
    """
    pieces = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    # re.split puts the digits at odd indices, so that no number is compared with a text.
    valued = [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in pieces]
    return (valued, path)


def is_frame(name: str) -> bool:
    """Return whether a file name is that of a frame: neither hidden nor of another kind."""
    return name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")


def frame_files(folder: str | Path) -> list[Path]:
    """Return the frames of a folder in order. Hidden files and other kinds are ignored.

    Raises:
        OSError: The folder cannot be listed.
    """
    names = filter(is_frame, os.listdir(folder))
    return [Path(folder, name) for name in sorted(names, key=natural_key)]


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's frames in order (without their names).

    Raises:
        OSError: It cannot be read.
    """
    if path.is_dir():
        total = hashlib.sha256(b"folder")
        for file in frame_files(path):
            total.update(bytes.fromhex(content_digest(file)))
        return total.hexdigest()
    with open(path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Return the bytes and the last change in nanoseconds; of a folder, the sum and the latest.

    Raises:
        OSError: The file or folder cannot be examined.
    """
    if path.is_dir():
        stats = [file.stat() for file in frame_files(path)]
        times = [stat.st_mtime_ns for stat in stats] + [path.stat().st_mtime_ns]
        return sum(stat.st_size for stat in stats), max(times)
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
