"""Blocks: the missing cells of a plan as pieces of work of about equal size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from varve.pipeline.config import FrameSet
from varve.pipeline.extraction.extract import PART_PAGES, ClipWork, FileWork, optional
from varve.pipeline.extraction.passes import Pass
from varve.stores.pages import PAGE_FRAMES
from varve.stores.windows import Parts

# Frames per block: a few seconds of a ViT-B on two cores. A kill costs at most the blocks in
# flight.
CPU_BLOCK_PICTURES = 128
GPU_BLOCK_PICTURES = 2048
MAX_CLIPS_A_PASS = 1024
# A block that starts deep in a network takes more clips, up to this many and this much to read.
MAX_CACHED_CLIPS = 2048
MAX_CACHED_BYTES = 1 << 30
# Cost of a stage on the class token alone, relative to all tokens.
CLASS_TOKEN_WORK = 1 / 64


@dataclass(frozen=True)
class Block:
    """The work of one task, and the most that a kill of it can cost.

    Attributes:
        number: Number of the block in the plan; lower numbers go first.
        files: Files to decode.
        cached: Clips that start from one feature of the store. A block has files or these.
    """

    number: int
    files: tuple[FileWork, ...]
    cached: tuple[ClipWork, ...] = ()

    @property
    def clips(self) -> list[ClipWork]:
        return [clip for file in self.files for clip in file.clips] + list(self.cached)

    def clips_of(self, pass_number: int) -> int:
        """Return the number of clips that go through a pass's network."""
        return sum(bool(clip.needs.get(pass_number)) for clip in self.clips)

    def runs_of(self, pass_number: int, frame_set: FrameSet) -> int:
        """Return how many clips these are to a pass's network; see `ClipWork.runs_in`."""
        return sum(clip.runs_in(frame_set) for clip in self.clips if clip.needs.get(pass_number))

    def outputs_of(self, pass_number: int) -> set[int]:
        """Return the outputs of a pass that some clip needs."""
        return set().union(*(clip.needs.get(pass_number, ()) for clip in self.clips))

    def halves(self) -> "list[Block]":
        """Return two blocks of half the work each; one that cannot be divided stays whole."""
        parts: tuple[FileWork, ...] | tuple[ClipWork, ...] = self.files or self.cached
        if len(parts) == 1:
            return [self]
        middle = len(parts) // 2
        return [
            replace(self, files=self.files[a:b], cached=self.cached[a:b])
            for a, b in ((0, middle), (middle, len(parts)))
        ]


