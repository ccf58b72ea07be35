"""Layouts: how a dataset directory says which clips it holds and what they show.

This file is the contract; every other module here is one layout, found by its file name.
A layout module has two constants and two functions:

    SPECIFIC: int
        Which layout `auto` prefers where several recognise a directory: 2 for a published
        dataset's own lists, 1 for a plain list, 0 for folder names alone.
    NEEDS: str
        What a directory must hold to be read so, to end the sentence "it needs ...".
    recognise(root: Path) -> str | None
        One line saying what was seen ("UCF101: 3 split lists and classInd.txt"), or None.
        Cheap: looks at names, opens at most a few small files.
    read(root: Path, split: str | None = None) -> Listing
        Every clip the directory lists, in a stable order. `split` chooses among the dataset's
        official splits ("1" by default where they are numbered).

A layout never opens a video and never joins a label into a path. A clip that a list names and
the disk lacks is listed all the same: the build quarantines it with the reason `missing`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from varve.pipeline.datasets.layouts._disk import LIST_SUFFIXES, describe
from varve.pipeline.registry import available, variant


@dataclass(frozen=True)
class ListedClip:
    """One clip as the dataset lists it.

    `path` is relative to the dataset directory, with forward slashes, and names a video file or a
    folder of frames. `label` and `split` are data, whatever characters they hold.
    """

    path: str
    label: str
    split: str = ""
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class Listing:
    """All clips of a dataset, in a stable order.

    `classes` is the dataset's own order of its labels (a class index file, else sorted): class
    orders of published scenarios are permutations of it. `said` tells a person what was taken.
    `root` is the directory that paths are relative to: the dataset's, or a list file's own.
    """

    clips: tuple[ListedClip, ...]
    classes: tuple[str, ...]
    layout: str
    said: str
    root: Path


def read(root: Path, layout: str = "auto", split: str | None = None) -> Listing:
    """List the clips of the dataset in `root`.

    Args:
        root: The dataset's directory, or a CSV or TSV list of clips (layout `table`).
        layout: A layout's file name, or `auto` to recognise it: the most specific that does.
        split: Which of the dataset's official splits; None for its first.

    Raises:
        FileNotFoundError: There is no `root`.
        NotADirectoryError: `root` is a file and no list.
        ValueError: No layout recognises it, or two equally specific ones do; it has no such
            split; or its lists are wrong or name no clip.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"no dataset at {root}: no such directory")
    if not root.is_dir() and root.suffix.lower() not in LIST_SUFFIXES:
        raise NotADirectoryError(
            f"{root} is a file; name the directory that holds the videos, or a list of clips "
            f"({', '.join(sorted(LIST_SUFFIXES))})"
        )
    names = available("layouts") if layout == "auto" else [layout]
    modules = {name: variant("layouts", name) for name in names}
    seen = {name: line for name in names if (line := modules[name].recognise(root)) is not None}
    if not seen:
        needs = "\n".join(f"  {name} needs {modules[name].NEEDS}" for name in names)
        asked = "no layout fits" if layout == "auto" else f"layout {layout!r} does not fit"
        raise ValueError(f"{asked} {root}: it holds {describe(root)}.\n{needs}")
    name = _most_specific(root, seen, modules)
    listing: Listing = modules[name].read(root, split)
    others = [f"--layout {other} ({line})" for other, line in seen.items() if other != name]
    if not others:
        return listing
    said = f"{listing.said}. It could also be read with {' or '.join(others)}"
    return replace(listing, said=said)


def _most_specific(root: Path, seen: Mapping[str, str], modules: Mapping[str, ModuleType]) -> str:
    ranks = {name: modules[name].SPECIFIC for name in seen}
    best = [name for name, rank in ranks.items() if rank == max(ranks.values())]
    if len(best) > 1:
        lines = "\n".join(f"  --layout {name}: {seen[name]}" for name in best)
        raise ValueError(f"{root} can be read in {len(best)} ways; choose one:\n{lines}")
    return best[0]
