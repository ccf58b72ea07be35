"""Video Swin transformers of torchvision: `stem, layer1.0 ... layer4.1, pool`, and `fc`.

Shifted windows of 8 x 7 x 7 patches (Liu et al., CVPR 2022), over clips of `FRAMES` frames. A patch
covers two frames, so every stage gives 8 time steps, and `pool` one vector a clip. The first block
of each later layer begins by merging 2 x 2 patches.

Weights are torchvision's tags (KINETICS400_V1), files or seeds. The preprocessing is that of the
tag, but the resizing is antialiased. Torchvision reports the accuracy of clips of 32 frames; any
number has the same parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones._stage import CLASSIFIER, Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.backbones.video import _over_time
from varve.pipeline.backbones.video._over_time import OverTime

FRAMES = 16
SLOW = True


def networks() -> list[str]:
    """Return the names of the networks."""
    return ["swin3d_t", "swin3d_s", "swin3d_b"]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of its blocks.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    return _over_time.build(network, weights, precision, "head", stages)


def stages(whole: Any, normalise: Normalise) -> tuple[Stage, ...]:
    """Cut a torchvision SwinTransformer3d into stages."""
    patches = OverTime(nn.Sequential(whole.patch_embed, ToMaps()), FRAMES)
    options = {**normalise.options(), "frames": FRAMES, "eps": whole.patch_embed.norm.eps}
    stem = nn.Sequential(normalise, patches)
    chain = [Stage("stem", stem, "swin3d_stem/1", options, "map", frames=FRAMES)]
    steps, merging = FRAMES // whole.patch_embed.tuple_patch_size[0], []
    for number, layer in enumerate(whole.features):
        if number % 2:
            merging = [layer]
            continue
        for i, block in enumerate(layer):
            attention = block.attn
            options = {
                "frames": steps,
                "heads": attention.num_heads,
                "window": list(attention.window_size),
                "shift": list(attention.shift_size),
                "eps": block.norm1.eps,
            }
            module = OverTime(nn.Sequential(FromMaps(), *merging, block, ToMaps()), steps)
            name, merging = f"layer{number // 2 + 1}.{i}", []
            chain.append(Stage(name, module, "swin3d_block/1", options, "map", frames=steps))
    mean = nn.Sequential(FromMaps(), whole.norm, ToMaps(), whole.avgpool)
    pool = nn.Sequential(OverTime(mean, steps), nn.Flatten(1))
    options = {"frames": steps, "eps": whole.norm.eps}
    chain.append(Stage("pool", pool, "swin3d_pool/1", options, "vector", frames=steps))
    if not isinstance(whole.head, nn.Identity):
        chain.append(Stage(CLASSIFIER, whole.head, "swin3d_fc/1", {}, "vector"))
    return tuple(chain)


class FromMaps(nn.Module):
    """Change axes from [B, C, T, H, W] to [B, T, H, W, C]."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW.permute(0, 2, 3, 4, 1).contiguous()


class ToMaps(nn.Module):
    """Change axes from [B, T, H, W, C] to [B, C, T, H, W]."""

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return x_BTHWC.permute(0, 4, 1, 2, 3)
