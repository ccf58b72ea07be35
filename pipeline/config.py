"""Configuration of a build, as frozen values with JSON forms that enter the cache keys.

Each option is declared once, in `BuildSpec` or `Runtime`: the command line, `diff` and the messages
are made from the declaration. Light to import: the child processes of the decoders need it.
"""

import inspect
import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Self

from varve.pipeline.registry import available, source_digest, variant

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float16", "float32", "bfloat16")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "squash")
# What a build asks of all its frame sets.
FRAME_OPTIONS = ("frames", "sampling", "fps", "stride", "decoder", "window_step")
# What a sampling rule may take by name: numbers of the frame set, its view, a source of draws.
CORNERS = 4  # of five crops, beside the centre
RULE_OPTIONS = ("fps", "stride", "view", "random")
# The sampling of whole videos: every frame, every N-th (`stride`), or F a second (`fps`). A cell
# has a page, so many consecutive frames of a file; or, with `window_step`, a window of a clip.
WHOLE = "all"
PAGE_FRAMES = 64


@dataclass(frozen=True)
class Picture:
    """Preprocessing of a frame into a square picture, by the configuration of a network.

    The shorter side of the frame is resized to `resize` pixels (Pillow, antialiased), and the
    centre of `size` x `size` pixels is cropped. With `resize_mode` "squash" the whole frame is
    resized to the square.

    Raises:
        ValueError: An unknown interpolation or resize mode, or sizes that do not go together.
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

    def check_corners(self) -> None:
        """Check that the picture is a part of the resized frame.

        Raises:
            ValueError: It is the whole frame, which has no corners beside its centre.
        """
        if self.resize_mode != "shortest":
            raise ValueError(
                "five_crop of a network that sees the whole frame in its picture: there are no "
                "corners beside it; leave five_crop out"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one picture: height, width, RGB."""
        return (self.size, self.size, 3)


