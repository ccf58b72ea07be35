"""SMILE: a memory of one frame a clip.

Alssum, Alcazar, Ramazanova, Zhao and Ghanem, "Just a Glimpse: Rethinking Temporal Information for
Video Continual Learning", CVPR workshops 2023. Under a tight memory, many clips are worth more than
the motion of a few: one frame is kept of each, and replayed T times as a clip that does not move.
So that the model knows such clips, a secondary loss shows it single frames of the task's clips too:

    L = (1 - w) CE(o(x), y) + w CE(o(s), y),   s = one frame of x, drawn anew each time, T times

Ours, since text and code at hand do not fix them: w = 0.5, herding, one linear classifier for both,
no distillation, and the frame that is kept is the middle one. 40 exemplars per class by default,
which have as many frames as TCD's memory of 5 clips of 8.

Shapes: B clips, T frames, C classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear
from varve.heads.parts.clips import Batch
from varve.heads.parts.exemplars import ExemplarConfig


class SMILE(models.ReplayModelHead[Linear]):
    """Replay single frames; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        still: w, the weight of the loss of single frames, from 0 to 1.
        exemplars: Options of the exemplars; None keeps every clip.
        options: Options of `varve.heads.parts.models.ReplayModelHead`.

    Raises:
        ValueError: `still` is out of range.
    """

    build_classifier = Linear
    _sees_frames = True

    def __init__(
        self,
        feature: str = "vector",
        still: float = 0.5,
        exemplars: ExemplarConfig | None = ExemplarConfig(budget=40, exemplar_frames=1),
        **options: Any,
    ) -> None:
        if not 0 <= still <= 1:
            raise ValueError(f"{still=}: give a weight from 0 to 1")
        super().__init__(feature, exemplars=exemplars, **options)
        self._still = still

    def loss(self, training: models.Training[Linear], batch: Batch, columns_B: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(training.model(batch), columns_B)
        if not self._still:
            return loss
        drawn_B = torch.from_numpy(training.rng.random(len(columns_B)))
        single = cross_entropy(training.model(still(batch, drawn_B)), columns_B)
        return (1 - self._still) * loss + self._still * single


def still(batch: Batch, drawn_B: Tensor) -> Batch:
    """Return clips of one frame, repeated, which numbers in [0, 1) choose."""
    rows_B = torch.arange(len(drawn_B))
    stills = {}
    for name, x in batch.items():
        chosen_B = (drawn_B * x.shape[1]).long()
        stills[name] = x[rows_B, chosen_B][:, None].expand_as(x)
    return stills


build = SMILE
