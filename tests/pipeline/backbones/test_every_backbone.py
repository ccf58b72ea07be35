"""What every family of networks promises, run over whatever pipeline/backbones/ holds.

One small network a family, with weights whose every parameter matters: a fresh layer scale is
1e-5 and a fresh batch norm the identity, behind which a wrong step would hide.
"""

import copy
import functools
import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from varve.pipeline import backbones
from varve.pipeline.backbones import _graft, _weights, canonical_reduction, reduce, reductions_of
from varve.pipeline.registry import available, variant
from varve.stores.digests import canonical

SMALL = {
    "clip_vit": "ViT-S-32",
    "dinov2": "vit_small_patch14_dinov2",
    "mel_resnet": "mel_resnet18",
    "resnet": "resnet18",
    "tsm_resnet": "tsm_resnet18",
}
START = {
    "uint8": r"starts from uint8 pictures \[N, 224, 224, 3\]",
    "float32": r"starts from float32 sounds \[N, 16000\]",
}
FAMILIES = available("backbones")
PRECISIONS = [torch.float32, torch.bfloat16]
FRAMES_KEY = "0" * 64


def plain(family):
    """The network as its own library builds and calls it."""
    match family:
        case "clip_vit":
            return open_clip.CLIP(**open_clip.get_model_config(SMALL[family]))
        case "dinov2":
            return timm.create_model(SMALL[family], img_size=224)
        case "resnet":
            return torchvision.models.get_model(SMALL[family])
        case "tsm_resnet":
            network = torchvision.models.get_model("resnet18")
            for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
                for block in layer:
                    block.conv1.register_forward_pre_hook(shifted)
            return network
        case "mel_resnet":
            network = torchvision.models.get_model("resnet18")
            network.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
            return network
    raise AssertionError(f"say here how the library of {family} builds {SMALL.get(family)}")


def call_plain(family, network, pictures):
    if family == "mel_resnet":
        return network(log_mel(pictures.numpy()))
    mean, std = {
        "clip_vit": (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "resnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "tsm_resnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }[family]
    x = pictures.permute(0, 3, 1, 2).float() / 255
    x = torchvision.transforms.functional.normalize(x, mean, std)
    return network.encode_image(x) if family == "clip_vit" else network(x)


def shifted(module, given):
    """TSM by loops: an eighth from the next of 8 frames, an eighth from the one before."""
    (x,) = given
    out, F = x.clone(), x.shape[1] // 8
    for n in range(len(x)):
        out[n, :F] = x[n + 1, :F] if n % 8 < 7 else 0
        out[n, F : 2 * F] = x[n - 1, F : 2 * F] if n % 8 else 0
    return (out,)


def log_mel(sounds):
    """By loops over moments and bands, in float64."""
    steps = np.arange(400)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * steps / 400)
    hertz = np.arange(257) * 16000 / 512
    mel = 1127 * np.log(1 + hertz / 700)
    edges = np.linspace(*(1127 * np.log(1 + np.array([125.0, 7500.0]) / 700)), 66)
    out = np.zeros((len(sounds), 1, 64, 98))
    for n, sound in enumerate(sounds.astype(np.float64)):
        for step in range(98):
            short = sound[160 * step : 160 * step + 400] * hann
            magnitude = np.abs(np.fft.rfft(np.pad(short, (0, 112))))
            for band in range(64):
                left, middle, right = edges[band : band + 3]
                share = np.minimum((mel - left) / (middle - left), (right - mel) / (right - middle))
                total = (magnitude * share.clip(0)).sum()
                out[n, 0, band, step] = (np.log(total + 0.01) + 2) / 2
    return torch.from_numpy(out).float()


@pytest.fixture(scope="session")
def weight_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")

    @cache
    def file(family):
        generator = torch.Generator().manual_seed(7)
        with _weights.seeded(7):
            network = plain(family)
        state = network.state_dict()
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                noise = torch.rand(tensor.shape, generator=generator)
                positive = name.endswith(("running_var", "gamma"))
                tensor.copy_(noise + 0.5 if positive else tensor + 0.3 * (noise - 0.5))
        save_file(state, folder / f"{family}.safetensors")
        return folder / f"{family}.safetensors"

    return file


@pytest.fixture(scope="session")
def loaded(weight_files):
    @cache
    def load(family, precision=torch.float32):
        return backbones.load(f"{SMALL[family]}:{weight_files(family)}", precision)

    return load


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def backbone(family, loaded):
    return loaded(family)


def pictures(count, backbone, seed=0):
    # Of one that looks across the frames of a clip, whole clips.
    rng, shape = np.random.default_rng(seed), (count * clip(backbone), *backbone.picture.shape)
    if backbone.picture.dtype == "float32":
        return torch.from_numpy(rng.uniform(-0.5, 0.5, shape).astype(np.float32))
    return torch.from_numpy(rng.integers(0, 256, shape, np.uint8))


def clip(backbone):
    """How many frames are looked at together."""
    return max(stage.frames for stage in backbone.stages) or 1


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


def test_the_chain_is_the_whole_network(family, backbone, weight_files):
    with torch.device("meta"):
        network = plain(family)
    network.load_state_dict(_weights.read(weight_files(family)), assign=True)
    x = pictures(2, backbone)
    last = backbone.stage_names[-1]
    with torch.inference_mode():
        expected = call_plain(family, network.eval(), x)
        found = backbone.run(x, [last])[last]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


