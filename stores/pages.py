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
from zarr.codecs import Crc32cCodec, ZstdCodec

from varve.stores import atomic
from varve.stores.clips import KEY_BYTES
from varve.stores.columns import (
    CODEC_ERRORS,
    Damaged,
    InMemory,
    encoded,
    in_memory,
    make_groups,
    metadata_of,
)
from varve.stores.locations import Location, Unreachable, open_array, repair_hint

FOLDER = "frames"
PAGE_FRAMES = 64
# Pages in one file of `times` or `indices`: 2 MB before compression.
CHUNK_PAGES = 4096
READ_AGAIN = (
    "the times of all videos are read again, and their features are found by their keys without "
    "computing"
)
_FIELDS = [("digest", pa.string()), ("first_page", pa.int64()), ("frames", pa.int64())]


@dataclass(frozen=True)
class Pages:
    """The pages of a grid.

    Attributes:
        grid: Name of the grid.
        files: Table indexed by the digest of a file's bytes: `first_page`, and `frames`, the number
            of its kept frames.
        times: Presentation times in seconds of the file's clock, float64 [pages, 64], NaN after
            the last frame. The earliest stream of a file, video or audio, starts at 0.
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
            pages = -(-frames // PAGE_FRAMES)
            keys[first : first + pages] = numbered_keys(bytes.fromhex(digest), pages)
        return keys

    @cached_property
    def digests(self) -> np.ndarray:
        """Digest of each page's file, str [pages]."""
        digests = np.empty(len(self), object)
        for digest, first, frames in self.files.itertuples():
            digests[first : first + -(-frames // PAGE_FRAMES)] = digest
        return digests

    def part(self, row: int) -> tuple[int, int]:
        """Return the first kept frame of a page in its file, and the page's number of frames."""
        first_pages = self.files["first_page"].to_numpy()
        number = row - int(first_pages[np.searchsorted(first_pages, row, side="right") - 1])
        return number * PAGE_FRAMES, int(self.counts[row])

    def indices_of(self, row: int) -> np.ndarray:
        """Return the display indices of a page's frames, int64 [frames]."""
        indices: np.ndarray = self.indices[row, : self.counts[row]]
        return indices

    def start_seconds(self, row: int) -> float:
        """Return the presentation time of a page's first frame."""
        return float(self.times[row, 0])

    def rows_of(self, clips: pd.DataFrame) -> np.ndarray:
        """Return the pages [first, last) that have a frame of each clip, int64 [clips, 2]."""
        first, last = self.spans(clips).T
        ends = np.where(first < last, -(-last // PAGE_FRAMES), first // PAGE_FRAMES)
        return np.stack([first // PAGE_FRAMES, ends], axis=1)

    def spans(self, clips: pd.DataFrame) -> np.ndarray:
        """Return where the frames of clips are: rows [first, last) of the flattened pages.

        Args:
            clips: Table with the columns `digest`, `start_seconds` and `end_seconds`, NaN for an
                open end. A clip covers [start, end).

        Returns:
            int64 [clips, 2]. It is empty (first = last) for a clip whose file the grid lacks, and
            for one without a frame in its interval.
        """
        files = self.files.index.get_indexer(clips["digest"])
        spans = np.zeros((len(clips), 2), np.int64)
        have = files >= 0
        spans[have, 0] = self.files["first_page"].to_numpy()[files[have]] * PAGE_FRAMES
        spans[have, 1] = spans[have, 0] + self.files["frames"].to_numpy()[files[have]]
        bounds = clips[["start_seconds", "end_seconds"]].to_numpy(float)
        limits = np.where(np.isnan(bounds), [-np.inf, np.inf], bounds - SLACK_SECONDS)
        times = self.times.reshape(-1)
        for row in np.flatnonzero(have & ~np.isnan(bounds).all(axis=1)).tolist():
            first, last = spans[row]
            spans[row] = first + np.searchsorted(times[first:last], limits[row])
        return spans

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


def numbered_keys(content: bytes, count: int) -> np.ndarray:
    """Return the row keys of the parts of some content, by their numbers: uint8 [count, 16]."""
    keys = (hashlib.sha256(content + number.to_bytes(8, "big")).digest() for number in range(count))
    joined = b"".join(key[:KEY_BYTES] for key in keys)
    return np.frombuffer(joined, np.uint8).reshape(count, KEY_BYTES)


# Container clocks have steps as coarse as a millisecond; see `pipeline.decoders.sampling`.
SLACK_SECONDS = 1e-6


def read(store: Location, grid: str) -> Pages:
    """Read the pages of a grid; none where the store does not have it.

    Raises:
        Damaged: A file cannot be read.
    """
    folder = store / FOLDER / grid
    file = table_file(store, grid)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        blank = np.empty((0, PAGE_FRAMES))
        return Pages(grid, _table([]), blank, blank.astype(np.int64))
    try:
        files = pq.read_table(io.BytesIO(data)).to_pandas().set_index("digest")
        pages = int(np.ceil(files["frames"] / PAGE_FRAMES).sum())
        times, indices = (open_array(folder / name)[:pages] for name in ("times", "indices"))
        return Pages(grid, files, np.asarray(times), np.asarray(indices))
    except Unreachable:
        raise
    except (pa.ArrowException, KeyError, *CODEC_ERRORS) as error:
        again = f"Remove it and build again: {READ_AGAIN}"
        raise Damaged(
            f"{file}, or {folder}, is damaged ({error}). {repair_hint(file, again)}"
        ) from error


def table_file(store: Location, grid: str) -> Location:
    """Return the file that has the files of a grid and their pages."""
    return store / f"{FOLDER}.{grid}.parquet"


def lost_message(store: Location, grid: str) -> str:
    """Return what it means that a store has columns of a grid, and not the grid's table."""
    file = table_file(store, grid)
    return (
        f"{file} is missing, so that it is unknown which video each page of {grid} is of. "
        f"{repair_hint(file, f'Build again: {READ_AGAIN}')}"
    )


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
                compressors=[ZstdCodec(level=3), Crc32cCodec()],
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
