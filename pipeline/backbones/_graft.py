"""Methods' own modules in a chain, and the end of a chain as a module to train.

A graft takes a stage's place; the chain stays a chain, so keys, plans and runs follow by
themselves. Nothing here changes a backbone: each call gives another one.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.pipeline.backbones import GRAFT, Backbone, Stage, tensors_of
from varve.pipeline.backbones._reductions import canonical_reduction, expand, reduce, why_not

NDIM = {"tokens": 3, "map": 4, "vector": 2}


def graft(backbone: Backbone, name: str, module: nn.Module) -> Backbone:
    """See `Backbone.graft`."""
    stage = backbone.stage(name)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: a graft is a torch module, not a {type(module).__name__}")
    _check_registered(name, module)
    frames = _frames(name, module)
    new = Stage(
        name,
        module,
        GRAFT,
        {},
        stage.form,
        stage.token_wise and bool(getattr(module, "token_wise", False)),
        stage.prefix,
        frames,
        stage,
    )
    grafted = _with(backbone, {name: new})
    if _check_shapes(backbone, grafted, new):
        grafted.__dict__["shapes"] = backbone.shapes
    new.identity()  # what no key can name is refused now, and not when the training is over
    _check_token_wise(grafted, new)
    return grafted


def unfreeze(backbone: Backbone, names: Sequence[str]) -> Backbone:
    """See `Backbone.unfreeze`."""
    changes = {}
    for name in names:
        stage = backbone.stage(name)
        # Of a graft with what it stands for, by which its key knows its parts.
        own = _copied(name, stage)
        own.module.requires_grad_(True)
        changes[name] = replace(own, original=own.original or stage, sealed=False)
    return _as_it_is(backbone, changes)


def sealed(backbone: Backbone) -> Backbone:
    """The backbone, which nothing will change any more: its digests are taken once."""
    changes = {}
    for stage in backbone.stages:
        new = replace(stage, sealed=True)
        new._known.update(stage._known if stage.sealed else {})
        changes[stage.name] = new
    return _with(backbone, changes)


def snapshot(backbone: Backbone) -> Backbone:
    """The backbone as it is now, in eval mode: training that goes on changes nothing of it.

    Raises:
        ValueError: A module says that it is token-wise, and is not.
    """
    changes = {}
    for stage in backbone.stages:
        known = {"identity": stage.identity(), "parameters": stage.parameters}
        live = any(t.requires_grad for t in tensors_of(stage.module).values())
        if stage.original is not None or live or stage.module.training:
            module = _copied(stage.name, stage.module).eval().requires_grad_(False)
            new = replace(stage, module=module, sealed=True)
            _check_token_wise(backbone, new)
        else:
            new = replace(stage, sealed=True)
        new._known.update(known)
        changes[stage.name] = new
    return without_text(_as_it_is(backbone, changes))


def without_text(backbone: Backbone) -> Backbone:
    """The pictures' part alone: what is copied and sent."""
    new = replace(backbone, text=None)
    new.__dict__["shapes"] = backbone.shapes
    return new


