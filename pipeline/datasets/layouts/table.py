"""A plain list: a CSV or TSV file with a column of paths and a column of labels.

The header names the columns, in any order and case: `path` (or video, file, filename...), `label`
(or class, category...), and optionally `split`, `start_seconds` (start), `end_seconds` (end).
Other columns are ignored. Without a header exactly two columns are read, path and label, if one of
the first paths exists. The delimiter is the one by which the header has both columns: comma,
semicolon or tab. Paths are relative to the directory of the list.

The list is the one in the root, the root itself, or several that are named after their splits
(train.csv, val.csv, test.csv) and then need no column `split`. Where all labels are numbers, a file
beside the list (classes.txt, label_map.txt) names the classes; see `_names`.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import (
    AWKWARD,
    LIST_SUFFIXES,
    csv_text,
    scan,
    suffix,
    write_files,
)
from varve.pipeline.datasets.layouts._line_lists import line_form
from varve.pipeline.datasets.layouts._lists import (
    Entry,
    assemble,
    first_rows,
    inside,
    no_splits,
    rows,
    seconds,
)
from varve.pipeline.datasets.layouts._names import named
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 1
NEEDS = "a .csv or .tsv file with a column path (or video, file) and a column label (or class)"
TREE = """\
ROOT/
  clips.csv                   path,label,split[,start_seconds,end_seconds]
  any/folder/clip.mp4         (or train.csv, val.csv, test.csv without a split)
"""
COLUMNS = {
    "path": ("path", "video_path", "file_path", "filepath", "video", "file", "filename"),
    "label": ("label", "class", "category", "label_name", "class_name"),
    "split": ("split", "subset", "partition"),
    "start": ("start_seconds", "start_time", "time_start", "start"),
    "end": ("end_seconds", "end_time", "time_end", "end"),
}
SPLITS = ("train", "val", "valid", "validation", "test")
SPLIT_NAMES = re.compile(rf"(?:.*[_-])?({'|'.join(SPLITS)})", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """Form of one list: its delimiter, the column of each role, and the columns not used."""

    delimiter: str
    columns: dict[str, int]
    ignored: tuple[str, ...]
    header: bool
    width: int


def is_table(path: Path, base: Path) -> bool:
    """Return whether a file is such a list, of clips below `base`."""
    return suffix(path.name) in LIST_SUFFIXES and _form(path, base) is not None


def recognise(root: Path) -> str | None:
    if root.is_file():
        # Named by the user: `read` reports what is wrong with it, unless it has another form.
        return None if not is_table(root, root.parent) and line_form(root) else f"list {root.name}"
    names = [path.name for path in _lists(root)]
    return f"a list of clips, {', '.join(names)}" if names else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "a list of clips")
    base = root.parent if root.is_file() else root
    files = [root] if root.is_file() else _lists(root)
    by_split = {path: SPLIT_NAMES.fullmatch(path.stem) for path in files}
    if len(files) > 1 and not all(by_split.values()):
        raise ValueError(
            f"{root} holds {len(files)} lists: {', '.join(path.name for path in files)}; name the "
            f"one to read in place of the directory, such as {files[0]}"
        )
    splits = {path: match[1].lower() if match else "" for path, match in by_split.items()}
    files.sort(key=lambda path: (SPLITS.index(splits[path]) if splits[path] else 0, path.name))
    entries: list[Entry] = []
    used = []
    for path in files:
        form = _form(path, base)
        if form is None:
            raise ValueError(f"{path} is no list of clips: {_first_line(path)}; {NEEDS} is needed")
        entries += _entries(base, path, form, splits[path])
        columns = f"columns {', '.join(form.columns)}" if form.header else "path and label, unnamed"
        ignored = f", ignored {', '.join(form.ignored)}" if form.ignored else ""
        used.append(f"{path.name} ({columns}{ignored})")
    names = [path.name for path in files]
    entries, classes, note = named([base], entries, names)
    return assemble(base, entries, "table", f"list {', '.join(used)}", classes, (note,))


def example(root: Path) -> list[str]:
    rows = [[f"{folder}/clip.mp4", label, "test"] for folder, label in enumerate(AWKWARD)]
    table = csv_text([["Path", "Class", "split"], *rows])
    write_files(root, {"clips.csv": table} | {row[0]: "" for row in rows})
    return AWKWARD


def _lists(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [root / name for name in scan(root)[1] if is_table(root / name, root)]


def _form(path: Path, base: Path) -> Form | None:
    delimiters = "\t" if suffix(path.name) == ".tsv" else ",;\t"
    for delimiter in delimiters:
        first = first_rows(path, delimiter)
        names = [re.sub(r"[\s-]+", "_", cell.strip().lower()) for cell in first[0]] if first else []
        columns = {
            role: names.index(alias)
            for role, aliases in COLUMNS.items()
            for alias in aliases[::-1]
            if alias in names
        }
        if {"path", "label"} <= columns.keys():
            ignored = tuple(
                cell for i, cell in enumerate(first[0]) if i not in columns.values() and cell
            )
            return Form(delimiter, columns, ignored, header=True, width=len(names))
    plain = [delimiter for delimiter in delimiters if _is_plain(path, delimiter, base)]
    if len(plain) == 1:
        return Form(plain[0], {"path": 0, "label": 1}, (), header=False, width=2)
    return None


def _is_plain(path: Path, delimiter: str, base: Path) -> bool:
    first = first_rows(path, delimiter, 100)
    return all(len(row) == 2 for row in first) and any(
        row[0] and os.path.lexists(base / row[0].replace("\\", "/")) for row in first
    )


def _entries(base: Path, path: Path, form: Form, split: str) -> Iterator[Entry]:
    table = rows(path, form.delimiter)
    if form.header:
        next(table)
    for where, cells in table:
        if len(cells) < form.width or any(cells[form.width :]):
            raise ValueError(
                f"{where}: {len(cells)} values for {form.width} columns; put a value that holds "
                f"{form.delimiter!r} in quotes, and leave no value out"
            )
        row = {role: cells[i] for role, i in form.columns.items()}
        start, end = (
            seconds(cell, where, "; leave it empty for none") if cell.strip() else None
            for cell in (row.get("start", ""), row.get("end", ""))
        )
        if end is not None and end <= (start or 0.0):
            raise ValueError(f"{where}: the clip ends at {end:g} s, no later than it starts")
        video = inside(base, row["path"], where)
        clip = ListedClip(video, row["label"], row.get("split", split), start, end)
        yield Entry(clip, where)


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(200)
    return f"its first line is {line!r}" if line else "it is empty"
