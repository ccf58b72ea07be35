"""RanPAC: random projection, ReLU and ridge regression, in closed form.

McDonnell et al., NeurIPS 2023:

    h = ReLU(x R), R ~ N(0, 1) [W, M] drawn once;   G = sum h h',   Q = sum h onehot(y)'
    score_c = h' w_c,   W_o = (G + r I)^-1 Q

G and Q are sums, so any order and division of tasks gives the classifier of all clips at once. With
`projection=0` it is plain ridge regression on x. The paper's adaptation of the network in the first
task (its PETL phase) is not part of this head.

Ours: M = 2000 by default, where the paper has 10,000, whose G is 800 MB in every checkpoint; r is
chosen as in the published code, from 1e-8 ... 1e8 by the squared error on a fifth of the clips, but
in the first task alone, so that the last task does not decide the regularisation of older classes.

Shapes: N clips, B clips a batch, W width of a clip's vector, M projected, C classes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from varve.heads import Task
from varve.heads.parts.classifiers import columns
from varve.heads.parts.clips import TIMES, Batch, Clips, vectors

BATCH = 256
QUICK = {"projection": 64}  # for the contract suite
RIDGES = tuple(10.0**power for power in range(-8, 9))


class RanPAC:
    """Ridge regression on a random projection; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        time: Vector of a clip: `mean` of its frames, or `order`, their concatenation.
        projection: M; 0 for none.
        ridge: r; None chooses it in the first task.
        seed: Seed of R and of the validation clips.
    """

    trainable = 0

    def __init__(
        self,
        feature: str = "vector",
        time: str = "mean",
        projection: int = 2000,
        ridge: float | None = None,
        seed: int = 0,
    ) -> None:
        if time not in TIMES:
            raise ValueError(f"no {time=}; choose from {', '.join(TIMES)}")
        if projection < 0 or (ridge is not None and ridge <= 0):
            raise ValueError(f"{projection=}, {ridge=}: give a width from 0 on, a ridge above 0")
        self.reads = (feature,)
        self.time, self.projection, self.ridge, self.seed = time, projection, ridge, seed
        self.classes: list[int] = []
        self._state: dict[str, Tensor] = {}

    def learn(self, task: Task) -> None:
        classes = task.classes_after(self.classes)
        state = dict(self._state)
        if not state:
            first = task.clips[torch.arange(1)]
            W = vectors(first, self.reads[0], self.time).shape[1]
            drawn = np.random.default_rng([self.seed, 0]).normal(size=(W, self.projection))
            state["form"] = torch.tensor([W])
            state["projection"] = torch.from_numpy(drawn.astype(np.float32))
            state["ridge"] = torch.tensor(self.ridge or 0.0, dtype=torch.float64)
            M = self.projection or W
            state["gram"] = torch.zeros(M, M, dtype=torch.float64)
            state["targets"] = torch.zeros(M, 0, dtype=torch.float64)
        if not float(state["ridge"]):
            state["ridge"] = torch.tensor(self._chosen(task, classes, state), dtype=torch.float64)
        gram_MM, targets_MC = self._sums(task.clips, torch.arange(len(task.clips)), classes, state)
        gram_MM += state["gram"].to(gram_MM.device)
        targets_MC[:, : len(self.classes)] += state["targets"].to(gram_MM.device)
        state["weights"] = solved(gram_MM, targets_MC, float(state["ridge"])).cpu()
        state["gram"], state["targets"] = gram_MM.cpu(), targets_MC.cpu()
        self.classes, self._state = classes, state

    def scores(self, batch: Batch) -> Tensor:
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        h_BM = self._projected(batch, self._state)
        return (h_BM @ self._state["weights"].to(h_BM.device)).float()

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {name: tensor.clone() for name, tensor in self._state.items()}
        return {"classes": torch.tensor(self.classes, dtype=torch.int64), **tensors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        self._state = {name: tensor for name, tensor in tensors.items() if name != "classes"}

    def _projected(self, batch: Batch, state: Mapping[str, Tensor]) -> Tensor:
        """Return h, float64 [B, M]."""
        x_BW = vectors(batch, self.reads[0], self.time, int(state["form"]))
        if not self.projection:
            return x_BW
        # In float32, as features are; the sums are float64.
        return torch.relu(x_BW.float() @ state["projection"].to(x_BW.device)).double()

    def _sums(
        self, clips: Clips, indices: Tensor, classes: list[int], state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return G [M, M] and Q [M, C] of some clips, float64."""
        columns_N = columns(classes, clips.labels)
        like_1M = self._projected(clips[indices[:1]], state)
        gram_MM = like_1M.new_zeros(like_1M.shape[1], like_1M.shape[1])
        targets_MC = like_1M.new_zeros(like_1M.shape[1], len(classes))
        for some in torch.split(indices, BATCH):
            h_BM = self._projected(clips[some], state)
            gram_MM.addmm_(h_BM.T, h_BM)
            targets_MC.index_add_(1, columns_N[some].to(h_BM.device), h_BM.T)
        return gram_MM, targets_MC

    def _chosen(self, task: Task, classes: list[int], state: Mapping[str, Tensor]) -> float:
        """Return the ridge with the least squared error on validation clips."""
        N = len(task.clips)
        if N < 2:
            raise ValueError("one clip cannot choose a ridge: give `ridge`, or more clips")
        order = np.random.default_rng([self.seed, task.number, 1]).permutation(N)
        validation, training = torch.from_numpy(order).tensor_split([-(-N // 5)])
        gram_MM, targets_MC = self._sums(task.clips, training, classes, state)
        # Smaller ridges are lost in the rounding of G.
        ridges = [ridge for ridge in RIDGES if ridge > 1e-13 * float(gram_MM.trace())]
        weights = {ridge: solved(gram_MM, targets_MC, ridge) for ridge in ridges}
        errors = dict.fromkeys(ridges, 0.0)
        targets_NC = one_hot(columns(classes, task.clips.labels), len(classes)).double()
        for some in torch.split(validation, BATCH):
            h_BM = self._projected(task.clips[some], state)
            targets_BC = targets_NC[some].to(h_BM.device)
            for ridge, weights_MC in weights.items():
                errors[ridge] += float(((h_BM @ weights_MC - targets_BC) ** 2).sum())
        return min(ridges, key=errors.__getitem__)


def solved(gram_MM: Tensor, targets_MC: Tensor, ridge: float) -> Tensor:
    """Return (G + r I)^-1 Q.

    Raises:
        ValueError: The sum is not positive definite: r is lost in the rounding of G.
    """
    whole_MM = gram_MM.clone()
    whole_MM.diagonal().add_(ridge)
    factor_MM, failed = torch.linalg.cholesky_ex(whole_MM)
    if int(failed):
        raise ValueError(
            f"{ridge=} is too small beside a Gram matrix of trace {float(gram_MM.trace()):.3g}: "
            "give a greater one"
        )
    return torch.cholesky_solve(targets_MC, factor_MM)


build = RanPAC
