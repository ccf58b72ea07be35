"""Kinds of files, video, picture or neither: by the name, else by the first bytes.

A known extension decides, and the file is not opened. A file without one, or with an unknown one,
is judged by the magic number of a container. No video is decoded, and nothing is demuxed. A GIF
file is a video unless it is a still; WebP and PNG files are pictures unless `is_animated`.
Light to import.
"""

import os
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

VIDEO, PICTURE, OTHER = "videos", "pictures", "other files"

# fmt: off
VIDEO_SUFFIXES = frozenset((
    ".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v", ".wmv", ".flv", ".3gp",
    ".ts", ".mts", ".m2ts", ".ogv",
    ".gif", ".apng", ".vob", ".asf", ".divx", ".xvid", ".f4v", ".h264", ".264", ".h265", ".265",
    ".hevc", ".mxf", ".y4m", ".rm", ".rmvb", ".dv", ".ogm", ".3g2", ".m1v", ".m2v", ".mpe", ".mpv",
    ".m2t", ".qt", ".mjpeg", ".mjpg", ".mk3d", ".ivf", ".obu", ".nut", ".wtv",
))
PICTURE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".ico", ".psd", ".dng", ".exr", ".tga",
))
# Never opened: text, arrays, archives, sound, and files that a download has not finished.
OTHER_SUFFIXES = frozenset((
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".rst", ".pdf", ".html", ".htm",
    ".yaml", ".yml", ".toml", ".ini", ".log", ".py", ".ipynb", ".sh", ".m", ".srt", ".vtt", ".ass",
    ".ssa", ".sub", ".idx", ".nfo", ".doc", ".docx", ".xls", ".xlsx", ".pkl", ".pickle", ".npy",
    ".npz", ".pt", ".pth", ".h5", ".hdf5", ".mat", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz",
    ".7z", ".rar", ".wav", ".mp3", ".m4a", ".m4b", ".aac", ".flac", ".opus", ".wma", ".mka", ".oga",
    ".part", ".crdownload", ".tmp", ".download", ".aria2", ".ytdl", ".filepart", ".md5", ".sha1",
    ".sha256", ".parquet", ".arrow", ".db",
))
# fmt: on

PROBE_BYTES = 4096
GIF_BYTES = 8 << 20  # read of a GIF file to find a second picture
_STILL_BRANDS = frozenset(
    (b"avif", b"heic", b"heix", b"mif1", b"heim", b"heis", b"jp2 ", b"jpx ", b"crx ")
)
_AUDIO_BRANDS = frozenset((b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"aax "))
_QUICKTIME_ATOMS = frozenset((b"moov", b"mdat", b"wide", b"pnot"))
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_MXF = bytes.fromhex("060e2b34020501010d010201")
_OGG_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
_PICTURES = (b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\1\0")


def suffix(name: str) -> str:
    """Return the extension in lower case, with its dot; "" without one. Spaces at its end go.

    >>> suffix("a.MP4"), suffix("b.mp4 "), suffix("c")
    ('.mp4', '.mp4', '')
    """
    return os.path.splitext(name.rstrip())[1].lower()


def kind_of(path: str | Path) -> str:
    """Return VIDEO, PICTURE or OTHER for the file at `path`.

    A file without a known extension that cannot be read is OTHER. A link to nothing, or an empty
    file, with the extension of a video is one, so that a build reports it.
    """
    ending = suffix(os.path.basename(path))
    if ending == ".gif":
        return PICTURE if _probe(path, _gif_kind) == PICTURE else VIDEO
    for kind, known in (
        (VIDEO, VIDEO_SUFFIXES), (PICTURE, PICTURE_SUFFIXES), (OTHER, OTHER_SUFFIXES)
    ):  # fmt: skip
        if ending in known:
            return kind
    return _probe(path, _kind)


def is_animated(path: str | Path) -> bool:
    """Return whether a WebP or PNG file is an animation, by its first bytes."""
    return _probe(path, _kind) == VIDEO


def _probe(path: str | Path, judge: Callable[[BinaryIO], str]) -> str:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return OTHER
        return _cached(os.fspath(path), status.st_size, status.st_mtime_ns, judge)
    except (OSError, ValueError):
        return OTHER


@lru_cache(maxsize=1 << 16)
def _cached(path: str, _size: int, _mtime_ns: int, judge: Callable[[BinaryIO], str]) -> str:
    with open(path, "rb") as file:
        return judge(file)


def _kind(file: BinaryIO) -> str:
    """Judge a file by its first bytes."""
    head = file.read(PROBE_BYTES)
    if head.startswith(b"GIF8"):
        file.seek(0)
        return _gif_kind(file)
    if head.startswith(b"\x89PNG"):
        return VIDEO if b"acTL" in head[: max(head.find(b"IDAT"), 0) or None] else PICTURE
    if head[:4] == b"RIFF":
        if head[8:12] == b"WEBP":
            return VIDEO if head[12:16] == b"VP8X" and head[20] & 2 else PICTURE
        return VIDEO if head[8:12] == b"AVI " else OTHER
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return PICTURE if brand in _STILL_BRANDS else OTHER if brand in _AUDIO_BRANDS else VIDEO
    if head.startswith(b"OggS"):
        return OTHER if any(word in head[:64] for word in _OGG_AUDIO) else VIDEO
    if _is_video(head):
        return VIDEO
    return PICTURE if head.startswith(_PICTURES) else OTHER


def _is_video(head: bytes) -> bool:
    return (
        head.startswith((b"\x1a\x45\xdf\xa3", b"FLV\x01", b"YUV4MPEG2 ", b".RMF", _ASF, b"DKIF"))
        or head.startswith((b"\0\0\1\xba", b"\0\0\1\xb3"))  # MPEG program or elementary stream
        or head.startswith((b"\0\0\0\1\x67", b"\0\0\0\1\x27", b"\0\0\0\1\x40\x01"))  # H.264, HEVC
        or head.startswith(b"nut/multimedia container\0")
        or head[4:8] in _QUICKTIME_ATOMS
        or _MXF in head
        # Transport streams repeat their first byte in every packet; M2TS puts 4 bytes before it.
        or any(_repeats(head, first, step) for first, step in ((0, 188), (4, 192), (0, 204)))
    )


def _repeats(head: bytes, first: int, step: int) -> bool:
    marks = head[first::step][:5]
    return len(marks) >= 3 and set(marks) == {0x47}


def _gif_kind(file: BinaryIO) -> str:
    """Tell a GIF animation from a still, by its blocks up to a second picture."""
    data = file.read(GIF_BYTES)
    if not data.startswith(b"GIF8"):
        return OTHER
    try:
        at, pictures = 13 + _colours(data[10]), 0
        while data[at] in (0x21, 0x2C):
            if data[at] == 0x2C:
                pictures += 1
                at += 11 + _colours(data[at + 9])
            else:
                at += 2
            if pictures > 1:
                return VIDEO
            while data[at]:
                at += 1 + data[at]
            at += 1
    except IndexError:  # cut off, or a very large first picture
        return VIDEO
    return PICTURE


def _colours(flags: int) -> int:
    """Return the bytes of a colour table, by the flags before it."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
