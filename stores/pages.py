"""Pages of whole videos: which frames of which file are in each page of a column.

A column of whole videos has a page per chunk: `PAGE_FRAMES` consecutive kept frames of one file.
The last page of a file has fewer, and not-a-number after them. The pages of a file have consecutive
numbers. Which frames are kept is the grid of a store, such as "stride-1" or "fps-4":

    frames.<grid>.parquet          digest of the file's bytes, its first page, its number of frames
    frames/<grid>/times            (pages, 64) float64: presentation times in seconds; NaN for none
    frames/<grid>/indices          (pages, 64) int64: display indices of the frames; -1 for none

`times` and `indices` have the axes "page" and "frame" of the columns, as plain Zarr arrays. Pages
are only ever appended. The arrays are written before the table that refers to them, so that after a
kill they may have more pages than the table.
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from varve.stores import atomic
from varve.stores.clips import KEY_BYTES
from varve.stores.columns import InMemory, encoded, in_memory, make_groups, metadata_of
from varve.stores.locations import Location, open_array

FOLDER = "frames"
PAGE_FRAMES = 64
# Pages in one file of `times` or `indices`: 2 MB.
CHUNK_PAGES = 4096
_FIELDS = [("digest", pa.string()), ("first_page", pa.int64()), ("frames", pa.int64())]


@dataclass(frozen=True)
class Pages:
    """The pages of a grid.

    Attributes:
        grid: Name of the grid.
        files: Table indexed by the digest of a file's bytes: `first_page`, and `frames`, the number
            of its kept frames.
        times: Presentation times in seconds, float64 [pages, 64], NaN after the last frame; the
            first frame of a file has the time 0.
        indices: Display indices in the file, int64 [pages, 64], -1 after the last frame.
    """

    grid: str
    files: pd.DataFrame
    times: np.ndarray = field(repr=False)
    indices: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of frames of each page, int64 [pages]."""
        counts: np.ndarray = (self.indices >= 0).sum(axis=1)
        return counts

    @cached_property
    def keys(self) -> np.ndarray:
        """Row keys of the pages, uint8 [pages, 16]: of the file's bytes and the page's number."""
        keys = np.zeros((len(self), KEY_BYTES), np.uint8)
        for digest, first, frames in self.files.itertuples():
            for number in range(-(-frames // PAGE_FRAMES)):
                key = hashlib.sha256(bytes.fromhex(digest) + number.to_bytes(8, "big")).digest()
                keys[first + number] = np.frombuffer(key[:KEY_BYTES], np.uint8)
        return keys

    def of(self, digest: str) -> np.ndarray:
        """Return the pages of a file in order, int64; none where the grid does not have it."""
        if digest not in self.files.index:
            return np.empty(0, np.int64)
        first, frames = self.files.loc[digest]
        pages: np.ndarray = np.arange(first, first + -(-frames // PAGE_FRAMES))
        return pages

    def frames_of(
        self, digest: str, start_seconds: float = np.nan, end_seconds: float = np.nan
    ) -> np.ndarray:
        """Return where the frames of a clip are: rows of the flattened pages, int64, in order.

        Args:
            digest: Digest of the file's bytes.
            start_seconds, end_seconds: The clip's interval [start, end); NaN for an open end.
        """
        pages = self.of(digest)
        if not len(pages):
            return pages
        rows = np.arange(pages[0] * PAGE_FRAMES, (pages[-1] + 1) * PAGE_FRAMES)
        rows = rows[: self.files.at[digest, "frames"]]
        times = self.times.reshape(-1)[rows]
        bounds = np.nan_to_num([start_seconds, end_seconds], nan=np.inf)
        bounds[0] = -np.inf if np.isnan(start_seconds) else start_seconds
        first, last = np.searchsorted(times, bounds - SLACK_SECONDS)
        return rows[first:last]

    def extended(self, files: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> "Pages":
        """Return the pages with those of more files appended: (digest, times, indices) of each."""
        times, indices, records = [self.times], [self.indices], []
        first = len(self)
        for digest, times_K, indices_K in files:
            pages = -(-len(times_K) // PAGE_FRAMES)
            padding = (0, pages * PAGE_FRAMES - len(times_K))
            times.append(np.pad(times_K, padding, constant_values=np.nan).reshape(pages, -1))
            indices.append(np.pad(indices_K, padding, constant_values=-1).reshape(pages, -1))
            records.append((digest, first, len(times_K)))
            first += pages
        if not records:
            return self
        added = _table(records)
        table = pd.concat([self.files, added]) if len(self.files) else added
        return Pages(self.grid, table, np.concatenate(times), np.concatenate(indices))


# Container clocks have steps as coarse as a millisecond; see `pipeline.decoders.sampling`.
SLACK_SECONDS = 1e-6


def read(store: Location, grid: str) -> Pages:
    """Read the pages of a grid; none where the store does not have it.

    Raises:
        Damaged: A file cannot be read.
    """
    folder = store / FOLDER / grid
    try:
        data = (store / f"{FOLDER}.{grid}.parquet").read_bytes()
    except FileNotFoundError:
        blank = np.empty((0, PAGE_FRAMES))
        return Pages(grid, _table([]), blank, blank.astype(np.int64))
    files = pq.read_table(io.BytesIO(data)).to_pandas().set_index("digest")
    pages = int(np.ceil(files["frames"] / PAGE_FRAMES).sum())
    times, indices = (open_array(folder / name)[:pages] for name in ("times", "indices"))
    return Pages(grid, files, np.asarray(times), np.asarray(indices))


def write(store: Path, pages: Pages) -> None:
    """Write the pages of a grid atomically; files that have not changed are not written."""
    folder = store / FOLDER / pages.grid
    make_groups(store, folder / "times")
    for name, values, fill in (("times", pages.times, np.nan), ("indices", pages.indices, -1)):

        def array(rows: int, values: np.ndarray = values, fill: float = fill) -> InMemory:
            return in_memory(
                shape=(rows, PAGE_FRAMES),
                dtype=str(values.dtype),
                chunks=(CHUNK_PAGES, PAGE_FRAMES),
                fill_value=fill,
                dimension_names=["page", "frame"],
                config={"write_empty_chunks": True},
            )

        for chunk, start in enumerate(range(0, len(pages), CHUNK_PAGES)):
            data = encoded(array(CHUNK_PAGES), values[start : start + CHUNK_PAGES])
            atomic.update(store, folder / name / "c" / str(chunk) / "0", data)
        atomic.update(store, folder / name / "zarr.json", metadata_of(array(len(pages))))
    table = pa.Table.from_pandas(
        pages.files.reset_index(), schema=pa.schema(_FIELDS), preserve_index=False
    )
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), buffer, compression="zstd")
    atomic.update(store, store / f"{FOLDER}.{pages.grid}.parquet", buffer.getvalue())


def _table(records: list[tuple[str, int, int]]) -> pd.DataFrame:
    table = pd.DataFrame(records, columns=["digest", "first_page", "frames"])
    kinds = {"digest": "str", "first_page": "int64", "frames": "int64"}
    return table.astype(kinds).set_index("digest")
