"""Read cells from local shards: the stored bits of some rows, copied into an array of the caller.

A reader has one method, `read(rows, out, verify)`; see `Reader`. `ShardReader` reads what a build
writes: local shards with one uncompressed chunk per clip (`plain_shards` recognises them).
`varve.stores.zarr_reader` reads every other array.

Bytes are copied by `preadv` and not from a memory map. If a mapped file is truncated, or its disk
fails, the process ends (SIGBUS); `preadv` then returns fewer bytes or raises. It also has no file
position, so threads and forked processes share descriptors safely.

Shapes: N requested rows, B bytes of a cell. An index is a position in the requested rows.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

from varve.stores.columns import CRC_BYTES
from varve.stores.shard_files import ABSENT, OPEN_FILES, Shard, Shards, differs, fill

# A thread starts in 0.1 ms. In that time another thread copies a megabyte.
THREAD_BYTES = 8 << 20
# Cells up to this size are slow to read one by one: a system call costs as much as copying 10 KB.
SMALL_BYTES = 256 << 10
SPAN_BYTES = 512 << 10
NEAR_ROWS = 4
# Items of a cell with less than this between them are read as one span. At most so many at a time,
# which bounds the memory of the spans.
NEAR_BYTES = 16 << 10
ITEMS_AT_ONCE = 512
# Indices of the requested rows that have no chunk, and of those that failed, with the reason.
Outcome = tuple[list[int], list[tuple[int, str]]]


class Unreadable(ValueError):
    """A cell cannot be read. `row` is its row; the message gives the reason."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(why)
        self.row = row


class Reader(Protocol):
    """A way to read the cells of one array."""

    def read(self, rows: np.ndarray, out: np.ndarray, verify: bool = True) -> list[int]:
        """Copy the stored bits of `rows` into `out`.

        Args:
            rows: Rows of the array, int64 [N], in any order; rows may repeat.
            out: Array [N, *cell] of the stored type, C-contiguous.
            verify: Whether to check the chunks' checksums.

        Returns:
            Indices into `rows` of the rows that have no chunk. `out` is undefined there.

        Raises:
            Unreadable: A cell is damaged.
        """

    def read_items(
        self, rows: np.ndarray, items: np.ndarray, out: np.ndarray, verify: bool = True
    ) -> list[int]:
        """Copy single items of cells, such as frames of pages, into `out`.

        Args:
            rows: Rows of the array, int64 [N], in any order; rows may repeat.
            items: Position in the row's cell, along its first axis, int64 [N].
            out: Array [N, *item] of the stored type, C-contiguous.
            verify: Whether to check the checksums of the chunks that the items are in.

        Returns:
            Indices into `rows` of the rows that have no chunk. `out` is undefined there.

        Raises:
            Unreadable: A cell is damaged.
        """


