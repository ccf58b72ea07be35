"""StPR's spatiotemporal expert: a small transformer with a CLS token over the T frames of a clip.

The layers are pre-norm over [cls; V_1 .. V_T]: x <- x + MHSA(LN x), x <- x + FFN(LN x). The output
is the CLS row. Without a position embedding, as published, the order of the frames makes no
difference. A learned position embedding makes it count.

Ours, where StPR is silent:
- All tokens are multiplied by sqrt(D). The channels of unit vectors would otherwise be lost beside
  those that a layer adds.
- ReLU in the FFN, no dropout, a last LayerNorm.
- The initialisation. CLS and positions are drawn from N(0, 0.02), the rest as torch's own encoder
  layers draw it. With `start="frames"`, W_v and W_out are the identity and the FFN adds zero. The
  CLS row is then a mean of the frames, which can be compared with the text of any class, also of
  classes that the expert is never trained on. `start="random"` is torch's initialisation.

The last layer computes the CLS row alone. It has one query, so keys and values need not be
computed per token: q . (W_k x_t + b_k) = (W_k' q) . x_t + a constant, and sum a_t (W_v x_t + b_v)
= W_v (sum a_t x_t) + b_v. Every product of the last layer then has one row per clip: the same
numbers with three tenths fewer multiply-adds.

Shapes: B clips, T frames, L = T + 1 tokens, D width, H attention heads, E = D / H, F hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

STARTS = ("frames", "random")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExpertConfig:
    """Options of a spatiotemporal expert. The defaults are StPR's, but for `start`.

    Attributes:
        layers: Number of transformer layers.
        heads: Number of attention heads, a divisor of the feature width.
        ffn: Hidden width of the FFN.
        position: "learned" for a position embedding; None, as published, for none: a motion and
            its reverse are then the same to the expert.
        start: Initialisation, `frames` or `random`; see the module.

    Raises:
        ValueError: A number is below 1, or a value is not one of the choices.
    """

    layers: int = 3
    heads: int = 2
    ffn: int = 2048
    position: str | None = None
    start: str = "frames"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"no start={self.start!r}; choose from {', '.join(STARTS)}")
        if self.position not in (None, "learned"):
            raise ValueError(f"no position={self.position!r}; choose from None, learned")
        if min(self.layers, self.heads, self.ffn) < 1:
            raise ValueError(
                f"an expert of layers={self.layers}, heads={self.heads}, ffn={self.ffn}: give at "
                "least 1 of each, and as many heads as divide the width"
            )


class Layer(nn.Module):
    """A pre-norm layer that computes `nn.TransformerEncoderLayer(norm_first=True)`."""

    def __init__(self, width: int, config: ExpertConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = _empty(width, 3 * width)
        self.out = _empty(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = _empty(width, config.ffn)
        self.down = _empty(config.ffn, width)
        with torch.no_grad():
            nn.init.xavier_uniform_(self.qkv.weight, generator=generator)
            _uniform(self.out.weight, width, generator)
            for attention in (self.qkv, self.out):
                attention.bias.zero_()
            for linear in (self.up, self.down):
                _uniform(linear.weight, linear.in_features, generator)
                _uniform(linear.bias, linear.in_features, generator)
            if config.start == "frames":
                self.qkv.weight[2 * width :].copy_(torch.eye(width))
                self.out.weight.copy_(torch.eye(width))
                self.down.weight.zero_()
                self.down.bias.zero_()

    def forward(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        B, L, D = x_BLD.shape
        x = x_BLD.flatten(0, 1)
        qkv = _linear(self.norm1(x), self.qkv.weight, self.qkv.bias, dtype)
        q, k, v = qkv.view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # On so few tokens two products are faster than torch's attention, above all backwards.
        weights_BHLL = torch.softmax((q * q.shape[-1] ** -0.5 @ k.mT).to(x.dtype), dim=-1)
        mixed = (weights_BHLL.to(dtype) @ v).transpose(1, 2).reshape(B * L, D)
        x = x + _linear(mixed, self.out.weight, self.out.bias, dtype)
        return self._ffn(x, dtype).view(B, L, D)

    def first(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the first row of `forward` alone, [B, D]."""
        D, H = x_BLD.shape[2], self.heads
        h_BLD = self.norm1(x_BLD)
        q_HED, k_HED, v_HED = self.qkv.weight.to(dtype).view(3, H, -1, D).unbind(0)
        q_HE, _, v_HE = self.qkv.bias.view(3, H, -1).unbind(0)  # the keys' shifts all logits alike
        query_BHE = torch.einsum("bd,hed->bhe", h_BLD[:, 0].to(dtype), q_HED) + q_HE
        keyed_BHD = torch.einsum("bhe,hed->bhd", query_BHE.to(dtype), k_HED).to(h_BLD.dtype)
        weights_BHL = torch.softmax(keyed_BHD @ h_BLD.mT * (D // H) ** -0.5, dim=-1)
        mixed_BHE = torch.einsum("bhd,hed->bhe", (weights_BHL @ h_BLD).to(dtype), v_HED) + v_HE
        mixed_BD = mixed_BHE.flatten(1)
        x_BD = x_BLD[:, 0] + _linear(mixed_BD, self.out.weight, self.out.bias, dtype)
        return self._ffn(x_BD, dtype)

    def _ffn(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = torch.relu(_linear(self.norm2(x), self.up.weight, self.up.bias, dtype))
        return x + _linear(hidden, self.down.weight, self.down.bias, dtype)


class Expert(nn.Module):
    """Map the unit vectors of frames, [B, T, D], to clips, [B, D]. Lengths carry no information.

    Args:
        width: D.
        config: Options of the transformer.
        frames: T, for the position embedding; without one, any T is accepted.
        generator: Draws the parameters, on the CPU.

    Raises:
        ValueError: The attention heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        config: ExpertConfig = ExpertConfig(),
        frames: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(
                f"an expert of {width=}, heads={config.heads}: give as many heads as divide the "
                "width"
            )
        generator = generator or torch.Generator().manual_seed(0)
        self.cls = nn.Parameter(0.02 * torch.randn(width, generator=generator))
        self.layers = nn.ModuleList(Layer(width, config, generator) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.position: nn.Parameter | None = None
        if config.position is not None:
            self.position = nn.Parameter(0.02 * torch.randn(frames, width, generator=generator))

    def forward(self, x_BTD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the output of the CLS token, float32 [B, D].

        Args:
            dtype: Data type of matrix products; bfloat16 is for training. Norms, softmax, sums and
                the result are always float32.

        Raises:
            ValueError: See `check`.
        """
        self.check(x_BTD)
        if self.position is not None:
            x_BTD = x_BTD + self.position
        x = torch.cat([self.cls.expand(len(x_BTD), 1, -1), x_BTD], dim=1) * len(self.cls) ** 0.5
        *inner, last = self.layers
        for layer in inner:
            x = layer(x, dtype)
        assert isinstance(last, Layer)
        out_BD: Tensor = self.norm(last.first(x, dtype))
        return out_BD

    def check(self, x_BTD: Tensor) -> None:
        """Check the shape of clips before they are encoded.

        Raises:
            ValueError: The width differs, or, with positions, the number of frames.
        """
        if x_BTD.ndim != 3 or x_BTD.shape[2] != len(self.cls):
            raise ValueError(
                f"an expert of width {len(self.cls)} was given {list(x_BTD.shape)}, not [clips, "
                "frames, width]"
            )
        if self.position is not None and x_BTD.shape[1] != len(self.position):
            raise ValueError(
                f"clips of {x_BTD.shape[1]} frames, where positions were learned for "
                f"{len(self.position)}: use the same number of frames throughout, or position=None"
            )


def _linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    # By hand and not by autocast, which leaves open what runs in which type.
    return functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def _empty(width: int, out: int) -> nn.Linear:
    """Return a linear layer without values; nn.Linear would draw from the global generator."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, width, out)  # type: ignore[no-untyped-call]
    return linear


def _uniform(x: Tensor, fan_in: int, generator: torch.Generator) -> None:
    x.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
