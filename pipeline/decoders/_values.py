"""Values between the processes of a build: what to read of a file, and what was read."""

from dataclasses import dataclass, field

import numpy as np

from varve.pipeline.config import FrameSet

REASONS = (
    "missing",  # no such file
    "empty",  # zero bytes
    "not_video",  # no container that could be opened
    "no_video_stream",  # audio or data only
    "corrupt",  # opened, but the wanted frames could not be decoded
    "too_short",  # no frame in the file, or none in the clip's interval
    "timeout",  # not decoded within the deadline
    "crashed",  # the decoding process died
    "unreadable",  # refused by the system (permissions, input/output error); frames of two kinds
    "not_finite",  # decoded, but a feature overflowed the number format on disk
    "changed",  # the file changed while the build read it; its next bytes are tried again
)


@dataclass(frozen=True)
class Stretch:
    """One clip of a file: the whole, or [start_seconds, end_seconds) of the file's clock.

    Attributes:
        seed: Seed of its random draws: the clip's row key.
        part: Of a whole video, the first of the kept frames to read and their number; None for
            what the frame sets choose.
    """

    start_seconds: float | None = None
    end_seconds: float | None = None
    seed: str = ""
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Request:
    """All clips and frame sets to read of one file, in one pass over it.

    A request without clips is for the timeline of its one frame set, of a whole video.
    """

    path: str
    clips: tuple[Stretch, ...]
    frame_sets: tuple[FrameSet, ...]


@dataclass(frozen=True)
class Facts:
    """Properties of one clip that decoding it showed.

    Attributes:
        num_frames: Number of frames in the clip's interval.
        num_frames_claimed: Number of frames of the whole file by its header; 0 for none there.
        fps: Average frame rate of the stream.
        width: Width of a frame in pixels, upright.
        height: Height of a frame in pixels, upright.
        decoder: Name of the decoder that was used; several are joined by "+".
        warning: What is wrong with a file that could be decoded, for a person; "" for nothing.
        sound: What is wrong with the audio, for a person; "" for nothing, None where no audio was
            read.
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
class Timeline:
    """The frames of a whole file: their times, and which of them are kept.

    Attributes:
        times_N: Presentation times of all frames in seconds of the file's clock, float64 [N].
        kept_K: Display indices of the kept frames, int64 [K].
        facts: Facts of the whole file.
    """

    times_N: np.ndarray = field(repr=False)
    kept_K: np.ndarray = field(repr=False)
    facts: Facts


@dataclass(frozen=True)
class Decoded:
    """The frames of one clip, an array for each frame set of the request.

    Pictures are uint8 [T, size, size, 3] RGB, audio is float32 [T, samples].
    """

    frames: tuple[np.ndarray, ...] = field(repr=False)
    facts: Facts


@dataclass(frozen=True)
class Failure:
    """Why a clip could not be decoded: one of REASONS, and a sentence for a person."""

    reason: str
    detail: str
