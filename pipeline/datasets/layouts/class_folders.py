"""Class folders: root/<class>/<clip>, also in folders of splits.

The class is the first folder, however deep the clip is below it. A clip is a video file, or a
folder of frames without videos; frames in a folder beside their own video are left out.

Folders are splits, and not classes, by their names: `train` (training, trainset, train_set), `val`
(valid, validation, validate) and `test` (testing), in any case. They are read as `train`, `val` and
`test`, in one of these forms:

    <split>/<class>/<clip>             also below one folder around them (data/<split>/<class>/...)
    split1/<split>/<class>/<clip>      numbered; `split` chooses, 1 by default
    <class>/<split>/<clip>

Where such names could be classes as well (`train` beside other classes, or with videos directly in
it), the reading is refused. `splits="none"` then reads each first folder as a class.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import clips_below, join, stem, write_files
from varve.pipeline.datasets.layouts._lists import Entry, assemble, choose_split, no_splits
from varve.pipeline.datasets.layouts._values import ListedClip, Listing
from varve.pipeline.datasets.media import natural_key

SPECIFIC = 0
NEEDS = "videos (or folders of frames) in one folder a class, ROOT/<class>/<video>"
TREE = """\
ROOT/
  walk/a.mp4                  one folder a class
  run/b/                      a folder of frames is a clip too
  run/b/1.jpg
