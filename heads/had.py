"""HAD: audio and video together, held by augmentation and distillation at several levels.

"Hierarchical Augmentation and Distillation for Class Incremental Audio-Visual Video Recognition",
2024. Its public abstract names the parts; the equations below are OUR RECONSTRUCTION of them, not
the paper's. Features are cached, of S segments of a clip by two networks, and nothing recomputes.
`parts/hybrid_attention.py` makes segments z, snippets s and a vector v of them; a cosine classifier
follows.
With f the part of the model behind a level, f* the old model, and e standard normal:

    HAM   low           CE(f(z + alpha sigma e), y), z of exemplars
          high          CE(f(v + alpha sigma e), y), v of exemplars
    HDM   video         T^2 KL(softmax(old logits / T) || softmax(logits / T)), of old classes
          distribution  the same of samples of N(mean, variance) of each old class's v
          snippet       mean over modalities of |C(s) - C(s*)|^2 / n^2, over the snippets of a batch
          correlative   |C(v) - C(v*)|^2 / n^2, over the clips of a batch

C(x) is the matrix of cosines between n vectors. Each part of the model sees noise made at its own
level only: z and v carry no gradient back, and what is noisy at the low level trains the attention
and the fusion but not the classifier, which the high level trains. sigma is the deviation of each
dimension over the exemplars of a batch. Gaussians are those of the task that brought the class.
A class that comes again is taught by labels: the logical part is over the others.

Loss = CE + the HAM terms + logical (video + distribution) + correlative (snippet + correlative).

Shapes: N clips, B clips a batch, S segments, W width, C classes, K old classes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts.classifiers import Cosine, columns
from varve.heads.parts.clips import Batch, Clips, frames
from varve.heads.parts.distillation import relations, softened
from varve.heads.parts.exemplars import Exemplars
from varve.heads.parts.hybrid_attention import Hybrid, Pair
from varve.heads.parts.training import check, fit

HAM = ("low", "high")
HDM = ("video", "distribution", "snippet", "correlative")
PARTS = "+".join((*HAM, *HDM))
READ = 256


class Model(nn.Module):
    """From two features of `segments` segments to scores."""

    def __init__(self, hybrid: Hybrid, segments: int, width: int) -> None:
        super().__init__()
        self.hybrid, self.segments, self.classifier = hybrid, segments, Cosine(width)

    def forward(self, features: Pair) -> Tensor:
        return self.logits(self.hybrid(features))

    def logits(self, fused_BW: Tensor, held: bool = False) -> Tensor:
        """Of clips' vectors, [B, C]. Held, the classifier gets no gradient."""
        own = {n: p.detach() if held else p for n, p in self.classifier.named_parameters()}
        cosines_BC: Tensor = functional_call(self.classifier, own, fused_BW)
        return own["scale"] * cosines_BC


