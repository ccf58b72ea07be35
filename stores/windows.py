"""Windows of whole videos: which frames of which clip each row of a column has.

A network with temporal modules gives a feature for T frames together. A column of windows has a
cell for every `step` kept frames of a clip: of T of them, as a clip of T frames has one. The
windows of a clip start at its first frame, end with its last whole window, and have consecutive
rows. A clip with fewer than T frames has one window, in which the last frame is repeated. Clips
with the same bytes and interval share their windows.

    windows.<grid>.<T>.<step>.parquet     a row per clip: its key, the digest of its file, the first
                                          of the file's kept frames and their number, and its first
                                          window

The times and display indices of the kept frames are those of the grid; see `pages`. Windows are
only ever appended.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from varve.stores import atomic
from varve.stores.clips import KEY_BYTES, row_keys
from varve.stores.columns import CODEC_ERRORS, Damaged
from varve.stores.locations import Location, Unreachable, repair_hint
from varve.stores.pages import PAGE_FRAMES, READ_AGAIN, Pages, numbered_keys

_FIELDS = [
    ("key", pa.string()),
    ("digest", pa.string()),
    ("first_frame", pa.int64()),
    ("frames", pa.int64()),
    ("first_window", pa.int64()),
]


@dataclass(frozen=True)
class Windows:
    """The windows of clips.

    Attributes:
        pages: The kept frames of the files.
        frames: Frames of a window, T.
        step: Kept frames from the start of a window to that of the next.
        clips: Table indexed by the hexadecimal row key of a clip: `digest` of its file,
            `first_frame` among the file's kept frames, `frames`, their number, and `first_window`.
    """

    pages: Pages
    frames: int
    step: int
    clips: pd.DataFrame

    def __len__(self) -> int:
        return int(self._count.sum())

    @property
    def grid(self) -> str:
        """Name of the grid whose frames the windows have."""
        return self.pages.grid

    @cached_property
    def _count(self) -> np.ndarray:
        """Number of windows of each clip, int64 [clips]."""
        count: np.ndarray = np.maximum(self.clips["frames"].to_numpy() - self.frames, 0)
        return count // self.step + 1

    @cached_property
    def _clip(self) -> np.ndarray:
        """Row of `clips` of each window, int64 [windows]."""
        return np.repeat(np.arange(len(self.clips)), self._count)

    @cached_property
    def _first(self) -> np.ndarray:
        """First of its file's kept frames of each window, int64 [windows]."""
        number = np.arange(len(self)) - self.clips["first_window"].to_numpy()[self._clip]
        first: np.ndarray = self.clips["first_frame"].to_numpy()[self._clip] + number * self.step
        return first

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of different frames of each window, int64 [windows]: T, or those of its clip."""
        counts: np.ndarray = np.minimum(self.clips["frames"].to_numpy(), self.frames)[self._clip]
        return counts

    @cached_property
    def keys(self) -> np.ndarray:
        """Row keys of the windows, uint8 [windows, 16]: of the clip and the window's number."""
        keys = [
            numbered_keys(bytes.fromhex(key), count)
            for key, count in zip(self.clips.index, self._count.tolist(), strict=True)
        ]
        return np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *keys])

    @cached_property
    def digests(self) -> np.ndarray:
        """Digest of each window's file, str [windows]."""
        digests: np.ndarray = self.clips["digest"].to_numpy(object)[self._clip]
        return digests

    @cached_property
    def frame_rows(self) -> np.ndarray:
        """Frames of each window as rows of the flattened pages, int64 [windows, T]."""
        first_pages = self.pages.files["first_page"].loc[self.clips["digest"]].to_numpy()
        first = self._first + first_pages[self._clip] * PAGE_FRAMES
        rows: np.ndarray = first[:, None] + np.minimum(
            np.arange(self.frames), self.counts[:, None] - 1
        )
        return rows

    def part(self, row: int) -> tuple[int, int]:
        """Return the first of its file's kept frames of a window, and how many there are."""
        return int(self._first[row]), int(self.counts[row])

    def indices_of(self, row: int) -> np.ndarray:
        """Return the display indices of a window's frames, int64 [T]."""
        indices: np.ndarray = self.pages.indices.reshape(-1)[self.frame_rows[row]]
        return indices

    def start_seconds(self, row: int) -> float:
        """Return the presentation time of a window's first frame."""
        return float(self.pages.times.reshape(-1)[self.frame_rows[row, 0]])

    def rows_of(self, clips: pd.DataFrame) -> np.ndarray:
        """Return the windows [first, last) of each clip, int64 [clips, 2]; none where unknown."""
        at = self.clips.index.get_indexer(pd.Index(_hex_keys(clips)))
        result = np.zeros((len(clips), 2), np.int64)
        known = at >= 0
        result[known, 0] = self.clips["first_window"].to_numpy()[at[known]]
        result[known, 1] = result[known, 0] + self._count[at[known]]
        return result

    def extended(self, clips: pd.DataFrame) -> "Windows":
        """Return the windows with those of further clips appended; a clip without frames has none.

        Args:
            clips: A table of clips, whose files the pages have.
        """
        first, last = self.pages.spans(clips).T
        first_pages = self.pages.files["first_page"].reindex(clips["digest"], fill_value=0)
        added = pd.DataFrame(
            {
                "digest": clips["digest"].to_numpy(object),
                "first_frame": first - first_pages.to_numpy() * PAGE_FRAMES,
                "frames": last - first,
            },
            index=pd.Index(_hex_keys(clips), name="key"),
        )[first < last]
        added = added[~added.index.duplicated() & ~added.index.isin(self.clips.index)]
        if not len(added):
            return self
        table = pd.concat([self.clips, added.assign(first_window=0)])
        wider = Windows(self.pages, self.frames, self.step, table)
        first_window = np.cumsum(wider._count) - wider._count
        return Windows(self.pages, self.frames, self.step, table.assign(first_window=first_window))