class Suffix(nn.Module):
    """The chain after a cached feature. Shares its modules with the backbone it comes from: what
    moves or casts the suffix moves or casts them there too.

    `train()` puts in training mode what is trainable, and leaves frozen stages as they are: a batch
    norm that does not train keeps its running statistics.

    Attributes:
        stages: The modules, by number of the stage.
        calls: Where set, counts the calls of each stage.
    """

    calls: "Counter[str] | None" = None

    def __init__(self, backbone: Backbone, after: str, keep: Sequence[str] = ()) -> None:
        super().__init__()
        name, _, reduction = after.partition(":")
        first = backbone.stage(name)
        reduction = canonical_reduction(first, reduction)
        begin = backbone.stage_names.index(name)
        wanted = list(keep) or [backbone.stage_names[-1]]
        for one in wanted:
            last = backbone.stage_names.index(backbone.stage(one).name)
            if last <= begin:
                raise ValueError(f"{one} comes no later than {after}, after which the suffix runs")
            chain = backbone.stages[begin : last + 1]
            # Of tokens the suffix gives those that it was given.
            part = "" if chain[-1].form != "tokens" else reduction
            reason = why_not(reduction, chain, part)
            if reason:
                raise ValueError(f"a suffix after {after} cannot give {one}: {reason}")
        self._backbone = (without_text(backbone),)  # in a tuple: no module, nothing to walk
        self._first, self._reduction = first, reduction
        self._wanted, self._alone = wanted, not keep
        self._frames = max(stage.frames for stage in backbone.stages[begin + 1 :])
        end = max(backbone.stage_names.index(one) for one in wanted)
        self.stages = nn.ModuleList(s.module for s in backbone.stages[begin + 1 : end + 1])

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Run the stages.

        Args:
            x: The feature, [N, ...] a frame each or [B, T, ...] as a store gives it, in any float
                type. bfloat16 and float16 are taken up to the backbone's precision.

        Returns:
            The last stage's output, or a dict of those in `keep`, with the same leading axes. Of
            tokens, the part that was given, in its form: from a class token, class tokens.

        Raises:
            ValueError: The shape is not that of the feature.
        """
        shape = self._shape()
        clips = x.ndim == len(shape) + 2
        frames = x.flatten(0, 1) if clips else x
        if tuple(frames.shape[1:]) != shape:
            raise ValueError(
                f"the suffix starts from {self._first.name}"
                f"{':' * bool(self._reduction)}{self._reduction}, [clips, T, "
                f"{', '.join(map(str, shape))}] or [N, {', '.join(map(str, shape))}], not from "
                f"{list(x.shape)}"
            )
        (backbone,) = self._backbone
        if clips and self._frames not in (0, x.shape[1]):
            raise ValueError(
                f"the suffix looks across clips of {self._frames} frames, and these have "
                f"{x.shape[1]}: {list(x.shape)}"
            )
        outputs = backbone.run(
            expand(frames, self._first, self._reduction),
            self._wanted,
            self._first.name,
            self.calls,
        )
        for name, y in outputs.items():
            if backbone.stage(name).form == "tokens":
                outputs[name] = reduce(y, backbone.stage(name), self._reduction)
        if clips:
            outputs = {n: y.reshape(*x.shape[:2], *y.shape[1:]) for n, y in outputs.items()}
        return outputs[self._wanted[0]] if self._alone else outputs

    def train(self, mode: bool = True) -> "Suffix":
        """Training mode for what trains; whatever is frozen stays in eval, within grafts too."""
        self.training = mode
        for stage in self.stages:
            _train(stage, mode)
        return self

    def _shape(self) -> tuple[int, ...]:
        (backbone,) = self._backbone
        whole = backbone.shapes[self._first.name]
        if self._reduction == "cls":
            return whole[-1:]
        if self._reduction == "map":
            side = round((whole[0] - self._first.prefix) ** 0.5)
            return (whole[1], side, side)
        return whole


def _train(module: nn.Module, mode: bool) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        mode = False
    module.training = mode
    for child in module.children():
        _train(child, mode)


def _check_token_wise(backbone: Backbone, stage: Stage) -> None:
    """Look whether a method's module gives the class token alone what it gives it among others.

    The planner feeds it so where only the class token is kept, and takes its word for it.
    """
    if stage.original is None or not stage.token_wise:
        return
    before = backbone.stages[backbone.stage_names.index(stage.name) - 1]
    device = next((t.device for t in tensors_of(stage.module).values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(stage.frames or 1, *backbone.shapes[before.name], generator=generator)
    other = torch.cat([x[:, :1], x[:, 1:].flip(1) + 1], dim=1)
    with _eval(stage.module), torch.no_grad():
        first, second, alone = (
            stage.module(tokens.to(device, backbone.precision)).float().flatten(1)
            for tokens in (x, other, x[:, :1])
        )
    width = alone.shape[1]
    off = max((first[:, :width] - y[:, :width]).abs().max().item() for y in (second, alone))
    largest = first.abs().max().item()
    if not first.isfinite().all():
        raise ValueError(_not_finite(stage.name, stage.module))
    if not off <= (1e-3 if backbone.precision == torch.float32 else 5e-2) * largest:
        raise ValueError(
            f"{stage.name}: {type(stage.module).__name__} says token_wise, but what it gives for "
            f"the class token changes with the other tokens (by {off:.2g} of {largest:.2g}); set "
            "token_wise = False"
        )


def _not_finite(name: str, module: nn.Module) -> str:
    parameters = [key for key, t in tensors_of(module).items() if not t.isfinite().all()]
    where = f", and neither is {parameters[0]} (did its training diverge?)" if parameters else ""
    return f"{name}: what {type(module).__name__} gives is not finite{where}"


def _copied[T](name: str, thing: T) -> T:
    """A deep copy of a stage or module.

    Raises:
        ValueError: It holds what cannot be copied.
    """
    try:
        return copy.deepcopy(thing)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: its module cannot be copied ({error}). Does it keep a tensor of its last "
            "call in an attribute? Keep it detached, or not at all"
        ) from error


def _check_registered(name: str, module: nn.Module) -> None:
    """Refuse modules in plain containers: eval(), copies to a device and training miss them."""
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            inner = value.values() if isinstance(value, dict) else value
            plain = isinstance(value, list | tuple | dict) and attribute != "_modules"
            if plain and any(isinstance(one, nn.Module) for one in inner):
                raise ValueError(
                    f"{name}: {'.'.join(filter(None, (path, attribute)))} of "
                    f"{type(module).__name__} is a {type(value).__name__} of modules, which torch "
                    "does not see: make it an nn.ModuleList or nn.ModuleDict"
                )


def _frames(name: str, module: nn.Module) -> int:
    """T, as the module or a part of it says; 0 where none looks across frames."""
    said = [getattr(part, "frames", 0) for part in module.modules()]
    odd = [frames for frames in said if type(frames) is not int or frames < 0]
    lengths = sorted({frames for frames in said if frames not in odd and frames})
    if odd or len(lengths) > 1:
        found = " and ".join(map(repr, odd or lengths))
        raise ValueError(
            f"{name}: the module's `frames` is {found}: it says how many frames of a clip the "
            "module looks across, one number for all its parts, 0 for one frame at a time"
        )
    return lengths[0] if lengths else 0


def _with(backbone: Backbone, changes: dict[str, Stage]) -> Backbone:
    stages = tuple(changes.get(stage.name, stage) for stage in backbone.stages)
    return replace(backbone, stages=stages)


def _as_it_is(backbone: Backbone, changes: dict[str, Stage]) -> Backbone:
    """With stages whose outputs have the shapes that they had."""
    new = _with(backbone, changes)
    new.__dict__["shapes"] = backbone.shapes
    return new


def _check_shapes(backbone: Backbone, grafted: Backbone, new: Stage) -> bool:
    """Pass a clip of zeros through the graft, and its shape through what follows.

    Returns:
        Whether the graft's output has the shape of the stage's.
    """
    number = backbone.stage_names.index(new.name)
    before = backbone.stages[number - 1] if number else None
    expected = backbone.shapes[new.name]
    frames = max(stage.frames for stage in grafted.stages) or 1
    device = next((t.device for t in tensors_of(new.module).values()), torch.device("cpu"))
    shape, dtype = (frames, *backbone.picture.shape), getattr(torch, backbone.picture.dtype)
    if before is not None:
        shape, dtype = (frames, *backbone.shapes[before.name]), backbone.precision
    said = f"{new.name}: {type(new.module).__name__}"
    # A copy: what the module keeps of a call, such as statistics, is not to be of this one.
    module = _copied(new.name, new.module).eval()
    x = torch.zeros(shape, dtype=torch.float32)
    x = x.uniform_(0, 1 if before else 255, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y, again = (module(x.clone()) for _ in range(2))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{said} does not take the stage's input, {str(dtype).removeprefix('torch.')} "
                f"{list(shape)} ({frames} frames): {error}"
            ) from error
    if not isinstance(y, Tensor) or y.ndim != NDIM[new.form] or len(y) != frames:
        found = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{said} gives {found} for {frames} frames; the stage gives {new.form} "
            f"{[frames, *expected]}"
        )
    if not y.isfinite().all():
        raise ValueError(_not_finite(new.name, new.module))
    if not torch.equal(y, again):
        raise ValueError(
            f"{said} gives other numbers each time, in eval mode too: a feature is one value. Let "
            "what is drawn depend on self.training, and hold dropouts as registered submodules"
        )
    if y.dtype != backbone.precision:
        raise ValueError(
            f"{said} gives {y.dtype}; {backbone.name} runs in {backbone.precision}: let the module "
            "give the type of its input back"
        )
    if tuple(y.shape[1:]) == expected:
        return True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            z = torch.zeros(y.shape, dtype=y.dtype)
            for stage in grafted.stages[number + 1 :]:
                z = stage.module(z)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{said} gives {[frames, *y.shape[1:]]} where the stage gives {[frames, *expected]}, "
            f"and {grafted.stages[number + 1].name} and what follows do not take that"
        ) from error
    return False


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """In eval mode for a while; every part's mode is what it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
