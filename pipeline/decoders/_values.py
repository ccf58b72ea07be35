"""Values that cross the process border: what is asked of a file, and the answers."""

from dataclasses import dataclass, field

import numpy as np

from varve.pipeline.config import FrameSet

REASONS = (
    "missing",  # no such file
    "empty",  # zero bytes
    "not_video",  # no container that could be opened
    "no_video_stream",  # sound or data only
    "corrupt",  # opened, but what was asked for could not be decoded
    "too_short",  # no frame in the file, or none in the clip's interval
    "timeout",  # not done within the deadline
    "crashed",  # the decoding process died
    "unreadable",  # the operating system refused (permissions, input/output error)
    "not_finite",  # decoded, but a feature overflowed the number format on disk
    "changed",  # the file changed while the build read it; its next bytes are tried again
)


@dataclass(frozen=True)
class Stretch:
    """One clip of a file: the whole, or [start_seconds, end_seconds). `seed` is its row key."""

    start_seconds: float | None = None
    end_seconds: float | None = None
    seed: str = ""


@dataclass(frozen=True)
class Request:
    """Everything asked of one file, answered in one pass over it."""

    path: str
    clips: tuple[Stretch, ...]
    frame_sets: tuple[FrameSet, ...]


@dataclass(frozen=True)
class Facts:
    """What was found out about one clip while decoding it.

    `num_frames` is counted within the clip's stretch; `num_frames_claimed` is the header's word
    for the whole file (0 where it says nothing). `fps` is the stream's average rate. `sound` is
    what was odd about what was listened to, "" for nothing; None where nothing was.
    """

    num_frames: int
    num_frames_claimed: int
    fps: float
    width: int
    height: int
    decoder: str
    warning: str = ""
    sound: str | None = None


@dataclass(frozen=True)
class Decoded:
    """One clip's pictures: for each frame set of the request, uint8 [T, size, size, 3] RGB.

    Of sounds, float32 [T, samples].
    """

    frames: tuple[np.ndarray, ...] = field(repr=False)
    facts: Facts


@dataclass(frozen=True)
class Failure:
    """Why a clip has no pictures: one of REASONS, and a sentence for a person."""

    reason: str
    detail: str
