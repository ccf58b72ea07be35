"""CRM: how hard a class is held, by how much its channels' importances vary. HCE, section 3.

    ratio = log sum_x |H(x) - mean H|^2, over the exemplars for old classes, new clips for new ones
    R_c   = ratio of c's side, and the loss is CE(p + R, y), in training alone

Adding one number to all classes changes no softmax: only the difference of the two ratios matters,
and a common scale of H none. Ours, where HCE is silent: the mean is each side's own; the
logarithm's argument is 1e-12 at least, and the difference within 5; ratios are those of the epoch
before, without gradients, and none in the first. Or they are a batch's own, with gradients (the
text says that the offset cross entropy and L_hc optimise H together), where it has two clips of
each side.

Shapes: N clips, W numbers of H of a clip, C classes.
"""

import math

import torch
from torch import Tensor

LEAST, MOST = 1e-12, 5.0


class Spread:
    """Sum of squared distances to the mean, of what comes in parts; in float64."""

    def __init__(self) -> None:
        self._count, self._total, self._square = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, h_NW: Tensor) -> None:
        wide = h_NW.detach().double()
        self._count += len(wide)
        self._total = self._total.to(wide.device) + wide.sum(dim=0)
        self._square += float(wide.square().sum())

    @property
    def value(self) -> float:
        if not self._count:
            return 0.0
        return max(0.0, self._square - float(self._total.square().sum()) / self._count)


def difference(old_MW: Tensor, new_NW: Tensor) -> Tensor:
    """R of old classes less that of new ones, by the clips of a batch, a scalar with gradients.

    >>> difference(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]))
    tensor(1.3863)
    """
    if min(len(old_MW), len(new_NW)) < 2:
        return torch.zeros((), device=new_NW.device)
    old, new = ((h - h.mean(dim=0)).square().sum().clamp(min=LEAST) for h in (old_MW, new_NW))
    return (old.log() - new.log()).clamp(-MOST, MOST)


def ratios(old: Spread, new: Spread) -> tuple[float, float]:
    """R of old and of new classes, of which the new is 0.

    >>> one, two = Spread(), Spread()
    >>> one.add(torch.tensor([[1.0], [3.0]])), two.add(torch.tensor([[1.0], [2.0]]))
    (None, None)
    >>> round(ratios(one, two)[0], 4)  # log(2 / 0.5)
    1.3863
    """
    difference = math.log(max(old.value, LEAST)) - math.log(max(new.value, LEAST))
    return min(MOST, max(-MOST, difference)), 0.0
