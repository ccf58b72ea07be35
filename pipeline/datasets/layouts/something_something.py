"""Something-Something, version 2 (JSON lists, .webm files) and version 1 (CSV, folders of frames).

v2: `something-something-v2-train.json` and similar (or plain `train.json`), whose entries have an
`id` and a `template`; the class is the template without its square brackets, and the file that
labels it (`...-labels.json`) gives the order of the classes. v1: `something-something-v1-train.csv`
with lines `id;label`, and `...-labels.csv` with one label a line. Clips are found by their id:
`<id>.webm`, or the folder `<id>/` of frames. Those without a label, the test lists', are left out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from varve.pipeline.datasets.layouts._disk import AWKWARD, join, near, write_files
from varve.pipeline.datasets.layouts._lists import Entry, assemble, locate, no_splits, rows, text
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 2
NEEDS = (
    "something-something-v2-train.json (or train.json whose entries have a template), or "
    "something-something-v1-train.csv, in it or in a folder such as labels/"
)
TREE = """\
ROOT/
  labels/                     something-something-v2-{train,validation,labels}.json
  20bn-something-something-v2/1.webm
"""
LISTS = re.compile(
    r"(?:something-something-v2-)?(?P<v2>train|validation|test|labels)\.json"
    r"|something-something-v1-(?P<v1>train|validation|test|labels)\.csv"
)
KINDS = ("train", "validation", "test")


def recognise(root: Path) -> str | None:
    version, folder, lists = _lists(root)
    if not lists:
        return None
    return f"Something-Something {version}: {len(lists)} lists in {folder or '.'}/"


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "Something-Something")
    version, folder, lists = _lists(root)
    entries_of, labels_of = (
        (_json_entries, _json_labels) if version == "v2" else (_csv_entries, _csv_labels)
    )
    paths = {kind: root / join(folder, name) for kind, name in lists.items()}
    entries = [entry for kind in KINDS if kind in paths for entry in entries_of(paths[kind], kind)]
    classes = labels_of(paths["labels"]) if "labels" in paths else None
    # Clips without a label are left out, and need no search on the disk.
    located, missing = locate(root, [entry for entry in entries if entry.clip.label], ())
    unlabelled = [entry for entry in entries if not entry.clip.label]
    order = f"class order from {lists['labels']}" if classes else "classes in sorted order"
    summary = f"Something-Something {version}, lists in {folder or '.'}/"
    return assemble(
        root, located + unlabelled, "something_something", summary, classes, (order, missing)
    )


def example(root: Path) -> list[str]:
    lists = "labels/something-something-v2-"
    files = {f"{lists}labels.json": json.dumps({name: str(i) for i, name in enumerate(AWKWARD)})}
    for kind, first in (("train", 100), ("validation", 200)):
        items = [
            {"id": str(first + i), "label": "x", "template": f"{label[:1]}[{label[1:]}]"}
            for i, label in enumerate(AWKWARD)
        ]
        files[f"{lists}{kind}.json"] = json.dumps(items)
        files |= {f"20bn-something-something-v2/{item['id']}.webm": "" for item in items}
    write_files(root, files)
    return AWKWARD


def _lists(root: Path) -> tuple[str, str, dict[str, str]]:
    """Return (version, folder, names by kind) of the first folder with a train or val list."""
    for folder, files in near(root):
        versions: dict[str, dict[str, str]] = {"v2": {}, "v1": {}}
        for name in files:
            if match := LISTS.fullmatch(name):
                version = "v2" if match["v2"] else "v1"
                known = versions[version].get(match[version], "")
                # The full name is preferred: any project may have a train.json.
                versions[version][match[version]] = max(name, known, key=len)
        for version, lists in versions.items():
            first = lists.get("train") or lists.get("validation")
            if first and (version == "v1" or _has_templates(root / join(folder, first))):
                return version, folder, lists
    return "", "", {}


def _has_templates(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"template"' in file.read(4096)


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _json_entries(path: Path, split: str) -> Iterator[Entry]:
    for i, item in enumerate(_json(path, list), 1):
        where = f"{path.name} entry {i}"
        if not isinstance(item, dict) or not isinstance(item.get("template", ""), str):
            raise ValueError(f"{where}: {item!r} is no clip; give id, label, template")
        label = re.sub(r"[\[\]]", "", item.get("template", ""))
        yield _entry(str(item.get("id", "")), ".webm", label, split, where)


def _json_labels(path: Path) -> list[str]:
    labels = _json(path, dict)
    try:
        numbers = {int(number): re.sub(r"[\[\]]", "", name) for name, number in labels.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{path.name}: every label needs its number: {{label: number}}") from None
    if len(numbers) < len(labels):
        raise ValueError(f"{path.name}: {len(labels)} labels have {len(numbers)} numbers")
    return [numbers[number] for number in sorted(numbers)]


def _csv_entries(path: Path, split: str) -> Iterator[Entry]:
    for where, cells in rows(path, ";"):
        if len(cells) > 2:
            raise ValueError(f"{where}: {len(cells)} values, not id;label")
        yield _entry(cells[0], "", cells[1] if len(cells) > 1 else "", split, where)


def _csv_labels(path: Path) -> list[str]:
    return [cells[0] for _, cells in rows(path, ";")]


def _entry(name: str, suffix: str, label: str, split: str, where: str) -> Entry:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{where}: {name!r} is no clip's id")
    return Entry(ListedClip(name + suffix, label, split), where)
