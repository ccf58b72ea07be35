"""Particulars of each family: real sizes, real files, weights in all their forms."""

import io
import json
import pickle
import re
import subprocess
import sys
import urllib.error
import zipfile
from argparse import Namespace
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes
from torchvision.models.video import resnet as video
from torchvision.models.video.mvit import MSBlockConfig

from varve.pipeline import backbones
from varve.pipeline.backbones import (
    Backbone,
    Normalise,
    _weights,
    clip_vit,
    dinov2,
    parameter_digest,
    resnet,
)
from varve.pipeline.backbones.video import i3d, mvit, s3d, swin3d, video_resnet
from varve.pipeline.config import Picture
from varve.pipeline.experiments.head_inputs import resolve_name
from varve.pipeline.extraction.passes import keep_of_each
from varve.stores.digests import store_name

GOLDEN = Path(__file__).parent / "golden_keys.json"
REAL = Path(__file__).parents[3] / "../shared/weights"
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def real(name):
    file = REAL / name
    if not file.exists():
        pytest.skip(f"no {file.name}: real weights lie beside the repository, in ../shared/weights")
    return file


def noise(count, size=224, seed=0):
    numbers = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    return torch.from_numpy(numbers)


def normalised(pictures, mean_std):
    x = pictures.permute(0, 3, 1, 2).float() / 255
    return torchvision.transforms.functional.normalize(x, *mean_std)


def last(backbone, x):
    name = backbone.stage_names[-1]
    with torch.inference_mode():
        return backbone.run(x, [name])[name]


@torch.no_grad()
def fill_fast(network):
    """Parameters for a large network: drawing each number of a ViT-L takes longer than a run."""
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for i, (name, tensor) in enumerate(network.named_parameters()):
        repeats = -(-tensor.numel() // len(drawn))
        values = drawn.roll(977 * i).repeat(repeats)[: tensor.numel()].reshape(tensor.shape)
        norm = tensor.ndim == 1 and name.endswith("weight")
        tensor.copy_(1 + 0.1 * values if norm else 0.03 * values)


@pytest.mark.parametrize(
    ("network", "frames"),
    [
        ("ViT-B-32", 2),
        ("ViT-B-32-quickgelu", 1),
        pytest.param("ViT-B-16", 1, marks=pytest.mark.slow),
        pytest.param("ViT-L-14", 1, marks=pytest.mark.slow),
    ],
)
def test_a_clip_chain_is_encode_image(network, frames, monkeypatch):
    config = open_clip.get_model_config(network)
    with torch.device("meta"):
        whole = open_clip.CLIP(**config)
    fill_fast(whole.visual.to_empty(device="cpu"))
    monkeypatch.setattr(clip_vit, "_visual", lambda config: whole.visual)
    backbone = backbones.load(f"{network}:random-5")
    x = noise(frames)
    with torch.inference_mode():
        expected = whole.eval().encode_image(normalised(x, OPENAI))
    torch.testing.assert_close(last(backbone, x), expected, rtol=1e-4, atol=2e-5)
    depth = config["vision_cfg"]["layers"]
    blocks = [f"blocks.{i}.{half}" for i in range(depth) for half in ("attn", "mlp")]
    assert backbone.stage_names == ["stem", *blocks, "proj"]


def test_a_seed_gives_the_tower_that_open_clip_gives_it():
    with _weights.seeded(3):
        whole = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32"))
    proj = backbones.load("ViT-S-32:random-3").stage("proj").module
    assert torch.equal(proj.projection, whole.visual.proj)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"final_ln_after_pool": True},
        {"ls_init_value": 0.5},
        {"act_layer": QuickGELU},
        {"pos_embed_type": "sin_cos_2d"},
        {"patch_dropout": 0.5},
    ],
    ids=str,
)
def test_every_option_of_the_visual_tower_is_followed(options):
    with _weights.seeded(0):
        visual = VisionTransformer(32, 8, 24, 2, 3, 4.0, output_dim=10, **options).eval()
    x = noise(2, 32)
    with torch.inference_mode():
        expected = visual(normalised(x, OPENAI))
    chain = clip_vit.stages(visual, *OPENAI, torch.float32)
    outputs = last(Backbone("tiny:0", "tiny", chain, Picture(32, 32), torch.float32), x)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"attentional_pool": True}, "pools by attention"), ({"qk_norm": True}, "CustomResidual")],
)
def test_a_tower_that_computes_something_else_is_refused(options, what):
    visual = VisionTransformer(32, 8, 64, 1, 4, 4.0, output_dim=64, **options)
    with pytest.raises(ValueError, match=what):
        clip_vit.stages(visual, *OPENAI, torch.float32)


