"""Sources: the stored features that a computation can start from, the deepest first.

A column is a source where its fingerprint is one that the present network's own chain gives. It is
looked up by key alone, whatever its name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from varve.pipeline.backbones import Backbone, reduction_of, reductions_of, resume_refusal
from varve.pipeline.config import DTYPES
from varve.pipeline.extraction.passes import Output, Pass, Source, column_key, column_metadata
from varve.stores import FeatureStore, staging
from varve.stores.columns import Column, ColumnSpec

# Bits of a number's fraction, which limit the precision of a stored feature.
FRACTION_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}


@dataclass(frozen=True)
class CachedColumn:
    """A column of the store, and the row keys of its cells, uint8 [clips, 16]."""

    spec: ColumnSpec
    done: np.ndarray


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
                dtype, cell = array["attributes"]["dtype"], tuple(array["shape"][1:])
            spec = ColumnSpec(backbone, feature, fingerprint, cell, dtype, {})
            columns.setdefault(fingerprint, []).append(CachedColumn(spec, self.done(spec)))
        return columns


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
                        reduction_of(stage, reduction).tokens,
                    )  # fmt: skip
                    rank = (-depth, not lossless(dtype, pass_.precision), spec.cell_bytes)
                    candidates.append((rank, source, column))
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1].backbone))
    return [(source, column) for _, source, column in candidates]


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
