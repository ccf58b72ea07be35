"""Hypercorrelations: how the maps of a network agree with those of the network before it, in 4D.

HCE, Eq. 1, for the blocks l of one spatial size, place p of the new map and q of the old one:

    C_l[p, q] = relu(<e_l[p], e'_l[q]>),   e, e': channels at a place, made unit (eps 1e-5)

All pairs of places: the printed product, place by place, could not have the printed shape.

Convolutions over both pairs of places are center-pivot ones: of a dense 4D kernel only the weights
stay that are in the middle of one pair, so that it is two 2D convolutions, over the new places at
fixed old ones and over the old places at fixed new ones. Only the old places are strided.

Shapes: N frames (of all clips), L blocks, C channels, H, W places of the new map, U, V of the old.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def correlation(new: Sequence[Tensor], old: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """C, [N, L, H, W, U, V].

    Args:
        new, old: Maps [N, C, H, W] and [N, C, U, V] of each of L blocks; C may differ by block.
    """
    pairs = []
    for x_NCHW, y_NCUV in zip(new, old, strict=True):
        x, y = (m / (m.norm(dim=1, keepdim=True) + eps) for m in (x_NCHW, y_NCUV))
        places = x.flatten(2).mT @ y.flatten(2)
        pairs.append(places.relu().unflatten(2, y.shape[2:]).unflatten(1, x.shape[2:]))
    return torch.stack(pairs, dim=1)


class CenterPivot4d(nn.Module):
    """[N, C, H, W, U, V] to [N, D, H, W, ceil(U / stride), ceil(V / stride)].

    Args:
        width: C.
        out: D.
        kernel: Odd, of both pairs.
        stride: Of the old places.
    """

    def __init__(self, width: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.new = nn.Conv2d(width, out, kernel, padding=kernel // 2)
        self.old = nn.Conv2d(width, out, kernel, stride, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        N, C, H, W, _, _ = x.shape
        pivots = x[..., :: self.stride, :: self.stride]
        U, V = pivots.shape[4:]
        at_old: Tensor = self.new(pivots.permute(0, 4, 5, 1, 2, 3).reshape(-1, C, H, W))
        at_new: Tensor = self.old(x.permute(0, 2, 3, 1, 4, 5).reshape(-1, C, *x.shape[4:]))
        at_old = at_old.view(N, U, V, -1, H, W).permute(0, 3, 4, 5, 1, 2)
        return at_old + at_new.view(N, H, W, -1, U, V).permute(0, 3, 1, 2, 4, 5)


def block(width: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        CenterPivot4d(width, out, kernel, stride), nn.GroupNorm(4, out), nn.ReLU(inplace=True)
    )


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """The new places brought to another size, bilinear with corners on corners."""
    N, C, H, W, U, V = x.shape
    flat = x.permute(0, 4, 5, 1, 2, 3).reshape(-1, C, H, W)
    flat = functional.interpolate(flat, tuple(size), mode="bilinear", align_corners=True)
    return flat.view(N, U, V, C, *size).permute(0, 3, 4, 5, 1, 2)


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """The old places averaged to another size; as they are where it is theirs.

    At 224 pixels all maps end at the same few; those of spectrograms may not.
    """
    U, V = size
    if tuple(x.shape[4:]) == (U, V):
        return x
    flat = functional.adaptive_avg_pool2d(x.flatten(0, 3), (U, V))
    return flat.reshape(*x.shape[:4], U, V)
