"""A small labelled dataset of real video files, made from a seed: for the demo and for tests.

A textured shape moves over a textured backdrop, and the class is its motion:

| classes                                    | separates the two      | them from the others     |
|--------------------------------------------|------------------------|--------------------------|
| `move right`, `move left`                  | order of the frames    | set; from `sway ↔` order |
| `move down`, `move up`                     | order of the frames    | set; from `bob ↕` order  |
| `turn clockwise`, `turn counter-clockwise` | order of the frames    | set of frames            |
| `grow`, `shrink`                           | order of the frames    | set of frames            |
| `fade in`, `fade out`                      | order of the frames    | set of frames            |
| `sway ↔`, `bob ↕`                          | set of frames          | set; from moves order    |

The two classes of each row but the last are each other played backwards: `frames(a, rng)`
reversed is `frames(b, rng)` bit for bit. So neither the set of all frames distinguishes them, nor
one frame whose time in the clip is unknown. (A frame known to be the first does: that is order.)
All other properties of a clip (shape, colour, size, textures, brightness, position, pace) and the
size, rate, length and codec of its file depend on its number and not on its class: clip 7 of every
class looks alike, so there is no shortcut to learn. Motions stay in the central square, which
networks see. With audio there are four more classes, whose frames equal those of `sway ↔` bit for
bit, and which differ by their audio alone; see `varve.pipeline.datasets.synthetic_audio`.

Light to import (numpy, PIL, av). Equal arguments give equal bytes, with one build of PyAV.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from PIL import Image, ImageDraw

from varve.pipeline.datasets import synthetic_audio
from varve.pipeline.datasets.corruptions import CORRUPTIONS

RATES = tuple(map(Fraction, ("10", "12", "15", "24", "25", "30000/1001", "30")))
SHAPES = ("disc", "square", "triangle", "diamond", "ring", "cross", "star")


class Pose(NamedTuple):
    """Position of the shape: its centre from the frame's, in half short sides; y points down."""

    x: float = 0.0
    y: float = 0.0
    growth: float = 1.0  # factor of the clip's shape size
    opacity: float = 1.0


@dataclass(frozen=True)
class _Look:
    """Appearance of a clip besides its motion. Drawn by `_look`, equally for every class."""

    num_frames: int
    backdrop: Image.Image
    shape: Image.Image  # RGBA
    diameter: float  # pixels
    x: float
    y: float
    reach: float  # half the length of a path, in half short sides
    pace: float  # above 1: slow first
    angle: float  # radians, where a turn begins, from the top
    turns: float

    def picture(self, pose: Pose) -> Image.Image:
        width, height = self.backdrop.size
        side = max(2, round(self.diameter * pose.growth))
        shape = self.shape.resize((side, side), Image.Resampling.BILINEAR)
        mask = shape.getchannel("A")
        if pose.opacity < 1.0:
            mask = mask.point([round(level * pose.opacity) for level in range(256)])
        half = min(width, height) / 2
        left = round(width / 2 + (self.x + pose.x) * half - side / 2)
        top = round(height / 2 + (self.y + pose.y) * half - side / 2)
        picture = self.backdrop.copy()
        picture.paste(shape.convert("RGB"), (left, top), mask)
        return picture


def _across(t: float, look: _Look) -> Pose:
    return Pose(x=look.reach * (2 * t - 1))


def _along(t: float, look: _Look) -> Pose:
    return Pose(y=look.reach * (2 * t - 1))


def _sway(t: float, look: _Look) -> Pose:
    # A triangle wave has the same positions as one crossing, in another order.
    return _across(1 - abs(2 * t - 1), look)


def _bob(t: float, look: _Look) -> Pose:
    return _along(1 - abs(2 * t - 1), look)


def _turn(t: float, look: _Look) -> Pose:
    angle = look.angle + 2 * math.pi * look.turns * t
    return Pose(x=look.reach * math.sin(angle), y=-look.reach * math.cos(angle))


def _grow(t: float, look: _Look) -> Pose:
    return Pose(growth=0.4 + 1.6 * t)


def _fade(t: float, look: _Look) -> Pose:
    return Pose(opacity=t)


# Two classes each, of which the second is the first played backwards.
_PAIRS: dict[tuple[str, str], Callable[[float, _Look], Pose]] = {
    ("move right", "move left"): _across,
    ("move down", "move up"): _along,
    ("turn clockwise", "turn counter-clockwise"): _turn,
    ("grow", "shrink"): _grow,
    ("fade in", "fade out"): _fade,
}
REVERSED_PAIRS = tuple(_PAIRS)
_POSES = {label: pose for pair, pose in _PAIRS.items() for label in pair}
_POSES |= {"sway ↔": _sway, "bob ↕": _bob}
CLASSES = tuple(_POSES)
AUDIO_CLASSES = tuple(synthetic_audio.SIGNALS)


