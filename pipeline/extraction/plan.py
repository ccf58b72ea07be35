"""The plan: which cells are missing, and what each will be computed from.

Everything a build does follows from comparing two keys per cell: the clip's row key, and the one
its cell was made with. Building, resuming, adding and replacing videos, and `update` after a
network has changed are this one comparison. A missing cell is computed from the deepest feature of
the store that can give it; from its video where none can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from varve.pipeline.backbones import Backbone, ClassPrompts
from varve.pipeline.extraction.blocks import Block, cached_blocks, video_blocks
from varve.pipeline.extraction.extract import ClipWork
from varve.pipeline.extraction.passes import Output, Pass, Source
from varve.pipeline.extraction.sources import (
    CachedColumn,
    Inventory,
    frame_finder,
    lossless,
    refusal,
    rows_with_cells,
    sources,
    whole_sources,
)
from varve.stores.clips import row_keys
from varve.stores.columns import Column
from varve.stores.pages import PAGE_FRAMES
from varve.stores.windows import Parts


@dataclass(frozen=True)
class ColumnPlan:
    """Work to do for one column. Masks are bool [clips].

    Attributes:
        column: The column, on disk or to be made.
        valid: Cells made from the clip's present bytes.
        marked: Cells that exist, also those of clips that have changed or gone.
        stale: Cells made from other bytes than the clip has now.
        staged: Staged file of an unfinished build, by the row whose cell it has.
        copied: Row with the same bytes to copy the cell from, by the row to write.
        compute: Rows to compute.
        sources: Features that some rows of `compute` are computed from, each with the row of it
            to read for each clip, int64 [clips] (-1 for the others). The rest are computed from
            their videos.
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
        for _, source_rows in self.sources:
            rows &= source_rows < 0
        return rows

    @property
    def missing(self) -> int:
        """Number of cells to write: computed, staged or copied."""
        return int(self.compute.sum()) + len(self.staged) + len(self.copied)

    @property
    def after(self) -> np.ndarray:
        """Cells in the column's shards once the plan is done, bool [clips]."""
        present: np.ndarray = self.marked | self.compute
        present[[*self.staged, *self.copied]] = True
        return present


