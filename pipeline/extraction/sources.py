"""Sources: the stored features that a computation can start from, the deepest first.

A column is a source where its fingerprint is one that the present network's own chain gives. It is
looked up by key alone, whatever its name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from varve.pipeline.backbones import Backbone, reduction_of, reductions_of, resume_refusal
from varve.pipeline.config import DTYPES, WHOLE, FrameSet, Picture
from varve.pipeline.decoders import sampling
from varve.pipeline.extraction.passes import (
    Output,
    Pass,
    Source,
    column_key,
    column_metadata,
    frames_key,
)
from varve.stores import FeatureStore, pages, staging
from varve.stores.columns import Column, ColumnSpec
from varve.stores.pages import Pages
from varve.stores.windows import Parts, lost_message, table_file

# Bits of a number's fraction, which limit the precision of a stored feature.
FRACTION_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}


@dataclass(frozen=True)
class CachedColumn:
    """A column of the store, and the row keys of its cells, uint8 [clips, 16].

    One of whole videos has a cell per page of its `grid`, or per window; `windows` has then the
    grid of their frames, T and their step. No other frames are taken from windows.
    """

    spec: ColumnSpec
    done: np.ndarray
    grid: str = ""
    windows: tuple[str, int, int] | None = None


class Inventory(Protocol):
    """The cells that exist, as `make_plan` needs to know them."""

    store: Path

    def done(self, spec: ColumnSpec) -> np.ndarray:
        """Return the row keys of a column's cells, uint8 [clips, 16]; zeros where there is none."""

    def staged(self, spec: ColumnSpec) -> Iterator[tuple[Path, int, np.ndarray]]:
        """Yield file, row and row key of each of a column's cells that wait in staging."""

    @property
    def columns(self) -> Mapping[str, Sequence[CachedColumn]]:
        """All columns of the store by fingerprint."""

    @property
    def grids(self) -> Mapping[str, Pages]:
        """The pages of whole videos that the columns have, by grid."""


class StoreInventory:
    """The cells of a store on disk.

    Args:
        store: The store's folder.
        opened: The store; None where it does not exist yet.
        clips: Number of rows of the table.
    """

    def __init__(self, store: Path, opened: FeatureStore | None, clips: int) -> None:
        self.store, self._opened, self._clips = store, opened, clips

    def done(self, spec: ColumnSpec) -> np.ndarray:
        return Column(self.store, spec).done(self._clips)

    def staged(self, spec: ColumnSpec) -> Iterator[tuple[Path, int, np.ndarray]]:
        for file in staging.files(self.store, spec.relative_path):
            for row, key in staging.rows_and_keys(file):
                yield file, row, key

    @cached_property
    def columns(self) -> dict[str, list[CachedColumn]]:
        """All columns of the store by fingerprint.

        Raises:
            Damaged: A column's metadata or marks cannot be read.
        """
        columns: dict[str, list[CachedColumn]] = {}
        for backbone, feature, path in sorted(self._opened.columns()) if self._opened else ():
            with column_metadata(path / "zarr.json") as array:
                fingerprint = array["attributes"]["fingerprint"]
                dtype, (rows, *cell) = array["attributes"]["dtype"], array["shape"]
                grid, windows = array["attributes"].get("pages", ""), None
                if of := array["attributes"].get("windows"):
                    windows = of["grid"], of["frames"], of["step"]
            whole = grid or windows
            spec = ColumnSpec(backbone, feature, fingerprint, tuple(cell), dtype, {})
            done = Column(self.store, spec).done(max(rows, self._clips) if whole else self._clips)
            columns.setdefault(fingerprint, []).append(CachedColumn(spec, done, grid, windows))
        return columns

    @cached_property
    def grids(self) -> dict[str, Pages]:
        """The pages of whole videos that the columns have, by grid."""
        names = {column.grid for columns in self.columns.values() for column in columns}
        return {grid: pages.read(self.store, grid) for grid in sorted(names - {""})}

    def lost_tables(self) -> list[str]:
        """Return a message for each table of pages or windows that columns have and is missing."""
        windows = {column.windows for columns in self.columns.values() for column in columns}
        lost = [pages.lost_message(self.store, g) for g, of in self.grids.items() if not len(of)]
        return lost + [
            lost_message(self.store, *of)
            for of in sorted(filter(None, windows))
            if not table_file(self.store, *of).exists()
        ]


def sources(
    columns: Mapping[str, Sequence[CachedColumn]], pass_: Pass, backbone: Backbone
) -> list[tuple[Source, CachedColumn]]:
    """Return every column that holds a feature of the pass's own chain, the deepest first.

    At one stage, a column that keeps the run's numbers exactly comes before one that rounds them,
    and a part of the output before all of it: there is less to compute.
    """
    candidates = []
    for depth, stage in enumerate(backbone.stages):
        for reduction in ("", *reductions_of(stage)):
            for dtype in DTYPES:
                key = column_key(pass_.stage_keys[stage.name], reduction, dtype)
                for column in columns.get(key, ()):
                    spec = column.spec
                    source = Source(
                        stage.name, reduction, dtype, spec.backbone, spec.feature,
                        spec.fingerprint, spec.cell_bytes,
                        reduction_of(stage, reduction).tokens, column.grid,
                    )  # fmt: skip
                    rank = (-depth, not lossless(dtype, pass_.precision), spec.cell_bytes)
                    candidates.append((rank, source, column))
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1].backbone))
    return [(source, column) for _, source, column in candidates]


