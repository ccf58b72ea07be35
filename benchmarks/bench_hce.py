"""Measure memory and time of hypercorrelations and HAS, all at once or some frames at a time.

    python benchmarks/bench_hce.py [--clips 1] [--depth 18] [--repeats 3] [--json]

One training step of HAS, forward and backward to the new network's maps, is measured on the maps
of a ResNet at T = 8 frames of 224 x 224, groups layer2 to layer4 (layer1 alone would be 16 times
layer2). The plain formulation keeps every activation. With some frames at a time, activations are
discarded and computed again in the backward pass. Each way runs in a separate process; its peak
memory is counted above what the process had before. Losses and gradients are compared with those of
the plain formulation.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from varve.heads.parts.hierarchical_aggregation import HAS, drift

FRAMES = 8
BLOCKS = {18: ((2, 2, 2), 1), 34: ((4, 6, 3), 1), 50: ((4, 6, 3), 4)}
PARTS = (None, 8, 2, 1)


def shapes(depth: int) -> dict[str, tuple[int, int, int]]:
    counts, wide = BLOCKS[depth]
    return {
        f"layer{s}.{i}": (wide * width, size, size)
        for s, (count, width, size) in enumerate(
            zip(counts, (128, 256, 512), (28, 14, 7), strict=True), 2
        )
        for i in range(count)
    }


def measure(depth: int, clips: int, frames: int | None, repeats: int) -> dict[str, Any]:
    """Measure one way in this process."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        {
            name: torch.randn(clips * FRAMES, *shape, generator=generator)
            for name, shape in shapes(depth).items()
        }
        for _ in range(2)
    ]
    new = {name: x.requires_grad_() for name, x in maps[0].items()}
    torch.manual_seed(0)
    has = HAS(shapes(depth), frames=frames)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        has.zero_grad()
        for x in new.values():
            x.grad = None
        began = time.perf_counter()
        h = has(new, maps[1])
        loss = drift(h, new, maps[1])
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    grads = [p.grad for p in has.parameters()] + [x.grad for x in new.values()]
    return {
        "frames": frames,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "peak_bytes": 1024 * peak,
        "loss": float(loss),
        "gradient": [float(g.double().norm()) for g in grads if g is not None],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--depth", type=int, default=18, choices=sorted(BLOCKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=int, help="measure one way: frames at a time, 0 for all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.only is not None:
        print(
            json.dumps(measure(options.depth, options.clips, options.only or None, options.repeats))
        )
        return 0
    runs = []
    for frames in PARTS:
        words = [sys.executable, __file__, "--clips", options.clips, "--depth", options.depth,
                 "--repeats", options.repeats, "--only", frames or 0]  # fmt: skip
        done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    plain = runs[0]
    for run in runs:
        # Relative to the largest: the gradient of a bias before a normalisation is only rounding.
        pairs = zip(run["gradient"], plain["gradient"], strict=True)
        run["off"] = max(abs(a - b) for a, b in pairs) / max(plain["gradient"])
        run["loss_off"] = abs(run["loss"] - plain["loss"]) / plain["loss"]
    if options.json:
        print(json.dumps(runs, indent=1))
        return 0
    print(f"HAS on ResNet-{options.depth}, {options.clips} clips of {FRAMES} frames of 224 x 224")
    for run in runs:
        print(
            f"  {'all frames kept' if run['frames'] is None else f'{run["frames"]} at a time':16}"
            f"  {run['seconds']:7.2f} s (ratio {run['seconds'] / plain['seconds']:.2f})  peak "
            f"{run['peak_bytes'] / 1e6:8.0f} MB (ratio "
            f"{run['peak_bytes'] / plain['peak_bytes']:.2f})  loss off {run['loss_off']:.1e}, "
            f"gradients {run['off']:.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
