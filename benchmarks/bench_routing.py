"""Measure the cost of the anchor pool beside matrix products, and what a shortlist saves.

    python benchmarks/bench_routing.py [--width 128] [--seconds 0.3] [--all] [--json]
    python benchmarks/bench_routing.py --only nearest|route|shortlist

nearest   The 10 nearest of 10^2 .. 10^6 anchors, for batches of 1 .. 4096 queries. Contenders:
          torch `(q @ a.T).topk(10)` and numpy `argpartition` of the same product, on vectors that
          are unit already, in one run with the pool, whose results are checked against float64. On
          a machine with a GPU also the pool there. Anchors are in 1000 groups in 32 dimensions,
          with noise in all; a query is an anchor, with noise. Batches of more than 3e7 similarities
          are left out without --all.
route     Each expert's residual against its own anchors, for 26 x 4, 100 x 2 and 100 x 100 experts
          x classes of width 512, against torch and numpy doing the same: norms, products, the
          maximum per expert, the experts in order.
shortlist StPR learns 100 tasks of two classes on moving features (two classes look alike and move
          differently; text vectors are noisy means). For each way to weigh experts: how often does
          a prediction with 8 experts run agree with the one with all 100, what are both worth, and
          what do they cost. `clear` and `noisy` features; how often the router prefers a clip's own
          expert says how good a router there is to agree with. Then the cost with experts of the
          published size (9.5 million numbers, width 512; one stands for all, so that 3.8 GB need
          not be had, which is to the advantage of running all).

Contenders take turns in an order drawn anew for each round, each with queries of its own, until
each had --seconds. p50 and p99 are over turns (with few turns p99 is the slowest); a ratio is that
of p50 to torch's.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Task
from varve.heads.parts.anchor_pool import AnchorPool
from varve.heads.parts.clips import Clips
from varve.heads.parts.expert import Expert, ExpertConfig
from varve.heads.parts.routed_experts import RoutingConfig
from varve.heads.parts.shortlist import Shortlist
from varve.heads.parts.training import OptimConfig
from varve.heads.stpr import StPR

POOLS = (100, 1_000, 10_000, 100_000, 1_000_000)
BATCHES = (1, 16, 256, 4096)
TOP = 10
EXPERTS = 100
SHORT = 8
FRAMES = 8

Contender = Callable[[Tensor], object]


def grouped(count: int, width: int, rng: np.random.Generator) -> Tensor:
    """Anchors as experts make them: in groups, of few dimensions, and noise in all."""
    centres = rng.normal(size=(1000, 32))
    low = centres[rng.integers(1000, size=count)] + 0.7 * rng.normal(size=(count, 32))
    wide = low @ rng.normal(size=(32, width)) + rng.normal(size=(count, width))
    return normalize(torch.from_numpy(wide).float(), dim=1)


def filled(anchors_ND: Tensor, **options: Any) -> AnchorPool:
    pool = AnchorPool(anchors_ND.shape[1], **options)
    pool.add(0, range(len(anchors_ND)), anchors_ND)
    pool.nearest(anchors_ND[:1], 1)  # what is made when first asked
    return pool


def turns(ways: dict[str, Contender], draw: Callable[[], Tensor], seconds: float) -> dict[str, Any]:
    """Milliseconds of each contender's turns."""
    rng = np.random.default_rng(1)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(draw())
    open_ones = list(ways)
    while open_ones:
        for name in rng.permutation(open_ones).tolist():
            query = draw()
            began = time.perf_counter()
            ways[name](query)
            spent[name].append(time.perf_counter() - began)
        open_ones = [n for n in ways if sum(spent[n]) < seconds or len(spent[n]) < 3]
    return {
        name: {
            "p50": 1e3 * float(np.median(each)),
            "p99": 1e3 * float(np.percentile(each, 99)),
            "turns": len(each),
        }
        for name, each in spent.items()
    }


