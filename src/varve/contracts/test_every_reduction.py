"""The contract of reductions, run over every reduction and every form of output."""

import pytest
import torch
from torch import nn

from varve.contracts.options import names
from varve.pipeline.backbones import Reduction, Stage, canonical_reduction, reduction_of
from varve.pipeline.registry import variant

TOKENS = Stage("tokens", nn.Identity(), "x/1", {}, "tokens", prefix=2)
MAP = Stage("map", nn.Identity(), "x/1", {}, "map")
VECTOR = Stage("vector", nn.Identity(), "x/1", {}, "vector")
SHAPES = {"tokens": (2 + 14 * 14, 6), "map": (6, 14, 14), "vector": (6,)}


def pytest_generate_tests(metafunc):
    if "reduction" in metafunc.fixturenames:
        metafunc.parametrize("reduction", names(metafunc.config, "reductions"))


@pytest.fixture(params=[TOKENS, MAP, VECTOR], ids=lambda stage: stage.form)
def stage(request, reduction):
    if variant("reductions", reduction)(request.param) is None:
        pytest.skip(f"{reduction} does not apply to a {request.param.form}")
    return request.param


def outputs(stage, count=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPES[stage.form], generator=generator).to(dtype)


def test_it_applies_to_some_form_and_gives_none_for_others(reduction):
    reductions = [variant("reductions", reduction)(stage) for stage in (TOKENS, MAP, VECTOR)]
    assert any(reductions)
    assert all(isinstance(r, Reduction | None) for r in reductions)
    assert all(r.tokens in ("all", "class", "patches") for r in reductions if r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_is_of_its_frame_alone_and_the_output_is_left_as_it_was(reduction, stage, dtype):
    apply, x = reduction_of(stage, reduction).apply, outputs(stage, dtype=dtype)
    before = x.clone()
    features = apply(x)
    assert torch.equal(x, before)
    assert features.dtype in (dtype, torch.float32)
    assert len(features) == len(x)
    assert features.isfinite().all()
    assert torch.equal(apply(x[[2, 0, 1]]), features[[2, 0, 1]])
    assert torch.equal(apply(torch.cat([x[:1], outputs(stage, 2, 1, dtype)]))[0], features[0])


def test_a_feature_is_of_the_tokens_that_it_declares(reduction):
    declared = variant("reductions", reduction)(TOKENS)
    if declared is None or declared.tokens == "all":
        return
    x = outputs(TOKENS)
    changed = x.clone()
    others = slice(1, None) if declared.tokens == "class" else slice(TOKENS.prefix)
    changed[:, others] += 1
    assert torch.equal(declared.apply(changed), declared.apply(x))


def test_an_inverse_gives_back_what_was_kept(reduction, stage):
    declared = reduction_of(stage, reduction)
    if declared.expand is None:
        return
    features = declared.apply(outputs(stage))
    restored = declared.expand(features)
    assert restored.ndim == len(SHAPES[stage.form]) + 1
    assert torch.equal(declared.apply(restored), features)
    # Later stages are computed from it, so the declared tokens must come back as they were.
    parts = {"all": slice(None), "class": slice(1), "patches": slice(stage.prefix, None)}
    part = parts[declared.tokens] if stage.form == "tokens" else slice(None)
    assert torch.equal(restored[:, part], outputs(stage)[:, part]), "expand(apply(x)) is not x"


def test_it_has_one_name(reduction, stage):
    assert canonical_reduction(stage, reduction) in (reduction, "")
