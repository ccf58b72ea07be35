"""Video networks, whose stages merge the frames of a clip into fewer time steps."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from varve import BuildSpec, build, run, update
from varve.heads.class_regularization import Regularized
from varve.heads.grafts.class_regularization import ClassRegularization
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.heads.parts.losses import square_grid
from varve.pipeline import backbones
from varve.pipeline.analysis.interpret import clip
from varve.pipeline.backbones import _weights
from varve.pipeline.experiments.head_network import HeadNetwork
from varve.pipeline.experiments.routing import restored
from varve.stores import FeatureStore

NAME = "r3d_18:random-0"
CLASSES = ("grow", "shrink", "fade in")
KEEP = ("layer3.1", "layer4.0", "pool")
STEPS = {
    "r3d_18": (16, 8, 4, 2),
    "mc3_18": (16, 16, 16, 16),
    "r2plus1d_18": (16, 8, 4, 2),
}
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


@pytest.fixture(scope="module")
def resnet():
    return backbones.load(NAME)


@pytest.fixture(scope="module")
def store(dataset, built_once, tmp_path_factory):
    spec = BuildSpec((NAME,), keep=KEEP, frames=16, dtype="float32")
    path = tmp_path_factory.mktemp("video") / "s.zarr"
    shutil.copytree(built_once(dataset(CLASSES, 3), spec), path)  # a run adds teacher maps
    return FeatureStore.open(path)


class Scaled(torch.nn.Module):
    code = "scaled/1"

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.inner(x) * self.scale


def pictures(backbone, seed=0):
    shape = (16, *backbone.picture.shape)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def library_outputs(name, stages, x):
    """The outputs [B, C, T, H, W] of modules of torchvision's network with the weights random-0."""
    with _weights.seeded(0):
        network = torchvision.models.get_model(name).eval()
    outputs = {}
    for stage, path in stages.items():
        network.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, stage=stage: outputs.__setitem__(stage, output.clone())
        )
    clips = torchvision.transforms.functional.normalize(x.permute(0, 3, 1, 2) / 255, MEAN, STD)
    with torch.inference_mode():
        network(clips.transpose(0, 1)[None])
    return outputs


@pytest.mark.parametrize(
    "network",
    [
        "r3d_18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mc3_18", "r2plus1d_18", "s3d")),
    ],
)
def test_every_stage_is_the_one_of_the_library(network):
    backbone = backbones.load(f"{network}:random-0")
    x = pictures(backbone)
    paths = {name: name for name in backbone.stage_names if name not in ("pool", "fc")}
    if network == "s3d":
        numbers = {"stem": 4, "layer3": 5, "layer4": 8, "layer5": 14}
        for name in paths:
            layer, _, block = name.partition(".")
            paths[name] = f"features.{numbers[layer] + int(block or 0)}"
    with torch.inference_mode():
        outputs = backbone.run(x, backbone.stage_names)
    for name, expected in library_outputs(network, paths | {"pool": "avgpool"}, x).items():
        rows = expected[0].transpose(0, 1)
        torch.testing.assert_close(outputs[name].reshape(rows.shape), rows, rtol=1e-4, atol=1e-4)
        assert backbone.time_steps(name, 16) == len(rows), name


@pytest.mark.parametrize(("network", "steps"), STEPS.items())
def test_a_stage_gives_the_time_steps_of_its_layer(network, steps):
    backbone = backbones.load(f"{network}:random-0")
    for number, count in enumerate(steps, 1):
        assert backbone.time_steps(f"layer{number}.1", 16) == count
    assert backbone.time_steps("pool", 16) == 1


def test_patch_tokens_of_a_clip_have_no_map():
    stage = backbones.load("mvit_v2_s:random-0").stage("blocks.15.mlp")
    assert backbones.reductions_of(stage) == ["cls", "mean", "tokens"]
    with pytest.raises(ValueError, match="no square grid"):
        square_grid(393)


