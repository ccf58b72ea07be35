"""Each graft against its equations by loops in float64, and against the frozen stage at its start.

Shapes: B clips of T frames, L tokens, C channels, H x W a grid, K classes, F classifier width.
"""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.heads.grafts.adapter import Adapter
from varve.heads.grafts.class_regularization import ClassRegularization
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.grafts.temporal_shift import Shift, TemporalShift
from varve.pipeline import backbones

BN_INCEPTION = (256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024)
PRECISIONS = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def load():
    return cache(lambda name, precision: backbones.load(f"{name}:random-0", precision))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def stirred(graft, seed=1):
    """The graft in float64, its own parameters drawn anew."""
    graft = graft.double()
    child_parameters = {id(p) for part in graft.children() for p in part.parameters()}
    with torch.no_grad():
        for i, parameter in enumerate(
            p for p in graft.parameters() if id(p) not in child_parameters
        ):
            parameter.copy_(torch.from_numpy(draw(*parameter.shape, seed=seed + i)))
    return graft


def linear(classes, width, seed=0):
    layer = nn.utils.skip_init(nn.Linear, width, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draw(classes, width, seed=seed)))
        layer.bias.zero_()
    return layer


def close(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


# At the start


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    ("network", "name", "make"),
    [
        ("ViT-S-32", "blocks.2.mlp", lambda m: Adapter(m, 384)),
        ("ViT-S-32", "blocks.2.mlp", lambda m: Adapter(m, 384, form="sequential")),
        ("ViT-S-32", "blocks.2.mlp", lambda m: HFGate(m, 384, 2, prefix=1)),
        ("ViT-S-32", "blocks.2.mlp", lambda m: HFGate(m, 384, 2, False, prefix=1)),
        ("ViT-S-32", "blocks.2.mlp", lambda m: regularized(m, 384, prefix=1)),
        ("resnet18", "layer2.0", lambda m: TemporalShift(m, 2, fold=0)),
        ("resnet18", "layer2.0", lambda m: HFGate(m, 128, 2)),
        ("resnet18", "layer2.0", lambda m: HFGate(m, 128, 2, conservative=False)),
        ("resnet18", "layer2.0", lambda m: regularized(m, 128)),
    ],
)
def test_at_its_start_a_graft_is_the_frozen_stage_bit_for_bit(load, network, name, make, precision):
    backbone = load(network, precision)
    before = backbone.stage_names[backbone.stage_names.index(name) - 1]
    pictures = np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), np.uint8)
    with torch.inference_mode():
        x = backbone.run(torch.from_numpy(pictures), [before])[before]
        stage = backbone.stage(name).module
        expected, grafted = stage(x), make(stage)(x)
    assert torch.equal(grafted, expected)
    assert (grafted.dtype, grafted.stride()) == (precision, expected.stride())
    if network == "resnet18":
        assert grafted.is_contiguous(memory_format=torch.channels_last)


def regularized(module, channels, prefix=0):
    return ClassRegularization(module, linear(5, 12), channels, 2, strength=0.0, prefix=prefix)


def test_at_its_start_an_adapter_can_move_from_the_identity():
    graft = Adapter(nn.Identity(), width=8, bottleneck=4)
    graft(torch.from_numpy(draw(2, 3, 8)).float()).square().sum().backward()
    assert graft.up.grad.abs().sum() > 0


def test_at_its_start_a_gate_can_move_from_the_identity():
    graft = HFGate(nn.Identity(), channels=4, frames=2)
    graft(torch.from_numpy(draw(2, 4, 3, 3)).float()).square().sum().backward()
    assert graft.weight.grad.abs().sum() > 0
    assert graft.bias.grad.abs().sum() > 0


# Adapter


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_an_adapter_adds_its_bottleneck_to_each_token(form):
    inner = nn.Linear(6, 6).double()
    graft = stirred(Adapter(inner, width=6, bottleneck=4, scale=0.3, form=form))
    x = draw(3, 5, 6)
    down, up = graft.down.detach().numpy(), graft.up.detach().numpy()
    expected = np.zeros_like(x)
    for n in range(3):
        for token in range(5):
            out = inner.weight.detach().numpy() @ x[n, token] + inner.bias.detach().numpy()
            read = x[n, token] if form == "parallel" else out
            expected[n, token] = out + 0.3 * np.maximum(read @ down, 0) @ up
    close(graft(torch.from_numpy(x)), expected)
    close(graft(torch.from_numpy(x[:, :1])), expected[:, :1])
    close(graft(torch.from_numpy(x[:, 0])), expected[:, 0])


