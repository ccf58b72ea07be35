"""Audio ResNets: `mel`, and the stages of torchvision's ResNets over it.

A second of sound becomes a picture of one channel, its log-mel spectrogram (bands x steps). The
settings are those of VGGish (Hershey et al. 2017): 16 kHz, windows of 25 ms every 10 ms, 64 bands
between 125 and 7,500 Hz, log(magnitude + 0.01). Ours: the mean -2 is subtracted and the result
divided by 2. Silence is then -1.3 and loud sound about 2, a range like that of normalised pictures.

Weights are files or seeds, or torchvision's tags of a network for pictures. The first convolution
of such a network is summed over its three colours, which is its response to a grey picture.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _weights, resnet
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.config import Sound
from varve.stores.digests import store_name

PREFIX = "mel_"
SOUND = Sound(rate=16000, seconds=1.0)


@dataclass(frozen=True)
class Mel:
    """Settings of a log-mel spectrogram. `window`, `hop` and `fft` are numbers of samples."""

    window: int = 400
    hop: int = 160
    fft: int = 512
    bands: int = 64
    low_hz: float = 125.0
    high_hz: float = 7500.0
    floor: float = 0.01
    mean: float = -2.0
    std: float = 2.0


def networks() -> list[str]:
    """Return the names of the networks."""
    return [f"{PREFIX}{network}" for network in resnet.networks()]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain: the log-mel spectrogram, and then the residual blocks.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    from torchvision.models import get_model_weights

    name, picture_network = store_name(f"{network}:{weights}"), network.removeprefix(PREFIX)
    state = None
    if _weights.seed_of(weights) is None:
        tags = {tag.name: tag for tag in get_model_weights(picture_network)}
        state = resnet.state_of(picture_network, weights, tags)
        conv = state.get("conv1.weight")
        if conv is not None and conv.ndim == 4 and conv.shape[1] == 3:
            state = state | {"conv1.weight": conv.sum(dim=1, keepdim=True)}
    whole = resnet.construct(picture_network, weights, state, name, _use_one_channel)
    mel = LogMel(SOUND.rate, precision, Mel()).eval()
    first = Stage("mel", mel, "log_mel/1", asdict(Mel()), "map")
    chain = (first, *resnet.chain_of(whole, nn.Identity(), {}, precision))
    return Backbone(name, network, chain, SOUND, precision, channels_last=True)


class LogMel(nn.Module):
    """Compute spectrograms [N, 1, bands, steps], lowest band first, of samples [N, samples].

    The arithmetic is float32, whatever the output's type.
    """

    def __init__(self, rate: int, dtype: torch.dtype, mel: Mel) -> None:
        super().__init__()
        self.rate, self.dtype, self.hop, self.fft = rate, dtype, mel.hop, mel.fft
        self.floor, self.mean, self.std = mel.floor, mel.mean, mel.std
        steps = np.arange(mel.window)
        hann = 0.5 - 0.5 * np.cos(2 * math.pi * steps / mel.window)
        self.register_buffer("window", torch.from_numpy(hann).float())
        filters = mel_filters(rate, mel.fft, mel.bands, mel.low_hz, mel.high_hz)
        self.register_buffer("filters", torch.from_numpy(filters).float())

    def forward(self, x_NS: Tensor) -> Tensor:
        window: Any = self.window
        filters: Any = self.filters
        stretches = x_NS.unfold(1, len(window), self.hop) * window
        magnitude = torch.fft.rfft(stretches, self.fft).abs()
        mel: Tensor = (magnitude @ filters).add(self.floor).log().sub(self.mean).div(self.std)
        return mel.mT[:, None].to(self.dtype).contiguous()


def mel_filters(rate: int, fft: int, bands: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return triangular filters of equal width in mel, 1127 ln(1 + f / 700).

    Returns:
        float64 [fft / 2 + 1, bands]: weight of each frequency of a Fourier transform in each band.
        The constant (0 Hz) has weight 0.
    """

    low, high = (1127.0 * math.log1p(hertz / 700.0) for hertz in (low_hz, high_hz))
    corners = np.linspace(low, high, bands + 2)
    mel = 1127.0 * np.log1p(np.arange(fft // 2 + 1) * rate / fft / 700.0)[:, None]
    rising = (mel - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - mel) / (corners[2:] - corners[1:-1])
    filters: np.ndarray = np.maximum(0.0, np.minimum(rising, falling))
    filters[0] = 0.0
    return filters


def _use_one_channel(whole: Any) -> None:
    old = whole.conv1
    whole.conv1 = nn.Conv2d(
        1, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
    )
