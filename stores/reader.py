"""Reading cells: the stored bits of some rows, into a given array, fast and never torn.

A reader has one method, `read(rows, out, verify)`; see `Reader`. `ShardReader`, here, serves what
a build writes: local shards, a chunk a clip, nothing compressed (`plain_shards` tells).
`varve.stores.zarr_reader` serves every other array.

Bytes are copied by `preadv`, never from a memory map: when a mapped file is cut off, or its disk
fails, the process ends (SIGBUS), where `preadv` comes back short or raises. It has no file
position either, so threads and forks share descriptors freely.

Shapes: N rows asked for, B bytes of a cell.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

from varve.stores.columns import CRC_BYTES
from varve.stores.shards import ABSENT, OPEN_FILES, Shard, Shards, differs, fill

# A thread starts in 0.1 ms, in which another copies a megabyte.
THREAD_BYTES = 8 << 20
# Cells up to this size are slow to read one by one: a call costs as much as copying 10 KB.
SMALL_BYTES = 256 << 10
SPAN_BYTES = 512 << 10
NEAR_ROWS = 4
KEEP_BYTES = min(4 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
WORKERS = 8
KEEP_AFTER = 1 / 16
# A place is an index into the rows asked for. Those without a chunk; those that failed, and why.
Outcome = tuple[list[int], list[tuple[int, str]]]


class Unreadable(ValueError):
    """A cell cannot be read: of which row, and why."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(why)
        self.row = row


class Reader(Protocol):
    def read(self, rows: np.ndarray, out: np.ndarray, verify: bool = True) -> list[int]:
        """Fill `out` with the stored bits of `rows`.

        Args:
            rows: int64 [N] within the array, in any order, repeats included.
            out: [N, *cell] of the array's type, C-contiguous.
            verify: Check the chunks' checksums.

        Returns:
            The places in `rows` that have no chunk; there `out` means nothing.

        Raises:
            Unreadable: A cell is damaged.
        """


def plain_shards(array: "zarr.Array[Any]") -> Path | None:
    """Where the array lies, if `ShardReader` serves it: local shards of whole, plain cells.

    Told by the array's metadata; no shard is looked at.
    """
    if not (isinstance(array, zarr.Array) and isinstance(array.store, LocalStore)):
        return None
    codecs: tuple[Any, ...] = getattr(array.metadata, "codecs", ())
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    sharding, cell = codecs[0], tuple(array.shape)[1:]
    all_codecs = (*sharding.codecs, *sharding.index_codecs)
    plain = (
        [type(codec) for codec in sharding.codecs] in ([BytesCodec], [BytesCodec, Crc32cCodec])
        and [type(codec) for codec in sharding.index_codecs] == [BytesCodec, Crc32cCodec]
        and str(sharding.index_location) == "end"
        and sharding.chunk_shape == (1, *cell)
        and array.shards is not None
        and tuple(array.shards)[1:] == cell
        and array.metadata.encode_chunk_key((7, *(0 for _ in cell))) == "c/7" + "/0" * len(cell)
        and sys.byteorder == "little"
        and np.dtype(array.dtype).isnative
        and not any("big" in str(getattr(codec, "endian", "")) for codec in all_codecs)
    )
    return array.store.root / array.path if plain else None


@dataclass(frozen=True)
class _Kept:
    """Verified cells in memory: of which rows, and of which shards, which it holds open."""

    cells: np.ndarray
    rows: np.ndarray
    shards: dict[int, Shard]


