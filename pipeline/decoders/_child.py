"""What a decoding child does: one pass over a file, for every clip and frame set asked of it.

Loads numpy, PIL and av; never torch, unless a request names the torchcodec policy.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from varve.pipeline.config import FrameSet, Sound
from varve.pipeline.decoders import _index, images, sampling
from varve.pipeline.decoders._sound import Window
from varve.pipeline.decoders._stream import Undecodable, refused, words
from varve.pipeline.decoders._values import Decoded, Facts, Failure, Request, Stretch
from varve.pipeline.decoders.sampling import CLOCK_SLACK_SECONDS
from varve.pipeline.registry import variant

# Where one picture goes: (clip, frame set, place in T).
Place = tuple[int, FrameSet, int]


def decode(request: Request) -> list[Decoded | Failure]:
    """Make all pictures asked of one file.

    Returns:
        One answer per clip of the request, in order. Whatever is wrong with the file is an answer.

    Raises:
        ModuleNotFoundError: The policy's decoder is not installed: no fault of the file.
    """
    try:
        return _answer(request)
    except Undecodable as error:
        failure = Failure(error.reason, error.detail)
    except ModuleNotFoundError:
        raise
    except OSError as error:
        refusal = refused(error)
        failure = Failure(refusal.reason, refusal.detail)
    except Exception as error:
        # Damaged files find errors nobody thought of, and one file must not end a build.
        failure = Failure("corrupt", f"{type(error).__name__}: {error}")
    return [failure] * len(request.clips)


def _answer(request: Request) -> list[Decoded | Failure]:
    if os.path.isdir(request.path):
        return _Answer(request, images.read(request.path)).clips()
    sound = any(isinstance(frame_set.picture, Sound) for frame_set in request.frame_sets)
    try:
        return _Answer(request, _index.read(request.path, sound=sound)).clips()
    except _index.Contradicted:
        # Frames are not where the packets, or another decoder, have them: count them one by one.
        index = _index.read(request.path, proof=False, sound=sound)
        return _Answer(request, index, trusted=False).clips()


class _Answer:
    """The pictures and sounds of a request over one index."""

    def __init__(self, request: Request, index: _index.Index, trusted: bool = True) -> None:
        self.request, self.index, self.trusted = request, index, trusted
        self.arrays: dict[tuple[int, FrameSet], np.ndarray] = {}
        self.sounds: dict[int, dict[str, None]] = {}  # what is odd about them, each once
        self.size = (0, 0)
        if index.source is not None:
            self.size = (index.source.stream.width, index.source.stream.height)

    def clips(self) -> list[Decoded | Failure]:
        """Decode, and answer for every clip."""
        spans = [_span(stretch, self.index.times_N) for stretch in self.request.clips]
        wanted: dict[str, dict[int, list[Place]]] = defaultdict(lambda: defaultdict(list))
        heard: dict[Sound, dict[Window, list[Place]]] = defaultdict(lambda: defaultdict(list))
        for clip, (first, last) in enumerate(spans):
            for frame_set in dict.fromkeys(self.request.frame_sets) if first < last else ():
                seed = self.request.clips[clip].seed
                indices_T = sampling.indices(frame_set, self.index.times_N[first:last], seed)
                sound = frame_set.picture if isinstance(frame_set.picture, Sound) else None
                for place, number in enumerate((indices_T + first).tolist()):
                    if sound:
                        window = self.window(sound, self.request.clips[clip], number)
                        heard[sound][window].append((clip, frame_set, place))
                    else:
                        wanted[self.decoder(frame_set)][number].append((clip, frame_set, place))
        # First: to decode the frames may mean to open the file anew.
        for sound, windows in heard.items():
            self.listen(sound, windows)
        for decoder, places in wanted.items():
            self.fill(decoder, places)
        return [self.clip(clip, first, last) for clip, (first, last) in enumerate(spans)]

    def decoder(self, frame_set: FrameSet) -> str:
        """The decoder that serves this file under the frame set's policy."""
        if self.index.files:
            return "images"
        if frame_set.decoder == "auto" or not self.trusted:
            return "pyav"
        if frame_set.decoder == "decord" and self.index.hazard:
            return "pyav"
        return frame_set.decoder

    def fill(self, decoder: str, places: dict[int, list[Place]]) -> None:
        """Put every wanted frame's pictures into their arrays."""
        module = variant("decoders", decoder)
        frames: Iterator[tuple[int, Image.Image]] = module.pictures(
            self.request.path, self.index, sorted(places)
        )
        seen = 0
        for number, image in frames:
            self.size = image.size if seen == 0 else self.size
            seen += 1
            made: dict[sampling.Cut, np.ndarray] = {}
            for clip, frame_set, place in places[number]:
                seed = self.request.clips[clip].seed
                cut = sampling.cut(frame_set, *image.size, seed)
                if cut not in made:
                    made[cut] = sampling.picture(image, cut)
                self.array(clip, frame_set)[place] = made[cut]
        if seen != len(places):
            raise RuntimeError(f"{decoder} gave {seen} of {len(places)} frames")

    def window(self, sound: Sound, stretch: Stretch, number: int) -> Window:
        """The samples around the middle of the time for which a frame is shown."""
        times_N, (length,) = self.index.times_N, sound.shape
        shown_N = np.diff(times_N)
        last = float(np.median(shown_N)) if len(shown_N) else 0.0  # nothing tells how long it is
        shown = shown_N[number] if number < len(shown_N) else last
        middle = round((times_N[number] + shown / 2) * sound.rate)
        start, end = stretch.start_seconds, stretch.end_seconds
        low = 0 if start is None else round(start * sound.rate)
        high = round((times_N[-1] + last if end is None else end) * sound.rate)
        return Window(middle - length // 2, length, low, high)

    def listen(self, sound: Sound, windows: dict[Window, list[Place]]) -> None:
        """Put what is heard in windows into their arrays; silence where nothing is."""
        source, silent, lost = self.index.source, "no track", 0
        found: Mapping[Window, np.ndarray] = {}
        try:
            heard = source and source.heard(sound.rate, self.index.start_seconds, list(windows))
            if heard:
                found, silent, lost = heard.samples, "", heard.lost
        except Exception as error:  # a broken track must not take the pictures with it
            silent = f"its track cannot be decoded ({words(error)})"
        asked: Counter[int] = Counter()
        unheard: Counter[int] = Counter()
        audible = set()
        for window, places in windows.items():
            samples = found.get(window)
            for clip, frame_set, place in places:
                self.array(clip, frame_set)[place] = 0 if samples is None else samples
                asked[clip] += 1
                unheard[clip] += samples is None
                if samples is not None and samples.any():
                    audible.add(clip)
        for clip, count in asked.items():
            notes = [f"{lost} parts of it could not be decoded"] if lost else []
            if silent:
                notes = [f"{silent}, silence is in its place"]
            elif unheard[clip]:
                notes.append(f"none at {unheard[clip]} of {count} moments")
            elif clip not in audible:
                notes.append("nothing but silence")
            self.sounds.setdefault(clip, {}).update(dict.fromkeys(notes))

    def array(self, clip: int, frame_set: FrameSet) -> np.ndarray:
        one = frame_set.picture
        own = np.empty((frame_set.frames, *one.shape), one.dtype)
        return self.arrays.setdefault((clip, frame_set), own)

    def clip(self, clip: int, first: int, last: int) -> Decoded | Failure:
        index, stretch = self.index, self.request.clips[clip]
        if first >= last:
            start, end = stretch.start_seconds or 0.0, stretch.end_seconds
            return Failure(
                "too_short",
                f"no frame between {start:g} s and {'the end' if end is None else f'{end:g} s'}: "
                f"the file's {index.num_frames} frames end at {index.times_N[-1]:.3f} s",
            )
        used = sorted({self.decoder(frame_set) for frame_set in self.request.frame_sets})
        facts = Facts(
            num_frames=last - first,
            num_frames_claimed=index.num_frames_claimed,
            fps=index.fps,
            width=self.size[0],
            height=self.size[1],
            decoder="+".join(used),
            warning=index.warning,
            sound=", ".join(self.sounds[clip]) if clip in self.sounds else None,
        )
        frames = tuple(self.arrays[clip, frame_set] for frame_set in self.request.frame_sets)
        return Decoded(frames, facts)


def _span(stretch: Stretch, times_N: np.ndarray) -> tuple[int, int]:
    """The display indices [first, last) of a clip's frames; stretches that meet share none."""
    start = -np.inf if stretch.start_seconds is None else stretch.start_seconds
    end = np.inf if stretch.end_seconds is None else stretch.end_seconds
    first, last = np.searchsorted(times_N, [start - CLOCK_SLACK_SECONDS, end - CLOCK_SLACK_SECONDS])
    return int(first), int(last)