# Of columns of whole videos: what their rows are.
Parts = Pages | Windows


def read(store: Location, pages: Pages, frames: int, step: int) -> Windows:
    """Read the windows of `frames` frames, one for every `step`; none where the store lacks them.

    Raises:
        Damaged: The file cannot be read.
    """
    file = table_file(store, pages.grid, frames, step)
    try:
        table = pq.read_table(io.BytesIO(file.read_bytes())).to_pandas().set_index("key")
        return Windows(pages, frames, step, table[[name for name, _ in _FIELDS[1:]]])
    except FileNotFoundError:
        columns = {name: pd.Series(dtype=str(kind)) for name, kind in _FIELDS}
        return Windows(pages, frames, step, pd.DataFrame(columns).set_index("key"))
    except Unreachable:
        raise
    except (pa.ArrowException, KeyError, *CODEC_ERRORS) as error:
        hint = repair_hint(file, f"Remove it and build again: {READ_AGAIN}")
        raise Damaged(f"{file} is damaged ({error}). {hint}") from error


def table_file(store: Location, grid: str, frames: int, step: int) -> Location:
    """Return the file that has the clips of windows."""
    return store / f"windows.{grid}.{frames}.{step}.parquet"


def lost_message(store: Location, grid: str, frames: int, step: int) -> str:
    """Return what it means that a store has columns of windows, and not the table of these."""
    file = table_file(store, grid, frames, step)
    return (
        f"{file} is missing, so that it is unknown which clip each window of {frames} frames is "
        f"of. {repair_hint(file, f'Build again: {READ_AGAIN}')}"
    )


def write(store: Path, windows: Windows) -> None:
    """Write the table of windows atomically, if it has changed. Its pages are written before it."""
    table = pa.Table.from_pandas(
        windows.clips.reset_index(), schema=pa.schema(_FIELDS), preserve_index=False
    )
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), buffer, compression="zstd")
    file = table_file(store, windows.grid, windows.frames, windows.step)
    assert isinstance(file, Path)
    atomic.update(store, file, buffer.getvalue())


def _hex_keys(clips: pd.DataFrame) -> list[str]:
    return [key.tobytes().hex() for key in row_keys(clips)]
