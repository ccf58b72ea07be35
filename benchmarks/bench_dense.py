"""Measure whole videos: a sweep over T, reads out of pages, and the speed of a build.

    python benchmarks/bench_dense.py [--clips 12] [--backbone resnet18:random-0] [--json]

All in one run, on synthetic videos of 320 x 240:

  sweep        features of T = 4, 8, 16, 32 frames: one build with --sampling all and four samplings
               of it, against four builds from the videos
  reads        T = 8 frames of random clips out of pages, against a column of 8 frames
  build        frames a second of the build of whole videos, against the network alone on frames in
               memory before and after it, and against a plain loop that decodes every frame with
               PyAV and runs the same network on batches of 8

A build cannot be faster than the network alone.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from varve import BuildSpec, FeatureStore, Runtime, build
from varve.pipeline import backbones
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.decoders._crop import apply_crop, choose_crop
from varve.stores import VideoFeature

LENGTHS = (4, 8, 16, 32)
CLASSES = ("grow", "shrink", "fade in", "fade out")
SERIAL = Runtime(serial=True)
BATCH = 8


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def network_alone(name: str, duration: float = 5.0) -> float:
    """Return frames a second of the network on frames in memory."""
    backbone = backbones.load(name)
    side, last = backbone.picture.size, backbone.default_stage.name
    pictures = torch.randint(0, 256, (BATCH, side, side, 3), dtype=torch.uint8)
    done, began = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - began < duration:
            backbone.run(pictures, [last])
            done += BATCH
    return done / (time.perf_counter() - began)


def plain_loop(name: str, paths: list[Path]) -> float:
    """Return frames a second of a loop that decodes every frame and runs the network."""
    backbone = backbones.load(name)
    frame_set = BuildSpec(name, sampling="all").frame_sets(backbone.picture)[0]
    last, done, began = backbone.default_stage.name, 0, time.perf_counter()

    def forward(batch: list[np.ndarray]) -> None:
        backbone.run(torch.from_numpy(np.stack(batch)), [last])

    with torch.inference_mode():
        for path in paths:
            batch: list[np.ndarray] = []
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    image = frame.to_image()
                    batch.append(apply_crop(image, choose_crop(frame_set, *image.size, "")))
                    done += 1
                    if len(batch) == BATCH:
                        forward(batch)
                        batch = []
            if batch:
                forward(batch)
    return done / (time.perf_counter() - began)


def reads(store: Path, direct: Path, name: str, stage: str) -> tuple[float, float]:
    """Return bytes a second of random clips of 8 frames: out of pages, and of a direct column."""
    whole = FeatureStore.open(store).feature(name, stage)
    assert isinstance(whole, VideoFeature)
    rng, rates = np.random.default_rng(0), []
    for feature in (whole.sampled(frames=8), FeatureStore.open(direct).feature(name, stage)):
        rows = np.flatnonzero(feature.valid)
        feature.read(rows)
        chosen = [rng.choice(rows, min(32, len(rows)), replace=False) for _ in range(50)]
        size = sum(feature.read(part).nbytes for part in chosen)
        rates.append(size / seconds(lambda f=feature, c=chosen: [f.read(part) for part in c]))
    return rates[0], rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=3, help="clips of each of four classes")
    parser.add_argument("--backbone", default="resnet18:random-0")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name = options.backbone
    stage = backbones.load(name).default_stage.name
    figures: dict[str, object] = {"machine": platform.machine(), "backbone": name}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_dataset(root / "videos", options.clips, broken=False, classes=CLASSES)
        paths = sorted((root / "videos").rglob("*.mp4"))
        whole = BuildSpec(name, stage, sampling="all", text=False)
        before = network_alone(name)
        began = time.perf_counter()
        report = build(root / "videos", root / "whole.zarr", whole, runtime=SERIAL)
        figures["build, seconds"] = whole_seconds = time.perf_counter() - began
        after = network_alone(name)
        figures["frames"] = report.frames
        figures["build, frames/s"] = rate = report.frames / whole_seconds
        figures["network alone, frames/s"] = [before, after]
        figures["build / network alone"] = rate / ((before + after) / 2)
        figures["build / plain loop"] = rate / plain_loop(name, paths)

        def sampled(frames: int) -> None:
            feature = FeatureStore.open(root / "whole.zarr").feature(name, stage)
            assert isinstance(feature, VideoFeature)
            cells = feature.sampled(frames=frames)
            cells.read(np.flatnonzero(cells.valid))

        def built(frames: int) -> None:
            spec = BuildSpec(name, stage, frames=frames, text=False)
            build(root / "videos", root / f"{frames}.zarr", spec, runtime=SERIAL)

        figures["sweep from one store, seconds"] = whole_seconds + sum(
            seconds(lambda T=T: sampled(T)) for T in LENGTHS
        )
        figures["sweep of four builds, seconds"] = sum(
            seconds(lambda T=T: built(T)) for T in LENGTHS
        )
        pages, direct = reads(root / "whole.zarr", root / "8.zarr", name, stage)
        figures["reads out of pages / direct"] = pages / direct
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for label, value in figures.items():
            print(f"{label:32} {value}")


if __name__ == "__main__":
    main()
