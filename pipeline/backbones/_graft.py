"""Grafts: modules of a method's own in the place of stages of a chain.

The chain stays a chain, so that keys, plans and runs need no special case. No function here changes
a backbone: each returns another one.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.pipeline.backbones._stage import GRAFT, Backbone, Stage, with_shapes
from varve.pipeline.backbones._weights import tensors_of

NDIM = {"tokens": 3, "map": 4, "vector": 2}


def graft(backbone: Backbone, name: str, module: nn.Module) -> Backbone:
    """Replace a stage by a module; see `Backbone.graft`."""
    stage = backbone.stage(name)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: a graft is a torch module, not a {type(module).__name__}")
    _check_registered(name, module)
    token_wise = stage.token_wise and bool(getattr(module, "token_wise", False))
    frames = _frames(name, module)
    new = replace(
        Stage(name, module, GRAFT, {}, stage.form, token_wise, stage.prefix, frames, stage),
        square=stage.square,
    )
    grafted = _with(backbone, {name: new})
    if _check_shapes(backbone, grafted, new):
        with_shapes(grafted, backbone)
    new.identity()  # refuses what no key can name before the training, not after it
    _check_token_wise(grafted, new)
    return grafted


def unfreeze(backbone: Backbone, names: Sequence[str]) -> Backbone:
    """Make stages trainable; see `Backbone.unfreeze`."""
    changes = {}
    for name in names:
        stage = backbone.stage(name)
        # With the stage that a graft replaces, so that its key still recognises that stage's parts.
        trainable = _copied(name, stage)
        trainable.module.requires_grad_(True)
        changes[name] = replace(trainable, original=trainable.original or stage, sealed=False)
    return with_shapes(_with(backbone, changes), backbone)


def seal(backbone: Backbone) -> Backbone:
    """Return the backbone with its digests computed only once. Its modules must not change."""
    changes = {}
    for stage in backbone.stages:
        new = replace(stage, sealed=True)
        new._digests.update(stage._digests if stage.sealed else {})
        changes[stage.name] = new
    return _with(backbone, changes)


def snapshot(backbone: Backbone) -> Backbone:
    """Return a sealed copy of the backbone in eval mode, which further training leaves as it is.

    Raises:
        ValueError: A module has `token_wise` set, and its output depends on other tokens.
    """
    changes = {}
    for stage in backbone.stages:
        digests = {"identity": stage.identity(), "parameters": stage.parameters}
        live = any(t.requires_grad for t in tensors_of(stage.module).values())
        if stage.original is not None or live or stage.module.training:
            module = _copied(stage.name, stage.module).eval().requires_grad_(False)
            new = replace(stage, module=module, sealed=True)
            _check_token_wise(backbone, new)
        else:
            new = replace(stage, sealed=True)
        new._digests.update(digests)
        changes[stage.name] = new
    return with_shapes(_with(backbone, changes), backbone).without_text()


def _check_token_wise(backbone: Backbone, stage: Stage) -> None:
    """Check that a token-wise graft computes a class token alone as it does among other tokens.

    The planner relies on `token_wise` where only the class token is kept.
    """
    if stage.original is None or not stage.token_wise:
        return
    before = backbone.stages[backbone.stage_names.index(stage.name) - 1]
    device = next((t.device for t in tensors_of(stage.module).values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(stage.frames or 1, *backbone.shapes[before.name], generator=generator)
    other = torch.cat([x[:, :1], x[:, 1:].flip(1) + 1], dim=1)
    module = _copied(stage.name, stage.module).eval()
    with torch.no_grad():
        first, second, alone = (
            module(tokens.to(device, backbone.precision)).float().flatten(1)
            for tokens in (x, other, x[:, :1])
        )
    width = alone.shape[1]
    off = max((first[:, :width] - y[:, :width]).abs().max().item() for y in (second, alone))
    largest = first.abs().max().item()
    if not first.isfinite().all():
        raise ValueError(_not_finite(stage.name, stage.module))
    if not off <= (1e-3 if backbone.precision == torch.float32 else 5e-2) * largest:
        raise ValueError(
            f"{stage.name}: {type(stage.module).__name__} has token_wise = True, but its output "
            f"for the class token changes with the other tokens (by {off:.2g} of {largest:.2g}); "
            "set token_wise = False"
        )


def _not_finite(name: str, module: nn.Module) -> str:
    parameters = [key for key, t in tensors_of(module).items() if not t.isfinite().all()]
    where = f", and neither is {parameters[0]} (did its training diverge?)" if parameters else ""
    return f"{name}: the output of {type(module).__name__} is not finite{where}"


def _copied[T](name: str, thing: T) -> T:
    """Return a deep copy of a stage or module.

    Raises:
        ValueError: It contains what cannot be copied.
    """
    try:
        return copy.deepcopy(thing)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: its module cannot be copied ({error}). Does an attribute keep a tensor of "
            "the last call? Detach it, or do not keep it"
        ) from error


def _check_registered(name: str, module: nn.Module) -> None:
    """Refuse modules in plain containers: eval(), copies to a device and training miss them."""
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            inner = value.values() if isinstance(value, dict) else value
            plain = isinstance(value, list | tuple | dict) and attribute != "_modules"
            if plain and any(isinstance(item, nn.Module) for item in inner):
                raise ValueError(
                    f"{name}: {'.'.join(filter(None, (path, attribute)))} of "
                    f"{type(module).__name__} is a {type(value).__name__} of modules, which torch "
                    "does not see: make it an nn.ModuleList or nn.ModuleDict"
                )


def _frames(name: str, module: nn.Module) -> int:
    """Return T of a temporal module or of its parts; 0 where no part is temporal."""
    attributes = [getattr(part, "frames", 0) for part in module.modules()]
    odd = [frames for frames in attributes if type(frames) is not int or frames < 0]
    lengths = sorted({frames for frames in attributes if frames not in odd and frames})
    if odd or len(lengths) > 1:
        values = " and ".join(map(repr, odd or lengths))
        raise ValueError(
            f"{name}: the module's `frames` is {values}: it is the number of frames of a clip that "
            "a temporal module mixes, one number for all its parts, 0 for one frame at a time"
        )
    return lengths[0] if lengths else 0


def _with(backbone: Backbone, changes: dict[str, Stage]) -> Backbone:
    stages = tuple(changes.get(stage.name, stage) for stage in backbone.stages)
    return replace(backbone, stages=stages)


def _check_shapes(backbone: Backbone, grafted: Backbone, new: Stage) -> bool:
    """Run the graft on a random clip, and pass the shape of its output through what follows.

    Returns:
        Whether the graft's output has the shape of the stage's.

    Raises:
        ValueError: The output does not fit, is not finite, or is another one on each call.
    """
    number = backbone.stage_names.index(new.name)
    before = backbone.stages[number - 1] if number else None
    expected = backbone.shapes[new.name]
    clip_frames = grafted.clip_frames
    frames = backbone.time_steps(before.name, clip_frames) if before else clip_frames
    steps = backbone.time_steps(new.name, clip_frames)
    device = next((t.device for t in tensors_of(new.module).values()), torch.device("cpu"))
    shape, dtype = (frames, *backbone.picture.shape), getattr(torch, backbone.picture.dtype)
    if before is not None:
        shape, dtype = (frames, *backbone.shapes[before.name]), backbone.precision
    title = f"{new.name}: {type(new.module).__name__}"
    # A copy: this call must not enter statistics that the module keeps.
    module = _copied(new.name, new.module).eval()
    x = torch.zeros(shape, dtype=torch.float32)
    x = x.uniform_(0, 1 if before else 255, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y, again = (module(x.clone()) for _ in range(2))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{title} does not take the stage's input, {str(dtype).removeprefix('torch.')} "
                f"{list(shape)} ({frames} frames): {error}"
            ) from error
    if not isinstance(y, Tensor) or y.ndim != NDIM[new.form] or len(y) != steps:
        output = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{title} gives {output} for {frames} frames; the stage gives {new.form} "
            f"{[steps, *expected]}"
        )
    if not y.isfinite().all():
        raise ValueError(_not_finite(new.name, new.module))
    if not torch.equal(y, again):
        raise ValueError(
            f"{title} gives other numbers each time, in eval mode too: a feature is one value. Let "
            "what is drawn depend on self.training, and register dropouts as submodules"
        )
    if y.dtype != backbone.precision:
        raise ValueError(
            f"{title} gives {y.dtype}; {backbone.name} runs in {backbone.precision}: let the "
            "module return the type of its input"
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
            f"{title} gives {list(y.shape)} where the stage gives {[steps, *expected]}, "
            f"and {grafted.stages[number + 1].name} and what follows do not take that"
        ) from error
    return False
