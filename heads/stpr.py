"""StPR: spatiotemporal experts, routed by temporal residuals, on a frozen or adapted CLIP.

"StPR: Spatiotemporal Preservation and Routing for Exemplar-Free Video Class-Incremental Learning",
2025. It keeps no exemplars. Each task k trains an expert of its own, and goes on with the adapters
that all tasks share, where there are any (`parts/losses.py` writes out the losses):

    V^s_i   = unit vector of frame i, by the network with its adapters    (parts/spatial_encoder.py)
    Vbar^s  = mean_i V^s_i
    V^st_k  = unit vector of the clip, by expert k on V^s_1 .. V^s_T        (parts/expert.py)
    V^tem_k = V^st_k - Vbar^s, the temporal residual
    anchor  = of class c of task k: mean of V^tem_k over its clips, at the end of task k
    r_k     = max over the classes c of task k of cos(V^tem_k, anchor_c)    (TD-MoE)
    V       = Vbar^s + sum_k r_k V^st_k,    score of class c = cos(V, text_c)
    loss    = L_cont(V^st_k, text) + L_cont(Vbar^s, text) + weight * L_FSSD (parts/losses.py)

The defaults are not the paper's whole method, which is adapters="all", clip_norm=None: without
adapters everything is served from the cache (the paper's row "TD-MoE only") and FSSD is zero. With
routing="none" there are no experts (its row "adapters + FSSD"): V = Vbar^s, and the loss has no
term of an expert.

Ours, where StPR is silent: what is made unit, and see `parts` for the rest. A class that comes
again gets an anchor with the new expert too; its text and importance are then the newest. For many
experts a shortlist (parts/shortlist.py), by which only a few of them run on a clip.

Shapes: N clips, B clips a batch, T frames, D width, C classes, K experts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads import Network, Routing, Task
from varve.heads.parts import losses
from varve.heads.parts.anchor_pool import AnchorPool
from varve.heads.parts.class_text import TRAINED, Codes, Given, Text
from varve.heads.parts.clips import Batch, Clips, frames
from varve.heads.parts.expert import PRECISIONS, STARTS, Expert
from varve.heads.parts.shortlist import Shortlist, weights
from varve.heads.parts.spatial_encoder import READ, Spatial
from varve.heads.parts.training import SCHEDULES, fit

TAU = {"given": 0.01, "codes": 0.1}
CHOICES = {
    "position": (None, "learned"),
    "routing": ("td", "average", "clip", "adapter", "none"),
    "distillation": losses.DISTILLATIONS,
    "text": ("given", "codes"),
    "codes": TRAINED,
    "start": STARTS,
    "schedule": SCHEDULES,
    "precision": tuple(PRECISIONS),
}


class StPR:
    """One expert a task; each weighs in by how near a clip is to what it was trained on.

    Args:
        adapters: 0, or in how many blocks from the end, or "all".
        feature: One vector a frame; for `adapters=0`.
        form, bottleneck, scale: Of the adapters; see `varve.heads.grafts.adapter`.
        layers, heads, ffn, position, start: Of the experts; see `parts/expert.py`. Without a
            position ("learned"), as published, a motion and its reverse are one.
        routing: `td` as above; `average` has r_k = 1 / K; `clip` compares the frozen network's
            Vbar^s with anchors that are means of it, `adapter` the adapted network's; `none` has
            no experts.
        softmax: Temperature of a softmax over the r_k. None for none, as published.
        keep: How many experts, those of the greatest r_k, enter the sum. 0 for all, as published.
        shortlist: How many experts run on a clip; what the others would say is assumed. 0 for all,
            as published.
        doubt: With a shortlist: where the two best classes differ by less, in cosine, all run.
        distillation, weight: `fssd`, `uniform` or `none`, and lambda. Adapters only.
        eps: Added to the variances in the importance of a channel.
        tau: Temperature of the contrast. None for 0.01, CLIP's own, with text that is given, and
            for 0.1 with codes.
        text: `given` with the tasks, or `codes`, for networks without a text tower; see
            `parts/class_text.py`.
        codes: With which tasks their projection trains, `always` or the `first` alone.
        first_epochs: Of the first task; `epochs` of every later one.
        clip_norm: Of the gradients of the expert, and of the adapters. Ours: with tau = 0.01 they
            are a hundred times a cosine's, and some steps overshoot; None, as published.
        precision: Of the experts' matrix products in training; scores are float32.

    Attributes:
        answering: Options that decide scores, and nothing of what is learned.
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
        keep: int = 0,
        shortlist: int = 0,
        doubt: float = 0.01,
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
        counts = {"first_epochs": first_epochs, "epochs": epochs, "batch_size": batch_size}
        if min(first_epochs, epochs) < 0 or batch_size < 1:
            raise ValueError(f"{counts}: give 0 epochs at least, and a clip a batch")
        if keep < 0 or shortlist < 0 or (shortlist and routing not in ("td", "average")):
            raise ValueError(
                f"{keep=}, {shortlist=} under {routing=}: give 0 or more, and a shortlist where "
                "experts are compared by their residuals alone"
            )
        numbers = {"softmax": softmax, "tau": tau, "eps": eps}
        if any(x is not None and not x > 0 for x in numbers.values()) or not doubt >= 0:
            raise ValueError(f"{numbers}, {doubt=}: give numbers above 0, and no doubt below it")
        self.position, self.routing_by, self.softmax = position, routing, softmax
        self.keep, self.shortlist, self.doubt = keep, shortlist, doubt
        self.distillation, self.weight, self.eps = distillation, weight, eps
        self.tau = TAU[text] if tau is None else tau
        self.layers, self.heads, self.ffn, self.start = layers, heads, ffn, start
        self.first_epochs, self.epochs, self.batch_size = first_epochs, epochs, batch_size
        self.lr, self.momentum, self.schedule = lr, momentum, schedule
        self.clip_norm, self.precision, self.seed = clip_norm, precision, seed
        self.classes: list[int] = []
        self.importance_CD = torch.zeros(0, 0)
        self._experts: list[Expert] = []
        # Of every way to route that the features allow, so that each is there to be asked for.
        clip = ("clip",) if adapters and routing == "clip" else ()
        self._ways = () if routing == "none" else ("td", "adapter", *clip)
        self._pools: dict[str, AnchorPool] = {}
        self._listed = Shortlist()
        self._spatial = Spatial(adapters, feature, form, bottleneck, scale, seed, self.grafted)
        self._text: Text = Given() if text == "given" else Codes(seed, codes)

    @property
    def inference_options(self) -> Sequence[str]:
        names = ["softmax", "keep", "doubt"]
        if self.shortlist:
            names.append("shortlist")
        if self.routing_by != "none" and not (self.fine_tunes and self.routing_by == "clip"):
            names.append("routing")
        if not self.fine_tunes:
            names += ["form", "bottleneck", "scale", "distillation", "weight"]
        return names

    @property
    def pool(self) -> AnchorPool:
        """The anchors that it routes by: of V^tem, under `clip` and `adapter` of Vbar^s.

        Raises:
            ValueError: There are no experts, or none yet.
        """
        if not self._pools:
            raise ValueError(f"no anchors under routing={self.routing_by!r}, or none learned yet")
        way = {"average": "td"}.get(self.routing_by, self.routing_by)
        return self._pools[way if way in self._ways else "adapter"]

    @property
    def experts(self) -> int:
        return len(self._experts)

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
    def fine_tunes(self) -> bool:
        return bool(self._spatial.adapters)

    def grafted(self, network: Network, stage: str, adapter: nn.Module) -> nn.Module:
        """What stands in the place of a block's MLP: the adapter, or a graft around it.

        Its parameters train, are held and are kept as the adapter's are.
        """
        return adapter

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
        if self._pools and self.pool.keys[-1] != task.key:
            raise ValueError(
                f"a task from columns {task.key!r}; learned before were tasks from "
                f"{self.pool.keys[-1]!r}: use the same features throughout"
            )
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
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        expert = self._expert(first_BTD, generator) if self._ways else None
        text = self._text.grown(task.classes, task.text, first_BTD)
        columns_N = torch.tensor([task.classes.index(label) for label in labels_N.tolist()])
        weights_D = losses.weights(self.importance_CD.to(first_BTD), self.distillation)
        dtype = PRECISIONS[self.precision]

        def step(places: Tensor, batch: Batch) -> Tensor:
            spatial_BTD = batch["spatial"] if "spatial" in batch else self._spatial(batch)
            mean_BD = spatial_BTD.mean(dim=1)
            text_BD = text.rows(task.classes)[columns_N[places]]
            loss = losses.contrastive(mean_BD, text_BD, labels_N[places], self.tau)
            if expert is not None:
                encoded_BD = expert(spatial_BTD, dtype)
                loss = loss + losses.contrastive(encoded_BD, text_BD, labels_N[places], self.tau)
            if old_ND is not None:
                loss = loss + self.weight * losses.fssd(old_ND[places], mean_BD, weights_D)
            return loss

        # Groups, since the gradients of an expert would use up the norm that the adapters may have.
        own = [] if expert is None else [*expert.parameters()]
        groups = [
            [p for p in group if p.requires_grad]
            for group in ([*own, *text.parameters()], self._spatial.parameters())
        ]
        if any(groups):
            fit(
                step,
                [{"params": group} for group in groups if group],
                clips,
                epochs=self.epochs if self.classes else self.first_epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                rng=rng,
                momentum=self.momentum,
                schedule=self.schedule,
                clip_norm=self.clip_norm,
                on_epoch_end=task.on_epoch_end,
            )
        self._absorb(task, expert, text)

    @torch.no_grad()
    def _absorb(self, task: Task, expert: Expert | None, text: Text) -> None:
        """Take over what was trained."""
        spatial: list[Tensor] = []
        compared: dict[str, list[Tensor]] = {way: [] for way in self._ways}
        for _, batch in task.clips.batches(READ):
            spatial.append(self._spatial(batch))
            if expert is None:
                continue
            encoded_B1D = normalize(expert(spatial[-1]), dim=1)[:, None]
            for way, parts in compared.items():
                parts.append(self._compared(way, batch, spatial[-1], encoded_B1D)[:, 0])
        spatial_NTD, labels_N = torch.cat(spatial), task.clips.labels
        importance_CD = losses.importance(
            spatial_NTD, labels_N, task.classes, text.rows(task.classes), self.eps
        )
        rows = dict(zip(self.classes, self.importance_CD.to(importance_CD), strict=True))
        rows |= dict(zip(task.classes, importance_CD, strict=True))
        experts = [*self._experts, *([] if expert is None else [expert.requires_grad_(False)])]
        if self.shortlist:
            self._listed.add(
                spatial_NTD, labels_N, task.classes, lambda k, x: _encoded(experts[k], x)
            )
        for way, parts in compared.items():
            all_ND = torch.cat(parts).double()
            means = [all_ND[labels_N == label].mean(dim=0) for label in task.classes]
            pool = self._pools.setdefault(way, self._pool(importance_CD.shape[1]))
            pool.add(len(pool), task.classes, torch.stack(means).float(), task.key)
        self._experts = experts
        self.classes = self.classes + [c for c in task.classes if c not in self.classes]
        self.importance_CD = torch.stack([rows[label] for label in self.classes])
        self._text = text

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        return self._scored(batch, *self._encoded(batch))

    def _scored(self, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor) -> Tensor:
        video_BD = spatial_BTD.mean(dim=1)
        if self._ways:
            similarities_BK, _ = self._similar(batch, spatial_BTD, encoded_BKD)
            video_BD = video_BD + (self._weights(similarities_BK)[..., None] * encoded_BKD).sum(1)
        return normalize(video_BD, dim=1) @ self._text.rows(self.classes).to(video_BD).T

    @torch.no_grad()
    def routing(self, batch: Batch) -> Routing:
        """Of all experts. Under `average` the weights are equal, and the rest is what `td` sees.

        Raises:
            ValueError: As `scores`, or there are no experts.
        """
        if not self._ways:
            raise ValueError("routing='none' has no experts, so there is nothing to route")
        spatial_BTD, encoded_BKD = self._encoded(batch)
        similarities_BK, nearest_BK = self._similar(batch, spatial_BTD, encoded_BKD)
        weights_BK = self._weights(similarities_BK)
        order_BK = weights_BK.argsort(dim=1, descending=True, stable=True)
        ordered = [x.gather(1, order_BK) for x in (weights_BK, nearest_BK, similarities_BK)]
        return Routing(order_BK, *ordered)

    @torch.no_grad()
    def residuals(self, batch: Batch, experts: Sequence[int] | None = None) -> Tensor:
        """What is compared with the anchors of each expert, [B, K, D].

        V^tem_k; under `clip` and `adapter` Vbar^s, for each expert the same. All experts that are
        asked run, with a shortlist too.

        Args:
            experts: Which, and in which order; None for all.
        """
        spatial_BTD = self._seen(batch)
        asked = range(len(self._experts)) if experts is None else experts
        if not len(asked):
            raise ValueError(f"residuals of {len(asked)} of {len(self._experts)} experts: ask one")
        encoded_BKD = torch.stack([self._encode(k, spatial_BTD) for k in asked], dim=1)
        return self._compared(self.routing_by, batch, spatial_BTD, encoded_BKD)

    def _seen(self, batch: Batch) -> Tensor:
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        return self._spatial(batch, self._width)

    def _encode(self, k: int, spatial_BTD: Tensor) -> Tensor:
        return _encoded(self._experts[k], spatial_BTD)

    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """V^s [B, T, D], and V^st of all experts [B, K, D], or of the others what is assumed."""
        spatial_BTD = self._seen(batch)
        if not self._ways:
            return spatial_BTD, spatial_BTD[:, :0]

        def every(x_BTD: Tensor) -> Tensor:
            return torch.stack([self._encode(k, x_BTD) for k in range(self.experts)], dim=1)

        if not 0 < self.shortlist < self.experts:
            return spatial_BTD, every(spatial_BTD)

        def similar(encoded_BKD: Tensor) -> Tensor:
            return self._similar(batch, spatial_BTD, encoded_BKD)[0]

        encoded_BKD, _ = self._listed.encoded(spatial_BTD, self.shortlist, self._encode, similar)
        if self.doubt and len(self.classes) > 1:
            best_B2 = self._scored(batch, spatial_BTD, encoded_BKD).topk(2, dim=1).values
            doubted_B = best_B2[:, 0] - best_B2[:, 1] < self.doubt
            if doubted_B.any():
                encoded_BKD[doubted_B] = every(spatial_BTD[doubted_B])
        return spatial_BTD, encoded_BKD

    def _compared(self, way: str, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor) -> Tensor:
        """What anchors are made of, and compared with: [B, K, D]."""
        if way in ("td", "average"):
            return encoded_BKD - spatial_BTD.mean(dim=1)[:, None]
        if way == "clip" and self._spatial.adapters:
            spatial_BTD = normalize(frames(batch, "vector"), dim=2)
        return spatial_BTD.mean(dim=1)[:, None].expand_as(encoded_BKD)

    def _similar(
        self, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """r_k, the cosine to the nearest anchor of each expert, and that anchor's class; [B, K]."""
        compared_BKD = self._compared(self.routing_by, batch, spatial_BTD, encoded_BKD)
        return self.pool.compare(compared_BKD, self.pool.keys[-1])

    def _weights(self, similarities_BK: Tensor) -> Tensor:
        if self.routing_by == "average":
            return torch.full_like(similarities_BK, 1 / similarities_BK.shape[1])
        return weights(similarities_BK, self.softmax, self.keep)

    @property
    def _width(self) -> int | None:
        return self.importance_CD.shape[1] or None

    def _expert(self, like_BTD: Tensor, generator: torch.Generator | None = None) -> Expert:
        """One that has learned nothing, for such clips."""
        _, T, D = like_BTD.shape
        positions = T if self.position else None
        made = Expert(D, self.layers, self.heads, self.ffn, positions, self.start, generator)
        return made.to(like_BTD.device)

    def _pool(self, width: int) -> AnchorPool:
        return AnchorPool(width, lineage=self.fine_tunes)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"classes": torch.tensor(self.classes, dtype=torch.int64)}
        state |= self._spatial.state_dict() | self._text.state_dict(self.classes)
        state["importance"] = self.importance_CD.to("cpu", copy=True)
        parts = {f"anchors.{way}": pool.state_dict() for way, pool in self._pools.items()}
        parts["shortlist"] = self._listed.state_dict()
        for k, expert in enumerate(self._experts):
            own = expert.state_dict()
            parts[f"expert.{k}"] = {name: x.to("cpu", copy=True) for name, x in own.items()}
        return state | {f"{part}.{n}": x for part, own in parts.items() for n, x in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._spatial.load_state_dict(state)
        self._text.load_state_dict(state, self.classes)
        self.importance_CD = state["importance"].clone()
        self._pools = {}
        for way in self._ways if self.classes else ():
            self._pools[way] = self._pool(self.importance_CD.shape[1])
            self._pools[way].load_state_dict(_part(state, f"anchors.{way}"))
        self._listed.load_state_dict(_part(state, "shortlist"))
        self._experts = []
        while own := _part(state, f"expert.{len(self._experts)}"):
            like_1TD = torch.empty(1, len(own.get("position", ())), len(own["cls"]))
            expert = self._expert(like_1TD)
            expert.load_state_dict(own)
            self._experts.append(expert.requires_grad_(False))


def _encoded(expert: Expert, spatial_BTD: Tensor) -> Tensor:
    """V^st_k, [B, D]."""
    return normalize(expert.to(spatial_BTD.device)(spatial_BTD), dim=1)


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What `state` has under a name."""
    start = f"{name}."
    return {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}


build = StPR
