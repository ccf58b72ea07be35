"""The bytes of a clip: a video file, or a folder of frames in natural order. Light to import."""

import hashlib
import os
import re
from pathlib import Path

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key by the values of numbers: frame2 before frame10, whatever the padding.

    >>> sorted(["f10.jpg", "f2.jpg", "f010b.jpg"], key=natural_key)
    ['f2.jpg', 'f10.jpg', 'f010b.jpg']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def frame_files(folder: str | Path) -> list[Path]:
    """Return the frames of a folder in order. Hidden files and other kinds are ignored.

    Raises:
        OSError: The folder cannot be listed.
    """
    names = [
        name
        for name in os.listdir(folder)
        if name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")
    ]
    # The name itself decides between 1.jpg and 01.jpg.
    return [Path(folder, name) for name in sorted(names, key=lambda n: (natural_key(n), n))]


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
