"""CLIP vision transformers of open_clip: `stem, blocks.i.attn, blocks.i.mlp, proj`.

The family has every network whose visual tower is open_clip's plain VisionTransformer. `proj` is
the output of `encode_image`. Weights are tags of open_clip, files with a whole CLIP or its visual
tower alone, or seeds. A tag runs with the activation that its weights were trained with:
"ViT-B-16:openai" runs QuickGELU, as open_clip's own `ViT-B-16-quickgelu` does. For a file, the name
of the network decides the activation.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _vit, _weights
from varve.pipeline.backbones._stage import Backbone, Stage
from varve.pipeline.config import Picture
from varve.stores.digests import store_name

EXAMPLE = "ViT-S-32"
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# In the state of OpenAI's archives, beside the parameters.
NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size", "logit_scale", "logit_bias")
PROMPTS_A_BATCH = 32


def networks() -> list[str]:
    """Return every network of open_clip; `build` refuses those with another visual tower."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return []
    return sorted(file.stem for file in Path(package.origin).parent.glob("model_configs/*.json"))


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the visual tower as a chain.

    Raises:
        ValueError: Another kind of visual tower, no such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    config = _config(network, weights)
    preprocess = _preprocess(network, weights)
    name = store_name(f"{network}:{weights}")
    state = None if _weights.seed_of(weights) is not None else _state(network, weights)
    visual: Any = _weights.construct(
        lambda: _visual(config), weights, state and _visual_part(state), name
    )
    text_state = state and _text_part(state)
    text = ClipText(network, weights) if _has_text(config) and text_state != {} else None
    if text and text_state:
        with torch.device("meta"):
            expected = _text_module(config).state_dict()
        _weights.check(expected, text_state, f"the text tower of {name}")
    return Backbone(
        name,
        network,
        stages(visual, preprocess["mean"], preprocess["std"], precision),
        _picture(network, visual.image_size, preprocess),
        precision,
        text=text,
    )


def stages(
    visual: Any, mean: Sequence[float], std: Sequence[float], precision: torch.dtype
) -> tuple[Stage, ...]:
    """Cut an open_clip VisionTransformer into stages. It is cast to `precision` and frozen.

    Raises:
        ValueError: Its pooling or its attention is not supported.
    """
    from open_clip.transformer import ResidualAttentionBlock

    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise ValueError("the visual tower pools by attention; only class token or mean are known")
    visual = visual.to(precision).eval().requires_grad_(False)
    stem = _vit.PatchStem(
        _vit.Normalise(mean, std, precision, channels_last=False),
        visual.conv1,
        visual.class_embedding[None],
        visual.positional_embedding,
        visual.ln_pre,
    )
    chain = [_vit.stem_stage(stem)]
    for i, block in enumerate(visual.transformer.resblocks):
        if type(block) is not ResidualAttentionBlock:
            raise ValueError(f"blocks of type {type(block).__name__} are not known here")
        attention = _vit.AttentionStep(
            block.ln_1,
            _linear(block.attn.in_proj_weight, block.attn.in_proj_bias),
            block.attn.out_proj,
            block.ls_1,
            block.attn.num_heads,
        )
        mlp = _vit.MlpStep(block.ln_2, block.mlp, block.ls_2)
        chain += _vit.block_stages(i, attention, mlp, block.mlp.gelu, prefix=1)
    pool, norm_last = visual.pool_type, bool(visual.final_ln_after_pool)
    options = {"pool": pool, "norm_last": norm_last, **_vit.norm_options(visual.ln_post)}
    projection = Projection(visual.ln_post, visual.proj, pool, norm_last)
    chain.append(Stage("proj", projection, "clip_proj/1", options, "vector", pool == "tok"))
    for stage in chain:
        stage.module.eval().requires_grad_(False)
    return tuple(chain)


class Projection(nn.Module):
    """Tokens [N, L, C] to the vector [N, D] that CLIP compares with text; not normalised."""

    def __init__(self, norm: nn.Module, projection_CD: Tensor, pool: str, norm_last: bool) -> None:
        super().__init__()
        self.norm = norm
        self.projection = nn.Parameter(projection_CD)
        self.pool = pool
        self.norm_last = norm_last

    def forward(self, x_NLC: Tensor) -> Tensor:
        # A layer norm takes each token alone, so that only the class token needs one.
        if self.pool == "tok":
            pooled: Tensor = self.norm(x_NLC[:, 0])
        elif self.norm_last:
            pooled = self.norm(x_NLC[:, 1:].mean(dim=1))
        else:
            pooled = self.norm(x_NLC)[:, 1:].mean(dim=1)
        return pooled @ self.projection


