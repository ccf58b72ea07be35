"""Relations between frames: a clip's vector from ordered tuples of them, at every length.

Temporal Relation Network, multi-scale (Zhou et al., ECCV 2018), up to its last layer:

    v = sum_(n = 2 .. T) mean_(i1 < ... < in) relu(W_n relu([x_i1; ...; x_in]) + b_n)

The paper draws 3 tuples of each length; ours are 3 spread evenly over all of them in order, so that
a clip has one vector, and a mean over them, so that lengths count alike. Its last layer, one
classifier a length, is the head's, shared.

Shapes: B clips, T frames, D feature width, W width of a clip's vector.
"""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, TUPLES = 256, 3


class Relation(nn.Module):
    """From [B, T, D] to [B, WIDTH].

    Args:
        frames: T, 2 at least.
        seed: Draws the parameters; the global generators are left alone.

    Attributes:
        tuples: Of each length, the frames, [tuples, length].

    Raises:
        ValueError: One frame has no relation.
    """

    def __init__(self, frames: int, width: int, seed: int) -> None:
        super().__init__()
        if frames < 2:
            raise ValueError(f"relations between {frames} frames: give clips of 2 at least")
        self.tuples = [_spread([*combinations(range(frames), n)]) for n in range(2, frames + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lengths = nn.ModuleList(nn.Linear(t.shape[1] * width, WIDTH) for t in self.tuples)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.relu()
        total_BW = x_BTD.new_zeros(len(x_BTD), WIDTH)
        for length, places in zip(self.lengths, self.tuples, strict=True):
            related_BNW = length(x_BTD[:, places].flatten(2)).relu()
            total_BW = total_BW + related_BNW.mean(dim=1)
        return total_BW


def _spread(found: list[tuple[int, ...]]) -> Tensor:
    chosen = np.linspace(0, len(found) - 1, min(TUPLES, len(found))).round().astype(int)
    return torch.tensor([found[place] for place in chosen])
