"""Clips: what a head sees of a task, a memory or a query: features by name, labels, rows.

Cells may be a tensor, or anything that reads them when asked (`Cells`), so that a method is written
once for features in memory and for those that stream.

Shapes: N clips, B clips a batch, T frames, D feature width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# A clip's features [B, T, ...], float32, by the names that a head reads.
Batch = Mapping[str, Tensor]
AHEAD = 2


class Cells(Protocol):
    """A feature of N clips; a tensor [N, T, ...] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Tensor) -> Tensor:
        """Those of some clips, [B, T, ...]; places int64 [B]."""


class Clips:
    """Some clips of a task, a memory or a test set.

    Attributes:
        features: By name; of one length and on one device.
        labels: int64 [N], on the CPU.
        rows: int64 [N], on the CPU, their ids in the table of clips.

    Raises:
        ValueError: Features, labels and rows do not fit each other, or there is no clip.
    """

    def __init__(
        self, features: Mapping[str, Cells], labels: Tensor, rows: Tensor | None = None
    ) -> None:
        self.features = dict(features)
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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, places: Tensor) -> Batch:
        """The features of some clips."""
        return {name: cells[places].float() for name, cells in self.features.items()}

    def batches(
        self, size: int, generator: np.random.Generator | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """One pass over the clips: their places, int64 [B] on the CPU, and their features.

        Args:
            size: B; the last batch may have fewer.
            generator: Draws the order; without one they come as they are.
        """
        if size < 1:
            raise ValueError(f"{size=}: a batch has at least one clip")
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        places = [torch.from_numpy(order[a : a + size]) for a in range(0, len(order), size)]
        waits = any(not getattr(cells, "in_memory", True) for cells in self.features.values())
        return zip(places, (ahead if waits else map)(self.__getitem__, places), strict=True)

    def whole(self, name: str, size: int = 256) -> Tensor:
        """One feature of all the clips, float32 [N, T, ...]."""
        return torch.cat([batch[name] for _, batch in self.batches(size)])


def ahead[A, B](read: Callable[[A], B], parts: Sequence[A]) -> Iterator[B]:
    """`map`, with the next results read by a thread of its own while one is worked on."""
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
    """Cells of several, one after the other."""

    def __init__(self, parts: Sequence[Cells]) -> None:
        self.parts = parts
        self.in_memory = all(getattr(part, "in_memory", True) for part in parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, places: Tensor) -> Tensor:
        which = torch.from_numpy(np.searchsorted(self._starts, places.numpy(), "right") - 1)
        out: Any = None
        for number, part in enumerate(self.parts):
            mine = which == number
            if not mine.any():
                continue
            cells = part[places[mine] - int(self._starts[number])]
            if out is None:
                out = cells.new_empty((len(places), *cells.shape[1:]))
            out[mine.to(out.device)] = cells.to(out.dtype)
        return part[places[:0]] if out is None else out


def joined(*clips: Clips) -> Clips:
    """Several as one, in order; such as a task's clips and the memory's."""
    names = clips[0].features
    return Clips(
        {name: Joined([one.features[name] for one in clips]) for name in names},
        torch.cat([one.labels for one in clips]),
        torch.cat([one.rows for one in clips]),
    )


def frames(batch: Batch, name: str, width: int | None = None) -> Tensor:
    """A feature of one vector a frame, [B, T, D], looked at before it is worked with.

    Raises:
        ValueError: It has another form or width, or is not finite.
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
    """One vector a clip, float64 [B, W]: its frames' mean, or its frames one after the other.

    Of a feature of more than a vector a frame all numbers are taken, laid flat.

    The mean cannot tell a motion from its reverse; the order can.

    Args:
        width: W of what was learned before.

    Raises:
        ValueError: As `frames`, another W, or no such `time`.
    """
    if time not in TIMES:
        raise ValueError(f"no {time=}; choose from {', '.join(TIMES)}")
    laid = {name: batch[name].flatten(2)} if batch[name].ndim > 3 else batch
    wide_BTD = frames(laid, name).double()
    vectors_BW = wide_BTD.mean(dim=1) if time == "mean" else wide_BTD.flatten(1)
    if width is not None and vectors_BW.shape[1] != width:
        raise ValueError(
            f"features {name!r} are {list(wide_BTD.shape)}, a vector of {vectors_BW.shape[1]} a "
            f"clip; learned before were vectors of {width}: use the same feature and number of "
            "frames throughout"
        )
    return vectors_BW
