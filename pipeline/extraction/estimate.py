"""Estimate: how long a plan will take, from a few of its clips run on this machine."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from varve.pipeline.backbones import Backbone
from varve.pipeline.config import Runtime
from varve.pipeline.extraction.blocks import Block
from varve.pipeline.extraction.extract import ClipWork, close_pools
from varve.pipeline.extraction.forward import Cells, adopted, run_pages, run_pass
from varve.pipeline.extraction.passes import Pass
from varve.pipeline.extraction.plan import Plan
from varve.pipeline.extraction.schedule import local_workers
from varve.pipeline.extraction.worker import Job, decode
from varve.pipeline.progress import Progress

FILES = 6
FORWARD_SECONDS = 4.0
START_SECONDS = 8.0  # to start a cluster of one worker, which imports its libraries


@dataclass(frozen=True)
class Estimate:
    """Seconds that a plan will take on this machine.

    Attributes:
        decode_seconds: Seconds of all decoding in one child.
        forward_seconds: Seconds of all forwards in one worker.
        load_seconds: Seconds to build the networks.
        seconds: Total, with the cores shared as the build will share them.
    """

    decode_seconds: float
    forward_seconds: float
    load_seconds: float
    seconds: float


def probe(
    plan: Plan, job: Job, runtime: Runtime, progress: Progress, networks: Mapping[str, Backbone]
) -> Estimate:
    """Decode a few files of the plan and run a few batches of each pass, with these networks.

    The files are spread over the plan, since data sets are often sorted by kind.
    """
    progress.message("probing this machine for a few seconds")
    decode_seconds = _decoding(plan, job)
    with adopted(networks):
        load_seconds, forward_seconds = _running(plan, job)
    threads = max(pass_.execution.threads for pass_ in plan.passes)
    workers = 1 if runtime.serial or not threads else local_workers(threads, runtime.workers)
    # On a CPU decoding and forward share the cores; on a GPU they overlap.
    cores = os.cpu_count() or 1
    decoding = decode_seconds / min(job.children * workers, cores)
    computing = forward_seconds / max(1, min(workers, cores // max(1, threads)))
    together = decoding + computing if threads else max(decoding, computing)
    start = START_SECONDS + load_seconds if not runtime.serial else load_seconds
    return Estimate(decode_seconds, forward_seconds, load_seconds, together + start)


def _running(plan: Plan, job: Job) -> tuple[float, float]:
    """Measure the seconds to build the networks, and of all forwards in one worker."""
    load_seconds = forward_seconds = 0.0
    for number, pass_ in enumerate(plan.passes):
        batches = plan.batches(number)
        if not batches:
            continue
        clip = next(c for b in plan.blocks for c in b.clips if c.needs.get(number))
        example = _example(job, pass_, clip)
        outputs = tuple(set().union(*(block.outputs_of(number) for block in plan.blocks)))
        run = partial(_run, pass_, outputs, clip, example)
        each = -(-clip.runs_in(pass_.frame_set) // pass_.batch_clips)  # batches in a run
        began = time.perf_counter()
        run()
        load_seconds += time.perf_counter() - began
        times: list[float] = []
        while sum(times) < FORWARD_SECONDS and len(times) < min(20, -(-batches // each)):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        forward_seconds += float(np.median(times)) / each * batches
    return load_seconds, forward_seconds


def _run(pass_: Pass, outputs: tuple[int, ...], clip: ClipWork, example: list[np.ndarray]) -> None:
    """Run a batch of clips, or one page."""
    if pass_.frame_set.in_pages:
        run_pages(pass_, outputs, example, [clip.frames_in(pass_.frame_set)])
    else:
        list(run_pass(pass_, outputs, example * pass_.batch_clips))


def _decoding(plan: Plan, job: Job) -> float:
    """Measure the seconds of all decoding in one child."""
    files = [file for block in plan.blocks for file in block.files]
    if not files:
        return 0.0
    indices = np.unique(np.linspace(0, len(files) - 1, FILES).round().astype(int))
    chosen = [files[i] for i in indices]
    decode(job, Block(0, tuple(chosen[:1])))  # starts the children
    seconds = clips = 0.0
    for file in chosen:
        began = time.perf_counter()
        decode(job, Block(0, (file,)))
        seconds += time.perf_counter() - began
        clips += len(file.clips)
    close_pools()
    return seconds / clips * sum(len(file.clips) for file in files)


def _example(job: Job, pass_: Pass, clip: ClipWork) -> list[np.ndarray]:
    """Return the input of a clip, or page, in a pass: its cell, or noise for its frames."""
    if pass_.source:
        cells = Cells(job.store, pass_.source, [clip.source_row], [clip.source_frames])
        return list(cells[:1])
    frames = clip.frames_in(pass_.frame_set)
    picture = pass_.frame_set.picture
    noise = np.random.default_rng(0).integers(0, 256, (frames, *picture.shape))
    return [noise.astype(picture.dtype)]
