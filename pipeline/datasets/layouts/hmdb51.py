"""HMDB51, in either of the two forms its splits go round in.

The official one has a file for each class and split, `<class>_test_split<k>.txt`, with lines
`<file> <flag>`: 1 train, 2 test, 0 in neither, which is listed with an empty split. The other has
`hmdb51_trainlist0k.txt` and `hmdb51_testlist0k.txt` with lines `number, class number, class/file`.
There the label is the folder: the class numbers count the classes by the alphabet, which is not
the order of the ClassInd.txt beside them.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from varve.pipeline.datasets.layouts import ListedClip, Listing
from varve.pipeline.datasets.layouts._disk import join
from varve.pipeline.datasets.layouts._index import class_index, numbered_lists
from varve.pipeline.datasets.layouts._lists import (
    Entry,
    assemble,
    choose_split,
    first_rows,
    inside,
    lines,
    place,
)

SPECIFIC = 2
NEEDS = (
    "<class>_test_split1.txt for each class, or hmdb51_trainlist01.txt and hmdb51_testlist01.txt, "
    "in it or in a folder such as testTrainMulti_7030_splits/"
)
FLAGS = r"(?P<label>.+)_test_split(?P<number>[1-9][0-9]*)\.txt"
LISTS = r"hmdb51_(?P<kind>train|test)list(?P<number>0*[1-9][0-9]*)\.txt"
Reader = Callable[[Path, str, tuple[str, ...]], Iterator[Entry]]
SPLIT_OF_FLAG = {"0": "", "1": "train", "2": "test"}


def recognise(root: Path) -> str | None:
    folder, found, _ = _find(root)
    return f"HMDB51: {len(found)} numbered splits in {folder or '.'}/" if found else None


def read(root: Path, split: str | None = None) -> Listing:
    folder, found, entries_of = _find(root)
    number = choose_split(found, split, "HMDB51")
    classes, index = class_index(root, folder)
    entries = list(entries_of(root, folder, found[number]))
    labels = classes.values() or {entry.clip.label for entry in entries}
    placed, missing = place(root, entries, labels, ignore_case=True)
    order = f"class order from {index}" if classes else "no ClassInd.txt, classes in sorted order"
    said = f"HMDB51, split {number} of {len(found)}, lists in {folder or '.'}/"
    return assemble(root, placed, "hmdb51", said, list(classes.values()) or None, (order, missing))


def _find(root: Path) -> tuple[str, dict[str, tuple[str, ...]], Reader]:
    """The folder of the split files, their names by split, and what reads one split's."""
    folder, found = numbered_lists(root, FLAGS)
    if found and _is_flags(root / join(folder, min(found.values())[0])):
        return folder, found, _flagged
    return *numbered_lists(root, LISTS), _listed


def _is_flags(path: Path) -> bool:
    lasts = [" ".join(row).split()[-1:] for row in first_rows(path, " ", 3)]
    return bool(lasts) and all(last[0] in SPLIT_OF_FLAG for last in lasts if last)


def _flagged(root: Path, folder: str, names: tuple[str, ...]) -> Iterator[Entry]:
    for name in sorted(names):
        match = re.fullmatch(FLAGS, name, re.IGNORECASE)
        assert match is not None  # `names` were found by this pattern
        for where, line in lines(root / join(folder, name)):
            flagged = re.fullmatch(r"(.+?)\s+([012])", line)
            if not flagged:
                raise ValueError(f"{where}: {line!r} is not a file name and 0, 1 or 2")
            path = inside(root, f"{match['label']}/{flagged[1]}", where)
            yield Entry(ListedClip(path, match["label"], SPLIT_OF_FLAG[flagged[2]]), where)


def _listed(root: Path, folder: str, names: tuple[str, ...]) -> Iterator[Entry]:
    for name in sorted(names, key=lambda name: "testlist" in name.lower()):
        kind = "test" if "testlist" in name.lower() else "train"
        for where, line in lines(root / join(folder, name)):
            match = re.fullmatch(r"[0-9]+\s+[0-9]+\s+(.+)", line)
            path = inside(root, match[1], where) if match else ""
            if "/" not in path:
                raise ValueError(
                    f"{where}: {line!r} is not a number, a class number and <class>/<file>"
                )
            yield Entry(ListedClip(path, path.split("/")[-2], kind), where)
