"""Layouts: which clips a dataset directory has, and which class each shows.

This file is the contract; every other module here is one layout, found by its file name. A layout
of your own is a function `read`, or a class, with the decorator `register("layouts", NAME)`. A
module, or a class, has a function

    read(root: Path, split: str | None = None) -> Listing
        Return every clip that the directory lists, in a stable order. `split` chooses among the
        dataset's official splits ("1" by default where they are numbered). A third argument,
        `splits: str = "auto"`, is for a layout that reads splits out of names: "none" reads none.

and, for `--layout auto` to find it (a function alone is read by its name only):

    SPECIFIC: int
        Which layout `auto` prefers where several recognise a directory: 2 for a published
        dataset's own lists, 1 for a plain list, 0 for names of files and folders alone.
    NEEDS: str
        What a directory must have to be read so, to end the sentence "it needs ...".
    TREE: str
        A picture of the directory, ROOT/ and what it holds, which `varve datasets` prints. A layout
        of your own may leave it out.
    recognise(root: Path) -> str | None
        Return one line of what was recognised ("UCF101: 3 split lists and classInd.txt"), or None.
        Cheap: looks at names, opens at most a few small files.

and, for the contract suite (`python -m varve.contracts --layout FILE`):

    example(root: Path) -> list[str]
        Write a small dataset of this form, with empty files as videos, below `root`, which does
        not exist yet. Return its labels, as awkward as the form allows.

A layout never opens a video and never makes a path from a label. Only of a file whose name does not
show what it is, the first bytes are read (`clips_below`, and `read` for its counts). A clip that a
list names and the disk lacks is listed all the same: the build quarantines it with the reason
`missing`. Links are followed, and a loop of them ends: `clips_below` walks a directory so. A split
that there is not is a ValueError ("... has no split '7'; found 1, 2"). What is no clip is counted
by `read` in the listing's summary and in `left_out`.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from varve.pipeline.datasets.layouts._disk import clips_below, describe, left_out
from varve.pipeline.datasets.layouts._values import ListedClip, Listing
from varve.pipeline.registry import available, variant

# Files that may be given as a data set: lists of clips.
LIST_SUFFIXES = (".csv", ".json", ".jsonl", ".list", ".lst", ".tsv", ".txt")

__all__ = ["Layout", "ListedClip", "Listing", "clips_below", "find", "read"]


@dataclass(frozen=True)
class Layout:
    """One layout, whether it is a module, a class or a function; see the contract above."""

    read: Callable[..., Listing]
    recognise: Callable[[Path], str | None] | None
    specific: int
    needs: str
    example: Callable[[Path], list[str]] | None
    tree: str = ""


def find(name: str) -> Layout:
    """Return the layout of a name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    module: Any = variant("layouts", name)
    module = module() if isinstance(module, type) else module
    return Layout(
        getattr(module, "read", module),
        getattr(module, "recognise", None),
        getattr(module, "SPECIFIC", 0),
        getattr(module, "NEEDS", ""),
        getattr(module, "example", None),
        getattr(module, "TREE", ""),
    )


def read(
    root: Path, layout: str = "auto", split: str | None = None, splits: str = "auto"
) -> Listing:
    """List the clips of the dataset in `root`.

    Args:
        root: Directory of the dataset, or a CSV or TSV list of clips (layout `table`).
        layout: Name of a layout, or `auto` for the most specific one that recognises `root`.
        split: Which of the dataset's official splits; None for its first.
        splits: `none` to read folders named after splits (train/, test/) as classes.

    Raises:
        FileNotFoundError: There is no `root`.
        NotADirectoryError: `root` is a file and no list.
        ValueError: No layout recognises it, or two equally specific ones do; it has no such
            split; its lists are wrong or name no clip; or the layout takes no `splits`.
    """
    root = Path(root)
    check_root(root)
    names = available("layouts") if layout == "auto" else [layout]
    layouts = {name: find(name) for name in names}
    if layout != "auto" and layouts[layout].recognise is None:
        return _listing(root, layout, layouts[layout], split, splits)
    lines = {
        name: line
        for name, candidate in layouts.items()
        if candidate.recognise and (line := candidate.recognise(root)) is not None
    }
    if not lines:
        needs = [f"  {n} needs {known.needs}" for n, known in layouts.items() if known.recognise]
        problem = "no layout fits" if layout == "auto" else f"layout {layout!r} does not fit"
        raise ValueError(f"{problem} {root}: it holds {describe(root)}.\n" + "\n".join(needs))
    name = _most_specific(root, lines, layouts)
    listing = _listing(root, name, layouts[name], split, splits)
    others = [f"--layout {other} ({line})" for other, line in lines.items() if other != name]
    if not others:
        return listing
    summary = f"{listing.summary}. It could also be read with {' or '.join(others)}"
    return replace(listing, summary=summary)


def _listing(root: Path, name: str, layout: Layout, split: str | None, splits: str) -> Listing:
    """Return the listing of a layout with what it leaves out, in its field and its summary."""
    options = {} if splits == "auto" else {"splits": splits}
    if options and "splits" not in inspect.signature(layout.read).parameters:
        raise ValueError(
            f"layout {name!r} reads its splits from lists, splits {splits!r} was asked for; leave "
            "it out, or name a layout that reads folders (--layout class_folders)"
        )
    listing = layout.read(root, split, **options)
    if not root.is_dir():
        return listing
    paths = {clip.path for clip in listing.clips}
    counts = Counter(dict(listing.left_out))
    counts.update(dict(left_out(listing.root, paths, lists=layout.specific > 0)))
    if not counts:
        return listing
    ordered = tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    text = ", ".join(f"{count} {kind}" for kind, count in ordered)
    return replace(listing, summary=f"{listing.summary}; left out: {text}", left_out=ordered)


def check_root(root: Path) -> None:
    """Check that there is a directory, or a list of clips, that a layout could read.

    Raises:
        FileNotFoundError: There is no `root`.
        NotADirectoryError: `root` is a file and no list.
    """
    if not root.exists():
        raise FileNotFoundError(f"no dataset at {root}: no such directory")
    if not root.is_dir() and root.suffix.lower() not in LIST_SUFFIXES:
        raise NotADirectoryError(
            f"{root} is a file; name the directory that holds the videos, or a list of clips "
            f"({', '.join(LIST_SUFFIXES)})"
        )


def _most_specific(root: Path, lines: Mapping[str, str], layouts: Mapping[str, Layout]) -> str:
    best = max(layouts[name].specific for name in lines)
    names = [name for name in lines if layouts[name].specific == best]
    if len(names) > 1:
        choices = "\n".join(f"  --layout {name}: {lines[name]}" for name in names)
        raise ValueError(f"{root} can be read in {len(names)} ways; choose one:\n{choices}")
    return names[0]
