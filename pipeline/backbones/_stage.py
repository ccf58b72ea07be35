"""Chains of stages: the values of this folder, and what decides their cache keys.

Shapes: N frames, S picture size in pixels, L tokens (class token first), C channels, H x W a grid.
Frames are in order, clip by clip. After a temporal module that merges frames, N counts time steps:
`Backbone.time_steps` of each clip.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.pipeline.backbones._names import structure_of
from varve.pipeline.backbones._prompts import TextTower
from varve.pipeline.backbones._reductions import reduce
from varve.pipeline.backbones._weights import parameter_digest, tensors_of
from varve.pipeline.config import Picture, Sound
from varve.stores.digests import digest

if TYPE_CHECKING:
    from varve.pipeline.backbones._suffix import Suffix

GRAFT = "graft"
CLASSIFIER = "fc"  # scores of the classes that a network was trained on
_CLIP_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {}  # by digest of what decides them


@dataclass(frozen=True)
class Stage:
    """One named step of a chain: a module from one tensor to one tensor.

    Attributes:
        name: `stem`, `blocks.3.attn`, `layer2.1`, `proj`...
        module: Takes the previous stage's output. In eval mode, frozen, in the run's precision.
        code: Name and version of the computation ("vit_attn/1"); a new version where values change.
        options: JSON of all that decides the output besides code and parameters (heads, eps,
            activation, mean and std...).
        form: Form of the output: `tokens` [N, L, C] with `prefix` class tokens first, `map`
            [N, C, H, W], or `vector` [N, C].
        token_wise: Whether each output token depends on the input token of the same index alone
            (with `frames`, on the tokens of that index in all frames of the clip). A vector made
            of the class token alone counts as token-wise.
        prefix: Number of class (and register) tokens before the patch tokens; `tokens` only.
        square: Whether the patch tokens form a square grid; `tokens` only.
        frames: T of a temporal module, which mixes the T frames (or time steps) of a clip that it
            is given, and may return fewer; 0 where each frame is computed alone.
        original: The stage that a graft replaces; None for the network's own.
        sealed: Whether the module will not change any more: its digests are computed once.
        structure: The module's parts and attributes as they were loaded; see `structure_of`.
    """

    name: str
    module: nn.Module
    code: str
    options: Mapping[str, Any]
    form: str
    token_wise: bool = False
    prefix: int = 0
    frames: int = 0
    original: "Stage | None" = None
    sealed: bool = False
    structure: Any = field(default=None, repr=False, compare=False)
    square: bool = True
    _digests: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.structure is None:
            object.__setattr__(self, "structure", structure_of(self.module))

    def identity(self) -> dict[str, Any]:
        """Return all that decides the output besides the parameters, as JSON.

        These are `code` and `options`; and `altered`, the fingerprint of the module, where a part,
        an attribute or another forward was put into it since it was loaded.

        Raises:
            ValueError: The module has hooks, or is compiled.
            TypeError: It contains a value that no key can name.
        """
        from varve.pipeline.backbones._fingerprint import identity

        if self.sealed and "identity" in self._digests:
            return dict(self._digests["identity"])
        if self.code != GRAFT:
            described: dict[str, Any] = {"code": self.code, "options": dict(self.options)}
            if self.altered:
                described["altered"] = identity(self.module)
        else:
            known, stage = [], self.original
            while stage is not None:
                known.append((stage.module, stage.identity()))
                stage = stage.original
            described = {"code": GRAFT, "options": identity(self.module, known)}
        self._digests["identity"] = described
        return dict(described)

    @property
    def altered(self) -> bool:
        """True if a part or an attribute of the module has changed since it was loaded."""
        return bool(structure_of(self.module) != self.structure)

    @property
    def parameters(self) -> str:
        """SHA-256 of the module's parameters and buffers as they are now."""
        if not (self.sealed and "parameters" in self._digests):
            self._digests["parameters"] = parameter_digest(self.module)
        sha: str = self._digests["parameters"]
        return sha


