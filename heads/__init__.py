"""Heads: methods that learn classes task by task from cached features.

This file is the contract. Every other module here is one head, found by its file name. It ends with
`build = CLASS`; the options of the class have defaults that are JSON values, or are option groups
(see `options_of`). A head sees tensors only: it imports torch, numpy and faiss, and nothing of
`varve.stores` or `varve.pipeline`. `heads/parts` holds what several heads share, `heads/grafts`
what is put into a network. A head may offer `QUICK`, options with which the contract suite trains
it on a dozen clips in seconds. The second group of protocols is for heads that replay exemplars,
train a part of the network, or route among experts.

Shapes: N clips, B clips of a batch, T frames per clip, D feature width, C classes learned so far,
K experts.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from varve.heads import _whitening
from varve.heads.parts.clips import Batch, Clips


@dataclass(frozen=True)
class Task:
    """The clips of the classes that arrive together.

    Attributes:
        clips: Clips of the task. Those of earlier tasks are gone.
        number: Number of the task, from 0. All random draws of `learn` depend on a head's `seed`
            and on this number alone, so that training resumed from a state gives the same numbers.
        text: float32 [len(classes), W], unit text features of `classes`; None where the network
            has no text tower.
        memory: The exemplars that `ReplaysExemplars.exemplars` names; None for other heads.
        on_epoch_end: Callback after every epoch: number of epochs done, number of all epochs, and
            mean loss.
        key: Cache key of the columns that the clips come from. A head stores it with what it will
            compare with clips later, such as anchors.
    """

    clips: Clips
    number: int = 0
    text: Tensor | None = None
    memory: Clips | None = None
    on_epoch_end: Callable[[int, int, float], object] = lambda done, epochs, loss: None
    key: str = ""

    @cached_property
    def classes(self) -> list[int]:
        """Classes of the task's clips, ascending."""
        return sorted(set(self.clips.labels.tolist()))

    def classes_after(self, known: Sequence[int]) -> list[int]:
        """Return the classes that are known after the task: new ones are appended."""
        return [*known, *(label for label in self.classes if label not in known)]

    def rng(self, seed: int) -> np.random.Generator:
        """Return the random generator of a head with a seed, for this task."""
        return np.random.default_rng([seed, self.number])


class Head(Protocol):
    """A classifier whose set of classes may grow with every `learn`.

    Column j of `scores` is always `classes[j]`: columns are appended, in ascending order of label
    within one `learn`, and never moved. Equal calls give equal numbers, whatever the state of any
    global random generator.

    Attributes:
        classes: Classes learned so far.
        reads: Names of the features that it needs of a clip: a stage, or stage:reduction. "vector"
            is the network's last vector before its own classifier. "blocks.-1" is the last block
            of any network; with a number that is one more than the number of blocks, the stage
            before them. "blocks.-2.attn" is the state after the attention of the last block but
            one. "sound" is the last vector of the store's audio backbone, and NETWORK/FEATURE a
            feature of another network.
        trainable: Number of values that gradient descent has trained so far; 0 for closed forms.
    """

    classes: list[int]

    @property
    def reads(self) -> Sequence[str]: ...

    @property
    def trainable(self) -> int: ...

    def learn(self, task: Task) -> None:
        """Learn the classes of a task; known classes are updated.

        The head keeps nothing of the task but what `state_dict` returns, and modifies nothing.

        Raises:
            ValueError: The task does not match what was learned before, a feature is not finite,
                or the training diverged. What was learned before stays.
        """

    def scores(self, batch: Batch) -> Tensor:
        """Return float32 [B, C], higher is likelier. Row b depends on clip b alone.

        Raises:
            ValueError: Nothing was learned yet, or the shape differs from what was learned.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of everything that was learned. Options are not part of it."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by the `state_dict` of a head with the same options."""


@runtime_checkable
class ReplaysExemplars(Protocol):
    """A head that keeps clips of earlier tasks, as rows of the table of clips.

    Attributes:
        exemplars: int64 [M]. The next task's `memory` has exactly these clips. Without exemplars
            there is no NME.
    """

    @property
    def exemplars(self) -> Tensor: ...

    def nearest(self, batch: Batch) -> Tensor:
        """Return float32 [B, C], similarities to the class means of the exemplars (NME)."""


