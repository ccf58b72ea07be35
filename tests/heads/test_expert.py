"""The spatiotemporal expert against torch's own encoder, and what it makes of order."""

import numpy as np
import pytest
import torch
from torch import nn

from varve.heads.grafts.adapter import Adapter
from varve.heads.parts.expert import Expert, ExpertConfig


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def numbers(module):
    return sum(p.numel() for p in module.parameters())


def twin(expert, heads):
    """Return torch's encoder with the same parameters, in float64."""
    D, F = len(expert.cls), expert.layers[0].up.out_features
    layer = nn.TransformerEncoderLayer(D, heads, F, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(
        layer, len(expert.layers), nn.LayerNorm(D), enable_nested_tensor=False
    )
    names = {
        "norm1": "norm1", "norm2": "norm2", "up": "linear1", "down": "linear2",
        "out": "self_attn.out_proj",
    }  # fmt: skip
    state = {f"norm.{name}": p for name, p in expert.norm.state_dict().items()}
    for i, expert_layer in enumerate(expert.layers):
        for part, name in names.items():
            for kind, p in getattr(expert_layer, part).state_dict().items():
                state[f"layers.{i}.{name}.{kind}"] = p
        state[f"layers.{i}.self_attn.in_proj_weight"] = expert_layer.qkv.weight
        state[f"layers.{i}.self_attn.in_proj_bias"] = expert_layer.qkv.bias
    encoder.load_state_dict(state)
    return encoder.double()


def stirred(expert):
    """All parameters drawn anew: at the start some are zeros or ones."""
    with torch.no_grad():
        for i, p in enumerate(expert.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=100 + i))
    return expert


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("frames", [None, 5])
def test_it_gives_the_numbers_and_gradients_of_torchs_encoder(layers, frames):
    position = None if frames is None else "learned"
    config = ExpertConfig(layers, heads=3, ffn=20, position=position)
    expert = stirred(Expert(12, config, frames or 0)).double()
    encoder = twin(expert, heads=3)
    x = draw(4, 5, 12).double().requires_grad_()
    with_positions = x if frames is None else x + expert.position
    tokens = 12**0.5 * torch.cat([expert.cls.expand(4, 1, 12), with_positions], dim=1)
    expected = encoder(tokens)[:, 0]
    encoded = expert(x, torch.float64)
    torch.testing.assert_close(encoded, expected, rtol=1e-10, atol=1e-12)

    direction = draw(4, 12, seed=1).double()
    (dx,) = torch.autograd.grad((expected * direction).sum(), x, retain_graph=True)
    (expected * direction).sum().backward()
    wanted = {
        "cls": expert.cls.grad, "qkv": encoder.layers[-1].self_attn.in_proj_weight.grad,
        "up": encoder.layers[-1].linear1.weight.grad, "first": encoder.layers[0].norm1.bias.grad,
        "position": None if frames is None else expert.position.grad,
    }  # fmt: skip
    expert.cls.grad, x.grad = None, None
    if frames is not None:
        expert.position.grad = None
    (expert(x, torch.float64) * direction).sum().backward()
    torch.testing.assert_close(x.grad, dx, rtol=1e-9, atol=1e-11)
    got = {
        "cls": expert.cls.grad, "qkv": expert.layers[-1].qkv.weight.grad,
        "up": expert.layers[-1].up.weight.grad, "first": expert.layers[0].norm1.bias.grad,
        "position": None if frames is None else expert.position.grad,
    }  # fmt: skip
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-11)


def test_counts_of_numbers_are_the_papers():
    expert = Expert(512)
    assert numbers(expert.layers) == 9_457_152
    assert expert.cls.numel() == 512
    assert numbers(expert.norm) == 1_024
    assert numbers(expert) == 9_457_152 + 512 + 1_024
    assert numbers(Expert(512, ExpertConfig(position="learned"), 8)) == numbers(expert) + 8 * 512
    adapters = [Adapter(nn.Identity(), 768) for _ in range(12)]
    assert sum(map(numbers, adapters)) == 1_179_648


def test_the_order_of_frames_makes_no_difference_without_positions_and_one_with_them():
    x = nn.functional.normalize(draw(6, 8, 64), dim=2)
    without, with_positions = (
        Expert(64, ExpertConfig(position=position), 8) for position in (None, "learned")
    )
    for expert, apart in ((without, False), (with_positions, True)):
        there, back = (nn.functional.normalize(expert(y), dim=1) for y in (x, x.flip(1)))
        assert (float((there - back).abs().max().detach()) > 1e-5) is apart


def test_bfloat16_is_near_float32_and_gives_float32():
    expert, x = Expert(64), draw(6, 8, 64)
    exact, fast = expert(x), expert(x, torch.bfloat16)
    assert fast.dtype == torch.float32
    assert 1e-5 < float((exact - fast).abs().max().detach()) < 0.05


def test_it_is_drawn_from_its_generator_alone_as_torchs_layers_are():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (
        Expert(64, ExpertConfig(start="random"), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(first.layers[0].up.weight, other.layers[0].up.weight)

    layer = nn.TransformerEncoderLayer(64, 2, 2048)
    theirs = {
        "qkv.weight": layer.self_attn.in_proj_weight, "qkv.bias": layer.self_attn.in_proj_bias,
        "out.weight": layer.self_attn.out_proj.weight, "out.bias": layer.self_attn.out_proj.bias,
        "up.weight": layer.linear1.weight, "up.bias": layer.linear1.bias,
        "down.weight": layer.linear2.weight, "down.bias": layer.linear2.bias,
    }  # fmt: skip
    for name, tensor in theirs.items():
        parameter = first.layers[1].get_parameter(name)
        assert float(parameter.detach().abs().max()) == pytest.approx(
            float(tensor.detach().abs().max()), rel=0.05
        )
        assert float(parameter.detach().std()) == pytest.approx(
            float(tensor.detach().std()), rel=0.2
        )


def test_it_starts_as_a_mean_of_the_frames_or_as_torchs_does():
    x = nn.functional.normalize(draw(30, 8, 64) + draw(30, 1, 64, seed=1), dim=2)
    cosines = {}
    for start in ("frames", "random"):
        with torch.no_grad():
            out = Expert(64, ExpertConfig(start=start))(x)
        cosines[start] = nn.functional.cosine_similarity(out, x.mean(dim=1), dim=1)
    assert cosines["frames"].min() > 0.9
    assert cosines["random"].abs().mean() < 0.3
    with pytest.raises(ValueError, match="choose from frames, random"):
        ExpertConfig(start="zeros")


@pytest.mark.parametrize("options", [{"layers": 0}, {"heads": 5}, {"heads": 0}, {"ffn": 0}])
def test_what_cannot_be_an_expert_is_refused(options):
    with pytest.raises(ValueError, match="as many heads as divide"):
        Expert(16, ExpertConfig(**options))


def test_clips_of_another_width_or_length_are_refused():
    with pytest.raises(ValueError, match=r"width 16 was given \[2, 4, 12\]"):
        Expert(16)(draw(2, 4, 12))
    assert Expert(16)(draw(2, 7, 16)).shape == (2, 16)
    with pytest.raises(ValueError, match=r"clips of 7 frames.*for 4.*position=None"):
        Expert(16, ExpertConfig(position="learned"), 4)(draw(2, 7, 16))
