"""Names of the pictures in one folder: which of them are the frames of a clip, in which order.

Pictures are grouped by the pattern of their name, which is the name without its numbers. Of several
patterns the RGB frames are taken (`img_00001.jpg`, `image_`, `frame`, `rgb_`, or a bare number).
Optical flow (`flow_x_00001.jpg`, `u_`, `v_`), depth, masks and thumbnails are skipped and counted.
A pattern that stands alone is taken whatever its name. Light to import.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Taken since the first release. Another format in one folder with them is skipped, so that a clip
# of a store keeps its digest.
FIRST_SUFFIXES = (".jpg", ".jpeg", ".png")
FRAME_SUFFIXES = (*FIRST_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

FLOW = "pictures of optical flow"
OTHER = "pictures beside the frames"
SECOND_FORMAT = "frames in a second format"

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_FLOW_WORDS = frozenset(("flow", "flowx", "flowy", "flowu", "flowv", "optflow", "opticalflow"))
_AXIS = re.compile(r"[uvxy][ _-]*#|#[ _-]*[uvxy]")
_OTHER_WORDS = frozenset(
    ("depth", "disparity", "mask", "masks", "seg", "segmentation", "ir", "infrared", "thermal",
     "skeleton", "pose", "heatmap", "thumb", "thumbs", "thumbnail", "preview", "residual")
)  # fmt: skip
_RGB_WORDS = frozenset(
    ("img", "im", "image", "images", "frame", "frames", "rgb", "color", "colour")
)
_MOST_PATTERNS = 4  # in a message


class AmbiguousFrames(OSError):
    """A folder whose pictures are several clips, or none: the message names their patterns."""


@dataclass(frozen=True)
class Frames:
    """The frames of one folder.

    Attributes:
        names: File names of the frames, in natural order.
        skipped: Number of other pictures, by kind: FLOW, OTHER, SECOND_FORMAT.
    """

    names: tuple[str, ...]
    skipped: Mapping[str, int]


def natural_key(path: str) -> tuple[Any, ...]:
    """Return a sort key by which paths sort folder by folder, and numbers by their value.

    Of numbers that differ in their padding alone, the path itself decides.

    >>> sorted(["b/f1", "a/f10.jpg", "a/f2.jpg", "a/f010b.jpg"], key=natural_key)
    ['a/f2.jpg', 'a/f10.jpg', 'a/f010b.jpg', 'b/f1']
    """
    pieces = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    # re.split puts the digits at odd indices, so that no number is compared with a text.
    valued = [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in pieces]
    return (valued, path)


def is_frame(name: str) -> bool:
    """Return whether a file name is that of a frame: neither hidden nor of another kind."""
    return name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")


def pattern(name: str) -> str:
    """Return a file name in lower case, without extension, with # for each number.

    >>> pattern("IMG_00001.jpg"), pattern("flow_x_0012.jpg"), pattern("0.04.png")
    ('img_#', 'flow_x_#', '#')
    """
    return _NUMBER.sub("#", os.path.splitext(name)[0].casefold())


def choose_frames(names: Iterable[str]) -> Frames:
    """Choose the frames among the file names of one folder.

    - Pictures of one pattern are all taken. Names without a number count as one pattern, and only
      where no name has a number.
    - Of several patterns the RGB one is taken, or else the only one that is not known for flow,
      depth, masks or thumbnails.
    - JPEG and PNG files go before other formats of that pattern.

    Raises:
        AmbiguousFrames: Two patterns could be the RGB frames, a folder has several series
            (`cam1_0001.jpg`, `cam2_0001.jpg`), a frame is there in two formats, or all patterns
            are known for something else.

    >>> choose_frames(["img_10.jpg", "img_2.jpg", "flow_x_2.jpg", "flow_y_2.jpg", "notes.txt"])
    Frames(names=('img_2.jpg', 'img_10.jpg'), skipped={'pictures of optical flow': 2})
    """
    patterns: dict[str, list[str]] = defaultdict(list)
    for name in sorted(filter(is_frame, names), key=natural_key):
        key = pattern(name)
        patterns[key if "#" in key else ""].append(name)
    if not patterns:
        return Frames((), {})
    chosen = _choose(patterns)
    skipped = Counter[str]()
    for key, members in patterns.items():
        if key != chosen:
            skipped[FLOW if _is_flow(key) else OTHER] += len(members)
    first = [name for name in patterns[chosen] if name.lower().endswith(FIRST_SUFFIXES)]
    taken = first or patterns[chosen]
    if len(taken) < len(patterns[chosen]):
        skipped[SECOND_FORMAT] += len(patterns[chosen]) - len(taken)
    if chosen:
        _check_one_series(taken)
    return Frames(tuple(taken), dict(skipped))


def _choose(patterns: Mapping[str, list[str]]) -> str:
    if len(patterns) == 1:
        return next(iter(patterns))
    likely = [key for key in patterns if key and not _is_flow(key) and not _is_other(key)]
    rgb = [key for key in likely if _is_rgb(key)]
    if len(rgb) == 1:
        return rgb[0]
    if not rgb and len(likely) == 1:
        return likely[0]
    shown = rgb or likely
    problem = f"{len(shown)} kinds of frames" if shown else "no RGB frames, only"
    raise _ambiguous(problem, [patterns[key] for key in shown or patterns])


def _check_one_series(names: Collection[str]) -> None:
    """Refuse names of one pattern that number their frames twice."""
    formats: dict[tuple[str, ...], str] = {}
    series: dict[str, list[str]] = defaultdict(list)
    numbers: dict[str, set[str]] = defaultdict(set)
    suffixes: dict[str, list[str]] = defaultdict(list)
    twice = False
    for name in names:
        stem, suffix = os.path.splitext(name.casefold())
        counted = list(_NUMBER.finditer(stem))
        last = counted[-1]
        before = stem[: last.start()] + "#" + stem[last.end() :]
        series[before].append(name)
        numbers[before].add(last[0].lstrip("0"))
        suffixes[suffix].append(name)
        twice |= formats.setdefault(tuple(n[0].lstrip("0") for n in counted), suffix) != suffix
    if twice:
        raise _ambiguous("frames in several formats", suffixes.values())
    # One number before that varies from frame to frame, as in frame_1_of_60, is no other series.
    several = [key for key in series if len(numbers[key]) > 1]
    times = Counter(number for key in several for number in numbers[key])
    if any(count > 1 for count in times.values()):
        raise _ambiguous(f"{len(several)} series of frames", [series[key] for key in several])


def _ambiguous(problem: str, groups: Collection[list[str]]) -> AmbiguousFrames:
    shown = [f"{_pattern_of(names)} ({len(names)})" for names in list(groups)[:_MOST_PATTERNS]]
    more = f" and {len(groups) - len(shown)} more" if len(groups) > len(shown) else ""
    return AmbiguousFrames(
        f"the folder holds {problem}: {', '.join(shown)}{more}; keep one kind of RGB frames in it"
    )


def _pattern_of(names: list[str]) -> str:
    """Return how names of one group differ, for a person: the last number as #."""
    stem, suffix = os.path.splitext(names[0])
    numbers = list(_NUMBER.finditer(stem))
    if not numbers:
        return names[0]
    return stem[: numbers[-1].start()] + "#" + stem[numbers[-1].end() :] + suffix


def _words(key: str) -> set[str]:
    return set(re.split(r"[^a-z]+", key))


def _is_flow(key: str) -> bool:
    return bool(_words(key) & _FLOW_WORDS or _AXIS.fullmatch(key))


def _is_other(key: str) -> bool:
    return bool(_words(key) & _OTHER_WORDS)


def _is_rgb(key: str) -> bool:
    return bool(_words(key) & _RGB_WORDS) or not re.search(r"[^\W\d_]", key)
