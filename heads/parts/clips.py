"""Clips as a head sees them, in a task, a memory or a query: features by name, labels, rows.

Cells are a tensor, or an object that reads them on demand (`Cells`), so that a method is written
once for features in memory and for streamed ones.

Shapes: N clips, B clips a batch, T frames, D feature width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Features of clips, float32 [B, T, ...], by the names that a head reads.
Batch = Mapping[str, Tensor]
AHEAD = 2  # batches that are read in advance


class Cells(Protocol):
    """A feature of N clips, such as a tensor [N, T, ...]."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the cells of some clips, [B, T, ...], by their indices, int64 [B]."""


class Clips:
    """Clips of a task, a memory or a test set.

    Attributes:
        features: Features by name, of one length and on one device: those of the plain view.
        labels: int64 [N], on the CPU.
        rows: int64 [N], on the CPU: ids in the table of clips.
        views: Features of further views of the same clips, each by the same names.

    Raises:
        ValueError: Features, labels and rows differ in length, or views in their features; or
            there is no clip.
    """

    def __init__(
        self,
        features: Mapping[str, Cells],
        labels: Tensor,
        rows: Tensor | None = None,
        views: Sequence[Mapping[str, Cells]] = (),
    ) -> None:
        self.features = dict(features)
        self.views = tuple(dict(view) for view in views)
        self.labels = labels.cpu()
        self.rows = torch.arange(len(labels)) if rows is None else rows.cpu()
        lengths = {name: len(cells) for name, cells in self.features.items()}
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)}: give the classes' numbers, int64 "
                "[N]"
            )
        if {*lengths.values(), len(self.rows)} - {len(labels)} or not len(labels):
            raise ValueError(
                f"{len(labels)} labels and {len(self.rows)} rows for features of {lengths} clips: "
                "every clip needs one of each, and there must be a clip"
            )
        for view in self.views:
            if {name: len(cells) for name, cells in view.items()} != lengths:
                raise ValueError(f"a view has other features than {lengths}: give all the same")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return the features of some clips, float32."""
        return {name: cells[indices].float() for name, cells in self.features.items()}

    def batches(
        self, size: int, generator: np.random.Generator | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the indices of a batch, int64 [B] on the CPU, and its features, for all clips.

        Args:
            size: B; the last batch may be smaller.
            generator: Draws the order, and for each clip one of its views, the plain one among
                them; without one the order is that of the clips, and the view the plain one.

        Raises:
            ValueError: The size is below 1.
        """
        if size < 1:
            raise ValueError(f"{size=}: a batch has at least one clip")
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        batches = [torch.from_numpy(order[a : a + size]) for a in range(0, len(order), size)]
        streams = any(not getattr(cells, "in_memory", True) for cells in self.features.values())
        read: Callable[[Tensor], Batch] = self.__getitem__
        if generator is not None and self.views:
            views_N = torch.from_numpy(generator.integers(1 + len(self.views), size=len(self)))
            read = partial(self._drawn, views_N)
        return zip(batches, (ahead if streams else map)(read, batches), strict=True)

    def _drawn(self, views_N: Tensor, indices: Tensor) -> Batch:
        """Return the features of some clips in the views drawn for them."""
        shifted = indices + len(self) * views_N[indices]
        return {
            name: Joined([view[name] for view in (self.features, *self.views)])[shifted].float()
            for name in self.features
        }

    def each_view(self) -> list["Clips"]:
        """Return the clips in each of their views alone, the plain one first."""
        return [Clips(view, self.labels, self.rows) for view in (self.features, *self.views)]

    def mapped(self, change: Callable[[str, Cells], Cells]) -> "Clips":
        """Return the clips with other cells, `change(name, cells)`, in every view."""
        plain, *views = (
            {name: change(name, cells) for name, cells in view.items()}
            for view in (self.features, *self.views)
        )
        return Clips(plain, self.labels, self.rows, views)

    def whole(self, name: str, size: int = 256) -> Tensor:
        """Return one feature of all clips, float32 [N, T, ...]."""
        return torch.cat([batch[name] for _, batch in self.batches(size)])


def ahead[A, B](read: Callable[[A], B], parts: Sequence[A]) -> Iterator[B]:
    """Yield what `map` yields, while a thread reads the next results."""
    with ThreadPoolExecutor(1) as reader:
        waiting: deque[Future[B]] = deque()
        try:
            for number in range(len(parts)):
                for part in parts[number + len(waiting) : number + 1 + AHEAD]:
                    waiting.append(reader.submit(read, part))
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Joined:
    """The concatenation of several cells."""

    def __init__(self, parts: Sequence[Cells]) -> None:
        self.parts = parts
        self.in_memory = all(getattr(part, "in_memory", True) for part in parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: Tensor) -> Tensor:
        which = torch.from_numpy(np.searchsorted(self._starts, indices.numpy(), "right") - 1)
        out: Any = None
        for number, part in enumerate(self.parts):
            mask = which == number
            if not mask.any():
                continue
            cells = part[indices[mask] - int(self._starts[number])]
            if out is None:
                out = cells.new_empty((len(indices), *cells.shape[1:]))
            out[mask.to(out.device)] = cells.to(out.dtype)
        return part[indices[:0]] if out is None else out


