"""Measure the speed of reading random batches of clips, compared with a memory map.

    python benchmarks/bench_read.py [--megabytes 1024] [--repeats 25] [--folder DIR] [--json]

Three columns of float16 as a build writes them (shards of 64 to 128 MB, a crc32c a clip), and the
same values in one plain .npy; T = 8:

  pooled   T x 512            8 KB a clip    batches of 32 and of 256
  token    T x 197 x 768      2.4 MB         batches of 32
  map      T x 256 x 14 x 14  0.8 MB         batches of 32

All files are in the page cache, and each contender reads into a preallocated buffer if it can. The
baseline is `np.take(memmap, rows, axis=0, out=out, mode="clip")`, numpy's fastest read into such a
buffer (its default mode copies twice). `memmap[rows]` and `FeatureTensors` make a new array.
Contenders take turns of about 64 MB, in an order that is drawn for each round, each with its own
rows. The median of a contender's turns counts. The fastest turn is printed beside it, which is more
reliable on a machine with other work.

The pooled column is small, and is also read from the memory of a `FeatureTensors`, which has read
it once, as for a head that trains on it.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import tensorstore
import zarr

from varve.pipeline.experiments.feature_tensors import FeatureTensors
from varve.stores import Feature, FeatureStore, clips
from varve.stores.columns import Column, ColumnSpec

SHAPES = {"pooled": (8, 512), "token": (8, 197, 768), "map": (8, 256, 14, 14)}
BATCHES = {"pooled": (32, 256), "token": (32,), "map": (32,)}
BASELINE = "memmap, take into out"
FAST = ("memmap", "varve")
TURN_BYTES = 64 << 20

Contender = Callable[[np.ndarray, np.ndarray], object]


def make(folder: Path, name: str, megabytes: int) -> tuple[Feature, np.ndarray]:
    """Write a column of random finite numbers, and a memory map of the same numbers."""
    cell = SHAPES[name]
    count = max(256, (megabytes << 20) // (2 * int(np.prod(cell))))
    store = FeatureStore.create(folder / f"{name}.zarr")
    row = clips.blank("", "", "train") | {"status": "ready"}
    table = pd.DataFrame([row | {"path": f"{i}.mp4", "digest": f"{i:064d}"} for i in range(count)])
    table = table.astype(clips.COLUMNS).rename_axis(index="row")
    clips.write(store.path, table)
    keys = clips.row_keys(table)
    spec = ColumnSpec("net:tag", name, "ab" * 32, cell, "float16", {})
    column = Column(store.path, spec)
    column.create(count)
    plain = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (count, *cell))
    rng = np.random.default_rng(0)
    for first in range(0, count, spec.shard_clips):
        rows = np.arange(first, min(first + spec.shard_clips, count))
        bits = rng.integers(0, 0x7C00, (len(rows), *cell), np.uint16)
        plain[rows[0] : rows[-1] + 1] = bits.view(np.float16)
        column.write_shard(
            first // spec.shard_clips, rows, bits.view(np.float16), keys[rows], count
        )
    plain.flush()
    feature = FeatureStore.open(store.path).feature("net:tag", name)
    return feature, np.load(folder / f"{name}.npy", mmap_mode="r")


def contenders(feature: Feature, plain: np.ndarray, small: bool) -> dict[str, Contender]:
    """Return functions (rows, out) that read a batch, by name."""
    array = zarr.open_array(str(feature.path), mode="r")
    opened = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(feature.path)},
            # Room for the shards' indices, which would otherwise be read every time.
            "context": {"cache_pool": {"total_bytes_limit": 64 << 20}},
            "recheck_cached_data": "open",
        },
        read=True,
    ).result()

    def take(rows: np.ndarray, out: np.ndarray) -> None:
        np.take(plain, rows, axis=0, out=out, mode="clip")

    def slices(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows.tolist()):
            out[i] = array[row]

    def gathered(rows: np.ndarray, out: np.ndarray) -> None:
        async def read_row(i: int, row: int) -> None:
            out[i] = (await array.async_array.getitem((slice(row, row + 1),)))[0]

        async def read_all() -> None:
            await asyncio.gather(*(read_row(i, row) for i, row in enumerate(rows.tolist())))

        asyncio.run(read_all())

    def batched(rows: np.ndarray, out: np.ndarray) -> None:
        with tensorstore.Batch() as batch:
            reads = [opened[row].read(batch=batch) for row in rows.tolist()]
        for i, read in enumerate(reads):
            out[i] = read.result()

    ways: dict[str, Contender] = {
        BASELINE: take,
        "memmap[rows]": lambda rows, out: plain[rows],
        "varve, unverified": lambda rows, out: feature.read(rows, out, verify=False),
        "varve": lambda rows, out: feature.read(rows, out),
    }
    if small:
        tensors = FeatureTensors(feature)
        ways["varve, FeatureTensors"] = lambda rows, out: tensors[rows]
    return ways | {
        "zarr, a slice a clip": slices,
        "zarr, asynchronous": gathered,
        "tensorstore, a batch": batched,
        "tensorstore, index array": lambda rows, out: opened[rows].read().result(),
    }


def measure(
    ways: dict[str, Contender], feature: Feature, batch: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Return GB/s of each contender, for its median turn and its fastest."""
    rng = np.random.default_rng(1)
    count = feature.shape[0]
    out = buffer((batch, *feature.shape[1:]))
    for name, way in ways.items():
        # Once through the column, so that every page is mapped.
        for _ in range(count // batch if name.startswith(FAST) else 2):
            way(rng.integers(0, count, batch), out)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turn = max(1, TURN_BYTES // out.nbytes)
    for _ in range(repeats):
        for name in rng.permutation(list(ways)).tolist():
            # Slow contenders take shorter turns, so that the others get enough.
            rows = rng.integers(0, count, (turn if name.startswith(FAST) else 1, batch))
            began = time.perf_counter()
            for each in rows:
                ways[name](each, out)
            seconds[name].append((time.perf_counter() - began) / len(rows))
    return {
        which: {name: out.nbytes / of(each) / 1e9 for name, each in seconds.items()}
        for which, of in (("median", statistics.median), ("fastest", min))
    }


def buffer(shape: tuple[int, ...]) -> np.ndarray:
    """Return zeros that begin on a page, as pinned memory does."""
    size = 2 * int(np.prod(shape))
    raw = np.zeros(size + 4096, np.uint8)
    first = -raw.ctypes.data % 4096
    return raw[first : first + size].view(np.float16).reshape(shape)


def check(ways: dict[str, Contender], feature: Feature, plain: np.ndarray) -> None:
    """Check that every contender reads the same bytes."""
    rows = np.random.default_rng(2).integers(0, feature.shape[0], 16)
    for name, way in ways.items():
        out = np.zeros((len(rows), *feature.shape[1:]), np.float16)
        result = way(rows, out)
        cells = out if result is None else np.asarray(result)
        assert cells.tobytes() == plain[rows].tobytes(), name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="size of token and of map")
    parser.add_argument("--pooled-megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--folder", type=Path, help="folder of the files; by default temporary")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    runs = []
    for name, cell in SHAPES.items():
        megabytes = options.pooled_megabytes if name == "pooled" else options.megabytes
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            feature, plain = make(Path(folder), name, megabytes)
            ways = contenders(feature, plain, small=name == "pooled")
            check(ways, feature, plain)
            for batch in BATCHES[name]:
                rates = measure(ways, feature, batch, options.repeats)
                runs.append(
                    {
                        "feature": name, "cell": cell, "batch": batch, "clips": feature.shape[0],
                        "shards": len(list(feature.path.rglob("c/*"))), "gigabytes_a_second": rates,
                        "ratio": {
                            which: {way: rate / each[BASELINE] for way, rate in each.items()}
                            for which, each in rates.items()
                        },
                    }
                )  # fmt: skip
    machine = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "system": platform.release(),
        **{p: version(p) for p in ("numpy", "zarr", "tensorstore", "google-crc32c")},
    }  # fmt: skip
    if options.json:
        print(json.dumps({"runs": runs, "machine": machine}, indent=1))
        return 0
    for run in runs:
        shape = " x ".join(map(str, run["cell"]))
        print(f"{run['feature']} {shape}: batches of {run['batch']} of {run['clips']} clips, "
              f"{run['shards']} shards")  # fmt: skip
        print(f"  {'':32} {'median':>12}  ratio {'fastest':>13}  ratio")
        for way in run["ratio"]["median"]:
            line = f"  {way:32}"
            for which, rates in run["gigabytes_a_second"].items():
                line += f" {rates[way]:7.2f} GB/s {run['ratio'][which][way]:6.2f} "
            print(line)
    print(machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
