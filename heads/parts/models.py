"""Models that gradient descent trains: a temporal encoder of clips and a classifier.

With `blocks` a model has the last blocks of the network too, before the encoder. They start as
published, train with it, and are read from a cached feature: the output of the block before them.

Shapes: N clips, B clips a batch, T frames, D feature width, W width of a clip's vector, C classes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from varve.heads import Network, Task
from varve.heads.parts.classifiers import Classifier, columns
from varve.heads.parts.clips import Batch, Clips, frames, thinned
from varve.heads.parts.encoders import Encoder, EncoderConfig
from varve.heads.parts.exemplars import ExemplarConfig, Exemplars
from varve.heads.parts.trainable_suffix import BATCH_NORM, VECTOR, TrainableSuffix
from varve.heads.parts.training import OptimConfig, fit

ENCODED = "encoded"
BATCH = 40  # clips at a time through a part of the network, where nothing is trained


class Model[K: nn.Module](nn.Module):
    """Map a batch to the outputs of the classifier, [B, C]."""

    def __init__(
        self,
        feature: str,
        encoder: Encoder,
        classifier: K,
        network: TrainableSuffix | None = None,
    ) -> None:
        super().__init__()
        self.feature, self.encoder = feature, encoder
        self.classifier: K = classifier
        self.network = network

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
        if self.network is not None:
            batch = self.network(batch)[0]
        out: Tensor = self.encoder(self.encoder.check(frames(batch, self.feature), self.feature))
        return out

    def encode(self, clips: Clips) -> Clips:
        """Return clips whose vectors are computed once, in the place of their features."""
        size = 256 if self.network is None else BATCH
        with torch.no_grad():
            plain, *views = (
                {ENCODED: torch.cat([self.vectors(batch) for _, batch in view.batches(size)])}
                for view in clips.each_view()
            )
        return Clips(plain, clips.labels, clips.rows, views)

    def prepare(self, clips: Clips) -> Clips:
        """Return clips to train on, encoded where no parameter comes before the classifier."""
        return clips if self.body() else self.encode(clips)

    def body(self) -> list[nn.Parameter]:
        """Return the trained parameters before the classifier: blocks and encoder."""
        blocks = [] if self.network is None else [*self.network.own().values()]
        return [*blocks, *self.encoder.parameters()]

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
        parts = copy.deepcopy((model.encoder, model.classifier))
        return Model(self.feature, *parts).on(first)

    def load(self, state: Mapping[str, Tensor]) -> Model[K] | None:
        """Return the model whose `state_of` this was."""
        if "form" not in state:
            return None
        T, D = state["form"].tolist()
        model = self._new(T, D, np.random.default_rng(0))
        for name, empty in list(model.classifier.named_parameters()):
            loaded = state[f"classifier.{name}"]
            if loaded.shape != empty.shape:
                empty = nn.Parameter(torch.empty_like(loaded), empty.requires_grad)
                setattr(model.classifier, name, empty)
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
    state |= copies(model.encoder.state_dict(), "encoder.")
    state |= copies(model.classifier.state_dict(), "classifier.")
    return state | ({} if model.network is None else copies(model.network.state(), "network."))


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
    return 0 if model is None else sum(p.numel() for p in model.parameters() if p.requires_grad)


def modules[K: nn.Module](
    model: Model[K] | None, suffix: TrainableSuffix | None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model and of its trainable suffix; see `varve.heads.HasModules`."""
    if suffix is not None:
        yield "network", suffix.suffix
    if model is not None:
        yield "encoder", model.encoder
        yield "classifier", model.classifier


def vectors[K: nn.Module](model: Model[K] | None, batch: Batch) -> Tensor:
    """Return the vectors of a batch's clips without gradient, [B, W]."""
    with torch.no_grad():
        return learned(model).on(batch).vectors(batch)