@dataclass(frozen=True, repr=False)
class Backbone:
    """A frozen network as a chain of stages, from pictures or sounds to features.

    Attributes:
        name: NAME:TAG as the store calls it ("ViT-B-16:openai"; a weight file by its stem).
        network: Name of the network without its weights.
        stages: The chain, first stage first.
        picture: Size and preprocessing of the pictures, or rate and length of the sounds.
        precision: Number format of parameters and activations.
        channels_last: Whether map-shaped activations run in channels-last memory.
        text: Text tower of a CLIP network, else None.
    """

    name: str
    network: str
    stages: tuple[Stage, ...]
    picture: Picture | Sound
    precision: torch.dtype
    channels_last: bool = False
    text: TextTower | None = None

    def __repr__(self) -> str:
        precision = str(self.precision).removeprefix("torch.")
        grafts = [stage.name for stage in self.stages if stage.original is not None]
        changed = f", changed at {', '.join(grafts)}" if grafts else ""
        return f"<Backbone {self.name}: {len(self.stages)} stages in {precision}{changed}>"

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages, in chain order."""
        return [stage.name for stage in self.stages]

    @property
    def changed(self) -> list[str]:
        """Names of the stages that differ from the published network: grafted, or trained."""
        changed = []
        for stage in self.stages:
            published = stage
            while published.original is not None:
                published = published.original
            if published is not stage and self.describe(published) != self.describe(stage):
                changed.append(stage.name)
        return changed

    @property
    def default_stage(self) -> Stage:
        """The stage that is kept by default: the last vector before a classifier.

        The scores of a classifier's own classes (`fc`) are taken only where there is no other.

        Raises:
            ValueError: No stage gives a vector.
        """
        vectors = [stage for stage in self.stages if stage.form == "vector"]
        if not vectors:
            raise ValueError(
                f"{self.name} has no stage that gives one vector a frame. Name what to keep, as in "
                f"--keep {self.stage_names[-1]}:REDUCTION"
            )
        features = [stage for stage in vectors if stage.name != CLASSIFIER]
        return (features or vectors)[-1]

    def stage(self, name: str) -> Stage:
        """Return the stage of that name.

        Raises:
            ValueError: There is none; the message lists the stages.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"{self.name} has no stage {name!r}; it has {', '.join(self.stage_names)}")

    def keys(self, frames_key: str) -> dict[str, str]:
        """Return the fingerprint of every stage's output over the frames of `frames_key`.

        Each key is a digest of the previous stage's key and of the stage: a change in one stage
        gives other keys to it and to all that follow, and to none before it.
        """
        keys, key = {}, frames_key
        for stage in self.stages:
            key = digest({"input": key, **self.describe(stage)})
            keys[stage.name] = key
        return keys

    def describe(self, stage: Stage) -> dict[str, Any]:
        """Return everything that decides the stage's output for a given input, as JSON."""
        return {
            "stage": stage.name,
            **stage.identity(),
            "parameters": stage.parameters,
            "precision": str(self.precision).removeprefix("torch."),
        }

    def graft(self, stage: str, module: nn.Module) -> "Backbone":
        """Return a backbone in which `module` replaces a stage. This one stays as it is.

        The module takes the stage's input and gives an output of the stage's form. It may have the
        attributes `frames` (T of a temporal module) and `token_wise`; see `varve.heads.grafts`.
        Column keys from this stage on follow its code, attributes and parameters.

        Raises:
            ValueError: No such stage, or the module's output does not fit the stages after it.
            TypeError: `module` is no module, or contains a value that no key can name.
        """
        from varve.pipeline.backbones import _graft

        return _graft.graft(self, stage, module)

    def unfreeze(self, *stages: str) -> "Backbone":
        """Return a backbone with trainable copies of some of its stages. This one stays as it is.

        The keys stay the same until training changes a parameter.

        Raises:
            ValueError: No such stage.
        """
        from varve.pipeline.backbones import _graft

        return _graft.unfreeze(self, stages)

    def suffix(self, after: str, keep: Sequence[str] = ()) -> "Suffix":
        """Return the rest of the chain as a module to train on a cached feature.

        Args:
            after: The feature it starts from, as given to `--keep`: STAGE or STAGE:REDUCTION.
            keep: Names of the stages whose outputs to return; by default the last one's alone.

        Raises:
            ValueError: No such stage, or a reduction that cannot feed what follows.
        """
        from varve.pipeline.backbones._suffix import Suffix

        return Suffix(self, after, keep)

    def run(
        self,
        x: Tensor,
        keep: Iterable[str],
        start: str | None = None,
        calls: "Counter[str] | None" = None,
    ) -> dict[str, Tensor]:
        """Run the chain as far as the last stage in `keep`.

        Args:
            x: uint8 pictures [N, S, S, 3] (float32 samples [N, samples] for an audio backbone), or
                the output of stage `start` in any float type: all of it, or some of its tokens
                where all stages that run are token-wise.
            keep: Names of the stages whose output to return.
            start: The stage after which to begin; None to begin with the pictures.
            calls: Counter of the calls of each stage.

        Returns:
            The outputs by stage name, in the run's precision. They share no memory with `x`.

        Raises:
            ValueError: An unknown stage, one that comes before `start`, or an `x` of another
                shape or type than the start has.
        """
        wanted = set(keep)
        names = self.stage_names
        for name in wanted | ({start} if start else set()):
            self.stage(name)
        first = 0 if start is None else names.index(start) + 1
        early = [name for name in wanted if names.index(name) < first]
        if early:
            raise ValueError(f"{', '.join(early)} come no later than the start, {start}")
        last = max((names.index(name) + 1 for name in wanted), default=first)
        x = self._pictures(x) if start is None else self._resumed(x, first, last)
        outputs: dict[str, Tensor] = {}
        for stage in self.stages[first:last]:
            if stage.frames and len(x) % stage.frames:
                raise ValueError(
                    f"{stage.name} mixes the frames of clips of {stage.frames} frames, and "
                    f"{len(x)} frames are no whole number of clips"
                )
            if stage.code == GRAFT and any(x is kept for kept in outputs.values()):
                x = x.clone()  # a method's module may work in place
            x = stage.module(x)
            if calls is not None:
                calls[stage.name] += 1
            if stage.name in wanted:
                outputs[stage.name] = x
        return outputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one frame's output of every stage, without the leading axis N."""
        return {name: shape[1:] for name, shape in self._clip_shapes.items()}

    @property
    def clip_frames(self) -> int:
        """T of a chain with temporal modules; 1 where each frame is computed alone."""
        return next((stage.frames for stage in self.stages if stage.frames), 1)

    def time_steps(self, stage: str, frames: int) -> int:
        """Return the number of time steps that a stage gives for a clip of `frames` frames.

        It is `frames`, unless a stage merges the frames of a clip, as 3D convolutions do.
        """
        return frames * self._clip_shapes[stage][0] // self.clip_frames

    @cached_property
    def _clip_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stage's output for one clip, [time steps, ...].

        No number is computed: shapes alone pass through the chain. They are cached for networks
        that are loaded several times.
        """
        if any(stage.code == GRAFT or stage.altered for stage in self.stages):
            return self._traced()
        parts = [
            [stage.name, stage.identity(), repr(stage.structure),
             [[name, list(x.shape)] for name, x in tensors_of(stage.module).items()]]
            for stage in self.stages
        ]  # fmt: skip
        key = digest([asdict(self.picture), parts])
        if key not in _CLIP_SHAPES:
            _CLIP_SHAPES[key] = self._traced()
        return dict(_CLIP_SHAPES[key])

    def feature_shape(self, stage: Stage, reduction: str) -> tuple[int, ...]:
        """Return the shape of one frame's feature: a stage's output, reduced. Computes no number.

        Raises:
            ValueError: The reduction does not apply to the stage, or mixes frames.
        """
        with FakeTensorMode():
            feature = reduce(torch.zeros(2, *self.shapes[stage.name]), stage, reduction)
        if not feature.ndim or len(feature) != 2:
            raise ValueError(
                f"{stage.name}:{reduction} gives {list(feature.shape)} for 2 frames: a reduction "
                "gives one feature a frame, [N, ...]"
            )
        return tuple(feature.shape[1:])

    def without_text(self) -> "Backbone":
        """Return the backbone without its text tower, to be copied and sent."""
        return with_shapes(replace(self, text=None), self)

    def _traced(self) -> dict[str, tuple[int, ...]]:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            dtype = getattr(torch, self.picture.dtype)
            pictures = torch.zeros(self.clip_frames, *self.picture.shape, dtype=dtype)
            outputs = self.run(pictures, self.stage_names)
        return {name: tuple(output.shape) for name, output in outputs.items()}

    def _pictures(self, x: Tensor) -> Tensor:
        expected, dtype = self.picture, str(x.dtype).removeprefix("torch.")
        if dtype != expected.dtype or tuple(x.shape[1:]) != expected.shape:
            kind = "pictures" if isinstance(expected, Picture) else "sounds"
            axes = ", ".join(map(str, expected.shape))
            raise ValueError(
                f"{self.name} starts from {expected.dtype} {kind} [N, {axes}],"
                f" not from {dtype} {list(x.shape)}"
            )
        return x

    def _resumed(self, x: Tensor, first: int, last: int) -> Tensor:
        stage, shape = self.stages[first - 1], self.shapes[self.stages[first - 1].name]
        fits = x.is_floating_point() and tuple(x.shape[1:]) == shape
        some_tokens = (
            stage.form == "tokens"
            and x.ndim == 3
            and x.shape[2] == shape[1]
            and all(following.token_wise for following in self.stages[first:last])
        )
        if not (fits or (x.is_floating_point() and some_tokens)):
            mixing = [s.name for s in self.stages[first:last] if not s.token_wise]
            raise ValueError(
                f"after {stage.name} {self.name} resumes from {stage.form} [N, "
                f"{', '.join(map(str, shape))}], not from {str(x.dtype).removeprefix('torch.')} "
                f"{list(x.shape)}"
                + (f"; {mixing[0]} needs all of it" if mixing and x.ndim == 3 else "")
            )
        # The last bits depend on memory format and alignment, and a store returns arrays of any.
        # The copy has the layout of the stage's own output.
        nhwc = self.channels_last and stage.form == "map"
        form = torch.channels_last if nhwc else torch.contiguous_format
        return x.to(self.precision, memory_format=form, copy=True)


def with_shapes(new: Backbone, backbone: Backbone) -> Backbone:
    """Give a backbone the shapes of another one, which its stages' outputs have too."""
    new.__dict__["_clip_shapes"] = {
        name: (backbone.time_steps(name, new.clip_frames), *shape)
        for name, shape in backbone.shapes.items()
    }
    return new
