"""Configuration is identity: what is asked of a build, as frozen values with JSON forms.

Light to import: a decoder's child process needs it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

SAMPLINGS = ("tsn", "tsn_random", "uniform_fps", "dense")
DTYPES = ("float16", "float32", "bfloat16")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "squash")
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

    dtype: ClassVar[str] = "uint8"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS or self.resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"no picture with interpolation={self.interpolation!r}, resize_mode="
                f"{self.resize_mode!r}; choose from {', '.join(INTERPOLATIONS)} and "
                f"{', '.join(RESIZE_MODES)}"
            )
        if self.size < 1 or (self.resize_mode == "shortest" and self.resize < self.size):
            raise ValueError(
                f"a {self.size} x {self.size} picture cannot be cut out of a frame whose shorter "
                f"side is {self.resize}: resize must be at least size, and size at least 1"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one, RGB."""
        return (self.size, self.size, 3)


@dataclass(frozen=True)
class Sound:
    """What is heard around the moment of a frame, as a network's own configuration says.

    A stretch of `seconds` with the moment in its middle, mono at `rate` samples a second; full
    scale is from -1 to 1. Before a clip's start and after its end it is silent.
    """

    rate: int = 16000
    seconds: float = 1.0

    dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        if self.rate < 1 or not 0 < self.rate * self.seconds < math.inf:
            raise ValueError(f"no sound of {self.seconds} seconds at {self.rate} samples a second")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one."""
        return (round(self.rate * self.seconds),)


@dataclass(frozen=True)
class FrameSet:
    """Which T frames of a clip are looked at, as which pictures or sounds. Decides their key.

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
        picture: What is made of each frame; a `Sound` of what is heard around it.
    """

    frames: int = 8
    sampling: str = "tsn"
    fps: float = 0.0
    stride: int = 0
    view: int = 0
    flip: bool = False
    random_crop: bool = False
    decoder: str = "auto"
    picture: Picture | Sound = field(default_factory=Picture)

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

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> Self:
        """The frame set that this is the identity of."""
        kind = Sound if "rate" in identity["picture"] else Picture
        return cls(**{**identity, "picture": kind(**identity["picture"])})

    def request(self) -> dict[str, Any]:
        """What a `BuildSpec` says to have it as its plain view."""
        names = ("frames", "sampling", "fps", "stride", "decoder")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BuildSpec:
    """What features a store is to hold. Everything here decides values; paths and workers do not.

    Attributes:
        backbones: NAME:TAG each, such as "ViT-B-16:openai".
        keep: Features to keep: STAGE or STAGE:REDUCTION, of every backbone that has the stage.
            Empty: each backbone's last vector.
        views: How many views of each clip: 0 the plain one, others seeded variations.
        precision: Of the networks' parameters and activations.
        dtype: Of the features on disk.
        text: Also keep text features of the class prompts, for backbones with a text tower.
    """

    backbones: tuple[str, ...]
    keep: tuple[str, ...] = ()
    frames: int = 8
    sampling: str = "tsn"
    fps: float = 0.0
    stride: int = 0
    views: int = 1
    flip: bool = False
    random_crop: bool = False
    decoder: str = "auto"
    precision: str = "float32"
    dtype: str = "float16"
    text: bool = True

    def __post_init__(self) -> None:
        for name in ("backbones", "keep"):
            if isinstance(getattr(self, name), str):  # ("a") is no tuple, and easily written
                object.__setattr__(self, name, (getattr(self, name),))
        if not self.backbones:
            raise ValueError("no backbone asked for; name one, such as --backbone ViT-B-16:openai")
        for name, value in (("precision", self.precision), ("dtype", self.dtype)):
            if value not in DTYPES:
                raise ValueError(f"no {name} {value!r}; choose from {', '.join(DTYPES)}")
        if self.views < 1:
            raise ValueError(f"views={self.views}: at least the plain view is needed")
        varies = self.flip or self.random_crop or self.sampling == "tsn_random"
        if self.views > 1 and not (varies or self.sampling == "dense"):
            raise ValueError(
                f"views={self.views} would be {self.views} times the same frames: add --flip, "
                "--random-crop or --sampling tsn_random"
            )
        if self.views == 1 and (self.flip or self.random_crop):
            raise ValueError("flip and random_crop vary views 1 and up; ask for --views 2 or more")
        self.frame_sets(Picture())

    def frame_sets(self, picture: Picture | Sound) -> tuple[FrameSet, ...]:
        """The frame set of each view, as pictures or sounds of one kind. View 0 is never varied.

        Sounds are not mirrored or cropped, and whichever decoder gives the frames, PyAV gives them.
        """
        seen = isinstance(picture, Picture)
        return tuple(
            FrameSet(
                frames=self.frames,
                sampling=self.sampling,
                fps=self.fps,
                stride=self.stride,
                view=view,
                flip=self.flip and view > 0 and seen,
                random_crop=self.random_crop and view > 0 and seen,
                decoder=self.decoder if seen else "auto",
                picture=picture,
            )
            for view in range(self.views)
        )


@dataclass(frozen=True)
class Runtime:
    """How a build runs. Nothing here decides a value.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        workers: Worker processes; 0 chooses by cores.
        scheduler: Address of a running Dask scheduler; "" for a cluster of the build's own.
        serial: No cluster: one block after the other in this process, for debugging.
        deadline_seconds: For the decoding of one file.
        retry: Try quarantined clips again although their bytes have not changed.
    """

    device: str = "auto"
    workers: int = 0
    scheduler: str = ""
    serial: bool = False
    deadline_seconds: float = 120.0
    retry: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"no device {self.device!r}; choose from auto, cpu, cuda")
        if self.workers < 0 or not self.deadline_seconds > 0:
            raise ValueError(
                f"workers={self.workers}, deadline_seconds={self.deadline_seconds}: workers must "
                "be 0 (choose by cores) or more, the deadline above 0"
            )
