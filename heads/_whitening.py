"""Whitened features for heads that train nothing of the network: an option of every such head.

    x' = S^(-1/2) (x - m)

m is the mean and S the covariance within classes of the mean frames of the first task's clips; x is
a frame of any later clip too. Afterwards a cosine weighs every direction by how well it separates
classes, where directions in which all clips vary outweigh others before. Nothing of it is published
for these heads: it is ours, and off by default. S is shrunk towards the identity by the oracle
approximating formula (OAS: Chen et al., IEEE TSP 2010), as there may be fewer clips than channels.

Whitened vectors are not in the space of text features, so a task has none.

Shapes: N clips, B clips a batch, T frames, D feature width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varve.heads.parts.clips import Batch, Cells, Clips, frames

if TYPE_CHECKING:
    from varve.heads import Head, Routing, Task

CHOICES = ("", "first")
STATE = "whitening."
Maps = Mapping[str, tuple[Tensor, Tensor]]  # by feature: m [D], S^(-1/2) [D, D]


def whitened(build: "Callable[..., Head]") -> "Callable[..., Head]":
    """Return the class of heads that learn and score whitened features, from a class of heads.

    It is a subclass, so that its heads have the methods and the protocols of the class.

    Raises:
        ValueError: It is a function and no class.
    """
    if not isinstance(build, type):
        raise ValueError(f"whiten='first' of {build}: make `build` a class, not a function")
    return type(build.__name__, (_Whitening, build), {"__module__": build.__module__})


class _Whitening:
    """Methods of a head, on whitened features. It comes before the head's class."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # The only attribute, since the head's own are in the same object.
        self._whitening: Maps = {}
        if getattr(self, "fine_tunes", False):
            raise ValueError(
                "whiten='first' with a head that trains a part of the network: its features "
                "change while it trains. Leave `whiten` out, or train nothing of the network"
            )

    @property
    def _unwhitened(self) -> Any:
        """The methods of the head itself."""
        return super()

    def learn(self, task: "Task") -> None:
        before = self._whitening
        if not before:
            self._whitening = {name: _fit(task.clips, name) for name in task.clips.features}
        try:
            memory = task.memory and _of_clips(task.memory, self._whitening)
            clips = _of_clips(task.clips, self._whitening)
            self._unwhitened.learn(replace(task, clips=clips, memory=memory, text=None))
        except BaseException:
            self._whitening = before
            raise

    def scores(self, batch: Batch) -> Tensor:
        out: Tensor = self._unwhitened.scores(_of_batch(batch, self._whitening))
        return out

    def nearest(self, batch: Batch) -> Tensor:
        out: Tensor = self._unwhitened.nearest(_of_batch(batch, self._whitening))
        return out

    def routing(self, batch: Batch) -> "Routing":
        out: Routing = self._unwhitened.routing(_of_batch(batch, self._whitening))
        return out

    def scores_with(self, batch: Batch, weights_BK: Tensor) -> Tensor:
        out: Tensor = self._unwhitened.scores_with(_of_batch(batch, self._whitening), weights_BK)
        return out

    def residuals(self, batch: Batch, *arguments: Any, **options: Any) -> Tensor:
        out: Tensor = self._unwhitened.residuals(
            _of_batch(batch, self._whitening), *arguments, **options
        )
        return out

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._unwhitened.state_dict()
        for name, (mean_D, map_DD) in self._whitening.items():
            state[f"{STATE}mean.{name}"] = mean_D.to("cpu", copy=True)
            state[f"{STATE}map.{name}"] = map_DD.to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        start = f"{STATE}mean."
        names = [name.removeprefix(start) for name in state if name.startswith(start)]
        self._whitening = {
            name: (state[start + name].clone(), state[f"{STATE}map.{name}"].clone())
            for name in names
        }
        rest = {name: x for name, x in state.items() if not name.startswith(STATE)}
        self._unwhitened.load_state_dict(rest)


class _WhitenedBatch(dict[str, Tensor]):
    """A batch of whitened features."""


class _WhitenedCells:
    """Cells that are whitened when they are read."""

    def __init__(self, cells: Cells, name: str, mean_D: Tensor, map_DD: Tensor) -> None:
        self.cells, self.name, self.mean_D, self.map_DD = cells, name, mean_D, map_DD
        self.in_memory = getattr(cells, "in_memory", True)
        self.cell_bytes = getattr(cells, "cell_bytes", 0)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, indices: Tensor) -> Tensor:
        batch = {self.name: self.cells[indices].float()}
        return _apply(batch, self.name, self.mean_D, self.map_DD)


def _of_batch(batch: Batch, maps: Maps) -> Batch:
    # A method of the head that calls another one passes on what is whitened already.
    if isinstance(batch, _WhitenedBatch):
        return batch
    return _WhitenedBatch(
        {name: _apply(batch, name, *maps[name]) if name in maps else batch[name] for name in batch}
    )


def _of_clips(clips: Clips, maps: Maps) -> Clips:
    return clips.mapped(lambda name, cells: _WhitenedCells(cells, name, *maps[name]))


def _apply(batch: Batch, name: str, mean_D: Tensor, map_DD: Tensor) -> Tensor:
    x_BTD = frames(batch, name, len(mean_D))
    return (x_BTD - mean_D.to(x_BTD)) @ map_DD.to(x_BTD)


def _fit(clips: Clips, name: str) -> tuple[Tensor, Tensor]:
    """Return m and S^(-1/2) of some clips, float64.

    Raises:
        ValueError: The feature is not one vector per frame, or not finite.
    """
    parts = [frames(batch, name).double().mean(dim=1) for _, batch in clips.batches(256)]
    x_ND = torch.cat(parts)
    of_clip = torch.from_numpy(np.unique(clips.labels, return_inverse=True)[1]).to(x_ND.device)
    sums_CD = x_ND.new_zeros(int(of_clip.max()) + 1, x_ND.shape[1]).index_add_(0, of_clip, x_ND)
    within_ND = x_ND - (sums_CD / of_clip.bincount()[:, None])[of_clip]
    N, D = within_ND.shape
    covariance_DD = within_ND.T @ within_ND / N
    variance = float(covariance_DD.trace()) / D or 1.0  # 0 where each class has one clip
    s = oas(covariance_DD, N)
    shrunk_DD = (1 - s) * covariance_DD
    shrunk_DD.diagonal().add_(s * variance)
    values_D, vectors_DD = torch.linalg.eigh(shrunk_DD)
    return x_ND.mean(dim=0), (vectors_DD * values_D.rsqrt()) @ vectors_DD.T


def oas(covariance_WW: Tensor, clips: float) -> float:
    """Return the share of the identity, in [0, 1], by OAS (Chen et al., IEEE TSP 2010, Eq. 23)."""
    W = len(covariance_WW)
    square, whole = float((covariance_WW**2).sum()), float(covariance_WW.trace()) ** 2
    spread = (clips + 1 - 2 / W) * (square - whole / W)
    return min(1.0, ((1 - 2 / W) * square + whole) / spread) if spread > 0 else 1.0
