"""Tests that every graft must pass; `heads/grafts/__init__.py` is the contract.

Each graft replaces a real stage. Its parameters are moved from their initial values: at those most
grafts are the identity, which would hide a wrong step.
"""

import copy
import inspect
import json
import pickle
import re
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.contracts.options import names
from varve.heads.grafts import fill_options
from varve.pipeline import backbones
from varve.pipeline.registry import variant

T = 3
STAGES = {"tokens": ("ViT-S-32", "blocks.1.mlp"), "map": ("resnet18", "layer2.0")}
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def builder(name):
    """Return `build(inner, **options)` of a graft: a file's `build`, or the registered class."""
    graft = variant("grafts", name)
    return getattr(graft, "build", graft)


def pytest_generate_tests(metafunc):
    cases = [
        (name, form)
        for name in names(metafunc.config, "grafts")
        for form in getattr(builder(name), "forms", tuple(STAGES))
    ]
    metafunc.parametrize("case", cases, ids="-".join)


@pytest.fixture(scope="module")
def stage():
    """A frozen stage with batch norms that do something, by form and precision."""

    def drawn(form, precision):
        network, name = STAGES[form]
        loaded = backbones.load(f"{network}:random-0", precision).stage(name)
        generator = torch.Generator().manual_seed(0)
        for norm in loaded.module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                # Drawn in float32, so that every precision rounds the same numbers.
                noise = torch.randn(len(norm.running_mean), generator=generator)
                norm.running_mean.copy_(noise)
                norm.running_var.copy_(noise.sigmoid() + 0.5)
        return loaded

    @cache
    def load(form, precision):
        # A test may ask first inside inference mode, whose tensors another could not train with.
        with torch.inference_mode(False):
            return drawn(form, precision)

    return lambda form, precision=torch.float32: load(form, precision)


@pytest.fixture
def form(case):
    return case[1]


@pytest.fixture
def make(case, stage):
    """Return what builds the graft around the stage, with the options that a head fills."""
    name, form = case
    build = builder(name)

    def make(precision=torch.float32, inner=None, stir=True, **changes):
        frozen = stage(form, precision)
        width = 384 if form == "tokens" else 128
        generator = torch.Generator().manual_seed(5)
        classifier = torch.nn.Linear(20, 6, device="meta").to_empty(device="cpu")
        for parameter in classifier.parameters():
            parameter.detach().normal_(generator=generator)
        known = {
            "width": width,
            "channels": width,
            "frames": T,
            "prefix": frozen.prefix,
            "classifier": classifier,
        }
        options = fill_options(build, known, {}) | changes
        graft = build(frozen.module if inner is None else inner, **options)
        if stir:
            for parameter in own(graft):
                noise = torch.randn(parameter.shape, generator=generator)
                inputs = parameter[0].numel() if parameter.ndim else 1
                parameter.data += noise * inputs**-0.5
        return graft

    return make


def own(graft):
    """Return the parameters that are neither the stage's nor the classifier's."""
    parts = (getattr(graft, name, None) for name in ("inner", "classifier"))
    others = {id(p) for part in parts if part is not None for p in part.parameters()}
    return [p for p in graft.parameters() if id(p) not in others]


