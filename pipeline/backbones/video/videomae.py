"""VideoMAE through transformers: `stem, blocks.i.attn, blocks.i.mlp, norm, pool`, and `fc`.

A plain vision transformer on tubelets of 2 frames and 16 x 16 pixels, pretrained as a masked
autoencoder (Tong et al., NeurIPS 2022), over clips of 16 frames: 8 time steps of 14 x 14 tokens,
without a class token. Each stage gives a row for each time step. `pool` is the mean over all tokens
of a clip, with the norm behind it where the weights have a classifier (`fc`); `norm` is there where
the weights were only pretrained.

Weights are seeds, files, folders with a `model.safetensors`, or repositories of the hub
(`videomae_base:MCG-NJU/videomae-base-finetuned-ssv2`), of VideoMAEModel or a class around it, whose
decoder is left out. `videomae_tiny` is for trials, and has no published weights. Pictures have the
size of the weights, usually 224, with the means and deviations of ImageNet.

Needs the extra `transformers`. Attention is computed with queries, keys and values of one layer.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _vit
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.backbones.video import _transformers
from varve.pipeline.config import Picture
from varve.stores.digests import store_name

EXAMPLE = "videomae_tiny"
NEEDS = _transformers.NEEDS
# Width, blocks, heads, hidden units of the MLP, size of pictures, frames.
NETWORKS = {
    "videomae_tiny": (192, 2, 3, 384, 64, 8),
    "videomae_small": (384, 12, 6, 1536, 224, 16),
    "videomae_base": (768, 12, 12, 3072, 224, 16),
    "videomae_large": (1024, 24, 16, 4096, 224, 16),
    "videomae_huge": (1280, 32, 16, 5120, 224, 16),
}
OPTIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
           "image_size", "num_frames")  # fmt: skip
OTHERS = ("decoder", "encoder_to_decoder", "mask_token", "position_embeddings")


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
    known |= {"patch_size": 16, "tubelet_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    options = _transformers.merged(network, known, config)
    if state is not None:
        state = renamed(state)
    classes = (
        None if state is None or "classifier.weight" not in state else state["classifier.weight"]
    )
    pretrained = state is not None and "layernorm.weight" in state
    settings = library.VideoMAEConfig(**options, use_mean_pooling=not pretrained)

    def make() -> Any:
        whole = library.VideoMAEModel(settings)
        if classes is not None:
            whole.fc_norm = nn.LayerNorm(settings.hidden_size)
            whole.classifier = nn.Linear(settings.hidden_size, len(classes))
        return whole

    name = store_name(f"{network}:{weights}")
    whole = _transformers.construct(make, weights, state, name)
    size = settings.image_size
    chain = stages(whole.to(precision), settings, precision)
    return Backbone(name, network, chain, Picture(size, size, "bilinear"), precision)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the encoder and its classifier under the library's names.

    Files of earlier releases have the biases of queries and values as `q_bias` and `v_bias`.
    """
    state = _transformers.without_others(state, "videomae.", OTHERS)
    for old, new in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
        state = {name.replace(f".attention.{old}", f".attention.{new}"): x
                 for name, x in state.items()}  # fmt: skip
    return state


def stages(whole: Any, settings: Any, precision: torch.dtype) -> tuple[Stage, ...]:
    """Cut a VideoMAEModel into stages.

    Args:
        whole: The network.
        settings: Its VideoMAEConfig.
        precision: Type of its parameters.
    """
    steps = settings.num_frames // settings.tubelet_size
    patches = (settings.image_size // settings.patch_size) ** 2
    normalise = _vit.Normalise(_transformers.MEAN, _transformers.STD, precision, False)
    positions = sinusoids(steps * patches, settings.hidden_size).view(steps, patches, -1)
    tubelets = whole.embeddings.patch_embeddings.projection
    stem = _transformers.Stem(normalise, tubelets, positions.to(precision), settings.num_frames)
    blocks: list[tuple[nn.Module, _transformers.Mlp]] = []
    for layer in whole.encoder.layer:
        attention = layer.attention.attention
        qkv = _transformers.fused(attention.query, attention.key, attention.value)
        out, heads = layer.attention.output.dense, settings.num_attention_heads
        attend = _vit.AttentionStep(layer.layernorm_before, qkv, out, nn.Identity(), heads)
        first, last = layer.intermediate.dense, layer.output.dense
        mlp = _transformers.gelu_mlp(first, last, settings.hidden_act)
        blocks.append((attend, _transformers.Mlp(layer.layernorm_after, mlp, nn.Identity())))
    ends = {
        "norm": whole.layernorm,
        "pool_norm": getattr(whole, "fc_norm", None),
        "fc": getattr(whole, "classifier", None),
    }
    attention_options = ("tubelet_attn/1", {"heads": settings.num_attention_heads})
    return _transformers.chain_of(stem, blocks, steps, attention_options, ends)


def sinusoids(positions: int, width: int) -> Tensor:
    """Return the position embedding, float32 [positions, width]: sines and cosines by turns.

    sin(p / 10000^(2 i / width)) in channel 2 i and the cosine of the same in channel 2 i + 1
    (Vaswani et al., NeurIPS 2017, section 3.5).
    """
    exponents = 2 * (np.arange(width) // 2) / width
    angles = np.arange(positions)[:, None] / np.power(10000, exponents)
    table = np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))
    return torch.from_numpy(table).float()