def test_another_activation_renames_the_stages_from_the_first_mlp_on():
    plain = backbones.load("ViT-S-32:random-0").keys("0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        config = clip_vit._config
        patch.setattr(clip_vit, "_config", lambda *a: {**config(*a), "quick_gelu": True})
        quick = backbones.load("ViT-S-32:random-0").keys("0" * 64)
    names = list(plain)
    assert [n for n in names if plain[n] == quick[n]] == names[: names.index("blocks.0.mlp")]


def test_another_mean_renames_every_stage():
    with _weights.seeded(0):
        visual = VisionTransformer(32, 8, 24, 2, 3, 4.0, output_dim=10)
    keys = []
    for mean in (OPENAI[0], (0.5, 0.5, 0.5)):
        chain = clip_vit.stages(visual, mean, OPENAI[1], torch.float32)
        keys.append(Backbone("t:0", "t", chain, Picture(32, 32), torch.float32).keys("0" * 64))
    assert not set(keys[0].values()) & set(keys[1].values())


def test_a_tag_brings_its_activation(monkeypatch, tmp_path):
    with torch.device("meta"):
        shapes = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).state_dict()
    state = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in shapes.items()}
    requests = []

    def hub_file(repo, names, name):
        requests.append((repo, name))
        return tmp_path / "open_clip_model.safetensors"

    monkeypatch.setattr(_weights, "hub_file", hub_file)
    monkeypatch.setattr(_weights, "read", lambda path: state)
    tagged = backbones.load("ViT-B-32:openai")
    assert requests == [("timm/vit_base_patch32_clip_224.openai", "ViT-B-32:openai")]
    assert tagged.name == "ViT-B-32:openai"
    assert tagged.stage("blocks.0.mlp").options["activation"] == "QuickGELU"
    assert clip_vit._config("ViT-B-32", "openai")["quick_gelu"] is True
    from_file = backbones.load("ViT-B-32:elsewhere/openai.pt")
    assert from_file.name == tagged.name
    assert from_file.stage("blocks.0.mlp").options["activation"] == "GELU"
    assert from_file.stage("blocks.0.mlp").parameters == tagged.stage("blocks.0.mlp").parameters


@pytest.mark.parametrize(
    ("network", "weights", "picture"),
    [
        ("ViT-H-14-378-quickgelu", "dfn5b", Picture(378, 378, "bicubic", "squash")),
        ("ViT-L-14-CLIPA-336", "datacomp1b", Picture(336, 336, "bilinear", "squash")),
        ("ViT-B-16-plus-240", "laion400m_e31", Picture(240, 240, "bicubic", "shortest")),
    ],
)
def test_pictures_are_those_of_the_tag(network, weights, picture):
    size = open_clip.get_model_config(network)["vision_cfg"]["image_size"]
    preprocess = clip_vit._preprocess(network, weights)
    assert clip_vit._picture(network, (size, size), preprocess) == picture


def test_oblong_pictures_are_refused():
    with pytest.raises(ValueError, match="takes pictures of 240x224"):
        clip_vit._picture("odd", (224, 240), clip_vit._preprocess("ViT-B-16", "random-0"))


@pytest.mark.parametrize(
    ("network", "tower"),
    [
        ("ViT-B-16-SigLIP", "timm's vit_base_patch16_siglip_224"),
        ("coca_ViT-B-32", "CoCa's"),
        ("RN50", "a ResNet"),
        ("ViTamin-S", "timm's vitamin_small_224"),
    ],
)
def test_networks_of_open_clip_with_another_tower_are_refused(network, tower):
    with pytest.raises(ValueError, match=f"{network}: its visual tower is {tower}"):
        backbones.load(f"{network}:random-0")


