"""Long runs: many kills, and real videos through real networks."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.extraction.build import build
from varve.stores import FeatureStore

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared"
OPTIONS = ["--backbone=resnet18:random-0", "--keep=layer1.1:grid7", "--keep=pool", "--frames=16"]

pytestmark = pytest.mark.slow


def bytes_of(store: Path) -> dict[str, bytes]:
    files = (p for p in store.rglob("*") if p.is_file() and "logs" not in p.parts)
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def test_twenty_kills_in_the_middle_of_work_change_no_byte(tmp_path):
    make_dataset(tmp_path / "set", clips_per_class=8)
    spec = BuildSpec(("resnet18:random-0",), ("layer1.1:grid7", "pool"), frames=16)
    build(tmp_path / "set", tmp_path / "whole.zarr", spec, runtime=Runtime(serial=True))
    store, seed = tmp_path / "killed.zarr", int(time.time())
    rng = random.Random(seed)
    command = [sys.executable, "-m", "varve", "build", str(tmp_path / "set"), "--store", str(store)]
    command += OPTIONS
    for _ in range(20):
        process = subprocess.Popen(
            command, start_new_session=True, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(rng.uniform(3, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert bytes_of(store) == bytes_of(tmp_path / "whole.zarr"), seed


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="no real videos beside the repository")
@pytest.mark.parametrize("network", ["resnet18", "vit_small_patch14_dinov2"])
def test_real_videos_and_weights_give_what_the_libraries_give(tmp_path, network):
    """Frames by a whole decode, pictures by torchvision, features by the library's own model."""
    import av
    import timm
    import torch
    import torchvision
    from safetensors.torch import load_file
    from torchvision import transforms

    if network == "resnet18":
        weights = SHARED / "weights" / "resnet18-imagenet1k.safetensors"
        model = torchvision.models.resnet18()
        model.load_state_dict(load_file(weights), strict=False)
        model.fc = torch.nn.Identity()
        resize = transforms.Resize(256, transforms.InterpolationMode.BILINEAR)
    else:
        weights = SHARED / "weights" / "dinov2-vits14-fp16.safetensors"
        model = timm.create_model(network, pretrained=False, img_size=224, num_classes=0)
        state = {name: tensor.float() for name, tensor in load_file(weights).items()}
        model.load_state_dict(
            timm.models.vision_transformer.checkpoint_filter_fn(state, model), strict=False
        )
        resize = transforms.Resize(224, transforms.InterpolationMode.BICUBIC)
    model.eval()
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    preprocess = transforms.Compose(
        [resize, transforms.CenterCrop(224), transforms.ToTensor(), normalise]
    )

    spec = BuildSpec((f"{network}:{weights}",), dtype="float32")
    build(SHARED / "data" / "ucf101_few", tmp_path / "s.zarr", spec, runtime=Runtime(serial=True))
    store = FeatureStore.open(tmp_path / "s.zarr")
    (feature,) = store.features()
    for row in range(0, 15, 2):
        path = SHARED / "data" / "ucf101_few" / store.clips.at[row, "path"]
        with av.open(str(path)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        assert len(frames) == store.clips.at[row, "num_frames"]
        chosen = [frames[(2 * i + 1) * len(frames) // 16] for i in range(8)]
        with torch.inference_mode():
            expected = model(torch.stack([preprocess(frame) for frame in chosen])).numpy()
        got = feature.read([row])[0]
        cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1)
        cosine = cosine / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.9999