def test_a_column_has_the_time_steps_of_its_stage(store):
    shapes = {name: store.feature(NAME, name).shape for name in KEEP}
    assert shapes == {
        "layer3.1": (9, 4, 256, 14, 14),
        "layer4.0": (9, 2, 512, 7, 7),
        "pool": (9, 1, 512),
    }


def test_an_update_after_a_graft_decodes_nothing_and_is_the_whole_network(store, resnet):
    grafted = resnet.graft("layer4.1", Scaled(resnet.stage("layer4.1").module))
    report = update(store.path, grafted, keep=["pool"])
    assert report.decoded == 0
    assert report.calls == {f"{NAME} layer4.1": 9, f"{NAME} pool": 9}
    opened = FeatureStore.open(store.path)
    feature = opened.feature(NAME, "pool", fingerprint=report.fingerprints["pool"])
    decoded = clip(opened, {"vector": feature}, 0)
    with torch.inference_mode():
        whole = grafted.run(torch.from_numpy(decoded.pictures), ["pool"])["pool"]
    np.testing.assert_allclose(feature.read([0])[0], whole, rtol=1e-4, atol=1e-5)
    assert not np.allclose(feature.read([0])[0], opened.feature(NAME, "pool").read([0])[0])


def test_a_suffix_returns_the_time_steps_of_each_stage(resnet):
    suffix = resnet.suffix("layer3.1", keep=["layer4.0", "pool"])
    x = torch.rand(3, 4, *resnet.shapes["layer3.1"])
    outputs = suffix(x)
    assert outputs["layer4.0"].shape == (3, 2, 512, 7, 7)
    assert outputs["pool"].shape == (3, 1, 512)
    assert suffix(x.flatten(0, 1))["pool"].shape == (3, 512)
    with pytest.raises(ValueError, match="clips of 4 frames, and these have 2"):
        suffix(x[:, :2])


@pytest.mark.parametrize("head", ["nearest_mean", "podnet", "class_regularization"])
def test_heads_learn_on_it(store, head, tmp_path):
    options = {"blocks": 1, "first_epochs": 1, "epochs": 1, "batch_size": 4}
    trains = head != "nearest_mean"
    done = run(store, head, "2+1x1", options=options if trains else {}, out=tmp_path)
    assert 0 <= done.matrix.metric("final") <= 1
    if trains:
        assert done.cost["stages_recomputed"][1].keys() == {"layer4.1", "pool"}


def test_grafts_over_frames_are_refused_on_its_blocks(store, resnet, tmp_path):
    block = resnet.stage("layer4.1").module
    with pytest.raises(ValueError, match="TemporalShift on a block of a 3D network"):
        TemporalShift(block, frames=2)
    with pytest.raises(ValueError, match="HFGate on a block of a 3D network"):
        HFGate(Scaled(block), 512, frames=2)
    with pytest.raises(ValueError, match="HFGate on a block of a 3D network"):
        run(store, "hf_net", "2+1x1", options={"blocks": 1}, out=tmp_path)


def test_relations_between_frames_are_refused_on_its_one_vector(store, tmp_path):
    options = {"blocks": 1, "encoder": "trn"}
    with pytest.raises(ValueError, match=r"\(TRN\) takes 2 at least. A 3D network, such as r3d_18"):
        run(store, "class_regularization", "2+1x1", options=options, out=tmp_path)


@pytest.mark.parametrize(("at", "start"), [("stages", "drawn"), ("blocks", "fitted")])
def test_class_regularization_stands_at_the_end_of_stages_or_behind_every_block(
    store, tmp_path, at, start
):
    options = {"at": at, "start": start, "blocks": 2, "first_epochs": 1, "batch_size": 4}
    done = run(store, "class_regularization", "0+3x1", options=options, out=tmp_path)
    assert 0 <= done.matrix.metric("final") <= 1
    blocks = ["layer4.0"] * (at == "blocks") + ["layer4.1"]
    head, _ = restored(done, store)
    assert {name: m.shape for name, m in head.excitations().items()} == dict.fromkeys(
        blocks, (3, 512)
    )
    projections = [name for name in head.state_dict() if name.endswith("projection")]
    assert len(projections) == len(blocks)