def test_a_misspelt_network_gets_suggestions():
    with pytest.raises(ValueError, match="'ViT-B16'; did you mean ViT-B-16 or"):
        backbones.load("ViT-B16:openai")
    with pytest.raises(ValueError, match="did you mean vit_small_patch14_dinov2"):
        backbones.load("vit_small_patch14_dinov2.lvd142m:lvd142m")
    with pytest.raises(ValueError, match="names no weights; give resnet18:TAG"):
        backbones.load("resnet18")
    with pytest.raises(ValueError, match=r"no precision torch\.float64"):
        backbones.load("resnet18:random-0", torch.float64)


@pytest.fixture
def no_network(monkeypatch):
    """A machine that nobody answers; every question is counted."""
    urls = []

    def urlopen(request, timeout):
        urls.append(request.full_url)
        assert timeout <= 10
        raise urllib.error.URLError("nobody there")

    monkeypatch.setattr(_weights.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere/at/all")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    return urls


@pytest.mark.parametrize(
    "name",
    ["ViT-B-16:openai", "resnet18:IMAGENET1K_V1", "vit_small_patch14_dinov2:lvd142m"],
)
def test_a_hub_that_does_not_answer_gives_an_error_with_the_next_step(name, no_network):
    network = name.partition(":")[0]
    with pytest.raises(OSError, match=f"{name}: .*could not be fetched.*{network}:/path/file"):
        backbones.load(name)
    assert len(no_network) == 1


@pytest.mark.parametrize("network", ["ViT-B-16", "resnet18", "vit_small_patch14_dinov2"])
def test_an_unknown_tag_lists_the_known_ones_and_asks_no_network(network, no_network):
    tag = {"resnet18": "IMAGENET1K_V1", "ViT-B-16": "openai"}.get(network, "lvd142m")
    with pytest.raises(ValueError, match=f"no weights '{tag}x'; did you mean .*tags: .*{tag}"):
        backbones.load(f"{network}:{tag}x")
    with pytest.raises(ValueError, match="no weights 'OpenAI'"):
        backbones.load("ViT-B-16:OpenAI")
    assert not no_network


def test_files_and_seeds_need_no_internet(no_network, tmp_path):
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "mine.safetensors")
    backbones.load(f"resnet18:{tmp_path}/mine.safetensors")
    backbones.load("resnet18:random-0")
    assert not no_network


@pytest.fixture(scope="module")
def state():
    with _weights.seeded(1):
        return torchvision.models.resnet18(num_classes=5).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_every_kind_of_file_gives_the_same_network(suffix, state, tmp_path):
    file = tmp_path / f"a.b{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    backbone = backbones.load(f"resnet18:{file}")
    assert backbone.name == "resnet18:a.b"
    assert torch.equal(backbone.stage("fc").module.weight, state["fc.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}},
    ],
)
def test_usual_wrappers_are_taken_off(wrap, state, tmp_path):
    torch.save(wrap(state), tmp_path / "w.pt")
    assert _weights.read(tmp_path / "w.pt").keys() == state.keys()


def test_a_classifier_may_be_missing_and_nothing_else(state, tmp_path):
    def load(changed):
        torch.save(changed, tmp_path / "w.pt")
        return backbones.load(f"resnet18:{tmp_path}/w.pt")

    headless = {k: v for k, v in state.items() if not k.startswith("fc.")}
    assert load(headless).stage_names[-1] == "pool"
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    uncounted = {k: v for k, v in state.items() if k not in counts}
    counted = {**state, **dict.fromkeys(counts, torch.tensor(7))}
    assert load(uncounted).keys("") == load(counted).keys("") == load(state).keys("")

    without = {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}
    with pytest.raises(ValueError, match=r"fit resnet18:w; missing: layer1\.0\.conv1\.weight\."):
        load(without)
    with pytest.raises(ValueError, match=r"missing: fc\.bias"):
        load({k: v for k, v in state.items() if k != "fc.bias"})
    with pytest.raises(ValueError, match=r"unexpected: extra\."):
        load({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"another shape: bn1\.weight \(\(65,\), not \(64,\)\)"):
        load({**state, "bn1.weight": torch.zeros(65)})
    with pytest.raises(ValueError, match=r"bn1\.weight \(\(64,\) integer, not \(64,\)\)"):
        load({**state, "bn1.weight": torch.zeros(64, dtype=torch.int8)})


def test_files_that_are_not_weights_are_refused(tmp_path, state):
    def refused(match, name="w.pt"):
        with pytest.raises(ValueError, match=match):
            _weights.read(tmp_path / name)

    with pytest.raises(FileNotFoundError, match=r"no weight file .*gone\.pt"):
        _weights.read(tmp_path / "gone.pt")
    (tmp_path / "w.safetensors").write_bytes(b"\0not at all")
    refused("cannot be read as safetensors", "w.safetensors")
    (tmp_path / "w.pt").write_bytes(b"\0not at all")
    refused(r"w\.pt is no file of torch\.save")
    (tmp_path / "w.pt").write_bytes(pickle.dumps(print, protocol=2))
    refused("holds Python objects beside its tensors .*print")
    torch.save([1], tmp_path / "w.pt")
    refused("holds a list")
    torch.save({**state, "epoch": 3}, tmp_path / "w.pt")
    refused("no tensors: epoch")
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("clip/constants.pkl", b"")
    refused("TorchScript archive.*torch.jit.load")


class Runs:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def safetensors_of(state, cut=None):
    return safetensors_bytes(state)[:cut]


def saved(value, cut=None, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()[:cut]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
SMALL = {"weight": torch.zeros(4, 300), "bias": torch.zeros(4)}
OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (LFS, "a pointer of git-lfs .*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head><title>404", "a web page .*download"),
        (b"\n <html lang=en>", "a web page"),
        (b'{"error": "no such file"}', "text .*no such file"),
        (b"\x1f\x8b\x08\0\0\0", "compressed by gzip; unpack it"),
        (b"w.pt".ljust(257, b"\0") + b"ustar\0" + bytes(249), "a tar archive; unpack it"),
    ],
)
def test_a_file_of_another_kind_is_named(data, what, suffix, tmp_path):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is {what}"):
        _weights.read(file)