def whole_sources(
    inventory: Inventory, pass_: Pass, backbone: Backbone
) -> list[tuple[Source, CachedColumn]]:
    """Return every column of whole videos whose frames are the same pictures as those of a pass."""
    frame_set = pass_.frame_set
    varied = frame_set.view and (frame_set.flip or frame_set.random_crop)
    varied = varied or frame_set.view < 0  # a corner of the picture
    if varied or not isinstance(frame_set.picture, Picture):
        return []
    candidates = []
    for grid in inventory.grids:
        name, _, number = grid.rpartition("-")
        rate = {"fps": float(number)} if name == "fps" else {"stride": int(number)}
        whole = FrameSet(
            sampling=WHOLE, decoder=frame_set.decoder, picture=frame_set.picture, **rate
        )
        if frame_set.in_pages and grid == frame_set.grid:
            continue  # found by its own key
        keys = backbone.keys(frames_key(whole))
        candidates += sources(inventory.columns, replace(pass_, stage_keys=keys), backbone)
    return candidates


def frame_finder(
    source: Pages,
    table: pd.DataFrame,
    keys: np.ndarray,
    frame_set: FrameSet,
    parts: Parts | None,
) -> Callable[[int], np.ndarray | None]:
    """Return a function that finds the frames of a clip, page or window in pages of a grid.

    The function takes a row of the table and returns rows of the flattened pages, int64 [T], or
    None where the grid does not have all of these frames. For clips it must have every frame, since
    a sampling rule chooses among all of them.

    Args:
        source: The pages of the grid.
        table: The table of clips, of pages or of windows.
        keys: Row keys of the table, uint8 [rows, 16].
        frame_set: The frames to find.
        parts: Of whole videos, whose rows are pages or windows; None for clips.
    """
    spans, times, kept = source.spans(table), source.times.reshape(-1), source.indices.reshape(-1)
    if parts is not None:

        def frames_of_part(row: int) -> np.ndarray | None:
            first, last = spans[row]
            wanted = parts.indices_of(row)
            at = np.minimum(first + np.searchsorted(kept[first:last], wanted), last - 1)
            return at if first < last and (kept[at] == wanted).all() else None

        return frames_of_part
    choose, num_frames = sampling.chooser(frame_set), table["num_frames"].to_numpy()

    def frames_of_clip(row: int) -> np.ndarray | None:
        first, last = spans[row]
        if first == last or last - first != num_frames[row]:
            return None
        chosen: np.ndarray = first + choose(times[first:last], keys[row].tobytes().hex())
        return chosen

    return frames_of_clip


def refusal(source: Source, output: Output, pass_: Pass, backbone: Backbone) -> str:
    """Return why an output cannot be computed from a column; "" where it can."""
    names = backbone.stage_names
    first, last = names.index(source.stage), names.index(output.stage)
    if first > last:
        return f"{source.stage} comes after {output.stage}"
    wanted = output.spec.dtype
    fine = FRACTION_BITS[source.dtype] >= FRACTION_BITS[wanted]
    stage = backbone.stages[first]
    if source.reduction not in ("", *reductions_of(stage)):
        return f"no reduction {source.reduction} is registered: load its file with --plugin"
    # An aggregate is float32 whatever the run's precision.
    exact = reduction_of(stage, source.reduction).expand is not None
    whole = exact and lossless(source.dtype, pass_.precision)
    if not (fine or whole):
        return f"it is kept in {source.dtype}, too coarse for a feature in {wanted}"
    return resume_refusal(source.reduction, backbone.stages[first : last + 1], output.reduction)


def lossless(dtype: str, precision: str) -> bool:
    """Return whether a number format stores the numbers of a run in `precision` exactly."""
    return dtype in ("float32", precision)


def rows_with_cells(column: CachedColumn, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return for each clip the row of the column that has its cell, int64 [clips].

    It is another clip's row where that has the same bytes, and -1 where there is no valid cell.

    Args:
        keys: Row keys of the clips, uint8 [clips, 16].
        rows: Clips to look up, bool [clips].
    """
    result = np.full(len(keys), -1, np.int64)
    valid = rows & (column.done == keys).all(axis=1) & keys.any(axis=1)
    result[valid] = np.flatnonzero(valid)
    rest = np.flatnonzero(rows & ~valid & keys.any(axis=1))
    if len(rest):
        marked = np.flatnonzero(column.done.any(axis=1))
        row_of = {column.done[row].tobytes(): int(row) for row in marked}
        result[rest] = [row_of.get(keys[row].tobytes(), -1) for row in rest]
    return result
