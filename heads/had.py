"""HAD: audio and video with augmentation and distillation at several levels.

"Hierarchical Augmentation and Distillation for Class Incremental Audio-Visual Video Recognition",
2024. Its public abstract names the parts. The equations below are OUR RECONSTRUCTION of them, not
the paper's. The features of S segments of a clip by two networks are cached, and nothing is
recomputed. `parts/hybrid_attention.py` computes segments z, snippets s and a vector v from them; a
cosine classifier follows. f is the part of the model behind a level, f* the previous model, e
standard normal:

    HAM   low           CE(f(z + alpha sigma e), y), z of exemplars
          high          CE(f(v + alpha sigma e), y), v of exemplars
    HDM   video         T^2 KL(softmax(old logits / T) || softmax(logits / T)), of old classes
          distribution  the same of samples of N(mean, variance) of each old class's v
          snippet       mean over modalities of |C(s) - C(s*)|^2 / n^2, over the snippets of a batch
          correlative   |C(v) - C(v*)|^2 / n^2, over the clips of a batch

C(x) is the matrix of cosines between n vectors. Each part of the model is trained on noise of its
own level only: z and v are detached. Noise at the low level trains the attention and the fusion but
not the classifier, which the high level trains. sigma is the deviation of each dimension over the
exemplars of a batch. The Gaussian of a class is estimated in the last task that had clips of it. A
class that is learned again learns from labels: the logical part is over the other classes.

Loss = CE + the HAM terms + logical (video + distribution) + correlative (snippet + correlative).

Shapes: N clips, B clips a batch, S segments, W width, C classes, K old classes.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Cosine, columns
from varve.heads.parts.clips import Batch, Clips, frames, part_of
from varve.heads.parts.exemplars import ExemplarConfig, Exemplars, balanced
from varve.heads.parts.hybrid_attention import Hybrid, Pair
from varve.heads.parts.losses import relations, softened
from varve.heads.parts.training import OptimConfig, fit, tune

HAM = ("low", "high")
HDM = ("video", "distribution", "snippet", "correlative")
PARTS = "+".join((*HAM, *HDM))
BATCH = 256
QUICK = {"width": 64, "heads": 2, "ffn": 64}  # for the contract suite


class Model(nn.Module):
    """Map two features of `segments` segments to scores, [B, C]."""

    def __init__(self, hybrid: Hybrid, segments: int, width: int) -> None:
        super().__init__()
        self.hybrid, self.segments, self.classifier = hybrid, segments, Cosine(width)

    def forward(self, features: Pair) -> Tensor:
        return self.logits(self.hybrid(features))

    def logits(self, fused_BW: Tensor, frozen: bool = False) -> Tensor:
        """Return the logits of clips' vectors, [B, C]; the classifier may be frozen."""
        named = self.classifier.named_parameters()
        parameters = {name: p.detach() if frozen else p for name, p in named}
        cosines_BC: Tensor = functional_call(self.classifier, parameters, fused_BW)
        return parameters["scale"] * cosines_BC


