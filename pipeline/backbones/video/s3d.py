"""S3D of torchvision: `stem, layer3.0, layer3.1, layer4.0 ... layer5.1, pool`, and `fc`.

Separable 3D convolutions in Inception blocks (Xie et al., ECCV 2018), over clips of `FRAMES`
frames. A stage has the name of its block in the paper: `layer3.0` is Mixed_3b, `layer4.0` Mixed_4b.
The stem gives 8 time steps, `layer4.0` 4, `layer5.0` 2 and `pool` one vector a clip.

Weights are torchvision's tags (KINETICS400_V1), files or seeds. The preprocessing is that of the
tag, but the resizing is antialiased and keeps the proportions of the frame. Torchvision reports the
accuracy of clips of 128 frames; any number from 14 on has the same parameters.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones._stage import CLASSIFIER, Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.backbones.video import _over_time
from varve.pipeline.backbones.video._over_time import OverTime

FRAMES = 16
SLOW = True
# Indices in torchvision's `features` where a stage begins, and time steps that it is given. A
# pooling layer begins the first block of a layer.
STAGES = {
    **{"stem": (0, 16), "layer3.0": (5, 8), "layer3.1": (6, 8)},
    **{"layer4.0": (7, 8), "layer4.1": (9, 4), "layer4.2": (10, 4), "layer4.3": (11, 4)},
    **{"layer4.4": (12, 4), "layer5.0": (13, 4), "layer5.1": (15, 2)},
}


def networks() -> list[str]:
    """Return the names of the networks."""
    return ["s3d"]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of its Inception blocks.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    return _over_time.build(network, weights, precision, "classifier.1", stages)


def stages(whole: Any, normalise: Normalise) -> tuple[Stage, ...]:
    """Cut a torchvision S3D into stages."""
    features = whole.features
    chain: list[Stage] = []
    ends = [*(begin for begin, _ in STAGES.values()), len(features)]
    eps = features[0][0][1].eps
    for (name, (_, steps)), (begin, end) in zip(
        STAGES.items(), itertools.pairwise(ends), strict=True
    ):
        module: nn.Module = OverTime(features[begin:end], steps)
        options: dict[str, Any] = {"features": [begin, end], "frames": steps, "eps": eps}
        if not chain:
            module, options = nn.Sequential(normalise, module), options | normalise.options()
        chain.append(Stage(name, module, "s3d_block/1", options, "map", frames=steps))
    steps = STAGES["layer5.1"][1]
    pool = nn.Sequential(OverTime(whole.avgpool, steps), nn.Flatten(1))
    chain.append(Stage("pool", pool, "s3d_pool/1", {"frames": steps}, "vector", frames=steps))
    if not isinstance(whole.classifier[1], nn.Identity):
        scores = Scores(whole.classifier[1])
        chain.append(Stage(CLASSIFIER, scores, "s3d_fc/1", {}, "vector"))
    return tuple(chain)


class Scores(nn.Module):
    """Compute scores [N, classes] of vectors [N, C] by a convolution of one position."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x_NC: Tensor) -> Tensor:
        out: Tensor = self.convolution(x_NC[:, :, None, None, None])
        return out.flatten(1)