def inputs(form, clips, precision=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = {"tokens": (clips * T, 17, 384), "map": (clips * T, 64, 12, 12)}[form]
    x = torch.randn(shape, generator=generator).to(precision)
    return x.relu().contiguous(memory_format=torch.channels_last) if form == "map" else x


def tensors(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def modes(module):
    return {name: part.training for name, part in module.named_modules()}


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_output_has_the_stages_shape_type_and_memory_format(make, form, stage, precision):
    graft, x = make(precision), inputs(form, 2, precision)
    before = x.clone()
    with torch.inference_mode():
        expected, output = stage(form, precision).module(x), graft(x)
    assert (output.shape, output.dtype, output.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    assert output.dtype == precision
    assert not torch.equal(output, expected)
    assert output.isfinite().all()
    assert torch.equal(x, before)
    assert all(p.dtype == torch.float32 for p in own(graft))


def test_low_precision_is_near_the_full_one(make, form):
    """Only input and output are rounded, as the stage's are: parameters are float32."""
    x = inputs(form, 2)
    with torch.inference_mode():
        full, low = make()(x), make(torch.bfloat16)(x.bfloat16()).float()
    assert torch.cosine_similarity(full.flatten(1), low.flatten(1)).min() > 0.999


def test_a_clip_is_the_same_whatever_clips_lie_beside_it(make, form):
    graft, x = make(), inputs(form, 3)
    with torch.inference_mode():
        whole = graft(x)
        for clip in range(3):
            rows = slice(clip * T, (clip + 1) * T)
            torch.testing.assert_close(graft(x[rows]), whole[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS[:2], ids=str)
def test_the_bits_of_a_clip_depend_on_nothing_else_in_its_batch(make, form, precision):
    """Batches of one size are compared, since features are computed in these."""
    graft, x = make(precision), inputs(form, 5, precision)
    with torch.inference_mode():
        whole = graft(x)
        assert torch.equal(graft(x.roll(2 * T, 0)), whole.roll(2 * T, 0))
        alone = torch.zeros_like(x)
        alone[-T:] = x[:T]
        assert torch.equal(graft(alone)[-T:], whole[:T])


def test_frames_says_whether_frames_look_at_each_other(make, form):
    """The middle frame of every clip is changed; the outputs of the others show it, or do not."""
    graft, x, changed = make(), inputs(form, 4), inputs(form, 4)
    graft_frames = getattr(graft, "frames", 0)
    assert graft_frames in (0, T)
    changed[1::T] *= -30  # enough to make them clips of another class
    with torch.inference_mode():
        first, second = graft(x), graft(changed)
        for t in (0, 2):
            alike = torch.allclose(first[t::T], second[t::T], rtol=1e-4, atol=1e-5)
            assert alike == (graft_frames == 0)
        if not graft_frames:
            torch.testing.assert_close(graft(x[:1]), first[:1], rtol=1e-4, atol=1e-5)


def test_a_batch_that_is_no_whole_number_of_clips_is_refused(make, form):
    graft = make()
    if not getattr(graft, "frames", 0):
        graft(inputs(form, 2)[:4])
        return
    with pytest.raises(ValueError, match="4 frames are no whole number of clips of 3"):
        graft(inputs(form, 2)[:4])


def test_token_wise_says_whether_tokens_look_at_each_other(make, form):
    graft, x = make(), inputs(form, 1)
    if form != "tokens":
        assert not getattr(graft, "token_wise", False)
        return
    changed = x.clone()
    changed[:, 1:8] += 1
    with torch.inference_mode():
        alike = torch.allclose(graft(changed)[:, 8:], graft(x)[:, 8:], rtol=1e-4, atol=1e-5)
        # A graft that does not declare it counts as mixing tokens, which is always safe.
        token_wise = getattr(graft, "token_wise", None)
        assert token_wise in (None, alike)
        if token_wise:
            torch.testing.assert_close(graft(x[:, :1]), graft(x)[:, :1], rtol=1e-4, atol=1e-5)


def test_gradients_reach_its_own_parameters_and_no_others(make, form):
    graft, x = make(), inputs(form, 2).requires_grad_()
    graft.train()
    graft(x).square().mean().backward()
    assert x.grad.abs().sum() > 0
    own_ids = {id(parameter) for parameter in own(graft)}
    for name, parameter in graft.named_parameters():
        if id(parameter) in own_ids:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradients_change_no_bit(make, form, stage):
    graft, x = make(inner=copy.deepcopy(stage(form).module)), inputs(form, 1)
    learning = graft.requires_grad_(True)(x.clone().requires_grad_())
    with torch.inference_mode():
        assert torch.equal(graft.requires_grad_(False)(x), learning)


def test_the_stage_it_stands_for_stays_as_it_was(make, form, stage):
    inner = stage(form).module
    parts, values, before = dict(inner.named_modules()), tensors(inner), modes(inner)
    ids = {name: id(parameter) for name, parameter in inner.named_parameters()}
    x = inputs(form, 2)
    with torch.inference_mode():
        expected = inner(x)
    graft = make()
    frozen = {id(p) for p in graft.parameters() if not p.requires_grad}
    assert set(ids.values()) <= frozen
    for mode in (True, False, True):
        assert graft.train(mode) is graft
        assert graft.training is mode
        graft(x).mean()
    assert modes(inner) == before
    assert not inner.training
    assert dict(inner.named_modules()) == parts
    assert {name: id(parameter) for name, parameter in inner.named_parameters()} == ids
    assert all(torch.equal(tensor, values[name]) for name, tensor in tensors(inner).items())
    with torch.inference_mode():
        assert torch.equal(inner(x), expected)


def test_training_mode_alone_changes_no_bit(make, form):
    graft, x = make(), inputs(form, 2)
    with torch.inference_mode():
        assert torch.equal(graft.train()(x), graft.eval()(x))


def test_an_inner_that_may_train_takes_the_mode(make, form, stage):
    inner = copy.deepcopy(stage(form).module).requires_grad_(True)
    graft = make(inner=inner)
    graft.train()
    assert all(part.training for part in inner.modules())
    graft.eval()
    assert not any(part.training for part in inner.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_gives_the_same_and_shares_nothing(make, form, copied):
    graft, x = make(), inputs(form, 2)
    with torch.inference_mode():
        expected = graft(x)
        other = copied(graft)
        assert torch.equal(other(x), expected)
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert torch.equal(graft(x), expected)
        assert not torch.equal(other(x), expected)


def test_a_state_dict_carries_all_that_training_changes(make, form):
    graft, fresh, x = make(), make(stir=False), inputs(form, 2)
    fresh.load_state_dict(graft.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh(x), graft(x))


def test_what_is_drawn_is_drawn_from_the_seed_alone(make, case):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = make(stir=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = make(stir=False)
    assert all(map(torch.equal, own(first), own(second)))
    seeded = "seed" in inspect.signature(type(first)).parameters
    if seeded and any(p.abs().sum() > 0 for p in own(first)):
        assert not all(map(torch.equal, own(first), own(make(stir=False, seed=1))))


def test_shapes_pass_through_without_being_computed(make, form, stage):
    graft, x = make(), inputs(form, 2)
    with torch.inference_mode():
        expected = tuple(stage(form).module(x).shape)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert tuple(graft(torch.zeros(x.shape)).shape) == expected


def test_its_public_attributes_can_be_a_key(make):
    graft = make()
    # Varve's own are named by a version; a custom graft may be, and else is by its source.
    default = None if type(graft).__module__.startswith("varve.") else "source/0"
    assert re.fullmatch(r"[a-z_]+/\d+", vars(type(graft)).get("code", default))
    named = {k: v for k, v in vars(graft).items() if not k.startswith("_") and k != "training"}
    assert json.loads(json.dumps(named)) == named
    # Every option but those seen in the parameters is there, under its own name.
    options = set(inspect.signature(type(graft)).parameters) - {"inner", "classifier", "seed"}
    assert options <= set(named)


def test_an_unknown_option_is_refused(make):
    with pytest.raises(TypeError, match="unheard_of"):
        make(unheard_of=1)


def test_frames_must_be_a_count_and_the_same_as_the_inners(make):
    graft = make()
    if "frames" not in inspect.signature(type(graft)).parameters:
        return
    with pytest.raises(ValueError, match="frames=0: give T"):
        make(frames=0)


def test_a_form_that_it_does_not_declare_is_refused(case, make, stage):
    build, forms = builder(case[0]), getattr(builder(case[0]), "forms", tuple(STAGES))
    assert forms
    assert set(forms) <= set(STAGES)
    for other in set(STAGES) - set(forms):
        frozen = stage(other).module
        known = {"width": 384, "channels": 384, "frames": T}
        with pytest.raises(ValueError, match="it stands for"):
            build(frozen, **fill_options(build, known, {}))(inputs(other, 1))