def consistent(
    loss: Callable[[Batch], tuple[Tensor, Tensor]], batch: Batch, count: int, weight: float
) -> Tensor:
    """Return vCLIMB's loss of clips and of their sparse versions, which agree.

    Villa et al., "vCLIMB: A Novel Video Class Incremental Learning Benchmark", CVPR 2022, as its
    code has it: (L(x) + L(s)) / 2 + weight mean (o(x) - o(s))^2, where s has `count` frames of x.

    Args:
        loss: Returns the mean loss of a batch, and its outputs o, [B, C].
        batch: Features of the clips.
        count: Number of frames of the sparse versions.
        weight: Weight of the distance between the outputs.
    """
    whole, outputs_BC = loss(batch)
    sparse, sparse_BC = loss(thinned(batch, count))
    return (whole + sparse) / 2 + weight * (outputs_BC - sparse_BC).square().mean()


def check_consistency(weight: float, exemplars: ExemplarConfig | None) -> None:
    """Check the options of `consistent`: it needs the number of frames that exemplars keep.

    Raises:
        ValueError: The weight is negative, or exemplars keep all frames.
    """
    if weight < 0 or (weight and not (exemplars and exemplars.exemplar_frames)):
        raise ValueError(
            f"consistency={weight}: give a weight of at least 0, and with it exemplar_frames, the "
            "number of frames of the sparse clips that whole clips are to agree with"
        )


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

    def vectors(self, clips: Clips | None = None) -> Tensor:
        """Return the vectors of some clips, [N, W], by default of all that are trained on."""
        clips = self.clips if clips is None else clips
        with torch.no_grad():
            parts = [self.model.vectors(self.suffix(batch)[0]) for _, batch in clips.batches(BATCH)]
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

    def on_trained(self) -> None:
        """Run after the last epoch, before the classifier is tuned."""

    def on_task_end(self) -> None:
        """Run once the head has kept what was trained."""


@dataclass(frozen=True)
class BlocksConfig:
    """Options of the network's last blocks, where a head trains them.

    Attributes:
        blocks: Number of the network's last blocks that train; 0 for none. Their input is read
            instead of `feature`.
        batch_norm: `frozen`, `trained` or `fixed`; see `TrainableSuffix`.

    Raises:
        ValueError: `blocks` is negative, or there is no such `batch_norm`.
    """

    blocks: int = 0
    batch_norm: str = "frozen"

    def __post_init__(self) -> None:
        if self.blocks < 0 or self.batch_norm not in BATCH_NORM:
            raise ValueError(
                f"blocks={self.blocks}, batch_norm={self.batch_norm!r}: give at least 0 blocks, "
                f"and choose from {', '.join(BATCH_NORM)}"
            )


