"""Exemplars: clips of earlier tasks that a head keeps for replay, and their class means (NME).

iCaRL (Rebuffi et al., CVPR 2017). Herding (Alg. 4) on unit vectors selects each clip once:

    p_k = argmin_x || mean - (x + sum_(j<k) p_j) / k ||_2

A smaller budget keeps the first exemplars of this order (Alg. 5). The nearest mean of exemplars
(NME, Alg. 1) is the cosine to a class's mean: vectors are made unit before the mean, and the mean
after it.

Shapes: N clips, B clips a batch, W width of a clip's vector, C classes, M exemplars.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Task
from varve.heads.parts.clips import Clips, joined, part_of, sparse

CHOICES = ("herding", "random")


def herd(vectors_NW: Tensor, count: int) -> Tensor:
    """Return the indices of at most `count` clips in the order of herding, int64.

    The first of equally good clips is selected.
    """
    unit_NW = normalize(vectors_NW.double().cpu(), dim=1)
    mean_W, sum_W = unit_NW.mean(dim=0), torch.zeros(unit_NW.shape[1], dtype=torch.float64)
    selected_N = np.zeros(len(unit_NW))
    order: list[int] = []
    for k in range(1, min(count, len(unit_NW)) + 1):
        gaps_N = (mean_W - (unit_NW + sum_W) / k).norm(dim=1).numpy() + selected_N
        order.append(int(gaps_N.argmin()))
        sum_W = sum_W + unit_NW[order[-1]]
        selected_N[order[-1]] = np.inf
    return torch.tensor(order, dtype=torch.int64)


def balanced(labels_M: Tensor) -> Tensor:
    """Return indices of equally many clips per label, int64; clips of small classes repeat.

    >>> balanced(torch.tensor([7, 7, 7, 4])).tolist()
    [0, 1, 2, 3, 3, 3]
    """
    labels = dict.fromkeys(labels_M.tolist())
    by_label = [torch.nonzero(labels_M == label)[:, 0] for label in labels]
    most = max(map(len, by_label))
    return torch.cat([indices.repeat(-(-most // len(indices)))[:most] for indices in by_label])


@dataclass(frozen=True)
class ExemplarConfig:
    """Options of the exemplars. Ours: 5 per class, as TCD keeps on video.

    Attributes:
        budget: Number of clips to keep per class; 0 keeps none, where a head allows it: then there
            is no NME.
        shared: Whether the budget is that of all classes together. It is split evenly, and the
            remainder of the division is not used.
        choice: `herding`, or `random`, a draw without replacement.
        exemplar_frames: Number of frames of an exemplar that are kept, the centres of equal
            segments; they are replayed in the place of all T. 0 keeps all. With fewer frames a
            memory of one size holds more clips: compare methods at equal budget x frames.

    Raises:
        ValueError: The budget or the number of frames is negative, or there is no such choice.
    """

    budget: int = 5
    shared: bool = False
    choice: str = "herding"
    exemplar_frames: int = 0

    def __post_init__(self) -> None:
        if self.exemplar_frames < 0:
            raise ValueError(
                f"exemplar_frames={self.exemplar_frames}: give a number of frames, or 0 for all"
            )
        if self.budget < 0 or self.choice not in CHOICES:
            raise ValueError(
                f"budget={self.budget} exemplars by choice={self.choice!r}: give at least 0, "
                f"and one of {', '.join(CHOICES)}"
            )


class Exemplars:
    """The exemplars of a head: rows and labels of clips, and the mean vectors of their classes.

    Args:
        config: Options of the selection; None keeps every clip.
        least: Smallest budget that the head can work with.

    Attributes:
        rows: int64 [M], class by class, in the order of selection.
        labels: int64 [M].

    Raises:
        ValueError: The budget is below `least`.
    """

    def __init__(self, config: ExemplarConfig | None, least: int = 1) -> None:
        if config is not None and config.budget < least:
            raise ValueError(f"budget={config.budget} exemplars: give at least {least}")
        self.config, self.least = config, least
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.labels = torch.zeros(0, dtype=torch.int64)
        self._means_CW = torch.zeros(0, 0, dtype=torch.float64)

    def quota(self, classes: int) -> int | None:
        """Return the number of exemplars per class for so many classes; None means all clips.

        Raises:
            ValueError: A shared budget leaves less than one exemplar per class.
        """
        if self.config is None:
            return None
        if not self.config.shared or not self.config.budget:
            return self.config.budget
        if self.config.budget < classes:
            raise ValueError(
                f"budget={self.config.budget} exemplars shared by {classes} classes leave some "
                f"without: give at least {classes}"
            )
        return self.config.budget // classes

    def rehearsal(self, task: Task) -> Clips:
        """Return the clips of a task, followed by the exemplars.

        Raises:
            ValueError: The task's memory does not hold exactly the exemplars.
        """
        if not len(self.rows):
            return task.clips
        rows = [] if task.memory is None else task.memory.rows.tolist()
        if task.memory is None or sorted(rows) != sorted(self.rows.tolist()):
            raise ValueError(
                f"{len(self.rows)} exemplars are kept and the task's memory has {len(rows)} "
                "clips, not the same ones: give `memory` the clips of the rows in `exemplars`"
            )
        return joined(task.clips, self.replayed(task.memory))

    @property
    def frames(self) -> int:
        """Number of frames of an exemplar that are kept; 0 for all."""
        return 0 if self.config is None else self.config.exemplar_frames

    def replayed(self, clips: Clips) -> Clips:
        """Return clips as they are replayed, with the frames that are kept of exemplars."""
        return sparse(clips, self.frames) if self.frames else clips

    def select(
        self,
        vectors_NW: Tensor,
        clips: Clips,
        task_classes: list[int],
        classes: list[int],
        rng: np.random.Generator,
        encode: Callable[[Clips], Tensor],
    ) -> tuple[Self, Tensor]:
        """Return the exemplars after a task, and their indices among its clips.

        For classes of the task, known or new, exemplars are selected anew. For other classes the
        first ones stay. The class means are those of exemplars as they are replayed.

        Args:
            vectors_NW: Vectors of `clips`, by the model that the task has trained.
            clips: The clips of `rehearsal`.
            task_classes: Classes of the task.
            classes: All classes, in the order of the columns.
            rng: Draws, where choice="random".
            encode: Returns the vectors of other clips by the same model, [M, W].
        """
        quota = self.quota(len(classes))
        rank = {row: number for number, row in enumerate(self.rows.tolist())}
        rows, labels = clips.rows.numpy(), clips.labels.numpy()
        selected: list[Tensor] = []
        for label in classes:
            indices = np.flatnonzero(labels == label)
            # A clip that is learned again is in the task and in the memory.
            indices = indices[np.sort(np.unique(rows[indices], return_index=True)[1])]
            count = len(indices) if quota is None else min(quota, len(indices))
            if label not in task_classes:
                order = np.argsort([rank[row] for row in rows[indices].tolist()])
            elif self.config is None:
                order = np.arange(count)
            elif self.config.choice == "random":
                order = rng.permutation(len(indices))
            else:
                order = herd(vectors_NW[torch.from_numpy(indices)], count).numpy()
            selected.append(torch.from_numpy(indices[order[:count]]))
        exemplars = type(self)(self.config, self.least)
        kept = torch.cat(selected)
        exemplars.rows, exemplars.labels = clips.rows[kept], clips.labels[kept]
        if len(kept) and self.frames:
            exemplars.update_means(encode(self.replayed(part_of(clips, kept))))
        else:
            exemplars.update_means(vectors_NW[kept.to(vectors_NW.device)])
        return exemplars, kept

    def update_means(self, vectors_MW: Tensor) -> None:
        """Compute the class means from the vectors of the exemplars, in the order of `rows`."""
        if not len(self.rows):
            return
        unit_MW = normalize(vectors_MW.double().cpu(), dim=1)
        labels = dict.fromkeys(self.labels.tolist())
        self._means_CW = torch.stack([unit_MW[self.labels == c].mean(dim=0) for c in labels])

    def nearest(self, vectors_BW: Tensor) -> Tensor:
        """Return the cosines to the class means, float32 [B, C]; 0 for a vector of zeros.

        Raises:
            ValueError: There are no exemplars.
        """
        if not len(self.rows):
            budget = None if self.config is None else self.config.budget
            raise ValueError(f"{budget=}: no exemplars are kept that could be near")
        means_CW = normalize(self._means_CW, dim=1).to(vectors_BW.device)
        return (normalize(vectors_BW.double(), dim=1) @ means_CW.T).float()

    def state(self) -> dict[str, Tensor]:
        """Return copies of rows, labels and means, by name."""
        state = {"rows": self.rows, "labels": self.labels, "means": self._means_CW}
        return {f"exemplars.{name}": tensor.clone() for name, tensor in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        self.rows = state["exemplars.rows"].to("cpu", copy=True)
        self.labels = state["exemplars.labels"].to("cpu", copy=True)
        self._means_CW = state["exemplars.means"].to("cpu", torch.float64, copy=True)
