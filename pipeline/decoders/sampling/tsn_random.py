"""A frame drawn from each of T equal segments [iN // T, (i + 1)N // T).

Where T > N some segments are empty; an empty segment gives its start.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise


def choose(times_N: Sequence[float], frames: int, *, random: Callable[[], float]) -> list[int]:
    """Return the index of the frame drawn from each segment."""
    bounds = [i * len(times_N) // frames for i in range(frames + 1)]
    lengths = [max(end - start, 1) for start, end in pairwise(bounds)]
    # A product may round up to the length itself.
    return [
        start + min(int(random() * length), length - 1)
        for start, length in zip(bounds, lengths, strict=False)
    ]
