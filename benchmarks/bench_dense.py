"""Measure whole videos: a sweep over T, reads out of pages, and the speed of a build.

    python benchmarks/bench_dense.py [--clips 12] [--films 3] [--backbone NAME] [--json]

All in one run:

  sweep        features of T = 4, 8, 16, 32 frames of short clips: one build with --sampling all and
               four samplings of it, against four builds from the videos
  reads        T = 8 frames of random clips out of pages, against a column of 8 frames
  build        frames a second of the build of films of 640 frames, 320 x 240, against the network
               alone on frames in memory before and after it, and against a plain loop that decodes
               every frame with PyAV and runs the same network on batches of 8

A build cannot be faster than the network alone. It starts workers and networks first, which takes a
constant time; the figure "per further film" is without it.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from varve import BuildSpec, FeatureStore, Runtime, build
from varve.pipeline import backbones
from varve.pipeline.datasets.synthetic import make_dataset, write_video
from varve.pipeline.decoders._crop import apply_crop, choose_crop
from varve.stores import Feature, VideoFeature

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


def make_films(root: Path, count: int, frames: int = 640) -> None:
    """Write films of a moving texture, in folders of two classes."""
    for number in range(count):
        texture = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
        picture = texture.repeat(8, axis=0).repeat(8, axis=1)
        moved = np.stack([np.roll(picture, (2 * i, 3 * i), (0, 1)) for i in range(frames)])
        path = root / "train" / f"class {number % 2}" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moved, Fraction(25))


def built_films(root: Path, count: int, name: str, stage: str) -> dict[str, object]:
    """Return the speed of a build of whole films, and of what it is compared with."""
    make_films(root / "one", 1)
    make_films(root / "films", count)
    spec = BuildSpec(name, stage, sampling="all", text=False)
    alone = [network_alone(name)]
    first = seconds(lambda: build(root / "one", root / "one.zarr", spec))
    began = time.perf_counter()
    report = build(root / "films", root / "films.zarr", spec)
    whole = time.perf_counter() - began
    alone.append(network_alone(name))
    loop = plain_loop(name, sorted((root / "films").rglob("*.mp4")))
    alone.append(network_alone(name))
    further = report.frames * (1 - 1 / count) / (whole - first)
    limit = float(np.median(alone))
    return {
        "frames of films": report.frames,
        "network alone, frames/s": alone,
        "build, frames/s": report.frames / whole,
        "build, frames/s per further film": further,
        "build / network alone": report.frames / whole / limit,
        "per further film / network alone": further / limit,
        "build / plain loop": report.frames / whole / loop,
        "per further film / plain loop": further / loop,
    }


def reads(store: Path, direct: Path, name: str, stage: str) -> tuple[float, float, float]:
    """Return bytes a second of random clips of 8 frames.

    Out of pages that no feature of this process has read, out of pages once their checksums are
    checked, and of a direct column. The files are in memory in all three; the figures are medians
    of seven rounds, in which the three take turns.
    """
    rng, rates = np.random.default_rng(0), []
    whole = FeatureStore.open(store).feature(name, stage)
    assert isinstance(whole, VideoFeature)
    features = (whole.sampled(frames=8), FeatureStore.open(direct).feature(name, stage))
    rows = np.flatnonzero(features[1].valid)
    batches = [rng.permutation(rows)[:32] for _ in range(50)]
    once = np.array_split(rng.permutation(rows), -(-len(rows) // 32))

    def rate(feature: Feature, parts: list[np.ndarray]) -> float:
        size = sum(len(part) for part in parts) * int(np.prod(feature.shape[1:])) * 2
        return size / seconds(lambda: [feature.read(part) for part in parts])

    for feature in features:
        feature.read(rows)
    for _ in range(7):
        fresh = FeatureStore.open(store).feature(name, stage)
        assert isinstance(fresh, VideoFeature)
        sampled = fresh.sampled(frames=8)
        sampled.valid, sampled.indices(0)
        rates.append((rate(sampled, once), *(rate(feature, batches) for feature in features)))
    first, again, plain = np.median(np.array(rates), axis=0)
    return float(first), float(again), float(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=3, help="clips of each of four classes")
    parser.add_argument("--films", type=int, default=3)
    parser.add_argument("--backbone", default="resnet18:random-0")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name = options.backbone
    stage = backbones.load(name).default_stage.name
    figures: dict[str, object] = {"machine": platform.machine(), "backbone": name}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_dataset(root / "videos", options.clips, broken=False, classes=CLASSES)
        whole = BuildSpec(name, stage, sampling="all", text=False)
        whole_seconds = seconds(
            lambda: build(root / "videos", root / "whole.zarr", whole, runtime=SERIAL)
        )
        figures |= built_films(root, options.films, name, stage)

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
        first, again, direct = reads(root / "whole.zarr", root / "8.zarr", name, stage)
        figures["reads out of pages / direct"] = again / direct
        figures["first reads out of pages / direct"] = first / direct
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for label, value in figures.items():
            print(f"{label:32} {value}")


if __name__ == "__main__":
    main()
