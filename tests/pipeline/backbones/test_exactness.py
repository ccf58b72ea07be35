"""Resuming from what is cached gives what the whole network gives: exactly, or within a bound.

The bounds are shares of an output's largest value, stated in RECOMPUTE.md; largest seen: 7.5e-4
from float16 and 5.6e-3 from bfloat16, over ViT-B-16, DINOv2 ViT-S and ResNets, from every stage.
"""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from varve import BuildSpec, update
from varve.heads.grafts.adapter import Adapter
from varve.pipeline import backbones
from varve.stores import FeatureStore

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
T = 8

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


def pictures(backbone, clips=1, seed=0):
    """Smooth pictures, as videos are: coarse noise, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(clips * T, 3, 9, 9, generator=generator) * 255
    size = backbone.picture.size
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255)
    return fine.permute(0, 2, 3, 1).to(torch.uint8)


@pytest.mark.parametrize(
    "name",
    [
        "ViT-S-32:random-0",
        "resnet18:random-0",
        pytest.param("ViT-B-16:random-0", marks=pytest.mark.slow),
        pytest.param("resnet50:random-0", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_whole_run_from_every_stage(name):
    """Bit for bit from float32, a batch of one clip of eight frames, as a column is computed."""
    backbone = backbones.load(name)
    names = backbone.stage_names
    with torch.inference_mode():
        outputs = backbone.run(pictures(backbone), names)
        last = names[-1]
        for start, following in itertools.pairwise(names):
            resumed = backbone.run(outputs[start].clone(), [following], start=start)
            assert torch.equal(resumed[following], outputs[following]), start
        for dtype, bound in BOUND.items():
            for start in (names[-2], names[len(names) // 2]):
                rounded = backbone.run(outputs[start].to(dtype), [last], start=start)[last]
                error = (rounded - outputs[last]).abs().max() / outputs[last].abs().max()
                assert error <= bound, (start, dtype, error)


@pytest.fixture(scope="module")
def whole(dataset, built_once):
    """A store with every stage of a network in float32."""
    videos = dataset(("grow", "sway ↔", "shrink"), 1)

    def of(name):
        keep = tuple(backbones.load(name).stage_names)
        return built_once(videos, BuildSpec((name,), keep, frames=2, dtype="float32", text=False))

    return of


@pytest.mark.parametrize("name", ["ViT-S-32:random-0", "resnet18:random-0"])
def test_a_column_resumed_from_any_float32_column_has_the_same_bytes(whole, name, tmp_path):
    backbone = backbones.load(name)
    last = backbone.stage_names[-1]
    opened = FeatureStore.open(whole(name))
    wanted = opened.feature(name, last)
    expected = (wanted.path / "c/0/0/0").read_bytes()
    for start in backbone.stage_names[:-1]:
        store = tmp_path / start
        store.mkdir()
        for file in ("zarr.json", "clips.parquet"):
            shutil.copy(opened.path / file, store / file)
        source = opened.feature(name, start).path
        for path in (source, Path(f"{source}.done")):
            shutil.copytree(path, store / path.relative_to(opened.path))
        report = update(store, backbone, keep=[last])
        stages = backbone.stage_names
        assert report.decoded == 0
        assert len(report.calls) == len(stages) - 1 - stages.index(start)
        resumed = FeatureStore.open(store).feature(name, last)
        assert (resumed.path / "c/0/0/0").read_bytes() == expected, start


def adapted(backbone, layers, seed=0):
    for i in layers:
        name = f"blocks.{i}.mlp"
        width = backbone.shapes[name][-1]
        module = Adapter(backbone.stage(name).module, width=width, seed=seed + i)
        backbone = backbone.graft(name, module)
    return backbone


def train(step, module, batches, classes=3, seed=0):
    """Losses of a few steps of SGD on the adapters and a linear classifier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(384, classes, generator=generator).mul_(0.05).requires_grad_(True)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*trained, weight], lr=0.5, momentum=0.9)
    losses = []
    for x, labels in batches:
        logits = step(x).mean(dim=1) @ weight
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("layers", "after"),
    [([11], "blocks.11.attn:cls"), ([10, 11], "blocks.10.attn"), ([0, 6], "blocks.0.attn")],
)
def test_training_on_cached_tokens_is_training_with_the_whole_network(layers, after):
    """The same losses step by step: same seed, frames and precision, clips of two frames."""
    base = backbones.load("ViT-S-32:random-0")
    stage, _, reduction = after.partition(":")
    clips = [pictures(base, seed=i)[:2] for i in range(6)]
    labels = torch.arange(6) % 3
    order = np.random.default_rng(0).permuted(np.tile(np.arange(6), (2, 1)), axis=1)
    batches = [torch.from_numpy(part) for row in order for part in (row[:3], row[3:])]
    with torch.inference_mode():
        cached = torch.stack([base.run(clip, [stage])[stage] for clip in clips])
    cached = cached[:, :, 0] if reduction == "cls" else cached
    cached = cached.clone()

    in_loop = adapted(base, layers)

    def whole_network(rows):
        frames = torch.cat([clips[row] for row in rows])
        return in_loop.run(frames, ["proj"])["proj"].reshape(len(rows), 2, -1)

    modules = torch.nn.ModuleList(stage.module for stage in in_loop.stages)
    expected = train(whole_network, modules, [(rows, labels[rows]) for rows in batches])
    suffix = adapted(base, layers).suffix(after)
    losses = train(suffix, suffix, [(cached[rows], labels[rows]) for rows in batches])
    assert len(set(expected)) == 4, "nothing was learnt"
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_training_from_rounded_tokens_stays_near_the_whole_networks():
    base = backbones.load("ViT-S-32:random-0")
    clips = torch.stack([pictures(base, seed=i)[:2] for i in range(6)])
    labels = torch.arange(6) % 3
    with torch.inference_mode():
        run = [base.run(clip, ["blocks.9.mlp"])["blocks.9.mlp"] for clip in clips]
    cached = torch.stack(run).clone()
    losses = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        suffix = adapted(base, [10, 11]).suffix("blocks.9.mlp")
        losses[dtype] = train(suffix, suffix, [(cached.to(dtype), labels)] * 3)
    np.testing.assert_allclose(losses[torch.float16], losses[torch.float32], rtol=2e-3)
    np.testing.assert_allclose(losses[torch.bfloat16], losses[torch.float32], rtol=2e-2)