@pytest.mark.parametrize(
    ("suffix", "data", "what"),
    [
        (".pt", saved(SMALL, cut=-100), "is cut off"),
        (".pt", saved(SMALL, cut=-100, **OLD), "is cut off"),
        (".safetensors", safetensors_of(SMALL, cut=-100), "is cut off"),
        (".pt", safetensors_of(SMALL), r"is a file of safetensors; name it \.safetensors"),
        (".safetensors", saved(SMALL), r"is a file of torch\.save; name it \.pt"),
        (".safetensors", saved(SMALL, **OLD), r"is a file of torch\.save; name it \.pt"),
        (
            ".pt",
            saved(torch.nn.Linear(2, 2)),
            r"is a whole pickled network \(torch\.nn.*state_dict",
        ),
        (".pt", saved(torch.nn.Linear(2, 2), **OLD), "is a whole pickled network"),
        (".pt", saved({**SMALL, "hook": Runs()}), "objects beside its tensors .*exec"),
        (".pt", saved({**SMALL, "hook": Runs()}, **OLD), "objects beside its tensors .*exec"),
    ],
)
def test_what_torch_refuses_is_named_without_its_advice(suffix, data, what, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match=what) as error:
        _weights.read(tmp_path / f"w{suffix}")
    assert not re.search("weights_only|\x1b|\n", str(error.value))


@pytest.mark.parametrize("options", [{}, OLD])
def test_a_checkpoint_with_options_and_numbers_of_numpy_is_read(options, state, tmp_path):
    checkpoint = {
        "model": state,
        "args": Namespace(lr=0.1, layers=[1, 2], folder=None),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    }
    torch.save(checkpoint, tmp_path / "w.pth", **options)
    assert _weights.read(tmp_path / "w.pth").keys() == state.keys()


@pytest.mark.parametrize(
    "prefix", ["backbone.", "model.", "module.", "encoder_q.", "_orig_mod.", "module.encoder_q."]
)
def test_a_prefix_of_all_names_is_left_out_with_a_note(prefix, state, tmp_path, caplog):
    torch.save({f"{prefix}{key}": tensor for key, tensor in state.items()}, tmp_path / "w.pt")
    backbone = backbones.load(f"resnet18:{tmp_path}/w.pt")
    assert torch.equal(backbone.stage("fc").module.weight, state["fc.weight"])
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}/w.pt: all names begin with {prefix!r}, which is left out"
    ]


def test_a_network_whose_own_names_have_a_prefix_keeps_it(state, tmp_path):
    def make():
        return torch.nn.Sequential(OrderedDict(backbone=torch.nn.Linear(2, 2)))

    with _weights.seeded(0):
        own_state = make().state_dict()
    torch.save({f"module.{key}": tensor for key, tensor in own_state.items()}, tmp_path / "w.pt")
    network = _weights.make_network(make, "mine", str(tmp_path / "w.pt"))
    assert torch.equal(network.backbone.weight, own_state["backbone.weight"])