def test_freezing_changes_no_bit_of_an_adapter_on_some_of_the_tokens():
    graft = Adapter(nn.Identity(), width=384)
    graft.up.data.copy_(torch.from_numpy(draw(64, 384)))
    some = torch.from_numpy(draw(8, 7, 384)).float()[:, :2]
    learning = graft(some)
    assert torch.equal(graft.requires_grad_(False)(some), learning)


def test_twelve_adapters_of_a_vit_b_have_the_papers_parameters():
    grafts = nn.ModuleList(Adapter(nn.Identity(), width=768) for _ in range(12))
    assert sum(p.numel() for p in grafts.parameters()) == 1_179_648


def test_an_adapter_starts_as_adaptformers():
    graft = Adapter(nn.Identity(), width=768, seed=3)
    assert graft.down.shape == (768, 64)
    bound = 768**-0.5
    assert 0.99 * bound < graft.down.abs().max() <= bound
    assert abs(graft.down.std() - bound / 3**0.5) < 0.01 * bound
    assert not graft.up.any()


def test_an_adapter_is_token_wise_where_its_inner_module_is():
    assert not Adapter(nn.Identity(), 4).token_wise
    vit = backbones.load("ViT-S-32:random-0")
    assert Adapter(vit.stage("blocks.11.mlp").module, 384).token_wise
    assert not Adapter(vit.stage("blocks.11.attn").module, 384).token_wise
    gated = Adapter(HFGate(nn.Identity(), 4, frames=5, prefix=1), 4)
    assert not gated.token_wise
    assert gated.frames == 5


def test_an_adapter_of_another_width_or_form_is_refused():
    with pytest.raises(ValueError, match=r"width 8 on a stage from \[2, 3, 6\] to \[2, 3, 6\]"):
        Adapter(nn.Identity(), 8)(torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match=r"from \[2, 3, 6\] to \[2, 3, 5\]"):
        Adapter(nn.Linear(6, 5), 6)(torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match="form='beside'; choose from parallel, sequential"):
        Adapter(nn.Identity(), 8, form="beside")


# Temporal shift


class Residual(nn.Module):
    """A block whose branch is conv1 alone: what conv1 saw can be read off its output."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.conv1.weight)

    def forward(self, x):
        return 1000 * x + self.conv1(x)


def shifted(x_BTCHW, fold):
    B, T, C = x_BTCHW.shape[:3]
    out = np.zeros_like(x_BTCHW)
    for b in range(B):
        for t in range(T):
            for c in range(C):
                source = t + 1 if c < C // fold else t - 1 if c < 2 * (C // fold) else t
                if 0 <= source < T:
                    out[b, t, c] = x_BTCHW[b, source, c]
    return out


@pytest.mark.parametrize(("channels", "fold"), [(16, 8), (19, 8), (8, 2), (9, 4)])
def test_a_shift_moves_the_first_folds_channels_and_only_before_conv1(channels, fold):
    x = draw(2, 4, channels, 3, 2)
    graft = TemporalShift(Residual(channels).double(), frames=4, fold=fold)
    outputs = graft(torch.from_numpy(x).flatten(0, 1))
    close(outputs, (1000 * x + shifted(x, fold)).reshape(8, channels, 3, 2))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stage", ["layer1.1", "layer2.0"])
def test_a_shifted_block_is_the_block_with_shifted_channels_in_its_branch(load, name, stage):
    """By torchvision's own modules, the branch written out; with and without downsampling."""
    block = copy.deepcopy(load(name, torch.float32).stage(stage).module).double()
    x = draw(2, 3, block.conv1.in_channels, 6, 6)
    out = torch.from_numpy(shifted(x, 8)).flatten(0, 1)
    x = torch.from_numpy(x).flatten(0, 1)
    out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(out)))))
    if hasattr(block, "conv3"):
        out = block.bn3(block.conv3(block.relu(out)))
    out = block.relu(out + (block.downsample(x) if block.downsample else x))
    with torch.inference_mode():
        close(TemporalShift(block, frames=3)(x), out.numpy())


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_shift_keeps_the_memory_format_of_its_input(form):
    x = torch.ones(4, 8, 3, 5).contiguous(memory_format=form)
    assert Shift(nn.Identity(), frames=2, fold=4)(x).is_contiguous(memory_format=form)