class ModelHead[K: Classifier]:
    """A head that trains a model. A method is its classifier and its loss.

    Args:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        optim: Options of gradient descent.
        seed: Seed of everything that is drawn.
        blocks: The network's last blocks, where they train too.

    Attributes:
        build_classifier: Makes a classifier without columns from W.
    """

    build_classifier: Callable[[int], K]
    _trains = True
    _sees_frames = False  # whether `loss` needs the frames of clips where no encoder trains

    def __init__(
        self,
        feature: str = "vector",
        encoder: EncoderConfig = EncoderConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
        blocks: BlocksConfig = BlocksConfig(),
    ) -> None:
        if blocks.blocks and feature != VECTOR:
            raise ValueError(
                f"{feature=} with blocks={blocks.blocks}: what is read is the input of the first "
                "block that trains. Leave one of them out"
            )
        self.reads = (f"blocks.-{blocks.blocks + 1}",) if blocks.blocks else (feature,)
        self.classes: list[int] = []
        self._blocks = blocks
        self._network: Network | None = None
        self._config = ModelConfig(feature, encoder, self.build_classifier)
        self._optim, self._seed = optim, seed
        self._model: Model[K] | None = None

    # Hooks of a method

    def loss(self, training: Training[K], batch: Batch, columns_B: Tensor) -> Tensor:
        """Return the mean loss of a batch. The model of the task before is `self._model`."""
        return cross_entropy(training.model(batch), columns_B)

    def parameters(self, model: Model[K]) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """Return the parameters that train, or groups of them; see `fit`."""
        return [*model.body(), *model.classifier.parameters()]

    def start(self, first: Batch, rng: np.random.Generator) -> Model[K]:
        """Return the model to train, for the shape of a first clip."""
        return self.copy_of(self._model, first, rng)

    def copy_of(self, model: Model[K] | None, first: Batch, rng: np.random.Generator) -> Model[K]:
        """Return a trainable copy of a model, or a new one, with the blocks that train."""
        if not self._blocks.blocks:
            return self._config.trainable_copy(model, first, rng)
        network = self._new_blocks().to(first[self.reads[0]].device)
        if model is not None and model.network is not None:
            network.take(model.network.to(first[self.reads[0]].device).state())
        with torch.no_grad():
            vectors, _ = network(first)
        copied = self._config.trainable_copy(model, vectors, rng)
        copied.network = network
        return copied

    def _new_blocks(self) -> TrainableSuffix:
        if self._network is None:
            raise ValueError("no network was attached, whose last blocks could train: attach one")
        return TrainableSuffix(self._network, self.reads[0], None, self._blocks.batch_norm)

    def clips(self, task: Task, classes: list[int]) -> Clips:
        """Return the clips to train on, when `classes` are all that are known after the task."""
        return task.clips

    def train(self, training: Training[K]) -> None:
        """Train the model, whose classifier has columns for the new classes."""
        device = training.device

        def step(indices: Tensor, batch: Batch) -> Tensor:
            return self.loss(training, batch, training.columns_N[indices].to(device))

        epochs = self._optim.epochs_of(first_task=not self.classes)
        network = training.model.network
        if network is not None:
            network.train(network.learns)
        fit(step, self.parameters(training.model), training.clips, self._optim, epochs=epochs,
            rng=training.rng, on_epoch_end=training.task.on_epoch_end)  # fmt: skip
        if network is not None:
            network.eval()

    def keep(self, training: Training[K]) -> None:
        """Keep what a task has trained."""
        self.classes, self._model = training.classes, training.model

    # What the runner calls

    @property
    def fine_tunes(self) -> bool:
        return bool(self._blocks.blocks)

    def attach(self, network: Network) -> None:
        self._network = network

    def modules(self) -> Iterable[tuple[str, nn.Module]]:
        return modules(self._model, None if self._model is None else self._model.network)

    @property
    def trainable(self) -> int:
        return trainable(self._model) if self._trains else 0

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        model = self.start(task.clips[torch.arange(1)], rng)
        clips = self.clips(task, classes)
        clips = clips if self._sees_frames else model.prepare(clips)
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
        if self._model is not None and self.fine_tunes:
            self._model.network = self._new_blocks()
            self._model.network.take(part(state, "network."))
        self.classes = state["classes"].tolist()


class ReplayModelHead[K: Classifier](ModelHead[K]):
    """A `ModelHead` that replays exemplars.

    Args:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        exemplars: Options of the exemplars; None keeps every clip.
        optim: Options of gradient descent.
        seed: Seed of everything that is drawn.
        blocks: The network's last blocks, where they train too.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: EncoderConfig = EncoderConfig(),
        exemplars: ExemplarConfig | None = ExemplarConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
        blocks: BlocksConfig = BlocksConfig(),
    ) -> None:
        super().__init__(feature, encoder, optim, seed, blocks)
        self._exemplars = Exemplars(exemplars)

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def check_classes(self, classes: int) -> None:
        self._exemplars.quota(classes)

    def clips(self, task: Task, classes: list[int]) -> Clips:
        self._exemplars.quota(len(classes))
        return self._exemplars.rehearsal(task)

    def keep(self, training: Training[K]) -> None:
        """Keep what a task has trained, and exemplars by the trained model."""
        vectors_NW = training.model.encode(training.clips).whole(ENCODED)
        self._exemplars, _ = self._exemplars.select(
            vectors_NW, self._exemplars.rehearsal(training.task), training.task.classes,
            training.classes, training.rng,
            encode=lambda clips: training.model.encode(clips).whole(ENCODED),
        )  # fmt: skip
        super().keep(training)

    def nearest(self, batch: Batch) -> Tensor:
        return self._exemplars.nearest(vectors(self._model, batch))

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self._exemplars.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._exemplars.load(state)
