"""The contract of backbones, run over every family of networks.

One network a family: its `EXAMPLE`, else the first of `networks()`, with the weights `random-0`.
Its parameters are changed so that each matters: a fresh layer scale is 1e-5 and a fresh batch norm
the identity, behind which a wrong step would hide.
"""

import copy
import functools
import importlib.util
import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.contracts.options import names
from varve.pipeline import backbones
from varve.pipeline.backbones import reduce, reductions_of
from varve.pipeline.registry import variant
from varve.stores.digests import canonical, store_name

NDIM = {"tokens": 3, "map": 4, "vector": 2}
PRECISIONS = [torch.float32, torch.bfloat16]
FRAMES_KEY = "0" * 64


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        families = [
            pytest.param(name, marks=marks_of(variant("backbones", name)))
            for name in names(metafunc.config, "backbones")
        ]
        metafunc.parametrize("family", families)


def marks_of(family):
    """Mark a family that is slow, or that needs a library which is not installed."""
    needs = getattr(family, "NEEDS", "")
    missing = bool(needs) and importlib.util.find_spec(needs) is None
    skip = pytest.mark.skipif(missing, reason=f"needs the extra {needs}")
    return [skip, *[pytest.mark.slow] * getattr(family, "SLOW", 0)]


def example(family):
    """Name a small network of a family, with seeded weights."""
    module = variant("backbones", family)
    return f"{getattr(module, 'EXAMPLE', None) or module.networks()[0]}:random-0"


@pytest.fixture(scope="session")
def loaded():
    @cache
    def load(family, precision=torch.float32):
        backbone = backbones.load(example(family), precision)
        generator = torch.Generator().manual_seed(7)
        for stage in backbone.stages:
            for name, tensor in sorted(stage.module.named_parameters()):
                if tensor.ndim == 1:
                    noise = torch.rand(tensor.shape, generator=generator)
                    gamma = name.endswith("gamma")
                    tensor.data.copy_(noise + 0.5 if gamma else tensor + 0.3 * (noise - 0.5))
            for name, tensor in sorted(stage.module.named_buffers()):
                if name.endswith(("running_mean", "running_var")):
                    noise = torch.rand(tensor.shape, generator=generator)
                    variance = name.endswith("running_var")
                    tensor.copy_(noise + 0.5 if variance else 0.3 * (noise - 0.5))
        return backbones.seal(backbone)

    return load


@pytest.fixture
def backbone(family, loaded):
    return loaded(family)


def pictures(count, backbone, seed=0):
    # A temporal backbone is given whole clips.
    rng, shape = np.random.default_rng(seed), (count * clip(backbone), *backbone.picture.shape)
    if backbone.picture.dtype == "float32":
        return torch.from_numpy(rng.uniform(-0.5, 0.5, shape).astype(np.float32))
    return torch.from_numpy(rng.integers(0, 256, shape, np.uint8))


def clip(backbone):
    """Count the frames that are computed together."""
    return backbone.clip_frames


@torch.inference_mode()
def run_all(backbone, x):
    return backbone.run(x, backbone.stage_names)


@pytest.fixture(scope="session")
def outputs(loaded):
    """Every stage's output for one or two pictures, computed once. Not to be changed."""

    @cache
    def of(family, count=1, precision=torch.float32):
        backbone = loaded(family, precision)
        return run_all(backbone, pictures(count, backbone))

    return of


def test_a_network_is_named_as_it_was_asked_for(family, backbone):
    network, _, weights = example(family).partition(":")
    assert backbone.network == network
    assert backbone.name == store_name(f"{network}:{weights}")


def test_one_seed_gives_one_network(family, loaded):
    first, second = (backbones.load(example(family)).keys(FRAMES_KEY) for _ in range(2))
    assert first == second
    other = backbones.load(example(family).replace("random-0", "random-1")).keys(FRAMES_KEY)
    assert list(other.values())[-1] != list(first.values())[-1]


def test_unknown_weights_are_refused(family):
    network = example(family).partition(":")[0]
    with pytest.raises(ValueError, match=r"no weights '?a-tag-that-is-nowhere"):
        backbones.load(f"{network}:a-tag-that-is-nowhere")
    with pytest.raises(FileNotFoundError):
        backbones.load(f"{network}:nowhere/weights.safetensors")


