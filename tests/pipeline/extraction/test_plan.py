"""Plans of any tables, networks and requests: what is computed, from what, and how it is counted.

No video is decoded, no network runs and no store exists: the cells are tables in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from varve.pipeline.backbones import Stage
from varve.pipeline.config import FrameSet
from varve.pipeline.extraction import blocks
from varve.pipeline.extraction.passes import Execution, Output, Pass, Source, column_key
from varve.pipeline.extraction.plan import Plan, make_plan
from varve.pipeline.extraction.sources import CachedColumn, lossless, refusal
from varve.stores import clips
from varve.stores.columns import ColumnSpec
from varve.stores.digests import digest
from varve.stores.pages import Pages

FORMS = {"stem": "map", "mixing": "tokens", "first": "tokens", "second": "tokens", "proj": "vector"}
STAGES = tuple(
    Stage(name, nn.Identity(), "test/1", {}, form, name not in ("stem", "mixing"), form == "tokens")
    for name, form in FORMS.items()
)
NETWORK = SimpleNamespace(stages=STAGES, stage_names=list(FORMS))
STAGE_KEYS = {name: digest({"stage": name}) for name in FORMS}
REDUCTIONS = {"map": ("", "pool"), "tokens": ("", "cls", "map", "mean"), "vector": ("",)}
FEATURES = [(name, r) for name, form in FORMS.items() for r in REDUCTIONS[form]]
DTYPES = ("float16", "float32", "bfloat16")
FRAMES, BATCH = 2, 2
# Digests of the clips' bytes; the last are bytes that no clip has any more.
BYTES = [digest({"bytes": n}) for n in range(6)]
KEYS = [clips.row_key(content, np.nan, np.nan) for content in BYTES]


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK_PICTURES", 3 * FRAMES)
        patch.setattr(blocks, "MAX_CACHED_CLIPS", 2)
        yield


@cache
def column(stage: str, reduction: str, dtype: str, backbone: str = "net:own") -> ColumnSpec:
    feature = f"{stage}:{reduction}" if reduction else stage
    fingerprint = column_key(STAGE_KEYS[stage], reduction, dtype)
    width = {"": 5, "map": 4}.get(reduction, 1) if FORMS[stage] == "tokens" else 1
    return ColumnSpec(backbone, feature, fingerprint, (FRAMES, width), dtype, {})


@dataclass
class Inventory:
    """Row keys of stored and of staged cells, by the column's path."""

    stored: dict[str, tuple[ColumnSpec, np.ndarray]] = field(default_factory=dict)
    waiting: dict[str, dict[int, bytes]] = field(default_factory=dict)
    store: Path = Path("store")
    clips: int = 0
    grids: dict[str, Pages] = field(default_factory=dict)

    def done(self, spec: ColumnSpec) -> np.ndarray:
        if spec.relative_path in self.stored:
            return self.stored[spec.relative_path][1].copy()
        return np.zeros((self.clips, 16), np.uint8)

    def staged(self, spec: ColumnSpec) -> Iterator[tuple[Path, int, np.ndarray]]:
        for row, key in self.waiting.get(spec.relative_path, {}).items():
            yield Path(f"{row}.npz"), row, np.frombuffer(key, np.uint8)

    @property
    def columns(self) -> dict[str, list[CachedColumn]]:
        columns: dict[str, list[CachedColumn]] = {}
        for spec, done in self.stored.values():
            columns.setdefault(spec.fingerprint, []).append(CachedColumn(spec, done))
        return columns

    def rows_of(self, spec: ColumnSpec, key: bytes) -> set[int]:
        """Return the rows of a column whose cells were made from some bytes."""
        return {row for row, done in enumerate(self.done(spec)) if done.tobytes() == key}


@dataclass
class Case:
    """A request, and the state in which it finds the store."""

    table: pd.DataFrame
    inventory: Inventory
    rows: np.ndarray
    single_pass: Pass
    describe: bool

    def plan(self) -> Plan:
        networks = {self.single_pass.backbone: NETWORK}
        return make_plan(self.inventory, self.table, self.rows, Path("set"), (self.single_pass,),
                         networks, self.describe)  # fmt: skip

    def requested(self, spec: ColumnSpec, row: int) -> bool:
        """Return whether a cell is requested: its clip is readable, its value representable."""
        clip = self.table.loc[row]
        failed = clip["status"] == "quarantined" and clip["reason"] != "not_finite"
        return row in self.rows and not failed and spec.short not in clip["overflowed"]


