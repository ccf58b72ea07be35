"""Tuned networks: the last blocks, an encoder and a classifier, trained together.

    L = CE(logits of f(x), y) + what a method adds,     over a task's clips and the exemplars

f(x) is the encoder of the last vectors of T frames. A method is its grafts (`changed`) and what it
adds to the loss (`more`); its CNN is the classifier, its NME that of the exemplars. With nothing
added it is fine-tuning with rehearsal, what such a method is to be compared with; with budget=0 too
it is the fine-tuning of the papers' tables, which remembers nothing.

As in TCD (Park et al., ICCV 2021), whose recipe HCE's is, the classifier is one of cosines to
proxies, and tuned on the exemplars after each task: without, a handful of them is outvoted by the
new clips, and all methods look alike.

Ours: the recipe of `varve.heads.linear` where a method has none of its own; the parameters of
batch norms
train and their statistics stay (`batch_norm`), as TCD holds all but the first; new columns of a
cosine classifier are imprinted, in the first task too, and do not decay (see `varve.heads.lucir`).

Shapes: B clips, T frames, C classes, W width of a clip's vector.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, autocast, nn
from torch.nn.functional import cross_entropy

from varve.heads import Network, Task
from varve.heads.grafts import fill_options
from varve.heads.parts import classifiers, models, training
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.clips import Batch, Clips
from varve.heads.parts.exemplars import Exemplars, balanced
from varve.heads.parts.expert import PRECISIONS
from varve.heads.parts.trainable_suffix import VECTOR, Passed, TrainableSuffix

Change = Callable[[nn.Module], nn.Module]
CLASSIFIERS = ("lsc", "linear")
READ = 40  # clips at a time, where nothing is trained


class TaskLoss:
    """What a method adds to the loss of one task; nothing."""

    def groups(self) -> list[dict[str, Any]]:
        """Of parameters of its own, as torch's optimizers take them."""
        return []

    def offsets(self, classes: int) -> Tensor:
        """Added to the logits in training, [C]; asked for after the batch's `loss`."""
        return torch.zeros(classes)

    def loss(
        self, places: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        """Added to the loss.

        Args:
            places: Of the clips, among those learned from.
            vectors: The last ones, by name, [B, T, D]; "encoded", the clips', [B, W].
            outputs: Of the stages that train, [B, T, ...].
        """
        return torch.zeros((), device=outputs[0].device)

    def ended(self) -> None:
        """Told of the end of every epoch."""

    def kept(self) -> None:
        """Told that the task was learned."""


class FineTunedHead:
    """A head of which methods are made; see the module.

    Args:
        blocks: How many of the network's last blocks train. What goes into them is read.
        classifier: `lsc`, cosines to `proxies` vectors of each class, or `linear`.
        encoder, expert: How T frames become one vector; see `varve.heads.parts.encoders`.
        budget, shared, choice: Of the exemplars; see `varve.heads.parts.exemplars`. With 0 of them
        the
            classifier is not tuned and there is no NME.
        batch_norm: `frozen` or `trained`, of its statistics.
        drop: Share of a clip's vector that is dropped in training.
        first_epochs: Of the first task; `epochs` of every other.
        tune_epochs: Of the classifier alone, after each task but the first, on the exemplars, as
            many of each class (where it has fewer, each of its own more than once): class-balanced
            fine-tuning.
        tune_lr: Its rate, whatever `lr` is: None is 0.05 for cosines (PODNet's) and 0.01 for a
            linear classifier. A few dozen exemplars make few steps, and at a rate that is small
            enough for a trained network they change nothing: on 24 hand shapes a classifier by
            which 66.6 % were right came to 66.6 % at 0.0005, 78 at 0.01 and 91.5 at 0.05.
        classifier_rate: The rate of the classifier, in times `lr`; 5 in TCD.
        milestones: Epochs after which the rate is a tenth; with schedule="step".
        clip_norm: Of the gradients of the blocks and encoder together, of those of the classifier,
            and of those of what a method adds; None leaves them.
        graft: Name of a registered graft behind each of the blocks that train, "" for none; around
            the method's own graft, if there is one.
        graft_options: Options of that graft; see `varve.heads.grafts.fill_options`.
        precision: Of the products of the blocks in training (`bfloat16` is two to four times as
            fast on CPUs that have it); parameters, losses and scores are float32.
    """

    def __init__(
        self,
        blocks: int = 2,
        classifier: str = "lsc",
        proxies: int = 10,
        encoder: str = "mean",
        expert: Mapping[str, Any] | None = None,
        budget: int = 5,
        shared: bool = False,
        choice: str = "herding",
        batch_norm: str = "frozen",
        drop: float = 0.0,
        first_epochs: int = 60,
        epochs: int = 30,
        tune_epochs: int = 20,
        tune_lr: float | None = None,
        batch_size: int = 40,
        lr: float = 0.01,
        classifier_rate: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: str = "cosine",
        milestones: Sequence[int] = (),
        clip_norm: float | None = None,
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
        self.reads: Sequence[str] = (f"blocks.-{blocks + 1}",)
        self.classes: list[int] = []
        self._blocks, self._batch_norm, self._drop = blocks, batch_norm, drop
        self._proxies = proxies if classifier == "lsc" else 0
        self._form = models.Form(VECTOR, encoder, expert, self.classifier)
        self._epochs, self._seed, self._precision = (first_epochs, epochs), seed, precision
        self._tune_epochs, self._classifier_rate = tune_epochs, classifier_rate
        self._tune_lr = (0.05 if self._proxies else 0.01) if tune_lr is None else tune_lr
        self._recipe: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "milestones": milestones,
            "clip_norm": clip_norm,
        }
        for count in (first_epochs, epochs, tune_epochs):
            training.check(epochs=count, **self._recipe)
        if not classifier_rate > 0 or not self._tune_lr > 0:
            raise ValueError(f"{classifier_rate=}, {tune_lr=}: give numbers above 0, or leave out")
        self._graft, self._graft_options = graft, graft_options or {}
        self._network: Network | None = None
        self._trunk: TrainableSuffix | None = None
        self._model: models.Model[Classifier] | None = None
        self._exemplars = Exemplars(budget, shared, choice, least=0)

    # What a method is

    def classifier(self, width: int) -> Classifier:
        """Of clips' vectors of a width, without columns."""
        if not self._proxies:
            return classifiers.Linear(width)
        return classifiers.Cosine(width, self._proxies)

    def classified(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        """The loss before anything is added to it."""
        return cross_entropy(classifier.logits(vectors_BW) + offsets_C, columns_B)

    def changed(self, network: Network, classifier: Classifier) -> Mapping[str, Change]:
        """Grafts by stage, each made around the stage's trained copy."""
        return {}

    def begins(self, clips: Clips, trunk: TrainableSuffix, model: models.Model[Classifier]) -> None:
        """Told of the first task's clips before anything is trained, or has a column."""

    def more(
        self,
        task: Task,
        clips: Clips,
        trunk: TrainableSuffix,
        model: models.Model[Classifier],
        rng: np.random.Generator,
    ) -> "TaskLoss":
        """What a method adds to a task's loss.

        Args:
            clips: To learn from: the task's, and after them the exemplars.
            trunk, model: To be trained, with columns for the new classes.
        """
        return TaskLoss()

    # What the runner asks

    @property
    def fine_tunes(self) -> bool:
        return True

    def attach(self, network: Network) -> None:
        self._network = network
        if self._graft:
            network.graft(self._graft)  # refuses an unknown name, before anything is computed

    @property
    def trainable(self) -> int:
        own = {} if self._trunk is None else self._trunk.own()
        return models.trainable(self._model) + sum(p.numel() for p in own.values())

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        device = first[self.reads[0]].device
        model, trunk = self._begun(rng, device)
        with torch.no_grad():
            trunk(first)  # refuses what is not the network's
        classifier = model.classifier
        clips = self._exemplars.rehearsal(task)
        columns_N = classifiers.columns(classes, clips.labels)
        if not self.classes:
            self.begins(clips, trunk, model)
        if isinstance(classifier, classifiers.Cosine):
            # Before there are new columns, which mean nothing yet, for a graft to look at.
            vectors_NW = _encoded(trunk, model, clips)
            classifier.grow(len(classes), rng)
            known = torch.arange(len(self.classes))
            for column in range(len(known), len(classes)):
                of = vectors_NW[(columns_N == column).to(device)]
                classifier.imprint(column, of, known, rng)
        else:
            classifier.grow(len(classes), rng)

        more = self.more(task, clips, trunk, model, rng)
        epochs = self._epochs[bool(self.classes)]
        tune_epochs = self._tune_epochs if self.classes and self._exemplars.budget != 0 else 0

        def step(places: Tensor, batch: Batch) -> Tensor:
            with autocast(device.type, PRECISIONS[self._precision], self._precision != "float32"):
                vectors, outputs = trunk(batch)
            vectors = vectors | {models.ENCODED: model.vectors(vectors)}
            vectors_BW = _dropped(vectors[models.ENCODED], self._drop, generator)
            added = more.loss(places, batch, vectors, outputs)
            offsets_C, columns_B = more.offsets(len(classes)), columns_N[places]
            loss = self.classified(
                classifier, vectors_BW, columns_B.to(device), offsets_C.to(device)
            )
            total: Tensor = loss + added
            return total

        def on_epoch_end(done: int, _: int, loss: float) -> None:
            more.ended()
            task.on_epoch_end(done, epochs + tune_epochs, loss)

        trunk.train(trunk.learns)
        own = [*trunk.own().values(), *model.encoder.parameters()]
        of_classifier: dict[str, Any] = {
            "params": [*classifier.parameters()],
            "lr": self._recipe["lr"] * self._classifier_rate,
        }
        if not classifier.decays:
            of_classifier["weight_decay"] = 0.0
        groups: list[dict[str, Any]] = [{"params": own}, of_classifier, *more.groups()]
        training.fit(
            step,
            groups,
            clips,
            epochs=epochs,
            rng=rng,
            on_epoch_end=on_epoch_end,
            **self._recipe,
        )
        trunk.eval()
        vectors_NW = _encoded(trunk, model, clips)
        chosen, kept = self._exemplars.chosen(vectors_NW, clips, task.classes, classes, rng)
        if tune_epochs:

            def tuned(done: int, _: int, loss: float) -> None:
                task.on_epoch_end(epochs + done, epochs + tune_epochs, loss)

            even = kept[balanced(chosen.labels)]
            balanced_clips = Clips(
                {models.ENCODED: vectors_NW[even.to(device)]}, clips.labels[even]
            )
            self._tune(classifier, balanced_clips, classes, tune_epochs, rng, tuned)
            if trunk.looks:
                chosen.measure(_encoded(trunk, model, clips, kept))
        self.classes, self._exemplars = classes, chosen
        self._model, self._trunk = model, trunk
        more.kept()

    def _tune(
        self,
        classifier: Classifier,
        clips: Clips,
        classes: list[int],
        epochs: int,
        rng: np.random.Generator,
        on_epoch_end: Callable[[int, int, float], object],
    ) -> None:
        """Train the classifier's weight and bias on clips by "encoded"."""
        columns_N, none_C = classifiers.columns(classes, clips.labels), torch.zeros(len(classes))
        if isinstance(classifier, classifiers.Cosine):
            classifier.held = None

        def step(places: Tensor, batch: Batch) -> Tensor:
            x_BW = batch[models.ENCODED]
            columns_B, offsets_C = (x.to(x_BW.device) for x in (columns_N[places], none_C))
            return self.classified(classifier, x_BW, columns_B, offsets_C)

        recipe = self._recipe | {"lr": self._tune_lr, "weight_decay": 0.0}
        trained = [p for name, p in classifier.named_parameters() if name != "scale"]
        training.fit(
            step, trained, clips, epochs=epochs, rng=rng, on_epoch_end=on_epoch_end, **recipe
        )

    def scores(self, batch: Batch) -> Tensor:
        model, vectors = self._vectors(batch)
        return models.scores(model, vectors)

    def nearest(self, batch: Batch) -> Tensor:
        model, vectors = self._vectors(batch)
        return self._exemplars.nearest(models.vectors(model, vectors))

    def traced(self, batch: Batch) -> tuple[Tensor, dict[str, Passed]]:
        """Scores [B, C] as autograd has them, and each stage that trains on the way there.

        Raises:
            ValueError: Nothing was learned yet, or a feature is not the network's.
        """
        model = models.learned(self._model).on(batch)
        assert self._trunk is not None
        vectors, passed = self._trunk.to(batch[self.reads[0]].device).traced(batch)
        return model(vectors), passed

    def state_dict(self) -> dict[str, Tensor]:
        own = {} if self._trunk is None else self._trunk.state()
        network = {f"network.{n}": p.detach().to("cpu", copy=True) for n, p in own.items()}
        return models.state_of(self._model, self.classes) | self._exemplars.state() | network

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model, self._trunk = self._form.loaded(state), None
        self._exemplars.load(state)
        self.classes = state["classes"].tolist()
        if self._model is not None:
            start = "network."
            own = {n.removeprefix(start): p for n, p in state.items() if n.startswith(start)}
            self._trunk = self._fresh(self._model)
            self._trunk.take(own)

    def _begun(
        self, rng: np.random.Generator, device: torch.device
    ) -> tuple[models.Model[Classifier], TrainableSuffix]:
        """Copies to train of what was learned, or what there is before the first task."""
        network = self._attached()
        like = torch.zeros(1, network.frames, network.shape(VECTOR)[-1], device=device)
        model = self._form.begun(self._model, {VECTOR: like}, rng)
        trunk = self._fresh(model).to(device)
        if self._trunk is not None:
            trunk.take(self._trunk.to(device).state())
        return model, trunk

    def _fresh(self, model: models.Model[Classifier]) -> TrainableSuffix:
        network = self._attached()
        changes = dict(self.changed(network, model.classifier))
        for stage in (network.find(f"blocks.-{n}") for n in range(1, self._blocks + 1)):
            if self._graft:
                changes[stage] = self._with_graft(network, stage, model.classifier, changes)
        return TrainableSuffix(network, self.reads[0], changes, self._batch_norm)

    def _with_graft(
        self, network: Network, stage: str, classifier: Classifier, changes: Mapping[str, Change]
    ) -> Change:
        """Return what puts the option's graft around a stage, or around its graft in `changes`."""
        build = network.graft(self._graft)
        channels, prefix = grid(network.shape(stage))
        known = {
            "channels": channels,
            "width": channels,
            "frames": network.frames,
            "prefix": prefix,
            "classifier": classifier,
            "seed": self._seed,
        }
        options = fill_options(build, known, self._graft_options)
        method = changes.get(stage, lambda module: module)
        return lambda module: build(method(module), **options)

    def _attached(self) -> Network:
        if self._network is None:
            raise ValueError("no network was attached, whose last blocks could train: attach one")
        return self._network

    def _vectors(self, batch: Batch) -> tuple[models.Model[Classifier], Batch]:
        """The model, and the last vectors of a batch's clips."""
        model = models.learned(self._model)
        assert self._trunk is not None
        with torch.no_grad():
            vectors, _ = self._trunk.to(batch[self.reads[0]].device)(batch)
        return model, vectors


def grid(shape: Sequence[int]) -> tuple[int, int]:
    """Channels of a stage's output, and the tokens that stand before its square grid of patches."""
    if len(shape) == 3:
        return shape[0], 0
    return shape[1], shape[0] - math.isqrt(shape[0]) ** 2


def _encoded(
    trunk: TrainableSuffix,
    model: models.Model[Classifier],
    clips: Clips,
    places: Tensor | None = None,
) -> Tensor:
    """The vectors of the clips, [N, W], or of those in some places."""
    places = torch.arange(len(clips)) if places is None else places
    with torch.no_grad():
        parts = [model.vectors(trunk(clips[some])[0]) for some in torch.split(places, READ)]
    return torch.cat(parts)


def _dropped(x_BW: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Dropout of its own generator, so that the global ones are left alone."""
    if not share:
        return x_BW
    kept_BW = torch.rand(x_BW.shape, generator=generator) >= share
    return x_BW * kept_BW.to(x_BW) / (1 - share)
