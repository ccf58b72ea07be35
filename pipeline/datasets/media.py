"""The bytes of a clip: a video file, or a folder of frames in natural order. Light to import."""

import hashlib
import os
from pathlib import Path

from varve.pipeline.datasets.frame_names import (
    FRAME_SUFFIXES,
    AmbiguousFrames,
    choose_frames,
    is_frame,
    natural_key,
)

__all__ = [
    "FRAME_SUFFIXES",
    "AmbiguousFrames",
    "content_digest",
    "frame_files",
    "is_frame",
    "natural_key",
    "size_and_mtime",
]


def frame_files(folder: str | Path) -> list[Path]:
    """Return the frames of a folder in order, as `frame_names.choose_frames` chooses them.

    Raises:
        AmbiguousFrames: Its pictures are several clips; the message names their patterns.
        OSError: The folder cannot be listed.
    """
    return [Path(folder, name) for name in choose_frames(os.listdir(folder)).names]


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