@st.composite
def cases(draw) -> Case:
    count = draw(st.integers(1, 6))
    precision = draw(st.sampled_from(DTYPES))
    features = draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=3, unique=True))
    dtype = draw(st.sampled_from(DTYPES))
    specs = [column(*feature, dtype) for feature in features]
    outputs = tuple(Output(s, *feature) for s, feature in zip(specs, features, strict=True))
    frame_set = FrameSet(frames=FRAMES)
    single_pass = Pass(
        "net:own", precision, frame_set, Execution("cpu", BATCH, 1), outputs, STAGE_KEYS
    )
    records = []
    for row in range(count):
        record = clips.blank(f"{row}.mp4", "label", "train")
        status, reason = draw(st.sampled_from([("ready", ""), ("pending", ""), ("ready", ""),
            ("quarantined", "corrupt"), ("quarantined", "not_finite"),
            ("quarantined", "missing")]))  # fmt: skip
        lost = draw(st.lists(st.sampled_from([s.short for s in specs]), max_size=1))
        content = "" if reason == "missing" else draw(st.sampled_from(BYTES[:4]))
        described = draw(st.booleans()) or row == 0
        records.append(record | {"status": status, "reason": reason, "digest": content,
            "overflowed": tuple(lost), "num_frames": 9 * described})  # fmt: skip
    table = pd.DataFrame(records).astype(clips.COLUMNS).rename_axis(index="row")
    keys = clips.row_keys(table)

    def done() -> np.ndarray:
        """Cells that are absent, valid, or made from other bytes."""
        cells = np.zeros((count, 16), np.uint8)
        for row in range(count):
            state = draw(st.sampled_from(["absent", "valid", "valid", "other"]))
            if state == "valid":
                cells[row] = keys[row]
            elif state == "other":
                cells[row] = np.frombuffer(draw(st.sampled_from(KEYS)), np.uint8)
        return cells

    stored = [
        column(*feature, kind, draw(st.sampled_from(["net:own", "net:twin"])))
        for feature in draw(st.lists(st.sampled_from(FEATURES), max_size=4))
        for kind in draw(st.lists(st.sampled_from(DTYPES), max_size=2, unique=True))
    ]
    stored += [spec for spec in specs if draw(st.booleans())]
    # Columns of another network are never read, whatever their name.
    stored.append(ColumnSpec("net:own", "second", digest("other"), (FRAMES, 5), "float32", {}))
    waiting = {
        spec.relative_path: {row: draw(st.sampled_from([keys[row].tobytes(), KEYS[-1]]))
                     for row in draw(st.sets(st.integers(0, count), max_size=2)) if row < count}
        for spec in specs
    }  # fmt: skip
    inventory = Inventory(
        {spec.relative_path: (spec, done()) for spec in stored}, waiting, clips=count
    )
    rows = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return Case(table, inventory, np.array(sorted(rows)), single_pass, draw(st.booleans()))


def usable(case: Case, output: Output, key: bytes) -> list[tuple[tuple, ColumnSpec]]:
    """Return every stored column that an output of some bytes can be computed from, ranked."""
    candidates = []
    for spec, _ in case.inventory.stored.values():
        for stage, reduction in FEATURES:
            if spec.fingerprint != column(stage, reduction, spec.dtype).fingerprint:
                continue
            source = Source(stage, reduction, spec.dtype, "", "", "", 0)
            if (
                spec.relative_path != output.spec.relative_path
                and not refusal(source, output, case.single_pass, NETWORK)
                and case.inventory.rows_of(spec, key)
            ):
                depth = list(FORMS).index(stage)
                exact = lossless(spec.dtype, case.single_pass.precision)
                candidates.append(((-depth, not exact, spec.cell_bytes), spec))
    return sorted(candidates, key=lambda candidate: candidate[0])


