"""HMDB51, in either of the two forms of its splits.

The official form has a file for each class and split, `<class>_test_split<k>.txt`, with lines
`<file> <flag>`: 1 train, 2 test, 0 neither, which is listed with an empty split. The other form has
`hmdb51_trainlist0k.txt` and `hmdb51_testlist0k.txt` with lines `number, class number, class/file`.
There the label is the folder: the class numbers follow the alphabet, which is not the order of the
ClassInd.txt beside them.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import join, write_files
from varve.pipeline.datasets.layouts._index import assemble_indexed, class_index, numbered_lists
from varve.pipeline.datasets.layouts._lists import Entry, choose_split, first_rows, inside, lines
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 2
NEEDS = (
    "<class>_test_split1.txt for each class, or hmdb51_trainlist01.txt and hmdb51_testlist01.txt, "
    "in it or in a folder such as testTrainMulti_7030_splits/"
)
TREE = """\
ROOT/
  testTrainMulti_7030_splits/ brush_hair_test_split1.txt, ...
  brush_hair/a.avi            (or hmdb51_trainlist01.txt, hmdb51_testlist01.txt)
"""
FLAGS = r"(?P<label>.+)_test_split(?P<number>[1-9][0-9]*)\.txt"
LISTS = r"hmdb51_(?P<kind>train|test)list(?P<number>0*[1-9][0-9]*)\.txt"
Reader = Callable[[Path, str, tuple[str, ...]], Iterator[Entry]]
SPLIT_OF_FLAG = {"0": "", "1": "train", "2": "test"}


def recognise(root: Path) -> str | None:
    folder, lists, _ = _find(root)
    return f"HMDB51: {len(lists)} numbered splits in {folder or '.'}/" if lists else None


def read(root: Path, split: str | None = None) -> Listing:
    folder, lists, entries_of = _find(root)
    number = choose_split(lists, split, "HMDB51")
    classes, index = class_index(root, folder)
    entries = list(entries_of(root, folder, lists[number]))
    order = f"class order from {index}" if classes else "no ClassInd.txt, classes in sorted order"
    summary = f"HMDB51, split {number} of {len(lists)}, lists in {folder or '.'}/"
    return assemble_indexed(root, entries, "hmdb51", summary, list(classes.values()), order)


def example(root: Path) -> list[str]:
    labels = ["brush_hair", "ça va", "it's [50%] *"]
    for label in labels:
        names = [f"Who(1)_{label}_u_nm_{i}.avi" for i in range(3)]
        lines = "".join(f"{name} {flag} \n" for flag, name in enumerate(names))
        lists = [f"testTrainMulti_7030_splits/{label}_test_split{split}.txt" for split in "123"]
        write_files(root, dict.fromkeys(lists, lines) | {f"{label}/{name}": "" for name in names})
    return labels


def _find(root: Path) -> tuple[str, dict[str, tuple[str, ...]], Reader]:
    """Return the folder of the split files, their names by split, and the reader of one split."""
    folder, lists = numbered_lists(root, FLAGS)
    if lists and _is_flags(root / join(folder, min(lists.values())[0])):
        return folder, lists, _flagged
    return *numbered_lists(root, LISTS), _listed


def _is_flags(path: Path) -> bool:
    lasts = [" ".join(row).split()[-1:] for row in first_rows(path, " ", 3)]
    return bool(lasts) and all(last[0] in SPLIT_OF_FLAG for last in lasts if last)


def _flagged(root: Path, folder: str, names: tuple[str, ...]) -> Iterator[Entry]:
    for name in sorted(names):
        match = re.fullmatch(FLAGS, name, re.IGNORECASE)
        assert match is not None  # `names` match this pattern
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