def frames(label: str, rng: np.random.Generator) -> np.ndarray:
    """Draw the frames of one clip of a class.

    Returns:
        uint8 [N, H, W, 3] RGB; N in 10..90, H and W even, in 128..320.

    Raises:
        ValueError: There is no such class; the message lists them.
    """
    return _frames(label, _look(rng, _rate(rng)))


def _frames(label: str, look: _Look) -> np.ndarray:
    label = "sway ↔" if label in AUDIO_CLASSES else label
    if label not in _POSES:
        raise ValueError(f"no class {label!r}; choose from {', '.join((*CLASSES, *AUDIO_CLASSES))}")
    times_N = np.linspace(0, 1, look.num_frames) ** look.pace
    pictures = [look.picture(_POSES[label](t, look)) for t in times_N.tolist()]
    if any(label == second for _, second in REVERSED_PAIRS):
        pictures.reverse()
    return np.stack([np.asarray(picture) for picture in pictures])


def _rate(rng: np.random.Generator) -> Fraction:
    return RATES[rng.integers(len(RATES))]


def _look(rng: np.random.Generator, rate: Fraction) -> _Look:
    # Log-uniform sides have half the area of uniform ones, and so take half the time to encode.
    height, width = (int(side) // 2 * 2 for side in 128 * 2.5 ** rng.random(2))
    gain = rng.uniform(0.8, 1.1)
    # The shape is always brighter: else the mean of a class would show nothing.
    backdrop = _texture(rng, (height, width), levels=(15, 90), gain=gain)
    shape = Image.fromarray(_texture(rng, (160, 160), levels=(120, 250), gain=gain))
    shape.putalpha(_silhouette(SHAPES[rng.integers(len(SHAPES))], 160))
    return _Look(
        num_frames=round(rate * float(rng.uniform(1.0, 3.0))),
        backdrop=Image.fromarray(backdrop),
        shape=shape,
        diameter=rng.uniform(0.32, 0.46) * min(height, width),
        x=rng.uniform(-0.12, 0.12),
        y=rng.uniform(-0.12, 0.12),
        reach=rng.uniform(0.5, 0.7),
        pace=rng.uniform(0.8, 1.25),
        angle=rng.uniform(-0.5, 0.5),
        turns=rng.uniform(0.85, 1.0),
    )


def _texture(
    rng: np.random.Generator, shape_HW: tuple[int, int], levels: tuple[int, int], gain: float
) -> np.ndarray:
    """Draw three waves between two colours within `levels`, times `gain`: uint8 [H, W, 3]."""
    y_HW, x_HW = np.mgrid[: shape_HW[0], : shape_HW[1]] / 128
    waves_HW = np.zeros(shape_HW)
    for angle, period, phase in rng.random((3, 3)):
        turn = 2 * math.pi * angle
        along_HW = x_HW * math.cos(turn) + y_HW * math.sin(turn)
        waves_HW += np.sin(2 * math.pi * (along_HW * (2 + 6 * period) + phase)) / 3
    share_HW1 = (waves_HW[..., None] + 1) / 2
    first_3, second_3 = rng.uniform(*levels, size=(2, 3))
    mixed_HW3: np.ndarray = gain * (first_3 * share_HW1 + second_3 * (1 - share_HW1))
    return mixed_HW3.clip(0, 255).astype(np.uint8)


def _silhouette(kind: str, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    last = side - 1
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(0.12, 0.12), (0.88, 0.12), (0.88, 0.88), (0.12, 0.88)],
        "triangle": [(0.5, 0.02), (0.98, 0.9), (0.02, 0.9)],
        "diamond": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
        "star": [
            (0.5 + r * math.sin(k * math.pi / 5), 0.5 - r * math.cos(k * math.pi / 5))
            for k, r in enumerate([0.5, 0.28] * 5)
        ],
    }
    if kind in corners:
        draw.polygon([(x * last, y * last) for x, y in corners[kind]], fill=255)
    elif kind == "cross":
        draw.rectangle((0.3 * last, 0, 0.7 * last, last), fill=255)
        draw.rectangle((0, 0.3 * last, last, 0.7 * last), fill=255)
    else:
        draw.ellipse((0, 0, last, last), fill=255)
        if kind == "ring":
            draw.ellipse((0.3 * last, 0.3 * last, 0.7 * last, 0.7 * last), fill=0)
    return mask