@runtime_checkable
class LimitsClasses(Protocol):
    """A head that cannot learn any number of classes, such as one whose exemplars they share."""

    def check_classes(self, classes: int) -> None:
        """Refuse, before the first task, a number of classes that a later task would reach.

        Raises:
            ValueError: The classes are too many; the message names the option to change.
        """


@runtime_checkable
class HasInferenceOptions(Protocol):
    """A head with options that decide its scores alone, and nothing that it learns.

    Attributes:
        inference_options: Names of these options. Heads that differ in these alone learn the same
            state, and each can resume from another's.
    """

    @property
    def inference_options(self) -> Sequence[str]: ...


@runtime_checkable
class ReportsDiagnostics(Protocol):
    """A head that reports figures about its last training.

    Attributes:
        diagnostics: Figures by name. They are not part of the state.
    """

    @property
    def diagnostics(self) -> Mapping[str, float]: ...


@runtime_checkable
class HasModules(Protocol):
    """A head whose scores are computed by modules, whose costs are counted one by one."""

    def modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Yield the modules that the head has learned, each with the name of its part.

        `network` is what `Network.suffix` returned; its stages and grafts are counted apart. The
        outputs of `encoder`, where there is one, are the vectors of clips. Other names are free,
        such as `experts` and `classifier`, and may repeat. No module contains another one. There
        are none before the first task, and none of a part that is off. What a head computes
        outside of them counts as its classifier.
        """


class Network(Protocol):
    """A frozen network, as a head that changes it sees it.

    Attributes:
        stages: Names of the stages, in order.
        frames: T.
    """

    frames: int

    @property
    def stages(self) -> Sequence[str]: ...

    def find(self, name: str) -> str:
        """Return the stage or feature that a name of `Head.reads` means in this network."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a feature, for one frame."""

    def time_steps(self, name: str) -> int:
        """Return the number of time steps of a feature, T but in networks of 3D convolutions."""

    def module(self, stage: str) -> nn.Module:
        """Return the frozen module of a stage, to put a graft around; see `varve.heads.grafts`."""

    def graft(self, name: str) -> Callable[..., nn.Module]:
        """Return `build(inner, **options)` of the registered graft of a name.

        Raises:
            ValueError: There is none; the message lists those there are.
        """

    def suffix(
        self,
        changes: Mapping[str, "nn.Module | Callable[[nn.Module], nn.Module]"],
        after: str,
        keep: Sequence[str] = (),
        unfreeze: Sequence[str] = (),
    ) -> nn.Module:
        """Return the part of the network after a feature, with changed stages.

        Args:
            changes: By stage: a module that replaces it, or a function that makes one from the
                stage's module (from the trainable copy, where the stage is unfrozen).
            after: The feature that the returned module takes, [B, T, ...].
            keep: Stages whose outputs it returns, as a dict; by default the last one's alone.
            unfreeze: Stages to train; the returned module has copies of them.

        Returns:
            The module. Its `stages` are those after the feature, in order.
        """


@runtime_checkable
class FineTunesBackbone(Protocol):
    """A head that trains a part of the network.

    Attributes:
        fine_tunes: Whether it does, with the options that it was built with. If not, it needs no
            `attach`.
    """

    @property
    def fine_tunes(self) -> bool: ...

    def attach(self, network: Network) -> None:
        """Receive the network, before any other call."""


@runtime_checkable
class UsesTeacher(Protocol):
    """A head that distills from the network as the previous task left it (the teacher).

    From the second task on, the clips of a task and of its memory have the teacher's outputs as
    features "teacher STAGE". They are computed once, stored with the store's features, and read in
    every epoch.

    Attributes:
        teacher_stages: Names of stages, as `Network.find` knows them.
        suffix: The network as trained so far: a module that `Network.suffix` returned.
    """

    @property
    def teacher_stages(self) -> Sequence[str]: ...

    @property
    def suffix(self) -> nn.Module: ...


class Routing(NamedTuple):
    """The experts that clips were routed to. Experts are numbered in the order of their tasks.

    Attributes:
        experts: int64 [B, S], the selected experts by descending weight.
        weights: float32 [B, S], each expert's share in the prediction.
        nearest: int64 [B, S], the expert's class whose anchor is nearest.
        similarities: float32 [B, S], the cosine to that anchor.
    """

    experts: Tensor
    weights: Tensor
    nearest: Tensor
    similarities: Tensor