@dataclass(frozen=True)
class Plan:
    """All that a build will do.

    Attributes:
        table: The table of clips, up to date.
        keys: Row keys, uint8 [clips, 16].
        root: The data set's folder.
        passes: Every requested pass from the videos, then the passes that start from features.
        columns: Plans of the columns of each requested pass.
        blocks: The work; empty where nothing is missing.
        left_out: Files of the data set that are no clip, by kind; see `Listing`.
        prompts: Words of the classes in their prompts; None where no text features are kept.
    """

    table: pd.DataFrame
    keys: np.ndarray
    root: Path
    passes: tuple[Pass, ...]
    columns: tuple[tuple[ColumnPlan, ...], ...]
    blocks: tuple[Block, ...] = field(repr=False)
    left_out: tuple[tuple[str, int], ...] = ()
    prompts: ClassPrompts | None = None

    @property
    def all_columns(self) -> list[ColumnPlan]:
        return [plan for plans in self.columns for plan in plans]

    @property
    def unit(self) -> str:
        """Name of the rows of the table: "clips", or "pages" or "windows" of whole videos."""
        whole = [pass_.frame_set for pass_ in self.passes if pass_.frame_set.whole]
        return "clips" if not whole else "pages" if whole[0].in_pages else "windows"

    @property
    def decodes(self) -> int:
        """Files to decode."""
        return len({file.path for block in self.blocks for file in block.files})

    @property
    def clips(self) -> int:
        """Clips to compute."""
        computed = (clip for block in self.blocks for clip in block.clips if self.frames_of(clip))
        return len({clip.key for clip in computed})

    def frames_of(self, clip: ClipWork) -> int:
        """Frames that go through a network for a clip, all passes together."""
        frame_sets = [self.passes[p].frame_set for p, outputs in clip.needs.items() if outputs]
        return sum(map(clip.frames_in, frame_sets))

    def batches(self, number: int) -> int:
        """Forward batches of pass `number`."""
        pass_ = self.passes[number]
        size = pass_.batch_clips
        return sum(-(-block.runs_of(number, pass_.frame_set) // size) for block in self.blocks)

    def calls(self, number: int) -> int:
        """Stage calls of pass `number`: its batches, times the stages that each runs."""
        pass_ = self.passes[number]
        return sum(
            -(-block.runs_of(number, pass_.frame_set) // pass_.batch_clips)
            * len(pass_.run_stages(outputs))
            for block in self.blocks
            if (outputs := block.outputs_of(number))
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of the features that computations start from."""
        return sum(
            block.clips_of(number) * pass_.source.cell_bytes
            for number, pass_ in enumerate(self.passes)
            if pass_.source
            for block in self.blocks
        )

    @property
    def file_bytes(self) -> int:
        """Bytes of the columns' files once the plan is done."""
        return sum(
            plan.output.spec.file_bytes(plan.after) if plan.missing else plan.column.disk_bytes()
            for plan in self.all_columns
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes of the columns' files at present."""
        return sum(plan.column.disk_bytes() for plan in self.all_columns)


def make_plan(
    inventory: Inventory,
    table: pd.DataFrame,
    rows: np.ndarray,
    root: Path,
    passes: tuple[Pass, ...],
    backbones: Mapping[str, Backbone],
    describe: bool = True,
    parts: Parts | None = None,
) -> Plan:
    """Compare the request with the cells that exist. Decodes and writes nothing.

    Args:
        inventory: The cells that exist.
        table: The table of clips, up to date.
        rows: The requested rows.
        root: The data set's folder.
        passes: The requested passes, from the videos.
        backbones: The networks of the passes, by name.
        describe: Whether to decode clips that the table does not describe, even where all their
            cells are valid.
        parts: Of whole videos, whose table has a row per page, or window; see
            `whole_videos.part_table`.
    """
    keys = row_keys(table) if parts is None else parts.keys
    active = np.zeros(len(table), bool)
    active[rows] = True
    # An overflow costs the cells of that column alone; the clip's other cells are computed.
    active &= ((table["status"] != "quarantined") | (table["reason"] == "not_finite")).to_numpy()
    overflowed = table["overflowed"].tolist()

    def plan_of(output: Output, pass_: Pass) -> ColumnPlan:
        lost = np.array([output.spec.short in shorts for shorts in overflowed], bool)
        plan = _plan_column(inventory, output, keys, active & ~lost)
        return _choose_sources(plan, pass_, table, keys, inventory, backbones, parts)

    columns = tuple(tuple(plan_of(output, pass_) for output in pass_.outputs) for pass_ in passes)
    undescribed = active & (table["num_frames"] == 0).to_numpy() & describe & (parts is None)
    resumed = {
        (number, source): replace(pass_, source=source)
        for number, (pass_, plans) in enumerate(zip(passes, columns, strict=True))
        for plan in plans
        for source, _ in plan.sources
    }
    missing = [[plan.from_video for plan in plans] for plans in columns]
    blocks = video_blocks(table, keys, root, passes, missing, undescribed, parts)
    for p, ((number, source), pass_) in enumerate(resumed.items(), start=len(passes)):
        source_rows = [dict(plan.sources).get(source) for plan in columns[number]]
        frames = None
        if source.grid:
            grid = inventory.grids[source.grid]
            frames = frame_finder(grid, table, keys, pass_.frame_set, parts)
        blocks += cached_blocks(keys, p, pass_, source_rows, len(blocks), parts, frames)
    return Plan(table, keys, root, (*passes, *resumed.values()), columns, tuple(blocks))


def _plan_column(
    inventory: Inventory, output: Output, keys: np.ndarray, active: np.ndarray
) -> ColumnPlan:
    """Find the missing cells of a column that are neither staged nor in another row."""
    column = Column(inventory.store, output.spec)
    done = inventory.done(output.spec)
    marked = done.any(axis=1)
    valid = (done == keys).all(axis=1) & keys.any(axis=1)
    missing = active & ~valid
    staged: dict[int, Path] = {}
    copied: dict[int, int] = {}
    if missing.any():
        for file, row, key in inventory.staged(output.spec):
            if row < len(keys) and missing[row] and (keys[row] == key).all():
                staged[row] = file
        missing[list(staged)] = False
        same = rows_with_cells(CachedColumn(output.spec, done), keys, missing)
        copied = {row: int(same[row]) for row in np.flatnonzero(same >= 0).tolist()}
        missing[list(copied)] = False
    stale = marked & ~valid & active
    return ColumnPlan(output, column, marked, valid, stale, staged, copied, missing)


def _choose_sources(
    plan: ColumnPlan,
    pass_: Pass,
    table: pd.DataFrame,
    keys: np.ndarray,
    inventory: Inventory,
    backbones: Mapping[str, Backbone],
    parts: Parts | None,
) -> ColumnPlan:
    """Choose for each row to compute the deepest feature that it can be computed from."""
    if not plan.compute.any():
        return plan
    backbone, rest = backbones[pass_.backbone], plan.compute.copy()
    chosen: list[tuple[Source, np.ndarray]] = []
    spec = plan.output.spec
    candidates = [
        *sources(inventory.columns, pass_, backbone),
        *whole_sources(inventory, pass_, backbone),
    ]
    # Of one stage, the column of the requested frames comes before one of whole videos.
    candidates.sort(key=lambda candidate: -backbone.stage_names.index(candidate[0].stage))
    for source, column in candidates:
        if column.spec.relative_path == spec.relative_path or refusal(
            source, plan.output, pass_, backbone
        ):
            continue
        in_pages = pass_.frame_set.in_pages
        if not source.grid or (in_pages and source.grid == pass_.frame_set.grid):
            rows = rows_with_cells(column, keys, rest)
        else:
            rows = np.full(len(keys), -1, np.int64)
            grid = inventory.grids[source.grid]
            # Pages that a build of another column has added have no row in this one.
            done = column.done[: len(grid)]
            marked = np.zeros(len(grid), bool)
            marked[: len(done)] = (done == grid.keys[: len(done)]).all(axis=1)
            frames_of = frame_finder(grid, table, keys, pass_.frame_set, parts)
            for row in np.flatnonzero(rest).tolist():
                frames = frames_of(row)
                if frames is not None and marked[frames // PAGE_FRAMES].all():
                    rows[row] = row
        if (rows >= 0).any():
            chosen.append((source, rows))
            rest &= rows < 0
    # Recorded with the column: its cells are rounded more than the network's own numbers.
    rounded = {s.dtype for s, _ in chosen if not lossless(s.dtype, pass_.precision)}
    if rounded:
        resumed = sorted({*spec.attributes.get("resumed", []), *rounded})
        spec = replace(spec, attributes={**spec.attributes, "resumed": resumed})
    output = replace(plan.output, spec=spec)
    return replace(plan, output=output, column=Column(inventory.store, spec), sources=tuple(chosen))
