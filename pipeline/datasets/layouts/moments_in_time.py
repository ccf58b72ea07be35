"""Moments in Time: trainingSet.csv and validationSet.csv, with moments_categories.txt.

A row is `<class>/<file>.mp4,<class>,<votes for>,<votes against>`, without a header; the votes are
not used. The videos are in `training/` and `validation/`, or in any folder that has them by those
paths. The order of the classes is that of their numbers in moments_categories.txt (`class,number`).
The splits are `train`, `val` and `test`.
"""

import os
import re
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import join, near, scan, write_files
from varve.pipeline.datasets.layouts._lists import (
    Entry,
    assemble,
    first_rows,
    inside,
    no_splits,
    regular,
    rows,
)
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 2
NEEDS = "trainingSet.csv or validationSet.csv, in it or in a folder of it"
TREE = """\
ROOT/
  moments_categories.txt      clapping,4
  trainingSet.csv             clapping/a.mp4,clapping,3,0
  validationSet.csv
  training/clapping/a.mp4
  validation/clapping/b.mp4
"""
LISTS = {"trainingset.csv": "train", "validationset.csv": "val", "testingset.csv": "test"}
FOLDERS = {
    "train": ("training", "train"),
    "val": ("validation", "val"),
    "test": ("testing", "test"),
}


def recognise(root: Path) -> str | None:
    folder, lists = _lists(root)
    return f"Moments in Time: {', '.join(lists)} in {folder or '.'}/" if lists else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "Moments in Time")
    folder, lists = _lists(root)
    entries: list[Entry] = []
    missing = 0
    for name in sorted(lists, key=lambda name: list(LISTS.values()).index(lists[name])):
        kind = lists[name]
        parents = [
            join(f, sub) for sub in (*FOLDERS[kind], "") for f in dict.fromkeys((folder, ""))
        ]
        parents += [join(above, sub) for above in scan(root)[0] for sub in FOLDERS[kind]]
        for where, cells in rows(root / join(folder, name), ","):
            if len(cells) < 2 or not all(re.fullmatch(r"\s*[0-9]*\s*", cell) for cell in cells[2:]):
                raise ValueError(
                    f"{where}: {','.join(cells)!r} is not <class>/<file>,<class>,<votes>,<votes>; "
                    "a clip has one class"
                )
            path = inside(root, cells[0], where)
            ways = [join(parent, path) for parent in parents]
            there = next((way for way in ways if os.path.lexists(root / way)), None)
            missing += there is None
            entries.append(Entry(ListedClip(there or ways[0], cells[1], kind), where))
    classes, index = _categories(root, folder)
    notes = (
        f"class order from {index}" if classes else "no moments_categories.txt, classes sorted",
        f"listed but not on the disk: {missing}" if missing else "",
    )
    summary = f"Moments in Time, {', '.join(lists)} in {folder or '.'}/"
    return assemble(root, entries, "moments_in_time", summary, classes, notes)


def example(root: Path) -> list[str]:
    labels = ["adult+female+singing", "clapping", "日本 naïve"]
    files = {"moments_categories.txt": "".join(f"{n},{i}\n" for i, n in enumerate(labels))}
    for name, folder in (("trainingSet.csv", "training"), ("validationSet.csv", "validation")):
        files[name] = "".join(f"{n}/{folder[:1]}-1.mp4,{n},3,0\n" for n in labels)
        files |= {f"{folder}/{n}/{folder[:1]}-1.mp4": "" for n in labels}
    write_files(root, files)
    return labels


def _lists(root: Path) -> tuple[str, dict[str, str]]:
    for folder, files in near(root):
        lists = {name: LISTS[name.lower()] for name in files if name.lower() in LISTS}
        if lists:
            return folder, lists
    return "", {}


def _categories(root: Path, folder: str) -> tuple[list[str] | None, str]:
    for parent in dict.fromkeys((folder, "")):
        for name in scan(root / parent)[1]:
            if name.lower() != "moments_categories.txt":
                continue
            path = root / join(parent, name)
            numbers: dict[int, str] = {}
            for where, cells in rows(path, ","):
                if len(cells) != 2 or not re.fullmatch("[0-9]{1,9}", regular(cells[1])):
                    raise ValueError(f"{where}: {','.join(cells)!r} is not <class>,<number>")
                if int(cells[1]) in numbers:
                    raise ValueError(f"{where}: number {int(cells[1])} is there twice")
                numbers[int(cells[1])] = cells[0]
            if first_rows(path, ","):
                return [numbers[number] for number in sorted(numbers)], join(parent, name)
    return None, ""
