"""The frames shown at T times `1 / fps` seconds apart, around the middle of the clip.

A frame is shown from its time until that of the next one. Times before the clip give its first
frame, times after it the last. Every view has the same frames.
"""

from bisect import bisect_right
from collections.abc import Sequence

from varve.pipeline.decoders.sampling import CLOCK_SLACK_SECONDS


def choose(times_N: Sequence[float], frames: int, *, fps: float) -> list[int]:
    """Return the indices of the frames shown at those times."""
    span = float(times_N[-1] - times_N[0])
    # The last frame is shown too, for the average time of a frame.
    shown = span / (len(times_N) - 1) if len(times_N) > 1 else 0.0
    middle = float(times_N[0]) + (span + shown) / 2
    moments = [middle + (i - (frames - 1) / 2) / fps for i in range(frames)]
    return [max(bisect_right(times_N, t + CLOCK_SLACK_SECONDS) - 1, 0) for t in moments]
