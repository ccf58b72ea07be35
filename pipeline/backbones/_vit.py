"""Steps of vision transformers, whichever library built them; and the normalisation of pictures.

Shapes: N frames, L tokens (prefix tokens first), C channels, S picture size in pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varve.pipeline.backbones._stage import Stage

ACTIVATIONS = ("GELU", "QuickGELU", "SiLU")


class Normalise(nn.Module):
    """Normalise pictures: uint8 [N, S, S, 3] to (x / 255 - mean) / std, [N, 3, S, S].

    The arithmetic is float32, in torchvision's order, whatever the output's type.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels_last: bool
    ) -> None:
        super().__init__()
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.dtype = dtype
        # Not the memory format itself, which pickles as a name in whichever module has `torch`.
        self.channels_last = channels_last

    def forward(self, x_NSS3: Tensor) -> Tensor:
        # Tuples and not buffers: a module's cast to bfloat16 would round them.
        x = x_NSS3.permute(0, 3, 1, 2).to(torch.float32).div(255)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device)[:, None, None]
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device)[:, None, None]
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.sub_(mean).div_(std).to(self.dtype).contiguous(memory_format=form)

    def options(self) -> dict[str, Any]:
        """Return all that decides the output, as JSON."""
        return {"mean": list(self.mean), "std": list(self.std)}


class PatchStem(nn.Module):
    """Compute tokens from uint8 pictures: patches, prefix tokens, position embedding, norm.

    `prefix_PC` are the class and register tokens. `positions_MC` has a row for every token, or for
    the patches alone; then no position is added to the prefix tokens.
    """

    def __init__(
        self,
        normalise: Normalise,
        patches: nn.Conv2d,
        prefix_PC: Tensor,
        positions_MC: Tensor,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.patches = patches
        self.prefix = nn.Parameter(prefix_PC)
        self.positions = nn.Parameter(positions_MC)
        self.norm = norm

    def forward(self, x_NSS3: Tensor) -> Tensor:
        x = self.patches(self.normalise(x_NSS3)).flatten(2).transpose(1, 2)
        prefix = self.prefix.expand(len(x), -1, -1)
        if len(self.positions) == x.shape[1]:
            x = torch.cat([prefix, x + self.positions], dim=1)
        else:
            x = torch.cat([prefix, x], dim=1) + self.positions
        out: Tensor = self.norm(x)
        return out


class AttentionStep(nn.Module):
    """Compute x + scale(attention(norm(x))) of tokens [N, L, C].

    nn.MultiheadAttention is not used: its kernels differ with and without gradients, and a suffix
    in training must compute the same numbers as the build.
    """

    def __init__(
        self, norm: nn.Module, qkv: nn.Linear, out: nn.Linear, scale: nn.Module, heads: int
    ) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.out = out
        self.scale = scale
        self.heads = heads

    def forward(self, x_NLC: Tensor) -> Tensor:
        N, L, C = x_NLC.shape
        qkv = self.qkv(self.norm(x_NLC)).reshape(N, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x_NLC + self.scale(self.out(mixed.transpose(1, 2).reshape(N, L, C)))
        return out


class MlpStep(nn.Module):
    """Compute x + scale(mlp(norm(x))) of each token alone."""

    token_wise = True

    def __init__(self, norm: nn.Module, mlp: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp
        self.scale = scale

    def forward(self, x_NLC: Tensor) -> Tensor:
        out: Tensor = x_NLC + self.scale(self.mlp(self.norm(x_NLC)))
        return out


def stem_stage(stem: PatchStem) -> Stage:
    """Return the stage of a patch stem."""
    options = {
        **stem.normalise.options(),
        **norm_options(stem.norm),
        "patch": list(stem.patches.kernel_size),
        "stride": list(stem.patches.stride),
    }
    return Stage("stem", stem, "vit_stem/1", options, "tokens", prefix=len(stem.prefix))


def block_stages(
    index: int, attention: AttentionStep, mlp: MlpStep, activation: nn.Module, prefix: int
) -> tuple[Stage, Stage]:
    """Return the two stages of a transformer block. `activation` is the module inside `mlp`."""
    attn_options = {"heads": attention.heads, **norm_options(attention.norm)}
    mlp_options = {
        "mlp": type(mlp.mlp).__name__,
        **({"gate_last": bool(mlp.mlp.gate_last)} if hasattr(mlp.mlp, "gate_last") else {}),
        **_activation_options(activation),
        **norm_options(mlp.norm),
    }
    name = f"blocks.{index}"
    return (
        Stage(f"{name}.attn", attention, "vit_attn/1", attn_options, "tokens", prefix=prefix),
        Stage(f"{name}.mlp", mlp, "vit_mlp/1", mlp_options, "tokens", True, prefix),
    )


def norm_options(norm: nn.Module) -> dict[str, Any]:
    """Return all that decides a norm's output besides its parameters, as JSON.

    Raises:
        ValueError: The kind of norm is not supported.
    """
    if isinstance(norm, nn.Identity):
        return {"norm": "none"}
    if isinstance(norm, nn.LayerNorm):
        return {"norm": "layer", "eps": float(norm.eps)}
    raise ValueError(f"a {type(norm).__name__} norm: only layer norms are known here")


def _activation_options(activation: nn.Module) -> dict[str, Any]:
    kind = type(activation).__name__
    if kind not in ACTIVATIONS:
        raise ValueError(f"an activation {kind}: only {', '.join(ACTIVATIONS)} are known here")
    if isinstance(activation, nn.GELU):
        return {"activation": kind, "approximate": activation.approximate}
    return {"activation": kind}
