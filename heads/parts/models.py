"""Models that gradient descent trains: a temporal encoder of clips and a classifier.

Shapes: N clips, B clips a batch, T frames, D feature width, W width of a clip's vector, C classes.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts.classifiers import Classifier, columns
from varve.heads.parts.clips import Batch, Clips, frames
from varve.heads.parts.encoders import Encoder, EncoderConfig
from varve.heads.parts.exemplars import ExemplarConfig, Exemplars
from varve.heads.parts.trainable_suffix import TrainableSuffix
from varve.heads.parts.training import OptimConfig, fit

ENCODED = "encoded"
BATCH = 40  # clips at a time through a part of the network, where nothing is trained


class Model[K: nn.Module](nn.Module):
    """Map a batch to the outputs of the classifier, [B, C]."""

    def __init__(self, feature: str, encoder: Encoder, classifier: K) -> None:
        super().__init__()
        self.feature, self.encoder = feature, encoder
        self.classifier: K = classifier

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.classifier(self.vectors(batch))
        return out

    def vectors(self, batch: Batch) -> Tensor:
        """Return the vectors of the clips, float32 [B, W].

        Raises:
            ValueError: The features have another shape than was learned, or are not finite.
        """
        if ENCODED in batch:
            return batch[ENCODED]
        out: Tensor = self.encoder(self.encoder.check(frames(batch, self.feature), self.feature))
        return out

    def encode(self, clips: Clips) -> Clips:
        """Return clips whose vectors are computed once, in the place of their features."""
        with torch.no_grad():
            parts = [self.vectors(batch) for _, batch in clips.batches(256)]
        return Clips({ENCODED: torch.cat(parts)}, clips.labels, clips.rows)

    def prepare(self, clips: Clips) -> Clips:
        """Return clips to train on, encoded where the encoder has no parameters."""
        return clips if [*self.encoder.parameters()] else self.encode(clips)

    def on(self, batch: Batch) -> Self:
        """Move the model to the device of a batch."""
        return self.to(next(iter(batch.values())).device)


@dataclass(frozen=True)
class ModelConfig[K: nn.Module]:
    """Everything that decides the architecture of a model.

    Attributes:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        classifier: Makes a classifier without columns from W.
    """

    feature: str
    encoder: EncoderConfig
    classifier: Callable[[int], K]

    def trainable_copy(
        self, model: Model[K] | None, first: Batch, rng: np.random.Generator
    ) -> Model[K]:
        """Return a copy of a model, or a new one for the shape of a first clip, on its device.

        Raises:
            ValueError: See `Model.vectors`.
        """
        x_BTD = frames(first, self.feature)
        if model is None:
            _, T, D = x_BTD.shape
            model = self._new(T, D, rng)
        model.encoder.check(x_BTD, self.feature)
        return copy.deepcopy(model).on(first)

    def load(self, state: Mapping[str, Tensor]) -> Model[K] | None:
        """Return the model whose `state_of` this was."""
        if "form" not in state:
            return None
        T, D = state["form"].tolist()
        model = self._new(T, D, np.random.default_rng(0))
        for name, empty in list(model.classifier.named_parameters()):
            loaded = state[f"classifier.{name}"]
            if loaded.shape != empty.shape:
                setattr(model.classifier, name, nn.Parameter(torch.empty_like(loaded)))
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        return model

    def _new(self, frames: int, width: int, rng: np.random.Generator) -> Model[K]:
        encoder = Encoder(self.encoder, frames, width, rng)
        return Model(self.feature, encoder, self.classifier(encoder.vector))


def state_of[K: nn.Module](model: Model[K] | None, classes: list[int]) -> dict[str, Tensor]:
    """Return copies of the classes and of all parameters and buffers of a model."""
    state = {"classes": torch.tensor(classes, dtype=torch.int64)}
    if model is None:
        return state
    state["form"] = torch.tensor([model.encoder.frames, model.encoder.width])
    return state | copies(model.state_dict())


def copies(tensors: Mapping[str, Tensor], start: str = "") -> dict[str, Tensor]:
    """Return copies of tensors on the CPU; their names get a start."""
    return {start + name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


def part(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the entries of a state whose names have a start, without it."""
    return {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}


def learned[M: nn.Module](model: M | None) -> M:
    """Return the model, if there is one.

    Raises:
        ValueError: Nothing was learned yet.
    """
    if model is None:
        raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
    return model


def scores[K: nn.Module](model: Model[K] | None, batch: Batch) -> Tensor:
    """Return the outputs of the classifier without gradient, [B, C]."""
    with torch.no_grad():
        out: Tensor = learned(model).on(batch)(batch)
    return out


def trainable(model: nn.Module | None) -> int:
    """Return the number of values that a model trains."""
    return 0 if model is None else sum(p.numel() for p in model.parameters())


def vectors[K: nn.Module](model: Model[K] | None, batch: Batch) -> Tensor:
    """Return the vectors of a batch's clips without gradient, [B, W]."""
    with torch.no_grad():
        return learned(model).on(batch).vectors(batch)


@dataclass
class Training[K: nn.Module]:
    """The training of a model on one task.

    Attributes:
        task: The task.
        classes: All classes that are known after it, in the order of the columns.
        clips: Clips to learn from: the task's, followed by the exemplars.
        model: Encoder and classifier.
        rng: Draws parameters, the order of clips, and exemplars.
    """

    task: Task
    classes: list[int]
    clips: Clips
    model: Model[K]
    rng: np.random.Generator

    @property
    def classifier(self) -> K:
        return self.model.classifier

    @property
    def device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    @cached_property
    def columns_N(self) -> Tensor:
        """Column of each clip's class, int64 [N] on the CPU."""
        return columns(self.classes, self.clips.labels)

    @cached_property
    def in_task_C(self) -> Tensor:
        """The columns of the task's classes, bool [C] on the device of the classifier."""
        in_task = [label in self.task.classes for label in self.classes]
        return torch.tensor(in_task, device=self.device)