class HAD:
    """Fuse audio and video with hierarchical distillation; see the module.

    Args:
        visual: Name of a feature of one vector per segment.
        audio: Name of another, of the audio backbone.
        parts: Terms beside cross entropy, joined by "+": low, high, video, distribution, snippet,
            correlative. "" for rehearsal alone.
        alpha: Scale of the noise.
        temperature: T of the logical distillation.
        logical: Weight of the logical distillation.
        correlative: Weight of the correlative distillation.
        within: Whether cosines of snippets are taken within a clip alone.
        width: Width of the attention; see `varve.heads.parts.hybrid_attention`.
        heads: Number of its attention heads, a divisor of the width.
        ffn: Hidden width of its FFN.
        position: "learned" for a position embedding of the segments, or None.
        exemplars: Options of the exemplars; 100 in all by default. With budget=0, and without low
            and high, it is fine-tuning, and there is no NME.
        tune_epochs: Number of epochs in which the classifier alone is trained after each task but
            the first, on equally many exemplars per class; see
            `varve.heads.parts.fine_tuned_head.FineTunedHead`. 0 for none.
        tune_lr: Learning rate of this tuning, by SGD.
        optim: Options of gradient descent; Adam by default, as our reconstruction has it.
        seed: Seed of everything that is drawn.
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
        exemplars: ExemplarConfig = ExemplarConfig(budget=100, shared=True),
        tune_epochs: int = 0,
        tune_lr: float = 0.05,
        optim: OptimConfig = OptimConfig(
            batch_size=256, lr=1e-3, weight_decay=1e-4, optimizer="adam"
        ),
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
        if tune_epochs < 0 or not tune_lr >= 0:
            raise ValueError(f"{tune_epochs=}, {tune_lr=}: give at least 0")
        if min(width, heads, ffn) < 1 or width % heads:
            raise ValueError(f"{width=}, {heads=}, {ffn=}: give a width that the heads divide")
        self.reads: Sequence[str] = (visual, audio)
        self.classes: list[int] = []
        self.alpha, self.temperature, self.within = alpha, temperature, within
        self._weights = logical, correlative
        self._hybrid = partial(Hybrid, width=width, heads=heads, ffn=ffn, position=position)
        self._optim, self._seed = optim, seed
        self._tune_epochs, self._tune_lr = tune_epochs, tune_lr
        self._model: Model | None = None
        self._exemplars = Exemplars(exemplars, least=0)
        if exemplars.budget == 0 and self.parts & set(HAM):
            raise ValueError(
                f"budget=0, {parts=}: exemplars are what low and high augment; give parts without "
                "them"
            )
        self._means_CW = self._deviations_CW = torch.zeros(0, width)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        if self._model is not None:
            yield "encoder", self._model.hybrid
            yield "classifier", self._model.classifier

    @property
    def trainable(self) -> int:
        return models.trainable(self._model)

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def check_classes(self, classes: int) -> None:
        self._exemplars.quota(classes)

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        known = len(self.classes)
        self._exemplars.quota(len(classes))
        first = self._features(task.clips[torch.arange(1)])
        device = first[0].device
        teacher = None if self._model is None else self._model.to(device)
        model = copy.deepcopy(teacher) if teacher else self._new_model(first, rng).to(device)
        self._check(model, first)
        if not teacher:
            model.hybrid.standardize([task.clips.whole(name) for name in self.reads])
        clips = self._exemplars.rehearsal(task)
        columns_N = columns(classes, clips.labels)
        is_exemplar_N = torch.arange(len(clips)) >= len(task.clips)
        distilled = [column for column in range(known) if classes[column] not in task.classes]
        model.classifier.grow(len(classes), rng)
        model.classifier.imprint_new(known, self._vectors(model, clips), columns_N, rng)

        def step(indices: Tensor, batch: Batch) -> Tensor:
            features, columns_B = self._features(batch), columns_N[indices].to(device)
            segments = model.hybrid.segments(features)
            snippets = model.hybrid.snippets(segments)
            fused_BW = model.hybrid.fused(snippets)
            logits_BC = model.logits(fused_BW)
            loss = cross_entropy(logits_BC, columns_B)
            mask_B = is_exemplar_N[indices].to(device)
            if mask_B.any():
                loss = loss + self._augmented(
                    model, [z[mask_B] for z in segments], fused_BW[mask_B], columns_B[mask_B],
                    generator,
                )  # fmt: skip
            if teacher:
                loss = loss + self._distilled(model, teacher, distilled, features, snippets,
                                              fused_BW, logits_BC, generator)  # fmt: skip
            return loss

        epochs = self._optim.epochs_of(first_task=not known)
        tunes = bool(known) and self._exemplars.quota(len(classes)) != 0
        tune_epochs = self._tune_epochs if tunes else 0

        def on_epoch_end(done: int, _: int, loss: float) -> None:
            task.on_epoch_end(done, epochs + tune_epochs, loss)

        fit(step, model.parameters(), clips, self._optim, epochs=epochs, rng=rng,
            on_epoch_end=on_epoch_end)  # fmt: skip
        vectors_NW = self._vectors(model, clips)
        exemplars, kept = self._exemplars.select(
            vectors_NW, clips, task.classes, classes, rng, partial(self._vectors, model)
        )
        if tune_epochs:
            vectors_MW = self._vectors(model, exemplars.replayed(part_of(clips, kept)))
            indices = balanced(exemplars.labels)
            tune(
                model.classifier,
                lambda x_BW, columns_B: cross_entropy(model.logits(x_BW), columns_B),
                vectors_MW[indices.to(vectors_MW.device)],
                columns_N[kept[indices]],
                OptimConfig(lr=self._tune_lr),
                epochs=tune_epochs,
                rng=rng,
                on_epoch_end=lambda done, _, loss: on_epoch_end(epochs + done, 0, loss),
            )
        self._exemplars = exemplars
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
        """Return the HAM terms of exemplars, a scalar."""
        loss = torch.zeros((), device=fused_BW.device)
        if "low" in self.parts:
            noisy = [self._noisy(z_BSW, generator) for z_BSW in segments]
            vectors_BW = model.hybrid.fused(model.hybrid.snippets(noisy))
            loss = loss + cross_entropy(model.logits(vectors_BW, frozen=True), columns_B)
        if "high" in self.parts:
            noisy_BW = self._noisy(fused_BW, generator)
            loss = loss + cross_entropy(model.logits(noisy_BW), columns_B)
        return loss

    def _noisy(self, z: Tensor, generator: torch.Generator) -> Tensor:
        z = z.detach()
        sigma_W = z.flatten(0, -2).std(dim=0, correction=0)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        return z + self.alpha * sigma_W * noise

    def _distilled(
        self,
        model: Model,
        teacher: Model,
        columns: Sequence[int],
        features: Pair,
        snippets: Pair,
        fused_BW: Tensor,
        logits_BC: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the HDM terms, a scalar; `columns` are those of classes without new labels."""
        with torch.no_grad():
            teacher_snippets = teacher.hybrid.snippets(teacher.hybrid.segments(features))
            teacher_BW = teacher.hybrid.fused(teacher_snippets)
        logical = correlative = torch.zeros((), device=fused_BW.device)
        if "video" in self.parts and columns:
            teacher_BK = teacher.logits(teacher_BW).detach()[:, columns]
            logical = logical + softened(logits_BC[:, columns], teacher_BK, self.temperature)
        if "distribution" in self.parts and columns:
            of_B = torch.tensor(columns)[
                torch.randint(len(columns), (len(fused_BW),), generator=generator)
            ]
            noise_BW = torch.randn(fused_BW.shape, generator=generator)
            drawn_BW = self._means_CW[of_B] + self._deviations_CW[of_B] * noise_BW
            drawn_BW = drawn_BW.to(fused_BW.device)
            teacher_BK = teacher.logits(drawn_BW).detach()[:, columns]
            new_BK = model.logits(drawn_BW)[:, columns]
            logical = logical + softened(new_BK, teacher_BK, self.temperature)
        if "snippet" in self.parts:
            for new, before in zip(snippets, teacher_snippets, strict=True):
                pair = (new, before) if self.within else (new.flatten(0, 1), before.flatten(0, 1))
                correlative = correlative + relations(*pair) / len(snippets)
        if "correlative" in self.parts:
            correlative = correlative + relations(fused_BW, teacher_BW)
        return self._weights[0] * logical + self._weights[1] * correlative

    def _gaussians(
        self, vectors_NW: Tensor, columns_N: Tensor, task_columns: Sequence[int], classes: int
    ) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of every class, updated for the columns of the task."""
        added = (classes - len(self._means_CW), vectors_NW.shape[1])
        means_CW, deviations_CW = (
            torch.cat([x_CW, x_CW.new_zeros(added)])
            for x_CW in (self._means_CW, self._deviations_CW)
        )
        for column in task_columns:
            of_class = vectors_NW[columns_N == column]
            means_CW[column] = of_class.mean(dim=0)
            deviations_CW[column] = of_class.std(dim=0, correction=0)
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
            state |= models.copies(self._model.state_dict(), "model.")
            state["segments"] = torch.tensor(self._model.segments)
        return state | self._exemplars.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._means_CW = state["means"].to("cpu", copy=True)
        self._deviations_CW = state["deviations"].to("cpu", copy=True)
        self._exemplars.load(state)
        self._model = None
        if tensors := models.part(state, "model."):
            segments = int(state["segments"])
            like = [
                torch.zeros(1, segments, tensors[f"hybrid.project.{m}.weight"].shape[1])
                for m in range(len(self.reads))
            ]
            self._model = self._new_model(like, np.random.default_rng(0))
            self._model.classifier.grow(len(self.classes), np.random.default_rng(0))
            self._model.load_state_dict(tensors)

    def _features(self, batch: Batch) -> list[Tensor]:
        return [frames(batch, name) for name in self.reads]

    def _new_model(self, features: Pair, rng: np.random.Generator) -> Model:
        seed = int(rng.integers(2**31))
        widths, segments = [x.shape[2] for x in features], features[0].shape[1]
        hybrid = self._hybrid(widths, segments, seed=seed)
        return Model(hybrid, segments, self._means_CW.shape[1])

    def _check(self, model: Model, features: Pair) -> None:
        """Check the shape of features.

        Raises:
            ValueError: It differs from what was learned.
        """
        widths = [project.in_features for project in model.hybrid.project]
        shapes = [list(x.shape[1:]) for x in features]
        learned = [[model.segments, width] for width in widths]
        if shapes != learned:
            raise ValueError(
                f"features {', '.join(self.reads)} are {shapes} a clip; learned before were "
                f"{learned}: use the same features and number of segments throughout"
            )

    def _learned(self, features: Pair) -> Model:
        model = models.learned(self._model)
        self._check(model, features)
        return model.to(features[0].device)

    def _vectors(self, model: Model, clips: Clips) -> Tensor:
        """Return the vectors of clips, [N, W]."""
        with torch.no_grad():
            parts = [model.hybrid(self._features(batch)) for _, batch in clips.batches(BATCH)]
        return torch.cat(parts)


build = HAD
