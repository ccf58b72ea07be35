"""Whole videos: the frames of each file, the pages that a build computes, and what became of them.

A column of whole videos has a row per page of a file, where other columns have one per clip. So a
plan, its blocks and the writing of shards are those of any build, over a table of pages. Clips that
are stretches of one file share its pages.
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
from varve.stores.clips import OVERFLOW
from varve.stores.pages import PAGE_FRAMES, SLACK_SECONDS, Pages

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


def page_table(
    table: pd.DataFrame, rows: np.ndarray, pages: Pages
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table with a row per page, as `make_plan` takes it, and the rows to have.

    Pages that no listed clip has a frame in are not computed.
    """
    names = ["path", "size_bytes", "mtime_ns", "digest", "status", "reason", "overflowed"]
    known = table.loc[rows, [*names, "start_seconds", "end_seconds"]]
    known = known[(known["status"] != "quarantined") | (known["reason"] == OVERFLOW)]
    first = known[names].drop_duplicates("digest").set_index("digest", drop=False)
    digests = np.empty(len(pages), object)
    for digest, first_page, frames in pages.files.itertuples():
        digests[first_page : first_page + -(-frames // PAGE_FRAMES)] = digest
    result = first.reindex(digests)
    # Pages of a file that is gone would make the numbers floats, which round a time of change.
    for name in ("size_bytes", "mtime_ns"):
        result[name] = first[name].reindex(digests, fill_value=0)
    result = result.reset_index(drop=True)
    result["overflowed"] = [o if isinstance(o, tuple) else () for o in result["overflowed"]]
    result["start_seconds"], result["end_seconds"] = np.nan, np.nan
    result["num_frames"] = pages.counts
    wanted = np.zeros(len(pages), bool)
    for clip_pages in pages_of(known, pages):
        wanted[clip_pages.start : clip_pages.stop] = True
    return result, np.flatnonzero(wanted)


def pages_of(clips: pd.DataFrame, pages: Pages) -> list[range]:
    """Return the pages that have a frame of each clip."""
    first, last = pages.spans(clips).T
    ends = np.where(first < last, -(-last // PAGE_FRAMES), first // PAGE_FRAMES)
    return [
        range(a, b) for a, b in zip((first // PAGE_FRAMES).tolist(), ends.tolist(), strict=True)
    ]


def settle_clips(
    table: pd.DataFrame,
    rows: np.ndarray,
    plan: Plan,
    pages: Pages,
    failed: dict[int, tuple[str, str]],
    overflowed: dict[int, tuple[str, ...]],
) -> None:
    """Set the final status of every listed clip from its pages.

    Args:
        table: The table of clips.
        rows: Rows of the present listing.
        plan: The plan that was executed, over pages.
        failed: Reason and detail by page, of pages without cells.
        overflowed: Short fingerprints of the columns that cannot represent a page's values.
    """
    complete = plan.keys.any(axis=1)
    for column in plan.all_columns:
        complete &= (column.column.done(len(pages)) == plan.keys).all(axis=1)
    for row, clip_pages in zip(rows.tolist(), pages_of(table.loc[rows], pages), strict=True):
        if table.at[row, "reason"] not in ("", OVERFLOW):
            continue
        shorts = {
            *table.at[row, "overflowed"],
            *(s for p in clip_pages for s in overflowed.get(p, ())),
        }
        lost = overflows(plan.all_columns, shorts)
        broken = [page for page in clip_pages if page in failed and page not in overflowed]
        reason, detail = failed[broken[0]] if broken else (OVERFLOW if lost else "", "")
        if broken:
            first = pages.indices[broken[0]]
            frames = f"frames {first[0]} to {first[first >= 0][-1]}"
            detail = f"{frames}, from {pages.times[broken[0], 0]:.2f} s on: {detail}"
        ready = bool(clip_pages) and complete[clip_pages.start : clip_pages.stop].all()
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
