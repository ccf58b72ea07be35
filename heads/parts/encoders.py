"""Temporal encoders: they map the T frame vectors of a clip to one vector.

    mean    the mean. It cannot tell a motion from its reverse. It has no parameters.
    order   the concatenation in order. It has no parameters.
    trn     relations between frames, in order (`varve.heads.parts.temporal_relation`). Trained.
    expert  unit(mean of unit V_i) + unit(E(unit V_1 ... unit V_T)), with one spatiotemporal expert
            E of `varve.heads.parts.expert`. It is trained: the representation changes from task
            to task, so that distillation from the previous model has an effect.

Ours: the sum of `expert` is StPR's video feature with one expert of weight 1. A baseline then has
what one of StPR's experts has, and starts from the mean.

Shapes: B clips a batch, T frames, D feature width, W width of a clip's vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads.parts.expert import Expert, ExpertConfig
from varve.heads.parts.temporal_relation import WIDTH, Relation

ENCODERS = ("mean", "order", "trn", "expert")
TRAINED = ("trn", "expert")
EXPERT = ("layers", "heads", "ffn", "position")


@dataclass(frozen=True)
class EncoderConfig:
    """Options of a temporal encoder.

    Attributes:
        encoder: `mean`, `order`, `trn` or `expert`; see the module.
        expert: Options of the expert, of `layers`, `heads`, `ffn` and `position`; see
            `varve.heads.parts.expert.ExpertConfig`. None for its defaults.

    Raises:
        ValueError: There is no such encoder, or the expert has no such options.
    """

    encoder: str = "mean"
    expert: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(f"no encoder={self.encoder!r}; choose from {', '.join(ENCODERS)}")
        options = dict(self.expert or {})
        if options and self.encoder != "expert":
            raise ValueError(
                f"expert={options} with encoder={self.encoder!r}, which has none: give 'expert'"
            )
        if options.keys() - set(EXPERT) or options.get("position") not in (None, "learned"):
            raise ValueError(
                f"expert={options}: its options are {', '.join(EXPERT)}, and position is 'learned' "
                "or None"
            )

    @property
    def trains(self) -> bool:
        """True if the encoder has parameters."""
        return self.encoder in TRAINED


class Encoder(nn.Module):
    """Map frame vectors, float32 [B, T, D], to clip vectors, [B, W].

    Args:
        config: Options of the encoder.
        frames: T. `order`, `trn` and an expert with positions accept no other number.
        width: D.
        rng: Draws the initial parameters.

    Attributes:
        vector: W.
    """

    def __init__(
        self,
        config: EncoderConfig,
        frames: int,
        width: int,
        rng: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self.how, self.frames, self.width = config.encoder, frames, width
        self.vector = {"order": frames * width, "trn": WIDTH}.get(self.how, width)
        if config.trains:
            seed = int((rng or np.random.default_rng(0)).integers(2**31))
        if self.how == "trn":
            self.relation = Relation(frames, width, seed)
        if self.how == "expert":
            generator = torch.Generator().manual_seed(seed)
            options = ExpertConfig(**config.expert or {})
            self.expert = Expert(width, options, frames, generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.how == "mean":
            return x_BTD.mean(dim=1)
        if self.how == "order":
            return x_BTD.flatten(1)
        if self.how == "trn":
            relations_BW: Tensor = self.relation(x_BTD)
            return relations_BW
        x_BTD = normalize(x_BTD, dim=2)
        moved_BD: Tensor = self.expert(x_BTD)
        return normalize(x_BTD.mean(dim=1), dim=1) + normalize(moved_BD, dim=1)

    def check(self, x_BTD: Tensor, name: str) -> Tensor:
        """Return the features, if their shape is the one that was learned.

        Raises:
            ValueError: The width differs, or T where the encoder depends on it.
        """
        has_positions = self.how == "expert" and self.expert.position is not None
        fixed = self.how in ("order", "trn") or has_positions
        if x_BTD.shape[2] != self.width or (fixed and x_BTD.shape[1] != self.frames):
            raise ValueError(
                f"features {name!r} are {list(x_BTD.shape)}; learned before were clips of "
                f"{self.frames} frames of {self.width} by encoder={self.how!r}: use the same "
                "feature and number of frames throughout"
            )
        return x_BTD
