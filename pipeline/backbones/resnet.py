"""ResNets of torchvision: `stem, layer1.0 ... layer4.n, pool`, and `fc` where there is one.

Weights are torchvision's tags (IMAGENET1K_V1), files or seeds. Maps run in channels-last memory,
which is faster on CPUs and GPUs alike. The preprocessing of pictures is that of the tag; for files
and seeds it is that of IMAGENET1K_V1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _weights
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.config import Picture
from varve.stores.digests import store_name

PICTURES_OF = "IMAGENET1K_V1"


def networks() -> list[str]:
    """Return the names of the networks."""
    return ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def picture_of(preset: Any) -> Picture:
    """Return how the preset of a weight tag of torchvision prepares frames."""
    size, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    return Picture(size, resize, preset.interpolation.value)


def build(
    network: str,
    weights: str,
    precision: torch.dtype,
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Backbone:
    """Build the network as a chain of its residual blocks.

    Args:
        renamed: Function from a file's state to one with torchvision's names.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    from torchvision.models import get_model_weights

    name = store_name(f"{network}:{weights}")
    tags = {tag.name: tag for tag in get_model_weights(network)}
    state = None
    if _weights.seed_of(weights) is None:
        state = renamed(state_of(network, weights, tags))
    whole = construct(network, weights, state, name)
    preset = (tags.get(weights) or tags[PICTURES_OF]).transforms()
    chain = stages(whole, preset.mean, preset.std, precision)
    return Backbone(name, network, chain, picture_of(preset), precision, channels_last=True)


def construct(
    network: str,
    weights: str,
    state: dict[str, Tensor] | None,
    name: str,
    change: Callable[[Any], object] = lambda whole: None,
) -> nn.Module:
    """Make a torchvision ResNet with its parameters; without `fc` where they have none.

    Args:
        change: Function that changes the network before the parameters are set.
    """
    from torchvision.models import get_model

    classes: int | None = 1000
    if state is not None:
        classes = len(state["fc.weight"]) if "fc.weight" in state else None

    def make() -> nn.Module:
        whole: nn.Module = get_model(network, weights=None, num_classes=classes or 1)
        if classes is None:
            whole.fc = nn.Identity()
        change(whole)
        return whole

    return _weights.construct(make, weights, state, name)


def stages(
    whole: Any, mean: list[float], std: list[float], dtype: torch.dtype
) -> tuple[Stage, ...]:
    """Cut a torchvision ResNet into stages. It is cast to `dtype`, frozen and channels-last."""
    normalise = Normalise(mean, std, dtype, channels_last=True)
    return chain_of(whole, normalise, normalise.options(), dtype)


def chain_of(
    whole: Any, normalise: nn.Module, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Stage, ...]:
    """Cut a ResNet into stages behind any preprocessing.

    Args:
        normalise: Module before the first convolution.
        options: JSON of all that decides its output.
    """
    whole = whole.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            # A count of training batches, which decides no value and is missing in some files.
            module.num_batches_tracked = None
    options = {**options, "eps": float(whole.bn1.eps), **_MEMORY}
    chain = [Stage("stem", Stem(normalise, whole), "resnet_stem/1", options, "map")]
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(getattr(whole, layer)):
            options = {
                "block": type(block).__name__,
                "stride": int(block.stride),
                "eps": float(block.bn1.eps),
                **_MEMORY,
            }
            chain.append(Stage(f"{layer}.{i}", block, "resnet_block/1", options, "map"))
    chain.append(Stage("pool", Pool(), "resnet_pool/1", dict(_MEMORY), "vector"))
    if not isinstance(whole.fc, nn.Identity):
        chain.append(Stage("fc", whole.fc, "resnet_fc/1", {}, "vector"))
    for stage in chain:
        stage.module.eval()
    return tuple(chain)


_MEMORY = {"memory": "channels_last"}


class Stem(nn.Module):
    """Compute the first map [N, 64, S / 4, S / 4] from uint8 pictures [N, S, S, 3]."""

    def __init__(self, normalise: nn.Module, whole: Any) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv1 = whole.conv1
        self.bn1 = whole.bn1
        self.relu = whole.relu
        self.maxpool = whole.maxpool

    def forward(self, x_NSS3: Tensor) -> Tensor:
        x = self.conv1(self.normalise(x_NSS3))
        out: Tensor = self.maxpool(self.relu(self.bn1(x)))
        return out


class Pool(nn.Module):
    """Average a map [N, C, H, W] over H and W: [N, C]."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x_NCHW, 1).flatten(1)


def state_of(network: str, weights: str, tags: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parameters of a tag or a file."""
    if _weights.is_file(weights):
        return _weights.read(weights)
    if weights not in tags:
        raise _weights.no_tag(network, weights, tags)
    return _weights.url_state(tags[weights].url, f"{network}:{weights}")
