"""Kinetics: CSV files with the columns label, youtube_id, time_start, time_end, split.

A clip's file is `<youtube_id>_<start>_<end>.mp4` with both times in seconds as six digits, or the
same name with another extension, anywhere below the root; of several the one in its label's or
its split's folder is taken. Where only the uncut `<youtube_id>.mp4` is there, the clip is its
stretch from time_start to time_end. Rows without a label (a test list) are left out.
"""

import math
from pathlib import Path

from varve.pipeline.datasets.layouts import ListedClip, Listing
from varve.pipeline.datasets.layouts._disk import (
    Shelf,
    folder_key,
    join,
    natural_key,
    near,
    stem,
    suffix,
)
from varve.pipeline.datasets.layouts._lists import Entry, assemble, first_rows, no_splits, rows

SPECIFIC = 2
NEEDS = "a CSV file with the columns label, youtube_id, time_start, time_end, split"
COLUMNS = ("youtube_id", "time_start", "time_end")
ORDER = ("train", "val", "test")


def recognise(root: Path) -> str | None:
    files = _lists(root)
    return f"Kinetics: {', '.join(files)}" if files else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "Kinetics")
    files = _lists(root)
    wanted = [row for name in files for row in _rows(root / name)]
    names = [name for clip, _ in wanted for name in (_cut_name(clip), clip.path)]
    shelf = Shelf(root, names)
    classes = {folder_key(clip.label) for clip, _ in wanted}
    entries, uncut, missing = [], 0, 0
    for clip, where in wanted:
        hints = (clip.label, clip.split)
        name = _cut_name(clip)
        cut = shelf.find(name, hints, classes)
        whole = None if cut else shelf.find(clip.path, hints, classes)
        if whole:
            uncut += 1
            clip = ListedClip(whole, clip.label, clip.split, clip.start_seconds, clip.end_seconds)
        else:
            missing += cut is None
            clip = ListedClip(cut or name, clip.label, clip.split)
        entries.append(Entry(clip, where))
    return assemble(
        root,
        entries,
        "kinetics",
        f"Kinetics, {', '.join(files)}",
        notes=(
            f"stretches of uncut videos: {uncut}" if uncut else "",
            f"listed but not on the disk: {missing}" if missing else "",
        ),
    )


def _lists(root: Path) -> list[str]:
    """Of the root or the first folder of it that has any: train lists first, then val, test."""

    def place_of(name: str) -> tuple[int, object]:
        kinds = [i for i, kind in enumerate(ORDER) if kind in name.lower()]
        return min(kinds, default=len(ORDER)), natural_key(name)

    for folder, files in near(root):
        found = [
            join(folder, name)
            for name in files
            if suffix(name) == ".csv" and _header(root / join(folder, name))
        ]
        if found:
            return sorted(found, key=place_of)
    return []


def _header(path: Path) -> bool:
    first = first_rows(path, ",")
    return bool(first) and set(COLUMNS) <= {cell.strip() for cell in first[0]}


def _rows(path: Path) -> list[tuple[ListedClip, str]]:
    """Each row as a clip of the uncut video, and its place."""
    table = rows(path, ",")
    header = [cell.strip() for cell in next(table)[1]]
    kind = next((kind for kind in ORDER if kind in path.name.lower()), "")
    found = []
    for where, cells in table:
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} values for {len(header)} columns")
        row = dict(zip(header, cells, strict=True))
        name = row["youtube_id"]
        if not name or set("/\\\0") & set(name) or name.startswith("."):
            raise ValueError(f"{where}: {name!r} is no YouTube id")
        start, end = (_seconds(row[column], where) for column in ("time_start", "time_end"))
        if start >= end:
            raise ValueError(f"{where}: time_start {start:g} is not before time_end {end:g}")
        split = row.get("split") or kind
        found.append((ListedClip(f"{name}.mp4", row.get("label", ""), split, start, end), where))
    return found


def _seconds(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: {cell!r} is no time in seconds")
    return value


def _cut_name(clip: ListedClip) -> str:
    assert clip.start_seconds is not None  # `_rows` sets both times
    assert clip.end_seconds is not None
    return f"{stem(clip.path)}_{int(clip.start_seconds):06d}_{int(clip.end_seconds):06d}.mp4"
