"""The middle frame of each of T equal segments (TSN, Wang et al., 2016): (2i + 1) N // 2T.

Where T > N, frames repeat as evenly as whole numbers allow.
"""

from collections.abc import Sequence


def choose(times_N: Sequence[float], frames: int) -> list[int]:
    """Return the index of the middle frame of each segment."""
    return [(2 * i + 1) * len(times_N) // (2 * frames) for i in range(frames)]
