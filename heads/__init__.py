"""Heads: methods that learn classes task by task, from cached features.

This file is the contract; every other module here is one head, found by its file name, with
`build(**options) -> Head`, whose options have defaults and are JSON values. A head sees tensors
only: it imports torch, numpy and faiss, and nothing of `stores` or `pipeline`. What several heads
share is in `heads/parts`, what is put into a network in `heads/grafts`. A head that keeps
exemplars, changes the network or routes among experts has what the second group of protocols asks.

Shapes: N clips, B clips of a batch, T frames a clip, D feature width, C classes learned so far,
K experts.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from varve.heads.parts.clips import Batch, Clips


def options_of(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a head by name; `**more` of a class stands for those of its base class."""
    found = {**inspect.signature(build).parameters}
    for name in [n for n, one in found.items() if one.kind is inspect.Parameter.VAR_KEYWORD]:
        del found[name]
        base = build.__base__ if isinstance(build, type) else None
        found |= {n: one for n, one in options_of(base or object).items() if n not in found}
    return found


@dataclass(frozen=True)
class Task:
    """What a head learns from at one time.

    Attributes:
        clips: The task's own. Those of earlier tasks are gone.
        number: 0 for the first. What is drawn in `learn` depends on a head's `seed` and on this
            alone, so that learning can go on from a state with the same numbers.
        text: float32 [len(classes), W], the text features of `classes`, made unit; None where the
            network has no text tower.
        memory: The clips that `Rehearses.exemplars` asked for; None for other heads.
        on_epoch_end: Told of every finished epoch: how many are done, of how many, and the mean
        loss.
        key: Of the columns that the clips come from. What is kept to be compared with clips later,
            such as anchors, can say with it what it is of.
    """

    clips: Clips
    number: int = 0
    text: Tensor | None = None
    memory: Clips | None = None
    on_epoch_end: Callable[[int, int, float], object] = lambda done, epochs, loss: None
    key: str = ""

    @property
    def classes(self) -> list[int]:
        """Of the task's clips, ascending."""
        return sorted(set(self.clips.labels.tolist()))


class Head(Protocol):
    """A classifier whose set of classes may grow on every `learn`.

    Column j of `scores` is always `classes[j]`: columns are appended, in ascending order of label
    within one `learn`, and never moved. Equal calls give equal numbers, whatever the state of any
    global random generator.

    Attributes:
        classes: Learned so far.
        reads: The features that it needs of a clip: a stage, or stage:reduction. "vector" is the
            network's own last vector, before a classifier of its own; "blocks.-1" is the last
            block of whatever network there is, with one number more than it has blocks the stage
            before them; "blocks.-2.attn" the state after the attention of the last but one.
            "sound" is the last vector of the store's network that listens, and NETWORK/FEATURE
            another network's.
        trainable: How many numbers gradient descent has trained so far; 0 for closed forms.
    """

    classes: list[int]

    @property
    def reads(self) -> Sequence[str]: ...

    @property
    def trainable(self) -> int: ...

    def learn(self, task: Task) -> None:
        """Absorb one task's clips; classes known already are updated.

        Nothing of the task is kept but what `state_dict` gives, and nothing of it is modified.

        Raises:
            ValueError: The task does not fit what was learned before, a feature is not finite, or
                the training ended in numbers that are not. What was learned before stays.
        """

    def scores(self, batch: Batch) -> Tensor:
        """Return float32 [B, C], higher is likelier. Row b depends on clip b alone.

        Raises:
            ValueError: Nothing was learned yet, or the shape is another than was learned.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All that was learned, as tensors of its own. Options are not part of it."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of a head built with the same options, whose `state_dict` this was."""


@runtime_checkable
class ReplaysExemplars(Protocol):
    """A head that keeps clips of earlier tasks: their rows in the table of clips.

    Attributes:
        exemplars: int64 [M]. The next task's `memory` has exactly these. Where there are none
            after a task, there is no NME.
    """

    @property
    def exemplars(self) -> Tensor: ...

    def nearest(self, batch: Batch) -> Tensor:
        """As `scores`, by the nearest mean of exemplars (NME)."""


@runtime_checkable
class HasInferenceOptions(Protocol):
    """A head with options that decide its scores and nothing of what it learns.

    Attributes:
        answering: Their names. Heads that differ in these alone learn the same state, and each can
            go on from another's.
    """

    @property
    def inference_options(self) -> Sequence[str]: ...


@runtime_checkable
class ReportsDiagnostics(Protocol):
    """A head with something to say of how it learned its last task.

    Attributes:
        diagnostics: Figures by name. They are no part of its state.
    """

    @property
    def diagnostics(self) -> Mapping[str, float]: ...


class Network(Protocol):
    """A frozen network, as who changes it sees it.

    Attributes:
        stages: Names in order.
        frames: T.
    """

    frames: int

    @property
    def stages(self) -> Sequence[str]: ...

    def find(self, name: str) -> str:
        """The stage or feature that a name of `Head.reads` means here."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a feature, one frame's."""

    def module(self, stage: str) -> nn.Module:
        """The frozen module itself, to put a graft around; see `varve.heads.grafts`."""

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
        """The network after a feature, with modules of one's own in place of stages.

        Args:
            changes: By stage: a module, or what makes one of the stage's own, of the copy to be
                trained where it is unfrozen.
            after: The feature that the module takes, [B, T, ...].
            keep: Stages whose outputs it gives, as a dict; by default the last one's alone.
            unfreeze: Stages to be trained themselves; the module has copies of them.

        Returns:
            The module; its `stages` are those after the feature, in order.
        """


@runtime_checkable
class FineTunesBackbone(Protocol):
    """A head that trains a part of the network.

    Attributes:
        fine_tunes: Whether it does, with the options that it was built with. If not, there is no
        need
            to attach it.
    """

    @property
    def fine_tunes(self) -> bool: ...

    def attach(self, network: Network) -> None:
        """Told of the network before anything else is called."""


@runtime_checkable
class UsesTeacher(Protocol):
    """A head that learns with what the network, as the task before left it, makes of the clips.

    From the second task on the clips of a task and of its memory have these outputs as features
    "old STAGE": computed once, kept with the store's features, and read in every epoch.

    Attributes:
        remembers: Names of stages, as `Network.find` knows them.
        suffix: The network as it is now: a module that `Network.suffix` gave, trained since.
    """

    @property
    def teacher_stages(self) -> Sequence[str]: ...

    @property
    def suffix(self) -> nn.Module: ...


class Routing(NamedTuple):
    """How clips were routed. Experts are in the order of their tasks.

    Attributes:
        experts: int64 [B, S], the experts that were asked, by descending weight.
        weights: float32 [B, S], each expert's share in the prediction.
        nearest: int64 [B, S], the class of the expert's whose anchor is nearest.
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
        experts: How many it has so far; 0 where it was built without.
    """

    @property
    def experts(self) -> int: ...

    def routing(self, batch: Batch) -> Routing: ...
