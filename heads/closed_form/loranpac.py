"""LoRanPAC: least squares on random features by a truncated singular value decomposition.

Peng, Elenter, Agterberg, Ribeiro and Vidal, "LoRanPAC: Low-rank Random Features and Pre-trained
Models for Bridging Theory and Practice in Continual Learning", ICLR 2025. It keeps no clip and
trains nothing by gradient descent. As in RanPAC h = ReLU(x R) with R ~ N(0, 1) drawn once, but
the least squares have no ridge: the small singular values of the features, which make a solution
unstable, are left out (Sec. 4):

    U S V' = svd [U_before S_before, H],   of which the smallest `truncation` of all is left out
    w_c = U S^-2 U' q_c,   q_c = the sum of h over the clips of class c

H [M, N] has the features of the task's clips. Nothing has to be chosen on validation clips, which
is the difference from `varve.heads.closed_form.ranpac`. With truncation=0 and fewer clips than
random features it is the solution of smallest norm that fits all clips.

Chosen among the methods of 2025 that keep no clips because paper and code are public and it needs
frozen features alone. The adaptation of the network in the first task (its second variant) is not
part of this head.

Ours: M = 2000 by default, where the paper has 100,000; more than M clips of a task are added in
parts of M, and singular values are left out once, after the last.

Shapes: N clips, B clips a batch, W width of a clip's vector, M random features, K rank, C classes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from varve.heads import Task
from varve.heads.parts.classifiers import columns
from varve.heads.parts.clips import TIMES, Batch, vectors

BATCH = 256
QUICK = {"projection": 64}  # for the contract suite
ROUNDING = 1e-10  # singular values below this share of the greatest are rounding errors


class LoRanPAC:
    """Truncated least squares on a random projection; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        time: Vector of a clip: `mean` of its frames, or `order`, their concatenation.
        projection: M.
        truncation: Share of the singular values that every task leaves out, the smallest; 0.25 in
            the paper.
        seed: Seed of R.

    Raises:
        ValueError: A number is out of range, or there is no such `time`.
    """

    trainable = 0

    def __init__(
        self,
        feature: str = "vector",
        time: str = "mean",
        projection: int = 2000,
        truncation: float = 0.25,
        seed: int = 0,
    ) -> None:
        if time not in TIMES:
            raise ValueError(f"no {time=}; choose from {', '.join(TIMES)}")
        if projection < 1 or not 0 <= truncation < 1:
            raise ValueError(
                f"{projection=}, {truncation=}: give a random feature at least, and leave out "
                "less than all singular values"
            )
        self.reads = (feature,)
        self.time, self.projection, self.truncation, self.seed = time, projection, truncation, seed
        self.classes: list[int] = []
        self._width: int | None = None
        self._scaled_MK = torch.zeros(projection, 0, dtype=torch.float64)  # U S
        self._targets_MC = torch.zeros(projection, 0, dtype=torch.float64)  # q
        self._weights_MC = self._targets_MC

    def learn(self, task: Task) -> None:
        classes = task.classes_after(self.classes)
        columns_N = columns(classes, task.clips.labels)
        width = vectors(task.clips[torch.arange(1)], self.reads[0], self.time, self._width).shape[1]
        scaled_MK, parts = self._scaled_MK, []
        targets_MC = torch.zeros(self.projection, len(classes), dtype=torch.float64)
        targets_MC[:, : len(self.classes)] = self._targets_MC
        for indices, batch in task.clips.batches(BATCH):
            h_BM = self._projected(batch, width).cpu()
            targets_MC.index_add_(1, columns_N[indices], h_BM.T)
            parts.append(h_BM.T)
            if sum(part.shape[1] for part in parts) >= self.projection:
                scaled_MK, parts = _scaled(torch.cat([scaled_MK, *parts], dim=1)), []
        scaled_MK = _scaled(torch.cat([scaled_MK, *parts], dim=1), self.truncation)
        # (U S)(S^-4)(U S)' = U S^-2 U', and S^2 are the squares of the columns.
        squares_K = scaled_MK.square().sum(dim=0)
        self._weights_MC = scaled_MK @ ((scaled_MK.T @ targets_MC) / squares_K[:, None] ** 2)
        self.classes, self._width = classes, width
        self._scaled_MK, self._targets_MC = scaled_MK, targets_MC

    def scores(self, batch: Batch) -> Tensor:
        if self._width is None:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        h_BM = self._projected(batch, self._width)
        return (h_BM @ self._weights_MC.to(h_BM.device)).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "width": torch.tensor(self._width or 0),
            "scaled": self._scaled_MK.clone(),
            "targets": self._targets_MC.clone(),
            "weights": self._weights_MC.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes, self._width = state["classes"].tolist(), int(state["width"]) or None
        self._scaled_MK, self._targets_MC, self._weights_MC = (
            state[name].to("cpu", copy=True) for name in ("scaled", "targets", "weights")
        )

    def _projected(self, batch: Batch, width: int) -> Tensor:
        """Return h, float64 [B, M]."""
        x_BW = vectors(batch, self.reads[0], self.time, width)
        drawn_WM = np.random.default_rng([self.seed, 0]).normal(size=(width, self.projection))
        return torch.relu(x_BW @ torch.from_numpy(drawn_WM).to(x_BW.device))


def _scaled(h_MN: Tensor, truncation: float = 0.0) -> Tensor:
    """Return U S of a matrix [M, N] without its smallest singular values, [M, K]."""
    U_MK, S_K, _ = torch.linalg.svd(h_MN, full_matrices=False)
    largest = int((ROUNDING * S_K[0] < S_K).sum())
    kept = min(largest, round((1 - truncation) * len(S_K)))
    scaled_MK: Tensor = U_MK[:, : max(1, kept)] * S_K[: max(1, kept)]
    return scaled_MK


build = LoRanPAC
