"""Reductions: the part of a stage's output that a column keeps.

| reduction | of tokens [N, L, C] | of a map [N, C, H, W] | of a vector [N, C] |
|---|---|---|---|
| none (whole) | [N, L, C] | [N, C, H, W] | [N, C] |
| `tokens`     | the whole output | – | – |
| `map`        | patch tokens on their grid [N, C, H, W] | the whole output | – |
| `cls`        | class token [N, C] | – | – |
| `mean`       | mean of the patch tokens [N, C] | – | – |
| `pool`       | – | mean over H and W [N, C] | – |
| `grid7`      | patch tokens, averaged to [N, C, 7, 7] | averaged to [N, C, 7, 7] | – |

Averages are computed and returned in float32, whatever the run's precision. Where 7 does not divide
a side, `grid7` uses overlapping windows, as adaptive average pooling does.

A reduction is one function from a stage to a `Reduction`, or to None where the stage's output
cannot be reduced so. docs/ADDING_A_BACKBONE.md has one of a user's own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from varve.pipeline import registry
from varve.pipeline.registry import register

if TYPE_CHECKING:
    from varve.pipeline.backbones._stage import Stage


@dataclass(frozen=True)
class Reduction:
    """The computation of a reduction on the outputs of one stage.

    Attributes:
        apply: Function from the stage's output [N, ...] to the kept feature, also [N, ...]. Row n
            depends on frame n alone.
        expand: The inverse, to the form that the next stage takes, for the tokens in `tokens`;
            None for an aggregate, from which no stage can be computed.
        tokens: Tokens that the feature is a function of: `all`, `class` or `patches`.
    """

    apply: Callable[[Tensor], Tensor]
    expand: Callable[[Tensor], Tensor] | None = None
    tokens: str = "all"


def _same(x: Tensor) -> Tensor:
    return x


# The whole output. A reduction that returns it is another name for keeping everything.
WHOLE = Reduction(_same, _same)


@register("reductions", "tokens")
def tokens(stage: "Stage") -> Reduction | None:
    return WHOLE if stage.form == "tokens" else None


@register("reductions", "map")
def patch_map(stage: "Stage") -> Reduction | None:
    def expand(x_NCHW: Tensor) -> Tensor:
        # Rows of zeros before the patches, at the indices of the prefix tokens.
        return nn.functional.pad(x_NCHW.flatten(2).transpose(1, 2), (0, 0, stage.prefix, 0))

    if stage.form == "tokens":
        return Reduction(lambda x: _grid(x, stage), expand, "patches") if stage.square else None
    return WHOLE if stage.form == "map" else None


@register("reductions", "cls")
def class_token(stage: "Stage") -> Reduction | None:
    if stage.form != "tokens":
        return None
    if stage.prefix < 1:
        raise ValueError(f"{stage.name}:cls: the stage has no class token; keep its mean")
    return Reduction(lambda x: x[:, 0], lambda x: x[:, None], "class")


@register("reductions", "mean")
def patch_mean(stage: "Stage") -> Reduction | None:
    if stage.form != "tokens":
        return None
    return Reduction(lambda x: x[:, stage.prefix :].float().mean(dim=1), tokens="patches")


@register("reductions", "pool")
def spatial_mean(stage: "Stage") -> Reduction | None:
    return Reduction(lambda x: x.float().mean(dim=(2, 3))) if stage.form == "map" else None


@register("reductions", "grid7")
def coarse_grid(stage: "Stage") -> Reduction | None:
    def apply(x: Tensor) -> Tensor:
        grid = _grid(x, stage) if stage.form == "tokens" else x
        return nn.functional.adaptive_avg_pool2d(grid.float(), 7)

    if stage.form == "vector" or not stage.square:
        return None
    return Reduction(apply, tokens="patches" if stage.form == "tokens" else "all")


def _grid(x_NLC: Tensor, stage: "Stage") -> Tensor:
    patches = x_NLC[:, stage.prefix :]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patch tokens form no square grid")
    return patches.transpose(1, 2).reshape(len(x_NLC), -1, side, side)


def reduction_of(stage: "Stage", name: str) -> Reduction:
    """Return what a reduction does with the outputs of a stage; "" is the whole output.

    Raises:
        ValueError: The stage's output cannot be reduced so; the message lists what it allows.
        TypeError: The function that is registered under the name returns something else.
    """
    reduction = _look_up(stage, name)
    if reduction is None:
        allowed = ", ".join(reductions_of(stage)) or "none: it is one vector a frame"
        unknown = name not in registry.available("reductions")
        raise ValueError(
            f"{stage.name}:{name}: the stage gives a {stage.form}, whose reductions are {allowed}"
            + (". Load a file of your own with --plugin" if unknown else "")
        )
    return reduction


def _look_up(stage: "Stage", name: str) -> Reduction | None:
    if not name:
        return WHOLE
    if name not in registry.available("reductions"):
        return None
    reduction = registry.variant("reductions", name)(stage)
    if not isinstance(reduction, Reduction | None):
        raise TypeError(
            f"the reduction {name!r} returns a {type(reduction).__name__} for {stage.name}: it "
            "takes a stage, and returns a Reduction, or None where it does not apply"
        )
    return reduction


def reductions_of(stage: "Stage") -> list[str]:
    """Names of all reductions that a stage's output allows, sorted."""
    allowed = []
    for name in registry.available("reductions"):
        try:
            if _look_up(stage, name) is not None:
                allowed.append(name)
        except ValueError:  # of its form, but without what it needs, such as a class token
            continue
    return allowed


