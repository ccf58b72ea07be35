"""Measure the cost of a changed network with a store, compared with no store.

    python benchmarks/bench_recompute.py [--clips 8] [--precision float32] [--part vit]... [--json]

Each run measures the same clips with T frames:

  update   computing the new columns after a change, from the deepest valid feature: the whole call,
           and its forward alone, as a share of a full forward (the network alone on decoded frames
           in the same batches and threads). It cannot be less than the changed share of the
           network: layers of the ViT, multiply-adds of the ResNet, whose blocks differ in cost
  epoch    one epoch of training the changed part (SGD, batches of 4 clips, forward and backward) on
           the cached feature, compared with the same epoch from video: decord, the frozen part
           without gradients, then the same suffix
  losses   four steps (batches of 3 clips) of training adapters and a classifier, on the cached
           feature and with the whole network in the loop, on the same frames: the largest relative
           difference of a loss
  expert   one epoch of a spatiotemporal expert of StPR (three layers, width 512, 9.46 M
           parameters, batches of 40) on a frozen CLIP: cached frame features compared with video

ViT-B-16 has adapters in its last K layers; K = 1 needs only the class token. ResNet-50 is trained
from one of its layers on. The update counts decodes, calls of unchanged stages, and bytes read.
Without --dataset the videos are synthetic, 320 x 240.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_build import dataset
from torch import Tensor, nn

from varve import BuildSpec, Runtime, build, update
from varve.heads.grafts.adapter import Adapter
from varve.pipeline import backbones
from varve.pipeline.backbones import Backbone
from varve.pipeline.config import FrameSet
from varve.pipeline.decoders import Decoded, Request, Stretch, decode
from varve.pipeline.extraction.passes import new_execution
from varve.stores import Feature, FeatureStore

VIT, RESNET = "ViT-B-16:random-0", "resnet50:random-0"
LAYERS = (1, 2, 3, 6, 12)
FIRST = {"layer4": "layer3.5", "layer3": "layer2.3", "layer2": "layer1.2", "layer1": "stem"}
CLASSES = 12
BATCH = 4
PARTS = ("vit", "resnet", "losses", "expert")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, so that buffers do not cause page faults at every step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def source_of(layers: int) -> str:
    """Return the feature from which adapters in the last `layers` layers of a ViT-B train."""
    return f"blocks.{12 - layers}.attn" + (":cls" if layers == 1 else "")


def adapted(backbone: Backbone, layers: int, seed: int = 0) -> Backbone:
    """Return a ViT-B with adapters in its last layers, as after some training."""
    for i in range(12 - layers, 12):
        name = f"blocks.{i}.mlp"
        adapter = Adapter(backbone.stage(name).module, width=768, seed=seed + i)
        with torch.no_grad():  # a new adapter changes nothing
            adapter.up.normal_(std=0.01, generator=torch.Generator().manual_seed(i))
        backbone = backbone.graft(name, adapter)
    return backbone


def unfrozen(backbone: Backbone, layer: str) -> Backbone:
    """Return a ResNet whose layers from `layer` on have changed, as after some training."""
    begin = backbone.stage_names.index(FIRST[layer]) + 1
    new = backbone.unfreeze(*[n for n in backbone.stage_names[begin:] if n.startswith("layer")])
    with torch.no_grad():
        for name in backbone.stage_names[begin:]:
            for parameter in new.stage(name).module.parameters():
                parameter.mul_(1.001)
    return new


def full_forward(backbone: Backbone, clips: int, frames: int) -> float:
    """Return seconds of the network alone on decoded frames, in the batches of an update.

    A few clips are measured, since all clips are the same amount of work.
    """
    execution = new_execution(
        BuildSpec(("x:random-0",), frames=frames).frame_sets(backbone.picture)[0], "cpu"
    )
    torch.set_num_threads(execution.threads)
    side, last = backbone.picture.size, backbone.stage_names[-1]
    batch = execution.batch_clips
    pictures = torch.randint(0, 256, (batch * frames, side, side, 3), dtype=torch.uint8)
    with torch.inference_mode():
        backbone.run(pictures, [last])
        began, batches = time.perf_counter(), max(1, min(clips, 4) // batch)
        for _ in range(batches):
            backbone.run(pictures, [last])
    return (time.perf_counter() - began) / batches / batch * clips


def video_batches(paths: list[Path], frames: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode frames, uint8 [B * T, 224, 224, 3], with labels, as an ordinary training loop does."""
    import decord
    from PIL import Image

    for start in range(0, len(paths), BATCH):
        pictures = []
        for path in paths[start : start + BATCH]:
            reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
            centres = (2 * np.arange(frames) + 1) * len(reader) // (2 * frames)
            for frame in reader.get_batch(centres).asnumpy():
                image = Image.fromarray(frame)
                scale = 224 / min(image.size)
                size = tuple(max(224, round(side * scale)) for side in image.size)
                image = image.resize(size, Image.Resampling.BICUBIC)
                left, top = ((side - 224) // 2 for side in image.size)
                pictures.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
        labels = torch.arange(start, min(start + BATCH, len(paths))) % CLASSES
        yield torch.from_numpy(np.stack(pictures)), labels


def cached_batches(
    feature: Feature, clips: int, precision: torch.dtype, size: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read cells [B, T, ...] in a random order, with labels."""
    order = np.random.default_rng(0).permutation(clips)
    for start in range(0, clips, size):
        rows = order[start : start + size]
        yield torch.from_numpy(feature.read(rows)).to(precision), torch.from_numpy(rows % CLASSES)


def epoch(
    module: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], prefix: Callable[[Tensor], Tensor]
) -> float:
    """Train a module and a classifier for one epoch, and return its seconds."""
    trained = [p for p in module.parameters() if p.requires_grad]
    weight: Tensor | None = None
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    began = time.perf_counter()
    for x, labels in batches:
        y = module(prefix(x)).float()
        y = y if y.ndim == 3 else y.unflatten(0, (len(labels), -1))
        if weight is None:
            weight = torch.randn(CLASSES, y.shape[-1]).requires_grad_(True)
            optimizer.add_param_group({"params": [weight]})
        loss = nn.functional.cross_entropy(y.mean(dim=1) @ weight.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def measure_change(
    store: Path, paths: list[Path], new: Backbone, source: str, share: float, options: Any
) -> dict[str, float]:
    """Measure the update and an epoch of one changed network."""
    clips, frames = len(paths), options.frames
    precision = getattr(torch, options.precision)
    last = new.stage_names[-1]
    began = time.perf_counter()
    report = update(store, new, keep=[last])
    seconds = time.perf_counter() - began
    assert not len(report.failed)
    assert report.computed == clips
    stage = source.partition(":")[0]
    before = new.stage_names[: new.stage_names.index(stage) + 1]
    full = statistics.mean(full_forward(new, clips, frames) for _ in range(2))

    suffix = new.suffix(source).train()
    feature = FeatureStore.open(store).feature(new.name, source)

    def prefix(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            x = new.run(pictures, [stage])[stage]
        return x[:, 0] if source.endswith(":cls") else x

    from_cache = epoch(suffix, cached_batches(feature, clips, precision), lambda x: x)
    from_video = epoch(suffix, video_batches(paths, frames), prefix)
    return {
        "decodes": report.decoded,
        "calls_of_unchanged": sum(report.calls.get(f"{new.name} {n}", 0) for n in before),
        "calls": sum(report.calls.values()),
        "megabytes_read": report.bytes_read / 1e6,
        "update_seconds": seconds,
        "update_forward_seconds": report.seconds["forward"],
        "full_forward_seconds": full,
        "changed_share": share,
        "update_to_full": seconds / full,
        "forward_to_full": report.seconds["forward"] / full,
        "to_limit": report.seconds["forward"] / full / share,
        "epoch_cache_seconds": from_cache,
        "epoch_video_seconds": from_video,
        "epoch_speedup": from_video / from_cache,
    }


def losses(store: Path, paths: list[Path], vit: Backbone, layers: int) -> dict[str, float]:
    """Compare the losses of training from the cache and with the whole network."""
    feature = FeatureStore.open(store).feature(vit.name, source_of(layers))
    frames = FrameSet(frames=feature.shape[1], picture=vit.picture)
    pictures = []
    for path in paths[:6]:
        answer = decode(Request(str(path), (Stretch(),), (frames,)))[0]
        assert isinstance(answer, Decoded), answer
        pictures.append(torch.from_numpy(answer.frames[0]))
    cells = torch.from_numpy(feature.read(np.arange(len(pictures))))
    whole, ours = adapted(vit, layers), adapted(vit, layers)
    suffix = ours.suffix(source_of(layers))

    def in_loop(rows: Tensor) -> Tensor:
        x = torch.cat([pictures[row] for row in rows.tolist()])
        return whole.run(x, ["proj"])["proj"].unflatten(0, (len(rows), -1))

    runs = []
    modules = nn.ModuleList(stage.module for stage in whole.stages)
    for forward, module in ((in_loop, modules), (lambda rows: suffix(cells[rows]), suffix)):
        weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
        weight.requires_grad_(True)
        trained = [*(p for p in module.parameters() if p.requires_grad), weight]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        steps = []
        for step in range(4):
            rows = torch.arange(6)[step % 2 :: 2]
            logits = forward(rows).float().mean(dim=1) @ weight.T
            loss = nn.functional.cross_entropy(logits, rows % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        runs.append(np.array(steps))
    return {
        "first_loss": runs[0][0],
        "last_loss": runs[0][-1],
        "largest_difference": float(np.max(np.abs(runs[0] - runs[1]) / runs[0])),
    }


class Expert(nn.Module):
    """Spatiotemporal expert of StPR: [CLS; V_1 ... V_T] through three pre-norm layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 2, 2048, dropout=0.0, batch_first=True,
                                           norm_first=True)  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.cls = nn.Parameter(torch.zeros(1, 1, 512))

    def forward(self, v_BTD: Tensor) -> Tensor:
        tokens = torch.cat([self.cls.expand(len(v_BTD), -1, -1), v_BTD.float()], dim=1)
        y: Tensor = self.layers(tokens)[:, :1]
        return y


def expert(store: Path, paths: list[Path], vit: Backbone, options: Any) -> dict[str, float]:
    """Measure an epoch of the expert on cached features and from video."""
    clips = len(paths)
    feature = FeatureStore.open(store).feature(vit.name, "proj")

    def prefix(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return vit.run(pictures, ["proj"])["proj"].unflatten(0, (-1, options.frames))

    # The clips are few: several epochs are timed.
    module, epochs = Expert(), 10
    epoch(module, cached_batches(feature, clips, torch.float32, 40), lambda x: x)
    began = time.perf_counter()
    for _ in range(epochs):
        epoch(module, cached_batches(feature, clips, torch.float32, 40), lambda x: x)
    from_cache = (time.perf_counter() - began) / epochs
    from_video = epoch(module, video_batches(paths, options.frames), prefix)
    return {
        "epoch_cache_seconds": from_cache,
        "epoch_video_seconds": from_video,
        "epoch_speedup": from_video / from_cache,
    }


def multiply_adds(backbone: Backbone) -> dict[str, float]:
    """Count the multiply-adds of each stage's convolutions and linear layers for one frame."""
    counted: dict[str, float] = {}
    x = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    with torch.inference_mode():
        for stage in backbone.stages:
            total = [0.0]

            def count(module: Any, _: Any, y: Tensor, total: list[float] = total) -> None:
                total[0] += y.numel() * module.weight[0].numel()

            hooks = [
                m.register_forward_hook(count)
                for m in stage.module.modules()
                if isinstance(m, nn.Conv2d | nn.Linear)
            ]
            x = stage.module(x)
            for hook in hooks:
                hook.remove()
            counted[stage.name] = total[0]
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = options.part or list(PARTS)
    logging.disable(logging.INFO)
    keep_freed_memory()
    precision = getattr(torch, options.precision)
    results: dict[str, dict[str, float]] = {}

    with dataset(options.dataset, options.clips) as root, tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "s.zarr"
        common = {"frames": options.frames, "precision": options.precision, "text": False,
                  "dtype": options.precision}  # fmt: skip
        serial = Runtime(serial=True)
        if {"vit", "expert", "losses"} & set(parts):
            layers = LAYERS if "vit" in parts else LAYERS[:3] if "losses" in parts else ()
            keep = ("proj", *map(source_of, layers))
            build(root, store, BuildSpec((VIT,), keep, **common), runtime=serial)
            vit = backbones.load(VIT, precision)
        if "resnet" in parts:
            keep = ("pool", *FIRST.values())
            build(root, store, BuildSpec((RESNET,), keep, **common), runtime=serial)
        table = FeatureStore.open(store).clips
        paths = [root / path for path in table["path"]]
        if "vit" in parts:
            for layers in LAYERS:
                new = adapted(vit, layers)
                results[f"ViT-B-16, last {layers}"] = measure_change(
                    store, paths, new, source_of(layers), layers / 12, options
                )
        if "resnet" in parts:
            resnet = backbones.load(RESNET, precision)
            costs = multiply_adds(backbones.load(RESNET))
            names = resnet.stage_names
            for layer, source in FIRST.items():
                changed = sum(costs[n] for n in names[names.index(source) + 1 :])
                share = changed / sum(costs.values())
                new = unfrozen(resnet, layer)
                results[f"ResNet-50, {layer} on"] = measure_change(
                    store, paths, new, source, share, options
                )
        for layers in LAYERS[:3] if "losses" in parts else ():
            measured = losses(store, paths, vit, layers)
            results[f"losses, last {layers}"] = measured
        if "expert" in parts:
            results["StPR expert, frozen CLIP"] = expert(store, paths, vit, options)
    machine = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        **{p: version(p) for p in ("torch", "open_clip_torch", "av", "decord", "zarr")},
    }  # fmt: skip
    if options.json:
        print(json.dumps({"options": vars(options) | {"dataset": str(options.dataset)},
                          "results": results, "machine": machine}, indent=1))  # fmt: skip
        return 0
    print(f"{len(paths)} clips of {options.frames} frames, {options.precision}")
    head = ("decodes", "unchanged", "MB read", "update s", "full s", "share", "update", "forward",
            "/limit", "epoch s", "video s", "x")  # fmt: skip
    print(f"{'':26}" + "".join(f"{word:>10}" for word in head))
    columns = ("decodes", "calls_of_unchanged", "megabytes_read", "update_seconds",
               "full_forward_seconds", "changed_share", "update_to_full", "forward_to_full",
               "to_limit", "epoch_cache_seconds", "epoch_video_seconds",
               "epoch_speedup")  # fmt: skip
    for name, result in results.items():
        if "largest_difference" in result:
            print(f"{name:26}" + ", ".join(f"{key} {value:.3g}" for key, value in result.items()))
            continue
        cells = (f"{result[c]:10.3f}" if c in result else " " * 10 for c in columns)
        print(f"{name:26}" + "".join(cells))
    print(machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
