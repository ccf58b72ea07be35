"""Video ResNets of torchvision: `stem, layer1.0 ... layer4.1, pool`, and `fc` where there is one.

R3D, MC3 and R(2+1)D of 18 layers (Tran et al., CVPR 2018), over clips of `FRAMES` frames, as they
were trained. The first block of each later layer halves the time steps, so `layer2.1` of R3D gives
8 of them, `layer3.1` 4 and `layer4.1` 2; MC3 keeps all 16. `pool` gives one vector a clip.

Weights are torchvision's tags (KINETICS400_V1), files or seeds. The preprocessing is that of the
tag, but for two things: the resizing is antialiased, and keeps the proportions of the frame, whose
shorter side becomes 128 pixels. (torchvision makes each frame 128 x 171, which is the same for
videos of 4:3.)
"""

from typing import Any

import torch
from torch import nn

from varve.pipeline.backbones._stage import CLASSIFIER, Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.backbones.video import _over_time
from varve.pipeline.backbones.video._over_time import OverTime

FRAMES = 16
EXAMPLE = "mc3_18"


def networks() -> list[str]:
    """Return the names of the networks."""
    return ["r3d_18", "mc3_18", "r2plus1d_18"]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of its residual blocks.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    return _over_time.build(network, weights, precision, CLASSIFIER, stages)


def stages(whole: Any, normalise: Normalise) -> tuple[Stage, ...]:
    """Cut a torchvision VideoResNet into stages."""
    stem = nn.Sequential(normalise, OverTime(whole.stem, FRAMES))
    options = {**normalise.options(), "frames": FRAMES, "eps": whole.stem[1].eps}
    chain = [Stage("stem", stem, "video_resnet_stem/1", options, "map", frames=FRAMES)]
    steps = FRAMES
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(getattr(whole, layer)):
            stride = [1, 1, 1] if block.downsample is None else [*block.downsample[0].stride]
            options = {"frames": steps, "stride": stride, "eps": block.conv1[1].eps}
            module, code = OverTime(block, steps), "video_resnet_block/1"
            chain.append(Stage(f"{layer}.{i}", module, code, options, "map", frames=steps))
            steps = -(-steps // stride[0])
    pool = nn.Sequential(OverTime(whole.avgpool, steps), nn.Flatten(1))
    options = {"frames": steps}
    chain.append(Stage("pool", pool, "video_resnet_pool/1", options, "vector", frames=steps))
    if not isinstance(whole.fc, nn.Identity):
        chain.append(Stage(CLASSIFIER, whole.fc, "video_resnet_fc/1", {}, "vector"))
    return tuple(chain)
