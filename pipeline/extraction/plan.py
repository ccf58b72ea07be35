"""The plan: which cells are missing, and where each will come from.

Everything a build does follows from comparing two keys per cell, the clip's row key and the one
its cell was made with. `build`, resuming, adding and replacing videos, and `update` after a
network has changed are this one comparison. A missing cell comes from the deepest feature of the
store that can serve; from its video where none can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from varve.pipeline.backbones import Backbone
from varve.pipeline.extraction import overflow
from varve.pipeline.extraction.passes import Output, Pass, Source
from varve.pipeline.extraction.sources import Ancestors, holders, lossless, refusal
from varve.pipeline.extraction.worker import FACTS_ONLY, Block, ClipWork, FileWork
from varve.stores import FeatureStore, staging
from varve.stores.clips import row_keys
from varve.stores.columns import Column

# Pictures a block: a few seconds of a ViT-B on two cores; what a kill may cost.
CPU_BLOCK_PICTURES = 128
GPU_BLOCK_PICTURES = 2048
MAX_CLIPS_A_PASS = 1024
# A block that begins deep in a network takes more clips, up to this many and this much to read.
MAX_CACHED_CLIPS = 2048
MAX_CACHED_BYTES = 1 << 30
# A stage on the class token alone, beside one on all tokens.
CLASS_TOKEN_WORK = 1 / 64


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
        sources: For some rows of `compute`, the feature they are computed from, and the row of
            it that holds each, int64 [clips] (-1 for the others). The rest come from their videos.
    """

    output: Output
    column: Column
    marked: np.ndarray
    valid: np.ndarray
    stale: np.ndarray
    staged: dict[int, Path]
    copied: dict[int, int]
    compute: np.ndarray
    sources: tuple[tuple[Source, np.ndarray], ...] = ()

    @property
    def from_video(self) -> np.ndarray:
        """Rows to compute from their videos, bool [clips]."""
        rows = self.compute.copy()
        for _, held in self.sources:
            rows &= held < 0
        return rows

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
        passes: Every pass asked for from the videos, then those that begin from features.
        columns: Plans of each of the former's columns.
        blocks: The work; empty where nothing is missing.
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
        return len(
            {clip.key for block in self.blocks for clip in block.clips if self.frames_of(clip)}
        )

    def frames_of(self, clip: ClipWork) -> int:
        """Frames that go through a network for a clip, all passes together."""
        needed = {p for p, c in clip.needs if c != FACTS_ONLY}
        return sum(self.passes[p].frame_set.frames for p in needed)

    def batches(self, number: int) -> int:
        """Forward batches of pass `number`."""
        size = self.passes[number].batch_clips
        return sum(-(-block.clips_of(number) // size) for block in self.blocks)

    def calls(self, number: int) -> int:
        """Stage calls of pass `number`: batches, times the stages that each runs."""
        one = self.passes[number]
        total = 0
        for block in self.blocks:
            outputs = block.outputs_of(number)
            if outputs:
                batches = -(-block.clips_of(number) // one.batch_clips)
                total += batches * len(one.run_stages(outputs))
        return total

    @property
    def bytes_read(self) -> int:
        """Bytes of the features that computations begin from."""
        return sum(
            block.clips_of(number) * one.source.cell_bytes
            for number, one in enumerate(self.passes)
            if one.source
            for block in self.blocks
        )

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
    store: Path,
    opened: FeatureStore | None,
    table: pd.DataFrame,
    rows: np.ndarray,
    root: Path,
    passes: tuple[Pass, ...],
    backbones: Mapping[str, Backbone],
    describe: bool = True,
) -> Plan:
    """Compare what is asked with what is there. Writes nothing.

    Args:
        store: The store's folder.
        opened: The store; None where it does not exist yet.
        table: The table of clips, brought up to date.
        rows: The rows that are asked for.
        passes: What is asked, from the videos.
        backbones: The networks of the passes, by name.
        describe: Decode clips of which the table tells nothing, though all their cells be there.
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
    if any(plan.compute.any() for plans in columns for plan in plans):
        ancestors = Ancestors(opened, len(table))
        columns = tuple(
            tuple(_find_sources(plan, one, keys, ancestors, backbones) for plan in plans)
            for one, plans in zip(passes, columns, strict=True)
        )
    undescribed = active & (table["num_frames"] == 0).to_numpy() & describe
    begun = {
        (number, source): replace(one, source=source)
        for number, (one, plans) in enumerate(zip(passes, columns, strict=True))
        for plan in plans
        for source, _ in plan.sources
    }
    blocks = _blocks(table, keys, root, passes, columns, undescribed)
    for p, ((number, source), one) in enumerate(begun.items(), start=len(passes)):
        held = [
            next((rows for s, rows in plan.sources if s == source), None)
            for plan in columns[number]
        ]
        blocks += _cached_blocks(keys, p, one, held, len(blocks))
    return Plan(table, keys, root, (*passes, *begun.values()), columns, tuple(blocks))


def _find_sources(
    plan: ColumnPlan,
    one: Pass,
    keys: np.ndarray,
    ancestors: Ancestors,
    backbones: Mapping[str, Backbone],
) -> ColumnPlan:
    """Give each row to be computed the deepest feature that it can be computed from."""
    backbone, rest, sources = backbones[one.backbone], plan.compute.copy(), []
    spec = plan.output.spec
    for source, held in ancestors.of(one, backbone) if rest.any() else ():
        if held.spec.relative_path == spec.relative_path or refusal(
            source, plan.output, one, backbone
        ):
            continue
        rows = holders(held, keys, rest)
        if (rows >= 0).any():
            sources.append((source, rows))
            rest &= rows < 0
    # Said with the column, since it tells how near its cells are to the network's own numbers.
    rounded = {s.dtype for s, _ in sources if not lossless(s.dtype, one.precision)}
    if rounded:
        resumed = sorted({*spec.attributes.get("resumed", []), *rounded})
        spec = replace(spec, attributes={**spec.attributes, "resumed": resumed})
    output = replace(plan.output, spec=spec)
    column = Column(plan.column.store, spec)
    return replace(plan, output=output, column=column, sources=tuple(sources))


def _plan_column(store: Path, output: Output, keys: np.ndarray, active: np.ndarray) -> ColumnPlan:
    column = Column(store, output.spec)
    done = column.done(len(keys))
    marked = done.any(axis=1)
    valid = (done == keys).all(axis=1) & keys.any(axis=1)
    needed = active & ~valid
    staged: dict[int, Path] = {}
    copied: dict[int, int] = {}
    if needed.any():
        for file in staging.files(store, output.spec.relative_path):
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
) -> list[Block]:
    """Files to decode, in the order of their first row, in blocks of about equal work.

    Rows of `undescribed` are decoded though all their cells may be there: what the table tells of
    them was lost.
    """
    needs: dict[int, set[tuple[int, int]]] = {}
    for p, plans in enumerate(columns):
        for c, plan in enumerate(plans):
            for row in np.flatnonzero(plan.from_video).tolist():
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
    return blocks


def _cached_blocks(
    keys: np.ndarray, number: int, one: Pass, held: list[np.ndarray | None], first: int
) -> list[Block]:
    """Clips that begin from a feature, in the order of their rows, in blocks of about equal work.

    Args:
        number: Of the pass.
        held: By output, the rows of the feature as in `ColumnPlan.sources`; None where the
            output is computed from nothing of it.
    """
    assert one.source is not None
    work: dict[bytes, tuple[list[int], int, set[int]]] = {}
    for c, rows_of in enumerate(held):
        if rows_of is None:
            continue
        for row in np.flatnonzero(rows_of >= 0).tolist():
            rows, _, outputs = work.setdefault(keys[row].tobytes(), ([], int(rows_of[row]), set()))
            outputs.add(c)
            if row not in rows:
                rows.append(row)
    clips = [
        ClipWork(tuple(sorted(rows)), key, None, None, tuple((number, c) for c in sorted(outputs)),
                 row)
        for key, (rows, row, outputs) in work.items()
    ]  # fmt: skip
    clips.sort(key=lambda clip: clip.rows)
    stages = one.run_stages({c for clip in clips for _, c in clip.needs})
    share = len(stages) / len(one.stage_keys)
    share *= CLASS_TOKEN_WORK if one.source.tokens == "class" else 1
    limit = GPU_BLOCK_PICTURES if one.execution.device == "cuda" else CPU_BLOCK_PICTURES
    size = int(limit / max(share, 1 / len(one.stage_keys) / 64) / one.frame_set.frames)
    size = max(1, min(size, MAX_CACHED_CLIPS, MAX_CACHED_BYTES // one.source.cell_bytes))
    return [
        Block(first + i, (), tuple(clips[a : a + size]))
        for i, a in enumerate(range(0, len(clips), size))
    ]


def _optional(seconds: float) -> float | None:
    return None if np.isnan(seconds) else float(seconds)
