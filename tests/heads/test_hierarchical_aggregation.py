"""HCE's parts against loops in float64, dense 4D convolutions and the published counts."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from varve.heads.parts import correlation_refinement as crm
from varve.heads.parts.hierarchical_aggregation import HAS, drift, effective
from varve.heads.parts.hypercorrelation import CenterPivot4d, correlation, enlarged, pooled


def groups(counts, widths=(8, 12, 16), sizes=(28, 14, 7)):
    """Blocks of three sizes, by name."""
    return {
        f"layer{s}.{i}": (width, size, size)
        for s, (count, width, size) in enumerate(zip(counts, widths, sizes, strict=True), 2)
        for i in range(count)
    }


def maps(shapes, frames, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(frames, *shape, generator=generator, dtype=dtype)
        for name, shape in shapes.items()
    }


def test_a_hypercorrelation_is_that_of_every_pair_of_positions():
    shapes = {"a": (5, 2, 3), "b": (4, 2, 3)}
    new, old = (list(maps(shapes, 2, seed, torch.float64).values()) for seed in (0, 1))
    correlations = correlation(new, old).numpy()
    assert correlations.shape == (2, 2, 2, 3, 2, 3)
    assert (correlations == 0).any()
    for n, block, h, w, u, v in np.ndindex(*correlations.shape):
        x, y = new[block][n, :, h, w].numpy(), old[block][n, :, u, v].numpy()
        x, y = x / (np.linalg.norm(x) + 1e-5), y / (np.linalg.norm(y) + 1e-5)
        expected = max(0.0, sum(a * b for a, b in zip(x, y, strict=True)))
        np.testing.assert_allclose(correlations[n, block, h, w, u, v], expected, rtol=1e-12)


@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 1, 4), (3, 2, 7), (5, 4, 9)])
def test_a_center_pivot_convolution_is_a_dense_one_without_its_off_pivot_weights(
    kernel, stride, side
):
    torch.manual_seed(0)
    pivot = CenterPivot4d(2, 3, kernel, stride).double()
    x = torch.randn(2, 2, 3, 4, side, side, dtype=torch.float64)
    convolved = pivot(x)
    half = kernel // 2
    dense = torch.zeros(3, 2, *[kernel] * 4, dtype=torch.float64)
    dense[:, :, :, :, half, half] += pivot.new.weight.detach()
    dense[:, :, half, half] += pivot.old.weight.detach()
    padded = functional.pad(x, [half] * 8)
    assert convolved.shape[4] == -(-side // stride)
    for h, w, u, v in np.ndindex(*convolved.shape[2:]):
        part = padded[:, :, h : h + kernel, w : w + kernel]
        part = part[..., u * stride : u * stride + kernel, v * stride : v * stride + kernel]
        expected = torch.einsum("ncabde,ocabde->no", part, dense)
        expected = expected + pivot.new.bias + pivot.old.bias
        torch.testing.assert_close(convolved[:, :, h, w, u, v], expected)


def test_new_positions_are_enlarged_with_corners_on_corners():
    x = torch.tensor([[0.0, 2.0], [4.0, 6.0]]).view(1, 1, 2, 2, 1, 1).expand(1, 1, 2, 2, 2, 3)
    larger = enlarged(x, (3, 3))
    assert larger.shape == (1, 1, 3, 3, 2, 3)
    expected = torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [4.0, 5.0, 6.0]])
    for u, v in np.ndindex(2, 3):
        torch.testing.assert_close(larger[0, 0, :, :, u, v], expected)


@pytest.mark.parametrize(
    ("counts", "mix", "expected"),
    [
        ((4, 6, 3), "cascade", 2_314_336),
        ((2, 2, 2), "cascade", 2_309_248),
        ((4, 6, 3), "sum", 1_428_064),
    ],
)
def test_the_4d_part_has_as_many_numbers_as_were_counted(counts, mix, expected):
    has = HAS(groups(counts), mix)
    parts = [*has.squeezes.parameters(), *has.mixers.parameters()]
    assert sum(p.numel() for p in parts) == expected


@pytest.mark.parametrize("mix", ["cascade", "sum"])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_shapes_are_those_of_the_paper(mix, last_stride):
    shapes = groups((1, 2, 1))
    has = HAS(shapes, mix, last_stride=last_stride)
    seen = []
    for squeeze in has.squeezes:
        squeeze.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    new, old = (maps(shapes, 2, seed) for seed in (0, 1))
    with torch.no_grad():
        assert has.agreement(new, old).shape == (2, 128, 28, 28)
        h = has(new, old)
    left = 3 - last_stride
    assert seen[:3] == [(2, 128, s, s, left, left) for s in (7, 14, 28)]
    assert {name: tuple(x.shape) for name, x in h.items()} == {
        name: (2, shape[0]) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("mix", ["cascade", "sum"])
def test_frames_in_parts_give_equal_numbers_and_gradients(mix):
    shapes = groups((1, 1, 1), sizes=(12, 6, 3))
    new, old = (maps(shapes, 5, seed, torch.float64) for seed in (0, 1))
    results = []
    for frames in (None, 2, 1):
        torch.manual_seed(0)
        has = HAS(shapes, mix, frames=frames).double()
        inputs = {name: x.clone().requires_grad_() for name, x in new.items()}
        h = has(inputs, old)
        loss = sum((x * torch.linspace(0, 1, x.numel()).view_as(x)).sum() for x in h.values())
        loss.backward()
        grads = [p.grad for p in has.parameters()] + [x.grad for x in inputs.values()]
        results.append([loss.detach(), *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("h", ["bounded", "softmax"])
def test_importances_are_one_on_average_and_bounded(h):
    shapes = groups((1, 1, 1), sizes=(12, 6, 3))
    torch.manual_seed(0)
    has = HAS(shapes, h=h)
    for p in has.parameters():  # far from the start
        p.data.mul_(3)
    with torch.no_grad():
        importances = has(maps(shapes, 4, 0), maps(shapes, 4, 1))
    for x in importances.values():
        torch.testing.assert_close(x.mean(dim=1), torch.ones(4))
        assert (x > 0).all()
        assert h == "softmax" or (x.amax(dim=1) / x.amin(dim=1) <= 3).all()
    assert any(x.std() > 1e-3 for x in importances.values())


def test_drift_is_the_weighted_distance_of_unit_maps():
    shapes = {"a": (3, 2, 2), "b": (2, 4, 4)}
    new, old = (maps(shapes, 3, seed, torch.float64) for seed in (0, 1))
    h = {name: torch.rand(3, shape[0], dtype=torch.float64) for name, shape in shapes.items()}
    expected = 0.0
    for name, (width, height, _) in shapes.items():
        total = 0.0
        for n in range(3):
            x, y = (m[name][n].numpy() / np.linalg.norm(m[name][n].numpy()) for m in (new, old))
            for c in range(width):
                moved = sum((x[c, i, j] - y[c, i, j]) ** 2 for i, j in np.ndindex(height, height))
                total += float(h[name][n, c]) * moved
        expected += total / (3 * width)
    np.testing.assert_allclose(float(drift(h, new, old)), expected, rtol=1e-12)
    assert float(drift(h, new, new)) == 0


def test_spreads_add_up_and_a_common_scale_of_importances_changes_nothing():
    rng = np.random.default_rng(0)
    old_NW, new_NW = 1 + 0.1 * rng.normal(size=(7, 5)), 1 + 0.3 * rng.normal(size=(40, 5))
    ratios = []
    for scale in (1.0, 20.0):
        spreads = []
        for x in (old_NW, new_NW):
            spread = crm.Spread()
            for part in np.array_split(scale * x, 3):
                spread.add(torch.from_numpy(part))
            by_hand = sum(((row - x.mean(axis=0)) ** 2).sum() for row in x)
            np.testing.assert_allclose(spread.value, scale**2 * by_hand, rtol=1e-9)
            spreads.append(spread)
        ratios.append(crm.ratios(*spreads))
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=1e-9)
    by_hand = np.log(
        ((old_NW - old_NW.mean(0)) ** 2).sum() / ((new_NW - new_NW.mean(0)) ** 2).sum()
    )
    np.testing.assert_allclose(ratios[0], (by_hand, 0), rtol=1e-9)


def test_ratios_stay_within_bounds():
    still, moving = crm.Spread(), crm.Spread()
    still.add(torch.ones(3, 2))
    moving.add(torch.tensor([[1e3, 0.0], [-1e3, 0.0]]))
    assert crm.ratios(still, moving) == (-5, 0)
    assert crm.ratios(moving, crm.Spread()) == (5, 0)
    assert crm.ratios(still, still) == (0, 0)


@pytest.mark.parametrize(
    "options", [{"mix": "stack"}, {"h": "free"}, {"last_stride": 3}, {"frames": 0}, {"frames": -1}]
)
def test_other_choices_are_refused(options):
    with pytest.raises(ValueError, match="choose mix"):
        HAS(groups((1, 1, 1)), **options)
    with pytest.raises(ValueError, match="HAS of no block"):
        HAS({})


@pytest.mark.parametrize("mix", ["cascade", "sum"])
def test_maps_of_spectrograms_end_at_a_single_teacher_position(mix):
    """8 x 13, 4 x 7 and 2 x 4 do not halve alike."""
    shapes = {f"{n}": (8, h, w) for n, (h, w) in enumerate([(8, 13), (4, 7), (2, 4)])}
    has = HAS(shapes, mix=mix, last_stride=1)
    new, old = (maps(shapes, 2, seed) for seed in (1, 2))
    assert {h.shape for h in has(new, old).values()} == {(2, 8)}


def test_teacher_positions_are_averaged():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, 2, 2, 4, 2)))
    averaged = pooled(x, (2, 1))
    expected = x.reshape(1, 2, 2, 2, 2, 2, 2).mean(dim=(5, 6))[..., None]
    torch.testing.assert_close(averaged, expected)
    assert pooled(x, (4, 2)) is x


def test_ratios_of_a_batch_are_those_of_the_sums_and_have_gradients():
    rng = np.random.default_rng(0)
    h = torch.from_numpy(rng.normal(size=(7, 5))).requires_grad_()
    old, new = h[:3], h[3:]
    sides = h.detach().numpy()[:3], h.detach().numpy()[3:]
    spreads = [((x - x.mean(axis=0)) ** 2).sum() for x in sides]
    ratio = crm.difference(old, new)
    np.testing.assert_allclose(ratio.detach(), np.log(spreads[0] / spreads[1]))
    (gradient,) = torch.autograd.grad(ratio, h)
    assert gradient.abs().sum(dim=1).min() > 0
    assert crm.difference(old[:1], new) == crm.difference(old, new[:0]) == 0


def test_effective_channels_are_one_where_all_count_alike_and_one_in_c_where_one_does():
    assert effective(torch.full((3, 8), 1.0)) == pytest.approx(1)
    assert effective(torch.eye(8)[:3] * 8) == pytest.approx(1 / 8)
    p = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(p * np.log(p)).sum()) / 3
    assert effective(torch.tensor([[1.5, 0.75, 0.75]])) == pytest.approx(expected)


def test_the_finest_maps_may_be_those_of_layer_1():
    """Four groups: the importance of each depends on the maps of layer 1."""
    shapes = groups((1, 1, 1, 1), (6, 8, 12, 16), (24, 12, 6, 3))
    has = HAS(shapes)
    new, old = maps(shapes, 2, 0), maps(shapes, 2, 1)
    finest = next(iter(new))
    new[finest].requires_grad_()
    importances = has(new, old)
    assert {name: tuple(h.shape) for name, h in importances.items()} == {
        name: (2, shape[0]) for name, shape in shapes.items()
    }
    for h in importances.values():
        (gradient,) = torch.autograd.grad(h.square().sum(), new[finest], retain_graph=True)
        assert gradient.abs().max() > 0
