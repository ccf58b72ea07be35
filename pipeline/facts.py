"""The table of clips: what was learnt of each, and what its status is."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from pipeline.plan import Plan
from stores import clips

FACTS = ("num_frames", "num_frames_claimed", "fps", "width", "height", "decoder")


def take_facts(table: pd.DataFrame, facts: Iterable[dict[str, Any]]) -> None:
    """Enter what was learnt of clips into the table, where it is about their present bytes."""
    for fact in facts:
        for row in fact["rows"]:
            if row >= len(table):
                continue
            key = clips.row_key(*table.loc[row, ["digest", "start_seconds", "end_seconds"]])
            if key.hex() != fact["key"]:
                continue
            if "reason" in fact:
                changes = {"status": "quarantined", "reason": fact["reason"]}
            else:
                changes = {"status": "pending", "reason": ""}
                changes |= {name: fact[name] for name in FACTS}
            for name, value in (changes | {"detail": fact["detail"]}).items():
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
        if holder is not None:
            for name in (*FACTS, "detail"):
                table.at[row, name] = old.at[holder, name]


def settle(table: pd.DataFrame, plan: Plan, rows: np.ndarray) -> None:
    """Say of every listed clip whether all that was asked of it is there; note equal bytes."""
    complete = np.ones(len(table), bool)
    for column in plan.all_columns:
        complete &= (column.column.done(len(table)) == plan.keys).all(axis=1)
    complete &= plan.keys.any(axis=1)
    first: dict[bytes, int] = {}
    for row in sorted(rows.tolist()):
        if table.at[row, "status"] == "quarantined":
            continue
        table.at[row, "status"] = "ready" if complete[row] else "pending"
        same = first.setdefault(plan.keys[row].tobytes(), row)
        noted = str(table.at[row, "detail"])
        if same != row and "same bytes as" not in noted:
            note = f"same bytes as row {same}, {table.at[same, 'path']}"
            table.at[row, "detail"] = f"{noted}; {note}" if noted else note