or ROOT/train/walk/a.mp4, ROOT/test/walk/c.mp4
"""
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
_NUMBERED = re.compile(r"(?:split|fold)[ _-]*0*([0-9]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """Positions of the split and of the class in a path: which of its folders name them.

    `top` is a folder that all paths are in, or "" for the root; `split` is None without splits.
    """

    label: int
    split: int | None = None
    top: str = ""
    summary: str = "class folders"


def recognise(root: Path) -> str | None:
    if not root.is_dir():
        return None
    first = next((path for path in clips_below(root) if "/" in path), None)
    return first and f"class folders, such as {first}"


def read(root: Path, split: str | None = None, splits: str = "auto") -> Listing:
    below = sorted(clips_below(root), key=natural_key)
    paths, beside = _without_copies([path for path in below if "/" in path])
    reading, others = _reading(root, paths, split, splits)
    entries = []
    for path in paths:
        if not path.startswith(reading.top):
            continue
        folders = path.split("/")
        name = split_name(folders[reading.split]) if reading.split is not None else ""
        assert name is not None  # `_reading` checked the names
        entries.append(Entry(ListedClip(path, folders[reading.label], name), path))
    videos = sum("/" not in path for path in below)
    notes = (
        f"directly in the root, so without a class, left out: {videos}" if videos else "",
        f"frames beside their own video, left out: {beside}" if beside else "",
        f"of other splits ({', '.join(others)}), left out: {len(paths) - len(entries)}"
        if others
        else "",
        _lone_class(paths) if reading.split is None else "",
    )
    return assemble(root, entries, "class_folders", reading.summary, notes=notes)


def example(root: Path) -> list[str]:
    labels = ['say "hi", twice', " spaced ", "日本 naïve", "it's [50%] *"]
    names = ("same.avi", "10.MP4", "9.mp4", ".hidden.mp4", "notes.txt", "frames/1.jpg")
    write_files(root, {f"{label}/{name}": "" for label in labels for name in names})
    return labels


def split_name(folder: str) -> str | None:
    """Return the split that a folder's name means, `train`, `val` or `test`; None for none.

    >>> [split_name(name) for name in ("Training", "val_set", "Test Set", "trainer", "set")]
    ['train', 'val', 'test', None, None]
    """
    plain = re.sub(r"[ _-]", "", folder.casefold())
    return _SPLIT_OF.get(plain.removesuffix("set"))


def _reading(
    root: Path, paths: list[str], split: str | None, splits: str
) -> tuple[Reading, list[str]]:
    """Return where splits and classes are, and the names of the numbered splits not chosen.

    Raises:
        ValueError: The names could be splits or classes; there is no such numbered split; or
            `splits` is neither auto nor none.
    """
    if splits not in ("auto", "none"):
        raise ValueError(f"splits is {splits!r}; give auto or none")
    folders = [path.split("/")[:-1] for path in paths]
    if splits == "none":
        no_splits(split, "a directory read with --splits none")
        return Reading(0), []
    tops = sorted({parts[0] for parts in folders}, key=natural_key)
    numbers = {match[1]: top for top in tops if (match := _NUMBERED.fullmatch(top))}
    if len(numbers) == len(tops) and all(_are_splits(parts, 1) for parts in folders):
        number = choose_split(numbers, split, "class folders")
        top = numbers[number]
        _check_names(root, [parts for parts in folders if parts[0] == top], 1)
        summary = f"class folders in folders of splits, split {number} of {len(numbers)}"
        return Reading(2, 1, f"{top}/", summary), [name for name in tops if name != top]
    no_splits(split, "class folders")
    within = "class folders in folders of splits"
    if all(_are_splits(parts, 0) for parts in folders):
        _check_names(root, folders, 0)
        return Reading(1, 0, summary=within), []
    if len(tops) == 1 and all(_are_splits(parts, 1) for parts in folders):
        _check_names(root, folders, 1)
        return Reading(2, 1, f"{tops[0]}/", f"{within} in {tops[0]}/"), []
    named = [top for top in tops if split_name(top)]
    if named:
        strange = next(
            (p for p, f in zip(paths, folders, strict=True) if len(f) < 2 and f[0] in named),
            next((f"{top}/" for top in tops if top not in named), ""),
        )
        raise _either(root, f"{', '.join(named)}: {strange} is no class folder of a split")
    inner = [len(parts) > 1 and split_name(parts[1]) is not None for parts in folders]
    if folders and all(inner):
        if any(len(parts) > 2 for parts in folders):
            raise _either(root, f"{tops[0]}/{folders[0][1]}: folders are below it")
        _check_names(root, folders, 1)
        return Reading(0, 1, summary="class folders with folders of splits"), []
    if any(inner):
        path, odd = paths[inner.index(True)], paths[inner.index(False)]
        raise _either(root, f"the second folder of {path}: {odd} is in no such folder")
    return Reading(0), []


def _are_splits(folders: list[str], position: int) -> bool:
    """Return whether the folder at a position is named for a split and a class is below it."""
    return len(folders) > position + 1 and split_name(folders[position]) is not None


def _check_names(root: Path, folders: list[list[str]], position: int) -> None:
    """Refuse two folders beside each other that mean the same split."""
    names: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in folders:
        above = parts[:position]
        names[*above, split_name(parts[position]) or ""].add(parts[position])
    for key, spelled in names.items():
        if len(spelled) > 1:
            raise _either(root, f"{' and '.join(sorted(spelled))}: both mean {key[-1]}")


def _either(root: Path, why: str) -> ValueError:
    return ValueError(
        f"{root} could be split folders or class folders, by {why}. To read each first folder as a "
        "class, add --layout class_folders --splits none; to read splits, use the form "
        "<train, val, test>/<class>/<clip>, or a list with columns path, label, split"
    )


def _without_copies(paths: list[str]) -> tuple[list[str], int]:
    """Return the paths without folders of frames that lie beside the video of their name."""
    videos = {join(path.rpartition("/")[0], stem(path.rpartition("/")[2])): path for path in paths}
    kept = [path for path in paths if videos.get(path, path) == path]
    return kept, len(paths) - len(kept)


def _lone_class(paths: list[str]) -> str:
    """Return a hint where the only class may be a folder around the classes."""
    tops = {path.split("/")[0] for path in paths}
    inner = {path.split("/")[1] for path in paths if path.count("/") > 1}
    if len(tops) > 1 or len(inner) < 2:
        return ""
    return f"if the classes are the folders in {paths[0].split('/')[0]}/, name that directory"
