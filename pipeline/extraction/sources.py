"""Ancestors: which features of a store a computation can go on from, the deepest first.

A column is an ancestor where its fingerprint is one that the present network's own chain gives: it
is looked for by key alone, under whatever name it was kept.
"""

import json
from dataclasses import dataclass

import numpy as np

from varve.pipeline.backbones import Backbone, reduction_of, reductions_of, resume_refusal
from varve.pipeline.config import DTYPES
from varve.pipeline.extraction.passes import Output, Pass, Source, column_key
from varve.stores import FeatureStore
from varve.stores.columns import Column, ColumnSpec, Damaged

# Bits of a number's fraction: what a feature loses by being kept so.
FRACTION_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}


@dataclass(frozen=True)
class CachedColumn:
    """A column of the store, and the row keys of its cells, uint8 [clips, 16]."""

    spec: ColumnSpec
    done: np.ndarray


class Ancestors:
    """The columns of a store, for the question what can be computed from them.

    Raises:
        Damaged: A column's metadata or marks cannot be read.
    """

    def __init__(self, store: FeatureStore | None, clips: int) -> None:
        self._held: dict[str, list[CachedColumn]] = {}
        for backbone, feature, path in sorted(store.columns()) if store else ():
            metadata = path / "zarr.json"
            try:
                found = json.loads(metadata.read_bytes())
                fingerprint = found["attributes"]["fingerprint"]
                dtype, cell = found["attributes"]["dtype"], tuple(found["shape"][1:])
            except (ValueError, KeyError, TypeError) as error:
                raise Damaged(
                    f"{metadata} is damaged ({error}). Remove it and build again: it is made "
                    "anew, and the cells stay"
                ) from error
            spec = ColumnSpec(backbone, feature, fingerprint, cell, dtype, {})
            assert store is not None
            done = Column(store.path, spec).done(clips)
            self._held.setdefault(fingerprint, []).append(CachedColumn(spec, done))

    def of(self, one: Pass, backbone: Backbone) -> list[tuple[Source, CachedColumn]]:
        """Every column that holds something of the chain's own, the deepest first.

        At one stage, what keeps the run's numbers whole comes before what rounds them, and a part
        of the output before all of it: there is less to compute.
        """
        found = []
        for depth, stage in enumerate(backbone.stages):
            for reduction in ("", *reductions_of(stage)):
                for dtype in DTYPES:
                    key = column_key(one.stage_keys[stage.name], reduction, dtype)
                    for held in self._held.get(key, ()):
                        spec = held.spec
                        source = Source(
                            stage.name, reduction, dtype, spec.backbone, spec.feature,
                            spec.fingerprint, spec.cell_bytes,
                            reduction_of(stage, reduction).tokens,
                        )  # fmt: skip
                        rank = (-depth, not lossless(dtype, one.precision), spec.cell_bytes)
                        found.append((rank, source, held))
        found.sort(key=lambda one: (one[0], one[1].backbone))
        return [(source, held) for _, source, held in found]


def refusal(source: Source, output: Output, one: Pass, backbone: Backbone) -> str:
    """Why a column cannot serve to compute another; "" where it can."""
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
    whole = exact and lossless(source.dtype, one.precision)
    if not (fine or whole):
        return f"it is kept in {source.dtype}, too coarse for a feature in {wanted}"
    return resume_refusal(source.reduction, backbone.stages[first : last + 1], output.reduction)


def lossless(dtype: str, precision: str) -> bool:
    """Whether numbers of a run in `precision` are kept as they are."""
    return dtype in ("float32", precision)


def holders(held: CachedColumn, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each clip, the row of the column that holds its cell, else -1.

    Args:
        keys: Row keys of the clips, uint8 [clips, 16].
        rows: Which clips are asked for, bool [clips].

    Returns:
        int64 [clips]; another clip's row where that has the same bytes.
    """
    found = np.full(len(keys), -1, np.int64)
    own = rows & (held.done == keys).all(axis=1) & keys.any(axis=1)
    found[own] = np.flatnonzero(own)
    rest = np.flatnonzero(rows & ~own & keys.any(axis=1))
    if len(rest):
        marked = np.flatnonzero(held.done.any(axis=1))
        row_of = {held.done[row].tobytes(): int(row) for row in marked}
        found[rest] = [row_of.get(keys[row].tobytes(), -1) for row in rest]
    return found
