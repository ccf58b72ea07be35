"""Carrying out a plan: blocks onto workers, staged cells into shards."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from varve.pipeline.backbones import Backbone
from varve.pipeline.config import Runtime
from varve.pipeline.extraction.assemble import Assembler
from varve.pipeline.extraction.clip_status import take_facts
from varve.pipeline.extraction.plan import Plan
from varve.pipeline.extraction.schedule import Events, Lost, execute, local_workers
from varve.pipeline.extraction.worker import FACTS_ONLY, Block, Job, Report
from varve.pipeline.progress import Progress
from varve.stores import staging


@dataclass
class Done:
    """What was done.

    Attributes:
        frames: Through a network, in all passes together.
        seconds: By part (decode, forward, write), summed over workers.
        calls: Of each stage, "network stage".
        failed: Why, by row, of clips that gave nothing: reason and detail.
    """

    frames: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("decode", "forward", "write"), 0.0)
    )
    calls: "Counter[str]" = field(default_factory=Counter)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)


def device_of(runtime: Runtime) -> str:
    """cpu or cuda, as asked for and as there is.

    Raises:
        ValueError: A GPU is asked for and there is none.
    """
    if runtime.device != "auto":
        if runtime.device == "cuda" and not runtime.scheduler and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
        return runtime.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def job_of(plan: Plan, store: Path, runtime: Runtime, describe: bool = True) -> Job:
    """What the blocks of a plan have in common."""
    threads = max((one.execution.threads for one in plan.passes), default=1)
    workers = local_workers(threads, runtime.workers)
    children = max(1, (os.cpu_count() or 1) // workers)
    return Job(store.absolute(), plan.passes, children, runtime.deadline_seconds, describe)


def carry_out(
    plan: Plan, job: Job, runtime: Runtime, progress: Progress, networks: Mapping[str, Backbone]
) -> Done:
    """Compute and write whatever the plan lacks; keep the table's facts up to date in memory.

    Args:
        networks: Those that the workers are to be given, by name; they load the others.
    """
    store, table = job.store, plan.table
    assemblers = {
        column.output.spec.relative_path: Assembler(store, column, len(table))
        for column in plan.all_columns
    }
    for column in plan.all_columns:
        assemblers[column.output.spec.relative_path].begin(column.copied, plan.keys)
    done = Done()

    def decoded(block: Block) -> None:
        progress.advance("decode", len(block.clips), sum(map(plan.frames_of, block.clips)))

    def write() -> None:
        began = time.perf_counter()
        progress.advance("write", sum(one.write_ready() for one in assemblers.values()))
        done.seconds["write"] += time.perf_counter() - began

    if plan.blocks:
        events = Events(decoded, progress.message)
        to_decode = sum(len(block.clips) for block in plan.blocks if block.files)
        totals = {"decode": (to_decode, "clips")} if to_decode else {}
        totals["forward"] = (sum(len(block.clips) for block in plan.blocks), "clips")
        totals["write"] = (sum(column.missing for column in plan.all_columns), "cells")
        with progress.bars(None, **totals):
            write()
            for answer in execute(job, list(plan.blocks), runtime, events, networks):
                facts = _take_report(answer, assemblers, job)
                take_facts(table, facts)
                whole = [f.get("reason", "") in ("", "not_finite") for f in facts]
                frames = sum(map(plan.frames_of, compress(answer.block.clips, whole)))
                done.frames += frames
                done.failed |= {
                    row: (fact["reason"], fact["detail"])
                    for fact in facts
                    if "reason" in fact
                    for row in fact["rows"]
                }
                if isinstance(answer, Report):
                    done.calls.update(answer.calls)
                    for part, seconds in answer.seconds.items():
                        done.seconds[part] += seconds
                progress.advance("forward", len(facts), frames)
                write()
    write()
    return done


def _take_report(
    answer: Report | Lost, assemblers: dict[str, Assembler], job: Job
) -> list[dict[str, Any]]:
    if isinstance(answer, Lost):
        reason = {"reason": answer.failure.reason, "detail": answer.failure.detail}
        facts = [{"rows": list(c.rows), "key": c.key.hex(), **reason} for c in answer.block.clips]
        if job.describe:
            staging.put_facts(job.store, facts)
    else:
        facts = answer.facts
        for place, (name, rows) in answer.staged.items():
            assemblers[place].staged(job.store / staging.FOLDER / place / name, rows)
    # Of the columns that the block was to fill: others may await the same rows from elsewhere.
    over: dict[str, list[int]] = {}
    for clip in answer.block.clips:
        for p, c in clip.needs:
            if c != FACTS_ONLY:
                place = job.passes[p].outputs[c].spec.relative_path
                over.setdefault(place, []).extend(clip.rows)
    for place, rows in over.items():
        assemblers[place].given_up(rows)
    return facts
