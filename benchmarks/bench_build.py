"""Measure the speed of a build, compared with a plain loop and with the network alone.

    python benchmarks/bench_build.py [--dataset DIR] [--clips 192] [--precision bfloat16] [--json]

Each run measures the same clips with T frames in these ways:

  build          `varve build` with one worker: the whole call, and the steady rate from the first
                 finished block to the last
  plain loop     an ordinary loop: decord, open_clip's preprocessing, float32 `encode_image`, one
                 clip at a time; on some of the clips
  forward alone  the build's network, precision and batch on decoded frames in memory; measured
                 before and after the build, since the speed of a machine drifts

A build cannot be faster than the forward alone. Without --dataset the videos are synthetic,
320 x 240.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from varve.pipeline import backbones
from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.datasets import layouts
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.extraction.build import build
from varve.pipeline.extraction.passes import new_execution
from varve.pipeline.progress import Progress


class Clock(Progress):
    """Progress that records when each block leaves the forward."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, int]] = []

    def advance(self, name: str, count: int, frames: int = 0) -> None:
        if name == "forward":
            self.moments.append((time.perf_counter(), frames))

    def steady(self) -> float:
        """Return frames per second from the first finished block to the last."""
        (first, _), (last, _) = self.moments[0], self.moments[-1]
        return sum(frames for _, frames in self.moments[1:]) / (last - first)


def forward_alone(name: str, precision: str, frames: int, seconds: float = 15.0) -> float:
    """Return frames per second of the network on decoded frames, in the batches of a build."""
    backbone = backbones.load(name, getattr(torch, precision))
    spec = BuildSpec((name,), frames=frames, precision=precision)
    execution = new_execution(spec.frame_sets(backbone.picture)[0], "cpu")
    torch.set_num_threads(execution.threads)
    side, batch = backbone.picture.size, execution.batch_clips * frames
    pictures = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    last = backbone.stage_names[-1]
    with torch.inference_mode():
        backbone.run(pictures, [last])
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            backbone.run(pictures, [last])
            done += batch
    return done / (time.perf_counter() - began)


def plain_loop(network: str, paths: list[Path], frames: int) -> float:
    """Return frames per second of an ordinary loop: decord, PIL preprocessing, float32."""
    import decord
    import open_clip
    from PIL import Image

    torch.set_num_threads(os.cpu_count() or 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms(network, pretrained=None)
    model.eval()

    def encode(path: Path) -> None:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
        centres = (2 * np.arange(frames) + 1) * len(reader) // (2 * frames)
        pictures = [preprocess(Image.fromarray(p)) for p in reader.get_batch(centres).asnumpy()]
        with torch.inference_mode():
            model.encode_image(torch.stack(pictures)).half().numpy()

    encode(paths[0])
    began = time.perf_counter()
    for path in paths:
        encode(path)
    return len(paths) * frames / (time.perf_counter() - began)


@contextmanager
def dataset(folder: Path | None, clips: int) -> Iterator[Path]:
    """Make a temporary data set: links to at most `clips` videos of a folder, or synthetic ones."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "videos"
        if folder is None:
            make_dataset(root, clips_per_class=max(1, clips // 12), broken=False)
        else:
            listed = layouts.read(folder)
            chosen = np.linspace(0, len(listed.clips) - 1, min(clips, len(listed.clips))).round()
            for i in sorted(set(chosen.astype(int).tolist())):
                source = (listed.root / listed.clips[i].path).resolve()
                link = root / "all" / f"{i:06d}{source.suffix}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
        yield root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--network", default="ViT-B-16")
    parser.add_argument("--weights", default="random-0")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--plain-clips", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name = f"{options.network}:{options.weights}"
    logging.disable(logging.INFO)

    with dataset(options.dataset, options.clips) as root, tempfile.TemporaryDirectory() as scratch:
        paths = sorted(p for p in root.rglob("*") if p.is_file())
        plain = plain_loop(options.network, paths[: options.plain_clips], options.frames)
        before = forward_alone(name, options.precision, options.frames)
        clock = Clock()
        spec = BuildSpec((name,), frames=options.frames, precision=options.precision, text=False)
        began = time.perf_counter()
        report = build(
            root, Path(scratch) / "s.zarr", spec, runtime=Runtime(workers=1), progress=clock
        )
        seconds = time.perf_counter() - began
        after = forward_alone(name, options.precision, options.frames)
        shutil.rmtree(Path(scratch) / "s.zarr")
    alone = statistics.mean((before, after))
    whole, steady = report.frames / seconds, clock.steady()
    result = {
        "network": name,
        "precision": options.precision,
        "clips": report.computed,
        "frames": report.frames,
        "frames_a_second": {
            "build": whole, "build_steady": steady, "plain_loop_float32": plain,
            "forward_alone_before": before, "forward_alone_after": after,
        },
        "ratio": {
            "build_to_plain_loop": whole / plain, "steady_to_plain_loop": steady / plain,
            "build_to_forward_alone": whole / alone, "steady_to_forward_alone": steady / alone,
        },
        "seconds": {"build": seconds, **{k: v for k, v in report.seconds.items() if k != "all"}},
        "machine": {
            "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            **{p: version(p) for p in ("torch", "open_clip_torch", "av", "decord", "zarr")},
        },
    }  # fmt: skip
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{name}, {report.computed} clips of {options.frames} frames, {options.precision}")
    for what, rate in result["frames_a_second"].items():
        print(f"  {what:24} {rate:8.2f} frames/s  {rate / options.frames:7.2f} clips/s")
    for what, ratio in result["ratio"].items():
        print(f"  {what:24} {ratio:8.2f}")
    parts = ", ".join(f"{part} {value:.1f} s" for part, value in result["seconds"].items())
    print(f"  where the time went: {parts}")
    print(f"  {result['machine']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
