"""The files of a dataset: which names are clips, in which order, and where they are.

Hidden names and those of operating systems (`@eaDir`, `Thumbs.db`...) are no part of a dataset:
they are skipped and counted. Links are followed; a link to a folder that contains it is not
entered, so a walk ends. A link to nothing counts as a file, which is then missing. Pipes and
devices are no files: opening one could wait for ever.
"""

import csv
import io
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from varve.pipeline.datasets.containers import (
    OTHER,
    VIDEO,
    VIDEO_SUFFIXES,
    is_animated,
    kind_of,
)
from varve.pipeline.datasets.containers import suffix as suffix
from varve.pipeline.datasets.frame_names import AmbiguousFrames, choose_frames, is_frame, pattern

LIST_SUFFIXES = frozenset({".csv", ".tsv"})
SYSTEM_NAMES = frozenset(
    name.casefold()
    for name in ("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information",
                 "__MACOSX", "lost+found", "Thumbs.db", "ehthumbs.db", "desktop.ini")
)  # fmt: skip

TEXT_SUFFIXES = frozenset(
    (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".pdf", ".html", ".pkl", ".yaml")
)

# Kinds of what is left out.
SYSTEM = "hidden or system entries"
UNCLASSED = "without extension"

# Labels that a list may have, for the examples of layouts.
AWKWARD = ["../up", 'say "hi", twice', "two\nlines", " spaced ", "日本 naïve", "C:\\x\\..\\y"]


def is_video(name: str) -> bool:
    """Return whether a file name has the extension of a video."""
    return suffix(name) in VIDEO_SUFFIXES


def is_system(name: str) -> bool:
    """Return whether a name is hidden, or an operating system's or a tool's own.

    >>> [is_system(n) for n in ("._a.mp4", "@eaDir", "thumbs.db", ".Trash-1000", "a.mp4")]
    [True, True, True, True, False]
    """
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def videos_in(folder: Path, files: Sequence[str]) -> list[str]:
    """Return the videos among the files of a folder, by their names, else by their first bytes.

    Of the WebP and PNG files of one name pattern the first is opened; where it is animated, the
    others are too. So a folder of many frames costs one small read.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in files:
        if suffix(name) in (".webp", ".png"):
            groups[pattern(name)].append(name)
    animated = {
        name
        for names in groups.values()
        if is_animated(folder / names[0])
        for name in names
        if is_animated(folder / name)
    }
    return [name for name in files if name in animated or kind_of(folder / name) == VIDEO]


def stem(name: str) -> str:
    """Return the name without the extension of a video; other dots are part of it.

    >>> stem("v_Diving_g01_c01.avi"), stem("clip.v2")
    ('v_Diving_g01_c01', 'clip.v2')
    """
    return os.path.splitext(name)[0] if is_video(name) else name.rstrip()


def scan(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of a folder's sub-folders and of its files, each sorted."""
    return _scan(folder)[:2]


def _scan(folder: Path) -> tuple[list[str], list[str], int]:
    """Return the names of `scan`, and the number of entries that were skipped."""
    folders, files, skipped = [], [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_system(entry.name):
                skipped += 1
            # os.path, not entry.is_dir(): the latter raises on a link to itself.
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif (
                entry.is_file(follow_symlinks=False)
                or os.path.isfile(entry.path)
                or not os.path.exists(entry.path)
            ):
                files.append(entry.name)
    return sorted(folders), sorted(files), skipped


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, its sub-folders, its files) for every folder, parents first.

    `folder` is relative to `root`, and "" for the root itself. As with os.walk, names removed from
    the yielded list of sub-folders are not entered.
    """
    return (entries[:3] for entries in _walk(root))


def _walk(
    root: Path, folder: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, list[str], list[str], int]]:
    status = os.stat(root / folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    folders, files, skipped = _scan(root / folder)
    yield folder, folders, files, skipped
    for name in folders:
        yield from _walk(root, join(folder, name), above | {here})


def left_out(root: Path, listed: Collection[str], lists: bool) -> tuple[tuple[str, int], ...]:
    """Count the files of a dataset that are no clip and no frame of one, by kind.

    Args:
        root: Directory of the dataset.
        listed: Paths of the clips, relative to `root`.
        lists: Whether the layout reads lists. Files of text are not counted then, since some of
            them are read.

    Returns:
        (kind, number), the most frequent first: videos, pictures, "pictures of optical flow" and
        other kinds of `frame_names` beside frames, hidden or system entries, or an extension.
    """
    counts: Counter[str] = Counter()
    clips = set(listed)
    for folder, _, files, skipped in _walk(root):
        counts[SYSTEM] += skipped
        if folder in clips:
            counts.update(_skipped_frames(files))
            files = [name for name in files if not is_frame(name)]
        files = [name for name in files if join(folder, name) not in clips]
        videos = set(videos_in(root / folder, files))
        for name in files:
            kind = VIDEO if name in videos else kind_of(root / folder / name)
            if kind == OTHER:
                kind = suffix(name) or UNCLASSED
                if lists and kind in (*TEXT_SUFFIXES, UNCLASSED):
                    continue
            counts[kind] += 1
    return tuple(sorted((+counts).items(), key=lambda item: (-item[1], item[0])))


def _skipped_frames(files: Sequence[str]) -> Mapping[str, int]:
    try:
        return choose_frames(files).skipped
    except AmbiguousFrames:  # the clip is quarantined with the reason
        return {}


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder, which may be ""."""
    return f"{folder}/{name}" if folder else name


