"""Scan: compares the table of clips with the data set's present files."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from varve.pipeline.datasets.layouts import Listing
from varve.pipeline.datasets.media import content_digest, size_and_mtime
from varve.pipeline.extraction.extract import optional
from varve.stores import clips

# Reasons that are no property of the bytes: every build tries these clips again.
TRANSIENT = ("missing", "unreadable", "changed")
_UNKNOWN = {"num_frames": 0, "num_frames_claimed": 0, "fps": np.nan, "width": 0, "height": 0,
            "decoder": "", "warning": "", "audio": "", "overflowed": (), "duplicate_of": -1,
            "reason": "", "detail": "", "status": "pending"}  # fmt: skip


# (path, or digest; start; end) of a clip, None for an open end.
_Key = tuple[str, float | None, float | None]


@dataclass(frozen=True)
class Scan:
    """The table of clips, up to date, and what changed in it.

    Attributes:
        table: The table.
        rows: Rows of the present listing, int64.
        new, changed, gone: Numbers of clips, compared with the table before.
        moved: Number of rows that took another path, at which their bytes were.
        hashed: Number of files whose bytes were read.
    """

    table: pd.DataFrame
    rows: np.ndarray
    new: int
    changed: int
    gone: int
    moved: int
    hashed: int


class OtherDataset(ValueError):
    """The store was built from a data set that shares no clip with this one."""


def scan(table: pd.DataFrame, listing: Listing, root: Path, retry: bool) -> Scan:
    """Bring the table of clips up to date with a listing. Writes nothing.

    A file is read again only where its size or its time of change differ from the table's. A row
    whose bytes changed becomes `pending` again. A row whose clip is gone takes the path at which
    its bytes and interval now are, and keeps its id; where several new clips have these bytes,
    their number must be that of the rows that are gone, and they are paired in order. Any other row
    whose clip is gone keeps its facts and is quarantined as `missing`.

    Args:
        table: The store's table.
        listing: The data set's clips; paths are relative to `root`.
        root: The data set's folder.
        retry: Whether quarantined clips are tried again although their bytes are the same.

    Raises:
        OtherDataset: Not one clip of the table is in the listing, by its path or by its bytes.
    """
    old = {
        (path, optional(start), optional(end)): row
        for row, path, start, end in zip(
            table.index, table["path"], table["start_seconds"], table["end_seconds"], strict=True
        )
    }
    keys = [(c.path, c.start_seconds, c.end_seconds) for c in listing.clips]
    example = table["path"].iloc[0] if len(table) else ""
    other = OtherDataset(
        f"the store holds {len(table)} clips, such as {example}; {root} lists {len(keys)} others, "
        f"such as {keys[0][0]}, and none of those, by path or by bytes. Give the data set the "
        "store was built from, or a new store."
    )
    paths = sorted({c.path for c in listing.clips})
    known = not len(table) or any(key in old for key in keys)
    # Sizes first: the bytes of another data set are not read to refuse it.
    if not known and not _sizes(root, paths) & set(table["size_bytes"]):
        raise other
    files = _look(root, paths, _files_of(table))
    moved = _moved(table, old, keys, files)
    if not known and not moved:
        raise other
    old |= moved

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
        record["path"] = clip.path
        record["label"], record["split"] = clip.label, clip.split
        file = files[clip.path]
        if file.reason:
            record |= {"status": "quarantined", "reason": file.reason, "detail": file.detail}
            continue
        record["size_bytes"], record["mtime_ns"] = file.size_bytes, file.mtime_ns
        if record["digest"] != file.digest:
            changed += bool(record["digest"])
            record |= _UNKNOWN | {"digest": file.digest}
        elif retry and (record["status"] == "quarantined" or record["overflowed"]):
            record |= {"status": "pending", "reason": "", "detail": "", "overflowed": ()}
        elif record["reason"] in TRANSIENT:
            record |= {"status": "pending", "reason": "", "detail": ""}
    gone = np.setdiff1d(np.arange(len(records)), rows)
    for row in gone:
        records[row] |= {"status": "quarantined", "reason": "missing",
                         "detail": "the data set no longer lists it"}  # fmt: skip
    frame = pd.DataFrame(records, columns=list(clips.COLUMNS)).astype(clips.COLUMNS)
    hashed = sum(file.hashed for file in files.values())
    return Scan(
        frame.rename_axis(index="row"),
        np.array(rows, np.int64),
        new,
        changed,
        len(gone),
        len(moved),
        hashed,
    )


def _moved(
    table: pd.DataFrame,
    old: Mapping[_Key, int],
    keys: Sequence[_Key],
    files: Mapping[str, "_File"],
) -> dict[_Key, int]:
    """Return the rows that take another path, by the key of the clip there."""
    listed = set(keys)
    gone: dict[_Key, list[int]] = defaultdict(list)
    for (_, start, end), row in ((key, row) for key, row in old.items() if key not in listed):
        gone[(str(table.at[row, "digest"]), start, end)].append(row)
    new: dict[_Key, list[_Key]] = defaultdict(list)
    for path, start, end in (key for key in keys if key not in old):
        new[(files[path].digest, start, end)].append((path, start, end))
    return {
        key: row
        for content, clips_there in new.items()
        if content[0] and len(clips_there) == len(gone.get(content, ()))
        for key, row in zip(clips_there, sorted(gone[content]), strict=True)
    }


def _sizes(root: Path, paths: Iterable[str]) -> set[int]:
    sizes = set()
    for path in paths:
        with suppress(OSError):
            sizes.add(size_and_mtime(root / path)[0])
    return sizes


@dataclass(frozen=True)
class _File:
    digest: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0
    hashed: bool = False
    reason: str = ""
    detail: str = ""


def _look(root: Path, paths: list[str], known: dict[str, _File]) -> dict[str, _File]:
    def look(path: str) -> _File:
        return _look_at(root / path, known.get(path))

    # Hashing releases the interpreter; reading waits for the disk.
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        return dict(zip(paths, pool.map(look, paths), strict=True))


def _look_at(path: Path, known: _File | None) -> _File:
    try:
        if not (path.is_file() or path.is_dir()):
            if path.exists():
                return _File(reason="not_video", detail="neither a file nor a folder of frames")
            detail = "the data set lists it and the disk has no such file"
            return _File(reason="missing", detail=detail)
        size, mtime = size_and_mtime(path)
        if known and known.digest and (size, mtime) == (known.size_bytes, known.mtime_ns):
            return known
        return _File(content_digest(path), size, mtime, hashed=True)
    except OSError as error:
        return _File(reason="unreadable", detail=f"{error.strerror or error}")


def _files_of(table: pd.DataFrame) -> dict[str, _File]:
    # A listed row describes its file more recently than a row whose clip is gone.
    latest_last = table.sort_values("reason", key=lambda reason: reason != "missing", kind="stable")
    columns = [latest_last[name] for name in ("path", "digest", "size_bytes", "mtime_ns")]
    return {path: _File(*facts) for path, *facts in zip(*columns, strict=True)}
