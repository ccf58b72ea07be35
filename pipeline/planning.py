"""The plan: which cells are missing, and where each will come from.

Everything a build does follows from comparing two keys per cell, the clip's row key and the one
its cell was made with. `build`, resuming, adding and replacing videos are this one comparison.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline import overflow
from pipeline.blocks import FACTS_ONLY, Block, ClipWork, FileWork
from pipeline.columns import Output, Pass
from stores import staging
from stores.clips import row_keys
from stores.columns import Column

# Pictures a block: a few seconds of a ViT-B on two cores; what a kill may cost.
CPU_BLOCK_PICTURES = 128
GPU_BLOCK_PICTURES = 2048
MAX_CLIPS_A_PASS = 1024


@dataclass(frozen=True)
class ColumnPlan:
    """What is to be done for one column. Masks are bool [clips].

    Attributes:
        column: On disk, or to be made.
        valid: Cells that hold.
        marked: Cells that exist, also those of clips that have changed or gone.
        stale: Cells made from other bytes than the clip has now.
        staged: Cells computed by a build that did not end, by staged file.
        copied: Row to write, by the row with the same bytes whose cell it takes.
        compute: Rows to compute.
    """

    output: Output
    column: Column
    marked: np.ndarray
    valid: np.ndarray
    stale: np.ndarray
    staged: dict[int, Path]
    copied: dict[int, int]
    compute: np.ndarray

    @property
    def missing(self) -> int:
        return int(self.compute.sum()) + len(self.staged) + len(self.copied)

    @property
    def after(self) -> np.ndarray:
        """Which cells the column's shards hold once the plan is carried out."""
        held: np.ndarray = self.marked | self.compute
        held[[*self.staged, *self.copied]] = True
        return held


