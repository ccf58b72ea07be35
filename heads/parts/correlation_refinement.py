"""Correlation refinement (CRM of HCE, section 3): logit offsets from the spread of importances H.

    ratio = log sum_x |H(x) - mean H|^2, over the exemplars for old classes, new clips for new ones
    R_c   = ratio of the group of class c, and the loss is CE(p + R, y), in training alone

Adding one number to all classes changes no softmax: only the difference of the two ratios matters,
and a common scale of H cancels. Ours, where HCE is silent: each group has its own mean; the
argument of the logarithm is at least 1e-12, and the difference is clamped to [-5, 5]; ratios are
those of the previous epoch, without gradients, and absent in the first. Alternatively a batch has
ratios of its own, with gradients (HCE: the offset cross entropy and L_hc optimise H together), if
it has two clips of each group.

Shapes: N clips, W numbers in the H of a clip, C classes.
"""

import math

import torch
from torch import Tensor

LEAST, MOST = 1e-12, 5.0


class Spread:
    """Sum of squared distances to the mean, accumulated over batches in float64."""

    def __init__(self) -> None:
        self._count, self._total, self._square = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, h_NW: Tensor) -> None:
        """Add the vectors H of a batch."""
        wide = h_NW.detach().double()
        self._count += len(wide)
        self._total = self._total.to(wide.device) + wide.sum(dim=0)
        self._square += float(wide.square().sum())

    @property
    def value(self) -> float:
        """The sum; 0 without vectors."""
        if not self._count:
            return 0.0
        return max(0.0, self._square - float(self._total.square().sum()) / self._count)


def difference(old_MW: Tensor, new_NW: Tensor) -> Tensor:
    """Return R of old classes minus R of new ones for a batch, a scalar with gradients.

    It is 0 unless both groups have two clips.

    >>> difference(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]))
    tensor(1.3863)
    """
    if min(len(old_MW), len(new_NW)) < 2:
        return torch.zeros((), device=new_NW.device)
    old, new = ((h - h.mean(dim=0)).square().sum().clamp(min=LEAST) for h in (old_MW, new_NW))
    return (old.log() - new.log()).clamp(-MOST, MOST)


def ratios(old: Spread, new: Spread) -> tuple[float, float]:
    """Return R of old and of new classes; that of new ones is 0.

    >>> old, new = Spread(), Spread()
    >>> old.add(torch.tensor([[1.0], [3.0]])), new.add(torch.tensor([[1.0], [2.0]]))
    (None, None)
    >>> round(ratios(old, new)[0], 4)  # log(2 / 0.5)
    1.3863
    """
    difference = math.log(max(old.value, LEAST)) - math.log(max(new.value, LEAST))
    return min(MOST, max(-MOST, difference)), 0.0
