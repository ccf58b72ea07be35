"""Lists of mmaction2, VideoMAE and SlowFast: `path label` or `path num_frames label` a line.

The split is the word train, val or test (or training, validation...) in the name of the list:
`train.csv`, `kinetics400_val_list_videos.txt`, `ucf101_train_split_1_rawframes.txt`, whose number
is that of an official split. Lists are in the root or in a folder of it. Where labels are numbers,
a file beside the list (label_map.txt, classes.txt, ...) names the classes; see `_names`.

A path is relative to the root, to the folder of the list, or to a folder in either, such as
`videos_train/`: the first in which that path exists, and never one that is named after another
split than the list. Numbers of frames are not used: the build
counts them.
"""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import join, near, scan, suffix, write_files
from varve.pipeline.datasets.layouts._line_lists import line_form, read_lines
from varve.pipeline.datasets.layouts._lists import (
    SPLIT_WORDS,
    Entry,
    assemble,
    choose_split,
    inside,
    no_splits,
    split_name,
)
from varve.pipeline.datasets.layouts._names import is_names_file, named
from varve.pipeline.datasets.layouts._values import ListedClip, Listing
from varve.pipeline.datasets.layouts.hmdb51 import FLAGS
from varve.pipeline.datasets.layouts.table import is_table
from varve.pipeline.datasets.media import natural_key

SPECIFIC = 1
NEEDS = "train.txt, val.csv or similar with lines `path label` or `path num_frames label`"
TREE = """\
ROOT/
  kinetics_train_list.txt     some/clip.mp4 3   or   some/clip 120 3
  kinetics_val_list.txt       (separated by blanks, tabs or commas)
  label_map.txt               one class a line, if labels are numbers
  videos_train/some/clip.mp4
"""
SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".list", ".lst"})
WORDS = sorted((word for words in SPLIT_WORDS.values() for word in words), key=len, reverse=True)
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)
NUMBER = re.compile(r"[_-]?split[_-]?0*([0-9]+)", re.IGNORECASE)
# Words for the form of the clips, which lists of one data set may differ in.
FORM = re.compile(r"[_.-]?(?:videos?|rawframes|frames|rgb|lists?)(?![a-z])", re.IGNORECASE)


def recognise(root: Path) -> str | None:
    if root.is_file():
        return (
            f"the list {root.name}" if not is_table(root, root.parent) and line_form(root) else None
        )
    lists = _lists(root)
    return f"lists of videos, {', '.join(lists)}" if lists else None


def read(root: Path, split: str | None = None) -> Listing:
    base = root.parent if root.is_file() else root
    names = [root.name] if root.is_file() else _lists(root)
    if root.is_file() and not line_form(root):
        raise ValueError(f"{root} has lines of another form; {NEEDS} is needed")
    numbered = {name: match[1] for name in names if (match := NUMBER.search(Path(name).name))}
    number = ""
    if numbered and not root.is_file():
        number = choose_split(set(numbered.values()), split, "the lists of videos")
        names = [name for name in names if numbered.get(name, number) == number]
    else:
        no_splits(split, "a list of videos")
    _check_kinds(base, names)
    order = [*SPLIT_WORDS, ""]
    names.sort(key=lambda name: (order.index(_split(name)), natural_key(name)))
    entries: list[Entry] = []
    counted = missing = 0
    for name in names:
        path = base / name
        form = line_form(path)
        assert form is not None  # checked above, or by `_lists`
        folders = _folders(base, os.path.dirname(name), _split(name))
        lines = list(read_lines(path, form))
        located = _located(base, folders, [(line.path, line.where) for line in lines])
        for line, (file, there) in zip(lines, located, strict=True):
            counted += line.counted
            missing += not there
            entries.append(Entry(ListedClip(file, line.label, _split(name)), line.where))
    if entries and missing == len(entries):
        raise ValueError(
            f"{base}: none of the {missing} clips of {', '.join(names)} is there, such as "
            f"{entries[0].clip.path}; move the list to the folder that its paths are relative to, "
            "or name that folder"
        )
    beside = dict.fromkeys(base / os.path.dirname(name) for name in names)
    used = [os.path.basename(name) for name in names]
    entries, classes, note = named([*beside, base], entries, used)
    notes = (
        note,
        f"listed but not on the disk: {missing}" if missing else "",
        f"numbers of frames in the lists, not used: {counted}" if counted else "",
    )
    which = f"split {number} of {len(set(numbered.values()))}, " if number else ""
    return assemble(
        base, entries, "video_lists", f"lists of videos, {which}{', '.join(names)}", classes, notes
    )


