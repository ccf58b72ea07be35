"""StPR: spatiotemporal experts, routed by temporal residuals, on a frozen or adapted CLIP.

Exemplar-free video class-incremental learning. Each task k trains an expert of its own, and goes on
with the adapters that all tasks share, where there are any:

    V^s_i   = unit vector of frame i, by the network with its adapters      (parts/spatial.py)
    Vbar^s  = mean_i V^s_i
    V^st_k  = unit vector of the clip, by expert k on V^s_1 .. V^s_T        (parts/expert.py)
    V^tem_k = V^st_k - Vbar^s, the temporal residual
    anchor  = of class c of task k: mean of V^tem_k over its clips, at the end of task k
    r_k     = max over the classes c of task k of cos(V^tem_k, anchor_c)    (TD-MoE)
    V       = Vbar^s + sum_k r_k V^st_k,    score of class c = cos(V, text_c)
    loss    = L_cont(V^st_k, text) + L_cont(Vbar^s, text) + weight * L_FSSD (parts/losses.py)

As published: adapters="all". By default there are none: everything is then served from the cache
(the paper's row "TD-MoE only"), FSSD is zero, and a task takes seconds.

Ours, where StPR is silent: what is made unit, and see `parts` for the rest. A class that comes
again gets an anchor with the new expert too; its text and importance are then the newest.

Shapes: N clips, B clips a batch, T frames, D width, C classes, K experts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from heads import Network, Routing, Task
from heads.parts import losses
from heads.parts.clips import Batch, Clips, frames
from heads.parts.expert import PRECISIONS, STARTS, Expert
from heads.parts.spatial import READ, Spatial
from heads.parts.text import TRAINED, Codes, Given, Text
from heads.parts.training import SCHEDULES, fit

TAU = {"given": 0.01, "codes": 0.1}
CHOICES = {
    "position": (None, "learned"),
    "routing": ("td", "average", "clip", "adapter"),
    "distillation": losses.DISTILLATIONS,
    "text": ("given", "codes"),
    "codes": TRAINED,
    "start": STARTS,
    "schedule": SCHEDULES,
    "precision": tuple(PRECISIONS),
}


class Anchors(NamedTuple):
    """Of one expert: anchor j is that of `classes[j]`."""

    classes: list[int]
    vectors_CD: Tensor


class StPR:
    """One expert a task; each weighs in by how near a clip is to what it was trained on.

    Args:
        adapters: 0, or in how many blocks from the end, or "all".
        feature: One vector a frame; for `adapters=0`.
        form, bottleneck, scale: Of the adapters; see `heads.grafts.adapter`.
        layers, heads, ffn, position, start: Of the experts; see `parts/expert.py`. Without a
            position ("learned"), as published, a motion and its reverse are one.
        routing: `td` as above; `average` has r_k = 1 / K; `clip` compares the frozen network's
            Vbar^s with anchors that are means of it, `adapter` the adapted network's.
        softmax: Temperature of a softmax over the r_k. None for none, as published.
        distillation, weight: `fssd`, `uniform` or `none`, and lambda. Adapters only.
        eps: Added to the variances in the importance of a channel.
        tau: Temperature of the contrast. None for 0.01, CLIP's own, with text that is given, and
            for 0.1 with codes.
        text: `given` with the tasks, or `codes`, for networks without a text tower; see
            `parts/text.py`.
        codes: With which tasks their projection trains, `always` or the `first` alone.
        first_epochs: Of the first task; `epochs` of every later one.
        clip_norm: Of the gradients of the expert, and of the adapters. Ours: with tau = 0.01 they
            are a hundred times a cosine's, and some steps overshoot; None, as published.
        precision: Of the experts' matrix products in training; scores are float32.

    Attributes:
        anchors: Of each expert. Under `clip` and `adapter` they are means of Vbar^s, else of V^tem.
        importance_CD: I of each learned class and channel, unclamped.
    """

    def __init__(
        self,
        adapters: int | str = 0,
        feature: str = "vector",
        form: str = "parallel",
        bottleneck: int = 64,
        scale: float = 0.1,
        layers: int = 3,
        heads: int = 2,
        ffn: int = 2048,
        position: str | None = None,
        start: str = "frames",
        routing: str = "td",
        softmax: float | None = None,
        distillation: str = "fssd",
        weight: float = 1e4,
        eps: float = 1e-6,
        tau: float | None = None,
        text: str = "given",
        codes: str = "always",
        first_epochs: int = 60,
        epochs: int = 30,
        batch_size: int = 40,
        lr: float = 0.01,
        momentum: float = 0.9,
        schedule: str = "cosine",
        clip_norm: float | None = 1.0,
        precision: str = "float32",
        seed: int = 0,
    ) -> None:
        given = locals()
        for name, choices in CHOICES.items():
            if given[name] not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"no {name}={given[name]!r}; choose from {known}")
        self.position, self.routing_by, self.softmax = position, routing, softmax
        self.distillation, self.weight, self.eps = distillation, weight, eps
        self.tau = tau or TAU[text]
        self.layers, self.heads, self.ffn, self.start = layers, heads, ffn, start
        self.first_epochs, self.epochs, self.batch_size = first_epochs, epochs, batch_size
        self.lr, self.momentum, self.schedule = lr, momentum, schedule
        self.clip_norm, self.precision, self.seed = clip_norm, precision, seed
        self.classes: list[int] = []
        self.anchors: list[Anchors] = []
        self.importance_CD = torch.zeros(0, 0)
        self._experts: list[Expert] = []
        self._spatial = Spatial(adapters, feature, form, bottleneck, scale, seed)
        self._text: Text = Given() if text == "given" else Codes(seed, codes)

    @property
    def reads(self) -> Sequence[str]:
        # Routing by what CLIP says needs the frozen vector beside the adapted one.
        frozen = self._spatial.adapters and self.routing_by == "clip"
        return (self._spatial.read, "vector") if frozen else (self._spatial.read,)

    @property
    def trainable(self) -> int:
        if not self.classes:
            return 0
        trained = [*self._spatial.parameters(), *self._text.parameters()]
        return sum(p.numel() for p in trained) + sum(
            p.numel() for expert in self._experts for p in expert.parameters()
        )

    @property
    def changes(self) -> bool:
        return bool(self._spatial.adapters)

    def attach(self, network: Network) -> None:
        self._spatial.attach(network)

    def learn(self, task: Task) -> None:
        before = self._spatial.state_dict()
        try:
            self._learn(task)
        except BaseException:
            self._spatial.load_state_dict(before)
            raise

    def _learn(self, task: Task) -> None:
        width = self._width
        clips, labels_N = task.clips, task.clips.labels
        old_ND: Tensor | None = None
        if not self._spatial.adapters:
            # T vectors a clip are small: read once, and not in every epoch.
            clips = Clips({"spatial": self._spatial.whole(clips, width)}, labels_N)
            first_BTD = clips.features["spatial"][torch.tensor([0])]
        else:
            first_BTD = self._spatial(clips[torch.tensor([0])], width)
            if self.classes and self.distillation != "none":
                old_ND = self._spatial.whole(clips, width).mean(dim=1)
        if self._experts:
            self._experts[0].check(first_BTD)

        rng = np.random.default_rng([self.seed, task.number])
        expert = Expert(
            first_BTD.shape[2],
            self.layers,
            self.heads,
            self.ffn,
            frames=first_BTD.shape[1] if self.position else None,
            start=self.start,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        ).to(first_BTD.device)
        text = self._text.grown(task.classes, task.text, first_BTD)
        columns_N = torch.tensor([task.classes.index(label) for label in labels_N.tolist()])
        weights_D = losses.weights(self.importance_CD.to(first_BTD), self.distillation)
        dtype = PRECISIONS[self.precision]

        def step(places: Tensor, batch: Batch) -> Tensor:
            spatial_BTD = batch["spatial"] if "spatial" in batch else self._spatial(batch)
            mean_BD = spatial_BTD.mean(dim=1)
            text_BD = text.rows(task.classes)[columns_N[places]]
            loss = losses.contrastive(
                expert(spatial_BTD, dtype), text_BD, labels_N[places], self.tau
            )
            loss = loss + losses.contrastive(mean_BD, text_BD, labels_N[places], self.tau)
            if old_ND is not None:
                loss = loss + self.weight * losses.fssd(old_ND[places], mean_BD, weights_D)
            return loss

        # Groups, since the gradients of an expert would use up the norm that the adapters may have.
        groups = [[*expert.parameters(), *text.parameters()], self._spatial.parameters()]
        fit(
            step,
            [{"params": [p for p in each if p.requires_grad]} for each in groups if each],
            clips,
            epochs=self.epochs if self.classes else self.first_epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            rng=rng,
            momentum=self.momentum,
            schedule=self.schedule,
            clip_norm=self.clip_norm,
            progress=task.progress,
        )
        self._absorb(task, expert.requires_grad_(False), text)

    @torch.no_grad()
    def _absorb(self, task: Task, expert: Expert, text: Text) -> None:
        """Take over what was trained."""
        spatial, asked = [], []
        for _, batch in task.clips.batches(READ):
            spatial.append(self._spatial(batch))
            encoded_B1D = normalize(expert(spatial[-1]), dim=1)[:, None]
            asked.append(self._asked(batch, spatial[-1], encoded_B1D)[:, 0])
        asked_ND, labels_N = torch.cat(asked), task.clips.labels
        means = [asked_ND[labels_N == label].double().mean(dim=0) for label in task.classes]
        importance_CD = losses.importance(
            torch.cat(spatial), labels_N, task.classes, text.rows(task.classes), self.eps
        )
        rows = dict(zip(self.classes, self.importance_CD.to(importance_CD), strict=True))
        rows |= dict(zip(task.classes, importance_CD, strict=True))
        self.classes = self.classes + [c for c in task.classes if c not in self.classes]
        self.importance_CD = torch.stack([rows[label] for label in self.classes])
        self.anchors = [*self.anchors, Anchors(task.classes, torch.stack(means).float())]
        self._experts = [*self._experts, expert]
        self._text = text

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        spatial_BTD, encoded_BKD = self._encoded(batch)
        weights_BK, _, _ = self._weighed(self._asked(batch, spatial_BTD, encoded_BKD))
        video_BD = spatial_BTD.mean(dim=1) + (weights_BK[..., None] * encoded_BKD).sum(dim=1)
        return normalize(video_BD, dim=1) @ self._text.rows(self.classes).to(video_BD).T

    @torch.no_grad()
    def routing(self, batch: Batch) -> Routing:
        """Of all experts. Under `average` the weights are equal, and the rest is what `td` sees."""
        weights_BK, similarities_BK, nearest_BK = self._weighed(self.residuals(batch))
        order_BK = weights_BK.argsort(dim=1, descending=True, stable=True)
        ordered = [x.gather(1, order_BK) for x in (weights_BK, nearest_BK, similarities_BK)]
        return Routing(order_BK, *ordered)

    @torch.no_grad()
    def residuals(self, batch: Batch, experts: Sequence[int] | None = None) -> Tensor:
        """What is compared with the anchors of each expert, [B, K, D].

        V^tem_k; under `clip` and `adapter` Vbar^s, for each expert the same.

        Args:
            experts: Which, and in which order; None for all.
        """
        return self._asked(batch, *self._encoded(batch, experts))

    def _encoded(self, batch: Batch, experts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """V^s [B, T, D], and V^st of experts [B, K, D]."""
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        spatial_BTD = self._spatial(batch, self._width)
        asked = range(len(self._experts)) if experts is None else experts
        encoded = [self._experts[k].to(spatial_BTD.device)(spatial_BTD) for k in asked]
        return spatial_BTD, normalize(torch.stack(encoded, dim=1), dim=2)

    def _asked(self, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor) -> Tensor:
        """What anchors are made of, and compared with: [B, K, D]."""
        if self.routing_by in ("td", "average"):
            return encoded_BKD - spatial_BTD.mean(dim=1)[:, None]
        if self.routing_by == "clip" and self._spatial.adapters:
            spatial_BTD = normalize(frames(batch, "vector"), dim=2)
        return spatial_BTD.mean(dim=1)[:, None].expand_as(encoded_BKD)

    def _weighed(self, asked_BKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r_k, the cosine to the nearest anchor of each expert, and that anchor's class; [B, K]."""
        similarities_BK, nearest_BK = nearest(asked_BKD, self.anchors)
        weights_BK = similarities_BK
        if self.routing_by == "average":
            weights_BK = torch.full_like(similarities_BK, 1 / len(self.anchors))
        elif self.softmax is not None:
            weights_BK = torch.softmax(similarities_BK / self.softmax, dim=1)
        return weights_BK, similarities_BK, nearest_BK

    @property
    def _width(self) -> int | None:
        return len(self._experts[0].cls) if self._experts else None

    def state_dict(self) -> dict[str, Tensor]:
        state = {"classes": torch.tensor(self.classes, dtype=torch.int64)}
        state |= self._spatial.state_dict() | self._text.state_dict(self.classes)
        state["importance"] = self.importance_CD.to("cpu", copy=True)
        for k, (expert, (classes, vectors_CD)) in enumerate(
            zip(self._experts, self.anchors, strict=True)
        ):
            state[f"anchors.{k}.classes"] = torch.tensor(classes)
            state[f"anchors.{k}.vectors"] = vectors_CD.to("cpu", copy=True)
            for name, tensor in expert.state_dict().items():
                state[f"expert.{k}.{name}"] = tensor.to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._spatial.load_state_dict(state)
        self._text.load_state_dict(state, self.classes)
        self.importance_CD = state["importance"].clone()
        self.anchors, self._experts = [], []
        while f"anchors.{len(self.anchors)}.classes" in state:
            k = len(self.anchors)
            classes = state[f"anchors.{k}.classes"].tolist()
            self.anchors.append(Anchors(classes, state[f"anchors.{k}.vectors"].clone()))
            own = {
                name.removeprefix(f"expert.{k}."): tensor
                for name, tensor in state.items()
                if name.startswith(f"expert.{k}.")
            }
            frames = len(own["position"]) if "position" in own else None
            expert = Expert(len(own["cls"]), self.layers, self.heads, self.ffn, frames)
            expert.load_state_dict(own)
            self._experts.append(expert.requires_grad_(False))


def nearest(asked_BKD: Tensor, anchors: Sequence[Anchors]) -> tuple[Tensor, Tensor]:
    """The cosine to the nearest anchor of each expert, and its class: [B, K] each.

    Expert k's column is compared with its own anchors alone.
    """
    similarities, classes = [], []
    for k, (labels, vectors_CD) in enumerate(anchors):
        vectors_CD = normalize(vectors_CD.to(asked_BKD), dim=1)
        cosines_BC = normalize(asked_BKD[:, k], dim=1) @ vectors_CD.T
        best_B, places_B = cosines_BC.max(dim=1)
        similarities.append(best_B)
        classes.append(torch.tensor(labels, device=places_B.device)[places_B])
    return torch.stack(similarities, dim=1), torch.stack(classes, dim=1)


build = StPR
