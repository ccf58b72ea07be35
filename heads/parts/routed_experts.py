"""StPR's experts with their anchors: TD-MoE, routing by temporal residuals.

Each task adds one expert, and for each of its classes an anchor, the mean of the vectors that are
compared with it. A clip weighs expert k by r_k, the cosine to the nearest anchor of the expert;
`varve.heads.stpr` has the equations.

Shapes: N clips, B clips a batch, T frames, D width, K experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Task
from varve.heads.parts.anchor_pool import AnchorPool
from varve.heads.parts.clips import Batch, frames
from varve.heads.parts.expert import Expert, ExpertConfig
from varve.heads.parts.models import copies, part
from varve.heads.parts.shortlist import Shortlist, weights

ROUTINGS = ("td", "average", "clip", "adapter", "none")
BATCH = 64  # clips at a time, where nothing trains
MIN_DEVIATION = 1e-3  # of cosines, where a class has one clip and is its own anchor


@dataclass(frozen=True)
class RoutingConfig:
    """Options of the routing among experts. The defaults are as published.

    Attributes:
        routing: `td` is r_k by temporal residuals. `average` is r_k = 1 / K. `clip` compares Vbar^s
            of the frozen network with anchors that are means of it, `adapter` that of the adapted
            network. `none` has no experts.
        softmax: Temperature of a softmax over the r_k; None for no softmax.
        keep: Number of experts, those of the greatest r_k, in the sum; 0 for all.
        shortlist: Number of experts that run on a clip; the others are estimated. 0 for all.
        calibrate: Ours: r_k is standardised by its mean and standard deviation over the clips that
            expert k was trained on, and a softmax is taken, of temperature `softmax`, or 1.
        doubt: With a shortlist, all experts run where the scores of the two best classes differ by
            less than this cosine.

    Raises:
        ValueError: A value is out of range, or there is no such routing.
    """

    routing: str = "td"
    softmax: float | None = None
    keep: int = 0
    shortlist: int = 0
    doubt: float = 0.01
    calibrate: bool = False

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(f"no routing={self.routing!r}; choose from {', '.join(ROUTINGS)}")
        by_residuals = self.routing in ("td", "average")
        if self.keep < 0 or self.shortlist < 0 or (self.shortlist and not by_residuals):
            raise ValueError(
                f"keep={self.keep}, shortlist={self.shortlist} under routing={self.routing!r}: "
                "give 0 or more, and a shortlist where experts are compared by their residuals "
                "alone"
            )
        if (self.softmax is not None and not self.softmax > 0) or not self.doubt >= 0:
            raise ValueError(
                f"softmax={self.softmax}, doubt={self.doubt}: give a temperature above 0, and no "
                "doubt below it"
            )


class RoutedExperts:
    """The experts of all tasks, and the anchors of their classes.

    Args:
        config: Options of the routing.
        expert: Options of the experts.
        adapted: Whether the network has adapters.

    Attributes:
        experts: The experts, in the order of their tasks.
        ways: Routings that have anchors: all that the features allow, so that each can be selected
            after training. Without experts there are none.
    """

    def __init__(self, config: RoutingConfig, expert: ExpertConfig, adapted: bool) -> None:
        self.config, self._expert, self._adapted = config, expert, adapted
        self.experts: list[Expert] = []
        clip = ("clip",) if adapted and config.routing == "clip" else ()
        self.ways = () if config.routing == "none" else ("td", "adapter", *clip)
        self.shortlist = Shortlist()
        self._pools: dict[str, AnchorPool] = {}
        self._spreads: dict[str, Tensor] = {}  # by routing: mean and deviation of r_k, [K, 2]

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def pool(self) -> AnchorPool:
        """Anchors of the routing: means of V^tem, or of Vbar^s under `clip` and `adapter`.

        Raises:
            ValueError: There are no experts, or none yet.
        """
        way = self.config.routing
        if not self._pools:
            raise ValueError(f"no anchors under routing={way!r}, or none learned yet")
        way = {"average": "td"}.get(way, way)
        return self._pools[way if way in self.ways else "adapter"]

    def check(self, task: Task, first_BTD: Tensor) -> None:
        """Check that a task can follow those before.

        Raises:
            ValueError: It comes from other columns, or its clips have another shape.
        """
        if self._pools and self.pool.keys[-1] != task.key:
            raise ValueError(
                f"a task from columns {task.key!r}; learned before were tasks from "
                f"{self.pool.keys[-1]!r}: use the same features throughout"
            )
        if self.experts:
            self.experts[0].check(first_BTD)

    def new_expert(self, like_BTD: Tensor, generator: torch.Generator | None = None) -> Expert:
        """Return an untrained expert for clips of this shape."""
        _, T, D = like_BTD.shape
        return Expert(D, self._expert, T, generator).to(like_BTD.device)

    def add(self, task: Task, expert: Expert, spatial_NTD: Tensor) -> None:
        """Add the trained expert of a task, and the anchors of its classes.

        Args:
            task: The task.
            expert: Its expert; it is frozen.
            spatial_NTD: V^s of the task's clips.
        """
        compared: dict[str, list[Tensor]] = {way: [] for way in self.ways}
        for indices in torch.split(torch.arange(len(task.clips)), BATCH):
            batch = task.clips[indices] if "clip" in self.ways else {}
            spatial_BTD = spatial_NTD[indices]
            encoded_B1D = normalize(expert(spatial_BTD), dim=1)[:, None]
            for way, vectors in compared.items():
                vectors.append(self.compared(way, batch, spatial_BTD, encoded_B1D)[:, 0])
        experts, labels_N = [*self.experts, expert.requires_grad_(False)], task.clips.labels
        if self.config.shortlist:
            self.shortlist.add(
                spatial_NTD, labels_N, task.classes, lambda k, x: _encoded(experts[k], x)
            )
        for way, vectors in compared.items():
            all_ND = torch.cat(vectors).double()
            means = [all_ND[labels_N == label].mean(dim=0) for label in task.classes]
            pool = self._pools.setdefault(way, AnchorPool(all_ND.shape[1], lineage=self._adapted))
            pool.add(len(pool), task.classes, torch.stack(means).float(), task.key)
            # The greatest cosine to the new anchors, as `AnchorPool.compare` has it.
            anchors_CD = normalize(torch.stack(means), dim=1)
            own_N = (normalize(all_ND, dim=1) @ anchors_CD.T).amax(dim=1)
            spread_12 = torch.stack([own_N.mean(), own_N.std(correction=0)])[None].float().cpu()
            self._spreads[way] = torch.cat([self._spreads.get(way, spread_12[:0]), spread_12])
        self.experts = experts

    def encode(self, k: int, spatial_BTD: Tensor) -> Tensor:
        """Return V^st_k, [B, D]."""
        return _encoded(self.experts[k], spatial_BTD)

    def encode_all(self, spatial_BTD: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """Return V^st of all experts, or of some by their numbers, [B, K, D]."""
        numbers = range(len(self.experts)) if numbers is None else numbers
        return torch.stack([self.encode(k, spatial_BTD) for k in numbers], dim=1)

    def encode_listed(
        self, batch: Batch, spatial_BTD: Tensor, scores: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return V^st of all experts, [B, K, D]; with a shortlist most of them are estimated.

        Args:
            batch: Features of the clips.
            spatial_BTD: V^s.
            scores: Returns the scores of all classes, [B, C], from V^st.
        """
        size, doubt = self.config.shortlist, self.config.doubt
        if not 0 < size < len(self.experts):
            return self.encode_all(spatial_BTD)

        def similar(encoded_BKD: Tensor) -> Tensor:
            return self.similarities(batch, spatial_BTD, encoded_BKD)[0]

        encoded_BKD, _ = self.shortlist.encoded(spatial_BTD, size, self.encode, similar)
        scores_BC = scores(encoded_BKD)
        if doubt and scores_BC.shape[1] > 1:
            best_B2 = scores_BC.topk(2, dim=1).values
            close_B = best_B2[:, 0] - best_B2[:, 1] < doubt
            if close_B.any():
                encoded_BKD[close_B] = self.encode_all(spatial_BTD[close_B])
        return encoded_BKD

    def compared(self, way: str, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor) -> Tensor:
        """Return the vectors that anchors are means of and are compared with, [B, K, D]."""
        if way in ("td", "average"):
            return encoded_BKD - spatial_BTD.mean(dim=1)[:, None]
        if way == "clip" and self._adapted:
            spatial_BTD = normalize(frames(batch, "vector"), dim=2)
        return spatial_BTD.mean(dim=1)[:, None].expand_as(encoded_BKD)

    def similarities(
        self, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the cosine to each expert's nearest anchor, and that anchor's class, [B, K]."""
        compared_BKD = self.compared(self.config.routing, batch, spatial_BTD, encoded_BKD)
        return self.pool.compare(compared_BKD, self.pool.keys[-1])

    def weights(self, similarities_BK: Tensor) -> Tensor:
        """Return r_k, [B, K]."""
        if self.config.routing == "average":
            return torch.full_like(similarities_BK, 1 / similarities_BK.shape[1])
        temperature = self.config.softmax
        if self.config.calibrate:
            way = self.config.routing if self.config.routing in self.ways else "adapter"
            mean_K, deviation_K = self._spreads[way].to(similarities_BK).T
            similarities_BK = (similarities_BK - mean_K) / deviation_K.clamp(min=MIN_DEVIATION)
            temperature = temperature or 1.0
        return weights(similarities_BK, temperature, self.config.keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of anchors, shortlist and experts."""
        state: dict[str, Tensor] = {}
        for way, pool in self._pools.items():
            state |= copies(pool.state_dict(), f"anchors.{way}.")
            state[f"spread.{way}"] = self._spreads[way].clone()
        state |= copies(self.shortlist.state_dict(), "shortlist.")
        for k, expert in enumerate(self.experts):
            state |= copies(expert.state_dict(), f"expert.{k}.")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned, among other entries."""
        self.experts, self._pools, self._spreads = [], {}, {}
        while tensors := part(state, f"expert.{len(self.experts)}."):
            like_1TD = torch.empty(1, len(tensors.get("position", ())), len(tensors["cls"]))
            expert = self.new_expert(like_1TD)
            expert.load_state_dict(tensors)
            self.experts.append(expert.requires_grad_(False))
        for way in self.ways if self.experts else ():
            self._pools[way] = AnchorPool(len(self.experts[0].cls), lineage=self._adapted)
            self._pools[way].load_state_dict(part(state, f"anchors.{way}."))
            self._spreads[way] = state[f"spread.{way}"].clone()
        self.shortlist.load_state_dict(part(state, "shortlist."))


def _encoded(expert: Expert, spatial_BTD: Tensor) -> Tensor:
    """Return V^st_k, [B, D]."""
    return normalize(expert.to(spatial_BTD.device)(spatial_BTD), dim=1)
