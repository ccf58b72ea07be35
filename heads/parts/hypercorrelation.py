"""Hypercorrelations: 4D correlations between the maps of a network and those of its teacher.

The teacher is the network after the previous task. HCE, Eq. 1, for the blocks l of one spatial
size, position p of the network's map and position q of the teacher's:

    C_l[p, q] = relu(<e_l[p], e'_l[q]>),   e, e': channels at a position, made unit (eps 1e-5)

All pairs of positions count: the printed element-wise product could not have the printed shape.

Convolutions over both grids are center-pivot ones: of a dense 4D kernel only the weights at the
centre of one of the grids remain. This is the sum of two 2D convolutions, over the network's grid
at fixed teacher positions and over the teacher's grid at fixed network positions. Only the
teacher's grid is strided.

Shapes: N frames (of all clips), L blocks, C channels, H, W grid of the network, U, V grid of the
teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def correlation(new: Sequence[Tensor], old: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Return hypercorrelations, [N, L, H, W, U, V].

    Args:
        new: Maps of the network, [N, C, H, W] for each of L blocks; C may differ by block.
        old: Maps of the teacher, [N, C, U, V] for the same blocks.
        eps: Added to the norms.
    """
    pairs = []
    for x_NCHW, y_NCUV in zip(new, old, strict=True):
        x, y = (m / (m.norm(dim=1, keepdim=True) + eps) for m in (x_NCHW, y_NCUV))
        products = x.flatten(2).mT @ y.flatten(2)
        pairs.append(products.relu().unflatten(2, y.shape[2:]).unflatten(1, x.shape[2:]))
    return torch.stack(pairs, dim=1)


class CenterPivot4d(nn.Module):
    """Center-pivot 4D convolution, with input [N, C, H, W, U, V].

    The output is [N, D, H, W, ceil(U / stride), ceil(V / stride)].

    Args:
        width: Input channels C.
        out: Output channels D.
        kernel: Kernel size in both grids, odd.
        stride: Stride in the teacher's grid.
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
    """Return a center-pivot convolution with normalisation and ReLU."""
    return nn.Sequential(
        CenterPivot4d(width, out, kernel, stride), nn.GroupNorm(4, out), nn.ReLU(inplace=True)
    )


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the input with the network's grid resized, bilinearly with aligned corners."""
    N, C, H, W, U, V = x.shape
    flat = x.permute(0, 4, 5, 1, 2, 3).reshape(-1, C, H, W)
    flat = functional.interpolate(flat, tuple(size), mode="bilinear", align_corners=True)
    return flat.view(N, U, V, C, *size).permute(0, 3, 4, 5, 1, 2)


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the input with the teacher's grid averaged to another size, if it differs.

    At 224 pixels the grids of all groups have the same size; those of spectrograms may not.
    """
    U, V = size
    if tuple(x.shape[4:]) == (U, V):
        return x
    flat = functional.adaptive_avg_pool2d(x.flatten(0, 3), (U, V))
    return flat.reshape(*x.shape[:4], U, V)