class ShardReader:
    """Cells of local shards: an index is parsed once, then each cell is had by its place.

    A shard is looked at (stat) once a read, and parsed anew where it was replaced. Index and
    cells come from one descriptor, so from one version of the file.

    Small cells cannot be read one by one at the speed of memory. Where rows lie close together,
    spans of them are read; and when a sixteenth of a column was read in single small cells, a
    column of up to `keep_bytes` is loaded, verified, and read from memory as long as its files
    stay what they are.

    Attributes:
        threads: At most so many copy at once, where each has megabytes to copy.
        keep_bytes: Of a column that may be kept in memory; 0 for none. A process that another one
            started takes an eighth of it.
    """

    def __init__(self, folder: Path, array: "zarr.Array[Any]") -> None:
        shards = array.shards or array.chunks
        codecs: tuple[Any, ...] = getattr(array.metadata, "codecs", ())
        self.threads = min(4, len(os.sched_getaffinity(0)))
        self.keep_bytes = KEEP_BYTES
        self._shape, self._dtype = array.shape, np.dtype(array.dtype)
        self._shard_clips = int(shards[0])
        self._cell_bytes = int(np.prod(tuple(array.shape)[1:])) * self._dtype.itemsize
        self._has_checksums = len(codecs[0].codecs) == 2
        self._chunk_bytes = self._cell_bytes + (CRC_BYTES if self._has_checksums else 0)
        self._small = self._cell_bytes <= SMALL_BYTES
        self._shards = Shards(folder, len(array.shape), self._shard_clips, self._chunk_bytes)
        # No lock guards these: one may be inherited held, and each single step is atomic.
        self._kept: _Kept | None = None
        self._keepers: dict[int, object] = {}
        self._singles = 0

    def read(self, rows: np.ndarray, out: np.ndarray, verify: bool = True) -> list[int]:
        """Fill `out`; see `Reader`. What is kept in memory was verified when it was loaded."""
        if not out.size:
            return []
        if self._small and self._from_memory(rows, out):
            return []
        verify = verify and self._has_checksums
        fetch = self._spans if self._small and _dense(rows) else self._singly
        absent, failed = fetch(rows, out, verify)
        if failed:
            # The file may have been changed in place within its time stamp's resolution, or be
            # gone on its server: look once more, with nothing remembered.
            places = np.array([place for place, _ in failed])
            for number in set((rows[places] // self._shard_clips).tolist()):
                self._shards.forget(number)
            again = np.empty((len(places), *out.shape[1:]), out.dtype)
            gone, failed = self._singly(rows[places], again, verify)
            if failed:
                raise Unreadable(*min((int(rows[places[i]]), why) for i, why in failed))
            out[places] = again
            absent += places[gone].tolist()
        return absent

    # A call a cell: large cells, and small ones far apart.

    def _singly(self, rows: np.ndarray, out: np.ndarray, verify: bool) -> Outcome:
        absent: list[int] = []
        failed: list[tuple[int, str]] = []
        shards: dict[int, Shard | str | None] = {}
        pieces: list[tuple[int, int, int]] = []
        for place, row in enumerate(rows.tolist()):
            number = row // self._shard_clips
            if number not in shards:
                if len(shards) == OPEN_FILES:
                    self._copy_all(pieces, out, verify, failed)
                    shards, pieces = {}, []
                shards[number] = self._shards.get(number)
            shard = shards[number]
            if isinstance(shard, Shard):
                start = shard.starts[row % self._shard_clips]
                if start >= 0:
                    pieces.append((shard.descriptor, place, start))
                elif start == ABSENT:
                    absent.append(place)
                else:
                    failed.append((place, "its index points to where no chunk can be"))
            elif shard is None:
                absent.append(place)
            else:
                failed.append((place, shard))
        self._copy_all(pieces, out, verify, failed)
        self._singles += len(rows)
        return absent, failed

    def _copy_all(
        self,
        pieces: list[tuple[int, int, int]],
        out: np.ndarray,
        verify: bool,
        failed: list[tuple[int, str]],
    ) -> None:
        # One iterator for all: who is free takes the next piece. The threads end with the call:
        # a pool that outlives it would be gone in a fork's child.
        work = (iter(pieces), out.reshape(-1).view(np.uint8), verify, failed)
        count = min(self.threads, len(pieces) * self._cell_bytes // THREAD_BYTES)
        # A loader's workers are many already, and a thread without a core of its own is waited for.
        if count > 1:
            count = 1 if multiprocessing.parent_process() else min(count, 1 + _idle_cores())
        helpers = [threading.Thread(target=self._copy, args=work) for _ in range(1, count)]
        for helper in helpers:
            helper.start()
        try:
            self._copy(*work)
        finally:
            for helper in helpers:
                helper.join()

    def _copy(
        self,
        pieces: Iterator[tuple[int, int, int]],
        out_B: np.ndarray,
        verify: bool,
        failed: list[tuple[int, str]],
    ) -> None:
        size, checksum = self._cell_bytes, bytearray(CRC_BYTES if verify else 0)
        buffer, whole = memoryview(out_B), size + len(checksum)
        for descriptor, place, start in pieces:
            a, b = place * size, place * size + size
            buffers = (buffer[a:b], checksum) if verify else (buffer[a:b],)
            try:
                got = os.preadv(descriptor, buffers, start)
                if got < whole:  # cut off, or one of the kernel's own limits
                    data = np.empty(whole, np.uint8)
                    got = fill(descriptor, memoryview(data), start)
                    out_B[a:b], checksum[:] = data[:size], data[size:].tobytes()
            except (OSError, MemoryError) as error:
                failed.append((place, str(error)))
                continue
            if got < whole:
                failed.append((place, "the file ends within its chunk"))
            elif verify and differs(out_B[a:b], checksum):
                failed.append((place, "its chunk does not match its checksum"))

    # A call a span: small cells that lie close together.

    def _spans(
        self,
        rows: np.ndarray,
        out: np.ndarray,
        verify: bool,
        seen: dict[int, Shard] | None = None,
    ) -> Outcome:
        """As `_singly`; `seen` is told each shard that was read."""
        scratch = np.empty(SPAN_BYTES + self._chunk_bytes, np.uint8)
        out_NB = out.reshape(-1).view(np.uint8).reshape(len(rows), self._cell_bytes)
        absent: list[int] = []
        failed: list[tuple[int, str]] = []
        order = np.argsort(rows, kind="stable")
        numbers_N = rows[order] // self._shard_clips
        for a, b in pairwise([0, *(np.flatnonzero(np.diff(numbers_N)) + 1).tolist(), len(rows)]):
            number, places = int(numbers_N[a]), order[a:b]
            shard = self._shards.get(number)
            if shard is None:
                absent += places.tolist()
                continue
            if isinstance(shard, str):
                failed += [(place, shard) for place in places.tolist()]
                continue
            if seen is not None:
                seen[number] = shard
            slots = rows[places] - number * self._shard_clips
            starts = np.frombuffer(shard.starts, np.int64)[slots]
            absent += places[starts == ABSENT].tolist()
            # Chunks that do not tile the file are left to the second look, cell by cell.
            tiles, stride = (starts >= 0) & (shard.stride > 0), shard.stride or 1
            failed += [(place, "") for place in places[~tiles & (starts != ABSENT)].tolist()]
            places, nth = places[tiles], starts[tiles] // stride
            window = len(scratch) // stride
            by_nth = np.argsort(nth, kind="stable")
            places, nth = places[by_nth], nth[by_nth]
            breaks = (np.diff(nth) > NEAR_ROWS) | (np.diff(nth // window) != 0)
            for c, d in pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(nth)]):
                lost = self._span(shard, nth[c:d], places[c:d], scratch, out_NB, verify)
                failed += [(place, "") for place in lost]
        return absent, failed

    def _span(
        self,
        shard: Shard,
        nth: np.ndarray,
        places: np.ndarray,
        scratch: np.ndarray,
        out_NB: np.ndarray,
        verify: bool,
    ) -> list[int]:
        """Read chunks `nth` (not decreasing, within a window). Returns the places that failed."""
        if not len(nth):
            return []
        size, chunk, stride, first = self._cell_bytes, self._chunk_bytes, shard.stride, int(nth[0])
        span = scratch[: (int(nth[-1]) + 1 - first) * stride].reshape(-1, stride)
        try:
            got = fill(shard.descriptor, memoryview(span.reshape(-1)), first * stride)
        except OSError:
            got = 0
        if got < span.size - stride + chunk:
            return [int(place) for place in places]
        mine, a, b = nth - first, int(places[0]), int(places[-1]) + 1
        if (np.diff(nth) == 1).all() and (np.diff(places) == 1).all():
            out_NB[a:b] = span[:, :size]
        else:
            out_NB[places] = span[mine, :size]
        pairs = zip(places.tolist(), mine.tolist(), strict=True) if verify else ()
        return [p for p, i in pairs if differs(span[i, :size], span[i, size:chunk].tobytes())]

    # No call at all: small columns that are read at random, again and again.

    def _from_memory(self, rows: np.ndarray, out: np.ndarray) -> bool:
        """Fill `out` if all the rows are kept, and their files are still what they were."""
        kept = self._kept
        if kept is None:
            clips = self._shape[0]
            # Of a loader's workers each would keep one.
            share = WORKERS if multiprocessing.parent_process() else 1
            limit = self.keep_bytes // share
            if self._singles < clips * KEEP_AFTER or clips * self._cell_bytes > limit:
                return False
            kept = self._keep()
        if kept is None or not kept.rows[rows].all():
            return False
        few = len(kept.shards) <= 16
        numbers = kept.shards if few else set((rows // self._shard_clips).tolist())
        if not all(kept.shards[number].is_current() for number in numbers):
            # Dropped, not mended in place: another thread may be copying from it.
            self._kept, self._singles = None, 0
            return False
        # "clip" spares numpy a second buffer; the rows are within bounds.
        np.take(kept.cells, rows, axis=0, out=out, mode="clip")
        return True

    def _keep(self) -> _Kept | None:
        """Load the column. One thread of a process does; the others read on."""
        token, process = object(), os.getpid()
        if self._keepers.setdefault(process, token) is not token:
            return None
        try:
            rows = np.arange(self._shape[0])
            cells = np.empty(self._shape, self._dtype)
            shards: dict[int, Shard] = {}
            absent, failed = self._spans(rows, cells, self._has_checksums, shards)
            there = np.ones(len(rows), bool)
            there[absent] = there[[place for place, _ in failed]] = False
            self._kept = _Kept(cells, there, shards)
            return self._kept
        except MemoryError:
            self.keep_bytes = 0
            return None
        finally:
            del self._keepers[process]


def _idle_cores() -> int:
    """How many of this process's cores have nothing to run at this moment."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, IndexError, ValueError):
        return 0
    return max(0, len(os.sched_getaffinity(0)) - running)


def _dense(rows: np.ndarray) -> bool:
    """Whether most of the rows have the next one close behind them."""
    if len(rows) < 16:
        return False
    return bool(np.count_nonzero(np.diff(np.sort(rows)) <= NEAR_ROWS) * 2 > len(rows))
