"""I3D against the same network in functions of torch, under the names of a public weight file."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from varve.pipeline import backbones
from varve.pipeline.backbones.video.i3d import LAYERS, pad_same

UNITS = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
POOLS = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
ENDPOINTS = [
    *("Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "MaxPool3d_3a_3x3"),
    *("Mixed_3b", "Mixed_3c", "MaxPool3d_4a_3x3", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e"),
    *("Mixed_4f", "MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c"),
]


@pytest.fixture(scope="module")
def state():
    """Weights under the names of `rgb_imagenet.pt`, for 7 classes, that keep values near one."""
    rng = np.random.default_rng(0)
    state = {}

    def unit(name, inputs, outputs, kernel):
        shape = (outputs, inputs, kernel, kernel, kernel)
        scale = (2 / (inputs * kernel**3)) ** 0.5
        tensors = {
            "conv3d.weight": rng.normal(size=shape) * scale,
            "bn.weight": rng.uniform(0.5, 1.5, outputs),
            "bn.bias": rng.normal(size=outputs) * 0.1,
            "bn.running_mean": rng.normal(size=outputs) * 0.1,
            "bn.running_var": rng.uniform(0.5, 1.5, outputs),
        }
        for part, values in tensors.items():
            state[f"{name}.{part}"] = torch.from_numpy(values).float()

    unit("Conv3d_1a_7x7", 3, 64, 7)
    unit("Conv3d_2b_1x1", 64, 64, 1)
    unit("Conv3d_2c_3x3", 64, 192, 3)
    inputs = 192
    for name, b0, b1a, b1b, b2a, b2b, b3b in (
        ("Mixed_3b", 64, 96, 128, 16, 32, 32),
        ("Mixed_3c", 128, 128, 192, 32, 96, 64),
        ("Mixed_4b", 192, 96, 208, 16, 48, 64),
        ("Mixed_4c", 160, 112, 224, 24, 64, 64),
        ("Mixed_4d", 128, 128, 256, 24, 64, 64),
        ("Mixed_4e", 112, 144, 288, 32, 64, 64),
        ("Mixed_4f", 256, 160, 320, 32, 128, 128),
        ("Mixed_5b", 256, 160, 320, 32, 128, 128),
        ("Mixed_5c", 384, 192, 384, 48, 128, 128),
    ):
        unit(f"{name}.b0", inputs, b0, 1)
        unit(f"{name}.b1a", inputs, b1a, 1)
        unit(f"{name}.b1b", b1a, b1b, 3)
        unit(f"{name}.b2a", inputs, b2a, 1)
        unit(f"{name}.b2b", b2a, b2b, 3)
        unit(f"{name}.b3b", inputs, b3b, 1)
        inputs = b0 + b1b + b2b + b3b
    state["logits.conv3d.weight"] = torch.from_numpy(rng.normal(size=(7, 1024, 1, 1, 1))).float()
    state["logits.conv3d.bias"] = torch.from_numpy(rng.normal(size=7)).float()
    return state


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "rgb_imagenet.pt"
    torch.save(state, path)
    return path


def padded(x, kernel, stride):
    """Zeros as TensorFlow's SAME puts them: by what the size leaves of a stride."""
    widths = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        widths = [total // 2, total - total // 2, *widths]
    return functional.pad(x, widths)


def outputs_of(state, clips):
    """The output [B, C, T, H, W] of every part, and the logits [B, classes]."""

    def unit(x, name, stride=1):
        weight = state[f"{name}.conv3d.weight"]
        x = functional.conv3d(padded(x, weight.shape[2:], [stride] * 3), weight, stride=stride)
        mean, var, gain, bias = (
            state[f"{name}.bn.{part}"][:, None, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((x - mean) / torch.sqrt(var + 0.001) * gain + bias)

    def pooled(x, kernel, stride):
        x = torch.nn.functional.max_pool3d(padded(x, kernel, stride), kernel, stride)
        return x

    outputs, x = {}, clips
    for name in ENDPOINTS:
        if name.startswith("Conv3d"):
            x = unit(x, name, 2 if name == "Conv3d_1a_7x7" else 1)
        elif name in POOLS:
            x = pooled(x, *POOLS[name])
        else:
            b = f"{name}.b"
            branches = (
                unit(x, f"{b}0"),
                unit(unit(x, f"{b}1a"), f"{b}1b"),
                unit(unit(x, f"{b}2a"), f"{b}2b"),
                unit(pooled(x, (3, 3, 3), (1, 1, 1)), f"{b}3b"),
            )
            x = torch.cat(branches, dim=1)
        outputs[name] = x
    x = functional.avg_pool3d(x, (2, 7, 7), (1, 1, 1))
    logits = functional.conv3d(x, state["logits.conv3d.weight"], state["logits.conv3d.bias"])
    return outputs, logits.mean(dim=2)[:, :, 0, 0]


@pytest.mark.parametrize("network", ["i3d", pytest.param("i3d_64", marks=pytest.mark.slow)])
def test_every_stage_is_the_part_of_the_paper(state, file, network):
    backbone = backbones.load(f"{network}:{file}")
    T = backbone.clip_frames
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (T, 224, 224, 3), np.uint8))
    with torch.inference_mode():
        outputs = backbone.run(x, backbone.stage_names)
        expected, logits = outputs_of(state, (x.float() / 255 * 2 - 1).permute(3, 0, 1, 2)[None])
    assert [part for _, part, _ in LAYERS] == ENDPOINTS
    for stage, part, _ in LAYERS:
        torch.testing.assert_close(
            outputs[stage], expected[part][0].transpose(0, 1), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(outputs["fc"], logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("network", "frames"), [("i3d", 16), ("i3d_64", 64)])
def test_a_stage_gives_the_time_steps_of_its_part(network, frames):
    backbone = backbones.load(f"{network}:random-0")
    names = ("stem", "pool3", "layer3.1", "pool4", "layer4.4", "pool5", "layer5.1", "pool", "fc")
    steps = [backbone.time_steps(name, frames) for name in names]
    assert steps == [frames // n for n in (2, 2, 2, 4, 4, 8, 8, frames, frames)]
    assert backbone.shapes["stem"] == (64, 112, 112)
    assert backbone.shapes["layer3.1"] == (480, 28, 28)
    assert backbone.shapes["pool5"] == (832, 7, 7)
    assert backbone.shapes["pool"] == (1024,)
    assert backbone.default_stage.name == "pool"


def test_a_public_file_fits_by_name_and_all_of_it_is_used(state, file, tmp_path):
    expected = backbones.load(f"i3d:{file}")
    assert expected.name == "i3d:rgb_imagenet"
    assert len(expected.stage("fc").module.convolution.weight) == 7
    # As newer files have it, with torch's counts of batches and a wrapper's prefix.
    counted = {f"module.{name}": tensor for name, tensor in state.items()}
    counted["module.Mixed_3b.b0.bn.num_batches_tracked"] = torch.tensor(3)
    save_file(counted, tmp_path / "counted.safetensors")
    again = backbones.load(f"i3d:{tmp_path / 'counted.safetensors'}")
    assert again.keys("0") == expected.keys("0")
    headless = {name: x for name, x in state.items() if not name.startswith("logits")}
    save_file(headless, tmp_path / "headless.safetensors")
    assert backbones.load(f"i3d:{tmp_path / 'headless.safetensors'}").stage_names[-1] == "pool"
    for name, wrong in (
        ("missing: Mixed_5c.b3b.conv3d.weight", "Mixed_5c.b3b.conv3d.weight"),
        ("unexpected: Mixed_6a.weight", "Mixed_6a.weight"),
    ):
        changed = dict(state)
        if changed.pop(wrong, None) is None:
            changed[wrong] = torch.zeros(1)
        save_file(changed, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=name):
            backbones.load(f"i3d:{tmp_path / 'wrong.safetensors'}")


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [4, 7, 8, 15])
def test_padding_is_that_of_tensorflow(size, stride, kernel):
    x = torch.ones(1, 1, size, size + 1, size + 2)
    kernels, strides = (kernel,) * 3, (stride,) * 3
    actual, expected = pad_same(x, kernels, strides), padded(x, kernels, strides)
    assert torch.equal(actual, expected) or stride > kernel  # gaps between windows
    counts = functional.max_pool3d(actual, kernels, strides).shape[2:]
    assert counts == tuple(-(-n // stride) for n in (size, size + 1, size + 2))
