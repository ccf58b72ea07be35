"""T frames `stride` frames apart: around the middle in view 0, from a drawn start in other views.

Frames of a clip shorter than that start at its first, and repeat its last.
"""

from collections.abc import Callable, Sequence


def choose(
    times_N: Sequence[float], frames: int, *, stride: int, view: int, random: Callable[[], float]
) -> list[int]:
    """Return the indices start, start + stride, ..., none above the last frame."""
    room = max(len(times_N) - ((frames - 1) * stride + 1), 0)
    start = min(int(random() * (room + 1)), room) if view > 0 else room // 2
    return [min(start + i * stride, len(times_N) - 1) for i in range(frames)]
