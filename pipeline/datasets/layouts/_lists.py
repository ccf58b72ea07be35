"""Reading of list files: lines and rows with their positions, paths, splits, duplicates.

What every list goes through, whatever its form:

- Blanks, and marks without a width, around a path, a label or a split are no part of it. A path
  keeps them where a file of exactly that name exists. Labels that differ in case or in Unicode form
  alone stay different, and the summary names them.
- Labels that are all whole numbers are ordered by value, others by their code points.
- A repeated clip is taken once. Of a clip in two splits the first counts. Both are counted in the
  summary. A clip with two labels is an error that names both positions.
"""

import csv
import io
import itertools
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from varve.pipeline.datasets.layouts._disk import ClipFinder, folder_key
from varve.pipeline.datasets.layouts._values import ListedClip, Listing
from varve.pipeline.datasets.media import natural_key

# Marks without a width that spreadsheets and web pages leave beside a value; str.strip keeps them.
_MARKS = "\ufeff\u200b\u2060"
# The words by which lists and folders name the three usual splits.
SPLIT_WORDS = {
    "train": ("train", "training", "trainset", "train_set"),
    "val": ("val", "valid", "validation", "validate", "valset", "val_set"),
    "test": ("test", "testing", "testset", "test_set"),
}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}


@dataclass(frozen=True)
class Entry:
    """One clip, and the position in a list that names it ("testlist01.txt line 7")."""

    clip: ListedClip
    where: str


def regular(value: str) -> str:
    """Return a value of a list without the blanks and marks around it.

    >>> regular("\\ufeff walk\\u00a0 ")
    'walk'
    """
    while (stripped := value.strip().strip(_MARKS)) != value:
        value = stripped
    return value


def split_name(word: str) -> str:
    """Return `train`, `val` or `test` for a word that means one of them; others unchanged.

    >>> split_name("Training"), split_name("validate"), split_name("gap")
    ('train', 'val', 'gap')
    """
    return _SPLIT_OF.get(word.casefold(), word)


def label_order(labels: Iterable[str]) -> list[str]:
    """Return different labels in order: whole numbers by value, others by their code points.

    >>> label_order(["10", "9", "011"]), label_order(["10", "9", "b"])
    (['9', '10', '011'], ['10', '9', 'b'])
    """
    known = set(labels)
    if known and all(re.fullmatch("-?[0-9]{1,18}", label) for label in known):
        return sorted(known, key=lambda label: (int(label), label))
    return sorted(known)


def text(path: Path) -> str:
    """Return the text of a list file: UTF-8, or UTF-16 with its mark, as spreadsheets write it.

    Raises:
        ValueError: The encoding is another one; the message names the line.
    """
    data = path.read_bytes()
    try:
        return data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not UTF-8; save the list as UTF-8") from None


def _encoding(data: bytes) -> str:
    return "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (position, stripped line) of every line that is not blank."""
    # Not splitlines(): it also breaks at characters that a file name may hold.
    for number, line in enumerate(io.StringIO(text(path), newline=None), 1):
        if line.strip():
            yield f"{path.name} line {number}", line.strip()


def rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (position, cells) of every row of a CSV file that is not blank.

    Raises:
        ValueError: The text is no correct CSV (a quote left open); the message names the line.
    """
    reader = csv.reader(io.StringIO(text(path), newline=""), delimiter=delimiter, strict=True)
    while True:
        where = f"{path.name} line {reader.line_num + 1}"  # line_num is where a row ends
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{where}: {error}; a quote inside a quoted value is written twice"
            ) from None
        if any(cells):
            yield where, cells


def first_rows(path: Path, delimiter: str, count: int = 1) -> list[list[str]]:
    """Return the first rows that are not blank, to recognise a file: wrong bytes are ignored."""
    with path.open("rb") as file:
        encoding = _encoding(file.read(2))
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        try:
            reader = csv.reader(file, delimiter=delimiter)
            return list(itertools.islice((row for row in reader if any(row)), count))
        except csv.Error:
            return []


def inside(root: Path, path: str, where: str) -> str:
    """Return the path in a list relative to `root`, with forward slashes.

    Backslashes are read as slashes, and blanks around the path are removed, unless a file of
    exactly that name exists. `.` and `..` are resolved by name. An absolute path is accepted if it
    is in `root`, or if a file has that path below `root` (`/train/a.mp4` for ROOT/train/a.mp4).

    Raises:
        ValueError: The path is empty, or leaves the root.
    """
    if not path.strip() or "\0" in path:
        raise ValueError(f"{where}: {path!r} is no path; give each clip's video file")
    if not os.path.lexists(root / path):
        path = regular(path)
    if "\\" in path and not os.path.lexists(root / path):
        path = path.replace("\\", "/")
    relative = os.path.normpath(path)
    below = os.path.normpath(path.lstrip("/"))
    if path.startswith("/") and not _leaves(below) and os.path.lexists(root / below):
        relative = below
    elif os.path.isabs(path) or re.match("[A-Za-z]:/", path):
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        ways = (os.path.relpath(path, root), os.path.relpath(real, os.path.realpath(root)))
        relative = min(ways, key=_leaves)
    if _leaves(relative):
        raise ValueError(
            f"{where}: {path!r} is not inside {os.path.abspath(root)}; give paths relative to that "
            "directory, or name a directory that holds all the videos"
        )
    return relative.replace(os.sep, "/")


def _leaves(relative: str) -> bool:
    return relative == os.curdir or relative.split(os.sep)[0] == os.pardir


def seconds(cell: str, where: str, advice: str = "") -> float:
    """Return the time in a cell.

    Raises:
        ValueError: It is no time; the message ends in `advice`.
    """
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: {cell!r} is no time in seconds{advice}")
    return value


def choose_split(numbers: Collection[str], split: str | None, of: str) -> str:
    """Return the requested one of the numbered splits, or the first.

    Raises:
        ValueError: There is no such split; the message lists those found.
    """
    known = sorted(numbers, key=natural_key)
    if split is None:
        return known[0]
    if split not in known:
        raise ValueError(f"{of} has no split {split!r}; found {', '.join(known)}")
    return split


def no_splits(split: str | None, of: str) -> None:
    """Refuse a split of a dataset that has no numbered ones.

    Raises:
        ValueError: A split was requested.
    """
    if split is not None:
        raise ValueError(
            f"{of} has no numbered splits, split {split!r} was asked for; leave it out"
        )


def locate(
    root: Path, entries: Sequence[Entry], classes: Collection[str], ignore_case: bool = False
) -> tuple[list[Entry], str]:
    """Return the entries with the paths of their clips on the disk, and a note on missing ones.

    A missing clip keeps its listed path, below the folder under which most of the others are
    ("UCF-101/").
    """
    finder = ClipFinder(root, (_name(entry.clip.path) for entry in entries), ignore_case)
    keys = {folder_key(name) for name in classes}
    paths = [
        finder.find(_name(entry.clip.path), (entry.clip.label, entry.clip.split), keys)
        for entry in entries
    ]
    pairs = [(path, "/" + entry.clip.path) for path, entry in zip(paths, entries, strict=True)]
    tops = [f"/{path}".removesuffix(end) for path, end in pairs if f"/{path}".endswith(end)]
    top = Counter(tops).most_common(1)[0][0] if tops else ""
    located = [
        replace(entry, clip=replace(entry.clip, path=path or (top + end).removeprefix("/")))
        for (path, end), entry in zip(pairs, entries, strict=True)
    ]
    missing = sum(path is None for path in paths)
    return located, f"listed but not on the disk: {missing}" if missing else ""


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def assemble(
    root: Path,
    entries: Iterable[Entry],
    layout: str,
    summary: str,
    classes: Sequence[str] | None = None,
    notes: Iterable[str] = (),
) -> Listing:
    """Make the listing, without clips that have no label, and with repeated ones once.

    Args:
        root: Directory that paths are relative to.
        entries: The clips, in their final order.
        layout: Name of the layout.
        summary: What the layout read; counts and notes are added.
        classes: Classes in the dataset's order; None for the labels in `label_order`.
        notes: Further notes for a person; empty ones are dropped.

    Raises:
        ValueError: A clip has two labels, a label is none of `classes`, `classes` has a name
            twice, or no clip is left.
    """
    kept: dict[tuple[str, float | None, float | None], Entry] = {}
    unlabelled = repeated = astride = 0
    for listed in entries:
        label, split = regular(listed.clip.label), regular(listed.clip.split)
        entry = replace(listed, clip=replace(listed.clip, label=label, split=split))
        clip = entry.clip
        if not clip.label:
            unlabelled += 1
            continue
        _check_unicode(entry)
        key = (clip.path, clip.start_seconds, clip.end_seconds)
        first = kept.setdefault(key, entry)
        repeated += first is not entry
        astride += first.clip.split != clip.split
        if first.clip.label != clip.label:
            raise ValueError(
                f"{clip.path} has two labels: {first.clip.label!r} ({first.where}) and "
                f"{clip.label!r} ({entry.where}); keep one of them"
            )
    clips = tuple(entry.clip for entry in kept.values())
    if not clips:
        raise ValueError(f"{root}: {summary}: no clip with a label")
    classes = None if classes is None else [regular(name) for name in classes]
    known = set(classes or ())
    if len(known) < len(classes or ()):
        twice = next(name for name, n in Counter(classes).items() if n > 1)
        raise ValueError(f"{root}: {summary}: the class index has {twice!r} twice; name it once")
    for entry in kept.values() if classes is not None else ():
        if entry.clip.label not in known:
            raise ValueError(
                f"{entry.where}: the label {entry.clip.label!r} is none of the class index's "
                f"{len(known)} classes; add it there"
            )
    labels = {clip.label for clip in clips}
    order = tuple(classes) if classes is not None else tuple(label_order(labels))
    counts = Counter(clip.split for clip in clips)
    by_split = ", ".join(f"{n} {split or 'in no split'}" for split, n in counts.items())
    notes = [
        *notes,
        f"without a label, left out: {unlabelled}" if unlabelled else "",
        f"repeated entries, taken once: {repeated}" if repeated else "",
        f"in two splits, of which the first counts: {astride}" if astride else "",
        _alike("labels", labels),
        _alike("splits", {clip.split for clip in clips}),
    ]
    counted = f"{len(clips)} clips" + (f" ({by_split})" if any(counts) else "")
    parts = [f"{summary}: {counted}, {len(order)} classes", *filter(None, notes)]
    return Listing(clips, order, layout, "; ".join(parts), root)


def _alike(what: str, names: Iterable[str]) -> str:
    """Return a warning of names that differ in case or in Unicode form alone; "" for none."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        folded = unicodedata.normalize("NFC", name).casefold()
        groups[unicodedata.normalize("NFC", folded)].append(name)
    alike = [", ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if not alike:
        return ""
    shown = " and ".join(alike[:3]) + f" and {len(alike) - 3} more" * (len(alike) > 3)
    return f"DIFFERENT {what} that differ in case or Unicode form alone: {shown}"


def _check_unicode(entry: Entry) -> None:
    """Refuse a name in another encoding, which cannot be written to a table."""
    for value in (entry.clip.path, entry.clip.label, entry.clip.split):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{entry.where}: {value!r} is not Unicode; rename it") from None
