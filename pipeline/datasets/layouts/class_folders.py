"""Class folders: root/<class>/<clip>, or root/<train, test...>/<class>/<clip>.

The class is the first folder, however deep the clip is below it. A clip is a video file, or a
folder of JPEG or PNG frames without videos. The first folders are splits, and the second ones
classes, where all first folders have names of splits and every clip is deep enough.
"""

from pathlib import Path

from varve.pipeline.datasets.layouts._disk import clips_below, write_files
from varve.pipeline.datasets.layouts._lists import Entry, assemble, no_splits
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
SPLITS = frozenset({"train", "test", "val", "valid", "validation"})


def recognise(root: Path) -> str | None:
    if not root.is_dir():
        return None
    first = next((path for path in clips_below(root) if "/" in path), None)
    return first and f"class folders, such as {first}"


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "class folders")
    below = sorted(clips_below(root), key=natural_key)
    paths = [path for path in below if "/" in path]
    splits = _are_splits(root, paths)
    entries = []
    for path in paths:
        top, second, *_ = path.split("/")
        clip = ListedClip(path, second, top) if splits else ListedClip(path, top)
        entries.append(Entry(clip, path))
    videos = len(below) - len(paths)
    summary = "class folders in folders of splits" if splits else "class folders"
    outside = f"directly in the root, so without a class, left out: {videos}" if videos else ""
    notes = (outside, _lone_class(root, paths, splits))
    return assemble(root, entries, "class_folders", summary, notes=notes)


def example(root: Path) -> list[str]:
    labels = ['say "hi", twice', " spaced ", "日本 naïve", "it's [50%] *"]
    names = ("same.avi", "10.MP4", "9.mp4", ".hidden.mp4", "notes.txt", "frames/1.jpg")
    write_files(root, {f"{label}/{name}": "" for label in labels for name in names})
    return labels


def _are_splits(root: Path, paths: list[str]) -> bool:
    tops = {path.split("/")[0] for path in paths}
    named = sorted(top for top in tops if top.lower() in SPLITS)
    shallow = [path for path in paths if path.count("/") < 2 and path.split("/")[0] in named]
    if len(named) == len(tops) and not shallow:
        return True
    if len(named) < 2:
        return False
    strange = shallow[0] if shallow else f"{min(tops - set(named))}/"
    raise ValueError(
        f"{root}: {', '.join(named)} look like splits, of which each holds a folder a class, but "
        f"{strange} does not fit; move it, or write a list with columns path, label, split"
    )


def _lone_class(root: Path, paths: list[str], splits: bool) -> str:
    """Return a hint where the only class may be a folder around the classes."""
    tops = {path.split("/")[0] for path in paths}
    inner = {path.split("/")[1] for path in paths if path.count("/") > 1}
    if splits or len(tops) > 1 or len(inner) < 2:
        return ""
    return f"if the classes are the folders in {paths[0].split('/')[0]}/, name that directory"
