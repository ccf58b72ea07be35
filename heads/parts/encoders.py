"""Encoders: how the T vectors of a clip become one.

    mean    their mean. It cannot tell a motion from its reverse. Nothing to train.
    order   one after the other. Nothing to train.
    trn     relations between them, in order (`varve.heads.parts.temporal_relation`), trained.
    expert  unit(mean of unit V_i) + unit(E(unit V_1 ... unit V_T)), with E one spatiotemporal
            expert of `varve.heads.parts.expert`, trained: the representation itself moves, and
            what is distilled between an old model and a new one has something to hold.

Ours: the sum of the `expert`, which is StPR's video feature with one expert of weight 1, so that a
baseline has what one of its experts has, and starts from what the mean knows.

Shapes: B clips a batch, T frames, D feature width, W width of a clip's vector.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads.parts.expert import Expert
from varve.heads.parts.temporal_relation import WIDTH, Relation

ENCODERS = ("mean", "order", "trn", "expert")
TRAINED = ("trn", "expert")
EXPERT = ("layers", "heads", "ffn", "position")


class Encoder(nn.Module):
    """From float32 [B, T, D] to [B, W].

    Args:
        how: One of `ENCODERS`.
        frames: T. Only `order` and `trn` hold to it, and an expert with positions.
        width: D.
        expert: Options of `Expert`: `layers`, `heads`, `ffn`, and `position`, "learned" or None.
        rng: Draws the start of what trains.

    Attributes:
        vector: W.
    """

    def __init__(
        self,
        how: str,
        frames: int,
        width: int,
        expert: Mapping[str, Any] | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self.how, self.frames, self.width = check(how, expert), frames, width
        self.vector = {"order": frames * width, "trn": WIDTH}.get(how, width)
        if how == "trn":
            seed = int((rng or np.random.default_rng(0)).integers(2**31))
            self.relation = Relation(frames, width, seed)
        if how == "expert":
            options = dict(expert or {})
            if options.pop("position", None) is not None:
                options["frames"] = frames
            seed = int((rng or np.random.default_rng(0)).integers(2**31))
            generator = torch.Generator().manual_seed(seed)
            self.expert = Expert(width, **options, generator=generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.how == "mean":
            return x_BTD.mean(dim=1)
        if self.how == "order":
            return x_BTD.flatten(1)
        if self.how == "trn":
            related_BW: Tensor = self.relation(x_BTD)
            return related_BW
        x_BTD = normalize(x_BTD, dim=2)
        moved_BD: Tensor = self.expert(x_BTD)
        return normalize(x_BTD.mean(dim=1), dim=1) + normalize(moved_BD, dim=1)

    def fits(self, x_BTD: Tensor, name: str) -> Tensor:
        """What was given, where its form is the one that was learned.

        Raises:
            ValueError: Another width, or another T where T counts.
        """
        placed = self.how == "expert" and self.expert.position is not None
        fixed = self.how in ("order", "trn") or placed
        if x_BTD.shape[2] != self.width or (fixed and x_BTD.shape[1] != self.frames):
            raise ValueError(
                f"features {name!r} are {list(x_BTD.shape)}; learned before were clips of "
                f"{self.frames} frames of {self.width} by encoder={self.how!r}: use the same "
                "feature and number of frames throughout"
            )
        return x_BTD


def check(how: str, expert: Mapping[str, Any] | None = None) -> str:
    """`how`, where there is such an encoder.

    Raises:
        ValueError: There is none, or the options of an expert are none, or are given for another.
    """
    if how not in ENCODERS:
        raise ValueError(f"no encoder={how!r}; choose from {', '.join(ENCODERS)}")
    options = dict(expert or {})
    if options and how != "expert":
        raise ValueError(f"expert={options} with encoder={how!r}, which has none: give 'expert'")
    odd = sorted(options.keys() - EXPERT)
    if odd or options.get("position") not in (None, "learned"):
        raise ValueError(
            f"expert={options}: its options are {', '.join(EXPERT)}, and position is 'learned' or "
            "None"
        )
    return how