@settings(max_examples=80)
@given(cases())
def test_a_plan_computes_exactly_the_missing_cells_each_from_the_deepest_valid_source(case):
    plan = case.plan()
    for output, planned in zip(case.single_pass.outputs, plan.columns[0], strict=True):
        done = case.inventory.done(output.spec)
        for row, key in enumerate(plan.keys):
            valid = bool(key.any()) and (done[row] == key).all()
            work = [row in planned.staged, row in planned.copied, bool(planned.compute[row])]
            assert planned.valid[row] == valid
            if valid or not case.requested(output.spec, row):
                assert not any(work)
                continue
            same = case.inventory.rows_of(output.spec, key.tobytes())
            is_staged = case.inventory.waiting[output.spec.relative_path].get(row) == key.tobytes()
            assert work == [is_staged, bool(same) and not is_staged, not (is_staged or same)]
            if planned.copied.get(row) is not None:
                assert planned.copied[row] in same
            if not planned.compute[row]:
                continue
            candidates = usable(case, output, key.tobytes())
            chosen = [(source, rows[row]) for source, rows in planned.sources if rows[row] >= 0]
            assert planned.from_video[row] == (not candidates)
            assert len(chosen) == bool(candidates)
            for source, source_row in chosen:
                best = [spec for rank, spec in candidates if rank == candidates[0][0]]
                (spec,) = [s for s in best if (s.backbone, s.feature, s.dtype) ==
                           (source.backbone, source.feature, source.dtype)]  # fmt: skip
                assert source_row in case.inventory.rows_of(spec, key.tobytes())


@settings(max_examples=80)
@given(cases())
def test_the_blocks_compute_every_missing_cell_once_and_are_counted_right(case):
    plan = case.plan()
    work, written, described, video_keys, bytes_read = [], set(), set(), set(), 0
    calls = dict.fromkeys(range(len(plan.passes)), 0)
    for block in plan.blocks:
        assert bool(block.files) != bool(block.cached)
        in_block = dict.fromkeys(calls, 0)
        for clip in block.clips:
            assert len({plan.keys[row].tobytes() for row in clip.rows} | {clip.key}) == 1
            described |= set(clip.rows) if block.files else set()
            for number, outputs in clip.needs.items():
                source = plan.passes[number].source
                assert (source is None) == bool(block.files)
                in_block[number] += bool(outputs)
                bytes_read += source.cell_bytes if source else 0
                work += [(clip.key, number, plan.passes[number].outputs[c].spec.relative_path)
                         for c in outputs]  # fmt: skip
                written |= {(row, *cell[1:]) for cell in work[len(work) - len(outputs):]
                            for row in clip.rows}  # fmt: skip
        video_keys |= {clip.key for file in block.files for clip in file.clips}
        for number, count in in_block.items():
            pass_plan = plan.passes[number]
            needed = [pass_plan.outputs[c].stage for clip in block.clips
                      for c in clip.needs.get(number, ())]  # fmt: skip
            first = list(FORMS).index(pass_plan.source.stage) if pass_plan.source else -1
            deepest = max((list(FORMS).index(stage) for stage in needed), default=first)
            calls[number] += -(-count // pass_plan.batch_clips) * (deepest - first)
    expected = [
        (row, next(n for n, pass_plan in enumerate(plan.passes) if pass_plan.source ==
                   next((s for s, rows in planned.sources if rows[row] >= 0), None)),
         planned.output.spec.relative_path)
        for planned in plan.columns[0] for row in np.flatnonzero(planned.compute).tolist()
    ]  # fmt: skip
    # Clips with the same bytes are computed once, for all of their rows.
    assert sorted(work) == sorted({(plan.keys[row].tobytes(), *cell) for row, *cell in expected})
    assert written >= set(expected)
    assert [plan.calls(number) for number in calls] == list(calls.values())
    assert plan.bytes_read == bytes_read
    assert plan.decodes == len(video_keys)
    assert plan.clips == len({key for key, _, _ in work})
    for row in case.rows.tolist():
        clip = case.table.loc[row]
        failed = clip["status"] == "quarantined" and clip["reason"] != "not_finite"
        if case.describe and not clip["num_frames"] and not failed:
            assert row in described


@settings(max_examples=40)
@given(cases())
def test_after_a_finished_plan_nothing_is_missing(case):
    for planned in case.plan().columns[0]:
        spec = planned.output.spec
        done = case.inventory.done(spec)
        rows = [*np.flatnonzero(planned.compute), *planned.staged, *planned.copied]
        done[rows] = clips.row_keys(case.table)[rows]
        case.inventory.stored[spec.relative_path] = (spec, done)
    case.describe = False
    again = case.plan()
    assert (again.blocks, again.bytes_read) == ((), 0)
    assert not any(planned.missing for planned in again.columns[0])
