"""Reading cells of any Zarr array through zarr-python, wherever it lies.

For what `varve.stores.reader.ShardReader` does not serve: compressed or unsharded arrays, other
stores.
A slice a run of neighbours, several at a time; never fancy indexing, which took forty times as
long.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr

from varve.stores.columns import CODEC_ERRORS, runs
from varve.stores.reader import Unreadable

REQUESTS = 8
TRIES = 20
REQUEST_BYTES = 64 << 20


class ZarrReader:
    """Cells of an open array: rows first.

    Checksums are verified whether asked for or not.

    Args:
        array: Open, on local disk or anywhere else.
        is_fill: Of some cells, bool [n]: which are the fill value, as where there is no chunk.
        version: Of what holds rows [first, last]; where a request ends under another version than
            it began under it is made again, since index and chunks may be of two.
        requests: So many slices at a time.
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
        """Fill `out`; see `varve.stores.reader`."""
        if not out.size:
            return []
        distinct, places = np.unique(rows, return_inverse=True)
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
            # "clip" spares numpy a second buffer; the places are within bounds.
            np.take(cells, places, axis=0, out=out, mode="clip")
        return [int(place) for place in np.flatnonzero(self._is_fill(out))]

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
