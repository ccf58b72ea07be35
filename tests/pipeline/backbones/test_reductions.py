"""Reductions: values against plain arithmetic, and what is refused."""

import pytest
import torch
from torch import nn

from varve.pipeline.backbones import Stage, canonical_reduction, reduce, reductions_of
from varve.pipeline.registry import available

TOKENS = Stage("blocks.0.mlp", nn.Identity(), "x/1", {}, "tokens", prefix=2)
MAP = Stage("layer1.0", nn.Identity(), "x/1", {}, "map")
VECTOR = Stage("pool", nn.Identity(), "x/1", {}, "vector")


def test_tokens_return_to_their_positions():
    grid = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    tokens = torch.cat([torch.full((2, 2, 3), -1.0), grid.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(reduce(tokens, TOKENS, "map"), grid)
    assert torch.equal(reduce(tokens, TOKENS, "cls"), torch.full((2, 3), -1.0))
    torch.testing.assert_close(reduce(tokens, TOKENS, "mean"), grid.mean(dim=(2, 3)))


def test_grid7_averages_blocks_of_a_grid_that_seven_divides():
    grid = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    blocks = grid.reshape(2, 3, 7, 2, 7, 2).mean(dim=(3, 5))
    torch.testing.assert_close(reduce(grid, MAP, "grid7"), blocks)
    tokens = torch.cat([torch.zeros(2, 2, 3), grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(reduce(tokens, TOKENS, "grid7"), blocks)
    seven = grid[:, :, :7, :7]
    assert torch.equal(reduce(seven, MAP, "grid7"), seven)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_are_taken_in_float32(dtype):
    # The float16 sum of these overflows; a bfloat16 sum would stop growing at 256.
    x = torch.full((1, 1, 64, 64), 100.0 if dtype == torch.float16 else 1.0, dtype=dtype)
    pooled = reduce(x, MAP, "pool")
    assert pooled.dtype == torch.float32
    assert pooled.item() == x[0, 0, 0, 0].item()
    tokens = x.flatten(2).transpose(1, 2)
    mean = reduce(torch.cat([tokens[:, :2], tokens], dim=1), TOKENS, "mean")
    assert mean.dtype == torch.float32
    assert mean.item() == pooled.item()


def test_a_whole_output_has_one_name():
    assert canonical_reduction(TOKENS, "tokens") == canonical_reduction(TOKENS, "") == ""
    assert canonical_reduction(MAP, "map") == ""
    assert canonical_reduction(TOKENS, "map") == "map"
    assert canonical_reduction(VECTOR, "") == ""
    x = torch.rand(2, 3)
    assert reduce(x, VECTOR, "") is x


@pytest.mark.parametrize("stage", [TOKENS, MAP, VECTOR], ids=lambda stage: stage.form)
def test_a_reduction_that_the_form_has_not_is_refused(stage):
    names = {*available("reductions"), "grid8", "CLS"}
    for reduction in names - set(reductions_of(stage)):
        with pytest.raises(ValueError, match=f"^{stage.name}:{reduction}: the stage gives a"):
            canonical_reduction(stage, reduction)


def test_a_name_that_is_no_reduction_is_refused():
    with pytest.raises(ValueError, match="pool:median: the stage gives a vector"):
        reduce(torch.zeros(1, 3), VECTOR, "median")


def test_patches_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="10 patch tokens form no square grid"):
        reduce(torch.zeros(1, 12, 3), TOKENS, "map")


def test_the_class_token_needs_one():
    bare = Stage("t", nn.Identity(), "x/1", {}, "tokens", prefix=0)
    with pytest.raises(ValueError, match="t:cls: the stage has no class token"):
        canonical_reduction(bare, "cls")
