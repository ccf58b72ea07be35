"""Which frames of a clip are looked at, and which square of each is seen.

Pure functions of the frame set, the clip and a seed: nothing here opens a file. Both halves draw
from generators seeded by SHA-256 of (clip's seed, view, purpose), so a clip's variation does not
depend on the order of clips, on its neighbours or on the machine.

Shapes: N frames the clip has, T frames wanted, S the picture's size in pixels.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from varve.pipeline.config import FrameSet, Picture

# Container clocks tick in steps as coarse as a millisecond (Matroska), and a target that falls on
# a frame's time must not be decided by the last bit of a float.
CLOCK_SLACK_SECONDS = 1e-6

SMALLEST_CROP = 0.6

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Cut:
    """How one clip's frames become pictures: one value for all T frames of a view.

    `box` is the (left, upper, right, lower) square of the frame to resize to the whole picture;
    None for the plain view's resize and centre crop.
    """

    picture: Picture
    box: Box | None = None
    flip: bool = False


def indices(frame_set: FrameSet, times_N: np.ndarray, seed: str = "") -> np.ndarray:
    """Choose T frames of a clip in display order.

    Frames repeat, by each rule, where T asks for more than the clip has: never an error.

    Args:
        frame_set: The rule and its numbers.
        times_N: Presentation times in seconds, increasing, any origin, any spacing.
        seed: The clip's seed; only `tsn_random`, and `dense` in views above 0, draw.

    Returns:
        indices_T: int64 [T], non-decreasing, each in [0, N).

    Raises:
        ValueError: The clip has no frame.

    The rules, on ten frames at 10 frames/s, and where T exceeds the clip:

    >>> times_N = np.arange(10) / 10
    >>> def rule(times_N, seed="clip", **options):
    ...     return indices(FrameSet(**options), times_N, seed).tolist()

    `tsn`, the middle frame of each of T equal segments, `(2i + 1) N // 2T`. T > N repeats frames
    as evenly as whole numbers allow.

    >>> rule(times_N, frames=4, sampling="tsn")
    [1, 3, 6, 8]
    >>> rule(times_N[:2], frames=4, sampling="tsn")
    [0, 0, 1, 1]

    `tsn_random`, a frame drawn from each segment [iN // T, (i + 1)N // T). T > N leaves some
    segments empty; an empty one gives its start.

    >>> rule(times_N, frames=4, sampling="tsn_random")
    [0, 4, 6, 7]
    >>> rule(times_N[:2], frames=4, sampling="tsn_random")
    [0, 0, 1, 1]

    `uniform_fps`, the frames shown at T moments `1 / fps` apart around the middle of the clip's
    duration. A frame is shown from its time until the next one's; moments outside the clip hold
    its first or last frame. Every view sees the same frames.

    >>> rule(times_N, frames=3, sampling="uniform_fps", fps=5.0)
    [3, 5, 7]
    >>> rule(times_N, frames=3, sampling="uniform_fps", fps=1.0)
    [0, 5, 9]

    `dense`, T frames `stride` apart: in the middle for view 0, from a drawn start for others. A
    stretch longer than the clip starts at its first frame and holds its last.

    >>> rule(times_N, frames=3, sampling="dense", stride=2)
    [2, 4, 6]
    >>> rule(times_N, frames=3, sampling="dense", stride=2, view=1)
    [4, 6, 8]
    >>> rule(times_N, frames=4, sampling="dense", stride=4)
    [0, 4, 8, 9]
    """
    num_frames, wanted = len(times_N), frame_set.frames
    if num_frames < 1:
        raise ValueError(f"cannot choose {wanted} frames from a clip that has none")
    steps_T = np.arange(wanted, dtype=np.int64)
    match frame_set.sampling:
        case "tsn":
            return (2 * steps_T + 1) * num_frames // (2 * wanted)
        case "tsn_random":
            starts_T = steps_T * num_frames // wanted
            lengths_T = np.maximum((steps_T + 1) * num_frames // wanted - starts_T, 1)
            draws_T = _generator(seed, frame_set.view, "frames").random(wanted)
            # A product may round up to the length itself.
            offsets_T = np.minimum((draws_T * lengths_T).astype(np.int64), lengths_T - 1)
            drawn_T: np.ndarray = starts_T + offsets_T
            return drawn_T
        case "uniform_fps":
            return _at_rate(frame_set.fps, steps_T, np.asarray(times_N, np.float64))
        case "dense":
            room = max(num_frames - ((wanted - 1) * frame_set.stride + 1), 0)
            start = room // 2
            if frame_set.view > 0:
                draw = _generator(seed, frame_set.view, "frames").random()
                start = min(int(draw * (room + 1)), room)
            return np.minimum(start + steps_T * frame_set.stride, num_frames - 1)
    raise ValueError(f"no sampling {frame_set.sampling!r}")


def cut(frame_set: FrameSet, width: int, height: int, seed: str = "") -> Cut:
    """Decide the square that a view sees of frames of `width` x `height` pixels.

    View 0 is always plain. Whether a view crops or mirrors does not change what the other draws.
    """
    assert isinstance(frame_set.picture, Picture)
    if frame_set.view == 0 or not (frame_set.random_crop or frame_set.flip):
        return Cut(frame_set.picture)
    scale, across, down, mirror = _generator(seed, frame_set.view, "picture").random(4).tolist()
    box = None
    if frame_set.random_crop:
        shorter = min(width, height)
        side = max(1, round(shorter * (SMALLEST_CROP + (1 - SMALLEST_CROP) * scale)))
        left = min(int(across * (width - side + 1)), width - side)
        upper = min(int(down * (height - side + 1)), height - side)
        box = (left, upper, left + side, upper + side)
    return Cut(frame_set.picture, box, frame_set.flip and mirror < 0.5)


def picture(image: Image.Image, cut: Cut) -> np.ndarray:
    """Make the picture that a network sees of one frame.

    The plain view equals torchvision's `Resize` and `CenterCrop` on Pillow images, which is what
    open_clip and timm preprocess with, bit for bit.

    Returns:
        uint8 [S, S, 3] RGB; the caller's own.
    """
    size, resize = cut.picture.size, cut.picture.resize
    resample = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
    }[cut.picture.interpolation]
    image = image.convert("RGB")
    if cut.box is not None:
        # Not `resize(box=...)`: its filter reaches over the box's edge.
        image = image.crop(cut.box).resize((size, size), resample)
    elif cut.picture.resize_mode == "squash":
        image = image.resize((size, size), resample)
    else:
        width, height = image.size
        if width <= height:
            width, height = resize, int(resize * height / width)
        else:
            width, height = int(resize * width / height), resize
        image = image.resize((width, height), resample)
        # Python rounds halves to even, and so does the reference: an odd margin matters here.
        left, upper = round((width - size) / 2.0), round((height - size) / 2.0)
        image = image.crop((left, upper, left + size, upper + size))
    if cut.flip:
        image = ImageOps.mirror(image)
    return np.array(image, dtype=np.uint8)


def _at_rate(fps: float, steps_T: np.ndarray, times_N: np.ndarray) -> np.ndarray:
    span = float(times_N[-1] - times_N[0])
    # The last frame is shown too, for as long as frames are on average.
    shown = span / (len(times_N) - 1) if len(times_N) > 1 else 0.0
    middle = float(times_N[0]) + (span + shown) / 2
    moments_T = middle + (steps_T - (len(steps_T) - 1) / 2) / fps
    found_T = np.searchsorted(times_N, moments_T + CLOCK_SLACK_SECONDS, side="right") - 1
    return np.clip(found_T, 0, len(times_N) - 1).astype(np.int64)


def _generator(seed: str, view: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose}\0{view}\0{seed}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
