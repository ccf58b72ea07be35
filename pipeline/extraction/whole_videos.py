"""Whole videos: the frames of each file, the parts that a build computes, and what became of them.

A column of whole videos has a row per page of a file, or per window of a clip, where other columns
have one per clip. So a plan, its blocks and the writing of shards are those of any build, over a
table of these parts. Clips that are stretches of one file share its pages.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.config import FrameSet, Runtime
from varve.pipeline.decoders import DecodePool, Facts, Failure, Request, Timeline
from varve.pipeline.extraction.clip_status import overflows
from varve.pipeline.extraction.plan import Plan
from varve.pipeline.progress import Progress
from varve.stores import windows
from varve.stores.clips import OVERFLOW
from varve.stores.locations import Location
from varve.stores.pages import SLACK_SECONDS, Pages
from varve.stores.pages import write as write_pages
from varve.stores.windows import Parts

# Files that wait in memory for their turn, and for the deadline of each so much of a file is read.
QUEUED_FILES = 256
DEADLINE_BYTES = 64 << 20


def describe(
    pages: Pages,
    table: pd.DataFrame,
    rows: np.ndarray,
    root: Path,
    frame_set: FrameSet,
    runtime: Runtime,
    progress: Progress,
) -> Pages:
    """Read the timelines of files that the pages or the table lack, and return all pages.

    The table learns the facts of their clips. A clip whose file cannot be read, or that has no
    frame, is quarantined.

    Args:
        pages: The pages that are known.
        table: The table of clips, up to date.
        rows: Rows of the present listing.
        root: The data set's folder.
        frame_set: A frame set of whole videos.
    """
    active = table.loc[rows]
    active = active[(active["status"] != "quarantined") & (active["digest"] != "")]
    unknown = ~active["digest"].isin(pages.files.index) | (active["num_frames"] == 0)
    files = active[unknown].drop_duplicates("digest")
    rows_of = active[unknown].groupby("digest", sort=False).groups
    added = []
    bars = progress.bars(timelines=(len(files), "files")) if len(files) else nullcontext()
    with bars:
        for digest, result in _timelines(files, root, frame_set, runtime):
            progress.advance("timelines", 1)
            for row in rows_of[digest]:
                _enter(table, row, result)
            if isinstance(result, Timeline) and digest not in pages.files.index:
                added.append((digest, result.times_N[result.kept_K], result.kept_K))
    return pages.extended(sorted(added, key=lambda entry: rows_of[entry[0]][0]))


def parts_of(
    store: Location, frame_set: FrameSet, pages: Pages, table: pd.DataFrame, rows: np.ndarray
) -> Parts:
    """Return what the rows of a frame set's columns are: its pages, or the windows of the clips.

    Args:
        frame_set: A frame set of whole videos.
        pages: The pages of its grid.
        table: The table of clips.
        rows: Rows of the present listing.
    """
    if frame_set.in_pages:
        return pages
    known = windows.read(store, pages, frame_set.frames, frame_set.window_step)
    return known.extended(table.loc[rows])


def write_parts(store: Path, parts: Parts) -> None:
    """Write the tables of pages, and of windows, that have changed."""
    if isinstance(parts, Pages):
        write_pages(store, parts)
    else:
        write_pages(store, parts.pages)
        windows.write(store, parts)


def part_table(
    table: pd.DataFrame, rows: np.ndarray, parts: Parts
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table with a row per page or window, as `make_plan` takes it, and the rows to have.

    Those that no listed clip has a frame in are not computed.
    """
    names = ["path", "size_bytes", "mtime_ns", "digest", "status", "reason"]
    known = table.loc[rows, [*names, "start_seconds", "end_seconds", "overflowed"]]
    known = known[(known["status"] != "quarantined") | (known["reason"] == OVERFLOW)]
    first = known[names].drop_duplicates("digest").set_index("digest", drop=False)
    result = first.reindex(parts.digests)
    # Parts of a file that is gone would make the numbers floats, which round a time of change.
    for name in ("size_bytes", "mtime_ns"):
        result[name] = first[name].reindex(parts.digests, fill_value=0)
    result = result.reset_index(drop=True)
    result["overflowed"] = _overflowed(known, parts)
    result["start_seconds"], result["end_seconds"] = np.nan, np.nan
    result["num_frames"] = parts.counts
    wanted = np.zeros(len(parts), bool)
    for a, b in parts.rows_of(known).tolist():
        wanted[a:b] = True
    return result, np.flatnonzero(wanted)