@dataclass(frozen=True)
class Sound:
    """The audio around the time of a frame, by the configuration of a network.

    A waveform of `seconds` with the frame's time in its middle, mono, `rate` samples a second,
    full scale from -1 to 1. It is silent before the start of a clip and after its end.

    Raises:
        ValueError: The waveform would have no samples, or infinitely many.
    """

    rate: int = 16000
    seconds: float = 1.0

    dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        if self.rate < 1 or not 0 < self.rate * self.seconds < math.inf:
            raise ValueError(f"no sound of {self.seconds} seconds at {self.rate} samples a second")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one waveform: samples."""
        return (round(self.rate * self.seconds),)


def rule_options(sampling: str) -> tuple[str, ...]:
    """Names of the options that a sampling rule takes: its parameters after the first two.

    Raises:
        ValueError: There is no such rule, or it takes what no frame set has.

    >>> rule_options("dense")
    ('stride', 'view', 'random')
    """
    if sampling not in (known := available("samplings")):
        raise ValueError(f"no sampling {sampling!r}; choose from {', '.join(known)}")
    rule = variant("samplings", sampling)
    options = tuple(inspect.signature(getattr(rule, "choose", rule)).parameters)[2:]
    if unknown := [option for option in options if option not in RULE_OPTIONS]:
        raise ValueError(
            f"sampling {sampling!r} takes {', '.join(unknown)}; the options of a rule are "
            f"{', '.join(RULE_OPTIONS)}"
        )
    return options


def rules_with(option: str) -> list[str]:
    """Names of the sampling rules that take an option.

    >>> rules_with("fps")
    ['uniform_fps']
    """
    return [name for name in available("samplings") if option in rule_options(name)]


@dataclass(frozen=True)
class FrameSet:
    """The T frames of a clip that are read, as pictures or waveforms. Decides their key.

    Attributes:
        frames: Number of frames per clip, T.
        sampling: Name of the rule that chooses the frames: a file of
            `varve.pipeline.decoders.sampling`, or a registered function; or `all`, for whole
            videos, whose cells have `PAGE_FRAMES` frames, or windows of T.
        fps: Frames per second, for a rule that takes `fps`; otherwise 0.
        stride: Step in frames, for a rule that takes `stride`; otherwise 0. `all` takes either.
        view: 0 for the plain view. Views from 1 on are seeded variations of it; -1 to -4 show the
            corners of its picture, upper left and right, lower left and right.
        flip: Whether views other than 0 are mirrored with probability one half.
        random_crop: Whether views other than 0 show a drawn square (0.6 to 1.0 of the shorter
            side) in place of the centre.
        window_step: Kept frames from the start of a window to that of the next, for windows of T
            frames of whole videos; otherwise 0.
        decoder: Name of the decoder. `auto` is PyAV; `pyav` becomes `auto`, to have one key.
        picture: What each frame becomes: a picture of it, or the audio around its time.
        code: Digests of the user's own sampling rule and decoder, "" where both are Varve's.

    Raises:
        ValueError: There is no such rule or decoder, or the options do not go together.
    """

    frames: int = 8
    sampling: str = "tsn"
    fps: float = 0.0
    stride: int = 0
    view: int = 0
    flip: bool = False
    random_crop: bool = False
    window_step: int = 0
    decoder: str = "auto"
    picture: Picture | Sound = field(default_factory=Picture)
    code: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(self.frames, Integral) or self.frames < 1:
            raise ValueError(f"frames={self.frames}: give a whole number, of one frame at least")
        object.__setattr__(self, "frames", int(self.frames))
        if self.decoder == "pyav":
            object.__setattr__(self, "decoder", "auto")
        if self.decoder not in ("auto", *(decoders := available("decoders"))):
            raise ValueError(
                f"no decoder {self.decoder!r}; choose from auto, {', '.join(decoders)}"
            )
        if self.window_step and not self.whole:
            raise ValueError(
                f"sampling={self.sampling!r} with window_step={self.window_step}: windows slide "
                "over whole videos, sampling='all'"
            )
        if self.whole:
            self._check_whole()
        options = () if self.whole else rule_options(self.sampling)
        for option in () if self.whole else ("fps", "stride"):
            value = getattr(self, option)
            if (option in options) != (value > 0) or not math.isfinite(value):
                raise ValueError(
                    f"sampling={self.sampling!r} with {option}={value}: "
                    f"{', '.join(rules_with(option))} needs a finite {option} above 0 and no other "
                    "sampling takes one"
                )
        if self.view < -CORNERS or (self.view < 0 and (self.flip or self.random_crop)):
            raise ValueError(f"view={self.view}: the corners are -1 to -{CORNERS}, and plain")
        if self.view < 0 and isinstance(self.picture, Picture):
            self.picture.check_corners()
        object.__setattr__(self, "code", self._code())

    @property
    def whole(self) -> bool:
        """True for whole videos: a cell then has a page, or a window, of the video's frames."""
        return self.sampling == WHOLE

    @property
    def in_pages(self) -> bool:
        """True for whole videos whose cells have pages."""
        return self.whole and not self.window_step

    @property
    def grid(self) -> str:
        """Name of the frames that are kept of a whole video, such as "stride-1" or "fps-4"."""
        return f"fps-{self.fps:g}" if self.fps else f"stride-{self.stride}"

    def _check_whole(self) -> None:
        if not self.fps and not self.stride:
            object.__setattr__(self, "stride", 1)
        if self.window_step < 0:
            raise ValueError(f"window_step={self.window_step}: give a step of at least one frame")
        if not self.window_step:
            object.__setattr__(self, "frames", PAGE_FRAMES)
        numbers_fit = (self.fps > 0) != (self.stride > 0) and 0 <= self.fps < math.inf
        if not numbers_fit or self.stride < 0 or self.view:
            raise ValueError(
                f"sampling='all' with fps={self.fps}, stride={self.stride}"
                + (f", view={self.view}" if self.view else "")
                + ": give a finite fps above 0 or a stride of at least 1, not both, and one view"
            )
        if isinstance(self.picture, Sound):
            raise ValueError(
                "sampling='all' keeps pictures: build an audio backbone with another sampling"
            )

    def _code(self) -> str:
        digests = {
            self.sampling: "" if self.whole else source_digest("samplings", self.sampling),
            self.decoder: "" if self.decoder == "auto" else source_digest("decoders", self.decoder),
        }
        return ", ".join(f"{name} {digest}" for name, digest in digests.items() if digest)

    def check_code(self, code: str | None = None) -> None:
        """Check that the user's own rule and decoder are those that the frames were named by.

        Args:
            code: The digests to expect; by default those taken when this frame set was made.

        Raises:
            RuntimeError: They have changed, or are not loaded in this process.
        """
        expected, reason = self.code if code is None else code, "their code has changed"
        try:
            if self._code() == expected:
                return
        except ValueError as error:
            reason = str(error)
        raise RuntimeError(
            f"the frames of sampling {self.sampling!r}, decoder {self.decoder!r} cannot be read "
            f"again: {reason}; load the same --plugin files in every process, or build again"
        )

    def identity(self) -> dict[str, Any]:
        """The JSON form that enters the frames' key, without `code` and `window_step` if unused."""
        unused = {name for name in ("code", "window_step") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> Self:
        """Return the frame set that has this identity.

        Raises:
            ValueError: Its rule or decoder is not loaded in this process.
            RuntimeError: Their code has changed since.
        """
        kind = Sound if "rate" in identity["picture"] else Picture
        fields = {name: value for name, value in identity.items() if name != "code"}
        frame_set = cls(**{**fields, "picture": kind(**identity["picture"])})
        frame_set.check_code(identity.get("code", ""))
        return frame_set

    def request(self) -> dict[str, Any]:
        """Return the options of a `BuildSpec` whose plain view is this frame set."""
        return {name: getattr(self, name) for name in FRAME_OPTIONS}


@dataclass(frozen=True)
class Option:
    """Declaration of an option: the command line, `diff` and messages are made from it.

    Attributes:
        help: One sentence for `--help`.
        choices: The allowed values, or a kind of the registry whose names are allowed.
        flag: The name on the command line, where it is not the field's.
        in_key: Whether the option decides the key of a column, so that `diff` compares it.
    """

    help: str
    choices: tuple[str, ...] | str = ()
    flag: str = ""
    in_key: bool = True


def option(default: Any, help: str, **attributes: Any) -> Any:
    """Declare a field of a configuration: its default, and the attributes of its `Option`."""
    return field(default=default, metadata={"option": Option(help, **attributes)})


def options_of(config: type) -> dict[str, Option]:
    """Return the options that a configuration declares, by the name of the field."""
    return {f.name: f.metadata["option"] for f in fields(config) if "option" in f.metadata}


def _check_choices(config: Any) -> None:
    for name, declared in options_of(type(config)).items():
        value, choices = getattr(config, name), declared.choices
        if isinstance(choices, tuple) and choices and value not in choices:
            raise ValueError(f"no {name} {value!r}; choose from {', '.join(choices)}")


@dataclass(frozen=True)
class BuildSpec:
    """The features that a build gives a store. Every option decides values; paths do not.

    `varve build --help` prints the options with their documentation.

    Raises:
        ValueError: A value is not allowed, or two options contradict each other.
    """

    backbones: Sequence[str] = field(
        metadata={
            "option": Option(
                "NAME:TAG, NAME:/path/weights.safetensors or NAME:random-SEED.", flag="backbone"
            )
        }
    )
    keep: Sequence[str] = option(
        (),
        choices="reductions",
        help="STAGE or STAGE:REDUCTION to keep, of every backbone that has the stage. "
        "Default: the last vector of each backbone.",
    )
    frames: int = option(8, help="Number of frames per clip.")
    sampling: str = option(
        "tsn",
        choices="samplings",
        help="Rule that chooses the frames of a clip; all keeps the whole video, whatever --frames "
        "says without --window-step.",
    )
    fps: float = option(0.0, help="Frames per second, for a rule that takes it (uniform_fps, all).")
    stride: int = option(0, help="Step in frames, for a rule that takes it (dense, all).")
    window_step: int = option(
        0,
        help="With --sampling all, for networks with temporal modules: windows of --frames kept "
        "frames, one every so many.",
    )
    views: int = option(1, help="Number of views of each clip; the first is never varied.")
    flip: bool = option(False, help="Mirror the views after the first with probability 1/2.")
    random_crop: bool = option(False, help="Crop the views after the first at random.")
    five_crop: bool = option(
        False, help="Also keep the four corners of the picture, to test on five crops."
    )
    decoder: str = option("auto", choices="decoders", help="Video decoder; auto is PyAV.")
    precision: str = option(
        "float32",
        choices=DTYPES,
        help="Number format of parameters and activations; bfloat16 is 4 x faster on some CPUs.",
    )
    dtype: str = option("float16", choices=DTYPES, help="Number format of features on disk.")
    text: bool = option(
        True, in_key=False, help="Also keep text features of the class prompts (CLIP)."
    )

    def __post_init__(self) -> None:
        for name in ("backbones", "keep"):
            names = getattr(self, name)  # ("a") is no tuple, and easily written
            names = (names,) if isinstance(names, str) else names
            if not isinstance(names, Iterable) or isinstance(names, Set | bytes):
                raise ValueError(f"{name}={names!r}: give a name, or names in an order")
            object.__setattr__(self, name, names := tuple(names))
            if not all(isinstance(text, str) and text for text in names):
                raise ValueError(f"{name}={names!r}: each is a text that is not empty")
        for name in ("frames", "stride", "window_step", "views"):
            number = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(number))
            except TypeError:  # 8.0 would be another cache key than 8
                raise ValueError(f"{name}={number!r}: give a whole number") from None
        if not self.backbones:
            raise ValueError("no backbone asked for; name one, such as --backbone ViT-B-16:openai")
        _check_choices(self)
        if self.views < 1:
            raise ValueError(f"views={self.views}: at least the plain view is needed")
        draws = self.sampling != WHOLE and "random" in rule_options(self.sampling)
        varies = self.flip or self.random_crop or draws
        if self.views > 1 and not varies:
            raise ValueError(
                f"views={self.views} would be {self.views} times the same frames: add --flip, "
                f"--random-crop or --sampling {' or '.join(rules_with('random'))}"
            )
        if self.views == 1 and (self.flip or self.random_crop):
            raise ValueError("flip and random_crop vary views 1 and up; ask for --views 2 or more")
        self.frame_sets(Picture())

    def changed(self, **changes: Any) -> Self:
        """Return the request with some options replaced; a value of None replaces nothing.

        The numbers of another sampling rule, and the variations of views that are no longer asked
        for, return to their defaults.

        Raises:
            ValueError: The options contradict each other.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes.get("sampling", self.sampling) != self.sampling:
            changes = {"fps": 0.0, "stride": 0, "window_step": 0} | changes
        if changes.get("views") == 1:
            changes = {"flip": False, "random_crop": False} | changes
        return replace(self, **changes)

    def frame_sets(self, picture: Picture | Sound) -> tuple[FrameSet, ...]:
        """Return the frame set of each view and corner, as pictures or as audio.

        View 0 is never varied.

        Audio is not mirrored or cropped, and PyAV decodes it whatever decodes the frames.
        """
        visual = isinstance(picture, Picture)
        decoder = self.decoder if visual else "auto"
        plain = FrameSet(
            self.frames, self.sampling, self.fps, self.stride, window_step=self.window_step,
            decoder=decoder, picture=picture,
        )  # fmt: skip
        varied = replace(plain, flip=self.flip and visual, random_crop=self.random_crop and visual)
        corners = range(-1, -1 - CORNERS, -1) if self.five_crop and visual else ()
        return (
            plain,
            *(replace(varied, view=view) for view in range(1, self.views)),
            *(replace(plain, view=view) for view in corners),
        )


@dataclass(frozen=True)
class Runtime:
    """Device, processes and deadlines of a build. No option decides a value.

    `varve build --help` prints the options with their documentation.

    Raises:
        ValueError: A value is not allowed.
    """

    device: str = option("auto", choices=DEVICES, help="Device of the networks.")
    workers: int = option(0, help="Number of worker processes; 0 chooses by the number of cores.")
    scheduler: str = option("", help="tcp://HOST:PORT of a running Dask scheduler.")
    serial: bool = option(False, help="Run in this process without a cluster, for debugging.")
    deadline_seconds: float = option(
        120.0, flag="deadline", help="Seconds that the decoding of one file may take."
    )
    retry: bool = option(
        False, help="Try quarantined clips again although their bytes have not changed."
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.workers < 0 or not self.deadline_seconds > 0:
            raise ValueError(
                f"workers={self.workers}, deadline_seconds={self.deadline_seconds}: workers must "
                "be 0 (choose by cores) or more, the deadline above 0"
            )
