"""Bottleneck adapter (AdaptFormer, as StPR uses it) beside or after the MLP of a ViT block.

AdaptFormer (Chen et al., NeurIPS 2022), Eq. 2 and 3; StPR's spatial adapters. With x' the output
of the block's attention and FFN the frozen MLP step, x' + MLP(LN x'):

    parallel:    out = FFN(x') + s * ReLU(x' W_down) W_up
    sequential:  h = FFN(x');  out = h + s * ReLU(h W_down) W_up

Ours, where StPR is silent: the parallel form as default, s = 0.1 and W_up = 0 at the start
(AdaptFormer's choices), and AdaptFormer's distribution of W_down. No biases, no norm inside.

Shapes: N frames, L tokens, C = `width` channels, D = `bottleneck`.
"""

import torch
from torch import Tensor, nn

from varve.heads.grafts._inner import train_unless_frozen


class Adapter(nn.Module):
    """Graft that adds a ReLU bottleneck of width D to a stage; the identity at the start.

    The input is tokens [N, L, C], the class token alone [N, 1, C], or vectors [N, C]; tokens are
    independent. There are 2 * C * D parameters.

    Args:
        inner: Module of the stage; input and output of width C.
        width: Width C.
        bottleneck: Width D of the bottleneck.
        scale: Fixed factor s.
        form: `parallel` reads the input of the stage, `sequential` its output.
        seed: Seed of W_down, uniform in +-1 / sqrt(C).
    """

    code = "adapter/1"
    forms = ("tokens",)
    train = train_unless_frozen

    def __init__(
        self,
        inner: nn.Module,
        width: int,
        bottleneck: int = 64,
        scale: float = 0.1,
        form: str = "parallel",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if form not in ("parallel", "sequential"):
            raise ValueError(f"no {form=}; choose from parallel, sequential")
        if width < 1 or bottleneck < 1:
            raise ValueError(f"an adapter of {width=} and {bottleneck=}: both must be at least 1")
        self.inner = inner
        self.width = width
        self.bottleneck = bottleneck
        self.scale = scale
        self.form = form
        self.token_wise = bool(getattr(inner, "token_wise", False))
        self.frames = int(getattr(inner, "frames", 0))
        generator = torch.Generator("cpu").manual_seed(seed)
        down_CD = torch.empty(width, bottleneck, dtype=torch.float32, device="cpu")
        self.down = nn.Parameter(down_CD.uniform_(-(width**-0.5), width**-0.5, generator=generator))
        self.up = nn.Parameter(torch.zeros_like(self.down.T, memory_format=torch.contiguous_format))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        read = x if self.form == "parallel" else out
        if x.shape[-1] != self.width or out.shape != x.shape:
            raise ValueError(
                f"an adapter of width {self.width} on a stage from {list(x.shape)} to "
                f"{list(out.shape)}: it stands for stages that keep the shape of their tokens "
                "[N, L, width], such as blocks.11.mlp"
            )
        # Rows of one matrix: on a slice of the tokens, how torch multiplies a stack depends on
        # whether anything may train, and a suffix in training must see what the store holds.
        rows = read.to(self.down.dtype).flatten(0, -2)
        added = torch.relu(rows @ self.down) @ self.up
        return (out + self.scale * added.view(out.shape)).to(out.dtype)


build = Adapter
