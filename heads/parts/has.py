"""HAS: which channels of which block matter for what the network had learned. HCE, section 3.

From the hypercorrelations of each group of blocks (those of one spatial size), coarse to fine:

    squeeze   each group to 128 channels by three 4D convolutions that shrink the old places
    mix       `cascade`: the coarsest, enlarged, is added to the next, three 4D convolutions; and so
              on to the finest. `sum`: all enlarged to the finest and added, three 4D convolutions
    Z         mean over the old places, [N, 128, H, W] of the finest group
    decode    two 2D convolutions; for each group one more, a mean over places and a linear map:
              H, [N, C] for each of its blocks

Ours, where HCE is silent: the decoder's sizes and the bounds of H. Without bounds zero or less is
the least of the loss that H is trained on, and a softmax gathers on channels that agree already:
`h="bounded"` is 0.5 + sigmoid, made 1 on average over the channels.

No frame looks at another, so frames may come in parts: `frames` of them at a time, computed again
on the way back in place of being kept. Numbers and gradients are the same.

Shapes: N frames (of all clips), C channels of a block, H, W places.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from varve.heads.parts.hypercorrelation import block, correlation, enlarged, pooled

WIDTH = 128
MIXES = ("cascade", "sum")
BOUNDS = ("bounded", "softmax")
# By the size of the map: kernels and strides of the three convolutions. As published for maps of
# 28, 14 and 7 on a side.
SQUEEZE = ((21, (5, 5, 3), (4, 4, 2)), (11, (5, 3, 3), (4, 2, 2)), (0, (3, 3, 3), (2, 2, 2)))


def check(mix: str, h: str, last_stride: int, frames: int | None) -> None:
    """Refuse what `HAS` cannot be made with.

    Raises:
        ValueError: No such choice.
    """
    none = frames is not None and frames < 1
    if mix not in MIXES or h not in BOUNDS or last_stride not in (1, 2) or none:
        raise ValueError(
            f"{mix=}, {h=}, {last_stride=}, {frames=}: choose mix from {', '.join(MIXES)}, h from "
            f"{', '.join(BOUNDS)}, last_stride 1 or 2, and frames 1 or more, or None for all"
        )


class HAS(nn.Module):
    """From maps of the new and the old network to H of every block.

    Args:
        groups: Shapes (C, H, W) of the blocks by name, in order; those of one H x W are a group.
        mix: `cascade` or `sum`.
        h: `bounded` or `softmax` (times C, so that it is 1 on average too).
        last_stride: Of the last squeezing convolution: 2 as published leaves a single old place at
            224 pixels, so that most weights of the mixing see nothing; 1 leaves four.
        frames: How many at a time in training; None for all.

    Raises:
        ValueError: No such choice, or no block.
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
            self.squeezes.append(
                nn.Sequential(
                    *(
                        block(widths[i], widths[i + 1], kernels[i], (*strides[:2], last_stride)[i])
                        for i in range(3)
                    )
                )
            )
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
        """H [N, C] of every block, from its maps [N, C, H, W]."""
        z = self.agreement(new, old)
        z = self.decoder(z)
        found = {}
        for names, shared, linear in zip(self.names, self.shared, self.linear, strict=True):
            raw = linear(shared(z).mean(dim=(2, 3))).unflatten(1, (len(names), -1))
            for place, name in enumerate(names):
                found[name] = self._bounded(raw[:, place])
        return found

    def agreement(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensor:
        """Z, [N, 128, H, W]."""
        flat = [[maps[n] for names in self.names for n in names] for maps in (new, old)]
        count = len(flat[0][0])
        if self.frames is None or not torch.is_grad_enabled():
            return self._agreement(*flat[0], *flat[1])
        parts = []
        for first in range(0, count, self.frames):
            own = [x[first : first + self.frames] for maps in flat for x in maps]
            parts.append(checkpoint(self._agreement, *own, use_reentrant=False))
        return torch.cat(parts)

    def _agreement(self, *maps: Tensor) -> Tensor:
        half = len(maps) // 2
        new, old = list(maps[:half]), list(maps[half:])
        squeezed = []
        for names, squeeze in zip(self.names, self.squeezes, strict=True):
            own = [(new.pop(0), old.pop(0)) for _ in names]
            squeezed.append(squeeze(correlation([x for x, _ in own], [y for _, y in own])))
        finest = squeezed[-1].shape[2:4]
        least = [min(one.shape[dim] for one in squeezed) for dim in (4, 5)]
        squeezed = [pooled(one, least) for one in squeezed]
        if self.mix == "sum":
            summed = torch.stack([enlarged(one, finest) for one in squeezed]).sum(dim=0)
            mixed: Tensor = self.mixers[0](summed)
            return mixed.mean(dim=(4, 5))
        mixed, *finer = squeezed
        for one, mixer in zip(finer, self.mixers, strict=True):
            mixed = mixer(enlarged(mixed, one.shape[2:4]) + one)
        return mixed.mean(dim=(4, 5))

    def _bounded(self, raw_NC: Tensor) -> Tensor:
        if self.h == "softmax":
            return torch.softmax(raw_NC, dim=1) * raw_NC.shape[1]
        h_NC = 0.5 + torch.sigmoid(raw_NC)
        return h_NC / h_NC.mean(dim=1, keepdim=True)


def effective(h_NC: Tensor) -> Tensor:
    """The share of channels that H speaks of, exp(entropy) / C, mean over frames; 1 if alike."""
    p_NC = h_NC / h_NC.sum(dim=1, keepdim=True)
    entropy_N = -torch.special.xlogy(p_NC, p_NC).sum(dim=1)
    share: Tensor = entropy_N.exp().mean() / h_NC.shape[1]
    return share


def drift(h: Mapping[str, Tensor], new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensor:
    """L_hc: by how much each channel has moved, times H; summed over the blocks, a scalar.

        L_hc = sum_l mean_{n,c} H_l[n, c] |e_l[n, c] - e'_l[n, c]|^2

    with maps that are unit over channels and places, frame by frame. Ours: the mean over frames and
    channels, where the paper sums, and what is made unit.
    """
    parts = []
    for name, h_NC in h.items():
        x, y = (functional.normalize(maps[name].flatten(1), dim=1) for maps in (new, old))
        moved_NC = (x - y).square().view(*new[name].shape[:2], -1).sum(dim=2)
        parts.append((h_NC * moved_NC).mean())
    return torch.stack(parts).sum()


def _flat(width: int, out: int) -> Sequence[nn.Module]:
    return nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
