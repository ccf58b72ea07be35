"""Hierarchical aggregation (HAS of HCE, section 3): the importance H of each channel of each block.

H weighs the channels by what the network had learned before. It is computed from the
hypercorrelations of each group of blocks (those of one spatial size), coarse to fine:

    squeeze   each group to 128 channels, by three 4D convolutions that shrink the teacher's grid
    mix       `cascade`: the coarsest group, enlarged, is added to the next, then three 4D
              convolutions; and so on to the finest. `sum`: all groups are enlarged to the finest
              and added, then three 4D convolutions
    Z         mean over the teacher's grid, [N, 128, H, W] of the finest group
    decode    two 2D convolutions; for each group one more, a mean over positions and a linear map:
              H, [N, C] for each of its blocks

Ours, where HCE is silent: the sizes of the decoder and the bounds of H. Without bounds the loss
that H is trained on is least at zero or below, and a softmax concentrates on channels that agree
already: `h="bounded"` is 0.5 + sigmoid, scaled to a mean of 1 over the channels.

Frames are independent of each other and may be processed in parts: `frames` of them at a time, with
activations recomputed in the backward pass. Values and gradients are the same.

Shapes: N frames (of all clips), C channels of a block, H, W positions.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from varve.heads.parts.hypercorrelation import block, correlation, enlarged, pooled

WIDTH = 128
MIXES = ("cascade", "sum")
BOUNDS = ("bounded", "softmax")
# Least size of the map, kernels and strides of the three convolutions; published for maps of 28, 14
# and 7 on a side.
SQUEEZE = ((21, (5, 5, 3), (4, 4, 2)), (11, (5, 3, 3), (4, 2, 2)), (0, (3, 3, 3), (2, 2, 2)))


def check(mix: str, h: str, last_stride: int, frames: int | None) -> None:
    """Check the options of `HAS`.

    Raises:
        ValueError: There is no such choice.
    """
    none = frames is not None and frames < 1
    if mix not in MIXES or h not in BOUNDS or last_stride not in (1, 2) or none:
        raise ValueError(
            f"{mix=}, {h=}, {last_stride=}, {frames=}: choose mix from {', '.join(MIXES)}, h from "
            f"{', '.join(BOUNDS)}, last_stride 1 or 2, and frames 1 or more, or None for all"
        )


class HAS(nn.Module):
    """Network from the maps of the model and its teacher to H of every block.

    Args:
        groups: Shapes (C, H, W) of the blocks by name, in order; those of one H x W are a group.
        mix: `cascade` or `sum`.
        h: `bounded` or `softmax` (times C, so that its mean is 1 too).
        last_stride: Stride of the last squeezing convolution: 2, as published, leaves a single
            teacher position at 224 pixels, so that most weights of the mixing see zeros; 1 leaves
            four.
        frames: Number of frames processed at a time in training; None for all.

    Raises:
        ValueError: There is no such choice, or no block.
    """

    def __init__(
        self,
        groups: Mapping[str, tuple[int, int, int]],
        mix: str = "cascade",
        h: str = "bounded",
        last_stride: int = 2,
        frames: int | None = 8,
    ) -> None:
        super().__init__()
        check(mix, h, last_stride, frames)
        if not groups:
            raise ValueError("HAS of no block: give one at least")
        self.h, self.mix, self.frames = h, mix, frames
        sizes = sorted({shape[1:] for shape in groups.values()})  # coarse to fine
        self.names = [[n for n, shape in groups.items() if shape[1:] == size] for size in sizes]
        self.squeezes = nn.ModuleList()
        for size, names in zip(sizes, self.names, strict=True):
            kernels, strides = next(rest for least, *rest in SQUEEZE if min(size) >= least)
            widths = (len(names), 16, 64, WIDTH)
            layers = zip(pairwise(widths), kernels, (*strides[:2], last_stride), strict=True)
            self.squeezes.append(nn.Sequential(*(block(*w, k, stride) for w, k, stride in layers)))
        count = len(sizes) - 1 if mix == "cascade" else 1
        self.mixers = nn.ModuleList(
            nn.Sequential(*(block(WIDTH, WIDTH) for _ in range(3))) for _ in range(count)
        )
        self.decoder = nn.Sequential(*_flat(WIDTH, WIDTH), *_flat(WIDTH, WIDTH // 2))
        self.shared, self.linear = nn.ModuleList(), nn.ModuleList()
        for names in self.names:
            width = groups[names[0]][0]
            self.shared.append(nn.Sequential(*_flat(WIDTH // 2, width)))
            self.linear.append(nn.Linear(width, len(names) * width))

    def forward(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return H [N, C] of every block, from its maps [N, C, H, W]."""
        z = self.agreement(new, old)
        z = self.decoder(z)
        importances = {}
        for names, shared, linear in zip(self.names, self.shared, self.linear, strict=True):
            raw = linear(shared(z).mean(dim=(2, 3))).unflatten(1, (len(names), -1))
            for index, name in enumerate(names):
                importances[name] = self._bounded(raw[:, index])
        return importances

    def agreement(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensor:
        """Return Z, [N, 128, H, W] of the finest group."""
        flat = [maps[n] for maps in (new, old) for names in self.names for n in names]
        if self.frames is None or not torch.is_grad_enabled():
            return self._agreement(*flat)
        chunks = zip(*(torch.split(x, self.frames) for x in flat), strict=True)
        parts = [checkpoint(self._agreement, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts)

    def _agreement(self, *maps: Tensor) -> Tensor:
        half = len(maps) // 2
        new, old = list(maps[:half]), list(maps[half:])
        squeezed = []
        for names, squeeze in zip(self.names, self.squeezes, strict=True):
            pairs = [(new.pop(0), old.pop(0)) for _ in names]
            squeezed.append(squeeze(correlation([x for x, _ in pairs], [y for _, y in pairs])))
        finest = squeezed[-1].shape[2:4]
        least = [min(group.shape[dim] for group in squeezed) for dim in (4, 5)]
        squeezed = [pooled(group, least) for group in squeezed]
        if self.mix == "sum":
            summed = torch.stack([enlarged(group, finest) for group in squeezed]).sum(dim=0)
            mixed: Tensor = self.mixers[0](summed)
            return mixed.mean(dim=(4, 5))
        mixed, *finer = squeezed
        for group, mixer in zip(finer, self.mixers, strict=True):
            mixed = mixer(enlarged(mixed, group.shape[2:4]) + group)
        return mixed.mean(dim=(4, 5))

    def _bounded(self, raw_NC: Tensor) -> Tensor:
        if self.h == "softmax":
            return torch.softmax(raw_NC, dim=1) * raw_NC.shape[1]
        h_NC = 0.5 + torch.sigmoid(raw_NC)
        return h_NC / h_NC.mean(dim=1, keepdim=True)


def effective(h_NC: Tensor) -> Tensor:
    """Return the effective share of channels in H, exp(entropy) / C, averaged over frames.

    It is 1 if all channels are equally important.
    """
    p_NC = h_NC / h_NC.sum(dim=1, keepdim=True)
    entropy_N = -torch.special.xlogy(p_NC, p_NC).sum(dim=1)
    share: Tensor = entropy_N.exp().mean() / h_NC.shape[1]
    return share


def drift(h: Mapping[str, Tensor], new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensor:
    """Return L_hc, the importance-weighted feature distillation loss, a scalar.

        L_hc = sum_l mean_{n,c} H_l[n, c] |e_l[n, c] - e'_l[n, c]|^2

    with each frame's map L2-normalised over channels and positions. Ours: this normalisation, and
    the mean over frames and channels, where the paper sums.
    """
    parts = []
    for name, h_NC in h.items():
        x, y = (functional.normalize(maps[name].flatten(1), dim=1) for maps in (new, old))
        moved_NC = (x - y).square().view(*new[name].shape[:2], -1).sum(dim=2)
        parts.append((h_NC * moved_NC).mean())
    return torch.stack(parts).sum()


def _flat(width: int, out: int) -> Sequence[nn.Module]:
    return nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
