"""ActivityNet's JSON, also THUMOS's and HACS's in its form: segments of untrimmed videos.

`{"database": {ID: {"subset": ..., "annotations": [{"label": ..., "segment": [start, end]}]}}}`.
Each segment is a clip, from start to end in seconds. The subset is its split: training is `train`,
validation `val`, testing `test`. The video is `v_<ID>` or `<ID>` with any extension, or a folder of
frames of that name, anywhere below the root. Segments without a length and videos without
annotations (the test subset's) are left out and counted.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from varve.pipeline.datasets.layouts._disk import (
    AWKWARD,
    ClipFinder,
    join,
    near,
    suffix,
    write_files,
)
from varve.pipeline.datasets.layouts._lists import (
    Entry,
    assemble,
    no_splits,
    seconds,
    split_name,
    text,
)
from varve.pipeline.datasets.layouts._values import ListedClip, Listing

SPECIFIC = 2
NEEDS = 'a JSON file with a "database" of videos, each with a subset and annotations'
TREE = """\
ROOT/
  activity_net.v1-3.min.json  {"database": {"sJ": {"subset": "training",
                                "annotations": [{"label": "Polo", "segment": [1.5, 9]}]}}}
  videos/v_sJ.mp4
"""


def recognise(root: Path) -> str | None:
    files = _files(root)
    return f"ActivityNet: segments in {', '.join(files)}" if files else None


def read(root: Path, split: str | None = None) -> Listing:
    no_splits(split, "ActivityNet")
    base = root.parent if root.is_file() else root
    files = _files(root)
    if len(files) > 1:
        raise ValueError(
            f"{base} has {len(files)} files of segments: {', '.join(files)}; name the one to read "
            f"instead of the directory, such as {base / files[0]}"
        )
    videos = _database(base / files[0])
    finder = ClipFinder(base, (name for key in videos for name in _names(key)))
    entries, lacking, unlabelled, empty = [], set(), 0, 0
    for key, video in videos.items():
        where = f"{files[0]} video {key}"
        if not key or set("/\\\0") & set(key):
            raise ValueError(f"{where}: {key!r} is no video's id")
        name = split_name(str(video.get("subset", "")).strip())
        file = next((path for n in _names(key) if (path := finder.find(n, (name,)))), None)
        annotations = list(_annotations(video, where))
        unlabelled += not annotations
        for label, start, end in annotations:
            if end <= start:
                empty += 1
                continue
            if file is None:
                lacking.add(key)
            entries.append(
                Entry(ListedClip(file or f"v_{key}.mp4", label, name, start, end), where)
            )
    notes = (
        f"videos without annotations, left out: {unlabelled}" if unlabelled else "",
        f"segments without a length, left out: {empty}" if empty else "",
        f"videos listed but not on the disk: {len(lacking)}" if lacking else "",
    )
    return assemble(base, entries, "activitynet", f"ActivityNet, {files[0]}", notes=notes)


def example(root: Path) -> list[str]:
    database = {
        f"{subset[:1]}-_{i}": {
            "duration": 30.5,
            "subset": subset,
            "annotations": [{"label": label, "segment": [i, i + 2.5]} for label in AWKWARD[i:]],
        }
        for subset in ("training", "validation")
        for i in range(len(AWKWARD))
    }
    for video in database.values():  # one segment is one label
        annotations: Any = video["annotations"]
        for number, annotation in enumerate(annotations):
            annotation["segment"] = [number, number + 2.5]
    database["t-_0"] = {"subset": "testing", "annotations": []}
    lists = {"annotations/anet.json": json.dumps({"version": "1.3", "database": database})}
    write_files(root, lists | {f"videos/v_{key}.mp4": "" for key in database})
    return AWKWARD


def _files(root: Path) -> list[str]:
    if root.is_file():
        return [root.name] if suffix(root.name) == ".json" and _has_database(root) else []
    for folder, files in near(root):
        paths = [join(folder, name) for name in files if suffix(name) == ".json"]
        if known := [path for path in paths if _has_database(root / path)]:
            return known
    return []


def _has_database(path: Path) -> bool:
    """Return whether a file begins, or ends, as the annotations do."""
    with path.open("rb") as file:
        first = file.read(4096)
        file.seek(max(0, path.stat().st_size - 4096))
        both = first + file.read()
    # The list of videos may be after a taxonomy of any length: its entries are near the end then.
    return b'"database"' in both or (b'"taxonomy"' in both and b'"annotations"' in both)


def _names(key: str) -> tuple[str, str]:
    return f"v_{key}.mp4", f"{key}.mp4"


def _database(path: Path) -> dict[str, dict[str, Any]]:
    try:
        value = json.loads(text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {error.lineno} is not JSON: {error.msg}") from None
    database = value.get("database") if isinstance(value, dict) else None
    if not isinstance(database, dict) or not all(isinstance(v, dict) for v in database.values()):
        raise ValueError(f'{path.name}: "database" is not an object of videos by id')
    return database


def _annotations(video: dict[str, Any], where: str) -> Iterator[tuple[str, float, float]]:
    for item in video.get("annotations") or []:
        segment = item.get("segment") if isinstance(item, dict) else None
        if not isinstance(segment, list) or len(segment) != 2 or not item.get("label"):
            raise ValueError(f"{where}: {item!r} is no segment; give a label and [start, end]")
        start, end = (seconds(str(time), where) for time in segment)
        yield str(item["label"]), start, end