def test_resuming_from_a_stored_stage_is_the_whole_run_bit_for_bit(family, backbone, outputs):
    outputs = outputs(family, 2)
    names = backbone.stage_names
    for start, following in itertools.pairwise(names):
        array = outputs[start].numpy()
        # As a reader may hand it over: in plain order, and four bytes off any alignment.
        stored = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
        stored[...] = array
        with torch.inference_mode():
            resumed = backbone.run(torch.from_numpy(stored), [following], start=start)
        assert torch.equal(resumed[following], outputs[following]), (start, following)


def test_a_kept_output_is_left_alone_by_the_stages_after_it(backbone):
    x = pictures(1, backbone)
    before = x.clone()
    outputs = run_all(backbone, x)
    for name in backbone.stage_names[::5]:
        with torch.inference_mode():
            assert torch.equal(backbone.run(x, [name])[name], outputs[name]), name
    assert torch.equal(x, before)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_bits_of_a_row_depend_on_nothing_else_in_its_batch(family, loaded, precision):
    backbone = loaded(family, precision)
    T = clip(backbone)
    n = 4 if T == 1 else 2  # frames, or clips of frames
    x = pictures(n + 2, backbone, seed=1).unflatten(0, (n + 2, T))
    others = [n - 1, *range(n, 2 * n - 2), 0]
    first, second, padded = (
        {name: y.unflatten(0, (n, -1)) for name, y in run_all(backbone, part.flatten(0, 1)).items()}
        for part in (x[:n], x[others], torch.cat([torch.zeros_like(x[1:n]), x[:1]]))
    )
    for name in backbone.stage_names:
        assert torch.equal(first[name][0], second[name][-1]), name
        assert torch.equal(first[name][-1], second[name][0]), name
        assert torch.equal(first[name][0], padded[name][-1]), name


@pytest.mark.parametrize("precision", backbones.PRECISIONS, ids=str)
def test_outputs_have_the_precision_and_are_finite(family, outputs, precision):
    for name, output in outputs(family, 1, precision).items():
        assert output.dtype == precision, name
        assert output.isfinite().all(), name


def test_a_low_precision_is_near_the_full_one(family, backbone, outputs):
    last = backbone.stage_names[-1]
    expected = outputs(family)[last]
    for precision in (torch.bfloat16, torch.float16):
        rounded = outputs(family, 1, precision)[last].float()
        assert (torch.cosine_similarity(rounded, expected) > 0.99).all(), precision


def test_gradients_change_no_bit(family, backbone, outputs):
    """One frame, too: there the matrix products are most easily led astray."""
    x = pictures(1, backbone)
    without = outputs(family)
    trainable = copy.deepcopy(backbone.stages)
    for stage in trainable:
        stage.module.requires_grad_(True)
    parameters = []
    for name, output in replace(backbone, stages=trainable).run(x, backbone.stage_names).items():
        parameters += [*backbone.stage(name).module.parameters()]
        assert output.requires_grad == bool(parameters), name
        assert torch.equal(output, without[name]), name


def test_a_backbone_is_frozen(backbone):
    for stage in backbone.stages:
        assert not stage.module.training, stage.name
        assert not any(parameter.requires_grad for parameter in stage.module.parameters())


def test_one_ulp_in_a_parameter_renames_its_stage_and_all_that_follow(backbone):
    before = backbone.keys(FRAMES_KEY)
    names = backbone.stage_names
    assert len(set(before.values())) == len(names)
    touched = []
    for i, stage in enumerate(backbone.stages):
        module = copy.deepcopy(stage.module)
        tensors = [t for t in module.state_dict().values() if t.is_floating_point()]
        if not tensors:
            continue
        first = tensors[-1].view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
        moved = replace(stage, module=module, sealed=False)
        stages = [*backbone.stages[:i], moved, *backbone.stages[i + 1 :]]
        after = replace(backbone, stages=tuple(stages)).keys(FRAMES_KEY)
        changed = [name for name in names if after[name] != before[name]]
        assert changed == names[i:], stage.name
        touched.append(stage.name)
    assert touched


def test_keys_follow_the_frames_the_precision_and_nothing_else(family, backbone, loaded):
    keys = backbone.keys(FRAMES_KEY)
    again = copy.deepcopy(backbone).keys(FRAMES_KEY)
    assert keys == again
    # The same numbers computed with in another precision, too.
    recast = replace(backbone, precision=torch.bfloat16)
    others = [recast, loaded(family, torch.bfloat16)]
    for other in (backbone.keys("1" * 64), *(other.keys(FRAMES_KEY) for other in others)):
        assert not set(other.values()) & set(keys.values())


