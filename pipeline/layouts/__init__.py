"""Layouts: how a dataset directory says which clips it holds and what they show.

This file is the contract; every other module here is one layout, found by its file name.
A layout module has two functions:

    recognise(root: Path) -> str | None
        One line saying what was seen ("UCF101: 3 split lists and classInd.txt"), or None.
        Cheap: looks at names, opens at most a few small files.
    read(root: Path, split: str | None = None) -> Listing
        Every clip the directory lists, in a stable order. `split` chooses among the dataset's
        official splits ("1" by default where they are numbered).

A layout never opens a video and never joins a label into a path. A clip that a list names and
the disk lacks is listed all the same: the build quarantines it with the reason `missing`.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline._variants import available, variant


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
    """

    clips: tuple[ListedClip, ...]
    classes: tuple[str, ...]
    layout: str
    said: str


def read(root: Path, layout: str = "auto", split: str | None = None) -> Listing:
    """List the clips of the dataset in `root`.

    Args:
        root: The dataset's directory.
        layout: A layout's file name, or `auto` to recognise it.
        split: Which of the dataset's official splits; None for its first.

    Raises:
        FileNotFoundError: `root` is no directory.
        ValueError: No layout, or more than one, recognises it; or the layout finds no clip.
    """