def test_of_two_networks_in_a_checkpoint_the_first_is_read_with_a_note(state, tmp_path, caplog):
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"ema": other, "model": state}, tmp_path / "w.pt")
    assert torch.equal(_weights.read(tmp_path / "w.pt")["fc.weight"], state["fc.weight"])
    assert "'model' is read; it holds 'ema' too" in caplog.text
    torch.save({"ema": other}, tmp_path / "w.pt")
    assert torch.equal(_weights.read(tmp_path / "w.pt")["fc.weight"], other["fc.weight"])


def test_a_checkpoint_of_two_encoders_says_which_names_fit(state, tmp_path):
    both = {f"{side}.{key}": t for side in ("encoder_q", "encoder_k") for key, t in state.items()}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"names that begin with 'encoder_q\.' fit: save these"):
        backbones.load(f"resnet18:{tmp_path}/w.pt")


def test_weights_that_are_not_finite_are_refused_by_name(state, tmp_path):
    spoilt = {key: tensor.clone() for key, tensor in state.items()}
    spoilt["layer1.0.conv1.weight"].view(-1)[[3, 5, 8]] = torch.nan
    spoilt["bn1.running_var"][7] = torch.inf
    torch.save(spoilt, tmp_path / "w.pt")
    with pytest.raises(
        ValueError,
        match=r"not a number: bn1\.running_var \(1 of 64\), "
        r"layer1\.0\.conv1\.weight \(3 of 36864\)\.",
    ):
        backbones.load(f"resnet18:{tmp_path}/w.pt")


def test_a_mask_of_minus_infinity_is_no_damage():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.zeros(2))
    state = {**module.state_dict(), "mask": torch.tensor([0.0, -torch.inf])}
    _weights.fill(module, state, "linear")
    with pytest.raises(ValueError, match=r"bias \(2 of 2\)"):
        _weights.fill(module, {**state, "bias": torch.full((2,), -torch.inf)}, "linear")


@pytest.mark.parametrize("name", ["reg_token", "register_tokens"])
def test_register_tokens_and_networks_without_them_do_not_fit(name, tmp_path):
    with torch.device("meta"):
        plain = timm.create_model("vit_small_patch14_dinov2", img_size=dinov2.SIZE)
    shapes = {key: torch.zeros(tensor.shape) for key, tensor in plain.state_dict().items()}
    save_file({**shapes, name: torch.zeros(1, 4, 384)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="name the network vit_small_patch14_reg4_dinov2"):
        backbones.load(f"vit_small_patch14_dinov2:{tmp_path}/w.safetensors")
    save_file(shapes, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="name the network vit_small_patch14_dinov2"):
        backbones.load(f"vit_small_patch14_reg4_dinov2:{tmp_path}/w.safetensors")


def test_weights_that_are_written_wrongly_are_refused():
    for wrong in ("random", "random-", "random-x", "random-01", "random--1"):
        with pytest.raises(ValueError, match="random ones name their seed"):
            backbones.load(f"resnet18:{wrong}")
    with pytest.raises(ValueError, match="a weight file ends in"):
        backbones.load("resnet18:some/folder")
    assert _weights.seed_of("random-7.pt") is None


def test_where_a_file_keeps_its_tensors_changes_no_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(1000, 512, generator=generator), "bias": torch.zeros(1000)}
    x = torch.randn(1, 512, generator=generator)
    outputs = []
    for length in range(0, 64, 8):
        save_file(state, tmp_path / "w.safetensors", metadata={"note": "x" * length})
        linear = torch.nn.Linear(512, 1000)
        _weights.fill(linear, _weights.read(tmp_path / "w.safetensors"), "linear")
        with torch.inference_mode():
            outputs.append(linear(x))
        assert torch.equal(outputs[0], outputs[-1]), length


def drawn(seed):
    return backbones.load(f"resnet18:random-{seed}").stage("layer4.1").parameters