def example(root: Path) -> list[str]:
    labels = ['say "hi", twice', "日本 naïve", " spaced ", "C:\\x\\..\\y"]
    files = {"lists/label_map_few.txt": "".join(f"{label}\r\n" for label in labels)}
    for split in ("train", "val"):
        names = [f"{i}/a clip.mp4" for i in range(len(labels))]
        lines = [f"{name} {i + 30} {i}\r\n" for i, name in enumerate(names)]
        files[f"lists/few_{split}_list_videos.txt"] = "\ufeff" + "".join(lines)
        files |= {f"videos_{split}/{name}": "" for name in names}
    write_files(root, files)
    return labels


def _split(name: str) -> str:
    match = SPLIT.search(os.path.basename(name))
    return split_name(match[1]) if match else ""


def _lists(root: Path) -> list[str]:
    """Return the lists of the root, or of the first folder of it with any."""
    for folder, files in near(root):
        lists = [
            join(folder, name)
            for name in files
            if suffix(name) in SUFFIXES
            and SPLIT.search(name)
            and not re.fullmatch(FLAGS, name, re.IGNORECASE)
            and not is_table(root / join(folder, name), root)
            and line_form(root / join(folder, name))
        ]
        # Of a data set's `train_labels.txt` and `train.txt` both are lists if both have the form.
        plain = [name for name in lists if not is_names_file(os.path.basename(name))]
        if plain or lists:
            return plain or lists
    return []


def _check_kinds(base: Path, names: list[str]) -> None:
    """Refuse lists that differ in more than their split and the form of their clips."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = Path(name).stem
        kinds[FORM.sub("", NUMBER.sub("", SPLIT.sub("", stem))).strip("_-. ").casefold()].append(
            name
        )
    if len(kinds) > 1:
        firsts = ", ".join(group[0] for group in kinds.values())
        raise ValueError(
            f"{base} has lists of {len(kinds)} kinds: {firsts}; name the list to read "
            "instead of the directory, or move the others away"
        )


def _folders(base: Path, folder: str, split: str) -> list[str]:
    """Return the folders that paths of a list may be relative to, the likeliest first."""
    parents = list(dict.fromkeys(("", folder)))
    below = [join(parent, name) for parent in parents for name in scan(base / parent)[0]]
    below = sorted(set(below) - set(parents), key=natural_key)
    alike = [name for name in below if split and _split(name) == split]
    return [*parents, *alike, *(name for name in below if not split or not _split(name))]


def _located(
    base: Path, folders: list[str], paths: list[tuple[str, str]]
) -> list[tuple[str, bool]]:
    """Return (path relative to `base`, whether it exists) of each path of a list."""
    tops: Counter[str] = Counter()
    located: list[tuple[str, bool]] = []
    lost = []
    for path, where in paths:
        relative = inside(base, path, where)
        # The folder that had the clips before is tried first after the two that a list names.
        usual = [top for top, _ in tops.most_common(2)]
        for top in dict.fromkeys((*folders[:1], *usual, *folders)):
            if os.path.lexists(base / top / relative):
                tops[top] += 1
                located.append((join(top, relative), True))
                break
        else:
            lost.append(len(located))
            located.append((relative, False))
    top = tops.most_common(1)[0][0] if tops else ""
    for i in lost:
        located[i] = (join(top, located[i][0]), False)
    return located