def test_going_on_from_a_stored_stage_is_the_whole_run_bit_for_bit(family, backbone, outputs):
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
        {name: y.unflatten(0, (n, T)) for name, y in run_all(backbone, part.flatten(0, 1)).items()}
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
        found = outputs(family, 1, precision)[last].float()
        assert (torch.cosine_similarity(found, expected) > 0.99).all(), precision


def test_gradients_change_no_bit(family, backbone, outputs):
    """One frame, too: there the matrix products are most easily led astray."""
    x = pictures(1, backbone)
    without = outputs(family)
    trainable = copy.deepcopy(backbone.stages)
    for stage in trainable:
        stage.module.requires_grad_(True)
    for name, output in replace(backbone, stages=trainable).run(x, backbone.stage_names).items():
        # A spectrogram comes before anything that could be trained.
        assert output.requires_grad == (name != "mel")
        assert torch.equal(output, without[name]), name


def test_a_backbone_is_frozen(backbone):
    for stage in backbone.stages:
        assert not stage.module.training, stage.name
        assert not any(parameter.requires_grad for parameter in stage.module.parameters())


def test_one_ulp_in_a_parameter_renames_its_stage_and_all_that_follow(backbone):
    backbone = _graft.seal(backbone)  # what is left alone is digested once
    before = backbone.keys(FRAMES_KEY)
    names = backbone.stage_names
    assert len(set(before.values())) == len(names)
    touched = 0
    for i, stage in enumerate(backbone.stages):
        module = copy.deepcopy(stage.module)
        tensors = [t for t in module.state_dict().values() if t.is_floating_point()]
        if not tensors:
            continue
        first = tensors[-1].view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
        stages = [*backbone.stages[:i], replace(stage, module=module), *backbone.stages[i + 1 :]]
        after = replace(backbone, stages=tuple(stages)).keys(FRAMES_KEY)
        changed = [name for name in names if after[name] != before[name]]
        assert changed == names[i:], stage.name
        touched += 1
    assert touched >= len(names) - 2


def test_keys_follow_the_frames_the_precision_and_nothing_else(family, backbone, loaded):
    keys = backbone.keys(FRAMES_KEY)
    again = copy.deepcopy(backbone).keys(FRAMES_KEY)
    assert keys == again
    # The same numbers computed with in another precision, too.
    recast = replace(backbone, precision=torch.bfloat16)
    others = [recast, loaded(family, torch.bfloat16)]
    for other in (backbone.keys("1" * 64), *(one.keys(FRAMES_KEY) for one in others)):
        assert not set(other.values()) & set(keys.values())


def test_a_description_is_canonical_json(backbone):
    for stage in backbone.stages:
        described = backbone.describe(stage)
        assert json.loads(canonical(described)) == described
        assert "/" in stage.code


def test_outputs_have_the_form_that_the_stage_says(family, backbone, outputs):
    outputs = outputs(family)
    for stage in backbone.stages:
        output = outputs[stage.name]
        dims = {"tokens": 3, "map": 4, "vector": 2}[stage.form]
        assert output.ndim == dims, stage.name
        assert (stage.prefix > 0) == (stage.form == "tokens"), stage.name
    assert backbone.stages[-1].form == "vector"


def test_every_reduction_has_its_shape(family, backbone, outputs):
    outputs = outputs(family, 2)
    for stage in backbone.stages:
        output = outputs[stage.name]
        for asked in ("", *reductions_of(stage)):
            reduced = reduce(output, stage, canonical_reduction(stage, asked))
            if stage.form == "tokens":
                count, tokens, width = output.shape
                side = round((tokens - stage.prefix) ** 0.5)
                grid = (count, width, side, side)
            elif stage.form == "map":
                grid = tuple(output.shape)
                count, width = grid[:2]
            expected = {
                "": tuple(output.shape),
                "tokens": tuple(output.shape),
                "map": grid if stage.form != "vector" else None,
                "cls": (len(output), output.shape[-1]),
                "mean": (len(output), output.shape[-1]),
                "pool": tuple(output.shape[:2]),
                "grid7": (*grid[:2], 7, 7) if stage.form != "vector" else None,
            }[asked]
            assert tuple(reduced.shape) == expected, (stage.name, asked)


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
        assert torch.equal(first, expected) == stage.token_wise, stage.name


def test_pictures_of_another_type_or_size_are_refused(backbone):
    x = pictures(1, backbone)
    for wrong in (x.half(), x[:, 1:], x[..., None]):
        with pytest.raises(ValueError, match=START[backbone.picture.dtype]):
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

    monkeypatch.setattr(_weights, "construct", on_meta)
    module = variant("backbones", family)
    assert SMALL[family] in module.networks()
    cut, ran = [], {}

    def run(stage, x):
        """Its output's shape; of stages that differ in nothing but numbers one is run."""
        kind = (stage.code, canonical(dict(stage.options)), x.shape,
                *(tensor.shape for tensor in stage.module.state_dict().values()))  # fmt: skip
        if kind not in ran:
            ran[kind] = stage.module.to("meta")(x)
        return ran[kind]

    for network in module.networks():
        try:
            backbone = module.build(network, "random-0", torch.float32)
        except ValueError as error:
            assert "its visual tower is" in str(error)  # noqa: PT017
            continue
        dtype = getattr(torch, backbone.picture.dtype)
        shape = (clip(backbone), *backbone.picture.shape)
        x = torch.empty(shape, dtype=dtype, device="meta")
        assert functools.reduce(lambda x, stage: run(stage, x), backbone.stages, x).ndim == 2
        cut.append(network)
    assert len(cut) >= {"clip_vit": 40, "dinov2": 8, "resnet": 5}.get(family, 1), cut
