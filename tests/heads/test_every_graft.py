"""What heads/grafts/__init__.py promises, run over whatever grafts the folder holds.

Each stands for a real stage, with its own parameters away from where they start: at the start most
grafts are the identity, behind which a wrong step would hide.
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

from varve.pipeline import backbones
from varve.pipeline.registry import available, variant

T = 3
STAGES = {"tokens": ("ViT-S-32", "blocks.1.mlp"), "map": ("resnet18", "layer2.0")}
FORMS = {
    "adapter": ["tokens"],
    "temporal_shift": ["map"],
    "hf_gate": ["tokens", "map"],
    "class_regularization": ["tokens", "map"],
}
GRAFTS = available("grafts")
CASES = [(name, form) for name in GRAFTS for form in FORMS.get(name, ["tokens", "map"])]
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def stage():
    """A frozen stage with batch norms that do something, by form and precision."""

    @cache
    def load(form, precision):
        network, name = STAGES[form]
        found = backbones.load(f"{network}:random-0", precision).stage(name)
        generator = torch.Generator().manual_seed(0)
        for norm in found.module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                # Drawn in float32, so that every precision rounds the same numbers.
                noise = torch.randn(len(norm.running_mean), generator=generator)
                norm.running_mean.copy_(noise)
                norm.running_var.copy_(noise.sigmoid() + 0.5)
        return found

    return lambda form, precision=torch.float32: load(form, precision)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    return request.param


@pytest.fixture
def form(case):
    return case[1]


@pytest.fixture
def make(case, stage):
    """Builds the graft over the stage; its options come from what their names ask for."""
    name, form = case

    def make(precision=torch.float32, inner=None, stir=True, **changes):
        frozen = stage(form, precision)
        width = 384 if form == "tokens" else 128
        generator = torch.Generator().manual_seed(5)
        classifier = torch.nn.Linear(20, 6, device="meta").to_empty(device="cpu")
        for parameter in classifier.parameters():
            parameter.detach().normal_(generator=generator)
        fitting = {
            "width": width,
            "channels": width,
            "frames": T,
            "prefix": frozen.prefix,
            "classifier": classifier,
            "strength": 0.3,
        }
        build = variant("grafts", name).build
        options = inspect.signature(build).parameters
        given = {key: value for key, value in fitting.items() if key in options} | changes
        graft = build(frozen.module if inner is None else inner, **given)
        if stir:
            for parameter in own(graft):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += noise * parameter[0].numel() ** -0.5
        return graft

    return make


def own(graft):
    held = {id(p) for part in graft.children() for p in part.parameters()}
    return [p for p in graft.parameters() if id(p) not in held]


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
        expected, found = stage(form, precision).module(x), graft(x)
    assert (found.shape, found.dtype, found.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    assert found.dtype == precision
    assert not torch.equal(found, expected)
    assert found.isfinite().all()
    assert torch.equal(x, before)
    assert all(p.dtype == torch.float32 for p in own(graft))


def test_low_precision_is_near_the_full_one(make, form):
    """Rounded as the stage is, in and out: the graft's own numbers are float32."""
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
    """In batches of one size, which is how features are made."""
    graft, x = make(precision), inputs(form, 5, precision)
    with torch.inference_mode():
        whole = graft(x)
        assert torch.equal(graft(x.roll(2 * T, 0)), whole.roll(2 * T, 0))
        alone = torch.zeros_like(x)
        alone[-T:] = x[:T]
        assert torch.equal(graft(alone)[-T:], whole[:T])


def test_frames_says_whether_frames_look_at_each_other(make, form):
    """Of every clip the middle frame is changed, and the first and last must not notice."""
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
        assert alike == graft.token_wise
        if graft.token_wise:
            torch.testing.assert_close(graft(x[:, :1]), graft(x)[:, :1], rtol=1e-4, atol=1e-5)


def test_gradients_reach_its_own_parameters_and_no_others(make, form):
    graft, x = make(), inputs(form, 2).requires_grad_()
    graft.train()
    graft(x).square().mean().backward()
    assert x.grad.abs().sum() > 0
    mine = {id(parameter) for parameter in own(graft)}
    for name, parameter in graft.named_parameters():
        if id(parameter) in mine:
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
    held = {name: id(parameter) for name, parameter in inner.named_parameters()}
    x = inputs(form, 2)
    with torch.inference_mode():
        expected = inner(x)
    graft = make()
    frozen = {id(p) for p in graft.parameters() if not p.requires_grad}
    assert set(held.values()) <= frozen
    for mode in (True, False, True):
        assert graft.train(mode) is graft
        assert graft.training is mode
        graft(x).mean()
    assert modes(inner) == before
    assert not inner.training
    assert dict(inner.named_modules()) == parts
    assert {name: id(parameter) for name, parameter in inner.named_parameters()} == held
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
    assert all(part.training for part in graft.train().inner.modules())
    assert not any(part.training for part in graft.eval().inner.modules())


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
    if any(p.abs().sum() > 0 for p in own(first)):
        assert not all(map(torch.equal, own(first), own(make(stir=False, seed=1))))


def test_shapes_pass_through_without_being_computed(make, form, stage):
    graft, x = make(), inputs(form, 2)
    with torch.inference_mode():
        expected = tuple(stage(form).module(x).shape)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert tuple(graft(torch.zeros(x.shape)).shape) == expected


def test_what_it_says_of_itself_can_be_a_key(make):
    graft = make()
    assert re.fullmatch(r"[a-z_]+/\d+", vars(type(graft))["code"])
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


def test_the_table_of_forms_knows_every_graft():
    assert sorted(FORMS) == GRAFTS, "say in FORMS which stages the new graft stands for"
