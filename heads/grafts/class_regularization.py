"""Class regularization: channels are re-weighted by the class predicted from them.

Class Regularization (Stergiou, Poppe and Veltkamp, 2020). At the end of a stage with activations a
in [B, C, T, H, W], and W_fc [K, C_fc] the classifier's weight:

    W_i = conv1x1x1(detach(W_fc))  [K, C]           the only thing here that trains
    Z   = W_i . mean of a over T, H, W              a score for each class
    c*  = argmax Z                                  in training and in test
    m   = row c* of W_i, min-max scaled to [0, 1]
    a  <- a * (2 A m + (1 - A))                     factors from 1 - A to 1 + A

Ours: the last line, since the printed Eq. 3 has factors from 0 to A (1 - A), which is no signal at
A = 0 and at A = 1; this reading is the identity at A = 0 and scales both up and down, as the
paper's text states. For a classifier by cosines to P vectors per class, W_fc is the mean of a
class's unit vectors minus the mean over all classes: a part that all classes share changes no
softmax, and would dominate m. The 1x1x1 convolution has no bias: it would add the same number to
every class. It starts normal, of variance 1 / C_fc, or as set by `align`: c* is not trained, since
no gradient passes the argmax, and from a random start it was seen to stay at chance.
m = (w - min + e / 2) / (max - min + e) with e = 1e-6, so that a row without preference, such as an
untrained one, is the identity. On ViT tokens the mean is over the patches, and the factors apply to
every token, also to the class token, which later stages read.

On a block of a 3D network, T are the time steps that the block gives, which may be fewer than it is
given: the mean is over time and space, and the factors apply to each time step and position.

Shapes: N = B * T frames, C channels, K classes, F = C_fc; L tokens with P prefix tokens first.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads.grafts._clips import by_clip, frames_of, given_steps
from varve.heads.grafts._inner import train_unless_frozen

EPS = 1e-6
RIDGE = 1e-3


class ClassRegularization(nn.Module):
    """Graft with a factor for each channel of a clip: maps [N, C, H, W] or tokens [N, L, C].

    The classifier is read, never trained from here: its weight is detached, and its mode is not
    changed. Each forward uses the classes that it has by then; without classes the graft is the
    identity. Several blocks may share one classifier.

    Args:
        inner: Module of the stage.
        classifier: Module with a `weight` [K, F], a row per class, or [K, P, F], P vectors per
            class; K may change, F may not.
        channels: Channels C of the stage's output.
        frames: Number T of frames per clip that the stage gives; one class is predicted for the
            whole clip.
        strength: A, from 0 (the identity) to 1. The paper's text leaves it open; we use 0.1, 0.2,
            0.3, 0.4 by depth.
        prefix: Number P of class and register tokens; 0 on maps.
        seed: Seed of the projection from W_fc to W_i.

    Attributes:
        frames: Number of frames per clip that the stage is given.

    Raises:
        ValueError: An option is out of range, the classifier has no weight, or `forward` is given
            clips of another number of frames, channels or prefix tokens.
    """

    code = "class_regularization/1"
    token_wise = False
    train = train_unless_frozen

    def __init__(
        self,
        inner: nn.Module,
        classifier: Any,
        channels: int,
        frames: int,
        strength: float = 0.3,
        prefix: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        weight = getattr(classifier, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 3):
            raise ValueError(
                f"a classifier {type(classifier).__name__} without a weight [classes, width] or "
                "[classes, proxies, width]: give the module that distinguishes the classes, such "
                "as nn.Linear"
            )
        if not 0 <= strength <= 1:
            raise ValueError(f"{strength=}: give a number from 0, the identity, to 1")
        self.inner = inner
        self.classifier = classifier
        self.channels = channels
        self._steps = frames
        self.frames = frames_of(self, inner, frames and given_steps(inner, frames))
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
        if len(out) * self.frames != len(x) * self._steps:
            raise ValueError(
                f"class regularization of clips of {self._steps} time steps, on a stage that gives "
                f"{len(out)} for {len(x)}: give `frames` the time steps of the stage's output"
            )
        if not self.strength or not len(self.classifier.weight):
            return out  # the identity, without its cost
        rows_KC = self._rows()
        wide = out.to(rows_KC.dtype)
        chosen_BC = _scaled(rows_KC[self._best(wide, rows_KC)])
        factors_BC = 2 * self.strength * chosen_BC + (1 - self.strength)
        factors_NC = factors_BC.repeat_interleave(self._steps, dim=0)
        factors = factors_NC[:, :, None, None] if out.ndim == 4 else factors_NC[:, None]
        return (wide * factors).to(out.dtype)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return c* of each clip, int64 [B]: the row of the classifier that scales the channels.

        The classifier must have at least one class.

        Args:
            x: Input of the stage, as for `forward`.
        """
        rows_KC = self._rows()
        return self._best(self.inner(x).to(rows_KC.dtype), rows_KC)

    @torch.no_grad()
    def align(self, means_BC: Tensor, vectors_BF: Tensor, alike: bool = False) -> None:
        """Fit the projection so that W_i . mean of a approximates W_fc . f(x).

        This is ridge regression from the clips' mean activations to the classifier's input, with
        `RIDGE` times the mean sum of squares of a channel. Directions that these clips do not span,
        where later classes may lie, are zero; with `alike`, the identity.

        Args:
            means_BC: Results of `means`, of clips that were not scaled here.
            vectors_BF: Input of the classifier for the same clips.
            alike: Whether the vectors have these same channels, with F = C.
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
        """Return the mean activations that predict a class, over positions and frames, [B, C]."""
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
        return by_clip(pooled_NC, self._steps).mean(1)

    @torch.no_grad()
    def excitations(self) -> Tensor:
        """Return m of every class, [K, C] in [0, 1]: the weight of each channel for that class.

        With `predict` it serves to draw the channels or positions that a class excites.
        """
        return _scaled(self._rows())

    def _rows(self) -> Tensor:
        """Return W_i [K, C], in the projection's type."""
        weight: Tensor = self.classifier.weight.detach().to(self.projection)
        if weight.ndim == 3:
            weight = normalize(weight, dim=2).mean(dim=1)
            weight = weight - weight.mean(dim=0)
        return weight @ self.projection.T

    @torch.no_grad()
    def _best(self, wide: Tensor, rows_KC: Tensor) -> Tensor:
        pooled_BC = self.means(wide)
        # Not a matrix product: with so few rows, its bits were seen to depend on a clip's row in
        # the batch, which must not decide a near tie.
        scores_BK = (pooled_BC[:, None] * rows_KC).sum(2)
        classes_B: Tensor = scores_BK.argmax(dim=1)
        return classes_B


def _scaled(rows_C: Tensor) -> Tensor:
    """Return each row min-max scaled to [0, 1]; a constant row is 1/2."""
    low, high = rows_C.aminmax(dim=1, keepdim=True)
    return (rows_C - low + EPS / 2) / (high - low + EPS)


build = ClassRegularization
