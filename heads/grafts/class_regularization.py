"""Class regularization: channels that speak for the class predicted so far are made louder.

Class Regularization (Stergiou, Poppe and Veltkamp, 2020). At the end of a stage with activations a
in [B, C, T, H, W], and W_fc [K, C_fc] the classifier's weight:

    W_i = conv1x1x1(detach(W_fc))  [K, C]           the only thing here that trains
    Z   = W_i . mean of a over T, H, W              a score for each class
    c*  = argmax Z                                  in training and in test alike
    m   = row c* of W_i, min-max scaled to [0, 1]
    a  <- a * (2 A m + (1 - A))                     factors from 1 - A to 1 + A

Ours: the last line, since the printed Eq. 3 has factors from 0 to A (1 - A), which ends the signal
at A = 0 and at A = 1; this reading is the identity at A = 0 and scales both up and down, as the
text says. Of a classifier by cosines to P vectors a class, W_fc has a class's mean of unit vectors
less that of all classes: what classes share moves no softmax, and would outweigh what tells them
apart in m. The 1x1x1 convolution has no bias: one would add the same to every class. It starts
normal, of variance 1 / C_fc, or where `align` puts it: nothing teaches c*, for no gradient passes
the argmax, and from a random start it was seen to stay at chance. m = (w - min + e / 2) /
(max - min + e) with e = 1e-6, so that a row which prefers no channel, such as one that has learned
nothing, is the identity. On ViT tokens the mean is over the patches, and the factors hold for every
token, the class token too, which is what later stages read.

Shapes: N = B * T frames, C channels, K classes, F = C_fc; L tokens with P prefix tokens first.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads.grafts._clips import by_clip, frames_of

EPS = 1e-6
RIDGE = 1e-3


class ClassRegularization(nn.Module):
    """`inner`, and a factor for each channel of a clip: maps [N, C, H, W] or tokens [N, L, C].

    The classifier is held and read, never trained from here: its weight is detached, its mode left
    alone. Whatever classes it has at a forward count; new ones need no word, and before the first
    one there is nothing to do. Several blocks may share one classifier.

    Args:
        inner: The stage's module.
        classifier: A module with a `weight` [K, F], a row a class, or [K, P, F], P vectors a class;
            K may change, F may not.
        channels: C of the stage's output.
        frames: T; the class is predicted for a clip as a whole.
        strength: A, from 0 (the identity) to 1. The paper's text leaves it open; we use 0.1, 0.2,
            0.3, 0.4 by depth.
        prefix: P. Class and register tokens; 0 on maps.
        seed: The projection W_fc -> W_i is drawn from it.
    """

    code = "class_regularization/1"
    token_wise = False

    def __init__(
        self,
        inner: nn.Module,
        classifier: Any,
        channels: int,
        frames: int,
        strength: float,
        prefix: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        weight = getattr(classifier, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 3):
            raise ValueError(
                f"a classifier {type(classifier).__name__} without a weight [classes, width] or "
                "[classes, proxies, width]: give the module that the classes are told apart by, "
                "such as nn.Linear"
            )
        if not 0 <= strength <= 1:
            raise ValueError(f"{strength=}: give a number from 0, the identity, to 1")
        self.inner = inner
        self.classifier = classifier
        self.channels = channels
        self.frames = frames_of(self, inner, frames)
        self.strength = strength
        self.prefix = prefix
        generator = torch.Generator("cpu").manual_seed(seed)
        width = weight.shape[-1]
        drawn_CF = torch.randn(
            (channels, width), generator=generator, dtype=torch.float32, device="cpu"
        )
        self.projection = nn.Parameter(drawn_CF * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        rows_KC = self._rows()
        if not len(rows_KC):
            return out
        wide = out.to(rows_KC.dtype)
        chosen_BC = _scaled(rows_KC[self._best(wide, rows_KC)])
        factors_BC = 2 * self.strength * chosen_BC + (1 - self.strength)
        factors_NC = factors_BC.repeat_interleave(self.frames, dim=0)
        factors = factors_NC[:, :, None, None] if out.ndim == 4 else factors_NC[:, None]
        return (wide * factors).to(out.dtype)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """c* of each clip, int64 [B]: the row of the classifier that the channels are scaled by.

        The classifier must have one at least.

        Args:
            x: The stage's input, as for `forward`.
        """
        rows_KC = self._rows()
        return self._best(self.inner(x).to(rows_KC.dtype), rows_KC)

    @torch.no_grad()
    def align(self, means_BC: Tensor, vectors_BF: Tensor, alike: bool = False) -> None:
        """Start the projection where W_i . mean of a is W_fc . f(x), as nearly as can be.

        The least squares between clips' means of activations and what the classifier takes of them,
        by a ridge of `RIDGE` times a channel's sum of squares. What these clips do not span is left
        at zero, and classes to come may lie there; where channels are `alike`, at the identity.

        Args:
            means_BC: As `means` gives them, of clips that were not scaled here.
            vectors_BF: What the classifier takes of the same clips.
            alike: The vectors are of these very channels, F being C.
        """
        x_BC, y_BF = means_BC.double().cpu(), vectors_BF.double().cpu()
        unit_CC = torch.eye(x_BC.shape[1], dtype=torch.float64)
        start_CF = torch.zeros_like(self.projection, dtype=torch.float64, device="cpu")
        if alike:
            start_CF = unit_CC
        gram_CC = x_BC.T @ x_BC
        gram_CC += (RIDGE * gram_CC.diagonal().mean()).clamp(min=EPS) * unit_CC
        step_CF = torch.linalg.solve(gram_CC, x_BC.T @ (y_BF - x_BC @ start_CF))
        self.projection.copy_(start_CF + step_CF)

    @torch.no_grad()
    def means(self, out: Tensor) -> Tensor:
        """What a class is predicted by, [B, C]: means over places and frames of outputs."""
        if out.ndim == 4 and out.shape[1] == self.channels and not self.prefix:
            pooled_NC = out.mean((2, 3))
        elif out.ndim == 3 and out.shape[2] == self.channels and out.shape[1] > self.prefix:
            pooled_NC = out[:, self.prefix :].mean(1)
        else:
            raise ValueError(
                f"class regularization of {self.channels} channels and prefix={self.prefix} on "
                f"{list(out.shape)}: it takes maps [N, channels, H, W] with prefix=0, or tokens "
                "[N, L, channels], the prefix being the stage's"
            )
        return by_clip(pooled_NC, self.frames).mean(1)

    @torch.no_grad()
    def excitations(self) -> Tensor:
        """m of every class, [K, C] in [0, 1]: how much each channel here speaks for it.

        With `predict`, what a picture of the channels or places that a class excites is made of.
        """
        return _scaled(self._rows())

    def train(self, mode: bool = True) -> Self:
        """Set the mode; an inner without trainable parameters stays in eval."""
        self.training = mode
        self.inner.train(mode and any(p.requires_grad for p in self.inner.parameters()))
        return self

    def _rows(self) -> Tensor:
        """W_i [K, C], in the projection's type."""
        weight: Tensor = self.classifier.weight.detach().to(self.projection)
        if weight.ndim == 3:
            weight = normalize(weight, dim=2).mean(dim=1)
            weight = weight - weight.mean(dim=0)
        return weight @ self.projection.T

    @torch.no_grad()
    def _best(self, wide: Tensor, rows_KC: Tensor) -> Tensor:
        pooled_BC = self.means(wide)
        # Not a matrix product: with so few rows, the bits of one were seen to follow a clip's place
        # in the batch, and no near tie may fall by that.
        scores_BK = (pooled_BC[:, None] * rows_KC).sum(2)
        classes_B: Tensor = scores_BK.argmax(dim=1)
        return classes_B


def _scaled(rows_C: Tensor) -> Tensor:
    """Each row from its least number to its greatest, as 0 to 1; one without a range is 1/2."""
    low, high = rows_C.aminmax(dim=1, keepdim=True)
    return (rows_C - low + EPS / 2) / (high - low + EPS)


build = ClassRegularization
