"""Temporal shift (TSM): some channels of each frame come from its neighbours in time.

Temporal Shift Module (Lin, Gan and Han, ICCV 2019), section 4, its residual form: the shift is
before conv1 inside the block's branch, and the identity path is unchanged. For each clip, with
F = C // fold, as in the authors' code:

    x[t, 0:F]    <- x[t + 1, 0:F]       the first fold comes from the next frame (left in time)
    x[t, F:2F]   <- x[t - 1, F:2F]      the second one from the frame before (right in time)
    x[t, 2F:]    unchanged

Frames outside of the clip are zeros. Ours: fold = 0 shifts nothing and is the frozen block, bit for
bit. (The authors shift every second block in ResNet-101 and deeper: graft those.)

Shapes: N = B * T frames, C channels, H x W a grid.
"""

import copy

from torch import Tensor, nn

from varve.heads.grafts._clips import by_clip, frames_of, refuse_video_stage
from varve.heads.grafts._inner import train_unless_frozen


class Shift(nn.Module):
    """Module after a shift of 1/fold of the channels forward and as many backward in time."""

    def __init__(self, inner: nn.Module, frames: int, fold: int) -> None:
        super().__init__()
        self.inner = inner
        self.frames = frames
        self.fold = fold

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_BTCHW = by_clip(x_NCHW, self.frames)
        if self.fold:
            shifted_NCHW = x_NCHW.clone()
            out_BTCHW = by_clip(shifted_NCHW, self.frames)
            F = x_NCHW.shape[1] // self.fold
            out_BTCHW[:, :-1, :F] = x_BTCHW[:, 1:, :F]
            out_BTCHW[:, -1, :F] = 0
            out_BTCHW[:, 1:, F : 2 * F] = x_BTCHW[:, :-1, F : 2 * F]
            out_BTCHW[:, 0, F : 2 * F] = 0
            x_NCHW = shifted_NCHW
        out: Tensor = self.inner(x_NCHW)
        return out


class TemporalShift(nn.Module):
    """Graft of a residual block whose conv1 reads shifted channels. It adds no parameters.

    To gate or to regularise a shifted block, shift first and put the other graft around it.

    Args:
        inner: Residual block with a convolution `conv1` (torchvision's BasicBlock, Bottleneck).
        frames: Number T of frames per clip.
        fold: Divisor: 1/fold of the channels come from the next frame and 1/fold from the one
            before; at least 2, or 0 for no shift.
    """

    code = "temporal_shift/1"
    forms = ("map",)
    token_wise = False
    train = train_unless_frozen

    def __init__(self, inner: nn.Module, frames: int, fold: int = 8) -> None:
        super().__init__()
        refuse_video_stage(self, inner)
        conv = getattr(inner, "conv1", None)
        if not isinstance(conv, nn.Conv2d):
            parts = ", ".join(name for name, _ in inner.named_children()) or "no parts"
            raise ValueError(
                f"a temporal shift on {type(inner).__name__} ({parts}), which has no convolution "
                "conv1: it stands for residual blocks, such as layer3.0, and is the first graft "
                "on them"
            )
        if fold != 0 and not 2 <= fold <= conv.in_channels:
            raise ValueError(
                f"{fold=} of {conv.in_channels} channels: give 0 for no shift, or 2 to "
                f"{conv.in_channels}"
            )
        self.inner = inner
        self.frames = frames_of(self, inner, frames)
        self.fold = fold

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # The block's forward with another conv1, in a shallow copy for this call alone: it shares
        # the block's parts, and the block is unchanged. The copy needs a separate table of parts.
        # It takes tens of microseconds.
        block = copy.copy(self.inner)
        vars(block)["_modules"] = dict(self.inner._modules)
        block.conv1 = Shift(self.inner.get_submodule("conv1"), self.frames, self.fold)
        out: Tensor = block(x_NCHW)
        return out


build = TemporalShift
