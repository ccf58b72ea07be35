"""Cached features of whole videos: every kept frame of a clip, and any sampling of them."""

import importlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from varve.stores import windows
from varve.stores.clips import row_keys
from varve.stores.columns import Damaged
from varve.stores.digests import digest
from varve.stores.feature import Feature
from varve.stores.locations import Location
from varve.stores.pages import PAGE_FRAMES, Pages, lost_message, read
from varve.stores.shard_reader import Unreadable
from varve.stores.windows import Parts, Windows

# The rules of a build choose the frames. Stores import nothing of the pipeline until then.
SAMPLING = "varve.pipeline.decoders.sampling"
CONFIG = "varve.pipeline.config"


class VideoFeature(Feature):
    """A column of whole videos: the features of every kept frame, at one stage of one backbone.

    The array on disk has shape (pages, 64, ...), and `valid` and all methods here take clips.
    `sampled` gives a feature of T frames per clip, which heads and loaders take.

    The features of a clip are its items: frames here, and windows in `WindowFeature`.
    """

    def __init__(
        self, location: Location, backbone: str, name: str, clips: pd.DataFrame, store: Location
    ) -> None:
        super().__init__(location, backbone, name, clips)
        self._store = store

    @property
    def grid(self) -> str:
        """Name of the frames that are kept, such as "stride-1" or "fps-4"."""
        return str(self.spec["pages"])

    @cached_property
    def pages(self) -> Pages:
        """The pages of the column: which frames of which file each one has.

        Raises:
            Damaged: Their table is missing or damaged; the message says what to do.
        """
        grid = self.grid
        pages = read(self._store, grid)
        if self._array.shape[0] and not len(pages):
            raise Damaged(lost_message(self._store, grid))
        return pages

    @property
    def parts(self) -> Parts:
        """Pages, or windows: the rows of the array."""
        return self.pages

    @cached_property
    def valid_cells(self) -> np.ndarray:
        """Mask of valid rows of the array, bool [pages], or [windows]."""
        return self._marked(self.parts.keys)

    @cached_property
    def valid(self) -> np.ndarray:
        """Mask of clips whose frames are all valid, bool [clips]. A clip has at least one frame."""
        first, last = self.parts.rows_of(self._clips).T
        lost = np.concatenate([[0], np.cumsum(~self.valid_cells)])
        valid: np.ndarray = (lost[last] == lost[first]) & (first < last)
        return valid

    @cached_property
    def spans(self) -> np.ndarray:
        """Items [first, last) that each clip has, int64 [clips, 2].

        Frames are rows of the flattened pages.
        """
        return self.pages.spans(self._clips)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of the feature of an item."""
        return self.shape[2:]

    @property
    def item_steps(self) -> int:
        """Number of time steps of an item: 1 of a frame."""
        return 1

    def frame_rows(self, items: np.ndarray) -> np.ndarray:
        """Return the frames of items as rows of the flattened pages, int64 [items]."""
        return items

    def clip(self, row: int) -> np.ndarray:
        """Return the features of every kept frame of a clip, (F, ...).

        Raises:
            IndexError: The row is outside the table.
            LookupError: The clip has no valid feature; the message gives the reason.
            Damaged: A shard's file is missing, truncated or changed.
        """
        (row,) = self.rows([row])
        return self.values(self.item_bits(self._checked(int(row))))

    def times(self, row: int) -> np.ndarray:
        """Return the presentation time of every kept frame of a clip, float64 [F], in seconds.

        Times are of the file's clock, on which its earliest stream, video or audio, starts at 0.
        """
        return self._times(self._known(row))

    def frames(self, row: int) -> np.ndarray:
        """Return the display index in the file of every kept frame of a clip, int64 [F]."""
        return self._indices(self._known(row))

    def windows(
        self, row: int, seconds: float, step: float | None = None
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Yield sliding windows of a clip: the start in seconds, and the features (F, ...) in it.

        Windows start every `step` seconds (by default `seconds`) from the clip's first frame on, as
        long as a frame is left. A window covers [start, start + seconds), and the last may be
        shorter.

        Raises:
            ValueError: `seconds` or `step` is not above 0.
        """
        step = seconds if step is None else step
        if not seconds > 0 or not step > 0:
            raise ValueError(f"{seconds=}, {step=}: both must be above 0")
        rows, times = self._checked(row), self.times(row)
        slack = 1e-6
        for number in range(int((times[-1] - times[0] + slack) / step) + 1):
            start = float(times[0]) + number * step
            first, last = np.searchsorted(times, [start - slack, start + seconds - slack])
            yield start, self.values(self.item_bits(rows[first:last]))

    def sampled(
        self,
        frames: int = 8,
        sampling: str = "tsn",
        *,
        fps: float = 0.0,
        stride: int = 0,
        view: int = 0,
    ) -> "SampledFeature":
        """Return a feature of T frames per clip, chosen from the kept frames by a sampling rule.

        The options are those of a build. From a column of every frame (stride 1) the frames are
        those that a build of this sampling reads; else the rule chooses among the kept frames.

        Raises:
            ValueError: There is no such rule, or the options do not go together.
        """
        picture = importlib.import_module(CONFIG).Picture(**self.spec["frames"]["picture"])
        frame_set = importlib.import_module(CONFIG).FrameSet(
            frames, sampling, fps, stride, view, decoder=self.spec["frames"]["decoder"],
            picture=picture,
        )  # fmt: skip
        return SampledFeature(self, frame_set)

    def read(self, *arguments: Any, **options: Any) -> np.ndarray:
        """Refuse to read clips of different lengths as one array.

        Raises:
            TypeError: Always; the message names the calls to use.
        """
        raise TypeError(
            f"{self.name} of {self.backbone} has every frame of whole videos, and clips differ in "
            "length: read one with .clip(row), or T frames of each with .sampled(frames=8).read()"
        )

    def dataset(self, rows: Sequence[int] | np.ndarray | None = None) -> Any:
        """Refuse as `read` does."""
        return self.read(rows)

    def path_of(self, row: int) -> str:
        """Return the path of the file that a row of the array is of."""
        clips = self._clips.index[self._clips["digest"] == self.parts.digests[row]]
        return super().path_of(int(clips[0])) if len(clips) else "a file that is gone"

    def _times(self, items: np.ndarray) -> np.ndarray:
        """Return the presentation times of items; those of a window are of its first frame."""
        times: np.ndarray = self.pages.times.reshape(-1)[self.frame_rows(items)]
        return times

    def _indices(self, items: np.ndarray) -> np.ndarray:
        indices: np.ndarray = self.pages.indices.reshape(-1)[self.frame_rows(items)]
        return indices

    def _items_of(self, row: int) -> np.ndarray:
        return np.arange(*self.spans[row])

    def _known(self, row: int) -> np.ndarray:
        (row,) = self.rows([row])
        if not len(items := self._items_of(int(row))):
            raise LookupError(self._invalid_message(np.array([row])))
        return items

    def _checked(self, row: int) -> np.ndarray:
        if not self.valid[row]:
            raise LookupError(self._invalid_message(np.array([row])))
        return self._items_of(row)

    def item_bits(
        self, items: np.ndarray, out: np.ndarray | None = None, verify: bool = True
    ) -> np.ndarray:
        """Read the stored bits of items: of frames, rows of the flattened pages, (F, ...).

        Raises:
            Damaged: A shard's file is missing, truncated or changed.
        """
        out = np.empty((len(items), *self.shape[2:]), self._stored) if out is None else out
        pages, frames = np.divmod(items, PAGE_FRAMES)
        try:
            absent = self._reader.read_items(pages, frames, out, verify)
        except Unreadable as error:
            raise Damaged(self._damage_message(error.row, str(error))) from error
        if absent:
            page = int(pages[absent].min())
            raise Damaged(self._damage_message(page, "it has no chunk for a page marked done"))
        return out


