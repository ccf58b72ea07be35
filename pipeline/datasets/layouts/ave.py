"""AVE: Annotations.txt, with trainSet.txt, valSet.txt and testSet.txt for the splits.

Lines are `Category&VideoID&Quality&StartTime&EndTime`. A clip is the whole file of 10 seconds,
`<VideoID>.mp4` anywhere below the root: the times say where in it the event is visible and
audible, and are not used. A video that Annotations.txt lists and no set does is in no split.
"""

from collections.abc import Iterator
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import join, near, write_files
from varve.pipeline.datasets.layouts._lists import (
    Entry,
    assemble,
    first_rows,
    lines,
    locate,
    no_splits,
    regular,
)
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 2
NEEDS = "Annotations.txt (Category&VideoID&Quality&StartTime&EndTime), in it or in a folder of it"
TREE = """\
ROOT/
  Annotations.txt             Church bell&RUhOCu3LNXM&good&0&10
  trainSet.txt  valSet.txt  testSet.txt
  AVE/RUhOCu3LNXM.mp4
"""
SETS = {"trainset.txt": "train", "valset.txt": "val", "testset.txt": "test"}
COLUMNS = ("category", "videoid", "quality", "starttime", "endtime")


def recognise(root: Path) -> str | None:
    folder, files = _files(root)
    return f"AVE: {', '.join(files)} in {folder or '.'}/" if files else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "AVE")
    folder, files = _files(root)
    entries: list[Entry] = []
    used = []
    for kind in (*SETS, "annotations.txt"):
        for name in (name for name in files if name.lower() == kind):
            used.append(name)
            entries += _entries(root / join(folder, name), SETS.get(kind, ""))
    listed = {entry.clip.path for entry in entries if entry.clip.split}
    # Annotations.txt repeats the sets: only those that no set has are taken from it.
    entries = [e for e in entries if e.clip.split or e.clip.path not in listed]
    located, missing = locate(root, entries, {entry.clip.label for entry in entries})
    notes = (missing, "clips are whole videos, times of events not used")
    return assemble(root, located, "ave", f"AVE, {', '.join(used)}", notes=notes)


def example(root: Path) -> list[str]:
    labels = ["Church bell", "Male speech, man speaking", "日本 naïve"]
    header = "Category&VideoID&Quality&StartTime&EndTime\r\n"
    annotations = header
    files = {}
    for kind in ("train", "val", "test"):
        texts = [f"{label}&{kind}-_{i}&good&{i}&10\r\n" for i, label in enumerate(labels)]
        files[f"data/{kind}Set.txt"] = "".join(texts)
        files |= {f"AVE/{kind}-_{i}.mp4": "" for i in range(len(labels))}
        annotations += "".join(texts)
    write_files(root, files | {"data/Annotations.txt": annotations})
    return labels


def _files(root: Path) -> tuple[str, list[str]]:
    for folder, names in near(root):
        files = [name for name in names if name.lower() in {"annotations.txt", *SETS}]
        files = [name for name in files if _is_ave(root / join(folder, name))]
        if files:
            return folder, files
    return "", []


def _is_ave(path: Path) -> bool:
    first = first_rows(path, "&")
    return bool(first) and len(first[0]) == len(COLUMNS)


def _entries(path: Path, split: str) -> Iterator[Entry]:
    for where, line in lines(path):
        cells = [regular(cell) for cell in line.split("&")]
        if tuple(cell.casefold() for cell in cells) == COLUMNS:
            continue
        if len(cells) < len(COLUMNS) or not cells[-4] or set("/\\\0") & set(cells[-4]):
            raise ValueError(f"{where}: {line!r} is not Category&VideoID&Quality&StartTime&EndTime")
        label = "&".join(cells[:-4])  # the only value that may have one in it
        yield Entry(ListedClip(f"{cells[-4]}.mp4", label, split), where)
