"""Backbones: frozen networks as chains of named stages.

This file is the contract; every other module here is one family of networks, found by its file
name. A family module has two functions:

    networks() -> Sequence[str]
        Names of the networks it knows ("ViT-B-16", "resnet18"). Cheap: no library of networks is
        imported for it.
    build(network: str, weights: str, precision: torch.dtype) -> Backbone
        The network with its weights, in eval mode, without gradients, as a chain. `weights` is a
        published tag, the path of a weight file or `random-SEED`; _weights.py reads all three.

Shapes: N frames, S = size in pixels, L tokens (class token first), C channels, H x W a grid.
A chain starts from uint8 pictures [N, S, S, 3] RGB; its first stage normalises them. One that
listens starts from float32 samples [N, samples].
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.pipeline.backbones._precision import slower as slower
from varve.pipeline.config import Picture, Sound
from varve.pipeline.registry import available, variant
from varve.stores.identity import digest

if TYPE_CHECKING:
    from varve.pipeline.backbones._graft import Suffix

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
GRAFT = "graft"
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {}  # by what decides them


@dataclass(frozen=True)
class Stage:
    """One named step of a chain: a module from one tensor to one tensor.

    Attributes:
        name: `stem`, `blocks.3.attn`, `layer2.1`, `proj`...
        module: Takes the previous stage's output. In eval mode, frozen, in the run's precision.
        code: What the module computes, by name and version; changed when the code's values change.
        options: JSON; whatever decides the output besides code and parameters (heads, eps,
            activation, mean and std...).
        form: Of the output: `tokens` [N, L, C] with `prefix` class tokens first, `map`
            [N, C, H, W], or `vector` [N, C].
        token_wise: Each output token depends on the input token in its place alone (with
            `frames`, on those in its place in the clip's frames). A vector made
            of the class token alone counts as standing in that token's place.
        prefix: Class (and register) tokens before the patch tokens; `tokens` only.
        frames: T of a module that looks across the frames of a clip; 0 where it looks at each
            frame alone.
        original: The stage whose place a method's module has taken; None for the network's own.
        sealed: What it is now it stays: its identity and digest are taken once.
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
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.structure is None:
            object.__setattr__(self, "structure", structure_of(self.module))

    def identity(self) -> dict[str, Any]:
        """What the module computes besides its parameters, as JSON.

        `code` and `options`; and where something was put into the module since it was loaded (a
        part, an attribute, another forward), `altered`, what it is now.

        Raises:
            ValueError, TypeError: It holds what no key can name, such as a hook.
        """
        from varve.pipeline.backbones._identity import identity

        if self.sealed and "identity" in self._known:
            return dict(self._known["identity"])
        if self.code != GRAFT:
            found: dict[str, Any] = {"code": self.code, "options": dict(self.options)}
            if self.altered:
                found["altered"] = identity(self.module)
        else:
            known, stage = [], self.original
            while stage is not None:
                known.append((stage.module, stage.identity()))
                stage = stage.original
            found = {"code": GRAFT, "options": identity(self.module, known)}
        self._known["identity"] = found
        return dict(found)

    @property
    def altered(self) -> bool:
        """Whether something was put into the module since it was loaded."""
        return bool(structure_of(self.module) != self.structure)

    @property
    def parameters(self) -> str:
        """Digest of the module's parameters and buffers as they are now."""
        if not (self.sealed and "parameters" in self._known):
            self._known["parameters"] = parameter_digest(self.module)
        held: str = self._known["parameters"]
        return held


@dataclass(frozen=True, repr=False)
class Backbone:
    """A chain of stages over pictures, or sounds, of one kind.

    Attributes:
        name: NAME:TAG as the store calls it ("ViT-B-16:openai"; a weight file by its stem).
        network: The bare network name.
        precision: Of parameters and activations.
        channels_last: Memory format that map-shaped activations run in.
        text: The text tower of a CLIP network, else None.
    """

    name: str
    network: str
    stages: tuple[Stage, ...]
    picture: Picture | Sound
    precision: torch.dtype
    channels_last: bool = False
    text: "TextTower | None" = None

    def __repr__(self) -> str:
        precision = str(self.precision).removeprefix("torch.")
        grafts = [stage.name for stage in self.stages if stage.original is not None]
        more = f", changed at {', '.join(grafts)}" if grafts else ""
        return f"<Backbone {self.name}: {len(self.stages)} stages in {precision}{more}>"

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    @property
    def changed(self) -> list[str]:
        """Stages that are no longer the network's own: grafted, or unfrozen and trained since."""
        found = []
        for stage in self.stages:
            own = stage
            while own.original is not None:
                own = own.original
            if own is not stage and self.describe(own) != self.describe(stage):
                found.append(stage.name)
        return found

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: There is none; the message lists the stages.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"{self.name} has no stage {name!r}; it has {', '.join(self.stage_names)}")

    def keys(self, frames_key: str) -> dict[str, str]:
        """Fingerprint of every stage's output over the frames of `frames_key`.

        A chain: each key is made of the previous stage's, so a change in one stage renames it
        and all that follow, and none before it.
        """
        keys, key = {}, frames_key
        for stage in self.stages:
            key = digest({"input": key, **self.describe(stage)})
            keys[stage.name] = key
        return keys

    def describe(self, stage: Stage) -> dict[str, Any]:
        """Everything that decides the stage's output for a given input, as JSON."""
        return {
            "stage": stage.name,
            **stage.identity(),
            "parameters": stage.parameters,
            "precision": str(self.precision).removeprefix("torch."),
        }

    def graft(self, stage: str, module: nn.Module) -> "Backbone":
        """A backbone with `module` in a stage's place. This one stays as it is.

        The module takes the stage's input and gives an output of the stage's form. It may say
        `frames` (T, where it looks across the frames of a clip), and `token_wise`; see
        `varve.heads.grafts`. Column keys from this stage on follow its code, attributes and
        parameters.

        Raises:
            ValueError: No such stage, or the module's output does not fit the stages after it.
            TypeError: `module` is no module, or holds what no key can name.
        """
        from varve.pipeline.backbones import _graft

        return _graft.graft(self, stage, module)

    def unfreeze(self, *stages: str) -> "Backbone":
        """A backbone with trainable copies of some of its stages. This one stays as it is.

        The keys stay what they are until training changes a parameter.

        Raises:
            ValueError: No such stage.
        """
        from varve.pipeline.backbones import _graft

        return _graft.unfreeze(self, stages)

    def suffix(self, after: str, keep: Sequence[str] = ()) -> "Suffix":
        """The rest of the chain as a module to train on a cached feature.

        Args:
            after: The feature it starts from, as given to `--keep`: STAGE or STAGE:REDUCTION.
            keep: Stages whose outputs to give, by name; by default the last one's alone.

        Raises:
            ValueError: No such stage, or a reduction that cannot feed what follows.
        """
        from varve.pipeline.backbones import _graft

        return _graft.Suffix(self, after, keep)

    def run(
        self,
        x: Tensor,
        keep: Iterable[str],
        start: str | None = None,
        calls: "Counter[str] | None" = None,
    ) -> dict[str, Tensor]:
        """Run the chain as far as the last stage in `keep`.

        Args:
            x: uint8 pictures [N, S, S, 3] (float32 samples where it listens), or the output of
                stage `start` in any float type: all of it, or some of its tokens where all stages
                that run take each token alone.
            keep: Names of stages whose output is wanted.
            start: The stage after which to begin; None for the pictures.
            calls: Counts the calls of each stage.

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
                    f"{stage.name} looks across clips of {stage.frames} frames, and {len(x)} "
                    "frames are no whole number of them"
                )
            if stage.code == GRAFT and any(x is kept for kept in outputs.values()):
                x = x.clone()  # a method's module may work in place
            x = stage.module(x)
            if calls is not None:
                calls[stage.name] += 1
            if stage.name in wanted:
                outputs[stage.name] = x
        return outputs

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one frame's output of every stage. Nothing is computed: shapes alone pass.

        A network that is loaded again, as every run of an ablation does, has them from the first.
        """
        if any(stage.code == GRAFT or stage.altered for stage in self.stages):
            return self._traced()
        parts = [
            [stage.name, stage.identity(), repr(stage.structure),
             [[name, list(x.shape)] for name, x in tensors_of(stage.module).items()]]
            for stage in self.stages
        ]  # fmt: skip
        key = digest([asdict(self.picture), parts])
        if key not in _SHAPES:
            _SHAPES[key] = self._traced()
        return dict(_SHAPES[key])

    def _traced(self) -> dict[str, tuple[int, ...]]:
        frames = max(stage.frames for stage in self.stages) or 1
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            dtype = getattr(torch, self.picture.dtype)
            pictures = torch.zeros(frames, *self.picture.shape, dtype=dtype)
            outputs = self.run(pictures, self.stage_names)
        return {name: tuple(output.shape[1:]) for name, output in outputs.items()}

    def _pictures(self, x: Tensor) -> Tensor:
        own, dtype = self.picture, str(x.dtype).removeprefix("torch.")
        if dtype != own.dtype or tuple(x.shape[1:]) != own.shape:
            kind = "pictures" if isinstance(own, Picture) else "sounds"
            raise ValueError(
                f"{self.name} starts from {own.dtype} {kind} [N, {', '.join(map(str, own.shape))}],"
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
                f"after {stage.name} {self.name} goes on from {stage.form} [N, "
                f"{', '.join(map(str, shape))}], not from {str(x.dtype).removeprefix('torch.')} "
                f"{list(x.shape)}"
                + (f"; {mixing[0]} needs all of it" if mixing and x.ndim == 3 else "")
            )
        # The last bits follow memory format and alignment, and what was stored comes back in any:
        # a copy lies as the stage itself would have left it.
        nhwc = self.channels_last and stage.form == "map"
        form = torch.channels_last if nhwc else torch.contiguous_format
        return x.to(self.precision, memory_format=form, copy=True)