@dataclass
class TaskTraining(Training[Classifier]):
    """The training of one task by a head that trains a part of the network.

    Attributes:
        suffix: The part of the network that trains.
    """

    suffix: TrainableSuffix

    def vectors(self, indices: Tensor | None = None) -> Tensor:
        """Return the vectors of all clips, [N, W], or of those at some indices."""
        indices = torch.arange(len(self.clips)) if indices is None else indices
        with torch.no_grad():
            parts = [
                self.model.vectors(self.suffix(self.clips[some])[0])
                for some in torch.split(indices, BATCH)
            ]
        return torch.cat(parts)


class TaskLoss:
    """Terms that a method adds to the loss of one task. This one adds nothing."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups of the method's own parameters, as torch's optimizers take them."""
        return []

    def logit_offsets(self, classes: int) -> Tensor:
        """Return offsets of the logits in training, [C]. It is called after the batch's `loss`."""
        return torch.zeros(classes)

    def loss(
        self, indices: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        """Return the terms of a batch, a scalar.

        Args:
            indices: Indices of the clips, among those of `TaskTraining.clips`.
            batch: Features of the clips, and "teacher STAGE" for `UsesTeacher`.
            vectors: "vector", the last vectors of the frames, [B, T, D], and "encoded", the
                vectors of the clips, [B, W].
            outputs: Outputs of the trained stages, [B, T, ...].
        """
        return torch.zeros((), device=outputs[0].device)

    def on_epoch_end(self) -> None:
        """Run after every epoch."""

    def on_task_end(self) -> None:
        """Run once the head has kept what was trained."""


class ModelHead[K: Classifier]:
    """A head that trains a model of cached vectors. A method is its classifier and its loss.

    Args:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        optim: Options of gradient descent.
        seed: Seed of everything that is drawn.

    Attributes:
        build_classifier: Makes a classifier without columns from W.
    """

    build_classifier: Callable[[int], K]
    _trains = True

    def __init__(
        self,
        feature: str = "vector",
        encoder: EncoderConfig = EncoderConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
    ) -> None:
        self.reads = (feature,)
        self.classes: list[int] = []
        self._config = ModelConfig(feature, encoder, self.build_classifier)
        self._optim, self._seed = optim, seed
        self._model: Model[K] | None = None

    # Hooks of a method

    def loss(self, training: Training[K], batch: Batch, columns_B: Tensor) -> Tensor:
        """Return the mean loss of a batch. The model of the task before is `self._model`."""
        return cross_entropy(training.model(batch), columns_B)

    def parameters(self, model: Model[K]) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """Return the parameters that train, or groups of them; see `fit`."""
        return model.parameters()

    def start(self, first: Batch, rng: np.random.Generator) -> Model[K]:
        """Return the model to train, for the shape of a first clip."""
        return self._config.trainable_copy(self._model, first, rng)

    def clips(self, task: Task, classes: list[int]) -> Clips:
        """Return the clips to train on, when `classes` are all that are known after the task."""
        return task.clips

    def train(self, training: Training[K]) -> None:
        """Train the model, whose classifier has columns for the new classes."""
        device = training.device

        def step(indices: Tensor, batch: Batch) -> Tensor:
            return self.loss(training, batch, training.columns_N[indices].to(device))

        epochs = self._optim.epochs_of(first_task=not self.classes)
        fit(step, self.parameters(training.model), training.clips, self._optim, epochs=epochs,
            rng=training.rng, on_epoch_end=training.task.on_epoch_end)  # fmt: skip

    def keep(self, training: Training[K]) -> None:
        """Keep what a task has trained."""
        self.classes, self._model = training.classes, training.model

    # What the runner calls

    @property
    def trainable(self) -> int:
        return trainable(self._model) if self._trains else 0

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        model = self.start(task.clips[torch.arange(1)], rng)
        clips = model.prepare(self.clips(task, classes))
        training = Training(task, classes, clips, model, rng)
        if self._trains:
            model.classifier.grow(len(classes), rng)
            self.train(training)
        self.keep(training)

    def scores(self, batch: Batch) -> Tensor:
        return scores(self._model, batch)

    def state_dict(self) -> dict[str, Tensor]:
        return state_of(self._model, self.classes)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model = self._config.load(state)
        self.classes = state["classes"].tolist()


class ReplayModelHead[K: Classifier](ModelHead[K]):
    """A `ModelHead` that replays exemplars.

    Args:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        exemplars: Options of the exemplars; None keeps every clip.
        optim: Options of gradient descent.
        seed: Seed of everything that is drawn.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: EncoderConfig = EncoderConfig(),
        exemplars: ExemplarConfig | None = ExemplarConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__(feature, encoder, optim, seed)
        self._exemplars = Exemplars(exemplars)

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def clips(self, task: Task, classes: list[int]) -> Clips:
        self._exemplars.quota(len(classes))
        return self._exemplars.rehearsal(task)

    def keep(self, training: Training[K]) -> None:
        """Keep what a task has trained, and exemplars by the trained model."""
        vectors_NW = training.model.encode(training.clips).whole(ENCODED)
        self._exemplars, _ = self._exemplars.select(
            vectors_NW, training.clips, training.task.classes, training.classes, training.rng
        )
        super().keep(training)

    def nearest(self, batch: Batch) -> Tensor:
        return self._exemplars.nearest(vectors(self._model, batch))

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self._exemplars.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._exemplars.load(state)