def _overflowed(clips: pd.DataFrame, parts: Parts) -> list[tuple[str, ...]]:
    """Return the columns that cannot represent each part: those of every clip that it is in."""
    shorts_of: dict[int, set[str]] = {}
    files = clips["digest"][clips["overflowed"].map(len) > 0]
    affected = clips[clips["digest"].isin(files)]
    for (first, last), shorts in zip(
        parts.rows_of(affected).tolist(), affected["overflowed"], strict=True
    ):
        for part in range(first, last):
            shorts_of[part] = shorts_of.get(part, {*shorts}) & {*shorts}
    return [tuple(sorted(shorts_of.get(part, ()))) for part in range(len(parts))]


def settle_clips(
    table: pd.DataFrame,
    rows: np.ndarray,
    plan: Plan,
    parts: Parts,
    failed: dict[int, tuple[str, str]],
    overflowed: dict[int, tuple[str, ...]],
) -> None:
    """Set the final status of every listed clip from its pages or windows.

    Args:
        table: The table of clips.
        rows: Rows of the present listing.
        plan: The plan that was executed, over `parts`.
        failed: Reason and detail by part, of those without cells.
        overflowed: Short fingerprints of the columns that cannot represent a part's values.
    """
    complete = plan.keys.any(axis=1)
    for column in plan.all_columns:
        complete &= (column.column.done(len(parts)) == plan.keys).all(axis=1)
    rows_of = parts.rows_of(table.loc[rows]).tolist()
    for row, (first, last) in zip(rows.tolist(), rows_of, strict=True):
        if table.at[row, "reason"] not in ("", OVERFLOW):
            continue
        shorts = {
            *table.at[row, "overflowed"],
            *(s for part in range(first, last) for s in overflowed.get(part, ())),
        }
        lost = overflows(plan.all_columns, shorts)
        broken = [p for p in range(first, last) if p in failed and p not in overflowed]
        reason, detail = failed[broken[0]] if broken else (OVERFLOW if lost else "", "")
        if broken:
            indices, start = parts.indices_of(broken[0]), parts.start_seconds(broken[0])
            detail = f"frames {indices[0]} to {indices[-1]}, from {start:.2f} s on: {detail}"
        ready = first < last and complete[first:last].all()
        changes = {
            "overflowed": tuple(sorted(shorts)),
            "status": "quarantined" if reason else "ready" if ready else "pending",
            "reason": reason,
            "detail": "; ".join(filter(None, [detail, "\n".join(lost), table.at[row, "warning"]])),
        }
        for name, value in changes.items():
            table.at[row, name] = value


def _timelines(
    files: pd.DataFrame, root: Path, frame_set: FrameSet, runtime: Runtime
) -> Iterator[tuple[str, Timeline | Failure]]:
    if not len(files):
        return
    largest = int(files["size_bytes"].max())
    deadline = runtime.deadline_seconds * max(1, -(-largest // DEADLINE_BYTES))
    with DecodePool(max(1, os.cpu_count() or 1), deadline) as pool:
        for start in range(0, len(files), QUEUED_FILES):
            part = files.iloc[start : start + QUEUED_FILES]
            requests = [Request(str(root / path), (), (frame_set,)) for path in part["path"]]
            waiting = [pool.submit(request) for request in requests]
            for digest, future in zip(part["digest"], waiting, strict=True):
                (result,) = future.result()
                assert isinstance(result, Timeline | Failure)
                yield digest, result


def _enter(table: pd.DataFrame, row: int, result: Timeline | Failure) -> None:
    """Enter the facts of a clip, or why it has none, into the table."""
    changes: dict[str, Any]
    if isinstance(result, Timeline):
        start, end = table.at[row, "start_seconds"], table.at[row, "end_seconds"]
        bounds = [-np.inf if np.isnan(start) else start, np.inf if np.isnan(end) else end]
        first, last = np.searchsorted(result.times_N, np.array(bounds) - SLACK_SECONDS)
        changes = _facts(result.facts) | {"num_frames": int(last - first)}
        if first >= last:
            detail = f"no frame between {bounds[0]:g} s and {bounds[1]:g} s: the file's "
            detail += f"{len(result.times_N)} frames are from {result.times_N[0]:.3f} s to "
            detail += f"{result.times_N[-1]:.3f} s"
            changes |= {"status": "quarantined", "reason": "too_short", "detail": detail}
    else:
        cause = {"reason": result.reason, "detail": result.detail}
        changes = {"status": "quarantined", **cause}
    for name, value in changes.items():
        table.at[row, name] = value


def _facts(facts: Facts) -> dict[str, Any]:
    names = ("num_frames_claimed", "fps", "width", "height", "decoder", "warning")
    return {name: getattr(facts, name) for name in names}
