"""V-JEPA 2 through transformers: `stem, blocks.i.attn, blocks.i.mlp, norm, pool`.

The encoder of V-JEPA 2 (Assran et al., 2025): a vision transformer on tubelets of 2 frames and
16 x 16 pixels, with rotary positions in time, rows and columns, without a class token. Clips have
64 frames, as published, which are 32 time steps of 16 x 16 tokens; `vjepa2_vitl_16` and the like
take 16 frames with the same parameters. Each stage gives a row for each time step. `pool` is the
mean over all tokens of a clip after the last norm. (Ours: the authors train an attentive probe on
the tokens, which `norm` gives.)

    y = x cos(p w) + r(x) sin(p w),   r(x)[2 i] = -x[2 i + 1],   r(x)[2 i + 1] = x[2 i]

rotates the channels of a query or key at position p. Of the D channels of a head the first
2 floor(D / 6) are for the time step, as many for the row and for the column, and the rest stays.
The frequency of channel j of n is 10000^(-2 k / n) with k = j mod n / 2, as in the authors' code.

Weights are seeds, files, folders with a `model.safetensors`, or repositories of the hub
(`vjepa2_vitl:facebook/vjepa2-vitl-fpc64-256`), of VJEPA2Model or a class around it, of which the
predictor and the probe are left out. `vjepa2_tiny` is for trials, and has no published weights.
Pictures have a shorter side of size * 256 / 224, the means and deviations of ImageNet.

Needs the extra `transformers`. Attention is computed with queries, keys and values of one layer,
and with angles in float32 in every precision.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varve.pipeline.backbones import _vit
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.backbones.video import _transformers
from varve.pipeline.config import Picture
from varve.stores.digests import store_name

EXAMPLE = "vjepa2_tiny"
NEEDS = _transformers.NEEDS
# Width, blocks, heads, ratio of hidden units of the MLP, size of pictures, frames.
NETWORKS = {
    "vjepa2_tiny": (192, 2, 3, 2.0, 64, 8),
    "vjepa2_vitl": (1024, 24, 16, 4.0, 256, 64),
    "vjepa2_vitl_16": (1024, 24, 16, 4.0, 256, 16),
    "vjepa2_vith": (1280, 32, 16, 4.0, 256, 64),
    "vjepa2_vith_16": (1280, 32, 16, 4.0, 256, 16),
    "vjepa2_vitg": (1408, 40, 22, 48 / 11, 256, 64),
    "vjepa2_vitg_16": (1408, 40, 22, 48 / 11, 256, 16),
    "vjepa2_vitg_384": (1408, 40, 22, 48 / 11, 384, 64),
}
OPTIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "crop_size",
           "frames_per_clip")  # fmt: skip
OTHERS = ("predictor", "pooler", "classifier")


def networks() -> list[str]:
    """Return the names of the networks."""
    return [*NETWORKS]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of the two steps of each block.

    Raises:
        ModuleNotFoundError: The library transformers is not installed.
        ValueError: The weights name nothing, or do not fit.
        OSError: The weights cannot be had.
    """
    library = _transformers.library()
    state, config = _transformers.published(network, weights)
    known: dict[str, Any] = dict(zip(OPTIONS, NETWORKS[network], strict=True))
    known |= {"patch_size": 16, "tubelet_size": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
              "qkv_bias": True}  # fmt: skip
    options = _transformers.merged(network, known, config, left_out="frames_per_clip")
    # The predictor is made with the network and dropped.
    small = {"pred_num_hidden_layers": 1, "pred_hidden_size": 12, "pred_num_attention_heads": 1}
    settings = library.VJEPA2Config(**options, **small)
    if state is not None:
        state = _transformers.without_others(state, "vjepa2.", OTHERS)
        state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    name = store_name(f"{network}:{weights}")
    whole = _transformers.construct(
        lambda: library.VJEPA2Model(settings).encoder, weights, state, name
    )
    size = settings.crop_size
    chain = stages(whole.to(precision), settings, precision)
    return Backbone(name, network, chain, Picture(size, size * 256 // 224, "bilinear"), precision)


def stages(whole: Any, settings: Any, precision: torch.dtype) -> tuple[Stage, ...]:
    """Cut the encoder of a VJEPA2Model into stages.

    Args:
        whole: The encoder.
        settings: Its VJEPA2Config.
        precision: Type of its parameters.
    """
    steps, side = (
        settings.frames_per_clip // settings.tubelet_size,
        settings.crop_size // settings.patch_size,
    )
    heads = settings.num_attention_heads
    normalise = _vit.Normalise(_transformers.MEAN, _transformers.STD, precision, False)
    tubelets = whole.embeddings.patch_embeddings.proj
    stem = _transformers.Stem(normalise, tubelets, None, settings.frames_per_clip)
    blocks: list[tuple[nn.Module, _transformers.Mlp]] = []
    for layer in whole.layer:
        attention = layer.attention
        qkv = _transformers.fused(attention.query, attention.key, attention.value)
        attend = RotaryAttention(layer.norm1, qkv, attention.proj, heads, (steps, side, side))
        mlp = _transformers.gelu_mlp(layer.mlp.fc1, layer.mlp.fc2, settings.hidden_act)
        blocks.append((attend, _transformers.Mlp(layer.norm2, mlp, nn.Identity())))
    ends = {"norm": whole.layernorm, "pool_norm": None, "fc": None}
    attention_options = ("rotary_attn/1", {"heads": heads, "grid": [steps, side, side]})
    return _transformers.chain_of(stem, blocks, steps, attention_options, ends)


class RotaryAttention(nn.Module):
    """Compute x + attention(norm(x)) of the tokens of clips [B, L, C], with rotary positions.

    Args:
        norm: Norm of the tokens.
        qkv: Layer of queries, keys and values.
        out: Layer behind the attention.
        heads: Number of heads.
        grid: Number of time steps, rows and columns: L is their product.
    """

    def __init__(
        self, norm: nn.Module, qkv: nn.Linear, out: nn.Module, heads: int,
        grid: tuple[int, int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.out = out
        self.heads = heads
        self.grid = grid

    def forward(self, x_BLC: Tensor) -> Tensor:
        B, L, C = x_BLC.shape
        qkv = self.qkv(self.norm(x_BLC)).reshape(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        cos_LD, sin_LD = rotation(self.grid, C // self.heads, x_BLC.device)
        q, k = (rotated(x, cos_LD, sin_LD) for x in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x_BLC + self.out(mixed.transpose(1, 2).reshape(B, L, C))
        return out


def rotated(x_BHLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate pairs of channels by the angles of their positions, in float32."""
    wide = x_BHLD.float()
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (wide * cos_LD + turned * sin_LD).to(x_BHLD.dtype)


def rotation(
    grid: tuple[int, int, int], width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of every position, float32 [L, width].

    Args:
        grid: Number of time steps, rows and columns.
        width: Channels of a head.
        device: Where they are.
    """
    each = 2 * (width // 3 // 2)
    frequencies = 10000.0 ** -(torch.arange(each // 2, device=device) / (each / 2))
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    angles = [(axis.flatten()[:, None] * frequencies).repeat(1, 2) for axis in axes]
    rest = torch.zeros(angles[0].shape[0], width - 3 * each, device=device)
    angles_LD = torch.cat([*angles, rest], dim=1)
    return angles_LD.cos(), angles_LD.sin()
