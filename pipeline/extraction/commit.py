"""Commit: run a plan's blocks, and write their staged cells into shards.

The builder alone writes shards, so that each has one writer.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from varve.pipeline.backbones import Backbone
from varve.pipeline.config import Runtime
from varve.pipeline.extraction.blocks import Block
from varve.pipeline.extraction.clip_status import Outcome, enter, overflows
from varve.pipeline.extraction.plan import ColumnPlan, Plan
from varve.pipeline.extraction.schedule import Events, Lost, local_workers, run_blocks
from varve.pipeline.extraction.worker import Job, Report
from varve.pipeline.progress import Progress
from varve.pipeline.registry import plugins
from varve.stores import staging
from varve.stores.clips import KEY_BYTES, OVERFLOW
from varve.stores.columns import STORED


@dataclass
class Done:
    """Result of executing a plan.

    Attributes:
        frames: Frames that went through a network, in all passes together.
        seconds: Seconds by part (decode, forward, write), summed over workers.
        calls: Calls of each stage, "network stage".
        failed: Reason and detail, by row, of clips that lack a cell.
        overflowed: Short fingerprints of the columns that cannot represent its value, by row.
    """

    frames: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("decode", "forward", "write"), 0.0)
    )
    calls: "Counter[str]" = field(default_factory=Counter)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    overflowed: dict[int, tuple[str, ...]] = field(default_factory=dict)


def device_of(runtime: Runtime) -> str:
    """Return cpu or cuda, as requested and available.

    Raises:
        ValueError: A GPU is requested and there is none.
    """
    if runtime.device != "auto":
        if runtime.device == "cuda" and not runtime.scheduler and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
        return runtime.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def job_of(plan: Plan, store: Path, runtime: Runtime, describe: bool = True) -> Job:
    """Return what the blocks of a plan share."""
    threads = max((pass_.execution.threads for pass_ in plan.passes), default=1)
    workers = local_workers(threads, runtime.workers)
    children = max(1, (os.cpu_count() or 1) // workers)
    return Job(
        store.absolute(), plan.passes, children, runtime.deadline_seconds, describe, plugins()
    )


def run_plan(
    plan: Plan, job: Job, runtime: Runtime, progress: Progress, networks: Mapping[str, Backbone]
) -> Done:
    """Compute and write every missing cell of a plan; enter what is learnt into its table.

    Args:
        networks: Networks that the workers are given, by name; they load the others.
    """
    shards = {
        column.output.spec.relative_path: ShardWriter(job.store, column, len(plan.table))
        for column in plan.all_columns
    }
    for column in plan.all_columns:
        shards[column.output.spec.relative_path].begin(column.copied, plan.keys)
    done = Done()

    def decoded(block: Block) -> None:
        progress.advance("decode", len(block.clips), sum(map(plan.frames_of, block.clips)))

    def write() -> None:
        began = time.perf_counter()
        progress.advance("write", sum(writer.write_ready() for writer in shards.values()))
        done.seconds["write"] += time.perf_counter() - began

    if plan.blocks:
        events = Events(decoded, progress.message)
        with progress.bars(None, **_totals(plan)):
            write()
            for result in run_blocks(job, list(plan.blocks), runtime, events, networks):
                outcomes = _outcomes_of(result, job)
                _note_staged(result, shards, job)
                enter(plan.table, outcomes)
                frames = _note_done(done, plan, result, outcomes)
                progress.advance("forward", len(outcomes), frames)
                write()
    write()
    return done


def _totals(plan: Plan) -> dict[str, tuple[int, str]]:
    """Return the length and the unit of each progress bar."""
    to_decode = sum(len(block.clips) for block in plan.blocks if block.files)
    totals = {"decode": (to_decode, plan.unit)} if to_decode else {}
    totals["forward"] = (sum(len(block.clips) for block in plan.blocks), plan.unit)
    totals["write"] = (sum(column.missing for column in plan.all_columns), "cells")
    return totals


def _outcomes_of(result: Report | Lost, job: Job) -> list[Outcome]:
    if isinstance(result, Report):
        return result.outcomes
    cause = result.failure.reason, result.failure.detail
    outcomes = [Outcome(clip.rows, clip.key.hex(), *cause) for clip in result.block.clips]
    if job.describe:
        staging.put_facts(job.store, [outcome.to_json() for outcome in outcomes])
    return outcomes


def _note_staged(result: Report | Lost, shards: "dict[str, ShardWriter]", job: Job) -> None:
    """Tell each column's writer which rows of a block are staged, and which will not come."""
    if isinstance(result, Report):
        for folder, (name, rows) in result.staged.items():
            shards[folder].staged(job.store / staging.FOLDER / folder / name, rows)
    # Only in the columns that the block was to fill: others may await the same rows from elsewhere.
    for clip in result.block.clips:
        for p, outputs in clip.needs.items():
            for c in outputs:
                shards[job.passes[p].outputs[c].spec.relative_path].give_up(clip.rows)


