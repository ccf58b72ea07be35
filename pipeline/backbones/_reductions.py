"""Reductions: what of a stage's output is kept.

| reduction | of tokens [N, L, C] | of a map [N, C, H, W] | of a vector [N, C] |
|---|---|---|---|
| none (whole) | [N, L, C] | [N, C, H, W] | [N, C] |
| `tokens`     | the same as whole | – | – |
| `map`        | patch tokens on their grid [N, C, H, W] | the same as whole | – |
| `cls`        | the class token [N, C] | – | – |
| `mean`       | mean of the patch tokens [N, C] | – | – |
| `pool`       | – | mean over H and W [N, C] | – |
| `grid7`      | patch tokens, averaged to [N, C, 7, 7] | averaged to [N, C, 7, 7] | – |

Averages are taken, and given, in float32 whatever the run's precision. Where 7 does not divide a
side, `grid7` takes windows that overlap by one, as adaptive average pooling does.

A kept feature can feed the stages after it where all they need was kept: a whole output always, a
class token or the patch tokens as long as each token is taken alone. An average never can.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from varve.pipeline.backbones import Stage

WHOLE = {"tokens": "tokens", "map": "map"}
ALLOWED = {
    "tokens": ("tokens", "cls", "mean", "grid7", "map"),
    "map": ("map", "pool", "grid7"),
    "vector": (),
}


def canonical_reduction(stage: Stage, reduction: str) -> str:
    """The one name of a reduction: "" where it keeps the whole output.

    Raises:
        ValueError: The stage's output cannot be reduced so; the message lists what it allows.
    """
    if not reduction or WHOLE.get(stage.form) == reduction:
        return ""
    if reduction not in ALLOWED[stage.form]:
        allowed = ", ".join(ALLOWED[stage.form]) or "none: it is one vector a frame"
        raise ValueError(
            f"{stage.name}:{reduction}: the stage gives a {stage.form}, "
            f"whose reductions are {allowed}"
        )
    if reduction == "cls" and stage.prefix < 1:
        raise ValueError(f"{stage.name}:cls: the stage has no class token; keep its mean")
    return reduction


def reduce(x: Tensor, stage: Stage, reduction: str) -> Tensor:
    """Apply a canonical reduction to the stage's output. Shapes in the module's table.

    Raises:
        ValueError: Patch tokens that form no square grid, or a name that is no reduction.
    """
    match reduction:
        case "":
            return x
        case "cls":
            return x[:, 0]
        case "mean":
            return x[:, stage.prefix :].float().mean(dim=1)
        case "pool":
            return x.float().mean(dim=(2, 3))
        case "map":
            return _grid(x, stage.prefix)
        case "grid7":
            grid = _grid(x, stage.prefix) if stage.form == "tokens" else x
            return nn.functional.adaptive_avg_pool2d(grid.float(), 7)
    known = sorted({name for names in ALLOWED.values() for name in names})
    raise ValueError(f"no reduction {reduction!r}; choose from {', '.join(known)}")


def why_not(held: str, stages: Sequence[Stage], wanted: str) -> str:
    """Why a kept feature cannot give another one further on; "" where it can.

    Args:
        held: The canonical reduction of the first stage's output, as it was kept.
        stages: From the stage of the held feature to that of the wanted one, both included.
        wanted: The canonical reduction of the last stage's output.
    """
    first, last = stages[0], stages[-1]
    if not held or (len(stages) == 1 and held == wanted):
        return ""
    name = f"{first.name}:{held}"
    if held not in ("cls", "map") or first.form != "tokens":
        return f"{name} is an average, and cannot be taken apart again: keep {first.name} whole"
    mixing = next((stage for stage in stages[1:] if not stage.token_wise), None)
    if mixing is not None:
        said = "" if mixing.original is None else " (its module does not say token_wise)"
        return f"{mixing.name} needs all that {first.name} gives{said}, and {name} is a part of it"
    if held == "cls" and (last.form == "vector" or wanted == "cls"):
        return ""
    if held == "map" and last.form == "tokens" and wanted in ("map", "mean", "grid7"):
        return ""
    part = "class token" if held == "cls" else "patch tokens"
    return f"{name} is the {part} alone, and {last.name} is wanted {wanted or 'whole'}"


def expand(x: Tensor, stage: Stage, reduction: str) -> Tensor:
    """A kept feature in the form that the next stage takes: the inverse of `reduce`.

    Tokens that were not kept are absent after the class token, and zero before patch tokens.
    """
    match reduction:
        case "":
            return x
        case "cls":
            return x[:, None]
        case "map":
            # Rows of zeros before the patches, in the prefix tokens' places.
            return nn.functional.pad(x.flatten(2).transpose(1, 2), (0, 0, stage.prefix, 0))
    raise ValueError(f"{stage.name}:{reduction} cannot be taken apart again")


def _grid(x_NLC: Tensor, prefix: int) -> Tensor:
    patches = x_NLC[:, prefix:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patch tokens form no square grid")
    return patches.transpose(1, 2).reshape(len(x_NLC), -1, side, side)