def test_a_shift_of_a_single_frame_leaves_zeros():
    x = torch.ones(2, 8, 1, 1)
    outputs = Shift(nn.Identity(), frames=1, fold=4)(x)
    assert outputs.flatten(1).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_a_shift_on_what_has_no_conv1_is_refused():
    with pytest.raises(ValueError, match=r"Linear .no parts., which has no convolution conv1"):
        TemporalShift(nn.Linear(3, 3), frames=2)
    with pytest.raises(ValueError, match=r"TemporalShift .inner., .*the first graft"):
        TemporalShift(TemporalShift(Residual(8), frames=2), frames=2)
    for fold in (1, -8, 9):
        with pytest.raises(ValueError, match=f"fold={fold} of 8 channels: give 0 for no shift"):
            TemporalShift(Residual(8), frames=2, fold=fold)


def test_grafts_on_one_stage_read_the_same_clips():
    gated = HFGate(TemporalShift(Residual(8), frames=4), channels=8, frames=4)
    assert gated(torch.zeros(8, 8, 2, 2)).shape == (8, 8, 2, 2)
    with pytest.raises(ValueError, match="frames=2 around a TemporalShift of 4 frames"):
        HFGate(TemporalShift(Residual(8), frames=4), channels=8, frames=2)


# HF gate