def clips_below(root: Path) -> Iterator[str]:
    """Yield every video, and every folder but the root with frames and no video."""
    for folder, _, files in walk(root):
        videos = videos_in(root / folder, files)
        yield from (join(folder, name) for name in videos)
        if folder and not videos and any(map(is_frame, files)):
            yield folder


def near(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, its files) of the root, then of each folder in it: where lists are."""
    if not root.is_dir():
        return
    folders, files = scan(root)
    yield "", files
    for name in folders:
        yield name, scan(root / name)[1]


def describe(root: Path) -> str:
    """Describe the kinds of files in a directory, the most frequent first."""
    if not root.is_dir():
        return f"one {root.suffix} file"
    kinds = Counter(suffix(name) or UNCLASSED for _, _, names in walk(root) for name in names)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(8)) or "no file"


class ClipFinder:
    """Index of the clips that a list names, wherever below the root they are.

    The key of a clip is its file name without the extension, so that files converted to another
    container, or split into a folder of frames, are found as well.

    Args:
        root: Directory of the dataset. Walked once; a folder of frames that is a clip is not
            entered.
        names: File names of the clips to find.
        ignore_case: Whether names that differ only in case are the same.
    """

    def __init__(self, root: Path, names: Iterable[str], ignore_case: bool = False) -> None:
        self._ignore_case = ignore_case
        self._paths: dict[str, list[str]] = {}
        wanted = {self._key(name) for name in names}
        for folder, folders, files in walk(root):
            clips = videos_in(root / folder, [n for n in files if self._key(n) in wanted])
            frames = {
                name
                for name in folders
                if self._key(name) in wanted
                and any(map(is_frame, os.listdir(root / folder / name)))
            }
            folders[:] = [name for name in folders if name not in frames]
            for name in (*clips, *frames):
                self._paths.setdefault(self._key(name), []).append(join(folder, name))

    def find(
        self, name: str, folders: Collection[str] = (), classes: Collection[str] = ()
    ) -> str | None:
        """Return the path of a clip, relative to the root; None where there is none.

        Args:
            name: File name of the clip.
            folders: Names of folders that it is likely to be in, such as its class. They are
                compared, never opened.
            classes: `folder_key` of every class: a file in the folder of another class is another
                clip of that name.
        """
        likely = {folder_key(folder) for folder in folders}
        parents = {
            path: [folder_key(part) for part in path.split("/")[:-1]]
            for path in self._paths.get(self._key(name), [])
        }
        for path, above in list(parents.items()):
            if above and above[-1] in classes and above[-1] not in likely:
                del parents[path]

        def rank(path: str) -> tuple[Any, ...]:
            strange = PurePosixPath(path).name != name
            return -len(likely.intersection(parents[path])), strange, path.count("/"), path

        return min(parents, key=rank, default=None)

    def _key(self, name: str) -> str:
        # A Mac's disk may separate letters and accents that a list has composed.
        key = unicodedata.normalize("NFC", stem(name))
        return key.casefold() if self._ignore_case else key


def folder_key(name: str) -> str:
    """Return the key by which folders and classes are compared: no case, spaces as underscores."""
    return unicodedata.normalize("NFC", name).casefold().replace(" ", "_")


def write_files(root: Path, files: Mapping[str, str]) -> None:
    """Write the example of a layout: texts by path, "" for a video."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, "utf-8", newline="")


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV, for the example of a layout."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