def test_a_seed_does_not_change_the_callers_generator():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = drawn(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert drawn(4) == first
    assert drawn(5) != first


def test_a_seed_gives_the_same_network_in_another_process():
    program = (
        "from varve.pipeline import backbones; "
        "print(backbones.load('resnet18:random-4').stage('layer4.1').parameters)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == drawn(4), result.stderr


@pytest.fixture(scope="module")
def clip_state():
    with _weights.seeded(2):
        return open_clip.CLIP(**open_clip.get_model_config("ViT-S-32")).state_dict()


def test_a_clip_file_may_contain_the_whole_or_the_visual_tower_alone(clip_state, tmp_path):
    bare = {k.removeprefix("visual."): v for k, v in clip_state.items() if "visual." in k}
    scalars = {k: torch.tensor(1) for k in ("input_resolution", "context_length", "vocab_size")}
    whole, visual, prefixed = (
        dict(clip_state) | scalars,
        bare,
        {f"visual.{k}": v for k, v in bare.items()},
    )
    keys = []
    for state, has_text in ((whole, True), (visual, False), (prefixed, False)):
        torch.save(state, tmp_path / "w.pt")
        backbone = backbones.load(f"ViT-S-32:{tmp_path}/w.pt")
        assert (backbone.text is not None) == has_text
        keys.append(backbone.keys(""))
    assert keys[0] == keys[1] == keys[2]
    del whole["ln_final.bias"]
    torch.save(whole, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"the text tower of ViT-S-32:w; missing: ln_final\.bias"):
        backbones.load(f"ViT-S-32:{tmp_path}/w.pt")


def test_text_features_are_those_of_encode_text(clip_state, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_vit, "PROMPTS_A_BATCH", 2)
    save_file(clip_state, tmp_path / "w.safetensors")
    with torch.device("meta"):
        whole = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32")).eval()
    whole.load_state_dict(clip_state, assign=True)
    whole.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    prompts = ["a person doing archery", "a video of brush hair", "yo yo"]
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer("ViT-S-32")(prompts)
        expected = whole.encode_text(tokens, normalize=True)
    text = backbones.load(f"ViT-S-32:{tmp_path}/w.safetensors", torch.bfloat16).text
    features = text.encode(prompts)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(text.encode(prompts[1:]), features[1:])
    assert text.encode([]).shape == (0, features.shape[1])
    random = backbones.load("ViT-S-32:random-2").text
    assert random.identity() == text.identity()
    assert torch.equal(random.encode(prompts[:1]), features[:1])


def test_a_text_side_of_another_library_is_no_text_tower():
    assert backbones.load("roberta-ViT-B-32:random-0").text is None


def test_real_resnet_weights_give_the_plain_networks_features():
    file = real("resnet18-imagenet1k.safetensors")
    backbone = backbones.load(f"resnet18:{file}")
    whole = torchvision.models.resnet18()
    whole.fc = torch.nn.Identity()
    whole.load_state_dict(load_file(file))
    x = noise(2)
    with torch.inference_mode():
        expected = whole.eval()(normalised(x, IMAGENET))
    torch.testing.assert_close(last(backbone, x), expected, rtol=1e-4, atol=1e-5)
    assert backbone.name == "resnet18:resnet18-imagenet1k"
    assert backbone.picture == Picture(224, 256, "bilinear", "shortest")
    assert backbone.stage_names == [
        "stem", *(f"layer{n}.{i}" for n in range(1, 5) for i in range(2)), "pool",
    ]  # fmt: skip


def test_real_dinov2_weights_give_timms_features():
    file = real("dinov2-vits14-fp16.safetensors")
    backbone = backbones.load(f"vit_small_patch14_dinov2:{file}")
    whole = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=224,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
    )
    x = noise(2)
    with torch.inference_mode():
        expected = whole.eval()(normalised(x, IMAGENET))
    torch.testing.assert_close(last(backbone, x), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.5
    assert backbone.picture == Picture(224, 224, "bicubic", "shortest")


def test_registers_come_before_the_patches():
    whole = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=1)
    torch.nn.init.normal_(whole.reg_token)
    torch.nn.init.normal_(whole.cls_token)
    chain = dinov2.stages(whole, *IMAGENET, torch.float32)
    backbone = Backbone("tiny:0", "tiny", chain, Picture(56, 56), torch.float32)
    x = noise(1, 56)
    with torch.inference_mode():
        tokens = backbone.run(x, ["norm"])["norm"]
        expected = whole.forward_features(normalised(x, IMAGENET))
    assert backbone.stage("norm").prefix == 5
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_a_gated_mlp_is_followed():
    whole = timm.create_model("vit_giant_patch14_dinov2", img_size=28, depth=1, init_values=0.5)
    chain = dinov2.stages(whole, *IMAGENET, torch.float32)
    backbone = Backbone("tiny:0", "tiny", chain, Picture(28, 28), torch.float32)
    x = noise(1, 28)
    with torch.inference_mode():
        expected = whole.eval()(normalised(x, IMAGENET))
    torch.testing.assert_close(last(backbone, x), expected, rtol=1e-4, atol=1e-4)


def as_picture(frame, picture):
    """The contract of `Picture`, written down once more."""
    how = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    width, height = frame.size
    if picture.resize_mode == "squash":
        resized = frame.resize((picture.size, picture.size), how[picture.interpolation])
    else:
        shorter = min(width, height)
        target = tuple(int(side * picture.resize / shorter) for side in (width, height))
        resized = frame.resize(target, how[picture.interpolation])
    left, top = (round((side - picture.size) / 2) for side in resized.size)
    cut = resized.crop((left, top, left + picture.size, top + picture.size))
    return torch.from_numpy(np.asarray(cut).copy())[None]


@pytest.mark.parametrize("size", [(320, 240), (171, 303)], ids=str)
def test_pictures_equal_those_of_the_networks_published_preprocessing(size, clip_state, tmp_path):
    width, height = size
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(across / 9 + down / 14), np.cos(across / 5), np.sin(down / 3 - across / 31)]
    frame = Image.fromarray((127.5 + 127 * np.stack(waves, -1)).astype(np.uint8))

    save_file(clip_state, tmp_path / "w.safetensors")
    clip = backbones.load(f"ViT-S-32:{tmp_path}/w.safetensors")
    with torch.device("meta"):
        whole = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32")).eval()
    whole.load_state_dict(clip_state, assign=True)
    theirs = open_clip.image_transform(224, is_train=False)(frame)
    with torch.inference_mode():
        expected = whole.encode_image(theirs[None])
    features = last(clip, as_picture(frame, clip.picture))
    assert torch.cosine_similarity(features, expected).item() >= 0.999

    cnn = backbones.load("resnet18:random-0")
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    picture = cnn.stage("stem").module.normalise(as_picture(frame, cnn.picture))
    torch.testing.assert_close(picture.contiguous(), preset(frame)[None], rtol=0, atol=1e-5)


