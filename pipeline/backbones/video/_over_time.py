"""Steps of video networks, whose stages mix the time steps of a clip.

Between stages the time steps of all clips lie in the first axis, clip by clip, as frames do. A
module of the network's library runs between two changes of axes.

Shapes: B clips, T time steps that a stage is given and U that it gives, N = B * T, C channels,
H x W a grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _weights, resnet
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.backbones._weights import tensors_of
from varve.stores.digests import store_name

PICTURES_OF = "KINETICS400_V1"


class OverTime(nn.Module):
    """Run a module of clips [B, C, T, H, W] on time steps [B * T, C, H, W].

    Args:
        inner: Module whose output has the axes [B, C, U, H, W].
        frames: T.
    """

    mixes_time = True

    def __init__(self, inner: nn.Module, frames: int) -> None:
        super().__init__()
        self.inner = inner
        self.frames = frames

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_BTCHW = x_NCHW.view(len(x_NCHW) // self.frames, self.frames, *x_NCHW.shape[1:])
        out_BCUHW = compute(self.inner, x_BTCHW.transpose(1, 2).contiguous())
        return out_BCUHW.transpose(1, 2).flatten(0, 1).contiguous()


def compute(module: nn.Module, x: Tensor) -> Tensor:
    """Return a module's output; on a CPU by float32 arithmetic, rounded to the type of `x`.

    A CPU without instructions for bfloat16 takes thirty times as long for a 3D convolution in it.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        out: Tensor = module(x)
        return out
    wide = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors_of(module).items()
    }
    out = torch.func.functional_call(module, wide, x.float())
    return out.to(x.dtype)


def build(
    network: str,
    weights: str,
    precision: torch.dtype,
    classifier: str,
    cut: Callable[[Any, Normalise], tuple[Stage, ...]],
) -> Backbone:
    """Build a video network of torchvision as a chain.

    Args:
        classifier: Name of its last linear layer, which is an identity where a file lacks it.
        cut: Function that cuts the network into stages, with the normalisation in the first.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    from torchvision.models import get_model_weights

    name = store_name(f"{network}:{weights}")
    tags = {tag.name: tag for tag in get_model_weights(network)}
    state = None
    if _weights.seed_of(weights) is None:
        state = resnet.state_of(network, weights, tags)
    whole = _construct(network, weights, state, name, classifier)
    preset = (tags.get(weights) or tags[PICTURES_OF]).transforms()
    normalise = Normalise(preset.mean, preset.std, precision, channels_last=False)
    stages = cut(whole.to(precision).eval().requires_grad_(False), normalise)
    for stage in stages:
        stage.module.eval()
    return Backbone(name, network, stages, resnet.picture_of(preset), precision)


def _construct(
    network: str, weights: str, state: dict[str, Tensor] | None, name: str, classifier: str
) -> nn.Module:
    """Make a network of torchvision with its parameters."""
    from torchvision.models import get_model

    classes: int | None = 400
    if state is not None:
        weight = state.get(f"{classifier}.weight")
        classes = None if weight is None else len(weight)

    def make() -> nn.Module:
        whole: nn.Module = get_model(network, weights=None, num_classes=classes or 1)
        if classes is None:
            whole.set_submodule(classifier, nn.Identity())
        return whole

    whole = _weights.construct(make, weights, state, name)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm3d):
            # A count of training batches, which decides no value and is missing in some files.
            module.num_batches_tracked = None
    return whole