@pytest.mark.parametrize(
    ("network", "blocks", "ends", "strengths"),
    [
        ("resnet50", 16, ["layer1.2", "layer2.3", "layer3.5", "layer4.2"], [0.1, 0.2, 0.3, 0.4]),
        ("r3d_18", 3, ["layer3.1", "layer4.1"], [0.3, 0.4]),
        ("s3d", 9, ["layer3.1", "layer4.4", "layer5.1"], [0.2, 0.3, 0.4]),
        ("i3d", 9, ["layer3.1", "layer4.4", "layer5.1"], [0.2, 0.3, 0.4]),
    ],
)
def test_a_stage_ends_where_the_maps_change_their_size(network, blocks, ends, strengths):
    head = Regularized(blocks=blocks)
    seen = HeadNetwork(backbones.load(f"{network}:random-0"), 16, backbones.load)
    grafts = head.grafts(seen, torch.nn.Linear(4, 2))
    assert [*grafts] == ends
    assert [graft.keywords["strength"] for graft in grafts.values()] == strengths


@pytest.mark.parametrize("network", ["r3d_18", "mc3_18", "r2plus1d_18", "s3d", "i3d"])
def test_class_regularization_stands_behind_blocks_that_merge_time_steps(network):
    backbone = backbones.load(f"{network}:random-0")
    before, first = {"s3d": ("layer4.4", "layer5.0"), "i3d": ("pool5", "layer5.0")}.get(
        network, ("layer3.1", "layer4.0")
    )
    channels, steps = backbone.shapes[first][0], backbone.time_steps(first, 16)
    classifier = torch.nn.Linear(channels, 3)
    torch.nn.init.normal_(classifier.weight)
    inner = backbone.stage(first).module
    graft = ClassRegularization(inner, classifier, channels, steps, strength=0.4)
    grafted = backbone.graft(first, graft)
    assert grafted.time_steps("pool", 16) == 1
    x = torch.rand(2 * backbone.time_steps(before, 16), *backbone.shapes[before])
    with torch.inference_mode():
        factors = (graft(x) / inner(x)).unflatten(0, (2, steps))
    for clip_factors, best in zip(factors, graft.predict(x), strict=True):
        kept = clip_factors.isfinite()  # where the block gives 0, no factor shows
        expected = 2 * 0.4 * graft.excitations()[best] + 0.6
        expected = expected[None, :, None, None].expand_as(clip_factors)
        torch.testing.assert_close(clip_factors[kept], expected[kept])


def test_a_graft_that_keeps_too_many_time_steps_is_refused(resnet):
    with pytest.raises(ValueError, match=r"gives \[4, 256, 14, 14\] for 4 frames; the stage gives"):
        resnet.graft("layer4.0", torch.nn.Identity())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 8}, "stem is a temporal module over 16 frames, and the clips have 8"),
        ({"sampling": "all"}, "whole videos have any number.*--frames 16"),
    ],
)
def test_other_clips_are_refused(dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(dataset(CLASSES, 3), tmp_path / "s.zarr", BuildSpec((NAME,), **options))


def test_a_file_without_a_classifier_gives_a_chain_without_one(tmp_path):
    with _weights.seeded(3):
        state = torchvision.models.get_model("mc3_18").state_dict()
    file = tmp_path / "mc3.safetensors"
    save_file({name: x for name, x in state.items() if not name.startswith("fc.")}, file)
    backbone = backbones.load(f"mc3_18:{file}")
    assert backbone.stage_names[-1] == "pool"
    assert backbone.stages[0].parameters == backbones.load("mc3_18:random-3").stages[0].parameters


def test_unknown_weights_name_the_published_tag():
    with pytest.raises(ValueError, match="Published tags: KINETICS400_V1"):
        backbones.load("r3d_18:IMAGENET1K_V1")