def joined(*clips: Clips) -> Clips:
    """Return the concatenation of clips, such as those of a task and its memory."""
    plain, *views = (
        {name: Joined([view[name] for view in parts]) for name in parts[0]}
        for parts in zip(*((part.features, *part.views) for part in clips), strict=True)
    )
    labels, rows = ([getattr(part, name) for part in clips] for name in ("labels", "rows"))
    return Clips(plain, torch.cat(labels), torch.cat(rows), views)


class _Part:
    """Some of the cells of a feature, in an order."""

    def __init__(self, cells: Cells, indices: Tensor) -> None:
        self.cells, self.indices = cells, indices
        self.in_memory = getattr(cells, "in_memory", True)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.cells[self.indices[indices]]


def part_of(clips: Clips, indices: Tensor) -> Clips:
    """Return some clips, by their indices, int64 [n] on the CPU."""
    plain, *views = (
        {name: _Part(cells, indices) for name, cells in view.items()}
        for view in (clips.features, *clips.views)
    )
    return Clips(plain, clips.labels[indices], clips.rows[indices], views)


class _Repeated:
    """The cells of a feature with a few of their time steps, repeated; see `sparse`."""

    def __init__(self, cells: Cells, count: int) -> None:
        self.cells, self.count = cells, count
        self.in_memory = getattr(cells, "in_memory", True)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, indices: Tensor) -> Tensor:
        cells = self.cells[indices]
        return cells[:, kept_frames(cells.shape[1], self.count)]


def sparse(clips: Clips, count: int) -> Clips:
    """Return clips of which a number of frames is known, each repeated in the place of others."""
    return clips.mapped(lambda _, cells: _Repeated(cells, count))


def thinned(batch: Batch, count: int) -> Batch:
    """Return a batch as `sparse` gives it."""
    return {name: x[:, kept_frames(x.shape[1], count)] for name, x in batch.items()}


def kept_frames(frames: int, count: int) -> list[int]:
    """Return for each of T frames the nearest of `count` kept ones, the centres of equal segments.

    >>> kept_frames(8, 1), kept_frames(8, 2), kept_frames(3, 8)
    ([4, 4, 4, 4, 4, 4, 4, 4], [2, 2, 2, 2, 2, 6, 6, 6], [0, 1, 2])
    """
    count = min(count, frames)
    kept = [(2 * segment + 1) * frames // (2 * count) for segment in range(count)]
    return [min(kept, key=lambda centre: (abs(centre - t), centre)) for t in range(frames)]


def frames(batch: Batch, name: str, width: int | None = None) -> Tensor:
    """Return a feature of one vector per frame, [B, T, D], after checks.

    Raises:
        ValueError: It has another shape or width, or is not finite.
    """
    x_BTD = batch[name]
    if x_BTD.ndim != 3:
        raise ValueError(
            f"features {name!r} are {list(x_BTD.shape)}, not [clips, frames, width]: take one "
            "vector a frame, with a reduction where the stage gives more"
        )
    if width is not None and x_BTD.shape[2] != width:
        raise ValueError(
            f"features {name!r} are {list(x_BTD.shape)}; learned before were vectors of {width}: "
            "use the same feature throughout"
        )
    if not x_BTD.isfinite().all():
        raise ValueError(
            f"a feature {name!r} is not finite, and would spoil what is learned for good: leave "
            "out the clips that the store has not marked as done"
        )
    return x_BTD


TIMES = ("mean", "order")


def vectors(batch: Batch, name: str, time: str, width: int | None = None) -> Tensor:
    """Return one vector per clip, float64 [B, W].

    A feature of more than one vector per frame is flattened. The mean cannot tell a motion from its
    reverse; the order can.

    Args:
        batch: Features of the clips.
        name: Name of the feature.
        time: `mean` of the frames, or `order`, their concatenation.
        width: W that was learned before, if any.

    Raises:
        ValueError: See `frames`; or W differs, or there is no such `time`.
    """
    if time not in TIMES:
        raise ValueError(f"no {time=}; choose from {', '.join(TIMES)}")
    flat = {name: batch[name].flatten(2)} if batch[name].ndim > 3 else batch
    wide_BTD = frames(flat, name).double()
    vectors_BW = wide_BTD.mean(dim=1) if time == "mean" else wide_BTD.flatten(1)
    if width is not None and vectors_BW.shape[1] != width:
        raise ValueError(
            f"features {name!r} are {list(wide_BTD.shape)}, a vector of {vectors_BW.shape[1]} a "
            f"clip; learned before were vectors of {width}: use the same feature and number of "
            "frames throughout"
        )
    return vectors_BW
