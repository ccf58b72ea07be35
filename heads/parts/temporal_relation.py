"""Temporal Relation Network (TRN): a clip's vector from ordered tuples of its frames.

This is the multi-scale network (Zhou et al., ECCV 2018), up to its last layer:

    v = sum_(n = 2 .. T) mean_(i1 < ... < in) relu(W_n relu([x_i1; ...; x_in]) + b_n)

The paper draws 3 tuples of each length. Ours are 3 spread evenly over all tuples in order, so that
the vector of a clip is deterministic, and averaged, so that all lengths weigh the same. Its last
layer, one classifier for each length, is replaced by the head's classifier, which they share.

Shapes: B clips, T frames, D feature width, W width of a clip's vector.
"""

import math

import torch
from torch import Tensor, nn

WIDTH, TUPLES = 256, 3


class Relation(nn.Module):
    """Network from the frames of clips, [B, T, D], to [B, WIDTH].

    Args:
        frames: Number T of frames, at least 2.
        width: Width D of a frame's vector.
        seed: Seed of the parameters; the global generators are not used.

    Attributes:
        tuples: Indices of frames for each length, [tuples, length].

    Raises:
        ValueError: There are fewer than 2 frames.
    """

    def __init__(self, frames: int, width: int, seed: int) -> None:
        super().__init__()
        if frames < 2:
            raise ValueError(
                f"relations between the frames of clips of {frames}: a relation network (TRN) "
                "takes 2 at least. A 3D network, such as r3d_18, gives one vector a clip, which "
                "needs no encoder: leave out encoder='trn'"
            )
        self.tuples = [_spread(frames, n) for n in range(2, frames + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lengths = nn.ModuleList(nn.Linear(t.shape[1] * width, WIDTH) for t in self.tuples)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.relu()
        total_BW = x_BTD.new_zeros(len(x_BTD), WIDTH)
        for length, indices in zip(self.lengths, self.tuples, strict=True):
            related_BNW = length(x_BTD[:, indices].flatten(2)).relu()
            total_BW = total_BW + related_BNW.mean(dim=1)
        return total_BW


def _spread(frames: int, length: int) -> Tensor:
    """Return tuples spread evenly over all of a length, without listing them all."""
    count = math.comb(frames, length)
    most = min(TUPLES, count) - 1
    ranks = [(2 * i * (count - 1) + most) // (2 * most) if most else 0 for i in range(most + 1)]
    return torch.tensor([_tuple(frames, length, rank) for rank in ranks])


def _tuple(frames: int, length: int, rank: int) -> list[int]:
    """Return the tuple of a rank in the order of `itertools.combinations`."""
    chosen: list[int] = []
    for frame in range(frames):
        if len(chosen) == length:
            break
        count = math.comb(frames - frame - 1, length - len(chosen) - 1)  # tuples that begin with it
        if rank < count:
            chosen.append(frame)
        else:
            rank -= count
    return chosen
