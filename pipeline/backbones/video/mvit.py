"""Multiscale vision transformer MViTv2-S of torchvision: `stem, blocks.i.attn, blocks.i.mlp, pool`.

Li et al., CVPR 2022, over clips of `FRAMES` frames, and `fc` where the weights have it. The tokens
of a clip are one class token and the patches of all its time steps, so every stage gives one row a
clip. The patches form no square grid: they have no reduction to a map.

Weights are torchvision's tags (KINETICS400_V1), files or seeds. The preprocessing is that of the
tag, but the resizing is antialiased.

Shapes: N clips, L tokens (class token first), C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones._stage import CLASSIFIER, Backbone, Stage
from varve.pipeline.backbones._vit import Normalise
from varve.pipeline.backbones.video import _over_time
from varve.pipeline.backbones.video._over_time import compute

FRAMES = 16
SLOW = True


def networks() -> list[str]:
    """Return the names of the networks."""
    return ["mvit_v2_s"]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of the two steps of each block.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    return _over_time.build(network, weights, precision, "head.1", stages)


def stages(whole: Any, normalise: Normalise) -> tuple[Stage, ...]:
    """Cut a torchvision MViT into stages."""
    eps = {"eps": whole.norm.eps}
    encoding = whole.pos_encoding
    size = (encoding.temporal_size, *encoding.spatial_size)
    options: dict[str, Any] = {**normalise.options(), "frames": FRAMES, "size": list(size)}
    stem = nn.Sequential(normalise, Stem(whole.conv_proj, encoding))
    chain = [_tokens("stem", stem, "mvit_stem/1", options, frames=FRAMES)]
    for i, block in enumerate(whole.blocks):
        attention = Tokens(Attention(block, size))
        stride, kv_stride = _stride(block.attn.pool_q), _stride(block.attn.pool_k)
        options = {"heads": block.attn.num_heads, "size": list(size), "stride": stride, **eps}
        options["kv_stride"] = kv_stride
        chain.append(_tokens(f"blocks.{i}.attn", attention, "mvit_attn/1", options))
        mlp = Tokens(Mlp(block), token_wise=True)
        chain.append(_tokens(f"blocks.{i}.mlp", mlp, "mvit_mlp/1", eps, token_wise=True))
        size = (size[0] // stride[0], size[1] // stride[1], size[2] // stride[2])
    pool = Pool(whole.norm)
    chain.append(Stage("pool", pool, "mvit_pool/1", eps, "vector", token_wise=True))
    if not isinstance(whole.head[1], nn.Identity):
        chain.append(Stage(CLASSIFIER, whole.head[1], "mvit_fc/1", {}, "vector"))
    return tuple(chain)


def _tokens(name: str, module: nn.Module, code: str, options: dict[str, Any], **more: Any) -> Stage:
    return Stage(name, module, code, options, "tokens", prefix=1, square=False, **more)


def _stride(pool: Any) -> list[int]:
    """Return the strides over time, rows and columns of what pools queries or keys."""
    return [1, 1, 1] if pool is None else [*pool.pool.stride]


class Stem(nn.Module):
    """Compute the tokens [B, L, C] of clips from normalised frames [B * T, 3, S, S]."""

    mixes_time = True

    def __init__(self, patches: nn.Module, encoding: nn.Module) -> None:
        super().__init__()
        self.patches = patches
        self.encoding = encoding

    def forward(self, x_N3SS: Tensor) -> Tensor:
        x_BT3SS = x_N3SS.view(len(x_N3SS) // FRAMES, FRAMES, *x_N3SS.shape[1:])
        map_BCTHW = compute(self.patches, x_BT3SS.transpose(1, 2).contiguous())
        return compute(self.encoding, map_BCTHW.flatten(2).transpose(1, 2))


class Tokens(nn.Module):
    """Run a step of a block on tokens [N, L, C].

    Args:
        inner: Module of the step.
        token_wise: Whether it takes each token alone.
    """

    mixes_time = True

    def __init__(self, inner: nn.Module, token_wise: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.token_wise = token_wise

    def forward(self, x_NLC: Tensor) -> Tensor:
        return compute(self.inner, x_NLC)


class Attention(nn.Module):
    """Compute x' of tokens x: the pooled attention of a block, and its pooled shortcut.

    Args:
        block: MultiscaleBlock of torchvision, whose projection, if any, precedes the shortcut.
        size: Number of time steps, rows and columns of the patches that it is given.
    """

    def __init__(self, block: Any, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.norm = block.norm1
        self.attention = block.attn
        self.project = block.project
        self.pool = block.pool_skip
        self.size = size

    def forward(self, x_NLC: Tensor) -> Tensor:
        normed = self.norm(x_NLC)
        out, _ = self.attention(normed, self.size)
        skip = x_NLC if self.project is None else self.project(normed)
        if self.pool is not None:
            skip, _ = self.pool(skip, self.size)
        summed: Tensor = skip + out
        return summed


class Mlp(nn.Module):
    """Compute x + MLP(LN x) of tokens x."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm = block.norm2
        self.mlp = block.mlp

    def forward(self, x_NLC: Tensor) -> Tensor:
        out: Tensor = x_NLC + self.mlp(self.norm(x_NLC))
        return out


class Pool(nn.Module):
    """Return the class token [N, C] of tokens [N, L, C], normalised."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_NLC: Tensor) -> Tensor:
        out: Tensor = self.norm(x_NLC[:, 0])
        return out
