"""Status of clips: what is learnt of each one, and how it enters the table of clips."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.decoders import Facts
from varve.pipeline.extraction.extract import ClipResult
from varve.pipeline.extraction.plan import ColumnPlan, Plan
from varve.stores import clips
from varve.stores.clips import OVERFLOW
from varve.stores.columns import ColumnSpec

# Reasons about the present state of the data set, and not about the clip's bytes.
ABSENT = ("missing", "unreadable")
_NUMBERS = ("num_frames", "num_frames_claimed", "fps", "width", "height", "decoder")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one clip in a build. It waits in the store as JSON until the table has it.

    Attributes:
        rows: Rows of the table.
        key: Their row key, hexadecimal: the bytes and the interval that this is about.
        reason, detail: Why the clip failed; "" where it did not.
        facts: Facts of the video; None where it failed or was not decoded.
        overflowed: Short fingerprints of the columns that cannot represent its value.
    """

    rows: tuple[int, ...]
    key: str
    reason: str = ""
    detail: str = ""
    facts: Facts | None = None
    overflowed: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: ClipResult) -> "Outcome":
        """Return the outcome of a clip's result."""
        failure, work = result.failure, result.work
        cause = (failure.reason, failure.detail) if failure else ("", "")
        return cls(work.rows, work.key.hex(), *cause, result.facts, result.overflowed)

    @property
    def describes(self) -> bool:
        """True where the video was read, and not only a feature of it."""
        return bool(self.reason or self.facts or self.overflowed)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, form: dict[str, Any]) -> "Outcome":
        """Return the outcome of a JSON form."""
        facts = form["facts"] and Facts(**form["facts"])
        sequences = {name: tuple(form[name]) for name in ("rows", "overflowed")}
        return cls(**{**form, **sequences, "facts": facts})


def enter(table: pd.DataFrame, outcomes: Iterable[Outcome]) -> None:
    """Enter what was learnt of clips into the table, where it is about their present bytes.

    The status of a clip whose file is absent at present stays.
    """
    for outcome in outcomes:
        if not outcome.describes:
            continue
        for row in outcome.rows:
            if row >= len(table):
                continue
            key = clips.row_key(*table.loc[row, ["digest", "start_seconds", "end_seconds"]])
            if key.hex() != outcome.key:
                continue
            changes: dict[str, Any] = {
                "overflowed": tuple(sorted({*table.at[row, "overflowed"], *outcome.overflowed}))
            }
            if facts := outcome.facts:
                changes |= {name: getattr(facts, name) for name in _NUMBERS}
                changes["warning"] = facts.warning
                # None: no audio was requested. What an earlier build learnt of it stays.
                changes |= {} if facts.sound is None else {"audio": facts.sound}
            if table.at[row, "reason"] not in ABSENT:
                changes["status"] = "quarantined" if outcome.reason else "pending"
                changes |= {"reason": outcome.reason, "detail": outcome.detail}
            _set(table, row, changes)


def enter_known(old: pd.DataFrame, table: pd.DataFrame) -> None:
    """Describe rows whose bytes the store knows under another path, without decoding."""
    undescribed = table.index[(table["num_frames"] == 0) & (table["digest"] != "")]
    if not len(undescribed) or not len(old):
        return
    row_of = {
        key.tobytes(): row
        for key, row in zip(clips.row_keys(old), old.index, strict=True)
        if old.at[row, "num_frames"] > 0
    }
    for row, key in zip(undescribed, clips.row_keys(table.loc[undescribed]), strict=True):
        same = row_of.get(key.tobytes())
        if same is not None:
            names = (*_NUMBERS, "warning", "audio", "overflowed")
            _set(table, row, {name: old.at[same, name] for name in names})


def settle(table: pd.DataFrame, plan: Plan, rows: np.ndarray) -> None:
    """Set the final status of every listed clip, and link the clips that have the same bytes."""
    complete = plan.keys.any(axis=1)
    for column in plan.all_columns:
        complete &= (column.column.done(len(table)) == plan.keys).all(axis=1)
    first: dict[bytes, int] = {}
    table["duplicate_of"] = -1
    for row in sorted(rows.tolist()):
        if table.at[row, "reason"] not in ("", OVERFLOW):
            continue
        same = first.setdefault(plan.keys[row].tobytes(), row)
        lost = overflows(plan.all_columns, table.at[row, "overflowed"])
        notes = ["\n".join(lost), table.at[row, "warning"]]
        if audio := table.at[row, "audio"]:
            notes.append(f"audio: {audio}")
        if same != row:
            notes.append(f"same bytes as row {same}, {table.at[same, 'path']}")
        changes = {
            "duplicate_of": same if same != row else -1,
            "status": "quarantined" if lost else "ready" if complete[row] else "pending",
            "reason": OVERFLOW if lost else "",
            "detail": "; ".join(filter(None, notes)),
        }
        _set(table, row, changes)


def overflows(columns: Sequence[ColumnPlan], overflowed: Iterable[str]) -> list[str]:
    """Return a sentence for each of some columns that cannot represent a clip's value."""
    shorts = set(overflowed)
    specs = (column.output.spec for column in columns)
    return [overflow_text(spec) for spec in specs if spec.short in shorts]


def overflow_text(spec: ColumnSpec) -> str:
    """Return the sentence for people about a value that a column cannot represent."""
    column = f"{spec.feature} of {spec.backbone} ({spec.short})"
    if spec.dtype == "float16":
        return f"{column} leaves the range of float16; keep it with --dtype float32 or bfloat16"
    # The other formats have the range of the network's own numbers.
    return (
        f"{column} is infinite or not a number in the network itself, not in {spec.dtype} alone; "
        "check its weights, or run it with --precision float32"
    )


def _set(table: pd.DataFrame, row: int, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        table.at[row, name] = value
