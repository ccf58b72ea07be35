"""Exemplars: the clips of earlier tasks that a head keeps, and the nearest mean of them (NME).

iCaRL (Rebuffi et al., CVPR 2017). Herding (Alg. 4), vectors of unit length, each clip once:

    p_k = argmin_x || mean - (x + sum_(j<k) p_j) / k ||_2

Fewer exemplars are the first of the order in which they were chosen (Alg. 5). NME (Alg. 1): the
cosine to a class's mean of exemplars, unit vectors before the mean and a unit mean after it.

Shapes: N clips, B clips a batch, W width of a clip's vector, C classes, M exemplars.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Task
from varve.heads.parts.clips import Clips, joined

CHOICES = ("herding", "random")


def herd(vectors_NW: Tensor, count: int) -> Tensor:
    """Places of at most so many clips in the order in which herding takes them, int64.

    Of clips equally good the first is taken.
    """
    unit_NW = normalize(vectors_NW.double().cpu(), dim=1)
    mean_W, taken_W = unit_NW.mean(dim=0), torch.zeros(unit_NW.shape[1], dtype=torch.float64)
    free_N = np.zeros(len(unit_NW))
    order: list[int] = []
    for k in range(1, min(count, len(unit_NW)) + 1):
        gaps_N = (mean_W - (unit_NW + taken_W) / k).norm(dim=1).numpy() + free_N
        order.append(int(gaps_N.argmin()))
        taken_W = taken_W + unit_NW[order[-1]]
        free_N[order[-1]] = np.inf
    return torch.tensor(order, dtype=torch.int64)


def balanced(labels_M: Tensor) -> Tensor:
    """Places of as many clips of each label, int64: of those with fewer each more than once.

    >>> balanced(torch.tensor([7, 7, 7, 4])).tolist()
    [0, 1, 2, 3, 3, 3]
    """
    own = [torch.nonzero(labels_M == label)[:, 0] for label in dict.fromkeys(labels_M.tolist())]
    most = max(map(len, own))
    return torch.cat([places.repeat(-(-most // len(places)))[:most] for places in own])


class Exemplars:
    """What a rehearsal head remembers: rows and labels of clips, and its classes' means.

    Args:
        budget: Clips to keep of each class; None keeps all, and 0 none, for heads that can do
            without (`least`): no NME then.
        shared: The budget is that of all classes together, evenly split; what is left over by the
            division is not used.
        choice: `herding`, or `random`, a draw without replacement.
        least: Which budget is the least.

    Attributes:
        rows: int64 [M], class by class, in the order in which they were chosen.
        labels: int64 [M].
    """

    def __init__(
        self,
        budget: int | None,
        shared: bool = False,
        choice: str = "herding",
        least: int = 1,
    ) -> None:
        if (budget is not None and budget < least) or choice not in CHOICES:
            raise ValueError(
                f"{budget=} exemplars by {choice=}: give at least {least}, and one of "
                f"{', '.join(CHOICES)}"
            )
        self.budget, self.shared, self.choice, self.least = budget, shared, choice, least
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.labels = torch.zeros(0, dtype=torch.int64)
        self._means_CW = torch.zeros(0, 0, dtype=torch.float64)

    def quota(self, classes: int) -> int | None:
        """How many of each class, when there are so many classes; None for all.

        Raises:
            ValueError: Less than one.
        """
        if not self.budget or not self.shared:
            return self.budget
        if self.budget < classes:
            raise ValueError(
                f"budget={self.budget} exemplars shared by {classes} classes leave some without: "
                f"give at least {classes}"
            )
        return self.budget // classes

    def rehearsal(self, task: Task) -> Clips:
        """A task's clips, and after them those kept.

        Raises:
            ValueError: The task's memory is not what was kept.
        """
        if not len(self.rows):
            return task.clips
        found = [] if task.memory is None else task.memory.rows.tolist()
        if task.memory is None or sorted(found) != sorted(self.rows.tolist()):
            raise ValueError(
                f"{len(self.rows)} exemplars are kept and the task's memory has {len(found)} "
                "clips, not the same ones: give `memory` the clips of the rows in `exemplars`"
            )
        return joined(task.clips, task.memory)

    def chosen(
        self,
        vectors_NW: Tensor,
        clips: Clips,
        taught: list[int],
        classes: list[int],
        rng: np.random.Generator,
    ) -> tuple[Self, Tensor]:
        """The exemplars after a task, and their places among its clips.

        Of a class that the task brought, known or new, they are chosen anew; of the others the
        first stay.

        Args:
            vectors_NW: Of `clips`, the rehearsal, by the model that the task has trained.
            taught: Classes of the task.
            classes: All, in the order of the columns.
        """
        quota = self.quota(len(classes))
        rank = {row: place for place, row in enumerate(self.rows.tolist())}
        rows, labels = clips.rows.numpy(), clips.labels.numpy()
        places: list[Tensor] = []
        for label in classes:
            mine = np.flatnonzero(labels == label)
            # A clip that comes again is in the task and in the memory.
            mine = mine[np.sort(np.unique(rows[mine], return_index=True)[1])]
            count = len(mine) if quota is None else min(quota, len(mine))
            if label not in taught:
                order = np.argsort([rank[row] for row in rows[mine].tolist()])
            elif quota is None:
                order = np.arange(count)
            elif self.choice == "random":
                order = rng.permutation(len(mine))
            else:
                order = herd(vectors_NW[torch.from_numpy(mine)], count).numpy()
            places.append(torch.from_numpy(mine[order[:count]]))
        after = type(self)(self.budget, self.shared, self.choice, self.least)
        kept = torch.cat(places)
        after.rows, after.labels = clips.rows[kept], clips.labels[kept]
        after.measure(vectors_NW[kept.to(vectors_NW.device)])
        return after, kept

    def measure(self, vectors_MW: Tensor) -> None:
        """Take the classes' means of the exemplars' vectors, in the order of `rows`."""
        if not len(self.rows):
            return
        unit_MW = normalize(vectors_MW.double().cpu(), dim=1)
        labels = dict.fromkeys(self.labels.tolist())
        self._means_CW = torch.stack([unit_MW[self.labels == c].mean(dim=0) for c in labels])

    def nearest(self, vectors_BW: Tensor) -> Tensor:
        """Float32 [B, C], cosines to the means. A vector of zeros has 0.

        Raises:
            ValueError: There are no exemplars.
        """
        if not len(self.rows):
            raise ValueError(f"budget={self.budget}: no exemplars are kept that could be near")
        means_CW = normalize(self._means_CW, dim=1).to(vectors_BW.device)
        return (normalize(vectors_BW.double(), dim=1) @ means_CW.T).float()

    def state(self) -> dict[str, Tensor]:
        """Tensors of its own."""
        state = {"rows": self.rows, "labels": self.labels, "means": self._means_CW}
        return {f"exemplars.{name}": tensor.clone() for name, tensor in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.rows = state["exemplars.rows"].to("cpu", copy=True)
        self.labels = state["exemplars.labels"].to("cpu", copy=True)
        self._means_CW = state["exemplars.means"].to("cpu", torch.float64, copy=True)
