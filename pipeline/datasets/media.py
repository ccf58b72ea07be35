"""The bytes of a clip: a video file, or a folder of frames in natural order. Light to import."""

import hashlib
import io
import os
import warnings
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


# Raised when folders are to be digested anew, once, in every store: added to their time of change.
# Rows whose digest stays the same keep their features.
FOLDER_RULE_NS = 1


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's frames in order (without their names).

    A frame whose pixels are read otherwise than by the first release (turned by its orientation,
    or grey with 16 bits) is marked in the digest of its folder, which so has other keys.

    Raises:
        OSError: It cannot be read.
    """
    if path.is_dir():
        total = hashlib.sha256(b"folder")
        for file in frame_files(path):
            data = file.read_bytes()
            total.update(hashlib.sha256(data).digest())
            total.update(_reading(data))
        return total.hexdigest()
    with open(path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Return the bytes and the last change in nanoseconds; of a folder, the sum and the latest.

    To a folder's time FOLDER_RULE_NS is added.

    Raises:
        OSError: The file or folder cannot be examined.
    """
    if path.is_dir():
        stats = [file.stat() for file in frame_files(path)]
        times = [stat.st_mtime_ns for stat in stats] + [path.stat().st_mtime_ns]
        return sum(stat.st_size for stat in stats), max(times) + FOLDER_RULE_NS
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _reading(data: bytes) -> bytes:
    """Return a mark where the pixels of a JPEG or PNG file are not those of the first release.

    No ordinary picture has one: a folder of them keeps its digest. Other formats need none, since
    the first release did not read them.
    """
    png = data.startswith(b"\x89PNG\r\n\x1a\n")
    if not (png or data.startswith(b"\xff\xd8")):
        return b""
    # The header has the bits of a channel and the kind of colour, which is 0 for grey.
    bits = b"16 bits" if png and data[24:26] == b"\x10\x00" else b""
    if not any(word in data for word in (b"Exif", b"eXIf", b"tiff:Orientation", b"Raw profile")):
        return bits
    from PIL import ExifTags, Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged picture, which its decoder reports
        return bits
    return bits + (b"upright" if turned in range(2, 9) else b"")
