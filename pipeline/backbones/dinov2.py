"""DINOv2 vision transformers through timm: `stem, blocks.i.attn, blocks.i.mlp, norm, pool`.

`norm` gives the final tokens, `pool` their class token, which is the model's own feature. Pictures
are 224 pixels wide, where the checkpoint was trained with 518: 256 patches a frame instead of 1369.
The position embedding is resampled to that grid, as in timm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _vit, _weights
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.config import Picture
from varve.stores.digests import store_name

SIZE = 224
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def networks() -> list[str]:
    sizes = ("small", "base", "large", "giant")
    return [f"vit_{size}_patch14_{reg}dinov2" for reg in ("", "reg4_") for size in sizes]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    def make() -> Any:
        return timm.create_model(network, pretrained=False, img_size=SIZE)

    name = store_name(f"{network}:{weights}")
    state = None
    if _weights.seed_of(weights) is None:
        with torch.device("meta"):
            shaped = make()
        state = _state(timm, network, weights)
        _check_registers(network, name, shaped, state)
        # Takes the original project's names too, and resamples the position embedding.
        state = checkpoint_filter_fn(state, shaped)
    whole: Any = _weights.construct(make, weights, state, name)
    config = whole.pretrained_cfg
    return Backbone(
        name,
        network,
        stages(whole, config["mean"], config["std"], precision),
        Picture(SIZE, round(SIZE / config["crop_pct"]), config["interpolation"]),
        precision,
    )


def stages(whole: Any, mean: Any, std: Any, precision: torch.dtype) -> tuple[Stage, ...]:
    """Cut a timm VisionTransformer into stages. It is cast to `precision` and frozen.

    Raises:
        ValueError: It has a part that the stages here do not compute.
    """
    _check_plain(whole)
    whole = whole.to(precision).eval().requires_grad_(False)
    tokens = [token[0] for token in (whole.cls_token, whole.reg_token) if token is not None]
    stem = _vit.PatchStem(
        _vit.Normalise(mean, std, precision, channels_last=False),
        whole.patch_embed.proj,
        torch.cat(tokens),
        whole.pos_embed[0],
        whole.norm_pre,
    )
    prefix = len(stem.prefix)
    chain = [_vit.stem_stage(stem)]
    for i, block in enumerate(whole.blocks):
        attn = block.attn
        attention = _vit.AttentionStep(block.norm1, attn.qkv, attn.proj, block.ls1, attn.num_heads)
        mlp = _vit.MlpStep(block.norm2, block.mlp, block.ls2)
        chain += _vit.block_stages(i, attention, mlp, block.mlp.act, prefix)
    options = _vit.norm_options(whole.norm)
    chain.append(Stage("norm", whole.norm, "vit_norm/1", options, "tokens", True, prefix))
    chain.append(Stage("pool", ClassToken(), "vit_class_token/1", {}, "vector", True))
    for stage in chain:
        stage.module.eval().requires_grad_(False)
    return tuple(chain)


class ClassToken(nn.Module):
    """Select the class token: tokens [N, L, C] to [N, C]."""

    def forward(self, x_NLC: Tensor) -> Tensor:
        # A copy: a view would keep all L tokens in memory.
        return x_NLC[:, 0].clone()


def _check_plain(whole: Any) -> None:
    block = whole.blocks[0]
    names = ["fc_norm", "head", "patch_embed.norm"]
    names += [f"blocks.0.{part}" for part in ("attn.q_norm", "attn.norm", "mlp.norm")]
    odd = [name for name in names if not isinstance(whole.get_submodule(name), nn.Identity)]
    if type(block).__name__ != "Block" or getattr(block.attn, "gate", None) is not None:
        odd.append("blocks.0")
    if whole.global_pool != "token" or whole.cls_token is None:
        odd.append("global_pool")
    if odd:
        raise ValueError(f"not a plain DINOv2 transformer: its {', '.join(odd)} is another")


def _check_registers(network: str, name: str, whole: Any, state: dict[str, Tensor]) -> None:
    """Refuse weights with register tokens in a network without, and the other way about."""
    has_registers = any(key in state for key in ("reg_token", "register_tokens"))
    if has_registers == (whole.reg_token is not None):
        return
    if has_registers:
        other = network.replace("_dinov2", "_reg4_dinov2")
        raise ValueError(
            f"the weights of {name} have register tokens, and {network} has none: name the network "
            f"{other}"
        )
    raise ValueError(
        f"the weights of {name} have no register tokens, and {network} has: name the network "
        f"{network.replace('_reg4', '')}"
    )


def _state(timm: Any, network: str, weights: str) -> dict[str, Tensor]:
    if _weights.is_file(weights):
        return _weights.read(weights)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{network}.*")]
    if weights not in tags:
        raise _weights.no_tag(network, weights, tags)
    repo = timm.get_pretrained_cfg(f"{network}.{weights}").hf_hub_id
    return _weights.read(_weights.hub_file(repo, HUB_FILES, f"{network}:{weights}"))