@dataclass(frozen=True)
class Plan:
    """All that a build will do.

    Attributes:
        table: The table of clips, brought up to date.
        keys: Row keys, uint8 [clips, 16].
        passes: Every pass asked for, each with the plans of its columns.
        blocks: The work for which videos are decoded; empty where nothing is missing.
        root: The data set's folder.
    """

    table: pd.DataFrame
    keys: np.ndarray
    root: Path
    passes: tuple[Pass, ...]
    columns: tuple[tuple[ColumnPlan, ...], ...]
    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def all_columns(self) -> list[ColumnPlan]:
        return [plan for plans in self.columns for plan in plans]

    @property
    def decodes(self) -> int:
        """Files to decode, each once."""
        return sum(len(block.files) for block in self.blocks)

    @property
    def clips(self) -> int:
        """Clips to compute."""
        return sum(self.frames_of(clip) > 0 for block in self.blocks for clip in block.clips)

    def frames_of(self, clip: ClipWork) -> int:
        """Frames that go through a network for a clip, all passes together."""
        needed = {p for p, c in clip.needs if c != FACTS_ONLY}
        return sum(self.passes[p].frame_set.frames for p in needed)

    def batches(self, number: int) -> int:
        """Forward batches of pass `number`."""
        size = self.passes[number].execution.batch_clips
        return sum(-(-block.clips_of(number) // size) for block in self.blocks)

    @property
    def file_bytes(self) -> int:
        """Bytes of the columns' files once the plan is carried out."""
        return sum(
            plan.output.spec.file_bytes(plan.after) if plan.missing else plan.column.disk_bytes()
            for plan in self.all_columns
        )

    @property
    def held_bytes(self) -> int:
        """Bytes of the columns' files as they are."""
        return sum(plan.column.disk_bytes() for plan in self.all_columns)


def make_plan(
    store: Path, table: pd.DataFrame, rows: np.ndarray, root: Path, passes: tuple[Pass, ...]
) -> Plan:
    """Compare what is asked with what is there. Writes nothing.

    Args:
        store: The store's folder; it may not exist yet.
        table: The table of clips, brought up to date by a scan.
        rows: The rows of the present listing.
        passes: What is asked.
    """
    keys = row_keys(table)
    active = np.zeros(len(table), bool)
    active[rows] = True
    # A clip that left one column's number format is whole in every other way.
    active &= ((table["status"] != "quarantined") | (table["reason"] == "not_finite")).to_numpy()
    details = table["detail"].tolist()

    def wanted(output: Output) -> np.ndarray:
        lost = [overflow.known(detail, output.spec.short) for detail in details]
        rows: np.ndarray = active & ~np.array(lost, bool)
        return rows

    columns = tuple(
        tuple(_plan_column(store, output, keys, wanted(output)) for output in one.outputs)
        for one in passes
    )
    undescribed = active & (table["num_frames"] == 0).to_numpy()
    return Plan(
        table, keys, root, passes, columns, _blocks(table, keys, root, passes, columns, undescribed)
    )


def _plan_column(store: Path, output: Output, keys: np.ndarray, active: np.ndarray) -> ColumnPlan:
    column = Column(store, output.spec)
    done = column.done(len(keys))
    marked = done.any(axis=1)
    valid = (done == keys).all(axis=1) & keys.any(axis=1)
    needed = active & ~valid
    staged: dict[int, Path] = {}
    copied: dict[int, int] = {}
    if needed.any():
        for file in staging.files(store, output.spec.place):
            for row, key in staging.rows_and_keys(file):
                if row < len(keys) and needed[row] and (keys[row] == key).all():
                    staged[row] = file
        holders = {done[row].tobytes(): int(row) for row in np.flatnonzero(marked)}
        for lacking in np.flatnonzero(needed).tolist():
            holder = holders.get(keys[lacking].tobytes())
            if holder is not None and lacking not in staged:
                copied[lacking] = holder
        needed[[*staged, *copied]] = False
    stale = marked & ~valid & active
    return ColumnPlan(output, column, marked, valid, stale, staged, copied, needed)


def _blocks(
    table: pd.DataFrame,
    keys: np.ndarray,
    root: Path,
    passes: tuple[Pass, ...],
    columns: tuple[tuple[ColumnPlan, ...], ...],
    undescribed: np.ndarray,
) -> tuple[Block, ...]:
    """Files to decode, in the order of their first row, in blocks of about equal work.

    Rows of `undescribed` are decoded though all their cells may be there: what the table tells of
    them was lost.
    """
    needs: dict[int, set[tuple[int, int]]] = {}
    for p, plans in enumerate(columns):
        for c, plan in enumerate(plans):
            for row in np.flatnonzero(plan.compute).tolist():
                needs.setdefault(row, set()).add((p, c))
    for lacking in np.flatnonzero(undescribed).tolist():
        needs.setdefault(lacking, {(0, FACTS_ONLY)})
    # Clips with the same bytes and stretch are one piece of work, done at the first one's path.
    same: dict[bytes, list[int]] = {}
    for needed in sorted(needs):
        same.setdefault(keys[needed].tobytes(), []).append(needed)
    by_file: dict[str, list[ClipWork]] = {}
    for key, rows in same.items():
        first = table.loc[rows[0]]
        work = ClipWork(
            rows=tuple(rows),
            key=key,
            start_seconds=_optional(first["start_seconds"]),
            end_seconds=_optional(first["end_seconds"]),
            needs=tuple(sorted(set().union(*(needs[row] for row in rows)))),
        )
        by_file.setdefault(first["path"], []).append(work)
    files = [
        FileWork(
            path=str(root / path),
            size_bytes=int(table.at[works[0].rows[0], "size_bytes"]),
            mtime_ns=int(table.at[works[0].rows[0], "mtime_ns"]),
            clips=tuple(works[a : a + MAX_CLIPS_A_PASS]),
        )
        for path, works in by_file.items()
        for a in range(0, len(works), MAX_CLIPS_A_PASS)
    ]
    on_gpu = any(one.execution.device == "cuda" for one in passes)
    limit = GPU_BLOCK_PICTURES if on_gpu else CPU_BLOCK_PICTURES
    blocks: list[Block] = []
    gathered: list[FileWork] = []
    pictures = 0
    for file in files:
        own = sum(
            passes[p].frame_set.frames for clip in file.clips for p in {p for p, _ in clip.needs}
        )
        if gathered and pictures + own > limit:
            blocks.append(Block(len(blocks), tuple(gathered)))
            gathered, pictures = [], 0
        gathered.append(file)
        pictures += own
    if gathered:
        blocks.append(Block(len(blocks), tuple(gathered)))
    return tuple(blocks)


def _optional(seconds: float) -> float | None:
    return None if np.isnan(seconds) else float(seconds)