class WindowFeature(VideoFeature):
    """A column of windows of whole videos: features of T frames together, one every few frames.

    The array on disk has shape (windows, steps, ...), with the network's time steps. `clip` gives
    (W, steps, ...) of the W windows of a clip; `times` the time of the first frame of each, and
    `frames` the display indices of all its frames, int64 [W, T]. `sampled(frames=4)` chooses 4
    windows of each clip, by the times of their first frames, and has their time steps one after the
    other.
    """

    @cached_property
    def parts(self) -> Windows:
        """The windows of the column: which frames of which clip each one has.

        Raises:
            Damaged: Their table is missing or damaged; the message says what to do.
        """
        of = self.spec["windows"]
        table = windows.read(self._store, self.pages, of["frames"], of["step"])
        if self._array.shape[0] and not len(table):
            raise Damaged(windows.lost_message(self._store, *of.values()))
        return table

    @cached_property
    def spans(self) -> np.ndarray:
        """Windows [first, last) that each clip has, int64 [clips, 2]."""
        return self.parts.rows_of(self._clips)

    @property
    def grid(self) -> str:
        """Name of the frames that the windows have, such as "stride-1" or "fps-4"."""
        return str(self.spec["windows"]["grid"])

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of the feature of a window: (steps, ...)."""
        return self.shape[1:]

    @property
    def item_steps(self) -> int:
        """Number of time steps of a window."""
        return self.shape[1]

    def frame_rows(self, items: np.ndarray) -> np.ndarray:
        """Return the frames of windows as rows of the flattened pages, int64 [items, T]."""
        rows: np.ndarray = self.parts.frame_rows[items]
        return rows

    def item_bits(
        self, items: np.ndarray, out: np.ndarray | None = None, verify: bool = True
    ) -> np.ndarray:
        """Read the stored bits of windows, (W, steps, ...).

        Raises:
            Damaged: A shard's file is missing, truncated or changed.
        """
        out = np.empty((len(items), *self.shape[1:]), self._stored) if out is None else out
        if absent := self._bits(items, out, verify):
            window = int(items[absent].min())
            raise Damaged(self._damage_message(window, "it has no chunk for a window marked done"))
        return out

    def _times(self, items: np.ndarray) -> np.ndarray:
        times: np.ndarray = self.pages.times.reshape(-1)[self.frame_rows(items)[:, 0]]
        return times


class SampledFeature(Feature):
    """T frames per clip of a column of whole videos: a feature like any other, that stores nothing.

    Attributes:
        source: The column of whole videos. Of a column of windows, T windows are chosen, and the
            feature has their time steps.
        frame_set: The frames, or windows, that are chosen of each clip.
    """

    def __init__(self, source: VideoFeature, frame_set: Any) -> None:
        self.source, self.frame_set = source, frame_set
        self.location, self.backbone, self.name = source.location, source.backbone, source.name
        self._clips, self._array = source._clips, source._array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as an array of all clips: (clips, T, ...)."""
        steps = self.frame_set.frames * self.source.item_steps
        return (len(self._clips), steps, *self.source.shape[2:])

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Fingerprint of the values: of the column, and of the chosen frames."""
        return digest({"whole": self.source.fingerprint, "frames": self.frame_set.identity()})

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Specification of the column, with the chosen frames as its frames."""
        sampled = {"frames": self.frame_set.identity(), "fingerprint": self.fingerprint}
        return {**self.source.spec, **sampled, "whole": self.source.spec["frames"]}

    @property
    def valid(self) -> np.ndarray:  # type: ignore[override]
        """Mask of clips whose frames are all valid, bool [clips]."""
        return self.source.valid

    @property
    def overflowed(self) -> np.ndarray:
        """Mask of clips of which the column cannot represent a frame, bool [clips]."""
        return self.source.overflowed

    def indices(self, row: int) -> np.ndarray:
        """Return the display indices in the file of the T frames of a clip, int64 [T].

        Of T windows it is [T, frames of a window].
        """
        return self.source._indices(self._chosen(self.rows([row]))[0])

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        """Return the chosen items of the source, int64 [n, T]."""
        unknown = np.unique(rows[self._items[rows, 0] < 0])
        if len(unknown):
            choose = importlib.import_module(SAMPLING).chooser(self.frame_set)
            for row in unknown.tolist():
                first, last = self.source.spans[row]
                seed = self._keys[row].tobytes().hex()
                times = self.source._times(np.arange(first, last))
                self._items[row] = first + choose(times, seed)
        chosen: np.ndarray = self._items[rows]
        return chosen

    @cached_property
    def _keys(self) -> np.ndarray:
        return row_keys(self._clips)

    @cached_property
    def _items(self) -> np.ndarray:
        """The chosen items of each clip, int64 [clips, T]; -1 until they are first asked for."""
        return np.full((len(self._clips), self.frame_set.frames), -1, np.int64)

    def _bits(self, rows: np.ndarray, out: np.ndarray, verify: bool) -> list[int]:
        items = self._chosen(rows).reshape(-1)
        of_items = out.reshape(len(items), *self.source.item_shape)
        self.source.item_bits(items, of_items, verify)
        return []

    def to_dask(self) -> Any:
        """Return the feature as a dask array with a chunk per clip. A missing cell is NaN."""
        import dask.array

        def cell(row: int) -> np.ndarray:
            if self.valid[row]:
                return self.read([row])
            return np.full((1, *self.shape[1:]), np.nan, self._output(0, None).dtype)

        dtype = self._output(0, None).dtype
        shape = (1, *self.shape[1:])
        delayed = [dask.delayed(cell, pure=True)(row) for row in range(self.shape[0])]
        arrays = [dask.array.from_delayed(part, shape, dtype) for part in delayed]
        return dask.array.concatenate(arrays)
