"""Fine-tuned heads: the last blocks of the network, an encoder and a classifier, trained together.

    L = CE(logits of f(x), y) + the terms of a method,     over a task's clips and the exemplars

f(x) is the temporal encoder of the last vectors of T frames. A method is its grafts and its terms
of the loss (`FineTunedHead.task_loss`). Its CNN is the classifier, its NME that of the exemplars.
With nothing added it is fine-tuning with rehearsal, the baseline of such a method; with budget=0 it
is the fine-tuning of the papers' tables, without exemplars.

The classifier is PODNet's, of cosines to ten proxies per class, which the code of TCD (Park et al.,
ICCV 2021) has with one. As TCD does, it is tuned on the exemplars after each task: otherwise the
new clips outweigh the few exemplars, and all methods look alike.

Ours: the optimiser of all heads where a method has none of its own; the parameters of batch norms
train while their statistics are frozen (`batch_norm`), where TCD freezes both of all but the first;
new columns of a cosine classifier are imprinted, in the first task too, and do not decay (see
`varve.heads.lucir`).

Shapes: B clips, T frames, C classes, W width of a clip's vector.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, autocast, nn
from torch.nn.functional import cross_entropy

from varve.heads import Network, Task
from varve.heads.grafts import fill_options
from varve.heads.parts import classifiers, models
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.clips import Batch, part_of
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.exemplars import ExemplarConfig, Exemplars, balanced
from varve.heads.parts.expert import PRECISIONS
from varve.heads.parts.losses import square_grid
from varve.heads.parts.models import TaskLoss, TaskTraining
from varve.heads.parts.trainable_suffix import VECTOR, Passed, TrainableSuffix
from varve.heads.parts.training import OptimConfig, fit, tune

Graft = Callable[[nn.Module], nn.Module]
CLASSIFIERS = ("lsc", "linear")


class FineTunedHead:
    """A head of which methods are made; see the module.

    Args:
        blocks: Number of the network's last blocks that train. Their input is read.
        classifier: `lsc`, cosines to `proxies` vectors per class, or `linear`.
        proxies: Number of proxies per class.
        encoder: Options of the temporal encoder.
        exemplars: Options of the exemplars. With budget=0 the classifier is not tuned, and there is
            no NME.
        batch_norm: `frozen` or `trained`, for the statistics of batch norms; `fixed` freezes their
            affine parameters too.
        drop: Dropout rate of a clip's vector in training.
        tune_epochs: Number of epochs in which the classifier alone is trained after each task but
            the first: class-balanced fine-tuning on equally many exemplars per class, where those
            of small classes repeat.
        tune_lr: Learning rate of this tuning; None is 0.05 for cosines (PODNet's) and 0.01 for a
            linear classifier. A few dozen exemplars make few steps, and a rate that is small enough
            for a trained network changes nothing: on 24 hand shapes a classifier of 66.6 % came to
            66.6 % at 0.0005, 78 at 0.01 and 91.5 at 0.05.
        classifier_rate: Learning rate of the classifier, as a multiple of `lr`; 5 in TCD.
        optim: Options of gradient descent. `clip_norm` applies to the blocks and encoder together,
            to the classifier, and to a method's own parameters.
        graft: Name of a registered graft behind each of the blocks that train, around the method's
            own graft, if there is one; "" for none.
        graft_options: Options of that graft; see `varve.heads.grafts.fill_options`.
        precision: `float32` or `bfloat16`, for the products of the blocks in training; bfloat16 is
            two to four times as fast on CPUs that have it. Parameters, losses and scores are
            float32.
        seed: Seed of everything that is drawn.

    Attributes:
        tunes_old: Whether the tuning changes the proxies of old classes too.

    Raises:
        ValueError: An option is out of range, or is not one of the choices.
    """

    tunes_old = True

    def __init__(
        self,
        blocks: int = 2,
        classifier: str = "lsc",
        proxies: int = 10,
        encoder: EncoderConfig = EncoderConfig(),
        exemplars: ExemplarConfig = ExemplarConfig(),
        batch_norm: str = "frozen",
        drop: float = 0.0,
        tune_epochs: int = 20,
        tune_lr: float | None = None,
        classifier_rate: float = 1.0,
        optim: OptimConfig = OptimConfig(),
        graft: str = "",
        graft_options: Mapping[str, Any] | None = None,
        precision: str = "float32",
        seed: int = 0,
    ) -> None:
        if graft_options and not graft:
            raise ValueError(f"{graft_options=} without a graft: give graft=NAME")
        if blocks < 1 or not 0 <= drop < 1:
            raise ValueError(f"{blocks=}, {drop=}: train a block at least, and drop less than all")
        if precision not in PRECISIONS:
            raise ValueError(f"no {precision=}; choose from {', '.join(PRECISIONS)}")
        if classifier not in CLASSIFIERS:
            raise ValueError(f"no {classifier=}; choose from {', '.join(CLASSIFIERS)}")
        if proxies < 1:
            raise ValueError(f"{proxies=}: give a proxy at least")
        if tune_epochs < 0:
            raise ValueError(f"{tune_epochs=}: give at least 0")
        self.reads: Sequence[str] = (f"blocks.-{blocks + 1}",)
        self.classes: list[int] = []
        self._blocks, self._batch_norm, self._drop = blocks, batch_norm, drop
        self._proxies = proxies if classifier == "lsc" else 0
        self._config = models.ModelConfig(VECTOR, encoder, self.build_classifier)
        self._optim, self._seed, self._precision = optim, seed, precision
        self._tune_epochs, self._classifier_rate = tune_epochs, classifier_rate
        self._tune_lr = (0.05 if self._proxies else 0.01) if tune_lr is None else tune_lr
        if not classifier_rate > 0 or not self._tune_lr > 0:
            raise ValueError(f"{classifier_rate=}, {tune_lr=}: give numbers above 0, or leave out")
        self._graft, self._graft_options = graft, graft_options or {}
        self._network: Network | None = None
        self._suffix: TrainableSuffix | None = None
        self._model: models.Model[Classifier] | None = None
        self._exemplars = self.build_exemplars(exemplars)

    # Hooks of a method

    def build_exemplars(self, config: ExemplarConfig) -> Exemplars:
        """Return a memory without exemplars."""
        return Exemplars(config, least=0)

    def build_classifier(self, width: int) -> Classifier:
        """Return a classifier of vectors of a width, without columns."""
        if not self._proxies:
            return classifiers.Linear(width)
        return classifiers.Cosine(width, self._proxies)

    def classification_loss(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        """Return the loss of the classifier alone, a scalar."""
        return cross_entropy(classifier.logits(vectors_BW) + offsets_C, columns_B)

    def grafts(self, network: Network, classifier: Classifier) -> Mapping[str, Graft]:
        """Return grafts by stage: each is made from the stage's trainable copy."""
        return {}

    def before_first_task(self, training: TaskTraining) -> None:
        """Initialise from the clips of the first task, before the classifier has columns."""

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        """Return the terms of a task's loss. The classifier has columns for the new classes."""
        return TaskLoss()

    def after_selection(self, training: TaskTraining, exemplars: Exemplars, kept: Tensor) -> None:
        """Run once the exemplars are selected, before the classifier is tuned on them.

        Args:
            training: The training, at its end.
            exemplars: The exemplars after the task.
            kept: int64, their indices among the clips of the training.
        """

    # What the runner calls

    @property
    def fine_tunes(self) -> bool:
        return True

    def attach(self, network: Network) -> None:
        self._network = network
        if self._graft:
            network.graft(self._graft)  # refuses an unknown name, before anything is computed

    @property
    def network(self) -> Network:
        """The network attached.

        Raises:
            ValueError: There is none.
        """
        if self._network is None:
            raise ValueError("no network was attached, whose last blocks could train: attach one")
        return self._network

    @property
    def suffix(self) -> nn.Module:
        """The part of the network that trains, as the last task left it."""
        assert self._suffix is not None
        return self._suffix.suffix

    def modules(self) -> Iterable[tuple[str, nn.Module]]:
        return models.modules(self._model, self._suffix)

    @property
    def trainable(self) -> int:
        trained = {} if self._suffix is None else self._suffix.own()
        return models.trainable(self._model) + sum(p.numel() for p in trained.values())

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def check_classes(self, classes: int) -> None:
        self._exemplars.quota(classes)

    def learn(self, task: Task) -> None:
        training, generator = self._start_training(task)
        terms = self.task_loss(training)
        self._train(training, terms, generator)
        terms.on_trained()
        vectors_NW = training.vectors()
        exemplars, kept = self._exemplars.select(
            vectors_NW, training.clips, task.classes, training.classes, training.rng,
            encode=training.vectors,
        )  # fmt: skip
        self.after_selection(training, exemplars, kept)
        if self._tuning_epochs:
            replayed = exemplars.replayed(part_of(training.clips, kept))
            vectors_MW = vectors_NW[kept.to(vectors_NW.device)]
            if exemplars.frames:
                vectors_MW = training.vectors(replayed)
            indices = balanced(exemplars.labels)
            self._tune(training, vectors_MW[indices.to(vectors_MW.device)], kept[indices])
            if training.suffix.looks:
                exemplars.update_means(training.vectors(replayed))
        self.classes, self._exemplars = training.classes, exemplars
        self._model, self._suffix = training.model, training.suffix
        terms.on_task_end()

    @property
    def _training_epochs(self) -> int:
        return self._optim.epochs_of(first_task=not self.classes)

    @property
    def _tuning_epochs(self) -> int:
        has_exemplars = self._exemplars.quota(1) != 0
        return self._tune_epochs if self.classes and has_exemplars else 0

    def _start_training(self, task: Task) -> tuple[TaskTraining, torch.Generator]:
        """Return trainable copies with columns for the new classes, and the dropout generator."""
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        model, suffix = self._trainable_copies(rng, first[self.reads[0]].device)
        with torch.no_grad():
            suffix(first)  # refuses features of another network
        clips = self._exemplars.rehearsal(task)
        training = TaskTraining(task, classes, clips, model, rng, suffix)
        if not self.classes:
            self.before_first_task(training)
        classifier = model.classifier
        if isinstance(classifier, classifiers.Cosine):
            # Before there are new columns, which mean nothing yet, for a graft to read.
            vectors_NW = training.vectors()
            classifier.grow(len(classes), rng)
            classifier.imprint_new(len(self.classes), vectors_NW, training.columns_N, rng)
        else:
            classifier.grow(len(classes), rng)
        return training, generator

    def _train(self, training: TaskTraining, terms: TaskLoss, generator: torch.Generator) -> None:
        """Train the suffix, the encoder and the classifier on all clips."""
        suffix, model, classifier = training.suffix, training.model, training.classifier
        device, dtype = training.device, PRECISIONS[self._precision]
        epochs = self._training_epochs

        def step(indices: Tensor, batch: Batch) -> Tensor:
            with autocast(device.type, dtype, enabled=dtype != torch.float32):
                vectors, outputs = suffix(batch)
            vectors = vectors | {models.ENCODED: model.vectors(vectors)}
            vectors_BW = _dropout(vectors[models.ENCODED], self._drop, generator)
            added = terms.loss(indices, batch, vectors, outputs)
            offsets_C = terms.logit_offsets(len(training.classes)).to(device)
            columns_B = training.columns_N[indices].to(device)
            loss = self.classification_loss(classifier, vectors_BW, columns_B, offsets_C)
            total: Tensor = loss + added
            return total

        def on_epoch_end(done: int, _: int, loss: float) -> None:
            terms.on_epoch_end()
            training.task.on_epoch_end(done, epochs + self._tuning_epochs, loss)

        suffix.train(suffix.learns)
        classifier_group: dict[str, Any] = {
            "params": [*classifier.parameters()],
            "lr": self._optim.lr * self._classifier_rate,
        }
        if not classifier.decays:
            classifier_group["weight_decay"] = 0.0
        backbone = [*suffix.own().values(), *model.encoder.parameters()]
        groups = [{"params": backbone}, classifier_group, *terms.parameter_groups()]
        fit(step, groups, training.clips, self._optim, epochs=epochs, rng=training.rng,
            on_epoch_end=on_epoch_end)  # fmt: skip
        suffix.eval()

    def _tune(self, training: TaskTraining, vectors_MW: Tensor, indices: Tensor) -> None:
        """Train weight and bias of the classifier alone, on the vectors of some clips."""
        classifier, columns_M = training.classifier, training.columns_N[indices]
        no_offsets_C = torch.zeros(len(training.classes), device=training.device)
        if isinstance(classifier, classifiers.Cosine):
            classifier.frozen = None if self.tunes_old else ~training.in_task_C
        before, epochs = self._training_epochs, self._tuning_epochs

        def loss(x_BW: Tensor, columns_B: Tensor) -> Tensor:
            return self.classification_loss(classifier, x_BW, columns_B, no_offsets_C)

        def on_epoch_end(done: int, _: int, loss: float) -> None:
            training.task.on_epoch_end(before + done, before + epochs, loss)

        tune(classifier, loss, vectors_MW, columns_M, replace(self._optim, lr=self._tune_lr),
             epochs=epochs, rng=training.rng, on_epoch_end=on_epoch_end)  # fmt: skip

    def scores(self, batch: Batch) -> Tensor:
        return models.scores(self._model, self.frame_vectors(batch))

    def nearest(self, batch: Batch) -> Tensor:
        return self._exemplars.nearest(models.vectors(self._model, self.frame_vectors(batch)))

    def frame_vectors(self, batch: Batch) -> Batch:
        """Return the network's last vectors of the frames, [B, T, D], as "vector"."""
        models.learned(self._model)
        assert self._suffix is not None
        with torch.no_grad():
            vectors: Batch = self._suffix.to(batch[self.reads[0]].device)(batch)[0]
        return vectors

    def traced(self, batch: Batch) -> tuple[Tensor, dict[str, Passed]]:
        """Return scores [B, C] with their graph, and the inputs and outputs of each trained stage.

        Raises:
            ValueError: Nothing was learned yet, or a feature is not the network's.
        """
        model = models.learned(self._model).on(batch)
        assert self._suffix is not None
        vectors, passed = self._suffix.to(batch[self.reads[0]].device).traced(batch)
        return model(vectors), passed

    def state_dict(self) -> dict[str, Tensor]:
        trained = {} if self._suffix is None else self._suffix.state()
        state = models.state_of(self._model, self.classes) | self._exemplars.state()
        return state | models.copies(trained, "network.")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model, self._suffix = self._config.load(state), None
        self._exemplars.load(state)
        self.classes = state["classes"].tolist()
        if self._model is not None:
            self._suffix = self._new_suffix(self._model)
            self._suffix.take(models.part(state, "network."))

    def _trainable_copies(
        self, rng: np.random.Generator, device: torch.device
    ) -> tuple[models.Model[Classifier], TrainableSuffix]:
        """Return copies of what was learned, or new ones before the first task."""
        network = self.network
        like = torch.zeros(1, network.time_steps(VECTOR), network.shape(VECTOR)[-1], device=device)
        model = self._config.trainable_copy(self._model, {VECTOR: like}, rng)
        suffix = self._new_suffix(model).to(device)
        if self._suffix is not None:
            suffix.take(self._suffix.to(device).state())
        return model, suffix

    def _new_suffix(self, model: models.Model[Classifier]) -> TrainableSuffix:
        network, grafts = self.network, dict(self.grafts(self.network, model.classifier))
        for stage in (network.find(f"blocks.-{n}") for n in range(1, self._blocks + 1)):
            if self._graft:
                grafts[stage] = self._with_graft(stage, model.classifier, grafts)
        return TrainableSuffix(network, self.reads[0], grafts, self._batch_norm)

    def _with_graft(self, stage: str, classifier: Classifier, grafts: Mapping[str, Graft]) -> Graft:
        """Return the option's graft around a stage, or around its graft in `grafts`."""
        build = self.network.graft(self._graft)
        known = stage_options(self.network, stage) | {"classifier": classifier, "seed": self._seed}
        known["width"] = known["channels"]
        options = fill_options(build, known, self._graft_options)
        inner = grafts.get(stage)
        return lambda module: build(inner(module) if inner else module, **options)


def grid(shape: Sequence[int]) -> tuple[int, int]:
    """Return the channels of a stage's output, and the number of tokens before its square grid.

    Raises:
        ValueError: The patches form no square grid.
    """
    if len(shape) == 3:
        return shape[0], 0
    return shape[1], square_grid(shape[0])[1]


def stage_options(network: Network, stage: str) -> dict[str, Any]:
    """Return the options of a graft that its stage decides: channels, frames and prefix."""
    channels, prefix = grid(network.shape(stage))
    return {"channels": channels, "frames": network.time_steps(stage), "prefix": prefix}


def _dropout(x_BW: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Apply dropout with its own generator, so that the global ones are not used."""
    if not rate:
        return x_BW
    kept_BW = torch.rand(x_BW.shape, generator=generator) >= rate
    return x_BW * kept_BW.to(x_BW) / (1 - rate)
