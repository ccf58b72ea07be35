"""The table of clips against the data set as it is now: what is new, changed, gone."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from varve.pipeline.datasets.layouts import Listing
from varve.pipeline.datasets.media import content_digest, size_and_mtime
from varve.pipeline.extraction import overflow
from varve.stores import clips

# Reasons that lie outside the bytes: they are looked into again at every build.
TRANSIENT = ("missing", "unreadable", "changed")
_UNKNOWN = {"num_frames": 0, "num_frames_claimed": 0, "fps": np.nan, "width": 0, "height": 0,
            "decoder": "", "reason": "", "detail": "", "status": "pending"}  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """The table brought up to date, and how it got there.

    `rows` are those of the present listing. Counts are of clips, but `hashed` of files.
    """

    table: pd.DataFrame
    rows: np.ndarray
    new: int
    changed: int
    gone: int
    hashed: int


class OtherDataset(ValueError):
    """The store was built from a data set that shares no clip with this one."""


def scan(
    table: pd.DataFrame,
    listing: Listing,
    root: Path,
    retry: bool = False,
    advance: Callable[[int, int], None] = lambda files, total: None,
) -> Scan:
    """Bring the table of clips up to date with a listing. Writes nothing.

    A file is read again only where its size or time of change differ from the table's. A row
    whose bytes changed starts anew (`pending`); one whose clip is gone keeps what is known of it
    and is quarantined as `missing`.

    Args:
        table: The store's table.
        listing: The data set's clips; paths are relative to `root`.
        retry: Quarantined clips start anew although their bytes are the same.
        advance: Called with files looked at so far, and in all.

    Raises:
        OtherDataset: Not one clip of the table is in the listing.
    """
    old = {
        (path, _hashable(start), _hashable(end)): row
        for row, path, start, end in zip(
            table.index, table["path"], table["start_seconds"], table["end_seconds"], strict=True
        )
    }
    keys = [(c.path, c.start_seconds, c.end_seconds) for c in listing.clips]
    if len(table) and not any(key in old for key in keys):
        raise OtherDataset(
            f"the store holds {len(table)} clips, such as {table['path'].iloc[0]}; {root} lists "
            f"{len(keys)} others, such as {keys[0][0]}, and none of those. Give the data set the "
            "store was built from, or a new store."
        )
    known = _files_of(table)
    files = _look(root, sorted({c.path for c in listing.clips}), known, advance)

    records = table.to_dict("records")
    rows, new, changed = [], 0, 0
    for clip, key in zip(listing.clips, keys, strict=True):
        row = old.get(key)
        if row is None:
            row, new = len(records), new + 1
            record = clips.blank(clip.path, clip.label, clip.split)
            for name, value in (("start_seconds", key[1]), ("end_seconds", key[2])):
                record[name] = np.nan if value is None else float(value)
            records.append(record)
        record = records[row]
        rows.append(row)
        record["label"], record["split"] = clip.label, clip.split
        found = files[clip.path]
        if found.reason:
            record |= {"status": "quarantined", "reason": found.reason, "detail": found.detail}
            continue
        record["size_bytes"], record["mtime_ns"] = found.size_bytes, found.mtime_ns
        if record["digest"] != found.digest:
            changed += bool(record["digest"])
            record |= _UNKNOWN | {"digest": found.digest}
        elif record["reason"] in TRANSIENT or (
            retry and (record["status"] == "quarantined" or overflow.known(record["detail"]))
        ):
            record |= {"status": "pending", "reason": "", "detail": ""}
    gone = np.setdiff1d(np.arange(len(records)), rows)
    for row in gone:
        records[row] |= {"status": "quarantined", "reason": "missing",
                         "detail": "the data set no longer lists it"}  # fmt: skip
    frame = pd.DataFrame(records, columns=list(clips.COLUMNS)).astype(clips.COLUMNS)
    hashed = sum(found.hashed for found in files.values())
    return Scan(
        frame.rename_axis(index="row"), np.array(rows, np.int64), new, changed, len(gone), hashed
    )


@dataclass(frozen=True)
class _File:
    digest: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0
    hashed: bool = False
    reason: str = ""
    detail: str = ""


def _look(
    root: Path, paths: list[str], known: dict[str, _File], advance: Callable[[int, int], None]
) -> dict[str, _File]:
    def one(path: str) -> _File:
        return _look_at(root / path, known.get(path))

    found = {}
    # Hashing releases the interpreter; reading waits for the disk.
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        for i, (path, file) in enumerate(zip(paths, pool.map(one, paths), strict=True)):
            found[path] = file
            advance(i + 1, len(paths))
    return found


def _look_at(path: Path, known: _File | None) -> _File:
    try:
        if not (path.is_file() or path.is_dir()):
            if path.exists():
                return _File(reason="not_video", detail="neither a file nor a folder of frames")
            return _File(
                reason="missing", detail="the data set lists it and the disk has no such file"
            )
        size, mtime = size_and_mtime(path)
        if (
            known is not None
            and known.digest
            and (size, mtime) == (known.size_bytes, known.mtime_ns)
        ):
            return known
        return _File(content_digest(path), size, mtime, hashed=True)
    except OSError as error:
        return _File(reason="unreadable", detail=f"{error.strerror or error}")


def _files_of(table: pd.DataFrame) -> dict[str, _File]:
    # A row whose clip is gone has an older word on its file than one that is listed.
    latest_last = table.sort_values("reason", key=lambda reason: reason != "missing", kind="stable")
    columns = [latest_last[name] for name in ("path", "digest", "size_bytes", "mtime_ns")]
    return {
        path: _File(content, size, mtime)
        for path, content, size, mtime in zip(*columns, strict=True)
    }


def _hashable(seconds: float) -> float | None:
    return None if np.isnan(seconds) else float(seconds)