def canonical_reduction(stage: "Stage", name: str) -> str:
    """Return the one name of a reduction: "" where it keeps the whole output.

    Raises:
        ValueError: The stage's output cannot be reduced so; the message lists what it allows.
    """
    return "" if reduction_of(stage, name) is WHOLE else name


def reduction_identity(name: str) -> str | dict[str, str]:
    """Return what enters a column's key: the name, and the source's digest of a user's own."""
    code = registry.source_digest("reductions", name) if name else ""
    return {"name": name, "code": code} if code else name


def reduce(x: Tensor, stage: "Stage", name: str) -> Tensor:
    """Apply a reduction to the stage's output. The module's table lists the shapes.

    Raises:
        ValueError: Patch tokens that form no square grid, or no reduction of this stage.
    """
    return reduction_of(stage, name).apply(x)


def expand(x: Tensor, stage: "Stage", name: str) -> Tensor:
    """Return a kept feature in the form that the next stage takes: the inverse of `reduce`.

    Tokens that were not kept are absent after a class token, and zero before patch tokens.

    Raises:
        ValueError: The reduction is an aggregate.
    """
    inverse = reduction_of(stage, name).expand
    if inverse is None:
        raise ValueError(f"{stage.name}:{name} is an aggregate, and has no inverse")
    return inverse(x)


def resume_refusal(kept: str, stages: Sequence["Stage"], wanted: str) -> str:
    """Return why a kept feature cannot give a feature of a later stage; "" where it can.

    Args:
        kept: The canonical reduction of the first stage's output.
        stages: From the stage of the kept feature to that of the wanted one, both included.
        wanted: The canonical reduction of the last stage's output.
    """
    first, last = stages[0], stages[-1]
    if not kept or (len(stages) == 1 and kept == wanted):
        return ""
    name, source = f"{first.name}:{kept}", reduction_of(first, kept)
    if source.expand is None:
        return f"{name} is an aggregate, and has no inverse: keep {first.name} whole"
    if source.tokens == "all":
        return ""
    mixing = next((stage for stage in stages[1:] if not stage.token_wise), None)
    if mixing is not None:
        note = "" if mixing.original is None else " (its module does not set token_wise)"
        return f"{mixing.name} needs all that {first.name} gives{note}, and {name} is a part of it"
    # A vector of a token-wise stage is made of the class token alone.
    target = "class" if last.form == "vector" else reduction_of(last, wanted).tokens
    if source.tokens == target:
        return ""
    part = "class token" if source.tokens == "class" else "patch tokens"
    return f"{name} is the {part} alone, and {last.name} is wanted {wanted or 'whole'}"