class TextTower(Protocol):
    """Class prompts to features, for networks that have a text encoder.

    Its parameters are loaded when first needed and always float32: building a backbone for its
    pictures costs nothing of it.
    """

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """float32 [len(prompts), D], L2-normalised, in the space of the pictures' last vector."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides the features of given prompts, as JSON."""


_INTERNAL = {*vars(nn.Module())}
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def structure_of(module: nn.Module) -> list[Any]:
    """A module's parts, their plain attributes and whether they have hooks: a quick look.

    Compared within a run of Python, to see whether a module is still as it was loaded.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(inner) for inner in value)
        return value if isinstance(value, _PLAIN) else type(value).__qualname__

    return [
        (
            path,
            type(part).__qualname__,
            {name: plain(v) for name, v in sorted(vars(part).items()) if name not in _INTERNAL},
            bool(part._forward_hooks or part._forward_pre_hooks),
        )
        for path, part in module.named_modules()
    ]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: those that a state dict leaves out, too."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def parameter_digest(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors_of(module).items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(flat.numpy())
    return total.hexdigest()


def load(name: str, precision: torch.dtype = torch.float32) -> Backbone:
    """Build the backbone that a NAME:TAG names.

    Args:
        name: `ViT-B-16:openai`, `resnet18:IMAGENET1K_V1`, `NAME:/path/file.safetensors`,
            `NAME:random-SEED`.
        precision: torch.float32, bfloat16 or float16.

    Raises:
        ValueError: No family knows the network, or the weights do not fit it.
        OSError: The weights cannot be had (no file, or no hub to ask).
    """
    network, _, weights = name.partition(":")
    families = {family: variant("backbones", family) for family in available("backbones")}
    known = {one: module for module in families.values() for one in module.networks()}
    if network not in known:
        near = difflib.get_close_matches(network, known, n=4)
        raise ValueError(
            f"no family knows the network {network!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else ".")
            + f" Asked were {', '.join(families)}; names are those of open_clip (ViT-B-16), "
            "torchvision (resnet18) and timm (vit_small_patch14_dinov2)"
        )
    if not weights:
        raise ValueError(
            f"backbone {name!r} names no weights; give {network}:TAG (a published tag), "
            f"{network}:/path/file.safetensors, or {network}:random-0 to try without"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision}; choose from float32, bfloat16, float16")
    built: Backbone = known[network].build(network, weights, precision)
    return built
