"""Shard files of a column: an open descriptor and a parsed index of one version of each file.

A shard ends with its index, one pair (start, length) per slot, and the index's crc32c. A builder
replaces a shard by renaming another file to its path. An open descriptor then still reads the
whole old version, and `Shards.get` detects the new one by the path's stat.

No lock protects the tables, since a forked process could inherit it locked. Each step on a dict is
atomic, and two threads that open the same shard at once only open it twice.
"""

import os
from array import array
from collections.abc import Callable
from errno import EMFILE, ENFILE
from operator import attrgetter
from pathlib import Path

import google_crc32c  # what Zarr's own crc32c codec calls, and requires
import numpy as np

from varve.stores.columns import CRC_BYTES, INDEX_ENTRY_BYTES

OPEN_FILES = 32
ABSENT, WRONG = -1, -2

# Identifies one version of a file. It changes with every write, and (by st_nlink) with a
# replacement.
Stamp = tuple[int, ...]
_stamp: Callable[[os.stat_result], Stamp] = attrgetter(
    "st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns", "st_nlink"
)


class Shard:
    """An open shard file. It is closed when the last reference to it is deleted.

    Attributes:
        starts: Offset of the chunk of each slot; ABSENT without a chunk; WRONG for an impossible
            offset.
        stride: Bytes from one chunk to the next; all offsets are multiples of it. 0 where the
            chunks do not tile the file.
        checked: Whether this process has found the checksum of each slot's chunk right, one byte a
            slot. It belongs to this version of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.stamp = _stamp(os.fstat(descriptor))
        self.starts, self.stride = array("q"), 0
        self.checked = bytearray()

    def __reduce__(self) -> str:
        raise TypeError("an open shard belongs to its process; pickle the Feature")

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


class Shards:
    """The shards of one column, by number. At most OPEN_FILES are open; all indices are kept."""

    def __init__(self, folder: Path, axes: int, slots: int, chunk_bytes: int) -> None:
        self._before, self._after = f"{folder}/c/", "/0" * (axes - 1)
        self._slots, self._chunk_bytes = slots, chunk_bytes
        self._open: dict[int, Shard] = {}
        self._indices: dict[int, tuple[Stamp, array[int], int, bytearray]] = {}

    def now(self, number: int) -> Stamp | None:
        """Return the present version of a shard's file; None if there is no file."""
        try:
            return _stamp(os.stat(self._path(number)))
        except FileNotFoundError:
            return None

    def get(self, number: int) -> Shard | str | None:
        """Return the present shard; None if there is no file; a message if it is damaged."""
        now, shard = self.now(number), self._open.get(number)
        if now is None:
            return None
        if shard is not None and shard.stamp == now:
            return shard
        try:
            shard = Shard(self._descriptor(number))
        except FileNotFoundError:
            return None
        index = self._indices.get(number)
        if index is None or index[0] != shard.stamp:
            try:
                starts, stride = self._parse(shard.descriptor)
                index = (shard.stamp, starts, stride, bytearray(self._slots))
            except (ValueError, OSError) as error:
                return str(error)
            self._indices[number] = index
        _, shard.starts, shard.stride, shard.checked = index
        self._open[number] = shard
        for old in list(self._open)[:-OPEN_FILES]:
            self._open.pop(old, None)
        return shard

    def forget(self, number: int) -> None:
        """Forget a shard, so that the next `get` opens and parses it again."""
        self._open.pop(number, None)
        self._indices.pop(number, None)

    def _path(self, number: int) -> str:
        return f"{self._before}{number}{self._after}"

    def _descriptor(self, number: int) -> int:
        try:
            return os.open(self._path(number), os.O_RDONLY)
        except OSError as error:
            if error.errno not in (EMFILE, ENFILE):
                raise
            self._open.clear()
            return os.open(self._path(number), os.O_RDONLY)

    def _parse(self, descriptor: int) -> "tuple[array[int], int]":
        size = os.fstat(descriptor).st_size
        index = bytearray(INDEX_ENTRY_BYTES * self._slots + CRC_BYTES)
        data_bytes = size - len(index)
        if data_bytes < 0 or fill(descriptor, memoryview(index), data_bytes) < len(index):
            raise ValueError(f"it is cut off: its index takes {len(index)} bytes, it has {size}")
        if differs(np.frombuffer(index, np.uint8)[:-CRC_BYTES], index[-CRC_BYTES:]):
            raise ValueError("its index does not match its checksum")
        entries = np.frombuffer(index, "<u8", 2 * self._slots).reshape(-1, 2)
        starts = np.full(len(entries), WRONG, np.int64)
        starts[(entries == np.iinfo(np.uint64).max).all(axis=1)] = ABSENT
        starts_end = max(0, data_bytes - self._chunk_bytes + 1)
        fits = (entries[:, 1] == self._chunk_bytes) & (entries[:, 0] < starts_end)
        starts[fits] = entries[fits, 0]
        # Zarr writes chunks without gaps. Another writer may align them.
        stride = int(np.gcd.reduce(starts[starts >= 0])) or self._chunk_bytes
        tiles = self._chunk_bytes <= stride < 2 * self._chunk_bytes
        return array("q", starts.tobytes()), stride if tiles else 0


def fill(descriptor: int, buffer: memoryview, start: int) -> int:
    """Read until the buffer is full or the file ends, and return the number of bytes read."""
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, (buffer[done:],), start + done)
        if not got:
            break
        done += got
    return done


def differs(data: np.ndarray, checksum: bytes | bytearray) -> bool:
    """Return whether the crc32c of the data differs from the stored checksum."""
    # The library accepts bytes and arrays, but no memoryview.
    return bool(google_crc32c.value(data) != int.from_bytes(checksum, "little"))