def video_blocks(
    table: pd.DataFrame,
    keys: np.ndarray,
    root: Path,
    passes: tuple[Pass, ...],
    missing: Sequence[Sequence[np.ndarray]],
    undescribed: np.ndarray,
    parts: Parts | None = None,
) -> list[Block]:
    """Divide files to decode into blocks of about equal work, in the order of their first row.

    Args:
        keys: Row keys, uint8 [clips, 16].
        missing: Rows to compute from their videos, bool [clips], by pass and output.
        undescribed: Rows whose facts the table lacks, bool [clips]. They are decoded even where
            all their cells are valid.
        parts: Of whole videos, whose rows are pages or windows.
    """
    needs: dict[int, dict[int, set[int]]] = {}
    for p, outputs in enumerate(missing):
        for c, rows_to_compute in enumerate(outputs):
            for row in np.flatnonzero(rows_to_compute).tolist():
                needs.setdefault(row, {}).setdefault(p, set()).add(c)
    for row in np.flatnonzero(undescribed).tolist():
        needs.setdefault(row, {0: set()})
    # Clips with the same bytes and interval are one piece of work, done at the first one's path.
    same: dict[bytes, list[int]] = {}
    for row in sorted(needs):
        same.setdefault(keys[row].tobytes(), []).append(row)
    by_file: dict[str, list[ClipWork]] = {}
    for key, rows in same.items():
        first = table.loc[rows[0]]
        numbers = sorted(set().union(*(needs[row] for row in rows)))
        work = ClipWork(
            rows=tuple(rows),
            key=key,
            start_seconds=optional(first["start_seconds"]),
            end_seconds=optional(first["end_seconds"]),
            needs={p: tuple(sorted(set().union(*(needs[row].get(p, ()) for row in rows))))
                   for p in numbers},
            part=None if parts is None else parts.part(rows[0]),
        )  # fmt: skip
        by_file.setdefault(first["path"], []).append(work)
    on_gpu = any(pass_.execution.device == "cuda" for pass_ in passes)
    limit = GPU_BLOCK_PICTURES if on_gpu else CPU_BLOCK_PICTURES
    # A long video is the work of many blocks; the clips of one file are read in one pass over it.
    most = MAX_CLIPS_A_PASS
    if parts is not None:
        most = max(1, min(PART_PAGES * PAGE_FRAMES, limit) // passes[0].frame_set.frames)
        for works in by_file.values():
            works.sort(key=lambda work: work.part or (0, 0))
    files = [
        FileWork(
            path=str(root / path),
            size_bytes=int(table.at[works[0].rows[0], "size_bytes"]),
            mtime_ns=int(table.at[works[0].rows[0], "mtime_ns"]),
            clips=tuple(works[a : a + most]),
        )
        for path, works in by_file.items()
        for a in range(0, len(works), most)
    ]
    groups: list[list[FileWork]] = []
    pictures = 0
    for file in files:
        more = sum(clip.frames_in(passes[p].frame_set) for clip in file.clips for p in clip.needs)
        if not groups or pictures + more > limit:
            groups.append([])
            pictures = 0
        groups[-1].append(file)
        pictures += more
    return [Block(number, tuple(group)) for number, group in enumerate(groups)]


def cached_blocks(
    keys: np.ndarray,
    number: int,
    pass_: Pass,
    sources: Sequence[np.ndarray | None],
    first: int,
    parts: Parts | None = None,
    frames: Callable[[int], np.ndarray | None] | None = None,
) -> list[Block]:
    """Divide clips that start from a feature into blocks of about equal work, in row order.

    Args:
        keys: Row keys, uint8 [clips, 16].
        number: Number of the pass.
        sources: By output, the rows of the feature as in `ColumnPlan.sources`; None where the
            output is not computed from it.
        first: Number of the first block.
        parts: Of whole videos, whose rows are pages or windows.
        frames: Gives the frames of whole videos that a row is taken from, int64 [T]; None where the
            source has a cell for it.
    """
    assert pass_.source is not None
    work: dict[bytes, tuple[list[int], int, set[int]]] = {}
    for c, rows_of in enumerate(sources):
        if rows_of is None:
            continue
        for row in np.flatnonzero(rows_of >= 0).tolist():
            rows, _, outputs = work.setdefault(keys[row].tobytes(), ([], int(rows_of[row]), set()))
            outputs.add(c)
            if row not in rows:
                rows.append(row)

    def frames_of(row: int) -> tuple[int, ...]:
        rows = frames(row) if frames else None
        return () if rows is None else tuple(rows.tolist())

    clips = [
        ClipWork(tuple(sorted(rows)), key, None, None, {number: tuple(sorted(outputs))}, row,
                 None if parts is None else parts.part(rows[0]), frames_of(rows[0]))
        for key, (rows, row, outputs) in work.items()
    ]  # fmt: skip
    clips.sort(key=lambda clip: clip.rows)
    stages = pass_.run_stages(set().union(*(clip.needs[number] for clip in clips)))
    share = len(stages) / len(pass_.stage_keys)
    share *= CLASS_TOKEN_WORK if pass_.source.tokens == "class" else 1
    limit = GPU_BLOCK_PICTURES if pass_.execution.device == "cuda" else CPU_BLOCK_PICTURES
    size = int(limit / max(share, 1 / len(pass_.stage_keys) / 64) / pass_.frame_set.frames)
    size = max(1, min(size, MAX_CACHED_CLIPS, MAX_CACHED_BYTES // pass_.source.cell_bytes))
    return [
        Block(first + i, (), tuple(clips[a : a + size]))
        for i, a in enumerate(range(0, len(clips), size))
    ]
