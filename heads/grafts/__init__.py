"""Grafts: modules that a method puts in the place of a stage of a backbone.

This file is the contract. Every other module here is one graft, with `build(inner, **options)`,
where `inner` is the module of the stage. A custom graft needs no file here: any nn.Module is
accepted by `backbone.graft("layer3.1", module)`. One that is registered is used by its name too,
from the command line (`--plugin mine.py --set graft=mine`) and by the contract suite
(`python -m varve.contracts --graft mine.py`):

    @register("grafts", "mine")
    class Mine(nn.Module):
        def __init__(self, inner, channels, ...): ...

    forward(x) -> Tensor
        Map the stage's input to an output of the stage's shape, type and memory format.

Shapes: N = B * T frames, clip by clip and in order, T frames per clip (in a 3D network, the
time steps of the stage). Tokens [N, L, C] with P class and register tokens first (option `prefix`),
maps [N, C, H, W], channels_last on ResNets.

The options `channels` or `width` (C), `frames` (T), `prefix` (P), `classifier` and `seed` are
filled by the head, where `build` has them; every other option needs a default or is given by the
user; see `fill_options`.

A graft usually keeps the frozen module that it replaces, as `inner`. It shares that module's
parameters, copies none, and changes nothing in it: the original backbone computes what it did
before. A frozen inner stays in eval mode when the graft is put in train mode, so that its batch
norms neither move nor depend on the batch. To train an inner, give a copy of it with gradients on.

Each has a documented state in which it is the identity, bit for bit the frozen stage: adapter and
hf_gate as they are built, temporal_shift with fold=0, class_regularization with strength=0.
Parameters are float32 whatever the precision of the backbone. The inner runs in the activations'
type, the graft's own arithmetic in its parameters' type, and the result is rounded to the type of
the inner's output. Random numbers come from the option `seed`, never from the global generators.
The output of a clip does not depend on the other clips or on its position in a batch of a given
size, to the bit. Gradients reach the graft's own parameters. Grafts can be copied and pickled.

What decides the output enters the column's key: `code`, the public attributes that are JSON
(options are kept as such), submodules, the bytes of parameters and buffers. A graft may declare, in
attributes:

    code: str
        Name and version of what its class computes ("adapter/1"), changed when the code's values
        change. It is valid for the class that defines it and no subclass. A class without it is
        identified by its source.
    forms: tuple[str, ...]
        Forms of the stages that it can replace, of "tokens" and "map"; ValueError for the others.
        If absent: both.
    token_wise: bool
        Whether each output token depends on the input token at its index alone (with `frames`, on
        those at its index in the clip's frames), so that the class token can be computed without
        the others. Counts only where the stage it replaces is token-wise too.
        If absent: False; a graft around another module is token-wise only if that module is.
    frames: int
        T, where the output of a frame depends on other frames of its clip: N is then whole clips,
        and the frame set is part of what the output depends on. If absent, or 0: each frame alone.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def fill_options(
    build: Callable[..., nn.Module], known: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of a graft: those that a head knows and `build` has, and the user's.

    Args:
        build: Builder of the graft, `build(inner, **options)`.
        known: Values by option name, such as `channels`, `frames` and `prefix`.
        options: The user's options, which take precedence.

    Raises:
        ValueError: `build` has no such option, or one without a value.

    >>> fill_options(lambda inner, frames, fold=8: inner, {"frames": 4, "prefix": 1}, {"fold": 2})
    {'frames': 4, 'fold': 2}
    """
    parameters = list(inspect.signature(build).parameters.values())[1:]
    names = {parameter.name for parameter in parameters}
    filled = {name: value for name, value in known.items() if name in names} | dict(options)
    unknown = sorted(set(filled) - names)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in filled]
    if unknown or missing:
        raise ValueError(
            f"graft options {dict(options)}: "
            + (f"there is no {', '.join(unknown)}; " if unknown else "")
            + (f"{', '.join(missing)} has no value; " if missing else "")
            + f"give those of {', '.join(sorted(names - set(known))) or 'none'}"
        )
    return filled