class HAD:
    """See the module.

    Args:
        visual, audio: One vector a segment each.
        parts: What cross entropy is joined by, "+" between them: low, high, video, distribution,
            snippet, correlative. "" for rehearsal alone.
        alpha: Of the noise.
        temperature: T of the logical distillation.
        logical, correlative: Weights of the two kinds of distillation.
        within: Cosines of snippets are taken within a clip alone.
        width, heads, ffn, position: Of the attention; see `parts/hybrid_attention.py`.
        budget, shared, choice: Of the exemplars; see `varve.heads.parts.exemplars`. With 0 of
        them, and
            without parts, it is fine-tuning, and there is no NME.
        first_epochs: Of the first task; `epochs` of every other.
    """

    def __init__(
        self,
        visual: str = "vector",
        audio: str = "sound",
        parts: str = PARTS,
        alpha: float = 0.1,
        temperature: float = 2.0,
        logical: float = 1.0,
        correlative: float = 1.0,
        within: bool = False,
        width: int = 512,
        heads: int = 8,
        ffn: int = 1024,
        position: str | None = None,
        budget: int = 100,
        shared: bool = True,
        choice: str = "herding",
        first_epochs: int = 60,
        epochs: int = 30,
        batch_size: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: str = "cosine",
        seed: int = 0,
    ) -> None:
        self.parts = set(parts.split("+")) if parts else set()
        if not self.parts <= {*HAM, *HDM} or position not in (None, "learned"):
            raise ValueError(
                f"{parts=}, {position=}: join {', '.join((*HAM, *HDM))} by +, and give None or "
                "'learned'"
            )
        if not (alpha >= 0 and temperature > 0 and logical >= 0 and correlative >= 0):
            raise ValueError(
                f"{alpha=}, {temperature=}, {logical=}, {correlative=}: give a temperature above 0 "
                "and the others of 0 or more"
            )
        if min(width, heads, ffn) < 1 or width % heads:
            raise ValueError(f"{width=}, {heads=}, {ffn=}: give a width that the heads divide")
        self.reads: Sequence[str] = (visual, audio)
        self.classes: list[int] = []
        self.alpha, self.temperature, self.within = alpha, temperature, within
        self._weights = logical, correlative
        self._form: dict[str, Any] = {
            "width": width,
            "heads": heads,
            "ffn": ffn,
            "position": position,
        }
        self._epochs, self._seed = (first_epochs, epochs), seed
        self._recipe: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "optimizer": "adam",
        }
        for count in self._epochs:
            check(epochs=count, **self._recipe)
        self._model: Model | None = None
        self._exemplars = Exemplars(budget, shared, choice, least=0)
        if budget == 0 and self.parts & set(HAM):
            raise ValueError(
                f"budget=0, {parts=}: exemplars are what low and high augment; give parts without "
                "them"
            )
        self._means_CW = self._deviations_CW = torch.zeros(0, width)

    @property
    def trainable(self) -> int:
        return 0 if self._model is None else sum(p.numel() for p in self._model.parameters())

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        known = len(self.classes)
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        self._exemplars.quota(len(classes))
        first = self._features(task.clips[torch.arange(1)])
        device = first[0].device
        old = None if self._model is None else self._model.to(device)
        model = copy.deepcopy(old) if old else self._empty(first, rng).to(device)
        self._check(model, first)
        if not old:
            model.hybrid.standardize([task.clips.whole(name) for name in self.reads])
        clips = self._exemplars.rehearsal(task)
        columns_N = columns(classes, clips.labels)
        kept_N = torch.arange(len(clips)) >= len(task.clips)
        held = [column for column in range(known) if classes[column] not in task.classes]
        model.classifier.grow(len(classes), rng)
        vectors_NW = self._vectors(model, clips)
        for column in range(known, len(classes)):
            of = vectors_NW[(columns_N == column).to(device)]
            model.classifier.imprint(column, of, torch.arange(known), rng)

        def step(places: Tensor, batch: Batch) -> Tensor:
            features, columns_B = self._features(batch), columns_N[places].to(device)
            segments = model.hybrid.segments(features)
            snippets = model.hybrid.snippets(segments)
            fused_BW = model.hybrid.fused(snippets)
            logits_BC = model.logits(fused_BW)
            loss = cross_entropy(logits_BC, columns_B)
            mine_B = kept_N[places].to(device)
            if mine_B.any():
                loss = loss + self._augmented(
                    model, [z[mine_B] for z in segments], fused_BW[mine_B], columns_B[mine_B],
                    generator,
                )  # fmt: skip
            if old:
                loss = loss + self._held(model, old, held, features, snippets, fused_BW, logits_BC,
                                         generator)  # fmt: skip
            return loss

        fit(
            step,
            model.parameters(),
            clips,
            epochs=self._epochs[bool(known)],
            rng=rng,
            on_epoch_end=task.on_epoch_end,
            **self._recipe,
        )
        vectors_NW = self._vectors(model, clips)
        self._exemplars, _ = self._exemplars.chosen(vectors_NW, clips, task.classes, classes, rng)
        self._means_CW, self._deviations_CW = self._gaussians(
            vectors_NW.cpu(), columns_N, [classes.index(c) for c in task.classes], len(classes)
        )
        self.classes, self._model = classes, model

    def _augmented(
        self,
        model: Model,
        segments: Pair,
        fused_BW: Tensor,
        columns_B: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """HAM, of exemplars."""
        loss = torch.zeros((), device=fused_BW.device)
        if "low" in self.parts:
            noisy = [self._noisy(z_BSW, generator) for z_BSW in segments]
            vectors_BW = model.hybrid.fused(model.hybrid.snippets(noisy))
            loss = loss + cross_entropy(model.logits(vectors_BW, held=True), columns_B)
        if "high" in self.parts:
            noisy_BW = self._noisy(fused_BW, generator)
            loss = loss + cross_entropy(model.logits(noisy_BW), columns_B)
        return loss

    def _noisy(self, z: Tensor, generator: torch.Generator) -> Tensor:
        z = z.detach()
        sigma_W = z.flatten(0, -2).std(dim=0, correction=0)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        return z + self.alpha * sigma_W * noise

    def _held(
        self,
        model: Model,
        old: Model,
        held: Sequence[int],
        features: Pair,
        snippets: Pair,
        fused_BW: Tensor,
        logits_BC: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """HDM; `held` are the columns that the task does not teach."""
        with torch.no_grad():
            old_snippets = old.hybrid.snippets(old.hybrid.segments(features))
            old_fused_BW = old.hybrid.fused(old_snippets)
        logical = correlative = torch.zeros((), device=fused_BW.device)
        if "video" in self.parts and held:
            old_BK = old.logits(old_fused_BW).detach()[:, held]
            logical = logical + softened(logits_BC[:, held], old_BK, self.temperature)
        if "distribution" in self.parts and held:
            of_B = torch.tensor(held)[
                torch.randint(len(held), (len(fused_BW),), generator=generator)
            ]
            noise_BW = torch.randn(fused_BW.shape, generator=generator)
            drawn_BW = self._means_CW[of_B] + self._deviations_CW[of_B] * noise_BW
            drawn_BW = drawn_BW.to(fused_BW.device)
            old_BK = old.logits(drawn_BW).detach()[:, held]
            new_BK = model.logits(drawn_BW)[:, held]
            logical = logical + softened(new_BK, old_BK, self.temperature)
        if "snippet" in self.parts:
            for new, before in zip(snippets, old_snippets, strict=True):
                pair = (new, before) if self.within else (new.flatten(0, 1), before.flatten(0, 1))
                correlative = correlative + relations(*pair) / len(snippets)
        if "correlative" in self.parts:
            correlative = correlative + relations(fused_BW, old_fused_BW)
        return self._weights[0] * logical + self._weights[1] * correlative

    def _gaussians(
        self, vectors_NW: Tensor, columns_N: Tensor, taught: Sequence[int], classes: int
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every class; of those not taught what they were."""
        more = (classes - len(self._means_CW), vectors_NW.shape[1])
        means_CW, deviations_CW = (
            torch.cat([x_CW, x_CW.new_zeros(more)])
            for x_CW in (self._means_CW, self._deviations_CW)
        )
        for column in taught:
            of = vectors_NW[columns_N == column]
            means_CW[column], deviations_CW[column] = of.mean(dim=0), of.std(dim=0, correction=0)
        return means_CW, deviations_CW

    def scores(self, batch: Batch) -> Tensor:
        features = self._features(batch)
        model = self._learned(features)
        with torch.no_grad():
            out_BC: Tensor = model(features)
        return out_BC

    def nearest(self, batch: Batch) -> Tensor:
        features = self._features(batch)
        model = self._learned(features)
        with torch.no_grad():
            return self._exemplars.nearest(model.hybrid(features))

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "means": self._means_CW.clone(),
            "deviations": self._deviations_CW.clone(),
        }
        if self._model is not None:
            own = self._model.state_dict().items()
            state |= {f"model.{name}": x.detach().to("cpu", copy=True) for name, x in own}
            state["segments"] = torch.tensor(self._model.segments)
        return state | self._exemplars.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._means_CW = state["means"].to("cpu", copy=True)
        self._deviations_CW = state["deviations"].to("cpu", copy=True)
        self._exemplars.load(state)
        self._model = None
        start = "model."
        own = {n.removeprefix(start): x for n, x in state.items() if n.startswith(start)}
        if own:
            segments = int(state["segments"])
            like = [
                torch.zeros(1, segments, own[f"hybrid.project.{m}.weight"].shape[1])
                for m in range(len(self.reads))
            ]
            self._model = self._empty(like, np.random.default_rng(0))
            self._model.classifier.grow(len(self.classes), np.random.default_rng(0))
            self._model.load_state_dict(own)

    def _features(self, batch: Batch) -> list[Tensor]:
        return [frames(batch, name) for name in self.reads]

    def _empty(self, features: Pair, rng: np.random.Generator) -> Model:
        seed = int(rng.integers(2**31))
        widths, segments = [x.shape[2] for x in features], features[0].shape[1]
        hybrid = Hybrid(widths, segments, **self._form, seed=seed)
        return Model(hybrid, segments, self._means_CW.shape[1])

    def _check(self, model: Model, features: Pair) -> None:
        """
        Raises:
            ValueError: The features have another form than was learned.
        """
        widths = [project.in_features for project in model.hybrid.project]
        found = [list(x.shape[1:]) for x in features]
        wanted = [[model.segments, width] for width in widths]
        if found != wanted:
            raise ValueError(
                f"features {', '.join(self.reads)} are {found} a clip; learned before were "
                f"{wanted}: use the same features and number of segments throughout"
            )

    def _learned(self, features: Pair) -> Model:
        if self._model is None:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        self._check(self._model, features)
        return self._model.to(features[0].device)

    def _vectors(self, model: Model, clips: Clips) -> Tensor:
        """Of clips, [N, W]."""
        with torch.no_grad():
            parts = [model.hybrid(self._features(batch)) for _, batch in clips.batches(READ)]
        return torch.cat(parts)


build = HAD
