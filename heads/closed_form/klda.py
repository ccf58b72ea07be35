"""KLDA: linear discriminant analysis on random Fourier features of a Gaussian kernel.

Momeni, Mazumder and Liu, "Continual Learning Using a Kernel-Based Method Over Foundation Models",
AAAI 2025. It keeps no clip and trains nothing by gradient descent:

    phi(x) = sqrt(2 / M) cos(x omega + beta),   omega ~ N(0, gamma^2) [W, M],   beta ~ U(0, 2 pi)
    score_c = mu_c' P phi - mu_c' P mu_c / 2,   P = S^-1

phi(x)' phi(y) approximates exp(-gamma^2 |x - y|^2 / 2). mu_c is the mean of phi over the clips of a
class, S the covariance about the class means, one for all. `varve.heads.closed_form.slda`
accumulates both, and any order and division of tasks gives the same. With `members` above 1 it is
the paper's ensemble KLDA-E: the mean of the members' class probabilities, each with its own omega
and beta.

Chosen among the methods of 2025 that keep no clips because its paper specifies it completely and it
needs frozen features alone.

Ours: M = 2000 by default, where the paper has 5,000. gamma is a table of the paper's, by data set;
here `gamma=None` takes 1 / (the median distance between clips of the first task), so that it fits
features of any length. S is shrunk as in `varve.heads.closed_form.slda`. Classes have equal priors.

Shapes: N clips, B clips a batch, W width of a clip's vector, M random features, C classes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from varve.heads import Task
from varve.heads.closed_form.slda import StreamingLDA
from varve.heads.parts.clips import Batch, Clips, vectors

QUICK = {"features": 64, "shrinkage": 0.01}  # for the contract suite
MOST_CLIPS = 1000  # among which the median distance is taken


class KernelLDA:
    """Discriminant analysis in the space of a Gaussian kernel; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        time: Vector of a clip: `mean` of its frames, or `order`, their concatenation.
        features: M, the number of random features of a member.
        gamma: Inverse width of the kernel; None chooses it in the first task.
        members: Number of classifiers in the ensemble.
        shrinkage: s of `varve.heads.closed_form.slda`, in (0, 1]; None chooses it after every task.
        seed: Seed of omega, beta, and the clips whose distances are taken.

    Raises:
        ValueError: A number is out of range, or there is no such `time`.
    """

    trainable = 0

    def __init__(
        self,
        feature: str = "vector",
        time: str = "mean",
        features: int = 2000,
        gamma: float | None = None,
        members: int = 1,
        shrinkage: float | None = 1e-4,
        seed: int = 0,
    ) -> None:
        if features < 1 or members < 1 or (gamma is not None and not gamma > 0):
            raise ValueError(
                f"{features=}, {members=}, {gamma=}: give a feature and a member at least, and a "
                "gamma above 0"
            )
        self.reads = (feature,)
        self.time, self.gamma, self.seed = time, gamma, seed
        self._features = features
        self._members = [StreamingLDA("phi", "mean", shrinkage) for _ in range(members)]
        StreamingLDA(feature, time)  # refuses a time that there is not
        self._form: tuple[int, float] | None = None  # W and gamma

    @property
    def classes(self) -> list[int]:
        return self._members[0].classes

    def learn(self, task: Task) -> None:
        before = self._form, [member.state_dict() for member in self._members]
        try:
            if self._form is None:
                self._form = self._chosen(task)
            for number, member in enumerate(self._members):
                cells = _Mapped(self, task.clips, number)
                clips = Clips({"phi": cells}, task.clips.labels, task.clips.rows)
                member.learn(Task(clips, task.number))
        except BaseException:
            self._form = before[0]
            for member, state in zip(self._members, before[1], strict=True):
                member.load_state_dict(state)
            raise

    def scores(self, batch: Batch) -> Tensor:
        if self._form is None:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        scores = [
            member.scores({"phi": self.mapped(batch, number)[:, None]})
            for number, member in enumerate(self._members)
        ]
        if len(scores) == 1:
            return scores[0]
        return torch.stack([score.softmax(dim=1) for score in scores]).mean(dim=0)

    def mapped(self, batch: Batch, member: int) -> Tensor:
        """Return phi of the clips of a batch, float64 [B, M]."""
        assert self._form is not None
        W, gamma = self._form
        x_BW = vectors(batch, self.reads[0], self.time, W)
        rng = np.random.default_rng([self.seed, member])
        omega_WM = torch.from_numpy(gamma * rng.normal(size=(W, self._features)))
        beta_M = torch.from_numpy(rng.uniform(0, 2 * np.pi, self._features))
        phase_BM = x_BW @ omega_WM.to(x_BW.device) + beta_M.to(x_BW.device)
        phi_BM: Tensor = (2 / self._features) ** 0.5 * phase_BM.cos()
        return phi_BM

    def state_dict(self) -> dict[str, Tensor]:
        W, gamma = self._form or (0, 0.0)
        state = {"classes": torch.tensor(self.classes, dtype=torch.int64)}
        state["form"] = torch.tensor([W, gamma], dtype=torch.float64)
        for number, member in enumerate(self._members):
            state |= {f"{number}.{name}": x for name, x in member.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        W, gamma = state["form"].tolist()
        self._form = (int(W), gamma) if W else None
        for number, member in enumerate(self._members):
            start = f"{number}."
            parts = {n.removeprefix(start): x for n, x in state.items() if n.startswith(start)}
            member.load_state_dict(parts)

    def _chosen(self, task: Task) -> tuple[int, float]:
        """Return W, and gamma from the clips of the first task."""
        order = np.random.default_rng([self.seed, 0, 1]).permutation(len(task.clips))
        some = torch.from_numpy(np.sort(order[:MOST_CLIPS]))
        parts = [
            vectors(task.clips[part], self.reads[0], self.time) for part in torch.split(some, 256)
        ]
        x_NW = torch.cat(parts)
        if self.gamma is not None:
            return x_NW.shape[1], self.gamma
        distances = torch.pdist(x_NW)
        median = float(distances.median()) if len(distances) else 0.0
        if not median > 0:
            raise ValueError(
                f"the {len(x_NW)} clips of the first task are mostly equal, so that no width of "
                "the kernel can be chosen by their distances: give gamma"
            )
        return x_NW.shape[1], 1 / median


class _Mapped:
    """phi of clips, computed when it is read, [B, 1, M]."""

    def __init__(self, head: KernelLDA, clips: Clips, member: int) -> None:
        self._head, self._clips, self._member = head, clips, member

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self._head.mapped(self._clips[indices], self._member)[:, None]


build = KernelLDA