def gate(weight, bias, F):
    """Return tanh(Conv3d) of the pair [F, F-] by loops, [B, T, H, W]."""
    B, T, C, H, W = F.shape
    after = np.concatenate([F[:, 1:], np.zeros_like(F[:, :1])], axis=1)
    out = np.full((B, T, H, W), bias, dtype=np.float64)
    for d, frame in enumerate((F, after)):
        padded = np.pad(frame, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
        for c in range(C):
            for i in range(3):
                for j in range(3):
                    out += weight[c, d, i, j] * padded[:, :, c, i : i + H, j : j + W]
    return np.tanh(out)


def gated(graft, F):
    weight, bias = graft.weight.detach().numpy(), graft.bias.detach().numpy()
    toward, removed = (gate(weight[g], bias[g], F) for g in (0, -1))
    out = np.zeros_like(F)
    for t in range(F.shape[1]):
        if t + 1 < F.shape[1]:
            out[:, t] += toward[:, t, None] * F[:, t + 1]
        out[:, t] += (1 - (removed[:, t - 1, None] if t else 0)) * F[:, t]
    return out


@pytest.mark.parametrize("conservative", [True, False])
def test_a_gate_moves_features_by_its_equations(conservative):
    F = draw(2, 4, 3, 5, 6)
    graft = stirred(HFGate(nn.Identity(), 3, frames=4, conservative=conservative))
    assert len(graft.bias) == (1 if conservative else 2)
    close(graft(torch.from_numpy(F).flatten(0, 1)), gated(graft, F).reshape(8, 3, 5, 6))


def test_the_gate_equals_torchs_conv3d_over_the_pair():
    F = torch.from_numpy(draw(2, 4, 3, 5, 6))
    graft = stirred(HFGate(nn.Identity(), 3, frames=4))
    after = torch.cat([F[:, 1:], torch.zeros_like(F[:, :1])], dim=1)
    pairs = torch.stack([F, after], dim=3).flatten(0, 1)  # [B * T, C, 2, H, W]
    sums = nn.functional.conv3d(pairs, graft.weight, graft.bias, padding=(0, 1, 1))
    G = torch.tanh(sums).view(2, 4, 1, 5, 6)
    before = torch.cat([torch.zeros_like(G[:, :1]), G[:, :-1]], dim=1)
    close(graft(F.flatten(0, 1)), (G * after + (1 - before) * F).flatten(0, 1).detach().numpy())


@pytest.mark.parametrize("conservative", [True, False])
def test_only_a_conservative_gate_keeps_the_sum_over_the_frames(conservative):
    F = torch.from_numpy(draw(3, 8, 16, 7, 7))
    graft = stirred(HFGate(nn.Identity(), 16, frames=8, conservative=conservative))
    outputs = graft(F.flatten(0, 1)).view(F.shape)
    assert (outputs - F).abs().mean() > 0.3
    error = (outputs.sum(dim=1) - F.sum(dim=1)).abs().max()
    assert error < 1e-13 if conservative else error > 0.1


@pytest.mark.parametrize("conservative", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_on_tokens_patches_are_gated_as_a_grid_and_the_prefix_is_not(prefix, conservative):
    F = draw(2, 3, 4, 5, 5)
    first = draw(2, 3, prefix, 4, seed=9)
    tokens = np.concatenate([first, F.reshape(2, 3, 4, 25).swapaxes(2, 3)], axis=2)
    graft = stirred(HFGate(nn.Identity(), 4, 3, conservative, prefix))
    outputs = graft(torch.from_numpy(tokens).flatten(0, 1)).view(tokens.shape)
    close(outputs[:, :, prefix:].transpose(2, 3).reshape(F.shape), gated(graft, F))
    assert torch.equal(outputs[:, :, :prefix], torch.from_numpy(first))


@pytest.mark.parametrize(("conservative", "expected"), [(True, 119_242), (False, 238_484)])
def test_the_gates_of_bn_inception_have_the_papers_parameters(conservative, expected):
    gates = [HFGate(nn.Identity(), C, 16, conservative) for C in BN_INCEPTION]
    assert sum(p.numel() for gate in gates for p in gate.parameters()) == expected


@pytest.mark.parametrize(
    ("prefix", "shape"), [(1, (4, 6, 3, 3)), (0, (4, 10, 6)), (0, (4, 9, 5)), (0, (4, 6))]
)
def test_what_is_no_map_and_no_square_of_patches_is_not_gated(prefix, shape):
    with pytest.raises(ValueError, match="a gate of 6 channels"):
        HFGate(nn.Identity(), 6, frames=2, prefix=prefix)(torch.zeros(shape))


# Class regularization


def regularization(a, rows, strength):
    """Return the class of the factors and the new activations of a, [B, T, C, P positions]."""
    classes, out = [], np.zeros_like(a)
    for b in range(len(a)):
        pooled = a[b].mean(axis=(0, 2))
        scores = [sum(row[c] * pooled[c] for c in range(len(pooled))) for row in rows]
        best = int(np.argmax(scores))
        low, high = rows[best].min(), rows[best].max()
        for c in range(a.shape[2]):
            m = (rows[best][c] - low + 5e-7) / (high - low + 1e-6)
            out[b, :, c] = a[b, :, c] * (2 * strength * m + (1 - strength))
        classes.append(best)
    return classes, out


@pytest.fixture
def regularizer():
    def make(classes=7, prefix=0):
        classifier = linear(classes, 11).double()
        graft = ClassRegularization(nn.Identity(), classifier, 5, 3, strength=0.4, prefix=prefix)
        return stirred(graft)

    return make


def rows_of(graft):
    """W_i as the paper has it: a convolution over the classifier's weight."""
    weight, P = graft.classifier.weight.detach().numpy(), graft.projection.detach().numpy()
    return np.einsum("kf,cf->kc", weight, P)


def test_channels_are_scaled_by_the_row_of_the_predicted_class(regularizer):
    a = draw(6, 3, 5, 4, 2)
    graft = regularizer()
    classes, expected = regularization(a.reshape(6, 3, 5, 8), rows_of(graft), 0.4)
    assert len(set(classes)) > 2
    x = torch.from_numpy(a).flatten(0, 1)
    close(graft(x), expected.reshape(18, 5, 4, 2))
    assert graft.predict(x).tolist() == classes


class Halved(nn.Module):
    """A stage of a 3D network: it makes time steps [B * T / 2, C, H, W] of [B * T, C, H, W]."""

    mixes_time = True

    def __init__(self, frames):
        super().__init__()
        self.frames = frames

    def forward(self, x):
        return x.unflatten(0, (-1, self.frames))[:, ::2].flatten(0, 1)


@pytest.mark.parametrize("steps", [3, 6])
def test_of_3d_maps_the_mean_over_time_and_space_chooses_for_the_whole_clip(steps):
    """Maps [B, C, T', H, W] by sums in float64; a stage keeps the time steps or halves them."""
    classifier = linear(7, 11).double()
    inner = nn.Sequential(Halved(6)) if steps == 3 else nn.Identity()
    graft = stirred(ClassRegularization(inner, classifier, 5, steps, strength=0.4))
    assert graft.frames == 6
    x = torch.from_numpy(draw(12, 6, 5, 4, 2))
    a = x[:, :: 6 // steps].transpose(1, 2)  # [B, C, T', H, W]
    rows = torch.from_numpy(rows_of(graft))
    pooled = a.sum(dim=(2, 3, 4)) / (steps * 8)
    chosen = (pooled @ rows.T).argmax(dim=1)
    w = rows[chosen]
    low, high = w.min(dim=1, keepdim=True).values, w.max(dim=1, keepdim=True).values
    m = (w - low + 5e-7) / (high - low + 1e-6)
    expected = a * (2 * 0.4 * m + 0.6)[:, :, None, None, None]
    out = graft(x.flatten(0, 1)).unflatten(0, (12, steps)).transpose(1, 2)
    close(out, expected.numpy())
    assert graft.predict(x.flatten(0, 1)).tolist() == chosen.tolist()
    assert len(set(chosen.tolist())) > 1


def test_other_time_steps_than_the_stage_gives_are_refused():
    graft = ClassRegularization(Halved(6), linear(7, 11), 5, 6, strength=0.4)
    with pytest.raises(ValueError, match="give `frames` the time steps of the stage's output"):
        graft(torch.zeros(12, 5, 4, 2))


@pytest.mark.parametrize("prefix", [0, 1])
def test_on_tokens_the_patches_choose_and_every_token_is_scaled(regularizer, prefix):
    tokens = draw(6, 3, 9 + prefix, 5)
    tokens[:, :, :prefix] *= 100
    graft = regularizer(prefix=prefix)
    a = tokens.swapaxes(2, 3)
    _, expected = regularization(a[..., prefix:], rows_of(graft), 0.4)
    outputs = graft(torch.from_numpy(tokens).flatten(0, 1)).view(tokens.shape)
    close(outputs[:, :, prefix:], expected.swapaxes(2, 3))
    close((outputs / torch.from_numpy(tokens))[:, :, 0], (expected / a[..., prefix:])[..., 0])


def test_factors_lie_between_one_less_and_one_more_than_the_strength(regularizer):
    graft, x = regularizer(), torch.from_numpy(draw(9, 5, 4, 4))
    factors = (graft(x) / x)[:, :, 0, 0]
    np.testing.assert_allclose(factors.amin(dim=1).detach(), 0.6, atol=1e-6)
    np.testing.assert_allclose(factors.amax(dim=1).detach(), 1.4, atol=1e-6)


def test_excitations_are_the_scaled_rows_of_every_class(regularizer):
    graft = regularizer()
    rows = rows_of(graft)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    close(graft.excitations(), (rows - low + 5e-7) / (high - low + 1e-6))
    assert not graft.excitations().requires_grad
    x = torch.from_numpy(draw(6, 5, 4, 4))
    factors = 0.8 * graft.excitations()[graft.predict(x)] + 0.6
    close((graft(x) / x)[::3, :, 0, 0], factors.numpy())


def test_classes_that_arrive_count_at_the_next_forward(regularizer):
    graft = regularizer(classes=2)
    x = torch.from_numpy(draw(30, 5, 2, 2))
    assert set(graft.predict(x).tolist()) == {0, 1}
    more = torch.from_numpy(draw(40, 11, seed=4))
    graft.classifier.weight = nn.Parameter(torch.cat([graft.classifier.weight.detach(), more]))
    assert graft.excitations().shape == (42, 5)
    assert max(graft.predict(x).tolist()) > 1
    graft.classifier.weight = nn.Parameter(more[:0])
    assert torch.equal(graft(x), x)


def test_of_vectors_by_cosines_what_the_classes_do_not_share_decides():
    theta = draw(7, 4, 11) + 3
    classifier = nn.Module()
    classifier.weight = nn.Parameter(torch.from_numpy(theta))
    graft = stirred(ClassRegularization(nn.Identity(), classifier, 5, 3, strength=0.4))
    unit = theta / np.linalg.norm(theta, axis=2, keepdims=True)
    means = unit.sum(axis=1) / 4
    P = graft.projection.detach().numpy()
    rows = (means - means.sum(axis=0) / 7) @ P.T
    a = draw(6, 3, 5, 4, 2)
    classes, expected = regularization(a.reshape(6, 3, 5, 8), rows, 0.4)
    x = torch.from_numpy(a).flatten(0, 1)
    close(graft(x), expected.reshape(18, 5, 4, 2))
    assert graft.predict(x).tolist() == classes
    assert len(set(classes)) > 2


@pytest.mark.parametrize(("width", "alike"), [(5, True), (5, False), (11, False)])
def test_an_aligned_projection_predicts_what_the_classifier_would(width, alike):
    """Against numpy's least squares, whose last rows are the ridge, towards the identity if any."""
    classifier = nn.Module()
    classifier.weight = nn.Parameter(torch.from_numpy(draw(7, width)))
    graft = ClassRegularization(nn.Identity(), classifier, 5, 3, strength=0.4).double()
    x = draw(40, 3, 5, 4, 2) + 1
    means = x.mean(axis=(1, 3, 4))
    vectors = means @ draw(5, width, seed=2) + 0.02 * draw(40, width, seed=3)
    x = torch.from_numpy(x).flatten(0, 1)
    close(graft.means(x), means)
    graft.align(graft.means(x), torch.from_numpy(vectors), alike)
    ridge = 0.001 * (means**2).sum(axis=0).mean()
    start = np.eye(5) if alike else np.zeros((5, width))
    design = np.concatenate([means, ridge**0.5 * np.eye(5)])
    P, *_ = np.linalg.lstsq(design, np.concatenate([vectors, ridge**0.5 * start]))
    close(graft.projection, P)
    logits = vectors @ classifier.weight.detach().numpy().T
    assert np.mean(graft.predict(x).numpy() == logits.argmax(axis=1)) > 0.9


def test_clips_of_zeros_do_not_move_an_aligned_projection():
    graft = ClassRegularization(nn.Identity(), linear(3, 5), 5, 2, strength=0.4)
    graft.align(torch.zeros(4, 5), torch.zeros(4, 5), alike=True)
    close(graft.projection, np.eye(5))


@pytest.mark.parametrize("shape", [(4, 11), (1, 3, 11)])
def test_rows_that_prefer_no_channel_are_the_identity(shape):
    """Those of a linear classifier that has not learned, and what one class does not share."""
    classifier = nn.Module()
    weight = np.zeros(shape) if len(shape) == 2 else draw(*shape)
    classifier.weight = nn.Parameter(torch.from_numpy(weight))
    graft = stirred(ClassRegularization(nn.Identity(), classifier, 5, 3, strength=0.4))
    x = torch.from_numpy(draw(6, 5, 4, 4))
    torch.testing.assert_close(graft(x), x)


def test_one_classifier_serves_four_blocks_and_learns_from_none():
    classifier = linear(3, 6)
    blocks = nn.Sequential(
        *(
            ClassRegularization(nn.Conv2d(4, 4, 1), classifier, 4, 2, strength, seed=i)
            for i, strength in enumerate((0.1, 0.2, 0.3, 0.4))
        )
    )
    assert all(block.classifier is classifier for block in blocks)
    blocks(torch.from_numpy(draw(4, 4, 3, 3)).float()).sum().backward()
    assert classifier.weight.grad is None
    assert all(block.projection.grad.abs().sum() > 0 for block in blocks)
    twins = copy.deepcopy(blocks)
    assert len({id(block.classifier) for block in twins}) == 1
    classifier.eval()
    blocks.train()
    assert not classifier.training


def test_a_class_regularization_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="a classifier ReLU without a weight"):
        ClassRegularization(nn.Identity(), nn.ReLU(), 4, 2, 0.1)
    with pytest.raises(ValueError, match=r"strength=1\.5: give a number"):
        ClassRegularization(nn.Identity(), linear(3, 6), 4, 2, 1.5)
    graft = ClassRegularization(nn.Identity(), linear(3, 6), 4, 2, 0.1)
    for shape in ((2, 5, 3, 3), (2, 9, 5), (2, 4)):
        with pytest.raises(ValueError, match="class regularization of 4 channels"):
            graft(torch.zeros(shape))


def test_a_block_that_is_constructed_apart_from_its_classifier_reads_it():
    """A network is built on the CPU, when the classifier that it is to look at may be on a GPU."""
    with FakeTensorMode():
        classifier = nn.Linear(6, 3, device="cuda")
        graft = ClassRegularization(nn.Conv2d(4, 4, 1), classifier, 4, 2, 0.1)
        assert graft(torch.zeros(2, 4, 3, 3)).device.type == "cpu"
