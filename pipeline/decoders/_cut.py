"""Files that are cut off, by the sizes that their containers declare. No packet is read."""

import os
from pathlib import Path
from typing import BinaryIO

# Kinds of boxes at the top level of MP4 and QuickTime files.
_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"styp", b"moof")
)
_EBML, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")
SLACK_BYTES = 16  # some writers of AVI count the first eight bytes too


def cut_off(path: str | Path) -> str:
    """Return how a file is cut off; "" for a whole file, and for one that declares no sizes.

    MP4, QuickTime, AVI, Matroska and WebM files declare them. Packets of a transport stream have
    188 bytes each.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(189)
        if head[4:8] in _BOXES:
            return _without_index(file, size)
        if head[::188] == b"GG":
            return "the file is cut off: it ends within a packet" if size % 188 else ""
        if head[:4] == b"RIFF":
            promised = 8 + int.from_bytes(head[4:8], "little")
        else:
            promised = _matroska_bytes(file) if head[:4] == _EBML else 0
    if promised <= size + SLACK_BYTES:
        return ""
    return f"the file is cut off: it has {size} of the {promised} bytes that its header promises"


def _without_index(file: BinaryIO, size: int) -> str:
    """Walk over the boxes of an MP4 file to its index, the moov atom."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        if length == 1:
            length = int.from_bytes(head[8:16])
        end = start + length if length else size
        if head[4:8] == b"moov":
            return "" if end <= size else "the moov atom, its index, is cut off"
        if end < start + 8:
            break
        start = end
    return "no moov atom: the file is cut off before its index, or was never finished"


def _matroska_bytes(file: BinaryIO) -> int:
    """Return the size of a Matroska file by its first segment; 0 where it is not declared."""
    file.seek(4)
    header = _variable_length(file)
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    segment = _variable_length(file)
    return file.tell() + segment if segment else 0


def _variable_length(file: BinaryIO) -> int:
    """Read an EBML size: the number of leading zero bits says its length; all ones is unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return 0
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1)) & ~(1 << 7 * length)
    return 0 if value == (1 << 7 * length) - 1 else value