def tiny_chains():
    """One chain a family, of parameters that no generator of random numbers has a part in."""
    block = torchvision.models.resnet.BasicBlock
    families = {
        "clip_vit": (clip_vit, OPENAI, lambda: VisionTransformer(
            16, 8, 8, 1, 2, 2.0, output_dim=4, norm_layer=LayerNorm)),
        "dinov2": (dinov2, IMAGENET, lambda: timm.models.VisionTransformer(
            16, 8, embed_dim=8, depth=1, num_heads=2, init_values=1.0, num_classes=0)),
        "resnet": (resnet, IMAGENET, lambda: torchvision.models.ResNet(
            block, [1, 1, 1, 1], num_classes=3)),
        "video_resnet": (video_resnet, KINETICS, lambda: video.VideoResNet(
            video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, 3)),
        "s3d": (s3d, KINETICS, lambda: torchvision.models.video.S3D(num_classes=3)),
        "swin3d": (swin3d, IMAGENET, lambda: torchvision.models.video.SwinTransformer3d(
            [2, 4, 4], 8, [1, 1, 1, 1], [1, 1, 1, 1], [8, 7, 7], num_classes=3)),
        "mvit": (mvit, KINETICS, lambda: torchvision.models.video.MViT(
            (32, 32), 16, [MSBlockConfig(1, 8, 8, [3] * 3, [3] * 3, [1] * 3, [1, 2, 2])] * 2,
            residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
            proj_after_attn=True, num_classes=3)),
        "i3d": (i3d, ((0.5,) * 3, (0.5,) * 3), lambda: i3d.I3D(3)),
    }  # fmt: skip
    for family, (module, mean_std, make) in families.items():
        network = make().eval()
        for i, (_, tensor) in enumerate(sorted(network.state_dict().items())):
            if tensor.is_floating_point():
                values = (np.arange(tensor.numel()) % 251 - 125 + i) / 128
                tensor.copy_(torch.from_numpy(values).reshape(tensor.shape))
        if module in (video_resnet, s3d, swin3d, mvit, i3d):
            chain = module.stages(network, Normalise(*mean_std, torch.float32, False))
        else:
            chain = module.stages(network, *mean_std, torch.float32)
        yield family, Backbone("tiny:0", "tiny", chain, Picture(16, 16), torch.float32)


