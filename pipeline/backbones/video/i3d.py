"""Inflated 3D Inception network (I3D): `stem, pool2, conv2b ... layer5.1, pool`, and `fc`.

Two-stream I3D, its RGB network (Carreira and Zisserman, CVPR 2017, Fig. 3), over clips of 16 or 64
frames: `i3d` and `i3d_64`, which have the same parameters. The paper trains on 64 frames of 25 a
second. Each convolution, pooling and Inception block of the paper is a stage:

    stem      Conv3d_1a_7x7       layer3.0, layer3.1        Mixed_3b, Mixed_3c
    pool2     MaxPool3d_2a_3x3    pool4                     MaxPool3d_4a_3x3
    conv2b    Conv3d_2b_1x1       layer4.0 ... layer4.4     Mixed_4b ... Mixed_4f
    conv2c    Conv3d_2c_3x3       pool5                     MaxPool3d_5a_2x2
    pool3     MaxPool3d_3a_3x3    layer5.0, layer5.1        Mixed_5b, Mixed_5c

Of 16 frames `stem` gives 8 time steps, `pool4` 4 and `pool5` 2. `pool` is the mean over 2 time
steps and 7 x 7 positions, at every step in time, and the mean of these: one vector a clip, of which
`fc` gives the mean over time of the published logits.

Padding is that of TensorFlow, "SAME": the output of a stride s has ceil(n / s) positions, and the
zeros that this takes lie half before and half after the input, an odd one after it. A maximum over
padded zeros is one over the input alone, which is nowhere negative.

Weights are seeds, or files under the names of the public PyTorch conversion of the authors'
parameters (`rgb_imagenet.pt`: `Conv3d_1a_7x7.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`,
`logits.conv3d.bias`), for any number of classes, or without `logits`. Frames are scaled to [-1, 1],
with a shorter side of 256 pixels and a centre of 224 x 224 (bilinear).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varve.pipeline.backbones import _weights
from varve.pipeline.backbones._stage import CLASSIFIER, Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.backbones.video._over_time import OverTime
from varve.pipeline.backbones.video.s3d import Scores
from varve.pipeline.config import Picture
from varve.stores.digests import store_name

FRAMES = {"i3d": 16, "i3d_64": 64}
SLOW = True
CLASSES, EPS = 400, 1e-3
PICTURE = Picture(size=224, resize=256, interpolation="bilinear")
MEAN = STD = (0.5, 0.5, 0.5)
LOGITS = "logits.conv3d"
# The network in order: the stage, its name in weight files, and its options. Those of a convolution
# are channels in and out, kernel and stride; of a pooling kernel and strides over time and over
# space; of an Inception block the channels in, and of the branches 1x1; 1x1 and 3x3; 1x1 and 3x3;
# 1x1 after pooling.
LAYERS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("stem", "Conv3d_1a_7x7", (3, 64, 7, 2)),
    ("pool2", "MaxPool3d_2a_3x3", (1, 3, 1, 2)),
    ("conv2b", "Conv3d_2b_1x1", (64, 64, 1, 1)),
    ("conv2c", "Conv3d_2c_3x3", (64, 192, 3, 1)),
    ("pool3", "MaxPool3d_3a_3x3", (1, 3, 1, 2)),
    ("layer3.0", "Mixed_3b", (192, 64, 96, 128, 16, 32, 32)),
    ("layer3.1", "Mixed_3c", (256, 128, 128, 192, 32, 96, 64)),
    ("pool4", "MaxPool3d_4a_3x3", (3, 3, 2, 2)),
    ("layer4.0", "Mixed_4b", (480, 192, 96, 208, 16, 48, 64)),
    ("layer4.1", "Mixed_4c", (512, 160, 112, 224, 24, 64, 64)),
    ("layer4.2", "Mixed_4d", (512, 128, 128, 256, 24, 64, 64)),
    ("layer4.3", "Mixed_4e", (512, 112, 144, 288, 32, 64, 64)),
    ("layer4.4", "Mixed_4f", (528, 256, 160, 320, 32, 128, 128)),
    ("pool5", "MaxPool3d_5a_2x2", (2, 2, 2, 2)),
    ("layer5.0", "Mixed_5b", (832, 256, 160, 320, 32, 128, 128)),
    ("layer5.1", "Mixed_5c", (832, 384, 192, 384, 48, 128, 128)),
)
WIDTH = 1024


def networks() -> list[str]:
    """Return the names of the networks."""
    return [*FRAMES]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of its convolutions, poolings and Inception blocks.

    Raises:
        ValueError: A tag, of which there is none, or weights that do not fit.
        OSError: There is no such file.
    """
    state = None
    if _weights.seed_of(weights) is None:
        if not _weights.is_file(weights):
            raise _weights.no_tag(network, weights, ())
        state = _weights.read(weights)
    classes: int | None = CLASSES
    if state is not None:
        weight = state.get(f"{LOGITS}.weight")
        classes = None if weight is None else len(weight)
    name = store_name(f"{network}:{weights}")
    whole = _weights.construct(lambda: I3D(classes), weights, state, name)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm3d):
            # A count of training batches, which decides no value and is missing in some files.
            module.num_batches_tracked = None
    normalise = Normalise(MEAN, STD, precision, channels_last=False)
    chain = stages(whole.to(precision).eval().requires_grad_(False), normalise, FRAMES[network])
    for stage in chain:
        stage.module.eval()
    return Backbone(name, network, chain, PICTURE, precision)


