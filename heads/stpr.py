"""StPR: spatiotemporal experts, routed by temporal residuals, on a frozen or adapted CLIP.

"StPR: Spatiotemporal Preservation and Routing for Exemplar-Free Video Class-Incremental Learning",
2025. It keeps no exemplars. Each task k trains its own expert, and continues to train the adapters
that all tasks share, where there are any (`parts/losses.py` has the losses):

    V^s_i   = unit vector of frame i, by the network with its adapters    (parts/spatial_encoder.py)
    Vbar^s  = mean_i V^s_i
    V^st_k  = unit vector of the clip, by expert k on V^s_1 .. V^s_T        (parts/expert.py)
    V^tem_k = V^st_k - Vbar^s, the temporal residual
    anchor  = of class c of task k: mean of V^tem_k over its clips, at the end of task k
    r_k     = max over the classes c of task k of cos(V^tem_k, anchor_c)    (TD-MoE)
    V       = Vbar^s + sum_k r_k V^st_k,    score of class c = cos(V, text_c)
    loss    = L_cont(V^st_k, text) + L_cont(Vbar^s, text) + weight * L_FSSD (parts/losses.py)

The defaults are not the paper's whole method, which is adapters="all", clip_norm=None. Without
adapters everything is served from the cache (the paper's row "TD-MoE only") and FSSD is zero. With
routing="none" there are no experts (its row "adapters + FSSD"): V = Vbar^s, and the loss has no
term of an expert.

Ours, where StPR is silent: which vectors are normalised; see `parts` for the rest. A class that is
learned again gets an anchor with the new expert too, and its text and importance are replaced. For
many experts there is a shortlist (parts/shortlist.py), with which only a few of them run on a clip.

Shapes: N clips, B clips a batch, T frames, D width, C classes, K experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads import Network, Routing, Task
from varve.heads.parts import losses
from varve.heads.parts.anchor_pool import AnchorPool
from varve.heads.parts.class_text import TRAINED, Codes, Given, Text
from varve.heads.parts.classifiers import columns
from varve.heads.parts.clips import Batch, Clips
from varve.heads.parts.expert import PRECISIONS, Expert, ExpertConfig
from varve.heads.parts.losses import DistillationConfig
from varve.heads.parts.routed_experts import RoutedExperts, RoutingConfig
from varve.heads.parts.spatial_encoder import Spatial
from varve.heads.parts.training import OptimConfig, fit

TAU = {"given": 0.01, "codes": 0.1, "means": 0.1}

TEACHER = "teacher Vbar^s"


class StPR:
    """Train one expert per task and weigh them by a clip's nearest anchors; see the module.

    Args:
        adapters: Number of blocks with an adapter, from the end; 0, or "all".
        feature: Name of a feature of one vector per frame, for `adapters=0`.
        form: Option of the adapters, as are `bottleneck` and `scale`; see
            `varve.heads.grafts.adapter`.
        expert: Options of the experts.
        routing: Options of the routing.
        distillation: Options of FSSD, with adapters.
        text: `given` with the tasks; or for networks without a text tower `codes`, see
            `varve.heads.parts.class_text`, or `means`: ours, the class means of Vbar^s over the
            task's clips, by the network as it is before the task.
        codes: Tasks in which the projection of codes trains, `always` or the `first` alone.
        tau: Temperature of the contrast. None for 0.01, CLIP's own, with text that is given, and
            for 0.1 with codes and means.
        optim: Options of gradient descent. Ours: `clip_norm`, for the gradients of the expert and
            of the adapters. With tau = 0.01 they are a hundred times those of a cosine, and some
            steps overshoot; None, as published, does not clip.
        precision: `float32` or `bfloat16`, for the matrix products of experts in training; scores
            are float32.
        seed: Seed of everything that is drawn.

    Attributes:
        optim: Options of gradient descent.
        routed: The experts with their anchors.
        importance_CD: I of each learned class and channel, unclamped.

    Raises:
        ValueError: An option is out of range, or is not one of the choices.
    """

    def __init__(
        self,
        adapters: int | str = 0,
        feature: str = "vector",
        form: str = "parallel",
        bottleneck: int = 64,
        scale: float = 0.1,
        expert: ExpertConfig = ExpertConfig(),
        routing: RoutingConfig = RoutingConfig(),
        distillation: DistillationConfig = DistillationConfig(),
        text: str = "given",
        codes: str = "always",
        tau: float | None = None,
        optim: OptimConfig = OptimConfig(weight_decay=0.0, clip_norm=1.0),
        precision: str = "float32",
        seed: int = 0,
    ) -> None:
        if text not in TAU or codes not in TRAINED or precision not in PRECISIONS:
            raise ValueError(
                f"no {text=}, {codes=}, {precision=}; choose from {', '.join(TAU)}; "
                f"{', '.join(TRAINED)}; {', '.join(PRECISIONS)}"
            )
        if tau is not None and not tau > 0:
            raise ValueError(f"{tau=}: give a temperature above 0")
        self.optim = optim
        self.classes: list[int] = []
        self.importance_CD = torch.zeros(0, 0)
        self._distillation = distillation
        self._tau = TAU[text] if tau is None else tau
        self._precision, self._seed = precision, seed
        self.routed = RoutedExperts(routing, expert, adapted=bool(adapters))
        self._spatial = Spatial(adapters, feature, form, bottleneck, scale, seed, self.grafted)
        self._means = text == "means"
        self._text: Text = Codes(seed, codes) if text == "codes" else Given()

    @property
    def inference_options(self) -> Sequence[str]:
        names = ["softmax", "keep", "doubt", "calibrate"]
        if self.routed.config.shortlist:
            names.append("shortlist")
        way = self.routed.config.routing
        if way != "none" and not (self.fine_tunes and way == "clip"):
            names.append("routing")
        if not self.fine_tunes:
            names += ["form", "bottleneck", "scale", "distillation", "weight"]
        return names

    @property
    def pool(self) -> AnchorPool:
        """Anchors of the routing; see `RoutedExperts.pool`."""
        return self.routed.pool

    @property
    def experts(self) -> int:
        return len(self.routed)

    @property
    def reads(self) -> Sequence[str]:
        # Routing by the frozen network needs its vector beside the adapted one.
        frozen = self._spatial.adapters and self.routed.config.routing == "clip"
        return (self._spatial.read, "vector") if frozen else (self._spatial.read,)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        if not self.classes:
            return
        if self._spatial.suffix is not None:
            yield "network", self._spatial.suffix
        for expert in self.routed.experts:
            yield "experts", expert
        if text := self._text.parameters():
            yield "classifier", nn.ParameterList(text)

    @property
    def trainable(self) -> int:
        if not self.classes:
            return 0
        trained = [*self._spatial.parameters(), *self._text.parameters()]
        trained += [p for expert in self.routed.experts for p in expert.parameters()]
        return sum(p.numel() for p in trained)

    @property
    def fine_tunes(self) -> bool:
        return bool(self._spatial.adapters)

    def grafted(self, network: Network, stage: str, adapter: nn.Module) -> nn.Module:
        """Return what replaces a block's MLP: the adapter, or a graft around it.

        Its parameters are trained, restored and saved with the adapter's.
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
        clips, first_BTD = self._clips(task)
        self.routed.check(task, first_BTD)
        rng = task.rng(self._seed)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        expert = self.routed.new_expert(first_BTD, generator) if self.routed.ways else None
        given_CD = self._class_means(task) if self._means else task.text
        text = self._text.grown(task.classes, given_CD, first_BTD)
        # Groups, since the gradients of an expert would use up the norm that the adapters may have.
        expert_parameters = [] if expert is None else [*expert.parameters()]
        groups = [
            [p for p in group if p.requires_grad]
            for group in ([*expert_parameters, *text.parameters()], self._spatial.parameters())
        ]
        if any(groups):
            fit(
                self._step(task, expert, text),
                [{"params": group} for group in groups if group],
                clips,
                self.optim,
                epochs=self.optim.epochs_of(first_task=not self.classes),
                rng=rng,
                on_epoch_end=task.on_epoch_end,
            )
        self._keep(task, expert, text)

    def _clips(self, task: Task) -> tuple[Clips, Tensor]:
        """Return clips to train on, with the teacher's Vbar^s if it is used, and V^s of the first.

        Without adapters they have V^s in the place of their features.
        """
        clips, first = task.clips, torch.tensor([0])
        if not self._spatial.adapters:
            # T vectors a clip are small: read once, and not in every epoch.
            spatial = [self._spatial.whole(view, self._width) for view in clips.each_view()]
            whole, *others = ({"spatial": spatial_NTD} for spatial_NTD in spatial)
            return Clips(whole, clips.labels, views=others), spatial[0][first]
        first_BTD = self._spatial(clips[first], self._width)
        if not self.classes or self._distillation.distillation == "none":
            return clips, first_BTD
        plain, *views = (
            view.features | {TEACHER: self._spatial.whole(view, self._width).mean(dim=1)}
            for view in clips.each_view()
        )
        return Clips(plain, clips.labels, views=views), first_BTD

    def _class_means(self, task: Task) -> Tensor:
        """Return the mean of Vbar^s over the clips of each class of a task, [C, D]."""
        mean_ND = self._spatial.whole(task.clips, self._width).mean(dim=1)
        labels_N = task.clips.labels
        return torch.stack([mean_ND[labels_N == label].mean(dim=0) for label in task.classes])

    def _step(
        self, task: Task, expert: Expert | None, text: Text
    ) -> Callable[[Tensor, Batch], Tensor]:
        """Return the loss of a batch."""
        labels_N = task.clips.labels
        columns_N = columns(task.classes, labels_N)
        weights_D = losses.weights(self.importance_CD, self._distillation.distillation)
        dtype, tau, weight = PRECISIONS[self._precision], self._tau, self._distillation.weight

        def step(indices: Tensor, batch: Batch) -> Tensor:
            spatial_BTD = batch["spatial"] if "spatial" in batch else self._spatial(batch)
            mean_BD = spatial_BTD.mean(dim=1)
            text_BD = text.rows(task.classes)[columns_N[indices]]
            loss = losses.contrastive(mean_BD, text_BD, labels_N[indices], tau)
            if expert is not None:
                encoded_BD = expert(spatial_BTD, dtype)
                loss = loss + losses.contrastive(encoded_BD, text_BD, labels_N[indices], tau)
            if TEACHER in batch:
                fssd = losses.fssd(batch[TEACHER], mean_BD, weights_D.to(mean_BD))
                loss = loss + weight * fssd
            return loss

        return step

    @torch.no_grad()
    def _keep(self, task: Task, expert: Expert | None, text: Text) -> None:
        """Store what was trained: the expert, anchors, importance and text of the task."""
        spatial_NTD = self._spatial.whole(task.clips)
        importance_CD = losses.importance(
            spatial_NTD, task.clips.labels, task.classes, text.rows(task.classes),
            self._distillation.eps,
        )  # fmt: skip
        rows = dict(zip(self.classes, self.importance_CD.to(importance_CD), strict=True))
        rows |= dict(zip(task.classes, importance_CD, strict=True))
        if expert is not None:
            self.routed.add(task, expert, spatial_NTD)
        self.classes = task.classes_after(self.classes)
        self.importance_CD = torch.stack([rows[label] for label in self.classes])
        self._text = text

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        spatial_BTD = self._learned_spatial(batch)
        if not self.routed.ways:
            return self._compared(spatial_BTD.mean(dim=1))
        return self._scored(batch, spatial_BTD, self._encoded(batch, spatial_BTD))

    @torch.no_grad()
    def scores_with(self, batch: Batch, weights_BK: Tensor) -> Tensor:
        """Return the scores with other weights of all experts, [B, C].

        Raises:
            ValueError: See `routing`.
        """
        spatial_BTD = self._routed_spatial(batch)
        return self._weighted(spatial_BTD, self.routed.encode_all(spatial_BTD), weights_BK)

    def _scored(self, batch: Batch, spatial_BTD: Tensor, encoded_BKD: Tensor) -> Tensor:
        similarities_BK, _ = self.routed.similarities(batch, spatial_BTD, encoded_BKD)
        return self._weighted(spatial_BTD, encoded_BKD, self.routed.weights(similarities_BK))

    def _weighted(self, spatial_BTD: Tensor, encoded_BKD: Tensor, weights_BK: Tensor) -> Tensor:
        experts_BD = (weights_BK[..., None].to(encoded_BKD) * encoded_BKD).sum(dim=1)
        return self._compared(spatial_BTD.mean(dim=1) + experts_BD)

    def _compared(self, video_BD: Tensor) -> Tensor:
        """Return the cosines of clips' vectors to the text of each class, [B, C]."""
        return normalize(video_BD, dim=1) @ self._text.rows(self.classes).to(video_BD).T

    def _encoded(self, batch: Batch, spatial_BTD: Tensor) -> Tensor:
        """Return V^st of all experts [B, K, D], estimated for some of them with a shortlist."""
        return self.routed.encode_listed(
            batch, spatial_BTD, lambda encoded_BKD: self._scored(batch, spatial_BTD, encoded_BKD)
        )

    @torch.no_grad()
    def routing(self, batch: Batch) -> Routing:
        """Return the routing among all experts.

        Under `average` the weights are equal, and classes and similarities are those of `td`.

        Raises:
            ValueError: See `scores`; or there are no experts.
        """
        spatial_BTD = self._routed_spatial(batch)
        encoded_BKD = self._encoded(batch, spatial_BTD)
        similarities_BK, nearest_BK = self.routed.similarities(batch, spatial_BTD, encoded_BKD)
        weights_BK = self.routed.weights(similarities_BK)
        order_BK = weights_BK.argsort(dim=1, descending=True, stable=True)
        ordered = [x.gather(1, order_BK) for x in (weights_BK, nearest_BK, similarities_BK)]
        return Routing(order_BK, *ordered)

    @torch.no_grad()
    def residuals(self, batch: Batch, experts: Sequence[int] | None = None) -> Tensor:
        """Return the vectors that are compared with the anchors of each expert, [B, K, D].

        They are V^tem_k, or Vbar^s for every expert under `clip` and `adapter`. All experts given
        run, with a shortlist too.

        Args:
            batch: Features of the clips.
            experts: Numbers of experts, in the order of the result; None for all.

        Raises:
            ValueError: See `scores`; or no expert is given.
        """
        spatial_BTD = self._learned_spatial(batch)
        if not (self.experts if experts is None else len(experts)):
            raise ValueError(f"residuals of 0 of {self.experts} experts: give one at least")
        encoded_BKD = self.routed.encode_all(spatial_BTD, experts)
        return self.routed.compared(self.routed.config.routing, batch, spatial_BTD, encoded_BKD)

    def _routed_spatial(self, batch: Batch) -> Tensor:
        """Return V^s of clips, [B, T, D], if there are experts."""
        if not self.routed.ways:
            raise ValueError("routing='none' has no experts, so there is nothing to route")
        return self._learned_spatial(batch)

    def _learned_spatial(self, batch: Batch) -> Tensor:
        """Return V^s of clips, [B, T, D], if something was learned."""
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        return self._spatial(batch, self._width)

    @property
    def _width(self) -> int | None:
        return self.importance_CD.shape[1] or None

    def state_dict(self) -> dict[str, Tensor]:
        state = {"classes": torch.tensor(self.classes, dtype=torch.int64)}
        state |= self._spatial.state_dict() | self._text.state_dict(self.classes)
        state["importance"] = self.importance_CD.to("cpu", copy=True)
        return state | self.routed.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._spatial.load_state_dict(state)
        self._text.load_state_dict(state, self.classes)
        self.importance_CD = state["importance"].clone()
        self.routed.load_state_dict(state)


build = StPR
