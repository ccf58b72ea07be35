"""Lists of one clip a line, `path label` or `path num_frames label`, as video networks use them.

mmaction2, VideoMAE and SlowFast write them, separated by blanks, tabs, commas or semicolons, with
or without a header. A label is a number or words; a path may have blanks in it. Where the path is a
video's, what follows its extension is the label, or the number of frames and the label. Where it is
a folder of frames, the last two values are numbers: those of its frames and its class.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from varve.pipeline.datasets.containers import VIDEO_SUFFIXES
from varve.pipeline.datasets.layouts._disk import is_video
from varve.pipeline.datasets.layouts._lists import first_rows, lines, regular, rows

_SUFFIXES = "|".join(sorted(re.escape(suffix) for suffix in VIDEO_SUFFIXES))
# A video's path, which may have blanks, then perhaps a number of frames, then the label.
_VIDEO = re.compile(rf"(.+?(?:{_SUFFIXES}))\s+(?:([0-9]+)\s+)?(.+)", re.IGNORECASE)
# The shortest path, so that every number after it is seen: more than two are several labels.
_FOLDER = re.compile(r"(\S.*?)\s+([0-9]+)((?:\s+[0-9]+)+)")
_HEADER = re.compile(
    r"(?:path|video|video_?path|file|file_?path|file_?name|frame_?dir|name)\b", re.I
)
_NUMBERS = re.compile(r"[0-9]+(?:[\s,;]+[0-9]+)+")


@dataclass(frozen=True)
class LineForm:
    """Form of such a list: its delimiter (" " for any blanks), and whether it has a header."""

    delimiter: str
    header: bool


@dataclass(frozen=True)
class Line:
    """One line: the path and the label as written, and whether a number of frames was given."""

    where: str
    path: str
    label: str
    counted: bool


def line_form(path: Path) -> LineForm | None:
    """Return the form of a list whose first lines all fit it; None for any other file."""
    for delimiter in ("\t", ",", ";", " "):
        first = first_rows(path, delimiter, 100) if delimiter != " " else _plain(path)
        if not first:
            continue
        split = [_cells(row, delimiter) for row in first]
        header = split[0] is None and _HEADER.match(first[0][0].strip()) is not None
        body = split[1:] if header else split
        if body and all(cells is not None for cells in body):
            return LineForm(delimiter, header)
    return None


def read_lines(path: Path, form: LineForm) -> Iterator[Line]:
    """Yield every line of a list.

    Raises:
        ValueError: A line has another form, or several labels; the message names the line.
    """
    if form.delimiter == " ":
        table: Iterator[tuple[str, list[str]]] = ((where, [line]) for where, line in lines(path))
    else:
        table = rows(path, form.delimiter)
    if form.header:
        next(table)
    for where, row in table:
        cells = _cells(row, form.delimiter)
        if cells is None:
            raise ValueError(
                f"{where}: {form.delimiter.join(row)!r} is neither `path label` nor "
                "`path num_frames label`; quote a value that holds the delimiter"
            )
        video, counted, label = cells
        if _NUMBERS.fullmatch(label):
            raise ValueError(
                f"{where}: {video} has the labels {label}; a clip has one class, so keep one label"
            )
        yield Line(where, video, label, counted)


def _plain(path: Path) -> list[list[str]]:
    # A byte that no list has as delimiter: rows are whole lines.
    return [[line] for row in first_rows(path, "\x1f", 100) if (line := regular(row[0]))]


def _cells(row: list[str], delimiter: str) -> tuple[str, bool, str] | None:
    """Return (path, whether frames are counted, label) of a line, or None."""
    if delimiter == " ":
        line = regular(row[0])
        if match := _VIDEO.fullmatch(line):
            return match[1], bool(match[2]), match[3]
        if match := _FOLDER.fullmatch(line):
            return match[1], True, match[3].strip()
        return None
    cells = [regular(cell) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    if len(cells) == 2 and is_video(cells[0]):
        return cells[0], False, cells[1]
    if len(cells) >= 3 and re.fullmatch("[0-9]+", cells[1]):
        if is_video(cells[0]) and all(re.fullmatch("[0-9]+", cell) for cell in cells[1:]):
            return cells[0], True, " ".join(cells[2:])
        if len(cells) == 3 and (is_video(cells[0]) or re.fullmatch("[0-9]+", cells[2])):
            return cells[0], True, cells[2]
    return None