def nearest(width: int, seconds: float, everything: bool) -> list[dict[str, Any]]:
    runs = []
    for count in POOLS:
        rng = np.random.default_rng(0)
        anchors_ND = grouped(count, width, rng)
        plain = anchors_ND.numpy()
        pools = {"pool": filled(anchors_ND, gpu_above=None)}
        if faiss.get_num_gpus():
            pools["pool, gpu"] = filled(anchors_ND, gpu_above=1)

        def draw(batch: int, a=anchors_ND, rng=rng) -> Tensor:  # type: ignore[no-untyped-def]
            of = torch.from_numpy(rng.integers(len(a), size=batch))
            noise = torch.from_numpy(rng.normal(size=(batch, a.shape[1])).astype(np.float32))
            return normalize(a[of] + 0.5 * noise / a.shape[1] ** 0.5, dim=1)

        def by_numpy(q: Tensor, a: np.ndarray = plain) -> np.ndarray:
            scores = q.numpy() @ a.T
            top = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
            order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1)
            return np.take_along_axis(top, order, axis=1)

        queries = draw(200)
        exact = (queries.double() @ anchors_ND.double().T).topk(TOP).indices
        for pool in pools.values():
            assert torch.equal(pool.nearest(queries, TOP).classes, exact)
        ways: dict[str, Contender] = {
            "torch": lambda q, a=anchors_ND: (q @ a.T).topk(TOP),  # type: ignore[misc]
            "numpy": by_numpy,
        }
        ways |= {name: lambda q, p=pool: p.nearest(q, TOP) for name, pool in pools.items()}  # type: ignore[misc]
        for batch in BATCHES:
            if batch * count > 3e7 and not everything:
                continue
            milliseconds = turns(ways, lambda batch=batch: draw(batch), seconds)  # type: ignore[misc]
            runs.append(
                {"anchors": count, "width": width, "batch": batch, "milliseconds": milliseconds}
            )
    return runs


def route(seconds: float) -> list[dict[str, Any]]:
    runs, width = [], 512
    for experts, classes in ((26, 4), (EXPERTS, 2), (EXPERTS, 100)):
        generator = torch.Generator().manual_seed(0)
        anchors_KCD = torch.randn(experts, classes, width, generator=generator)
        pool = AnchorPool(width)
        for k, block in enumerate(anchors_KCD):
            pool.add(k, range(classes), block)
        unit_KCD = normalize(anchors_KCD, dim=2)
        plain_KCD = unit_KCD.numpy()

        def by_torch(r: Tensor, a: Tensor = unit_KCD) -> object:
            near = torch.bmm(normalize(r, dim=2).transpose(0, 1), a.transpose(1, 2)).max(dim=2)
            return near.values.T.sort(dim=1, descending=True)

        def by_numpy(r: Tensor, a: np.ndarray = plain_KCD) -> object:
            x = r.numpy()
            x = x / np.linalg.norm(x, axis=2, keepdims=True)
            near = np.matmul(x.transpose(1, 0, 2), a.transpose(0, 2, 1)).max(axis=2)
            return np.argsort(-near.T, axis=1)

        ways: dict[str, Contender] = {"torch": by_torch, "numpy": by_numpy, "pool": pool.route}
        for batch in (1, 32, 256):
            shape = (batch, experts, width)
            milliseconds = turns(
                ways, lambda s=shape, g=generator: torch.randn(s, generator=g), seconds
            )  # type: ignore[misc]
            runs.append({"experts": experts, "classes": classes, "width": width, "batch": batch,
                         "milliseconds": milliseconds})  # fmt: skip
    return runs


