"""Hybrid attention (HAD): two modalities attend to themselves and to each other.

The result is one vector for each clip.

For each modality m, over the S segments of a clip (o is the other one):

    z_m = W_m (x_m - mean) / deviation                       segments, the low level
    h_m = LN(z_m + self-attention(z_m) + cross-attention(z_m, z_o))
    s_m = LN(h_m + FFN(h_m))                                 snippets
    v   = W [mean s_1, mean s_2]                             the high level

Ours: mean and deviation of each dimension are those of the first task (`standardize`), since the
vectors of one network are similar to each other and of any length; the fusion is one linear map of
both means; positions are optional.

Shapes: B clips, S segments, D width of a feature, W width of the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Pair = Sequence[Tensor]
POSITION_STD = 0.5  # that of z at the start: smaller positions are hardly learned
SMALL, TINY = 1e-2, 1e-6  # of the mean variance, and of a deviation


class HybridAttention(nn.Module):
    """Layer of one modality, from its own [B, S, W] and those of the other to [B, S, W]."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.last_norm = nn.LayerNorm(width)

    def forward(self, x_BSW: Tensor, other_BSW: Tensor) -> Tensor:
        own_BSW, _ = self.own(x_BSW, x_BSW, x_BSW, need_weights=False)
        cross_BSW, _ = self.cross(x_BSW, other_BSW, other_BSW, need_weights=False)
        x_BSW = self.norm(x_BSW + own_BSW + cross_BSW)
        out_BSW: Tensor = self.last_norm(x_BSW + self.ffn(x_BSW))
        return out_BSW


class Hybrid(nn.Module):
    """Model from a feature of each modality to the vector of a clip, step by step.

    Args:
        widths: Width D of each modality.
        segments: Number S of segments.
        width: Width W of the model.
        heads: Number of attention heads.
        ffn: Width of the feed-forward networks.
        position: `learned`, or None for no positions: a clip is then the set of its segments.
        seed: Seed of the parameters; the global generators are not used.
    """

    def __init__(
        self,
        widths: Sequence[int],
        segments: int,
        width: int = 512,
        heads: int = 8,
        ffn: int = 1024,
        position: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.ModuleList(nn.Linear(D, width) for D in widths)
            self.attend = nn.ModuleList(HybridAttention(width, heads, ffn) for _ in widths)
            self.fuse = nn.Linear(len(widths) * width, width)
            self.position = None
            if position is not None:
                self.position = nn.Parameter(POSITION_STD * torch.randn(segments, width))
        for number, D in enumerate(widths):
            self.register_buffer(f"mean_{number}", torch.zeros(D))
            self.register_buffer(f"deviation_{number}", torch.ones(D))

    def standardize(self, features: Pair) -> None:
        """Set mean and deviation from [N, S, D] each. Constant dimensions remain small."""
        for number, x_NSD in enumerate(features):
            flat = x_NSD.flatten(0, 1).double()
            variance_D = flat.var(dim=0, correction=0)
            deviation_D = (variance_D + SMALL * variance_D.mean()).sqrt().clamp(min=TINY)
            self.get_buffer(f"mean_{number}").copy_(flat.mean(dim=0))
            self.get_buffer(f"deviation_{number}").copy_(deviation_D)

    def segments(self, features: Pair) -> list[Tensor]:
        """Return segments z [B, S, W] of each modality, from float32 [B, S, D] each."""
        segments = []
        for number, (project, x_BSD) in enumerate(zip(self.project, features, strict=True)):
            mean_D, deviation_D = (
                self.get_buffer(f"{name}_{number}") for name in ("mean", "deviation")
            )
            z_BSW = project((x_BSD - mean_D) / deviation_D)
            segments.append(z_BSW if self.position is None else z_BSW + self.position)
        return segments

    def snippets(self, segments: Pair) -> list[Tensor]:
        """Return snippets s [B, S, W] of each modality, from its segments."""
        first, second = segments
        return [self.attend[0](first, second), self.attend[1](second, first)]

    def fused(self, snippets: Pair) -> Tensor:
        """Return the vectors of clips [B, W], from the snippets of both modalities."""
        out_BW: Tensor = self.fuse(torch.cat([x_BSW.mean(dim=1) for x_BSW in snippets], dim=1))
        return out_BW

    def forward(self, features: Pair) -> Tensor:
        """Return the vectors of clips [B, W], from float32 [B, S, D] of each modality."""
        return self.fused(self.snippets(self.segments(features)))
