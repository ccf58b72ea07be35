"""The table of clips: what was learnt of each, and what its status is."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.extraction import overflow
from varve.pipeline.extraction.plan import Plan
from varve.stores import clips

# Reasons that tell of the data set at present and not of the clip's bytes.
ABSENT = ("missing", "unreadable")
NOTE = "same bytes as row "
SOUND = "sound: "
FACTS = ("num_frames", "num_frames_claimed", "fps", "width", "height", "decoder")


def take_facts(table: pd.DataFrame, facts: Iterable[dict[str, Any]]) -> None:
    """Enter what was learnt of clips into the table, where it is about their present bytes.

    A fact of a clip that cannot be had at present describes it and leaves its status.
    """
    for fact in facts:
        if "detail" not in fact:  # a clip that began from a feature, of which nothing was learnt
            continue
        for row in fact["rows"]:
            if row >= len(table):
                continue
            key = clips.row_key(*table.loc[row, ["digest", "start_seconds", "end_seconds"]])
            if key.hex() != fact["key"]:
                continue
            changes = {name: fact[name] for name in FACTS if name in fact}
            old = str(table.at[row, "reason"])
            if old not in ABSENT:
                reason, detail = fact.get("reason", ""), fact["detail"]
                if not reason:
                    detail = _with_sound(detail, fact.get("sound"), str(table.at[row, "detail"]))
                if reason == "not_finite" or (not reason and old == "not_finite"):
                    reason = "not_finite"
                    detail = overflow.joined(str(table.at[row, "detail"]), detail)
                changes |= {
                    "status": "quarantined" if reason else "pending",
                    "reason": reason,
                    "detail": detail,
                }
            for name, value in changes.items():
                table.at[row, name] = value


def take_known_facts(old: pd.DataFrame, table: pd.DataFrame) -> None:
    """A clip whose bytes the store met under another name needs no decoding to be described."""
    lacking = table.index[(table["num_frames"] == 0) & (table["digest"] != "")]
    if not len(lacking) or not len(old):
        return
    known = {
        key.tobytes(): row
        for key, row in zip(clips.row_keys(old), old.index, strict=True)
        if old.at[row, "num_frames"] > 0
    }
    for row, key in zip(lacking, clips.row_keys(table.loc[lacking]), strict=True):
        holder = known.get(key.tobytes())
        if holder is None:
            continue
        for name in FACTS:
            table.at[row, name] = old.at[holder, name]
        if old.at[holder, "reason"] not in ABSENT:
            table.at[row, "detail"] = without_note(str(old.at[holder, "detail"]))


def settle(table: pd.DataFrame, plan: Plan, rows: np.ndarray) -> None:
    """Say of every listed clip whether all that was asked of it is there; note equal bytes."""
    complete = plan.keys.any(axis=1)
    for column in plan.all_columns:
        complete &= (column.column.done(len(table)) == plan.keys).all(axis=1)
    shorts = [column.output.spec.short for column in plan.all_columns]
    first: dict[bytes, int] = {}
    for row in sorted(rows.tolist()):
        if table.at[row, "reason"] not in ("", "not_finite"):
            continue
        detail = without_note(str(table.at[row, "detail"]))
        lost = any(overflow.known(detail, short) for short in shorts)
        status = "quarantined" if lost else "ready" if complete[row] else "pending"
        same = first.setdefault(plan.keys[row].tobytes(), row)
        if same != row:
            note = f"{NOTE}{same}, {table.at[same, 'path']}"
            detail = f"{detail}; {note}" if detail else note
        changes = {"status": status, "reason": "not_finite" if lost else "", "detail": detail}
        for name, value in changes.items():
            table.at[row, name] = value


def _with_sound(detail: str, sound: str | None, old: str) -> str:
    """A detail with what was odd about the clip's sound; what is known where nobody listened."""
    kept = [part for part in old.split("; ") if part.startswith(SOUND)]
    told = kept if sound is None else [SOUND + sound] if sound else []
    return "; ".join(filter(None, (detail, *told)))


def without_note(detail: str) -> str:
    """A detail without the note of equal bytes, which every build makes anew.

    >>> without_note("cut off; same bytes as row 3, a.mp4"), without_note("same bytes as row 3, a")
    ('cut off', '')
    """
    return detail.partition(NOTE)[0].removesuffix("; ")
