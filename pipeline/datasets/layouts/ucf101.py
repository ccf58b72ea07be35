"""UCF101: trainlist0k.txt and testlist0k.txt, with classInd.txt for the order of the classes.

A clip's label is the folder in its listed path, spelled as the class index spells it; without a
folder it is the class number beside it, or else the class in the file name (v_<Class>_g01_c01).
The videos may be in root/<Class>/, in any folder above that, or all in one directory. They are
found by name without case: the release has HandstandPushups in the index and v_HandStandPushups in
the files.
"""

import re
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import join, stem, write_files
from varve.pipeline.datasets.layouts._index import assemble_indexed, class_index, numbered_lists
from varve.pipeline.datasets.layouts._lists import Entry, choose_split, inside, lines
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 2
NEEDS = "trainlist01.txt and testlist01.txt, in it or in a folder such as ucfTrainTestlist/"
TREE = """\
ROOT/
  ucfTrainTestlist/           classInd.txt, trainlist01.txt, testlist01.txt, ...
  UCF-101/Archery/v_Archery_g01_c01.avi
"""
LISTS = r"(train|test)list(?P<number>0*[1-9][0-9]*)\.txt"


def recognise(root: Path) -> str | None:
    folder, lists = numbered_lists(root, LISTS)
    return f"UCF101: {len(lists)} numbered splits in {folder or '.'}/" if lists else None


def read(root: Path, split: str | None = None) -> Listing:
    folder, lists = numbered_lists(root, LISTS)
    number = choose_split(lists, split, "UCF101")
    classes, index = class_index(root, folder)
    entries = []
    for name in sorted(lists[number], key=lambda name: name.lower().startswith("test")):
        kind = "test" if name.lower().startswith("test") else "train"
        for where, line in lines(root / join(folder, name)):
            match = re.fullmatch(r"(.+?)(?:\s+([0-9]+))?", line)
            assert match is not None  # `line` is not blank
            path = inside(root, match[1], where)
            label = _label(path, match[2], classes, where)
            entries.append(Entry(ListedClip(path, label, kind), where))
    order = f"class order from {index}" if classes else "no classInd.txt, classes in sorted order"
    summary = f"UCF101, split {number} of {len(lists)}, lists in {folder or '.'}/"
    return assemble_indexed(root, entries, "ucf101", summary, list(classes.values()), order)


def example(root: Path) -> list[str]:
    labels = ["Zumba", "HandstandPushups", "日本Naïve"]
    files = {"ucfTrainTestlist/classInd.txt": ""}
    for i, label in enumerate(labels, 1):
        files["ucfTrainTestlist/classInd.txt"] += f"{i} {label}\r\n"
    for kind, group in (("train", "01"), ("test", "02")):
        names = [f"{label}/v_{label.upper()}_g{group}_c01.avi" for label in labels]
        ends = [f" {i}\r\n" if kind == "train" else "\r\n" for i in (1, 2, 3)]
        lines = "".join(map("".join, zip(names, ends, strict=True)))
        files |= {f"ucfTrainTestlist/{kind}list0{split}.txt": lines for split in "12"}
        files |= {f"UCF-101/{name}": "" for name in names}
    write_files(root, files)
    return labels


def _label(path: str, number: str | None, classes: dict[int, str], where: str) -> str:
    *above, name = path.split("/")
    if above:
        label = above[-1]
    elif number and classes:
        if int(number) not in classes:
            raise ValueError(f"{where}: class {number} is not in the class index; add it there")
        return classes[int(number)]
    elif match := re.fullmatch(r"v_(.+)_g[0-9]+_c[0-9]+", stem(name)):
        label = match[1]
    else:
        raise ValueError(f"{where}: {path} says no class; list it as <Class>/{name}")
    spelled = {name.casefold(): name for name in classes.values()}
    return spelled.get(label.casefold(), label)
