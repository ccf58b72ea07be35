"""Nearest class mean by cosine. Keeps one sum per class; forgets nothing."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize


class NearestMean:
    """Score a clip by its cosine to each class's mean clip.

    Args:
        time: How T frames become one vector a clip. `mean` averages them, so that a motion and its
            reverse are one; `order` puts them one after the other.
        unit: Put clips on the sphere before averaging, so that a long feature does not outvote
            short ones.
    """

    def __init__(self, time: str = "mean", unit: bool = True) -> None:
        if time not in ("mean", "order"):
            raise ValueError(f"no {time=}; choose from mean, order")
        self.time = time
        self.unit = unit
        self.classes: list[int] = []
        self._sums_CW = torch.zeros(0, 0, dtype=torch.float64)  # W: width of a clip's vector

    def learn(self, feats_NTD: Tensor, labels_N: Tensor) -> None:
        vectors_NW = self._vectors(feats_NTD).cpu()
        labels_N = labels_N.cpu()
        if labels_N.shape != vectors_NW.shape[:1] or not len(labels_N):
            raise ValueError(
                f"labels {list(labels_N.shape)} for features {list(feats_NTD.shape)}: every clip "
                "needs one label, and a task at least one clip"
            )
        if labels_N.is_floating_point():
            raise ValueError(f"labels are {labels_N.dtype}: give the classes' numbers as int64")
        if not vectors_NW.isfinite().all():
            raise ValueError(
                "a feature is not finite, and would make its class's mean so for good: leave out "
                "the clips that the store has not marked as done"
            )
        if self.unit:
            vectors_NW = normalize(vectors_NW, dim=1)
        labels = labels_N.tolist()
        classes = self.classes + sorted(set(labels) - set(self.classes))
        sums_CW = vectors_NW.new_zeros(len(classes), vectors_NW.shape[1])
        if self.classes:
            sums_CW[: len(self.classes)] = self._sums_CW
        column = {label: j for j, label in enumerate(classes)}
        sums_CW.index_add_(0, torch.tensor([column[label] for label in labels]), vectors_NW)
        self.classes, self._sums_CW = classes, sums_CW

    def scores(self, feats_NTD: Tensor) -> Tensor:
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        vectors_NW = normalize(self._vectors(feats_NTD), dim=1)
        means_CW = normalize(self._sums_CW, dim=1).to(vectors_NW.device)
        return (vectors_NW @ means_CW.T).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "sums": self._sums_CW.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._sums_CW = state["sums"].to("cpu", torch.float64, copy=True)

    def _vectors(self, feats_NTD: Tensor) -> Tensor:
        if feats_NTD.ndim != 3:
            raise ValueError(
                f"features are {list(feats_NTD.shape)}, not [clips, frames, width]: keep one "
                "vector a frame, with a reduction where the stage gives more"
            )
        # float64: a float32 sum drifts by task order once a class is large.
        wide_NTD = feats_NTD.double()
        vectors_NW = wide_NTD.mean(dim=1) if self.time == "mean" else wide_NTD.flatten(1)
        if self.classes and vectors_NW.shape[1] != self._sums_CW.shape[1]:
            raise ValueError(
                f"features are {list(feats_NTD.shape)}, a vector of {vectors_NW.shape[1]} a clip; "
                f"learned before were vectors of {self._sums_CW.shape[1]}: use the same feature "
                "and number of frames throughout"
            )
        return vectors_NW


build = NearestMean