class ClipText:
    """Text tower of a CLIP network, loaded on first use from the weights of the visual tower."""

    def __init__(self, network: str, weights: str) -> None:
        self.network = network
        self.weights = weights
        self._module: nn.Module | None = None

    @property
    def max_tokens(self) -> int:
        """The number of positions of the text tower."""
        return int(_tokenizer(self.network).context_length)

    def tokens(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return all tokens of each prompt, with those of its start and its end."""
        tokenizer = _tokenizer(self.network)
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return [(start, *tokenizer.encode(prompt), end) for prompt in prompts]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [P, D], L2-normalised. A prompt's row does not depend on the others.

        Raises:
            ValueError: A prompt has more than `max_tokens` tokens.
        """
        for prompt, whole in zip(prompts, self.tokens(prompts), strict=True):
            if len(whole) > self.max_tokens:
                raise ValueError(
                    f"a prompt of {len(whole)} tokens, where {self.network} reads "
                    f"{self.max_tokens}: {prompt!r}; shorten it"
                )
        module: Any = self._loaded()
        tokens = _tokenizer(self.network)(list(prompts))
        rows = []
        with torch.inference_mode():
            for part in tokens.split(PROMPTS_A_BATCH):
                # Padded, since the last bits of a row depend on the size of its batch.
                padded = part.new_zeros(PROMPTS_A_BATCH, tokens.shape[1])
                padded[: len(part)] = part
                rows.append(module.encode_text(padded, normalize=True)[: len(part)])
        return torch.cat(rows)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the features of given prompts, as JSON."""
        config = _config(self.network, self.weights)
        return {
            "code": "clip_text/1",
            "tokenizer": "open_clip SimpleTokenizer",
            "text": config["text_cfg"],
            "quick_gelu": config["quick_gelu"],
            "parameters": _weights.parameter_digest(self._loaded()),
        }

    def _loaded(self) -> nn.Module:
        if self._module is None:
            config = _config(self.network, self.weights)
            seed = _weights.seed_of(self.weights)
            with _weights.seeded(seed or 0):
                module = _text_module(config)
            if seed is None:
                state = _text_part(_state(self.network, self.weights))
                _weights.fill(module, state, f"the text tower of {self.network}:{self.weights}")
            self._module = module.float().eval().requires_grad_(False)
        return self._module


@lru_cache
def _tokenizer(network: str) -> Any:
    import open_clip

    return open_clip.get_tokenizer(network)


def _config(network: str, weights: str) -> dict[str, Any]:
    """Return the network's configuration, with the activation of its weights' training."""
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(network)
    vision = config["vision_cfg"]
    other = None
    if "multimodal_cfg" in config or vision.get("attentional_pool"):
        other = "CoCa's, with attentional pooling"
    elif "timm_model_name" in vision:
        other = f"timm's {vision['timm_model_name']}"
    elif not isinstance(vision["layers"], int):
        other = "a ResNet"
    if other:
        raise ValueError(
            f"{network}: its visual tower is {other}; of open_clip's networks those with its plain "
            "VisionTransformer are supported, such as ViT-B-32, ViT-B-16, ViT-L-14 and ViT-H-14"
        )
    # open_clip warns of such tags and runs the wrong activation.
    tag = open_clip.get_pretrained_cfg(network, weights) or {}
    config["quick_gelu"] = bool(config.get("quick_gelu") or tag.get("quick_gelu"))
    return config


def _preprocess(network: str, weights: str) -> dict[str, Any]:
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    tag = open_clip.get_pretrained_cfg(network, weights) or {}
    merged: dict[str, Any] = merge_preprocess_dict(PreprocessCfg(), tag)
    return merged


def _picture(network: str, image_size: tuple[int, int], preprocess: Mapping[str, Any]) -> Picture:
    height, width = image_size
    mode, interpolation = preprocess["resize_mode"], preprocess["interpolation"]
    if height != width or mode not in ("shortest", "squash"):
        raise ValueError(
            f"{network} takes pictures of {width}x{height}, resized by {mode!r}; only square ones, "
            "resized by 'shortest' or 'squash', are supported"
        )
    return Picture(height, height, interpolation, mode)


def _visual(config: Mapping[str, Any]) -> nn.Module:
    # open_clip.CLIP calls this first, so that the same seed gives the same tower here.
    from open_clip.model import _build_vision_tower

    tower: nn.Module = _build_vision_tower(
        config["embed_dim"], config["vision_cfg"], config["quick_gelu"]
    )
    return tower


def _has_text(config: Mapping[str, Any]) -> bool:
    """Return whether the text tower is open_clip's own, and not one of Hugging Face."""
    return not any(key in config["text_cfg"] for key in ("hf_model_name", "hf_tokenizer_name"))


def _text_module(config: Mapping[str, Any]) -> nn.Module:
    import open_clip

    whole: nn.Module = open_clip.CLIP(**config)
    for name in ("visual", "logit_scale", "logit_bias"):
        delattr(whole, name)
    return whole


def _state(network: str, weights: str) -> dict[str, Tensor]:
    import open_clip

    if _weights.is_file(weights):
        return _weights.read(weights)
    tags = open_clip.list_pretrained_tags_by_model(network)
    if weights not in tags:
        raise _weights.no_tag(network, weights, tags)
    repo, _, file = open_clip.get_pretrained_cfg(network, weights)["hf_hub"].rpartition("/")
    name = f"{network}:{weights}"
    return _weights.read(_weights.hub_file(repo, [file] if file else HUB_FILES, name))


def _visual_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the visual tower's parameters, of a whole CLIP or of a visual tower alone."""
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    return visual or dict(state)


def _text_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not any(key.startswith("visual.") for key in state):
        return {}
    return {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith("visual.") and key not in NOT_PARAMETERS
    }


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return linear
