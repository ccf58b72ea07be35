"""Probe: how long a plan will take, from a few clips of it done on this machine."""

import os
import time
from dataclasses import dataclass

import numpy as np

from pipeline.blocks import Block, Job, close_pools, decode, run_pass
from pipeline.execute import local_workers
from pipeline.planning import Plan
from pipeline.progress import Watch
from pipeline.spec import Runtime

FILES = 6
FORWARD_SECONDS = 4.0
START_SECONDS = 8.0  # a cluster of one worker up, its libraries imported


@dataclass(frozen=True)
class Estimate:
    """Seconds a plan will take on this machine.

    Attributes:
        decode_seconds: Of all decoding, one child working alone.
        forward_seconds: Of all forwards, on one worker.
        load_seconds: To build the networks.
        seconds: In all, with the cores shared as the build will share them.
    """

    decode_seconds: float
    forward_seconds: float
    load_seconds: float
    seconds: float


def probe(plan: Plan, job: Job, runtime: Runtime, watch: Watch) -> Estimate:
    """Decode a few files of the plan and run a few batches of each pass.

    The files are spread over the plan, since data sets are often sorted by kind.
    """
    watch.said("probing this machine for a few seconds")
    files = [file for block in plan.blocks for file in block.files]
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, FILES).round().astype(int)]
    decode(job, Block(0, tuple(chosen[:1])))  # starts the children
    seconds = []
    clips = 0
    for file in dict.fromkeys(chosen):
        began = time.perf_counter()
        decode(job, Block(0, (file,)))
        seconds.append(time.perf_counter() - began)
        clips += len(file.clips)
    close_pools()
    decode_seconds = sum(seconds) / clips * plan.clips

    forward_seconds = load_seconds = 0.0
    for number, one in enumerate(plan.passes):
        batches = plan.batches(number)
        if not batches:
            continue
        frames = one.frame_set.frames
        side = one.frame_set.picture.size
        noise = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)
        batch = [noise] * one.execution.batch_clips
        outputs = tuple(range(len(one.outputs)))
        began = time.perf_counter()
        list(run_pass(one, outputs, batch))
        load_seconds += time.perf_counter() - began
        times: list[float] = []
        while sum(times) < FORWARD_SECONDS and len(times) < min(20, batches):
            began = time.perf_counter()
            list(run_pass(one, outputs, batch))
            times.append(time.perf_counter() - began)
        forward_seconds += float(np.median(times)) * batches
    threads = max(one.execution.threads for one in plan.passes)
    workers = 1 if runtime.serial or not threads else local_workers(threads, runtime.workers)
    # On a CPU decoding and forward share the cores; on a GPU they overlap.
    cores = os.cpu_count() or 1
    decoding = decode_seconds / min(job.children * workers, cores)
    computing = forward_seconds / max(1, min(workers, cores // max(1, threads)))
    together = decoding + computing if threads else max(decoding, computing)
    start = START_SECONDS + load_seconds if not runtime.serial else load_seconds
    return Estimate(decode_seconds, forward_seconds, load_seconds, together + start)