def write_video(
    path: Path,
    frames_NHWC: np.ndarray,
    rate: Fraction,
    *,
    keyframe_every: int = 24,
    index_first: bool = False,
    audio_N: np.ndarray | None = None,
) -> None:
    """Encode frames into a file: H.264 with B-frames for .mp4, MPEG-4 part 2 for .avi.

    Audio is encoded as AAC for .mp4, uncompressed for .avi.

    Args:
        path: Path of the file; its suffix chooses container and codec.
        frames_NHWC: uint8 [N, H, W, 3] RGB, H and W even.
        rate: Frames per second.
        keyframe_every: Length of the longest group of pictures, in frames.
        index_first: For .mp4, whether the index (moov) precedes the data.
        audio_N: float32, mono at `synthetic_audio.RATE`; None for a file without an audio track.

    Raises:
        ValueError: The suffix is another one.
    """
    codecs = {".mp4": "libx264", ".avi": "mpeg4"}
    if path.suffix not in codecs:
        raise ValueError(f"cannot encode into {path.name!r}; choose from {', '.join(codecs)}")
    options = {"movflags": "+faststart"} if index_first and path.suffix == ".mp4" else {}
    # bitexact leaves out library versions and times of day.
    with av.open(str(path), "w", options=options | {"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codecs[path.suffix], rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames_NHWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # more threads, other bytes
        context.gop_size = keyframe_every
        if path.suffix == ".mp4":
            # With mbtree and B-frames, x264 165 on one thread depends on uninitialised memory where
            # a side is no multiple of 16: up to 8 different files in 8 runs.
            context.options = {"preset": "veryfast", "crf": "23", "bf": "2", "mbtree": "0"}
        else:
            context.options = {"flags": "+bitexact"}
            context.qmin = context.qmax = 4
        track: AudioStream | None = None
        if audio_N is not None:
            codec = "aac" if path.suffix == ".mp4" else "pcm_s16le"
            added = container.add_stream(codec, rate=synthetic_audio.RATE, layout="mono")
            track = cast(AudioStream, added)
            track.codec_context.options = {"flags": "+bitexact"}
        for frame_HWC in frames_NHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
        if track is not None and audio_N is not None:
            samples = av.AudioFrame.from_ndarray(audio_N[None], "flt", "mono")
            samples.sample_rate = synthetic_audio.RATE
            container.mux(track.encode(samples))
            container.mux(track.encode(None))


@dataclass(frozen=True)
class SyntheticDataset:
    """A dataset on disk: whole clips under root/{train,test}/<class>/, and broken ones.

    `broken` has path and expected reason of each broken file; see `broken_files`.
    """

    root: Path
    classes: tuple[str, ...]
    clips: int
    broken: tuple[tuple[Path, str], ...]


def make_dataset(
    root: Path,
    clips_per_class: int = 24,
    seed: int = 0,
    broken: bool = True,
    classes: Sequence[str] | None = None,
    sound: bool = False,
) -> SyntheticDataset:
    """Write a dataset as class folders. The default, 288 clips, takes 6 to 8 s on one core.

    Clip k of a class is clip_00k, every third in test. Even k are .mp4, odd ones .avi. A clip's
    bytes depend on the seed, its class and k alone. Broken files have names of their own.

    Args:
        root: Directory of the dataset; created if missing, and without a dataset in it.
        clips_per_class: Number of whole clips of each class, both splits together; at least 1.
        seed: Seed of all draws.
        broken: Whether to add the files of CORRUPTIONS.
        classes: Some of CLASSES, with `sound` also of AUDIO_CLASSES; all by default.
        sound: Whether clips have audio tracks.

    Raises:
        ValueError: An unknown or repeated class, or no clip or class at all.
        FileExistsError: `root` already holds a train or a test folder.
    """
    known = (*CLASSES, *AUDIO_CLASSES) if sound else CLASSES
    names = known if classes is None else tuple(classes)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"classes={list(names)} must be distinct ones of {', '.join(known)}, at least one"
        )
    if clips_per_class < 1:
        raise ValueError(f"{clips_per_class=}: every class needs at least one clip")
    for split in ("train", "test"):
        if (root / split).exists():
            raise FileExistsError(
                f"{root / split} is there already; remove it or write into another folder"
            )
        for name in names:
            (root / split / name).mkdir(parents=True)

    for k in range(clips_per_class):
        rng = np.random.default_rng([seed, k])
        rate = _rate(rng)
        look = _look(rng, rate)
        keyframe_every = int(rng.integers(6, 49))
        split = "test" if k % 3 == 2 else "train"
        file = f"clip_{k:03d}{'.avi' if k % 2 else '.mp4'}"
        for name in names:
            shown = _frames(name, look)
            audio_N = None
            if sound:
                draw = np.random.default_rng([seed, k, 1])
                audio_N = synthetic_audio.waveform(name, float(len(shown) / rate), draw)
            write_video(root / split / name / file, shown, rate, keyframe_every=keyframe_every,
                        index_first=k % 4 == 0, audio_N=audio_N)  # fmt: skip

    for i, (stem, corruption) in enumerate(CORRUPTIONS.items() if broken else ()):
        name = names[i % len(names)]
        whole = (root / "train" / name / "clip_000.mp4").read_bytes()
        split = "test" if i % 2 else "train"
        (root / split / name / f"{stem}.mp4").write_bytes(corruption.apply(whole))
    return SyntheticDataset(root, names, clips_per_class * len(names), tuple(broken_files(root)))


def broken_files(root: Path) -> list[tuple[Path, str]]:
    """Return the files that `make_dataset` corrupted, with the expected reason ("" for none)."""
    return [
        (path, corruption.reason)
        for stem, corruption in CORRUPTIONS.items()
        for path in sorted(root.glob(f"*/*/{stem}.mp4"))
    ]
