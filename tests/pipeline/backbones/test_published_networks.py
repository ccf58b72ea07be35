"""Varve's families against the libraries that they come from: a chain is the whole network."""

from functools import cache

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from varve.pipeline import backbones
from varve.pipeline.backbones import _weights
from varve.pipeline.backbones.video import i3d
from varve.pipeline.registry import available, variant

try:
    import transformers
except ModuleNotFoundError:  # an extra
    transformers = None

SMALL = {
    "clip_vit": "ViT-S-32",
    "dinov2": "vit_small_patch14_dinov2",
    "i3d": "i3d",
    "mel_resnet": "mel_resnet18",
    "mvit": "mvit_v2_s",
    "resnet": "resnet18",
    "s3d": "s3d",
    "swin3d": "swin3d_t",
    "tsm_resnet": "tsm_resnet18",
    "video_resnet": "mc3_18",
    "videomae": "videomae_tiny",
    "vjepa2": "vjepa2_tiny",
}
VIDEO = ("i3d", "mvit", "s3d", "swin3d", "video_resnet")
TRANSFORMERS = ("videomae", "vjepa2")
SLOW = ("i3d", "mvit", "swin3d")
TINY = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}


def plain(family):
    """The network as its own library builds and calls it."""
    match family:
        case "clip_vit":
            return open_clip.CLIP(**open_clip.get_model_config(SMALL[family]))
        case "dinov2":
            return timm.create_model(SMALL[family], img_size=224)
        case "i3d":
            return i3d.I3D(400)
        case "videomae":
            config = transformers.VideoMAEConfig(
                **TINY, intermediate_size=384, image_size=64, num_frames=8, num_labels=7
            )
            return transformers.VideoMAEForVideoClassification(config)
        case "vjepa2":
            config = transformers.VJEPA2Config(
                **TINY, mlp_ratio=2.0, crop_size=64, frames_per_clip=8, pred_num_hidden_layers=1
            )
            return transformers.VJEPA2Model(config)
        case "resnet" | "mvit" | "s3d" | "swin3d" | "video_resnet":
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
    kinetics = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = {
        **dict.fromkeys(TRANSFORMERS, imagenet),
        "i3d": ((0.5,) * 3, (0.5,) * 3),
        "clip_vit": (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "resnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "mvit": ((0.45,) * 3, (0.225,) * 3),
        "s3d": kinetics,
        "swin3d": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "tsm_resnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "video_resnet": kinetics,
    }[family]
    x = pictures.permute(0, 3, 1, 2).float() / 255
    x = torchvision.transforms.functional.normalize(x, mean, std)
    if family == "videomae":
        return network(x.unflatten(0, (-1, 8))).logits
    if family == "vjepa2":
        return network.get_vision_features(x.unflatten(0, (-1, 8))).mean(dim=1)
    if family in VIDEO:
        return network(x.unflatten(0, (-1, 16)).transpose(1, 2))
    return network.encode_image(x) if family == "clip_vit" else network(x)


def shifted(module, inputs):
    """TSM by loops: an eighth from the next of 8 frames, an eighth from the one before."""
    (x,) = inputs
    out, F = x.clone(), x.shape[1] // 8
    for n in range(len(x)):
        out[n, :F] = x[n + 1, :F] if n % 8 < 7 else 0
        out[n, F : 2 * F] = x[n - 1, F : 2 * F] if n % 8 else 0
    return (out,)


def log_mel(sounds):
    """Compute log-mel spectrograms by loops over moments and bands, in float64."""
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


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in available("backbones")
    ],
)
def test_the_chain_is_the_whole_network(family, weight_files):
    if family in TRANSFORMERS:
        pytest.importorskip("transformers")
    backbone = backbones.load(f"{SMALL[family]}:{weight_files(family)}")
    with torch.device("meta"):
        network = plain(family)
    network.load_state_dict(_weights.read(weight_files(family)), assign=True)
    x = pictures(2, backbone)
    last = backbone.stage_names[-1]
    with torch.inference_mode():
        expected = call_plain(family, network.eval(), x)
        output = backbone.run(x, [last])[last]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


def pictures(count, backbone):
    rng, shape = np.random.default_rng(0), (count * backbone.clip_frames, *backbone.picture.shape)
    if backbone.picture.dtype == "float32":
        return torch.from_numpy(rng.uniform(-0.5, 0.5, shape).astype(np.float32))
    return torch.from_numpy(rng.integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("network", ["ViT-S-32:random-0", "vit_small_patch14_dinov2:random-0"])
def test_every_stage_that_takes_each_token_alone_declares_it(network):
    backbone = backbones.load(network)
    names = backbone.stage_names
    with torch.inference_mode():
        outputs = backbone.run(pictures(1, backbone), names)
        for before, stage in zip(names, backbone.stages[1:], strict=False):
            if backbone.stage(before).form != "tokens":
                continue
            disturbed = outputs[before].clone()
            disturbed[:, 1:] *= -2  # no shift of all channels: layer norm would remove it
            output = backbone.run(disturbed, [stage.name], start=before)[stage.name]
            tokens = stage.form == "tokens"
            first, expected = (o[:, 0] if tokens else o for o in (output, outputs[stage.name]))
            assert torch.equal(first, expected) == stage.token_wise, stage.name


@pytest.mark.parametrize(
    ("family", "count"),
    [("clip_vit", 40), ("dinov2", 8), ("resnet", 5), ("tsm_resnet", 3), ("video_resnet", 3)],
)
def test_a_family_has_its_networks(family, count, monkeypatch):
    def on_meta(make, weights, state, name):
        with torch.device("meta"):
            return make()

    monkeypatch.setattr(_weights, "construct", on_meta)
    module, built = variant("backbones", family), []
    for network in module.networks():
        try:
            built.append(module.build(network, "random-0", torch.float32).network)
        except ValueError as error:
            assert "its visual tower is" in str(error)  # noqa: PT017
    assert len(built) >= count
