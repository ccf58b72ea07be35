"""Relations between frames: a clip's vector from ordered tuples of them, at every length.

Temporal Relation Network, multi-scale (Zhou et al., ECCV 2018), up to its last layer:

    v = sum_(n = 2 .. T) mean_(i1 < ... < in) relu(W_n relu([x_i1; ...; x_in]) + b_n)

The paper draws 3 tuples of each length; ours are 3 spread evenly over all of them in order, so that
a clip has one vector, and a mean over them, so that lengths count alike. Its last layer, one
classifier a length, is the head's, shared.

Shapes: B clips, T frames, D feature width, W width of a clip's vector.
"""

import math

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
        self.tuples = [_spread(frames, n) for n in range(2, frames + 1)]
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


def _spread(frames: int, length: int) -> Tensor:
    """Tuples evenly over all of a length, in their order, without listing them all."""
    count = math.comb(frames, length)
    most = min(TUPLES, count) - 1
    places = [(2 * i * (count - 1) + most) // (2 * most) if most else 0 for i in range(most + 1)]
    return torch.tensor([_tuple(frames, length, place) for place in places])


def _tuple(frames: int, length: int, place: int) -> list[int]:
    """The `place`-th of the ordered tuples, as `itertools.combinations` has them."""
    found: list[int] = []
    for frame in range(frames):
        if len(found) == length:
            break
        after = math.comb(frames - frame - 1, length - len(found) - 1)  # that begin with it
        if place < after:
            found.append(frame)
        else:
            place -= after
    return found
