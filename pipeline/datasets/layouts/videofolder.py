"""Hugging Face's videofolder: metadata.csv or metadata.jsonl with a column `file_name`.

Each metadata file describes the clips of its own folder, and paths are relative to that folder. The
class is the column label (or class, category...), or without such a column the folder that the clip
is in. The split is the column split, or the folder of the metadata file or the first of the path
that is named train, val, validation or test. Where labels are numbers, a file beside the metadata
(classes.txt, ...) names the classes; see `_names`. Other columns are ignored.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import AWKWARD, csv_text, join, walk, write_files
from varve.pipeline.datasets.layouts._lists import (
    SPLIT_WORDS,
    Entry,
    assemble,
    first_rows,
    inside,
    lines,
    no_splits,
    regular,
    rows,
    split_name,
)
from varve.pipeline.datasets.layouts._names import named
from varve.pipeline.datasets.layouts._values import ListedClip, Listing
from varve.pipeline.datasets.layouts.table import COLUMNS

SPECIFIC = 2
NEEDS = "metadata.csv or metadata.jsonl with a column file_name, in it or in folders of it"
TREE = """\
ROOT/
  train/metadata.csv          file_name,label   (or metadata.jsonl)
  train/a.mp4
  test/metadata.csv
  test/b.mp4
"""
NAMES = ("metadata.csv", "metadata.jsonl")
MOST_DEEP = 2  # folders below the root that may have metadata


def recognise(root: Path) -> str | None:
    files = _files(root)
    return f"videofolder: {', '.join(files)}" if files else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "a videofolder")
    files = _files(root)
    entries: list[Entry] = []
    unnamed = 0
    for name in files:
        table = _csv(root / name) if name.endswith(".csv") else _jsonl(root / name)
        folder = name.rpartition("/")[0]
        for where, row in table:
            if not regular(row.get("file_name", "")):
                unnamed += 1
                continue
            path = join(folder, inside(root / folder, row["file_name"], f"{folder}/{where}"))
            columns = {role: _value(row, role) for role in ("label", "split")}
            label = path.split("/")[-2] if columns["label"] is None and "/" in path else ""
            words = [split_name(part) for part in path.split("/")[:-1]]
            kind = next((word for word in words if word in SPLIT_WORDS), "")
            if columns["label"] is None and split_name(label) in SPLIT_WORDS:
                label = ""  # the folder of a split is no class
            clip = ListedClip(path, columns["label"] or label, columns["split"] or kind)
            entries.append(Entry(clip, join(folder, where)))
    order = [*SPLIT_WORDS]
    entries.sort(key=lambda e: order.index(e.clip.split) if e.clip.split in order else len(order))
    folders = dict.fromkeys([root, *((root / name).parent for name in files)])
    entries, classes, note = named(list(folders), entries, NAMES)
    missing = sum(not (root / entry.clip.path).exists() for entry in entries)
    notes = (
        note,
        f"rows without a file name, left out: {unnamed}" if unnamed else "",
        f"listed but not on the disk: {missing}" if missing else "",
    )
    summary = f"videofolder, {', '.join(files)}"
    return assemble(root, entries, "videofolder", summary, classes, notes)


def example(root: Path) -> list[str]:
    train = [[f"{i}/clip.mp4", label] for i, label in enumerate(AWKWARD)]
    items = [{"file_name": f"{i}.mp4", "label": label, "n": 3} for i, label in enumerate(AWKWARD)]
    files = {
        "train/metadata.csv": csv_text([["file_name", "label"], *train]),
        "test/metadata.jsonl": "\n".join(json.dumps(item) for item in items),
    }
    videos = [f"train/{row[0]}" for row in train] + [f"test/{i['file_name']}" for i in items]
    write_files(root, files | dict.fromkeys(videos, ""))
    return AWKWARD


def _files(root: Path) -> list[str]:
    files: list[str] = []
    if not root.is_dir():
        return files
    for folder, folders, names in walk(root):
        if folder and folder.count("/") + 1 >= MOST_DEEP:
            folders.clear()
        files += [
            join(folder, name)
            for name in names
            if name in NAMES and _has_names(root / join(folder, name))
        ]
    return files


def _has_names(path: Path) -> bool:
    if path.suffix == ".csv":
        first = first_rows(path, ",")
        return bool(first) and "file_name" in map(regular, first[0])
    with path.open("rb") as file:
        return b'"file_name"' in file.read(4096)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    table = rows(path, ",")
    header = [regular(cell) for cell in next(table)[1]]
    for where, cells in table:
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: {len(cells)} values for {len(header)} columns; put a value that holds "
                "',' in quotes"
            )
        yield where, dict(zip(header, cells, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for where, line in lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {line!r} is no object; give file_name and label")
        values = {key: "" if value is None else value for key, value in row.items()}
        # A list or an object is a column that is not used.
        yield where, {key: str(v) for key, v in values.items() if isinstance(v, str | int)}


def _value(row: dict[str, str], role: str) -> str | None:
    """Return the value of the column of a role; None where there is no such column."""
    by_name = {regular(name).lower().replace(" ", "_"): value for name, value in row.items()}
    return next((by_name[alias] for alias in COLUMNS[role] if alias in by_name), None)
