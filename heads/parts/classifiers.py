"""Classifiers whose columns are appended, one or more to a class.

Shapes: B clips, W width of a clip's vector, C classes, P proxies a class.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

# Of a clip's vector before a linear classifier. Ours: networks give vectors of lengths from 1 to
# 50, and one learning rate cannot serve them all. Gradient descent on softmax regression is stable
# up to lr * length**2 / 2 = 2 * (1 + momentum): at lr = 0.01 and momentum = 0.9, up to a length of
# 27.
LENGTH = 16.0
# How far proxies of a class of one clip are drawn from it: without, they were one proxy for good.
APART = 0.1


class Linear(nn.Module):
    """w_c x + b_c, x made `LENGTH` long.

    New columns start at zero: the problem is convex, and needs no draw.
    """

    decays = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, width))
        self.bias = nn.Parameter(torch.zeros(0))

    def grow(self, classes: int, rng: np.random.Generator | None = None) -> None:
        """Append columns, up to so many. Nothing is drawn."""
        with torch.no_grad():
            more = classes - len(self.weight)
            self.weight = nn.Parameter(
                torch.cat([self.weight, self.weight.new_zeros(more, self.weight.shape[1])])
            )
            self.bias = nn.Parameter(torch.cat([self.bias, self.bias.new_zeros(more)]))

    def forward(self, x_BW: Tensor) -> Tensor:
        return linear(LENGTH * normalize(x_BW, dim=1), self.weight, self.bias)

    def logits(self, x_BW: Tensor) -> Tensor:
        return self.forward(x_BW)


class Cosine(nn.Module):
    """cos(theta_c, x), or a weighted mean over P proxies of a class: [B, C] in [-1, 1].

    With P > 1 PODNet's local similarity classifier (Douillard et al., ECCV 2020):

        y_c = sum_p s_cp <theta_cp, x>,   s_cp = softmax_p <theta_cp, x>,   both of unit length

    The learned `scale` is eta, by which a loss multiplies; it is no part of the cosines.

    Args:
        proxies: P.
        scale: Of eta at the start. Ours: 20, where the papers start from 1, at ten times the rate
            and for many more steps. All vectors of one network are alike, so that cosines hardly
            differ: on ResNet-18 features of 24 hand shapes, 12 and then 3 at a time, LUCIR ends at
            44, 69, 88 and 89 % from 1, 10, 20 and 30.
    """

    decays = False  # a cosine ignores the length, and held columns stay as they are

    def __init__(self, width: int, proxies: int = 1, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, proxies, width))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.held: Tensor | None = None

    def grow(self, classes: int, rng: np.random.Generator) -> None:
        """Append columns, up to so many, drawn uniformly in +-1 / sqrt(W)."""
        _, P, W = self.weight.shape
        drawn = rng.uniform(-1, 1, (classes - len(self.weight), P, W)) / W**0.5
        more = torch.from_numpy(drawn).to(self.weight)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), more]))

    def imprint(self, column: int, x_NW: Tensor, others: Tensor, rng: np.random.Generator) -> None:
        """Start a column from the clips of its class.

        LUCIR's code: the unit mean of unit vectors, at the mean length of other columns. With
        proxies PODNet's code: drawn about that mean with the vectors' own deviation.

        Args:
            others: Int64, the columns whose mean length it takes; with none it takes 1.
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

    def forward(self, x_BW: Tensor) -> Tensor:
        weight_CPW: Tensor = self.weight
        if self.held is not None:
            # Held columns get no gradient, and without weight decay stay as they are to the bit.
            weight_CPW = torch.where(self.held[:, None, None], weight_CPW.detach(), weight_CPW)
        C, P, W = weight_CPW.shape
        theta_CPW = normalize(weight_CPW, dim=2)
        cosines_BCP = linear(normalize(x_BW, dim=1), theta_CPW.reshape(-1, W)).view(-1, C, P)
        if P == 1:
            return cosines_BCP[:, :, 0]
        return (cosines_BCP.softmax(dim=2) * cosines_BCP).sum(dim=2)

    def logits(self, x_BW: Tensor) -> Tensor:
        """What cross entropy takes: eta times the cosines."""
        return self.scale * self.forward(x_BW)


Classifier = Linear | Cosine


def columns(classes: list[int], labels: Tensor) -> Tensor:
    """The labels' columns, int64 [N] on the CPU."""
    number = {label: column for column, label in enumerate(classes)}
    return torch.tensor([number[label] for label in labels.tolist()], dtype=torch.int64)