def _note_done(done: Done, plan: Plan, result: Report | Lost, outcomes: list[Outcome]) -> int:
    """Add a block's result to what was done. Returns its frames that went through a network."""
    frames = 0
    for clip, outcome in zip(result.block.clips, outcomes, strict=True):
        cause = outcome.reason, outcome.detail
        if not outcome.reason:
            frames += plan.frames_of(clip)
            cause = OVERFLOW, "\n".join(overflows(plan.all_columns, outcome.overflowed))
        if outcome.overflowed:
            done.overflowed |= dict.fromkeys(outcome.rows, outcome.overflowed)
        if outcome.reason or outcome.overflowed:
            done.failed |= dict.fromkeys(outcome.rows, cause)
    done.frames += frames
    if isinstance(result, Report):
        done.calls.update(result.calls)
        for part, seconds in result.seconds.items():
            done.seconds[part] += seconds
    return frames


class ShardWriter:
    """The writer of one column's shards, as their cells become ready.

    A shard is written once, when none of its cells is awaited any more: its staged cells are
    gathered, one file is replaced, its rows are marked done, and the staged files are removed.
    """

    def __init__(self, store: Path, plan: ColumnPlan, clips: int) -> None:
        self._store, self._clips = store, clips
        self.column = plan.column
        self._shard_clips = plan.output.spec.shard_clips
        self._awaited = set(np.flatnonzero(plan.compute).tolist()) | set(plan.copied)
        self._awaited_of = Counter(row // self._shard_clips for row in self._awaited)
        self._staged_of: dict[int, dict[int, Path]] = {}  # by shard: row, file
        self._rows_of: dict[Path, set[int]] = {}
        files = staging.files(store, plan.output.spec.relative_path)
        self._unused = sorted({*files} - {*plan.staged.values()})
        for row, file in plan.staged.items():
            self._note(file, [row])
        self._has_work = bool(self._awaited or plan.staged)

    def begin(self, copied: dict[int, int], keys: np.ndarray) -> None:
        """Make the column or lengthen it, and stage the cells that are copied from other rows.

        Copies are made before anything is overwritten: the other row's video may have been
        replaced. Staged cells that no clip needs are removed.

        Args:
            copied: Row to copy from, by row to write.
            keys: Row keys, uint8 [clips, 16].
        """
        staging.drop(self._store, self._unused)
        if not self._has_work:
            return
        self.column.create(self._clips)
        rows = sorted(copied)
        for start in range(0, len(rows), self._shard_clips):
            part = rows[start : start + self._shard_clips]
            distinct, indices = np.unique([copied[row] for row in part], return_inverse=True)
            cells = self.column.read_cells(distinct.astype(np.int64))[indices]
            block = staging.StagedBlock(np.array(part, np.int64), keys[part], cells)
            self.staged(staging.put(self._store, self.column.spec.relative_path, block), part)

    def staged(self, file: Path, rows: Iterable[int]) -> None:
        """Note that a staged file has the cells of these rows."""
        rows = list(rows)
        self._note(file, rows)
        self.give_up(rows)

    def give_up(self, rows: Iterable[int]) -> None:
        """Stop awaiting these rows: they are staged, or their clips failed."""
        for row in set(rows) & self._awaited:
            self._awaited.remove(row)
            self._awaited_of[row // self._shard_clips] -= 1

    def write_ready(self) -> int:
        """Write every shard that has staged cells and awaits none. Returns the cells written."""
        ready = [shard for shard in self._staged_of if not self._awaited_of[shard]]
        return sum(self._write(shard) for shard in sorted(ready))

    def _note(self, file: Path, rows: list[int]) -> None:
        self._rows_of.setdefault(file, set()).update(rows)
        for row in rows:
            self._staged_of.setdefault(row // self._shard_clips, {})[row] = file

    def _write(self, shard: int) -> int:
        file_of = self._staged_of.pop(shard)
        rows = np.array(sorted(file_of), np.int64)
        spec = self.column.spec
        cells = np.empty((len(rows), *spec.cell), STORED[spec.dtype])
        keys = np.zeros((len(rows), KEY_BYTES), np.uint8)
        files = sorted(set(file_of.values()))
        for file in files:
            block = staging.get(file)
            chosen = [i for i, row in enumerate(block.rows.tolist()) if file_of.get(row) == file]
            indices = np.searchsorted(rows, block.rows[chosen])
            cells[indices], keys[indices] = block.cells[chosen], block.keys[chosen]
        self.column.write_shard(shard, rows, cells, keys, self._clips)
        for row, file in file_of.items():
            self._rows_of[file].discard(row)
        staging.drop(self._store, [file for file in files if not self._rows_of[file]])
        return len(rows)
