"""Gate of HF-Net: each frame passes part of its features to the frame before it.

HF-Net, after a block with output F in [B, T, C, H, W]; a shift is by one frame, with zeros:

    F-  = F shifted left                                    (frame t sees frame t + 1)
    G-  = tanh(Conv3d(C -> 1, kernel 2x3x3)[F, F-])         a number per position, for all channels
    G+  = G- shifted right
    out = G- * F- + (1 - G+) * F

Frame t + 1 loses exactly the part G-[t] * F[t + 1] that is added to frame t: the sum over the
frames of a clip is unchanged. There are 18 C + 1 parameters.

Ours, where the paper is silent: kernel and bias start at zero, the identity; on ViT tokens the
patches are gated as a square grid and the prefix tokens are unchanged (so after the last block,
where only the class token is read, a gate has no effect); the non-conservative form computes G+ by
a second convolution of the same pair, shifted right too, so that it differs from the conservative
one only in that the two gates are independent.

Shapes: N = B * T frames, C channels, H x W a grid, L tokens with P prefix tokens first, G gates.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from varve.heads.grafts._clips import frames_of, refuse_video_stage, shift_left, shift_right
from varve.heads.grafts._inner import train_unless_frozen


class HFGate(nn.Module):
    """Graft that gates the output of a stage: maps [N, C, H, W] or tokens [N, L, C].

    Args:
        inner: Module of the stage.
        channels: Channels C of its output.
        frames: Number T of frames per clip.
        conservative: False for two independent gates, with twice the parameters.
        prefix: Number P of class and register tokens; 0 on maps.
        seed: Unused, since all parameters start at zero; every graft has it.
    """

    code = "hf_gate/1"
    token_wise = False
    train = train_unless_frozen

    def __init__(
        self,
        inner: nn.Module,
        channels: int,
        frames: int,
        conservative: bool = True,
        prefix: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        refuse_video_stage(self, inner)
        self.inner = inner
        self.channels = channels
        self.frames = frames_of(self, inner, frames)
        self.conservative = conservative
        self.prefix = prefix
        gates = 1 if conservative else 2
        zeros = torch.zeros(gates, channels, 2, 3, 3, dtype=torch.float32, device="cpu")
        self.weight = nn.Parameter(zeros)  # of a Conv3d: the pair's own frame first, then F-
        self.bias = nn.Parameter(zeros.new_zeros(gates))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        wide = out.to(self.weight.dtype)
        minus, plus = self._gates(wide)
        # The maps first in each product: it then has their memory format.
        kept = wide * (1 - shift_right(plus, self.frames))
        return (shift_left(wide, self.frames) * minus + kept).to(out.dtype)

    @torch.no_grad()
    def gates(self, x: Tensor) -> Tensor:
        """Return G- of every position, [N, H, W] in (-1, 1): the share taken from the next frame.

        The last frame of a clip has no next frame: its gate has no effect and is returned as 0.

        Args:
            x: Input of the stage, as for `forward`.
        """
        wide = self.inner(x).to(self.weight.dtype)
        minus, _ = self._gates(wide)
        minus[self.frames - 1 :: self.frames] = 0
        if wide.ndim == 4:
            return minus[:, 0]
        side = math.isqrt(wide.shape[1] - self.prefix)
        return minus[:, self.prefix :, 0].reshape(-1, side, side)

    def _gates(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Return G-, and G+ before its shift: [N, 1, H, W] or [N, L, 1]."""
        map_NCHW = self._map(wide)
        # A kernel over two frames is two kernels over one frame, with the sums of the second
        # shifted left: one convolution of the frames, and no pairs of them in memory.
        kernels = self.weight.transpose(1, 2).flatten(0, 1)
        sums = functional.conv2d(map_NCHW, kernels, padding=1)
        current, following = sums[:, 0::2], sums[:, 1::2]
        gates = torch.tanh(current + shift_left(following, self.frames) + self.bias[:, None, None])
        if wide.ndim == 4:
            return gates[:, :1], gates[:, -1:]
        # The gate of a prefix token is zero: the token is unchanged.
        gates = functional.pad(gates.flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))
        return gates[..., :1], gates[..., -1:]

    def _map(self, wide: Tensor) -> Tensor:
        if wide.ndim == 4 and wide.shape[1] == self.channels and not self.prefix:
            return wide
        if wide.ndim == 3 and wide.shape[2] == self.channels:
            patches_NLC = wide[:, self.prefix :]
            N, L, C = patches_NLC.shape
            side = math.isqrt(L)
            if side and side * side == L:
                return patches_NLC.reshape(N, side, side, C).permute(0, 3, 1, 2)
        raise ValueError(
            f"a gate of {self.channels} channels and prefix={self.prefix} on {list(wide.shape)}: "
            "it takes maps [N, channels, H, W] with prefix=0, or tokens [N, prefix + side * side, "
            "channels], the prefix being the stage's"
        )


build = HFGate
