"""Streaming linear discriminant analysis: Deep SLDA (Hayes and Kanan, CVPR workshops 2020).

It has one mean per class and one covariance for all, which every clip updates. No clip is kept:

    score_c = mu_c' P x - mu_c' P mu_c / 2,   P = [(1 - s) S + s I]^-1,   s = 1e-4

Ours: exactly streaming. A clip of class c moves the scatter by (x - mu_c before)(x - mu_c after)',
so that after any order and division into tasks S is the covariance of all clips about their class
means, divided by N. The paper weighs a clip by all clips seen in place of those of its class,
t / (t + 1), and its S then depends slightly on the order. Ours too: s I is scaled by the mean
variance, trace(S) / W, so that s means the same on features of any length; `shrinkage=None` takes s
by the oracle approximating formula (OAS: Chen et al., 2010), which the published code has for its
first task.

Shapes: N clips, B clips a batch, W width of a clip's vector, C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from varve.heads import Task
from varve.heads._whitening import oas
from varve.heads.parts.classifiers import columns
from varve.heads.parts.clips import TIMES, Batch, vectors

BATCH = 256


class StreamingLDA:
    """Linear discriminant analysis of a stream of clips; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        time: Vector of a clip: `mean` of its frames, or `order`, their concatenation.
        shrinkage: s in (0, 1]; None chooses it after every task.
    """

    trainable = 0

    def __init__(
        self, feature: str = "vector", time: str = "mean", shrinkage: float | None = 1e-4
    ) -> None:
        if time not in TIMES:
            raise ValueError(f"no {time=}; choose from {', '.join(TIMES)}")
        if shrinkage is not None and not 0 < shrinkage <= 1:
            raise ValueError(f"{shrinkage=}: give a number above 0 and up to 1, or None for OAS")
        self.reads = (feature,)
        self.time, self.shrinkage = time, shrinkage
        self.classes: list[int] = []
        self._counts_C = torch.zeros(0, dtype=torch.float64)
        self._means_CW = torch.zeros(0, 0, dtype=torch.float64)
        self._scatter_WW = torch.zeros(0, 0, dtype=torch.float64)
        self._precise_CW = self._means_CW  # P mu_c

    def learn(self, task: Task) -> None:
        classes = task.classes_after(self.classes)
        columns_N = columns(classes, task.clips.labels)
        first_1W = self._vectors(task.clips[torch.arange(1)])
        counts_C, means_CW, scatter_WW = self._copies(len(classes), first_1W)
        # float64: sums of differences from means that themselves change.
        for indices, batch in task.clips.batches(BATCH):
            x_BW = self._vectors(batch)
            columns_B = columns_N[indices].to(x_BW.device)
            before_BW = x_BW - means_CW[columns_B]
            counts_C.index_add_(0, columns_B, torch.ones_like(before_BW[:, 0]))
            moved_CW = torch.zeros_like(means_CW).index_add_(0, columns_B, before_BW)
            means_CW += moved_CW / counts_C.clamp(min=1)[:, None]
            # Summed over the clips of a class, this is Welford's update in one product.
            scatter_WW.addmm_(before_BW.T, x_BW - means_CW[columns_B])
        counts_C, means_CW, scatter_WW = counts_C.cpu(), means_CW.cpu(), scatter_WW.cpu()
        precise_CW = self._solved(counts_C, means_CW, scatter_WW)
        self.classes, self._precise_CW = classes, precise_CW
        self._counts_C, self._means_CW, self._scatter_WW = counts_C, means_CW, scatter_WW

    def scores(self, batch: Batch) -> Tensor:
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        x_BW = self._vectors(batch)
        precise_CW, means_CW = self._precise_CW.to(x_BW.device), self._means_CW.to(x_BW.device)
        return (x_BW @ precise_CW.T - (precise_CW * means_CW).sum(dim=1) / 2).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "counts": self._counts_C.clone(),
            "means": self._means_CW.clone(),
            "scatter": self._scatter_WW.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._counts_C, self._means_CW, self._scatter_WW = (
            state[name].to("cpu", torch.float64, copy=True)
            for name in ("counts", "means", "scatter")
        )
        self.classes = state["classes"].tolist()
        self._precise_CW = self._solved(self._counts_C, self._means_CW, self._scatter_WW)

    def _solved(self, counts_C: Tensor, means_CW: Tensor, scatter_WW: Tensor) -> Tensor:
        """Return P mu_c of each class, [C, W]."""
        if not len(counts_C):
            return means_CW
        N, W = float(counts_C.sum()), len(scatter_WW)
        covariance_WW = (scatter_WW + scatter_WW.T) / (2 * N)
        variance = float(covariance_WW.trace()) / W
        s = oas(covariance_WW, N) if self.shrinkage is None else self.shrinkage
        # Classes of one clip each have no variance: then any scale gives the nearest mean.
        shrunk_WW = (1 - s) * covariance_WW + s * (variance or 1.0) * torch.eye(W).double()
        precise_WC: Tensor = torch.linalg.solve(shrunk_WW, means_CW.T)
        return precise_WC.T

    def _copies(self, classes: int, x_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of counts, means and scatter, enlarged to so many classes."""
        C, W = len(self.classes), x_BW.shape[1]
        counts_C, means_CW = x_BW.new_zeros(classes), x_BW.new_zeros(classes, W)
        scatter_WW = x_BW.new_zeros(W, W)
        if C:
            counts_C[:C], means_CW[:C] = self._counts_C, self._means_CW
            scatter_WW += self._scatter_WW.to(x_BW.device)
        return counts_C, means_CW, scatter_WW

    def _vectors(self, batch: Batch) -> Tensor:
        width = self._means_CW.shape[1] if self.classes else None
        return vectors(batch, self.reads[0], self.time, width)


build = StreamingLDA