def test_fingerprints_are_those_of_existing_stores():
    """A changed key makes every store recompute that stage. To mean it: change golden_keys.json."""
    fingerprints = {
        family: {stage: key[:16] for stage, key in backbone.keys("0" * 64).items()}
        for family, backbone in tiny_chains()
    }
    assert fingerprints == json.loads(GOLDEN.read_text())


def test_shapes_are_those_of_the_network_and_not_of_one_with_the_same_parameters():
    stem_shapes = {}
    for pool in (None, torch.nn.Identity()):
        network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 3)
        network.maxpool = pool or network.maxpool
        chain = resnet.stages(network, (0.5,) * 3, (0.5,) * 3, torch.float32)
        backbone = Backbone("tiny:0", "tiny", chain, Picture(64, 64), torch.float32)
        x = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        stem_shapes[pool] = tuple(backbone.run(x, ["stem"])["stem"].shape[1:])
        assert backbone.shapes["stem"] == stem_shapes[pool]
    assert len(set(stem_shapes.values())) == 2


def test_a_digest_distinguishes_names_types_and_shapes():
    def module(**tensors):
        holder = torch.nn.Module()
        for name, tensor in tensors.items():
            holder.register_buffer(name, tensor)
        return parameter_digest(holder)

    base = module(a=torch.zeros(4))
    others = [
        module(b=torch.zeros(4)),
        module(a=torch.zeros(2, 2)),
        module(a=torch.zeros(4, dtype=torch.int32)),
        module(a=torch.zeros(2), b=torch.zeros(2)),
        module(a=torch.full((4,), -0.0)),
    ]
    assert len({base, *others}) == 6
    assert module(a=torch.zeros(4, 4)[:, 0]) == base


def test_a_store_names_a_backbone_by_its_tag_or_its_files_stem():
    assert store_name("ViT-B-16:openai") == "ViT-B-16:openai"
    assert store_name("resnet18:/x/y.z/w-1.safetensors") == "resnet18:w-1"
    assert store_name("resnet18:w.PT") == "resnet18:w"
    assert store_name("resnet18:random-0") == "resnet18:random-0"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("resnet18:random-0", "pool"),
        ("ViT-S-32:random-0", "proj"),
        ("mel_resnet18:random-0", "pool"),
    ],
)
def test_the_last_vector_before_a_classifier_is_kept_by_default(name, stage):
    backbone = backbones.load(name)
    assert backbone.default_stage.name == stage
    assert [kept.name for kept, _ in keep_of_each((), {name: backbone})[name]] == [stage]


def test_a_network_of_scores_alone_keeps_them_and_one_without_vectors_is_refused(resnet):
    scores = tuple(stage for stage in resnet.stages if stage.name != "pool")
    assert replace(resnet, stages=scores).default_stage.name == "fc"
    with pytest.raises(ValueError, match=r"no stage that gives one vector .*--keep layer4\.1:"):
        replace(resnet, stages=resnet.stages[:-2]).default_stage  # noqa: B018


def test_a_block_counted_from_the_end_of_a_network_without_blocks_is_refused(resnet):
    bare = replace(resnet, stages=(resnet.stages[0], *resnet.stages[-2:]))
    with pytest.raises(ValueError, match=r"has no stages named blocks\.N\.STEP or .*pool, fc"):
        resolve_name("blocks.-1", bare)


def test_a_network_whose_chain_begins_with_its_blocks_trains_all_but_the_first(resnet):
    bare = replace(resnet, stages=resnet.stages[1:])
    assert resolve_name("blocks.-8", bare) == "layer1.0"
    with pytest.raises(ValueError, match="at most blocks=7, since no stage comes before"):
        resolve_name("blocks.-9", bare)


def test_threads_that_load_networks_at_once_load_the_same():
    expected = backbones.load("resnet18:random-0").keys("")
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(backbones.load, ["resnet18:random-0"] * 4))
    assert [network.keys("") for network in loaded] == [expected] * 4