def moving(noise: float, width: int, clips: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of 200 classes, [classes, clips, T, D], and a text vector each."""
    rng = np.random.default_rng([7])
    classes = 2 * EXPERTS
    looks = rng.normal(size=(EXPERTS, width)).repeat(2, axis=0)
    looks = looks + 0.3 * rng.normal(size=(classes, width))
    motion = 0.7 * rng.normal(size=(classes, width))
    common = rng.normal(size=width)
    text = looks + common + 1.5 * rng.normal(size=(classes, width))
    order = rng.permutation(classes)  # those that look alike are seldom in one task
    draws = np.random.default_rng([7, seed])
    path = np.linspace(-1, 1, FRAMES)[:, None]
    frames = (common + looks)[order][:, None, None] + motion[order][:, None, None] * path
    frames = frames + noise * draws.normal(size=(classes, clips, 1, width))
    frames = frames + noise * draws.normal(size=(classes, clips, FRAMES, width))
    text_CD = normalize(torch.from_numpy(text[order]).float(), dim=1)
    return torch.from_numpy(frames).float(), text_CD


def shortlist(width: int) -> list[dict[str, Any]]:
    runs = []
    for name, noise in (("clear", 0.5), ("noisy", 1.0)):
        train, text = moving(noise, width, 20, seed=1)
        test, _ = moving(noise, width, 10, seed=2)
        labels = torch.arange(2 * EXPERTS).repeat_interleave(10)
        head = StPR(
            expert=ExpertConfig(layers=1, ffn=2 * width, position="learned"),
            routing=RoutingConfig(shortlist=SHORT),
            optim=OptimConfig(first_epochs=30, weight_decay=0.0, clip_norm=1.0),
        )
        for k in range(EXPERTS):
            classes = torch.tensor([2 * k, 2 * k + 1])
            clips = Clips({"vector": train[classes].flatten(0, 1)}, classes.repeat_interleave(20))
            head.learn(Task(clips, k, text[classes]))
        batches = test.flatten(0, 1).split(250)

        ran = [0]
        for expert in head.routed.experts:
            expert.register_forward_hook(
                lambda module, inputs, out, ran=ran: ran.append(ran.pop() + len(out))
            )

        def predicted(
            head: StPR, short: int, batches: Any = batches, ran: list[int] = ran
        ) -> tuple[Tensor, float, float]:
            head.routed.config, ran[0] = replace(head.routed.config, shortlist=short), 0
            began = time.perf_counter()
            predictions = torch.cat([head.scores({"vector": x}).argmax(dim=1) for x in batches])
            return predictions, time.perf_counter() - began, ran[0] / len(predictions)

        head.routed.config = replace(head.routed.config, shortlist=0)
        first = torch.cat([head.routing({"vector": x}).experts[:, 0] for x in batches])
        zero = (normalize(test.flatten(0, 1), dim=2).mean(dim=1) @ text.T).argmax(dim=1)
        ways = {}
        doubt = head.routed.config.doubt
        for way, options in {
            "published": (None, 0, doubt),
            "published, doubt=0": (None, 0, 0.0),
            "softmax=0.02": (0.02, 0, doubt),
            "softmax=0.02, doubt=0": (0.02, 0, 0.0),
            "keep=1, doubt=0": (None, 1, 0.0),
        }.items():
            softmax, keep, doubts = options
            head.routed.config = replace(
                head.routed.config, softmax=softmax, keep=keep, doubt=doubts
            )
            (every, slow, _), (few, quick, experts_run) = predicted(head, 0), predicted(head, SHORT)
            ways[way] = {
                "agreement": float((every == few).float().mean()),
                "experts a clip": experts_run,
                "accuracy, all run": float((every == labels).float().mean()),
                f"accuracy, {SHORT} run": float((few == labels).float().mean()),
                "seconds, all run": slow,
                f"seconds, {SHORT} run": quick,
            }
        runs.append({"features": name, "clips": len(labels), "width": width,
                     "own expert is first": float((first == labels // 2).float().mean()),
                     "accuracy of text alone": float((zero == labels).float().mean()),
                     "weights": ways})  # fmt: skip
    return runs


def published_size() -> list[dict[str, Any]]:
    """Running all experts of the published size against running a shortlist."""
    width, generator = 512, torch.Generator().manual_seed(0)
    expert = Expert(width).requires_grad_(False)
    pool, listed, state = AnchorPool(width), Shortlist(), {}
    for k in range(EXPERTS):
        pool.add(k, range(2), torch.randn(2, width, generator=generator))
        state[f"clips.{k}"] = torch.randn(2, FRAMES, width, generator=generator)
        state[f"rows.{k}"] = torch.randn(2, k + 1, width, generator=generator)
        state[f"column.{k}"] = torch.randn(2 * k, width, generator=generator)
    listed.load_state_dict(state)

    def encode(k: int, x: Tensor) -> Tensor:
        return normalize(expert(x), dim=1)

    def summed(x: Tensor, encoded: Tensor) -> Tensor:
        mean = x.mean(dim=1)
        weights, _ = pool.compare(encoded - mean[:, None])
        return mean + (weights[..., None] * encoded).sum(dim=1)

    def everyone(x: Tensor) -> Tensor:
        return summed(x, torch.stack([encode(k, x) for k in range(EXPERTS)], dim=1))

    def few(x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        encoded, _ = listed.encoded(x, SHORT, encode, lambda e: pool.compare(e - mean)[0])
        return summed(x, encoded)

    runs = []
    for batch in (1, 16):
        draw = lambda b=batch: torch.randn(b, FRAMES, width, generator=generator)  # noqa: E731
        milliseconds = turns({"all run": everyone, f"{SHORT} run": few}, draw, 0.0)
        runs.append(
            {"batch": batch, "experts": EXPERTS, "width": width, "milliseconds": milliseconds}
        )
    return runs


def show(runs: dict[str, list[dict[str, Any]]]) -> None:
    for run in runs.get("nearest", []):
        print(f"nearest {TOP} of {run['anchors']:,} x {run['width']}, batch {run['batch']}")
        lines(run["milliseconds"], run["batch"], "torch")
    for run in runs.get("route", []):
        print(f"route {run['experts']} experts of {run['classes']} classes, x {run['width']}, "
              f"batch {run['batch']}")  # fmt: skip
        lines(run["milliseconds"], run["batch"], "torch")
    for run in runs.get("shortlist", []):
        print(f"shortlist, {run['features']} features x {run['width']}, {run['clips']} clips: own "
              f"expert first for {run['own expert is first']:.1%}, right by text alone "
              f"{run['accuracy of text alone']:.1%}")  # fmt: skip
        for way, of in run["weights"].items():
            agreement, experts_run, all_right, few_right, slow, quick = of.values()
            print(f"  {way:22} {agreement:7.2%} agree; {experts_run:5.1f} experts a clip; right "
                  f"{all_right:6.1%} with all, {few_right:6.1%} with few; {slow / quick:5.1f} "
                  "times as fast")  # fmt: skip
    for run in runs.get("published size", []):
        print(f"{run['experts']} experts of the published size, batch {run['batch']}")
        lines(run["milliseconds"], run["batch"], "all run")


def lines(timings: dict[str, Any], batch: int, base: str) -> None:
    for name, each in timings.items():
        line = f"  {name:12} p50 {each['p50']:10.3f} ms  p99 {each['p99']:10.3f} ms  a query "
        line += (
            f"{1e3 * each['p50'] / batch:9.2f} us  ratio {each['p50'] / timings[base]['p50']:6.2f}"
        )
        line += f"  {each['turns']:5} turns"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128, help="of nearest and of shortlist")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contender in a cell")
    parser.add_argument("--only", choices=("nearest", "route", "shortlist"))
    parser.add_argument("--all", action="store_true", help="the largest cells too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    runs = {}
    if options.only in (None, "nearest"):
        runs["nearest"] = nearest(options.width, options.seconds, options.all)
    if options.only in (None, "route"):
        runs["route"] = route(options.seconds)
    if options.only in (None, "shortlist"):
        runs["shortlist"] = shortlist(options.width)
        runs["published size"] = published_size()
    machine = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "gpus": faiss.get_num_gpus(),
        **{p: version(p) for p in ("numpy", "torch", "faiss-gpu")},
    }  # fmt: skip
    if options.json:
        print(json.dumps(runs | {"machine": machine}, indent=1))
    else:
        show(runs)
        print(machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
