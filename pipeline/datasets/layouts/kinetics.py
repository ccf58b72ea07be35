"""Kinetics: CSV files with the columns label, youtube_id, time_start, time_end, split.

The file of a clip is `<youtube_id>_<start>_<end>.mp4` with both times in seconds as six digits, or
the same name with another extension, anywhere below the root; of several, the one in the folder of
its label or split, but a file below a folder `replacement/` goes before all: CVDF's archives have
corrected copies of damaged files there. `train.csv`, `val.csv`, `validate.csv` and `test.csv` are
read together, and the split `validate` is `val`. Where only the uncut
`<youtube_id>.mp4` exists, the clip is its interval from time_start to time_end. Rows without a
label (a test list) are left out.
"""

from dataclasses import replace
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import (
    AWKWARD,
    ClipFinder,
    csv_text,
    folder_key,
    join,
    near,
    scan,
    stem,
    suffix,
    write_files,
)
from varve.pipeline.datasets.layouts._lists import (
    SPLIT_WORDS,
    Entry,
    assemble,
    first_rows,
    no_splits,
    regular,
    rows,
    seconds,
    split_name,
)
from varve.pipeline.datasets.layouts._values import ListedClip, Listing
from varve.pipeline.datasets.media import natural_key

SPECIFIC = 2
NEEDS = "a CSV file with the columns label, youtube_id, time_start, time_end, split"
TREE = """\
ROOT/
  annotations/train.csv       label,youtube_id,time_start,time_end,split
  annotations/val.csv         (or validate.csv)
  train/a_class/ID0123456789_000003_000013.mp4
  replacement/                corrected copies of files, if any
"""
COLUMNS = ("youtube_id", "time_start", "time_end")
ORDER = ("train", "val", "test")


def recognise(root: Path) -> str | None:
    files = _lists(root)
    return f"Kinetics: {', '.join(files)}" if files else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "Kinetics")
    files = _lists(root)
    listed = [row for name in files for row in _rows(root / name)]
    names = [name for clip, _ in listed for name in (_cut_name(clip), clip.path)]
    finder = ClipFinder(root, names)
    corrected = [name for name in scan(root)[0] if name.casefold().startswith("replacement")]
    finders = [(folder, ClipFinder(root / folder, names)) for folder in corrected]
    classes = {folder_key(clip.label) for clip, _ in listed}
    entries, uncut, missing, replaced = [], 0, 0, 0
    for clip, where in listed:
        hints = (clip.label, clip.split, *SPLIT_WORDS.get(clip.split, ()))
        name = _cut_name(clip)
        copies = (join(f, path) for f, other in finders if (path := other.find(name, hints)))
        copy = next(copies, None)
        replaced += copy is not None
        cut = copy or finder.find(name, hints, classes)
        whole = None if cut else finder.find(clip.path, hints, classes)
        if whole:
            uncut += 1
            clip = replace(clip, path=whole)
        else:
            missing += cut is None
            clip = ListedClip(cut or name, clip.label, clip.split)
        entries.append(Entry(clip, where))
    notes = (
        f"taken from {', '.join(corrected)}: {replaced}" if replaced else "",
        f"stretches of uncut videos: {uncut}" if uncut else "",
        f"listed but not on the disk: {missing}" if missing else "",
    )
    return assemble(root, entries, "kinetics", f"Kinetics, {', '.join(files)}", notes=notes)


def example(root: Path) -> list[str]:
    header = ["label", "youtube_id", "time_start", "time_end", "split"]
    for split in ("train", "val"):
        name = f"{split[:2]}_-abcDEF"
        rows = [[label, f"{name}{i}", i, i + 10, split] for i, label in enumerate(AWKWARD)]
        videos = {f"{split}/{name}{i}_{i:06d}_{i + 10:06d}.mp4": "" for i in range(len(AWKWARD))}
        write_files(root, {f"annotations/{split}.csv": csv_text([header, *rows])} | videos)
    return AWKWARD


def _lists(root: Path) -> list[str]:
    """Return the lists of the root, or of the first folder of it with any: train, val, test."""

    def rank(name: str) -> tuple[int, object]:
        kinds = [i for i, kind in enumerate(ORDER) if kind in name.lower()]
        return min(kinds, default=len(ORDER)), natural_key(name)

    for folder, files in near(root):
        tables = (join(folder, name) for name in files if suffix(name) == ".csv")
        if lists := [table for table in tables if _header(root / table)]:
            return sorted(lists, key=rank)
    return []


def _header(path: Path) -> bool:
    first = first_rows(path, ",")
    return bool(first) and set(COLUMNS) <= {regular(cell) for cell in first[0]}


def _rows(path: Path) -> list[tuple[ListedClip, str]]:
    """Return each row as a clip of the uncut video, with its position in the list."""
    table = rows(path, ",")
    header = [regular(cell) for cell in next(table)[1]]
    kind = next((kind for kind in ORDER if kind in path.name.lower()), "")
    clips = []
    for where, cells in table:
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} values for {len(header)} columns")
        row = dict(zip(header, cells, strict=True))
        name = row["youtube_id"]
        name = regular(name)
        if not name or set("/\\\0") & set(name) or name.startswith("."):
            raise ValueError(f"{where}: {name!r} is no YouTube id")
        start, end = (seconds(row[column], where) for column in ("time_start", "time_end"))
        if start >= end:
            raise ValueError(f"{where}: time_start {start:g} is not before time_end {end:g}")
        split = split_name(regular(row.get("split", ""))) or kind
        clips.append((ListedClip(f"{name}.mp4", row.get("label", ""), split, start, end), where))
    return clips


def _cut_name(clip: ListedClip) -> str:
    assert clip.start_seconds is not None  # `_rows` sets both times
    assert clip.end_seconds is not None
    return f"{stem(clip.path)}_{int(clip.start_seconds):06d}_{int(clip.end_seconds):06d}.mp4"