@runtime_checkable
class Routes(Protocol):
    """A head that weighs experts by a clip's nearest anchors.

    Attributes:
        experts: Number of experts so far; 0 where it was built without.
    """

    @property
    def experts(self) -> int: ...

    def routing(self, batch: Batch) -> Routing:
        """Return the experts of each clip, with their weights."""

    def scores_with(self, batch: Batch, weights_BK: Tensor) -> Tensor:
        """Return the scores with other weights of all experts, float32 [B, C]."""


def _common(name: str, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=type(default))


WHITEN = _common("whiten", "")
VIEWS, CROPS = _common("views", 1), _common("crops", 1)
COMMON = (WHITEN, VIEWS, CROPS)
CROP_COUNTS = (1, 5)


def options_of(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of a head by their flat names, with defaults and types.

    A parameter whose default is a frozen dataclass is an option group, such as
    `varve.heads.parts.training.OptimConfig`; it stands for its fields, and a head overrides a
    default of the group by its own instance. `**options` of a class stands for the options of its
    base class.

    Every head has these options besides, which no class needs to declare: `whiten`, "" or "first",
    whether it learns features that are whitened by the clips of the first task (see
    `varve.heads._whitening`); `views`, the number of views of a clip in training, of which one is
    drawn in every epoch, the plain one among them; and `crops`, 1, or 5 for scores that are means
    over the centre and the corners of the picture.
    """
    parameters = _parameters(build)
    plain = {name: p for name, p in parameters.items() if not _is_group(p)}
    options: dict[str, inspect.Parameter] = {}
    for parameter in parameters.values():
        if parameter.name in plain:
            options[parameter.name] = parameter
            continue
        for field in fields(parameter.default):
            option = inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(parameter.default, field.name),
                annotation=field.type,
            )
            options[field.name] = plain.get(field.name, option)
    return {**options, **{option.name: option for option in COMMON if option.name not in options}}


def check_options(build: Callable[..., Any], options: Mapping[str, Any], name: str = "") -> None:
    """Check that a head has all these options.

    Raises:
        ValueError: It lacks one; the message lists those it has.
    """
    known = options_of(build)
    if unknown := sorted(set(options) - set(known)):
        listed = ", ".join(f"{option}={known[option].default!r}" for option in known)
        name = name or getattr(build, "__name__", "head")
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {listed or 'none'}")


def build_head(build: Callable[..., Head], options: Mapping[str, Any] = {}, name: str = "") -> Head:
    """Build a head from flat options, such as {"lr": 0.005}.

    Args:
        build: A class or function that returns a head.
        options: Values by the names of `options_of`.
        name: Name of the head for messages.

    Raises:
        ValueError: There is no such option, or a value is refused.
    """
    check_options(build, options, name)
    parameters = _parameters(build)
    views, crops = (options.get(option.name, 1) for option in (VIEWS, CROPS))
    if views < 1 or crops not in CROP_COUNTS:
        raise ValueError(f"{views=}, {crops=}: give the plain view at least, and 1 or 5 crops")
    plain = {name for name, parameter in parameters.items() if not _is_group(parameter)}
    arguments = {name: value for name, value in options.items() if name in plain}
    for parameter in parameters.values():
        if parameter.name not in plain:
            names = {field.name for field in fields(parameter.default)} & set(options) - plain
            if names:
                values = {name: options[name] for name in names}
                arguments[parameter.name] = replace(parameter.default, **values)
    whiten = options.get(WHITEN.name, WHITEN.default) if WHITEN.name not in parameters else ""
    if whiten not in _whitening.CHOICES:
        raise ValueError(f"no {whiten=}; choose from '' and 'first'")
    return (_whitening.whitened(build) if whiten else build)(**arguments)


def _parameters(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function, and of base classes behind `**options`."""
    parameters = {**inspect.signature(build).parameters}
    for name in [n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]:
        del parameters[name]
        base = build.__base__ if isinstance(build, type) else None
        inherited = _parameters(base or object)
        parameters |= {n: p for n, p in inherited.items() if n not in parameters}
    return parameters


def _is_group(parameter: inspect.Parameter) -> bool:
    return is_dataclass(parameter.default) and not isinstance(parameter.default, type)