def stages(whole: nn.Module, normalise: Normalise, frames: int = 16) -> tuple[Stage, ...]:
    """Cut an I3D into stages.

    Args:
        whole: The network.
        normalise: Scales the pictures.
        frames: Number of frames of a clip.
    """
    chain: list[Stage] = []
    steps = frames
    for name, part, numbers in LAYERS:
        module: nn.Module = OverTime(whole.get_submodule(part), steps)
        code = f"i3d_{part.partition('_')[0].removesuffix('3d').lower()}/1"
        options: dict[str, Any] = {"frames": steps, "layer": list(numbers)}
        if not part.startswith("MaxPool"):
            options["eps"] = EPS
        if not chain:
            module, options = nn.Sequential(normalise, module), options | normalise.options()
        chain.append(Stage(name, module, code, options, "map", frames=steps))
        if not part.startswith("Mixed"):
            steps = -(-steps // (numbers[2] if part.startswith("MaxPool") else numbers[3]))
    pool = nn.Sequential(OverTime(Mean(), steps), nn.Flatten(1))
    chain.append(Stage("pool", pool, "i3d_pool/1", {"frames": steps}, "vector", frames=steps))
    if any(name == LOGITS for name, _ in whole.named_modules()):
        scores = Scores(whole.get_submodule(LOGITS))
        chain.append(Stage(CLASSIFIER, scores, "i3d_fc/1", {}, "vector"))
    return tuple(chain)


class I3D(nn.Module):
    """The whole network, with the names of its weight files: clips [B, 3, T, S, S] to [B, classes].

    Args:
        classes: Number of classes; None for a network without `logits`, which gives [B, 1024].
    """

    def __init__(self, classes: int | None) -> None:
        super().__init__()
        for _, name, numbers in LAYERS:
            kind = name.partition("_")[0]
            if kind == "Conv3d":
                self.add_module(name, Unit(*numbers))
            elif kind == "MaxPool3d":
                (time, space, time_stride, space_stride) = numbers
                strides = (time_stride, space_stride, space_stride)
                self.add_module(name, MaxPool((time, space, space), strides))
            else:
                self.add_module(name, Inception(*numbers))
        self.pool = Mean()
        if classes is not None:
            self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(WIDTH, classes, 1)})

    def forward(self, x_B3TSS: Tensor) -> Tensor:
        x = x_B3TSS
        for _, name, _ in LAYERS:
            x = self.get_submodule(name)(x)
        x = self.pool(x)
        if hasattr(self, "logits"):
            x = self.logits["conv3d"](x)
        flat: Tensor = x.flatten(1)
        return flat


class Unit(nn.Module):
    """Convolution without bias, batch norm and ReLU, with padding for ceil(n / stride) positions.

    Args:
        channels: Channels that it is given.
        width: Channels that it gives.
        kernel, stride: The same over time and space.
    """

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=EPS)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        padded = pad_same(x_BCTHW, self.conv3d.kernel_size, self.conv3d.stride)
        out: Tensor = self.bn(self.conv3d(padded))
        return functional.relu(out)


class MaxPool(nn.Module):
    """Maximum over a window, with padding for ceil(n / stride) positions; inputs are not negative.

    Args:
        kernel, strides: Over time, rows and columns.
    """

    def __init__(self, kernel: tuple[int, int, int], strides: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.strides = strides

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        padded = pad_same(x_BCTHW, self.kernel, self.strides)
        return functional.max_pool3d(padded, self.kernel, self.strides)


class Inception(nn.Module):
    """Inception block: four branches of which the channels are joined.

    Args:
        channels: Channels that it is given.
        b0, b1a, b1b, b2a, b2b, b3b: Channels of the convolutions, by their names in weight files.
    """

    def __init__(
        self, channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int
    ) -> None:
        super().__init__()
        self.b0 = Unit(channels, b0, 1)
        self.b1a = Unit(channels, b1a, 1)
        self.b1b = Unit(b1a, b1b, 3)
        self.b2a = Unit(channels, b2a, 1)
        self.b2b = Unit(b2a, b2b, 3)
        self.b3a = MaxPool((3, 3, 3), (1, 1, 1))
        self.b3b = Unit(channels, b3b, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        branches = (
            self.b0(x_BCTHW),
            self.b1b(self.b1a(x_BCTHW)),
            self.b2b(self.b2a(x_BCTHW)),
            self.b3b(self.b3a(x_BCTHW)),
        )
        return torch.cat(branches, dim=1)


class Mean(nn.Module):
    """Mean over windows of 2 time steps and 7 x 7 positions, and of these: [B, C, 1, 1, 1]."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        windows = functional.avg_pool3d(x_BCTHW, (2, 7, 7), stride=1)
        return windows.mean(dim=(2, 3, 4), keepdim=True)


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad time, rows and columns with zeros for ceil(n / stride) positions, as TensorFlow does.

    >>> pad_same(torch.ones(1, 1, 4, 5, 6), (3, 3, 1), (2, 2, 1)).shape
    torch.Size([1, 1, 5, 7, 6])
    """
    widths: list[int] = []
    for n, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        widths += [total // 2, total - total // 2]
    return functional.pad(x, widths) if any(widths) else x
