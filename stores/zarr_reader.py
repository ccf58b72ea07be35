"""Read cells of any Zarr array, local or remote, through zarr-python.

It reads what `varve.stores.shard_reader.ShardReader` does not: compressed arrays, arrays without
shards, and arrays in other stores. Each run of consecutive rows is one slice, and several slices
are read at a time. Fancy indexing is not used: it took forty times as long.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr

from varve.stores.columns import CODEC_ERRORS, runs
from varve.stores.shard_reader import Unreadable

REQUESTS = 8
TRIES = 20
REQUEST_BYTES = 64 << 20


class ZarrReader:
    """Reader of an open array whose first axis is the row. Checksums are always verified.

    Args:
        array: An open array, local or remote.
        is_fill: Function of cells [n, ...] that returns bool [n]: whether a cell is the fill value,
            which stands for a missing chunk.
        version: Function of (first, last) that returns the version of the files of these rows. A
            request during which the version changes is repeated, since its index and its chunks
            may be of two versions.
        requests: Number of slices that are read at a time.
    """

    def __init__(
        self,
        array: "zarr.Array[Any]",
        is_fill: Callable[[np.ndarray], np.ndarray],
        version: Callable[[int, int], object] = lambda first, last: None,
        requests: int = REQUESTS,
    ) -> None:
        self._array, self._is_fill, self._version = array, is_fill, version
        self._requests = requests

    def read(self, rows: np.ndarray, out: np.ndarray, verify: bool = True) -> list[int]:
        """Copy cells into `out`; see `varve.stores.shard_reader.Reader`."""
        if not out.size:
            return []
        distinct, positions = np.unique(rows, return_inverse=True)
        in_order = np.array_equal(distinct, rows)
        cells = out if in_order else np.empty((len(distinct), *out.shape[1:]), out.dtype)
        step = max(1, REQUEST_BYTES // out[0].nbytes)
        parts = [(c, min(c + step, b)) for a, b in runs(distinct) for c in range(a, b, step)]

        def fetch(part: tuple[int, int]) -> None:
            a, b = part
            cells[a:b] = self._slice(int(distinct[a]), int(distinct[b - 1]))

        if len(parts) > 1:
            with ThreadPoolExecutor(min(self._requests, len(parts))) as pool:
                list(pool.map(fetch, parts))
        else:
            fetch(parts[0])
        if not in_order:
            # "clip" spares numpy a second buffer; the positions are within bounds.
            np.take(cells, positions, axis=0, out=out, mode="clip")
        return [int(index) for index in np.flatnonzero(self._is_fill(out))]

    def read_items(
        self, rows: np.ndarray, items: np.ndarray, out: np.ndarray, verify: bool = True
    ) -> list[int]:
        """Copy items of cells into `out`, each cell read once; see `Reader`."""
        distinct, of_item = np.unique(rows, return_inverse=True)
        cell, absent = self._array.shape[1:], []
        step = max(1, REQUEST_BYTES // (int(np.prod(cell)) * out.dtype.itemsize))
        for start in range(0, len(distinct), step):
            part = distinct[start : start + step]
            cells = np.empty((len(part), *cell), out.dtype)
            missing = self.read(part, cells, verify)
            indices = np.flatnonzero((of_item >= start) & (of_item < start + step))
            out[indices] = cells[of_item[indices] - start, items[indices]]
            absent += indices[np.isin(of_item[indices] - start, missing)].tolist()
        return absent

    def _slice(self, first: int, last: int) -> Any:
        for _ in range(TRIES):
            before = self._version(first, last)
            try:
                cells = self._array[first : last + 1]
            except CODEC_ERRORS as error:
                if before == self._version(first, last):
                    raise Unreadable(first, str(error)) from error
            else:
                if before == self._version(first, last):
                    return cells
        raise Unreadable(first, f"it was replaced {TRIES} times while it was read")
