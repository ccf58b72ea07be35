"""Differences: one changed element of a key at a time, and the report on every column."""

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from varve import BuildSpec, Runtime, build, update
from varve.pipeline import backbones
from varve.pipeline.backbones import _weights
from varve.pipeline.extraction.diff import diff, lines, request_of
from varve.stores import FeatureStore, SpecMismatch

SERIAL = Runtime(serial=True)
KEEP = ("stem:pool", "layer4.0", "layer4.1:pool", "pool")
FRAMES = "so every stage after them is another computation"

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


class Scaled(nn.Module):
    """A stage's output times a learnt and a fixed number."""

    def __init__(self, stage: nn.Module, gain: float = 1.0, scale: float = 2.0) -> None:
        super().__init__()
        self.stage, self.scale = stage, scale
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return self.stage(x) * self.gain * self.scale


class Shifted(Scaled):
    def forward(self, x):
        return self.stage(x) * self.gain + self.scale


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of one name: the network itself, and others with one parameter of a stage changed."""
    folder = tmp_path_factory.mktemp("weights")
    with _weights.seeded(7):
        state = torchvision.models.resnet18().state_dict()
    for name in ("", "conv1.weight", "layer3.0.bn1.bias"):
        changed = {key: tensor.clone() for key, tensor in state.items()}
        if name:
            changed[name].view(-1)[3] += 2**-20
        (folder / f"changed {name}").mkdir()
        save_file(changed, folder / f"changed {name}" / "w.safetensors")
    return lambda name: f"resnet18:{folder}/changed {name}/w.safetensors"


@pytest.fixture(scope="module")
def spec(weights) -> BuildSpec:
    return BuildSpec((weights(""),), KEEP, frames=2, views=2, flip=True, dtype="float32")


@pytest.fixture(scope="module")
def grafted(weights):
    network = backbones.load(weights(""))

    def graft(kind=Scaled, **options):
        return network.graft("layer4.1", kind(network.stage("layer4.1").module, **options))

    return graft


@pytest.fixture(scope="module")
def store(dataset, built_once, spec, grafted, tmp_path_factory) -> Path:
    """Four columns of two views, and beside them two of a changed network."""
    store = tmp_path_factory.mktemp("diff") / "s.zarr"
    shutil.copytree(built_once(dataset(("grow", "shrink"), 1), spec), store)
    update(store, grafted(), ("layer4.1:pool", "layer4.1:grid7"))
    return store


def differences_by_feature(store, spec=None, backbone=None, view=0):
    """Differences by feature; those of columns that a method made as "<feature> changed"."""
    columns = FeatureStore.open(store).features()
    grafts = {f.fingerprint for f in columns if f.spec.get("grafts")}
    return {
        f"{difference.feature} changed"
        if difference.fingerprint in grafts
        else difference.feature: difference
        for difference in diff(store, spec, backbone)
        if difference.view == view
    }


def published_differences(store, spec, view=0):
    """Those of the network as published."""
    return {
        name: difference
        for name, difference in differences_by_feature(store, spec, None, view).items()
        if name in KEEP
    }


def test_the_request_of_the_last_build_is_current(store):
    for view in (0, 1):
        differences = published_differences(store, None, view)
        assert set(differences) == set(KEEP)
        assert {difference.verdict for difference in differences.values()} == {"current"}
        assert not any(difference.elements for difference in differences.values())
    assert len(diff(store)) == 12


CHANGES = {
    "frames": ({"frames": 3}, [("frames.frames", 2, 3)], f"other frames, {FRAMES}"),
    "sampling": (
        {"sampling": "dense", "stride": 1},
        [("frames.sampling", "tsn", "dense"), ("frames.stride", 0, 1)],
        f"other frames, {FRAMES}",
    ),
    "rate": (
        {"sampling": "uniform_fps", "fps": 2.5},
        [("frames.sampling", "tsn", "uniform_fps"), ("frames.fps", 0.0, 2.5)],
        f"other frames, {FRAMES}",
    ),
    "decoder": (
        {"decoder": "decord"},
        [("frames.decoder", "auto", "decord")],
        f"another decoder's frames, {FRAMES}",
    ),
    "precision": (
        {"precision": "bfloat16"},
        [("precision", "float32", "bfloat16")],
        "it ran in float32 and every stage rounds otherwise in bfloat16",
    ),
    "dtype": (
        {"dtype": "bfloat16"},
        [("dtype", "float32", "bfloat16")],
        "the same numbers kept in float32; bfloat16 was asked for, and can be made from them",
    ),
    "two": (
        {"frames": 3, "dtype": "float16", "precision": "float16"},
        [
            ("frames.frames", 2, 3),
            ("precision", "float32", "float16"),
            ("dtype", "float32", "float16"),
        ],
        "other frames; besides, it ran in float32 and every stage rounds otherwise in float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_all_columns_depend_on_is_reported_for_each(store, spec, change):
    options, elements, why = CHANGES[change]
    differences = published_differences(store, replace(spec, **options))
    assert set(differences) == set(KEEP)
    for difference in differences.values():
        assert (difference.verdict, difference.elements, difference.why) == (
            "differs",
            elements,
            why,
        )


def test_a_view_that_is_not_requested_is_other_frames(store, spec):
    alone = replace(spec, views=1, flip=False)
    assert {difference.verdict for difference in published_differences(store, alone).values()} == {
        "current"
    }
    for difference in published_differences(store, alone, view=1).values():
        assert difference.elements == [("frames.view", 1, 0), ("frames.flip", True, False)]
        assert difference.why.startswith(
            "the request shows 1 view of a clip and this is view 1: other"
        )
    cropped = published_differences(store, replace(spec, flip=False, random_crop=True), view=1)[
        "pool"
    ]
    assert cropped.elements == [("frames.flip", True, False), ("frames.random_crop", False, True)]


def test_another_network_has_other_pictures(store, spec, monkeypatch):
    real = backbones.load

    def load(name, precision):
        backbone = real(name, precision)
        return replace(backbone, picture=replace(backbone.picture, resize=240))

    monkeypatch.setattr(backbones, "load", load)
    difference = published_differences(store, spec)["stem:pool"]
    assert difference.elements == [("frames.picture.resize", 256, 240)]
    assert difference.why.startswith("the same frames as other pictures")


@pytest.mark.parametrize("version", ["pixels", "code"])
def test_another_version_of_the_code_is_reported(store, spec, monkeypatch, version):
    if version == "pixels":
        monkeypatch.setattr("varve.pipeline.extraction.passes.PIXELS", "rgb48")
        difference = published_differences(store, spec)["stem:pool"]
        assert difference.elements == [("pixels", "rgb24, libswscale bicubic, 1", "rgb48")]
        assert difference.why == f"other pictures of the same frames, {FRAMES}"
        return
    real = backbones.load

    def load(name, precision):
        backbone = real(name, precision)
        newer = {"layer3.0": {"code": "resnet_block/2"}, "layer4.0": {"options": {"eps": 0.5}}}
        stages = (replace(stage, **newer.get(stage.name, {})) for stage in backbone.stages)
        return replace(backbone, stages=tuple(stages))

    monkeypatch.setattr(backbones, "load", load)
    differences = published_differences(store, spec)
    assert differences["stem:pool"].verdict == "current"
    assert differences["pool"].elements == [("layer3.0 code", "resnet_block/1", "resnet_block/2")]
    assert differences["pool"].why.startswith(
        "layer3.0 has other code: columns before it are still valid"
    )


@pytest.mark.parametrize(
    ("changed", "stage", "current"),
    [
        ("conv1.weight", "stem", []),
        ("layer3.0.bn1.bias", "layer3.0", ["stem:pool"]),
    ],
)
def test_one_parameter_changes_the_keys_of_its_stage_and_what_follows(
    store, spec, weights, changed, stage, current
):
    differences = published_differences(store, replace(spec, backbones=(weights(changed),)))
    assert [name for name in KEEP if differences[name].verdict == "current"] == current
    for name in set(KEEP) - set(current):
        (element, old, new), why = differences[name].elements[0], differences[name].why
        assert element == f"{stage} parameters"
        assert (len(differences[name].elements), len(old), len(new), old != new) == (
            1,
            16,
            16,
            True,
        )
        holds = "columns before it are still valid, this one is not"
        after = "and every stage after it is another computation"
        assert why == (f"stem has other parameters, {after}" if stage == "stem" else
                       f"{stage} has other parameters: {holds}")  # fmt: skip


def test_a_stage_that_one_network_lacks_is_reported(store, spec, weights, tmp_path):
    """Weights without a classifier: no stage `fc`."""
    whole = backbones.load(weights(""))
    bare = replace(whole, stages=whole.stages[:-1])
    copied = shutil.copytree(store, tmp_path / "s.zarr")
    update(copied, whole, ("fc",), rows=[0], spec=replace(spec, views=1, flip=False))
    (fc_difference,) = (
        difference for difference in diff(copied, backbone=bare) if difference.feature == "fc"
    )
    assert (fc_difference.verdict, fc_difference.elements) == (
        "differs",
        [("fc", "present", "absent")],
    )
    assert fc_difference.why.startswith(
        "the request's network has no fc: columns before it are still"
    )
    assert differences_by_feature(copied, backbone=bare)["pool"].verdict == "current"


def test_a_network_of_another_name_is_compared_with_its_like(store, spec):
    differences = published_differences(
        store, replace(spec, backbones=("resnet18:random-1", "resnet34:random-0"))
    )
    for difference in differences.values():
        assert [name for name, _, _ in difference.elements] == ["stem parameters"]
        assert difference.why.startswith("resnet18:random-1 is asked for instead: stem has other")
    differences = published_differences(
        store, replace(spec, backbones=("resnet34:random-0",), keep=())
    )
    for difference in differences.values():
        assert difference.verdict == "not asked for"
        assert difference.elements == [("backbone", "resnet18:w", "resnet34:random-0")]
        assert "the request has no resnet18" in difference.why


def test_of_two_networks_of_one_name_the_nearer_is_compared(store, spec, weights):
    names = (weights("layer3.0.bn1.bias"), weights("conv1.weight"))
    for order in (names, names[::-1]):
        differences = published_differences(store, replace(spec, backbones=order))
        assert differences["stem:pool"].verdict == "current"
        assert differences["pool"].elements[0][0] == "layer3.0 parameters"


def test_for_what_was_not_requested_its_use_is_reported(store, spec):
    differences = published_differences(store, replace(spec, keep=("layer4.1", "pool")))
    assert (differences["layer4.0"].verdict, differences["layer4.0"].elements) == (
        "not asked for",
        [],
    )
    assert differences["layer4.0"].why.endswith("layer4.1, pool can be computed from it")
    part = differences["layer4.1:pool"]
    assert (part.verdict, part.elements) == ("not asked for", [("reduction", "pool", "whole")])
    assert "layer4.1:pool is an aggregate, and has no inverse" in part.why
    differences = published_differences(store, replace(spec, keep=("stem",), dtype="float16"))
    assert differences["pool"].elements == [("dtype", "float32", "float16")]
    assert "none of its own can come from it: pool comes after stem" in differences["pool"].why
    other = published_differences(store, replace(spec, keep=("stem",), frames=3))["pool"]
    assert other.why.endswith("; nor does the request keep such a feature")


def test_numbers_that_are_too_coarse_are_reported(store, spec, tmp_path):
    root = FeatureStore.open(store).attributes["dataset"]
    coarse = replace(spec, dtype="float16", keep=("pool",), views=1, flip=False)
    build(root, tmp_path / "s.zarr", coarse, runtime=SERIAL)
    (difference,) = diff(tmp_path / "s.zarr", replace(coarse, dtype="float32"))
    assert difference.elements == [("dtype", "float16", "float32")]
    assert difference.why.endswith("float32 was asked for, and they are too coarse for it")


def test_a_column_of_a_method_is_distinguished_from_that_of_the_published_network(store):
    difference = differences_by_feature(store)["layer4.1:pool changed"]
    assert [name for name, _, _ in difference.elements] == ["layer4.1 code", "layer4.1 parameters"]
    assert difference.elements[0][1:] == ("graft", "resnet_block/1")
    assert difference.why.startswith(
        "a method had changed layer4.1: columns before it are still valid"
    )


@pytest.mark.parametrize(
    ("options", "element", "reason"),
    [
        ({"scale": 3.0}, ("layer4.1 options.attributes.scale", 2.0, 3.0), "has other options"),
        ({"gain": 3.0}, ("layer4.1 parameters",), "has other parameters"),
        ({"kind": Shifted}, ("layer4.1 options.code.class", "Scaled", "Shifted"), "other code"),
    ],
)
def test_a_live_network_is_compared_as_it_is(store, grafted, options, element, reason):
    now = differences_by_feature(store, backbone=grafted())
    for name in ("layer4.1:pool changed", "layer4.1:grid7 changed"):
        assert now[name].verdict == "current"
    differences = differences_by_feature(store, backbone=grafted(**options))
    current = {name for name, difference in differences.items() if difference.verdict == "current"}
    assert current == {"stem:pool", "layer4.0"}
    changed = differences["layer4.1:pool changed"]
    assert element in [part[: len(element)] for part in changed.elements]
    assert reason in changed.why
    for difference in (now["pool"], differences["pool"]):
        assert difference.elements[0] == ("layer4.1 code", "resnet_block/1", "graft")
        assert difference.why.startswith("a method has changed layer4.1 since: columns before")


def test_a_trained_stage_differs_by_its_parameters_alone(store, weights):
    backbone = backbones.load(weights("")).unfreeze("layer4.1")
    assert differences_by_feature(store, backbone=backbone)["pool"].verdict == "current"
    with torch.no_grad():
        backbone.stage("layer4.1").module.conv1.weight[0, 0, 0, 0] += 1
    (element,) = differences_by_feature(store, backbone=backbone)["pool"].elements
    assert element[0] == "layer4.1 parameters"


def test_a_module_that_was_altered_in_place_differs_by_what_was_altered(store, weights):
    network = backbones.load(weights(""))
    block = copy.deepcopy(network.stage("layer4.1").module)
    block.bn1.eps = 0.125
    stages = [
        replace(stage, module=block, sealed=False) if stage.name == "layer4.1" else stage
        for stage in network.stages
    ]
    backbone = replace(network, stages=tuple(stages))
    pool = differences_by_feature(store, backbone=backbone)["pool"]
    assert pool.elements == [("layer4.1 altered", "absent", "present")]
    assert "layer4.1 has other parts or attributes" in pool.why


def test_a_live_network_can_be_compared_for_what_a_request_keeps(store, spec, grafted):
    differences = differences_by_feature(store, replace(spec, keep=("pool",)), grafted())
    assert differences["layer4.0"].why.endswith("pool can be computed from it")


def test_a_store_without_its_request_is_refused(store, spec):
    opened = FeatureStore.open(store)
    del opened.attributes["request"]
    with pytest.raises(SpecMismatch, match="build it once more"):
        diff(opened)
    assert {difference.verdict for difference in diff(opened, spec)} == {"current", "differs"}


def test_another_sampling_takes_over_no_rate_and_no_stride(store):
    opened = FeatureStore.open(store)
    opened.attributes["request"] |= {"sampling": "dense", "stride": 2}
    assert (request_of(opened).sampling, request_of(opened, frames=5).stride) == ("dense", 2)
    assert request_of(opened, sampling="tsn").stride == 0
    assert request_of(opened, sampling="uniform_fps", fps=2.0).fps == 2.0


def test_the_command_compares_with_the_last_build_and_the_new_options(store, varve):
    done = varve("diff", store)
    assert done.returncode == 0
    assert len([line for line in done.stdout.splitlines() if line.startswith("current ")]) == 8
    done = varve("diff", store, "--frames=3", "--keep=pool", "--json")
    records = json.loads(done.stdout)
    assert (done.returncode, len(records), {record["verdict"] for record in records}) == (
        0,
        12,
        {"differs"},
    )
    assert records[0]["elements"][0] == {"element": "frames.frames", "old": 2, "asked": 3}
    for options, column in (
        (["--backbone=resnet18:random-3"], "[stem parameters "),
        (["--sampling=uniform_fps", "--fps=2"], "[frames.fps 0.0, asked 2.0]"),
        (["--sampling=dense", "--stride=2"], "[frames.stride 0, asked 2]"),
        (["--views=1"], "[frames.view 1, asked 0]"),
        (["--no-flip", "--random-crop"], "[frames.random_crop False, asked True]"),
        (["--dtype=float16"], "[dtype float32, asked float16]"),
        (["--precision=bfloat16"], "[precision float32, asked bfloat16]"),
        (["--decoder=decord"], "[frames.decoder auto, asked decord]"),
    ):
        done = varve("diff", store, *options)
        assert done.returncode == 0
        assert column in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views=1", "--flip"], "--views 2"),
        (["--keep=blocks.3"], "no backbone has a stage 'blocks.3'"),
        (["--dtype=int8"], "choose from float16"),
        (["--backbone=resnet18"], "names no weights"),
    ],
)
def test_a_request_that_no_build_could_meet_is_refused(store, varve, options, message):
    done = varve("diff", store, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_nothing_is_written(store, spec, grafted):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in store.rglob("*")}

    before = state()
    diff(store, replace(spec, frames=3))
    diff(store, backbone=grafted(scale=3.0))
    assert state() == before


def test_a_long_list_is_cut_for_a_person_and_whole_for_a_program(store, spec):
    differences = diff(store, replace(spec, frames=3, sampling="dense", stride=1, decoder="decord",
                                      precision="bfloat16", dtype="float16"))  # fmt: skip
    first, second, *_ = lines(differences)
    assert first.endswith("[and 2 more]")
    assert second.strip() == differences[0].why
    assert len(asdict(differences[0])["elements"]) == 6
