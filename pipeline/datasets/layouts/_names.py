"""Names of classes that lists give as numbers: a file of names beside the list."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import scan, suffix
from varve.pipeline.datasets.layouts._lists import Entry, first_rows, lines, regular, rows, text

NAMES = re.compile(
    r"(?:.*[_-])?(?:label_?map|labels?|label_?names|class_?names|class_?list|class_?ind(?:ex)?"
    r"|classes|categories)(?:[_-].*)?\.(?:txt|csv|tsv|json|names)",
    re.IGNORECASE,
)
_WHOLE = re.compile(r"[0-9]{1,9}")


def is_names_file(name: str) -> bool:
    """Return whether a file's name is that of a list of class names.

    >>> is_names_file("label_map_k400.txt"), is_names_file("train_labels.csv")
    (True, True)
    """
    return NAMES.fullmatch(name) is not None


def named(
    folders: Sequence[Path], entries: Sequence[Entry], used: Iterable[str] = ()
) -> tuple[list[Entry], list[str] | None, str]:
    """Give entries whose labels are whole numbers the names from a file beside the list.

    The file has one name a line (the first is class 0), or a number and a name a line in either
    order, or is a JSON list, {name: number} or {number: name}. Numbers that begin with 1 are
    counted from 0 where the list has a class 0 and lacks the last, as with UCF101's classInd.txt
    beside mmaction2's lists.

    Args:
        folders: Where to look, the first that has such a file.
        entries: The clips.
        used: Names of files that are lists of clips, and so are no names.

    Returns:
        The entries, the classes in the order of their numbers (None where nothing was named), and
        a note on what was done ("" where labels are words).

    Raises:
        ValueError: Two files differ, a line has no name, or a number in the list has none.
    """
    numbers = {regular(entry.clip.label) for entry in entries} - {""}
    if not numbers or not all(map(_WHOLE.fullmatch, numbers)):
        return list(entries), None, ""
    for folder in folders:
        skipped = set(used)
        files = [folder / n for n in scan(folder)[1] if is_names_file(n) and n not in skipped]
        known = {file: names for file in files if (names := _read(file))}
        if not known:
            continue
        file, names = next(iter(known.items()))
        if different := [other.name for other, others in known.items() if others != names]:
            raise ValueError(
                f"{folder}: {file.name} and {different[0]} give different names to the classes; "
                "keep the right file"
            )
        values = {int(number) for number in numbers}
        shifted = min(names) == 1 and 0 in values and max(values) < max(names)
        if shifted:
            names = {number - 1: name for number, name in names.items()}
        if lacking := sorted(values - names.keys()):
            first = next(e for e in entries if int(regular(e.clip.label) or -1) == lacking[0])
            raise ValueError(
                f"{first.where}: class {lacking[0]} has no name in {file.name}, which has "
                f"{min(names)} to {max(names)}; add it there, or move that file away to use numbers"
            )
        renamed = [
            replace(entry, clip=replace(entry.clip, label=names[int(regular(entry.clip.label))]))
            if regular(entry.clip.label)
            else entry
            for entry in entries
        ]
        counted = ", whose numbers begin with 1 and the list's with 0" if shifted else ""
        note = f"names of classes from {file.name}{counted}"
        return renamed, [names[number] for number in sorted(names)], note
    return list(entries), None, "labels are numbers, no file of names beside the list"


def _read(path: Path) -> dict[int, str]:
    """Return the names by number; {} for a file that is no list of names."""
    if suffix(path.name) == ".json":
        return _of_json(path)
    if suffix(path.name) in (".csv", ".tsv"):
        delimiter = "\t" if suffix(path.name) == ".tsv" else ","
        if any(len(row) > 2 for row in first_rows(path, delimiter, 20)):
            return {}  # a list of clips, or something else with columns
        cells = [[regular(cell) for cell in row] for _, row in rows(path, delimiter)]
        whole = [" ".join(row) for row in cells]
        if cells and cells[0][0].casefold() in ("label", "name", "class"):
            whole = whole[1:]
    else:
        whole = [regular(line) for _, line in lines(path)]
        cells = [_cells(line) for line in whole]
    if len(cells) > 1 and all(len(row) == 2 for row in cells[1:]):
        body = cells if any(map(_WHOLE.fullmatch, cells[0])) else cells[1:]  # without a header
        for number, name in ((0, 1), (1, 0)):
            if all(_WHOLE.fullmatch(row[number]) for row in body):
                pairs = {int(row[number]): row[name] for row in body}
                return _checked(path, pairs, len(body))
    return _checked(path, dict(enumerate(whole)), len(whole))


def _cells(line: str) -> list[str]:
    """Return (number, name) or (name, number) of a line of text, or the line."""
    if match := re.fullmatch(r"([0-9]{1,9})[\s,;:]+(.+)", line):
        return [match[1], regular(match[2])]
    if match := re.fullmatch(r"(.+?)[\t,;]\s*([0-9]{1,9})", line):
        return [regular(match[1]), match[2]]
    return [regular(line)]


def _of_json(path: Path) -> dict[int, str]:
    try:
        value = json.loads(text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {error.lineno} is not JSON: {error.msg}") from None
    pairs: list[tuple[object, object]] = []
    if isinstance(value, list):
        pairs = list(enumerate(value))
    elif isinstance(value, dict):
        by_number = all(_WHOLE.fullmatch(key) for key in value)
        pairs = [(k, v) if by_number else (v, k) for k, v in value.items()]
    if not all(_WHOLE.fullmatch(str(k)) and isinstance(v, str) for k, v in pairs):
        return {}
    return _checked(path, {int(str(k)): regular(str(v)) for k, v in pairs}, len(pairs))


def _checked(path: Path, names: dict[int, str], count: int) -> dict[int, str]:
    if len(names) < count or len(set(names.values())) < count:
        raise ValueError(
            f"{path.name}: {count} classes have {len(names)} numbers and "
            f"{len(set(names.values()))} names; give each class one of each"
        )
    return names
