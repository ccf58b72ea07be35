"""Configuration is identity: what is asked of a build, as frozen values with JSON forms.

Light to import: a decoder's child process needs it.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SAMPLINGS = ("tsn", "tsn_random", "uniform_fps", "dense")
DTYPES = ("float16", "float32", "bfloat16")
DECODERS = ("auto", "pyav", "decord", "torchcodec")


@dataclass(frozen=True)
class Picture:
    """How one frame becomes a square picture, as a network's own configuration says.

    The frame's shorter side is resized to `resize` pixels (Pillow, antialiased), and the
    `size` x `size` centre is cut out. `resize_mode` "squash" resizes to the square directly.
    """

    size: int = 224
    resize: int = 224
    interpolation: str = "bicubic"  # or "bilinear"
    resize_mode: str = "shortest"  # or "squash"


@dataclass(frozen=True)
class FrameSet:
    """Which T frames of a clip are looked at, and as which pictures. Decides the frames' key.

    Attributes:
        frames: T, frames per clip.
        sampling: `tsn` the centre of each of T equal segments; `tsn_random` a frame drawn from
            each segment, seeded by clip and view; `uniform_fps` T frames `1 / fps` seconds apart,
            around the middle of the clip; `dense` T frames `stride` frames apart, around the
            middle (view 0) or from a drawn start (other views).
        fps: For `uniform_fps`, frames per second; otherwise 0.
        stride: For `dense`, the step in frames; otherwise 0.
        view: 0 is the plain view. Others are seeded variations of it.
        flip: Views other than 0 are mirrored with probability one half.
        random_crop: Views other than 0 cut out a drawn square (0.6 to 1.0 of the shorter side)
            in place of the centre.
        decoder: The decoder policy: `auto` is PyAV.
    """

    frames: int = 8
    sampling: str = "tsn"
    fps: float = 0.0
    stride: int = 0
    view: int = 0
    flip: bool = False
    random_crop: bool = False
    decoder: str = "auto"
    picture: Picture = field(default_factory=Picture)

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: a clip needs at least one frame")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"no sampling {self.sampling!r}; choose from {', '.join(SAMPLINGS)}")
        if self.decoder not in DECODERS:
            raise ValueError(f"no decoder {self.decoder!r}; choose from {', '.join(DECODERS)}")
        if (self.sampling == "uniform_fps") != (self.fps > 0) or not math.isfinite(self.fps):
            raise ValueError(
                f"sampling={self.sampling!r} with fps={self.fps}: uniform_fps needs a rate above 0 "
                "and no other sampling takes one"
            )
        if (self.sampling == "dense") != (self.stride > 0):
            raise ValueError(
                f"sampling={self.sampling!r} with stride={self.stride}: dense needs a stride of at "
                "least 1 and no other sampling takes one"
            )

    def identity(self) -> dict[str, Any]:
        """The JSON form that enters the frames' key."""
        return asdict(self)
