"""Nearest class mean by cosine. It keeps one sum per class, and forgets nothing."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Task
from varve.heads.parts.classifiers import columns
from varve.heads.parts.clips import TIMES, Batch, vectors

BATCH = 256


class NearestMean:
    """Score a clip by its cosine to each class's mean clip.

    Args:
        feature: Name of a feature of one vector per frame.
        time: `mean` averages the T frames of a clip, so that a motion and its reverse are equal;
            `order` concatenates them.
        unit: Whether clips are normalised before averaging, so that long vectors do not outweigh
            short ones.
    """

    trainable = 0

    def __init__(self, feature: str = "vector", time: str = "mean", unit: bool = True) -> None:
        if time not in TIMES:
            raise ValueError(f"no {time=}; choose from {', '.join(TIMES)}")
        self.reads = (feature,)
        self.time = time
        self.unit = unit
        self.classes: list[int] = []
        self._sums_CW = torch.zeros(0, 0, dtype=torch.float64)  # W: width of a clip's vector

    def learn(self, task: Task) -> None:
        classes = task.classes_after(self.classes)
        columns_N = columns(classes, task.clips.labels)
        W = self._vectors(task.clips[torch.arange(1)]).shape[1]
        sums_CW = torch.zeros(len(classes), W, dtype=torch.float64)
        # float64: a float32 sum drifts by task order once a class is large.
        for indices, batch in task.clips.batches(BATCH):
            vectors_BW = self._vectors(batch).cpu()
            if self.unit:
                vectors_BW = normalize(vectors_BW, dim=1)
            sums_CW.index_add_(0, columns_N[indices], vectors_BW)
        if self.classes:
            sums_CW[: len(self.classes)] += self._sums_CW
        self.classes, self._sums_CW = classes, sums_CW

    def scores(self, batch: Batch) -> Tensor:
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        vectors_BW = normalize(self._vectors(batch), dim=1)
        means_CW = normalize(self._sums_CW, dim=1).to(vectors_BW.device)
        return (vectors_BW @ means_CW.T).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "sums": self._sums_CW.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._sums_CW = state["sums"].to("cpu", torch.float64, copy=True)

    def _vectors(self, batch: Batch) -> Tensor:
        width = self._sums_CW.shape[1] if self.classes else None
        return vectors(batch, self.reads[0], self.time, width)


build = NearestMean
