"""Class index files ("37 HandstandPushups"), and the split lists that come with them."""

import re
from collections.abc import Sequence
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import join, near, scan
from varve.pipeline.datasets.layouts._lists import Entry, assemble, lines, locate
from varve.pipeline.datasets.layouts._values import Listing


def numbered_lists(root: Path, pattern: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Find split lists in the root or in a folder of it, the first that has any.

    Args:
        root: Directory of the dataset.
        pattern: Regular expression for whole file names, without case, with a group `number`.

    Returns:
        The folder ("" for the root) and its lists: names by split number, sorted.
    """
    for folder, files in near(root):
        lists: dict[str, tuple[str, ...]] = {}
        for name in files:
            if match := re.fullmatch(pattern, name, re.IGNORECASE):
                number = match["number"].lstrip("0")
                lists[number] = (*lists.get(number, ()), name)
        if lists:
            return folder, lists
    return "", {}


def class_index(root: Path, folder: str) -> tuple[dict[int, str], str]:
    """Find classInd.txt in a folder of the root, or in the root.

    Returns:
        The classes by number, in the numbers' order, and the file's path; ({}, "") without one.

    Raises:
        ValueError: A line is not a number and a name, or a number or a name occurs twice.
    """
    for parent in dict.fromkeys((folder, "")):
        for name in scan(root / parent)[1]:
            if name.lower() == "classind.txt":
                return _read_index(root / join(parent, name)), join(parent, name)
    return {}, ""


def assemble_indexed(
    root: Path, entries: Sequence[Entry], layout: str, summary: str, classes: list[str], order: str
) -> Listing:
    """Find the clips by name without case, and make the listing as `assemble` does.

    Args:
        classes: The names in the class index; empty for sorted labels.
        order: A note on the order of the classes.
    """
    labels = classes or {entry.clip.label for entry in entries}
    located, missing = locate(root, entries, labels, ignore_case=True)
    return assemble(root, located, layout, summary, classes or None, (order, missing))


def _read_index(path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for where, line in lines(path):
        match = re.fullmatch(r"([0-9]+)\s+(.+)", line)
        if not match:
            raise ValueError(f"{where}: {line!r} is no class; give its number and its name")
        number, name = int(match[1]), match[2]
        if number in names or name in names.values():
            raise ValueError(f"{where}: {line!r} repeats a number or a name; give each class one")
        names[number] = name
    return dict(sorted(names.items()))
