"""Classifiers whose columns are appended, one or more vectors per class.

Shapes: B clips, W width of a clip's vector, C classes, P proxies a class.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

# Length of a vector before a linear classifier. Ours: networks give vectors of lengths from 1
# to 50, and one learning rate cannot serve them all. Gradient descent on softmax regression is
# stable up to lr * length**2 / 2 = 2 * (1 + momentum): at lr = 0.01 and momentum = 0.9, up to a
# length of 27.
LENGTH = 16.0
# Deviation of the proxies of a class with a single clip: without it they stay equal for ever.
APART = 0.1


class Linear(nn.Module):
    """Compute w_c x + b_c, with x normalised to the length `LENGTH`.

    New columns start from zero: the problem is convex, and needs no random initialisation.
    """

    decays = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, width))
        self.bias = nn.Parameter(torch.zeros(0))

    def grow(self, classes: int, rng: np.random.Generator | None = None) -> None:
        """Append columns up to this number of classes. Nothing is drawn."""
        with torch.no_grad():
            added = classes - len(self.weight)
            self.weight = nn.Parameter(
                torch.cat([self.weight, self.weight.new_zeros(added, self.weight.shape[1])])
            )
            self.bias = nn.Parameter(torch.cat([self.bias, self.bias.new_zeros(added)]))

    def forward(self, x_BW: Tensor) -> Tensor:
        return linear(LENGTH * normalize(x_BW, dim=1), self.weight, self.bias)

    def logits(self, x_BW: Tensor) -> Tensor:
        """Return the inputs of cross entropy, [B, C]."""
        return self.forward(x_BW)


class BiasCorrected(Linear):
    """Compute gain_c (w_c x + b_c) + shift_c (BiC: Wu et al., CVPR 2019, Eq. 5).

    The classes of one task have one gain and one shift. New columns have 1 and 0, which change
    nothing, and training leaves them so, until `correct` sets them.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(0), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(0), requires_grad=False)

    def grow(self, classes: int, rng: np.random.Generator | None = None) -> None:
        added = classes - len(self.gain)
        for name, value in (("gain", 1.0), ("shift", 0.0)):
            before = getattr(self, name).detach()
            grown = torch.cat([before, before.new_full((added,), value)])
            setattr(self, name, nn.Parameter(grown, requires_grad=False))
        super().grow(classes, rng)

    def forward(self, x_BW: Tensor) -> Tensor:
        return super().forward(x_BW) * self.gain + self.shift

    def correct(self, columns_C: Tensor, gain: Tensor, shift: Tensor) -> None:
        """Set gain and shift of some columns, bool [C]."""
        with torch.no_grad():
            self.gain[columns_C], self.shift[columns_C] = gain, shift


class Cosine(nn.Module):
    """Compute cos(theta_c, x), or a weighted mean over P proxies per class: [B, C] in [-1, 1].

    With P > 1 it is PODNet's local similarity classifier (Douillard et al., ECCV 2020):

        y_c = sum_p s_cp <theta_cp, x>,   s_cp = softmax_p <theta_cp, x>,   both of unit length

    The learned `scale` is eta. A loss multiplies by it; the returned cosines do not contain it.

    Args:
        width: W.
        proxies: P.
        scale: Initial value of eta. Ours: 20, where the papers start from 1, at ten times the
            learning rate and for many more steps. All vectors of one network are similar, so that
            cosines hardly differ: on ResNet-18 features of 24 hand shapes, 12 and then 3 at a
            time, LUCIR ends at 44, 69, 88 and 89 % from 1, 10, 20 and 30.

    Attributes:
        frozen: Bool [C], the columns that get no gradient; None for no column.
    """

    decays = False  # a cosine ignores the length, and frozen columns must not change

    def __init__(self, width: int, proxies: int = 1, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, proxies, width))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.frozen: Tensor | None = None

    def grow(self, classes: int, rng: np.random.Generator) -> None:
        """Append columns up to this number of classes, drawn uniformly in +-1 / sqrt(W)."""
        _, P, W = self.weight.shape
        drawn = rng.uniform(-1, 1, (classes - len(self.weight), P, W)) / W**0.5
        added = torch.from_numpy(drawn).to(self.weight)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), added]))

    def imprint(self, column: int, x_NW: Tensor, others: Tensor, rng: np.random.Generator) -> None:
        """Initialise a column from the clips of its class.

        As in LUCIR's code it is the unit mean of unit vectors, at the mean length of other columns.
        With proxies, as in PODNet's code, it is drawn about that mean with the deviation of the
        vectors.

        Args:
            column: Index of the column.
            x_NW: Vectors of the clips.
            others: Int64, the columns that give the mean length; without any it is 1.
            rng: Draws the proxies.
        """
        with torch.no_grad():
            unit_NW = normalize(x_NW.to(self.weight), dim=1)
            theta_PW = normalize(unit_NW.mean(dim=0, keepdim=True), dim=1)
            if self.weight.shape[1] > 1:
                deviation_W = unit_NW.std(dim=0, correction=0)
                if len(unit_NW) == 1:
                    deviation_W = torch.full_like(deviation_W, APART / len(deviation_W) ** 0.5)
                noise = torch.from_numpy(rng.normal(size=self.weight.shape[1:])).to(self.weight)
                theta_PW = theta_PW + deviation_W * noise
            length = self.weight[others].norm(dim=2).mean() if len(others) else 1.0
            self.weight[column] = length * theta_PW

    def imprint_new(
        self, known: int, x_NW: Tensor, columns_N: Tensor, rng: np.random.Generator
    ) -> None:
        """Imprint all columns from index `known` on, from the vectors of all clips."""
        for column in range(known, len(self.weight)):
            of_class = x_NW[(columns_N == column).to(x_NW.device)]
            self.imprint(column, of_class, torch.arange(known), rng)

    def forward(self, x_BW: Tensor) -> Tensor:
        weight_CPW: Tensor = self.weight
        if self.frozen is not None:
            # Without gradient and weight decay, frozen columns do not change by a bit.
            weight_CPW = torch.where(self.frozen[:, None, None], weight_CPW.detach(), weight_CPW)
        C, P, W = weight_CPW.shape
        theta_CPW = normalize(weight_CPW, dim=2)
        cosines_BCP = linear(normalize(x_BW, dim=1), theta_CPW.reshape(-1, W)).view(-1, C, P)
        if P == 1:
            return cosines_BCP[:, :, 0]
        return (cosines_BCP.softmax(dim=2) * cosines_BCP).sum(dim=2)

    def logits(self, x_BW: Tensor) -> Tensor:
        """Return the inputs of cross entropy, eta times the cosines, [B, C]."""
        return self.scale * self.forward(x_BW)


Classifier = Linear | Cosine


def columns(classes: list[int], labels: Tensor) -> Tensor:
    """Return the column of each label, int64 [N] on the CPU."""
    number = {label: column for column, label in enumerate(classes)}
    return torch.tensor([number[label] for label in labels.tolist()], dtype=torch.int64)