def plain_shards(array: "zarr.Array[Any]") -> Path | None:
    """Return the array's folder if `ShardReader` can read it, and None otherwise.

    It can read local shards of whole, uncompressed cells. The array's metadata decides this; no
    shard is opened.
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


class ShardReader:
    """Reader of local shards. Each shard's index is parsed once and gives the offset of each cell.

    Every read checks (stat) whether a shard was replaced, and parses the index again if it was.
    Index and cells come from one descriptor, and therefore from one version of the file.

    Small cells cannot be read one by one at the speed of memory: where the requested rows are
    close together, whole spans are read. No cell is kept in memory; to read the same cells many
    times, keep them in a `varve.FeatureTensors`.

    Attributes:
        threads: Maximum number of threads that copy, where each has megabytes to copy.
    """

    def __init__(self, folder: Path, array: "zarr.Array[Any]") -> None:
        shards = array.shards or array.chunks
        codecs: tuple[Any, ...] = getattr(array.metadata, "codecs", ())
        self.threads = min(4, len(os.sched_getaffinity(0)))
        self._shape, self._dtype = array.shape, np.dtype(array.dtype)
        self._shard_clips = int(shards[0])
        self._cell_bytes = int(np.prod(tuple(array.shape)[1:])) * self._dtype.itemsize
        self._has_checksums = len(codecs[0].codecs) == 2
        self._chunk_bytes = self._cell_bytes + (CRC_BYTES if self._has_checksums else 0)
        self._small = self._cell_bytes <= SMALL_BYTES
        self._shards = Shards(folder, len(array.shape), self._shard_clips, self._chunk_bytes)

    def read(self, rows: np.ndarray, out: np.ndarray, verify: bool = True) -> list[int]:
        """Copy cells into `out`; see `Reader`."""
        if not out.size:
            return []
        verify = verify and self._has_checksums
        read = self._read_spans if self._small and _dense(rows) else self._read_cells
        absent, failed = read(rows, out, verify)
        if failed:
            # The file may have changed in place within the resolution of its time stamp, or its
            # server may have dropped the handle: open it and read once more.
            indices = np.array([index for index, _ in failed])
            for number in set((rows[indices] // self._shard_clips).tolist()):
                self._shards.forget(number)
            cells = np.empty((len(indices), *out.shape[1:]), out.dtype)
            still_absent, failed = self._read_cells(rows[indices], cells, verify)
            if failed:
                raise Unreadable(*min((int(rows[indices[i]]), why) for i, why in failed))
            out[indices] = cells
            absent += indices[still_absent].tolist()
        return absent

    def read_items(
        self, rows: np.ndarray, items: np.ndarray, out: np.ndarray, verify: bool = True
    ) -> list[int]:
        """Copy items of cells into `out`; see `Reader`.

        A chunk has one checksum, for all of its items. It is read whole and checked the first time
        that this process reads an item of it, and again after its file was replaced.
        """
        if not out.size:
            return []
        verify = verify and self._has_checksums
        absent, failed = self._read_items(rows, items, out, verify)
        if failed:
            indices = np.array([index for index, _ in failed])
            for number in set((rows[indices] // self._shard_clips).tolist()):
                self._shards.forget(number)
            again = np.empty((len(indices), *out.shape[1:]), out.dtype)
            still_absent, failed = self._read_items(rows[indices], items[indices], again, verify)
            if failed:
                raise Unreadable(*min((int(rows[indices[i]]), why) for i, why in failed))
            out[indices] = again
            absent += indices[still_absent].tolist()
        return absent

    # One system call per cell: for large cells, and for small cells far apart.

    def _read_cells(self, rows: np.ndarray, out: np.ndarray, verify: bool) -> Outcome:
        absent: list[int] = []
        failed: list[tuple[int, str]] = []
        shards: dict[int, Shard | str | None] = {}
        pieces: list[tuple[int, int, int]] = []
        for index, row in enumerate(rows.tolist()):
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
                    pieces.append((shard.descriptor, index, start))
                elif start == ABSENT:
                    absent.append(index)
                else:
                    failed.append((index, "its index points to where no chunk can be"))
            elif shard is None:
                absent.append(index)
            else:
                failed.append((index, shard))
        self._copy_all(pieces, out, verify, failed)
        return absent, failed

    def _copy_all(
        self,
        pieces: list[tuple[int, int, int]],
        out: np.ndarray,
        verify: bool,
        failed: list[tuple[int, str]],
    ) -> None:
        # All threads take pieces from one iterator. They end with the call, since a pool that
        # outlived it would not exist in a forked process.
        work = (iter(pieces), out.reshape(-1).view(np.uint8), verify, failed)
        count = min(self.threads, len(pieces) * self._cell_bytes // THREAD_BYTES)
        # A data loader has several workers already, and a thread without an idle core only waits.
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
        for descriptor, index, start in pieces:
            a, b = index * size, index * size + size
            buffers = (buffer[a:b], checksum) if verify else (buffer[a:b],)
            try:
                got = os.preadv(descriptor, buffers, start)
                if got < whole:  # the file is truncated, or the kernel returns less at a time
                    data = np.empty(whole, np.uint8)
                    got = fill(descriptor, memoryview(data), start)
                    out_B[a:b], checksum[:] = data[:size], data[size:].tobytes()
            except (OSError, MemoryError) as error:
                failed.append((index, str(error)))
                continue
            if got < whole:
                failed.append((index, "the file ends within its chunk"))
            elif verify and differs(out_B[a:b], checksum):
                failed.append((index, "its chunk does not match its checksum"))

    # One system call per span: for small cells close together.

    def _read_spans(self, rows: np.ndarray, out: np.ndarray, verify: bool) -> Outcome:
        scratch = np.empty(SPAN_BYTES + self._chunk_bytes, np.uint8)
        out_NB = out.reshape(-1).view(np.uint8).reshape(len(rows), self._cell_bytes)
        absent: list[int] = []
        failed: list[tuple[int, str]] = []
        order = np.argsort(rows, kind="stable")
        numbers_N = rows[order] // self._shard_clips
        for a, b in pairwise([0, *(np.flatnonzero(np.diff(numbers_N)) + 1).tolist(), len(rows)]):
            number, indices = int(numbers_N[a]), order[a:b]
            shard = self._shards.get(number)
            if shard is None:
                absent += indices.tolist()
                continue
            if isinstance(shard, str):
                failed += [(index, shard) for index in indices.tolist()]
                continue
            slots = rows[indices] - number * self._shard_clips
            starts = np.frombuffer(shard.starts, np.int64)[slots]
            absent += indices[starts == ABSENT].tolist()
            # Chunks that do not tile the file are read cell by cell in the second attempt.
            tiles, stride = (starts >= 0) & (shard.stride > 0), shard.stride or 1
            failed += [(index, "") for index in indices[~tiles & (starts != ABSENT)].tolist()]
            indices, nth = indices[tiles], starts[tiles] // stride
            window = len(scratch) // stride
            by_nth = np.argsort(nth, kind="stable")
            indices, nth = indices[by_nth], nth[by_nth]
            breaks = (np.diff(nth) > NEAR_ROWS) | (np.diff(nth // window) != 0)
            for c, d in pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(nth)]):
                lost = self._read_span(shard, nth[c:d], indices[c:d], scratch, out_NB, verify)
                failed += [(index, "") for index in lost]
        return absent, failed

    def _read_span(
        self,
        shard: Shard,
        nth: np.ndarray,
        indices: np.ndarray,
        scratch: np.ndarray,
        out_NB: np.ndarray,
        verify: bool,
    ) -> list[int]:
        """Read chunks `nth` (non-decreasing, within one window), and return the failed indices."""
        if not len(nth):
            return []
        size, chunk, stride, first = self._cell_bytes, self._chunk_bytes, shard.stride, int(nth[0])
        span = scratch[: (int(nth[-1]) + 1 - first) * stride].reshape(-1, stride)
        try:
            got = fill(shard.descriptor, memoryview(span.reshape(-1)), first * stride)
        except OSError:
            got = 0
        if got < span.size - stride + chunk:
            return [int(index) for index in indices]
        slots, a, b = nth - first, int(indices[0]), int(indices[-1]) + 1
        if (np.diff(nth) == 1).all() and (np.diff(indices) == 1).all():
            out_NB[a:b] = span[:, :size]
        else:
            out_NB[indices] = span[slots, :size]
        pairs = zip(indices.tolist(), slots.tolist(), strict=True) if verify else ()
        return [i for i, s in pairs if differs(span[s, :size], span[s, size:chunk].tobytes())]

    # Items of cells: one system call for those that are close together.

    def _read_items(
        self, rows: np.ndarray, items: np.ndarray, out: np.ndarray, verify: bool
    ) -> Outcome:
        out_NB = out.reshape(len(rows), -1).view(np.uint8)
        absent: list[int] = []
        failed: list[tuple[int, str]] = []
        numbers_N = rows // self._shard_clips
        order = np.argsort(numbers_N, kind="stable")
        edges = np.flatnonzero(np.diff(numbers_N[order])) + 1
        for indices in np.split(order, edges):
            number = int(numbers_N[indices[0]])
            shard = self._shards.get(number)
            if isinstance(shard, str):
                failed += [(index, shard) for index in indices.tolist()]
                continue
            if shard is None:
                absent += indices.tolist()
                continue
            slots = rows[indices] - number * self._shard_clips
            starts = np.frombuffer(shard.starts, np.int64)[slots]
            bad = starts < 0
            absent += indices[starts == ABSENT].tolist()
            wrong = "its index points to where no chunk can be"
            failed += [(index, wrong) for index in indices[bad & (starts != ABSENT)].tolist()]
            for slot, why in (self._check(shard, slots) if verify else {}).items():
                bad |= slots == slot
                failed += [(index, why) for index in indices[slots == slot].tolist()]
            starts, good = starts[~bad], indices[~bad]
            for a in range(0, len(good), ITEMS_AT_ONCE):
                some = good[a : a + ITEMS_AT_ONCE]
                part = starts[a : a + ITEMS_AT_ONCE]
                lost = self._copy_items(shard.descriptor, part, items[some], some, out_NB)
                failed += [(index, "the file ends within its chunk") for index in lost]
        return absent, failed

    def _check(self, shard: Shard, slots: np.ndarray) -> dict[int, str]:
        """Check the chunks of these slots that were not checked, and return what is wrong."""
        wrong: dict[int, str] = {}
        cell = np.empty(self._cell_bytes, np.uint8)
        unchecked = slots[np.frombuffer(shard.checked, np.uint8)[slots] == 0]
        for slot in dict.fromkeys(unchecked.tolist()):
            start = shard.starts[slot]
            if start < 0:
                continue
            failed: list[tuple[int, str]] = []
            self._copy(iter([(shard.descriptor, 0, start)]), cell, True, failed)
            if failed:
                wrong[slot] = failed[0][1]
            else:
                shard.checked[slot] = True
        return wrong

    def _copy_items(
        self,
        descriptor: int,
        starts: np.ndarray,
        items: np.ndarray,
        indices: np.ndarray,
        out_NB: np.ndarray,
    ) -> list[int]:
        """Copy items of chunks that begin at `starts` to `out_NB[indices]`; return the lost ones.

        Items that follow each other in a file, without a large gap, are read as one span.
        """
        size, lost = out_NB.shape[1], []
        offsets = starts + items * size
        steps = np.diff(offsets)
        # Offsets of one span are a whole number of items apart, in the same chunk.
        apart = (steps < size) | (steps >= size + NEAR_BYTES) | (np.diff(starts) != 0)
        first = np.concatenate([[0], np.flatnonzero(apart) + 1])
        last = np.append(first[1:], len(offsets)) - 1
        counts = (offsets[last] - offsets[first]) // size + 1
        # A span of wanted items in their order is read into `out_NB`, another one beside it.
        straight = (counts == last - first + 1) & (indices[last] - indices[first] == last - first)
        beside = np.cumsum(np.where(straight, 0, counts)) - counts
        side = np.empty((int(counts[~straight].sum()), size), np.uint8)
        views = (memoryview(side.reshape(-1)), memoryview(out_NB.reshape(-1)))
        positions = np.where(straight, indices[first], beside) * size
        spans = zip(*(array.tolist() for array in (straight, positions, counts * size,
                                                   offsets[first])), strict=True)  # fmt: skip
        for number, (to, position, length, start) in enumerate(spans):
            buffer = views[to][position : position + length]
            try:
                got = os.preadv(descriptor, (buffer,), start)
                got += fill(descriptor, buffer[got:], start + got) if got < length else 0
            except OSError:
                got = 0
            if got < length:
                lost += indices[first[number] : last[number] + 1].tolist()
        chosen = np.repeat(~straight, last - first + 1)
        if chosen.any():
            of_item = np.repeat(np.arange(len(first)), last - first + 1)[chosen]
            nth = beside[of_item] + (offsets[chosen] - offsets[first][of_item]) // size
            out_NB[indices[chosen]] = side[nth]
        return lost


def _idle_cores() -> int:
    """Return how many of this process's cores are idle at this moment."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, IndexError, ValueError):
        return 0
    return max(0, len(os.sched_getaffinity(0)) - running)


def _dense(rows: np.ndarray) -> bool:
    """Return whether most of the rows have another requested row shortly after them."""
    if len(rows) < 16:
        return False
    return bool(np.count_nonzero(np.diff(np.sort(rows)) <= NEAR_ROWS) * 2 > len(rows))