def test_a_description_is_canonical_json(backbone):
    for stage in backbone.stages:
        described = backbone.describe(stage)
        assert json.loads(canonical(described)) == described
        assert "/" in stage.code


def test_outputs_have_the_form_of_their_stage(family, backbone, outputs):
    outputs = outputs(family)
    for stage in backbone.stages:
        output = outputs[stage.name]
        assert output.ndim == NDIM[stage.form], stage.name
        assert len(output) == backbone.time_steps(stage.name, clip(backbone)), stage.name
        assert stage.prefix >= 0, stage.name
        assert not stage.prefix or stage.form == "tokens", stage.name
    assert backbone.default_stage.form == "vector"


def test_every_reduction_has_its_shape(family, backbone, outputs):
    outputs = outputs(family, 2)
    for stage in backbone.stages:
        output = outputs[stage.name]
        for reduction in ("", *reductions_of(stage)):
            reduced = reduce(output, stage, reduction)
            shape = (len(output), *backbone.feature_shape(stage, reduction))
            assert tuple(reduced.shape) == shape, (stage.name, reduction)


def test_shapes_pass_through_the_chain_without_being_computed(family, backbone, outputs):
    real = outputs(family)
    dtype = getattr(torch, backbone.picture.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        blank = torch.zeros(clip(backbone), *backbone.picture.shape, dtype=dtype)
        fake = backbone.run(blank, backbone.stage_names)
    assert {k: tuple(v.shape) for k, v in fake.items()} == {
        k: tuple(v.shape) for k, v in real.items()
    }


def test_a_token_wise_stage_looks_at_no_other_token(family, backbone, outputs):
    outputs = outputs(family)
    names = backbone.stage_names
    for before, stage in zip(names, backbone.stages[1:], strict=False):
        if backbone.stage(before).form != "tokens":
            continue
        disturbed = outputs[before].clone()
        disturbed[:, 1:] += 1
        with torch.inference_mode():
            output = backbone.run(disturbed, [stage.name], start=before)[stage.name]
        tokens = stage.form == "tokens"
        first, expected = (o[:, 0] if tokens else o for o in (output, outputs[stage.name]))
        assert torch.equal(first, expected) or not stage.token_wise, stage.name


def test_pictures_of_another_type_or_size_are_refused(backbone):
    x = pictures(1, backbone)
    for wrong in (x.half(), x[:, 1:], x[..., None]):
        with pytest.raises(ValueError, match=f"starts from {backbone.picture.dtype}"):
            backbone.run(wrong, [backbone.stage_names[-1]])


def test_a_stage_that_is_not_there_or_lies_behind_is_refused(backbone):
    first, second = backbone.stage_names[:2]
    with pytest.raises(ValueError, match=f"no stage 'blocks.99'; it has {first}, {second}"):
        backbone.run(pictures(1, backbone), ["blocks.99"])
    with pytest.raises(ValueError, match=f"{first} come no later than the start, {second}"):
        backbone.run(pictures(1, backbone), [first], start=second)


def test_every_network_of_the_family_is_cut_into_a_chain_or_refused(family, monkeypatch):
    def on_meta(make, weights, state, name):
        with torch.device("meta"):
            return make()

    monkeypatch.setattr("varve.pipeline.backbones._weights.construct", on_meta)
    module = variant("backbones", family)
    assert example(family).partition(":")[0] in module.networks()
    outputs = {}

    def run(x, stage):
        """Return the output's shape; of stages that differ in numbers alone, one is run."""
        kind = (stage.code, canonical(dict(stage.options)), x.shape,
                *(tensor.shape for tensor in stage.module.state_dict().values()))  # fmt: skip
        if kind not in outputs:
            outputs[kind] = stage.module.to("meta")(x)
        return outputs[kind]

    cut = 0
    for network in module.networks():
        try:
            backbone = module.build(network, "random-0", torch.float32)
        except ValueError as error:
            assert str(error).startswith(f"{network}: ")  # noqa: PT017
            continue
        dtype = getattr(torch, backbone.picture.dtype)
        x = torch.empty(clip(backbone), *backbone.picture.shape, dtype=dtype, device="meta")
        last = backbone.stages[-1]
        assert functools.reduce(run, backbone.stages, x).ndim == NDIM[last.form], network
        cut += 1
    assert cut
