"""Sampling rules: which T of a clip's N frames are read.

This file is the contract; every other module here is one rule, found by its file name. A rule of
your own is a function with the decorator `register("samplings", NAME)`. A module has one function:

    choose(times_N, frames, *, fps, stride, view, random) -> Sequence[int]
        Return T = `frames` display indices in [0, N), given the presentation times in seconds of
        all frames (float64 [N], increasing, any origin and spacing). N is at least 1. A clip
        shorter than T gives repeated frames.

After `frames` a rule names the options that it takes, and no others: `fps` and `stride`, numbers
of the frame set that are then required (else they are refused); `view`, 0 for the plain view;
`random`, a function without arguments that returns the next draw, uniform in [0, 1), seeded by
clip and view. A rule that takes `random` makes several views of a clip differ.

The indices do not decrease, unless the rule has an attribute `ORDERED = False`.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from varve.pipeline.config import FrameSet, rule_options
from varve.pipeline.registry import variant

# Container clocks have steps as coarse as a millisecond (Matroska). A target that falls on the
# time of a frame must not be decided by the last bit of a float.
CLOCK_SLACK_SECONDS = 1e-6


class SamplingError(RuntimeError):
    """A rule failed, or chose what it may not: an error in its code, not in the clip."""


def indices(frame_set: FrameSet, times_N: np.ndarray, seed: str = "") -> np.ndarray:
    """Choose T frames of a clip in display order.

    Args:
        frame_set: The rule and its options.
        times_N: Presentation times in seconds, increasing, any origin, any spacing.
        seed: Seed of the clip, for rules that draw. The draws depend on it, on the view and on
            nothing else: neither on other clips nor on the machine.

    Returns:
        indices_T: int64 [T], each in [0, N).

    Raises:
        ValueError: The clip has no frame.
        SamplingError: The rule raised an error, or returned no T indices in [0, N).

    The rules on ten frames at 10 frames/s, and on clips shorter than T:

    >>> times_N = np.arange(10) / 10
    >>> def rule(times_N, seed="clip", **options):
    ...     return indices(FrameSet(**options), times_N, seed).tolist()

    >>> rule(times_N, frames=4, sampling="tsn")
    [1, 3, 6, 8]
    >>> rule(times_N[:2], frames=4, sampling="tsn")
    [0, 0, 1, 1]

    >>> rule(times_N, frames=4, sampling="tsn_random")
    [0, 4, 6, 7]
    >>> rule(times_N[:2], frames=4, sampling="tsn_random")
    [0, 0, 1, 1]

    >>> rule(times_N, frames=3, sampling="uniform_fps", fps=5.0)
    [3, 5, 7]
    >>> rule(times_N, frames=3, sampling="uniform_fps", fps=1.0)
    [0, 5, 9]

    >>> rule(times_N, frames=3, sampling="dense", stride=2)
    [2, 4, 6]
    >>> rule(times_N, frames=3, sampling="dense", stride=2, view=1)
    [4, 6, 8]
    >>> rule(times_N, frames=4, sampling="dense", stride=4)
    [0, 4, 8, 9]
    """
    return chooser(frame_set)(times_N, seed)


def chooser(frame_set: FrameSet) -> Callable[[np.ndarray, str], np.ndarray]:
    """Return `indices` of one frame set, as a function of the times and the seed of a clip."""
    name, frames = frame_set.sampling, frame_set.frames
    rule, names = variant("samplings", name), rule_options(name)
    view = max(0, frame_set.view)  # corners show the frames of the plain view
    values = {"fps": frame_set.fps, "stride": frame_set.stride, "view": view}
    options: dict[str, Any] = {option: values[option] for option in names if option in values}
    choose: Callable[..., Sequence[int]] = getattr(rule, "choose", rule)

    def indices_of(times_N: np.ndarray, seed: str) -> np.ndarray:
        if len(times_N) < 1:
            raise ValueError(f"cannot choose {frames} frames from a clip that has none")
        drawn = options
        if "random" in names:
            draws = generator(seed, view, "frames")
            drawn = options | {"random": lambda: float(draws.random())}
        try:
            chosen = choose(times_N, frames, **drawn)
            chosen_T = np.asarray(chosen)
        except Exception as error:
            raise SamplingError(f"sampling {name!r}: {type(error).__name__}: {error}") from error
        inside = chosen_T.shape == (frames,) and chosen_T.dtype.kind in "iu"
        if not (inside and chosen_T.min() >= 0 and chosen_T.max() < len(times_N)):
            raise SamplingError(
                f"sampling {name!r} returned {chosen!r}: not {frames} whole numbers from 0 to "
                f"{len(times_N) - 1}"
            )
        return chosen_T.astype(np.int64)

    return indices_of


def kept(frame_set: FrameSet, times_N: np.ndarray) -> np.ndarray:
    """Return the display indices that `sampling="all"` keeps of a file, int64 [K], increasing.

    With `stride`, every so many frames from the first one on. With `fps`, the frames shown at the
    times 0, 1 / fps, 2 / fps ... from the first frame's on, each once: where the video has fewer
    frames a second, all of them.

    Args:
        times_N: Presentation times in seconds, increasing.

    >>> kept(FrameSet(sampling="all", stride=3), np.arange(10) / 10)
    array([0, 3, 6, 9])
    >>> kept(FrameSet(sampling="all", fps=4.0), np.arange(10) / 10)
    array([0, 2, 5, 7])
    """
    if not frame_set.fps:
        return np.arange(0, len(times_N), frame_set.stride, dtype=np.int64)
    seconds = float(times_N[-1] - times_N[0]) + CLOCK_SLACK_SECONDS
    moments = times_N[0] + np.arange(int(seconds * frame_set.fps) + 1) / frame_set.fps
    shown = np.searchsorted(times_N, moments + CLOCK_SLACK_SECONDS, side="right") - 1
    return np.unique(shown).astype(np.int64)


def generator(seed: str, view: int, purpose: str) -> np.random.Generator:
    """Return the generator of one clip's draws, seeded by SHA-256 of (purpose, view, seed)."""
    digest = hashlib.sha256(f"{purpose}\0{view}\0{seed}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
