"""VideoMAE and V-JEPA 2 against the library transformers, stage by stage, and in a store."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from varve import BuildSpec, plan, run, update
from varve.heads.grafts.adapter import Adapter
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline import backbones
from varve.pipeline.backbones import _weights, reductions_of
from varve.pipeline.backbones.video import vjepa2
from varve.stores import FeatureStore

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
MAE = TINY | {"intermediate_size": 384, "image_size": 64, "num_frames": 8}
JEPA = TINY | {"mlp_ratio": 2.0, "crop_size": 64, "frames_per_clip": 8, "pred_num_hidden_layers": 1}
NAMES = ("videomae_tiny:random-0", "vjepa2_tiny:random-0")
CLASSES = ("grow", "shrink", "fade in")
HIDDEN = ("stem", "blocks.0.mlp", "blocks.1.mlp")


def stirred(network, seed=3):
    """The network with biases, norms and weights that all matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim == 1 else 0.5 * parameter[0].numel() ** -0.5
        parameter.data += scale * noise
    return network.eval()


def clips(seed=0):
    shape = (16, 64, 64, 3)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def normalised(x):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2).unflatten(0, (2, 8))


def saved(folder, network, config=True):
    folder.mkdir()
    save_file({k: x.contiguous() for k, x in network.state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    if config:
        (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    return folder


@torch.inference_mode()
def check(backbone, network, **options):
    """Compare every hidden state of the library with the stage that gives it."""
    x = clips()
    outputs = backbone.run(x, backbone.stage_names)
    expected = network(normalised(x), output_hidden_states=True, **options)
    assert len(expected.hidden_states) == len(HIDDEN)
    for name, hidden in zip(HIDDEN, expected.hidden_states, strict=True):
        rows = outputs[name].reshape(hidden.shape)
        torch.testing.assert_close(rows, hidden, rtol=1e-5, atol=1e-5)
        assert backbone.time_steps(name, 8) == 4
    # The step between: attention with its residual.
    resumed = backbone.run(outputs["blocks.0.attn"], ["blocks.0.mlp"], start="blocks.0.attn")
    assert torch.equal(resumed["blocks.0.mlp"], outputs["blocks.0.mlp"])
    return outputs, expected


def test_every_stage_of_a_pretrained_videomae_is_the_one_of_the_library(tmp_path):
    whole = stirred(
        transformers.VideoMAEForPreTraining(
            transformers.VideoMAEConfig(**MAE, use_mean_pooling=False, decoder_num_hidden_layers=1)
        )
    )
    backbone = backbones.load(f"videomae_tiny:{saved(tmp_path / 'videomae-mine', whole)}")
    assert backbone.name == "videomae_tiny:videomae-mine"
    assert backbone.stage_names[-2:] == ["norm", "pool"]
    outputs, expected = check(backbone, whole.videomae)
    last = expected.last_hidden_state
    torch.testing.assert_close(outputs["norm"].reshape(last.shape), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["pool"], last.mean(dim=1), rtol=1e-5, atol=1e-5)


def test_a_classifier_of_a_fine_tuned_videomae_is_the_last_stage(tmp_path):
    whole = stirred(
        transformers.VideoMAEForVideoClassification(
            transformers.VideoMAEConfig(**MAE, num_labels=5)
        )
    )
    state = dict(whole.state_dict())
    for name in list(state):  # as earlier releases have saved it
        for old, new in ((".query.bias", ".q_bias"), (".value.bias", ".v_bias")):
            if name.endswith(old):
                state[name.replace(old, new)] = state.pop(name)
    assert sum(name.endswith(("q_bias", "v_bias")) for name in state) == 4
    save_file(state, tmp_path / "old.safetensors")
    backbone = backbones.load(f"videomae_tiny:{tmp_path / 'old.safetensors'}")
    assert backbone.stage_names[-2:] == ["pool", "fc"]
    outputs, _ = check(backbone, whole.videomae)
    with torch.inference_mode():
        logits = whole(normalised(clips())).logits
    torch.testing.assert_close(outputs["fc"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("around", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
def test_every_stage_of_vjepa2_is_the_one_of_the_library(tmp_path, around):
    whole = stirred(getattr(transformers, around)(transformers.VJEPA2Config(**JEPA)))
    backbone = backbones.load(f"vjepa2_tiny:{saved(tmp_path / 'vjepa2-mine', whole)}")
    encoder = getattr(whole, "vjepa2", whole)
    outputs, expected = check(backbone, encoder, skip_predictor=True)
    last = expected.last_hidden_state
    torch.testing.assert_close(outputs["norm"].reshape(last.shape), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["pool"], last.mean(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [12, 64, 88])
def test_rotary_positions_turn_pairs_of_channels_for_time_rows_and_columns(width):
    grid, rng = (2, 3, 3), np.random.default_rng(0)
    x = rng.normal(size=(18, width))
    expected, n = x.copy(), 2 * (width // 6)
    for token in range(18):
        for axis, position in enumerate((token // 9, token // 3 % 3, token % 3)):
            for j in range(0, n, 2):
                for channel, sign in ((j, -1), (j + 1, 1)):
                    k = channel % (n // 2)
                    angle = position * 10000 ** (-2 * k / n)
                    other = x[token, axis * n + (j + 1 if channel == j else j)]
                    value = x[token, axis * n + channel]
                    turned = value * np.cos(angle) + sign * other * np.sin(angle)
                    expected[token, axis * n + channel] = turned
    cos, sin = vjepa2.rotation(grid, width)
    actual = vjepa2.rotated(torch.from_numpy(x).float()[None, None], cos, sin)[0, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_name_of_a_network_decides_its_frames(monkeypatch, tmp_path):
    """Positions enter the attention alone, so that the parameters fit clips of any length."""
    whole = stirred(transformers.VJEPA2Model(transformers.VJEPA2Config(**JEPA)))
    folder = saved(tmp_path / "v", whole)
    monkeypatch.setitem(vjepa2.NETWORKS, "vjepa2_tiny_4", (192, 2, 3, 2.0, 64, 4))
    short, long = (backbones.load(f"{name}:{folder}") for name in ("vjepa2_tiny_4", "vjepa2_tiny"))
    assert (short.clip_frames, long.clip_frames) == (4, 8)
    assert [s.parameters for s in short.stages] == [s.parameters for s in long.stages]
    assert not set(short.keys("0").values()) & set(long.keys("0").values())
    for first, second in (("vjepa2_vitl", "vjepa2_vitl_16"), ("vjepa2_vitg", "vjepa2_vitg_16")):
        (*same, frames), (*other, fewer) = vjepa2.NETWORKS[first], vjepa2.NETWORKS[second]
        assert (same, frames, fewer) == (other, 64, 16)


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    whole = transformers.VJEPA2Model(transformers.VJEPA2Config(**JEPA))
    folder = saved(tmp_path / "v", whole)
    with pytest.raises(ValueError, match=r"hidden_size=1024, and config\.json .* has 192"):
        backbones.load(f"vjepa2_vitl:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        backbones.load(f"vjepa2_tiny:{folder}")
    (folder / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="an activation 'relu'"):
        backbones.load(f"vjepa2_tiny:{folder}")
    with pytest.raises(ValueError, match="the weights do not fit"):
        backbones.load(f"videomae_tiny:{folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        backbones.load(f"vjepa2_tiny:{tmp_path / 'empty'}")
    (folder / "config.json").unlink()
    requests = []

    def hub_file(repo, names, name):
        requests.append((repo, name))
        return folder / "model.safetensors"

    monkeypatch.setattr(_weights, "hub_file", hub_file)
    backbone = backbones.load("vjepa2_tiny:someone/vjepa2-tiny")
    assert backbone.name == "vjepa2_tiny:someone/vjepa2-tiny"
    assert requests == [("someone/vjepa2-tiny", "vjepa2_tiny:someone/vjepa2-tiny")] * 2


def test_the_library_leaves_no_method_in_the_modules_of_torch(monkeypatch):
    """A custom module's key follows the class of torch, so that it must not change meanwhile."""
    if hasattr(torch.nn.Module, "smart_apply"):  # of a network that a test made
        monkeypatch.delattr(torch.nn.Module, "smart_apply")
    before = {*vars(torch.nn.Module)}
    for name in NAMES:
        backbones.load(name)
    assert {*vars(torch.nn.Module)} == before


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'varve\[transformers\]'"):
        backbones.load("videomae_base:random-0")


@pytest.fixture(scope="module")
def store(dataset, built_once, tmp_path_factory):
    keep = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn:mean", "blocks.1.mlp:map", "pool")
    spec = BuildSpec(NAMES, keep=keep, frames=8, dtype="float32")
    path = tmp_path_factory.mktemp("tokens") / "s.zarr"
    shutil.copytree(built_once(dataset(CLASSES, 3), spec), path)  # a run adds teacher features
    return FeatureStore.open(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_store_has_the_tokens_of_each_time_step(store, name):
    shapes = {feature: store.feature(name, feature).shape for feature in (
        "blocks.0.mlp", "blocks.1.attn:mean", "blocks.1.mlp:map", "pool")}  # fmt: skip
    assert shapes == {
        "blocks.0.mlp": (9, 4, 16, 192),
        "blocks.1.attn:mean": (9, 4, 192),
        "blocks.1.mlp:map": (9, 4, 192, 4, 4),
        "pool": (9, 1, 192),
    }
    stage = backbones.load(name).stage("blocks.1.mlp")
    assert {"map", "mean", "tokens", "grid7"} <= set(reductions_of(stage))
    assert "cls" not in reductions_of(stage)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["blocks.1.attn", "blocks.1.mlp"])
def test_an_adapter_is_updated_from_the_cache_alone(store, name, stage):
    backbone = backbones.load(name)
    graft = Adapter(backbone.stage(stage).module, 192, bottleneck=4)
    with torch.no_grad():
        graft.up.normal_(generator=torch.Generator().manual_seed(0))
    grafted = backbone.graft(stage, graft)
    planned, _ = plan(store.path, grafted, keep=["pool"], estimate=False)
    assert (planned.decodes, planned.clips) == (0, 9)
    report = update(store.path, grafted, keep=["pool"])
    assert report.decoded == 0
    # From the deepest feature that is valid and whole.
    begin = backbone.stage_names.index("blocks.0.mlp") + 1
    assert {call.split()[1] for call in report.calls} == set(backbone.stage_names[begin:])
    opened = FeatureStore.open(store.path)
    updated = opened.feature(name, "pool", fingerprint=report.fingerprints["pool"]).read([0])
    x = torch.from_numpy(store.feature(name, "blocks.0.mlp").read([0]))
    suffix = grafted.suffix("blocks.0.mlp", keep=["pool"])
    with torch.inference_mode():
        expected = suffix(x)["pool"]
    np.testing.assert_allclose(updated, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(updated, store.feature(name, "pool").read([0]))


@pytest.mark.parametrize("name", NAMES)
def test_class_regularization_and_adapters_train_on_it(store, name, tmp_path):
    options = {"blocks": 1, "first_epochs": 1, "epochs": 1, "batch_size": 4}
    for more in ({}, {"graft": "adapter", "strengths": [0.0] * 4}):
        done = run(store, "class_regularization", "2+1x1", options=options | more,
                   backbone=name, out=tmp_path)  # fmt: skip
        stages = set(backbones.load(name).stage_names)
        ran = {"blocks.1.attn", "blocks.1.mlp", "norm", "pool"} & stages
        assert done.cost["stages_recomputed"][1].keys() == ran


@pytest.mark.parametrize("name", NAMES)
def test_grafts_over_frames_are_refused(store, name, tmp_path):
    backbone = backbones.load(name)
    for stage in ("blocks.1.attn", "blocks.1.mlp"):
        inner = backbone.stage(stage).module
        with pytest.raises(ValueError, match="HFGate on a block of a 3D network"):
            HFGate(inner, 192, frames=4)
        with pytest.raises(ValueError, match="TemporalShift on a block of a 3D network"):
            TemporalShift(inner, frames=4)
    with pytest.raises(ValueError, match="HFGate on a block of a 3D network"):
        run(store, "hf_net", "2+1x1", options={"blocks": 1}, backbone=name, out=tmp_path)
    with pytest.raises(ValueError, match="TRN"):
        run(store, "class_regularization", "2+1x1", options={"blocks": 1, "encoder": "trn"},
            backbone=name, out=tmp_path)  # fmt: skip
