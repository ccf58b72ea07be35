"""The work of a decoding process: one pass over a file, for all its clips and frame sets.

Loads numpy, PIL and av; never torch, unless a request names the torchcodec decoder.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from varve.pipeline.config import FrameSet, Sound
from varve.pipeline.decoders import _index, _whole, sampling
from varve.pipeline.decoders._audio import Window
from varve.pipeline.decoders._crop import Crop, apply_crop, choose_crop
from varve.pipeline.decoders._stream import Undecodable, error_text, from_os_error
from varve.pipeline.decoders._values import Decoded, Facts, Failure, Request, Stretch, Timeline
from varve.pipeline.decoders._whole import DecoderError, decoder_of, pictures, read_index
from varve.pipeline.decoders.sampling import CLOCK_SLACK_SECONDS, SamplingError

# Where one frame goes: (clip, frame set, position in T).
Target = tuple[int, FrameSet, int]


def decode(request: Request) -> list[Decoded | Timeline | Failure]:
    """Read all frames of a request, in this process.

    Returns:
        One result per clip of the request, in order; for a request without clips, the timeline of
        the file. Whatever is wrong with the file is a Failure.

    Raises:
        ModuleNotFoundError: The decoder's library is not installed: no fault of the file.
        SamplingError: The sampling rule failed: no fault of the file.
        DecoderError: A decoder of the user's failed: no fault of the file.
        RuntimeError: A rule or decoder of the user's is not loaded here, or has changed.
    """
    for frame_set in request.frame_sets:
        frame_set.check_code()
    whole = request.frame_sets and request.frame_sets[0].whole
    try:
        if not whole:
            return [*_read(request)]
        return [*(_whole.parts(request) if request.clips else [_whole.timeline(request)])]
    except Undecodable as error:
        failure = Failure(error.reason, error.detail)
    except (ModuleNotFoundError, SamplingError, DecoderError):
        raise
    except OSError as error:
        undecodable = from_os_error(error)
        failure = Failure(undecodable.reason, undecodable.detail)
    except Exception as error:
        # Damaged files cause errors that nobody foresaw, and one file must not end a build.
        failure = Failure("corrupt", f"{type(error).__name__}: {error}")
    _whole.forget()
    return [failure] * max(1, len(request.clips))


def _read(request: Request) -> list[Decoded | Failure]:
    audio = any(isinstance(frame_set.picture, Sound) for frame_set in request.frame_sets)
    try:
        return _FileReader(request, read_index(request.path, audio=audio)).clips()
    except _index.Contradicted:
        # The packets, or another decoder, disagree with the frames: count them one by one.
        index = read_index(request.path, proof=False, audio=audio)
        return _FileReader(request, index, trusted=False).clips()


class _FileReader:
    """Pictures and waveforms of a request, by one index of its file.

    Args:
        trusted: False where a decoder contradicted an earlier index: PyAV decodes then.
    """

    def __init__(self, request: Request, index: _index.Index, trusted: bool = True) -> None:
        self.request, self.index, self.trusted = request, index, trusted
        self.arrays: dict[tuple[int, FrameSet], np.ndarray] = {}
        self.audio_notes: dict[int, dict[str, None]] = {}  # by clip, each note once
        self.size = (0, 0)
        if index.source is not None:
            self.size = (index.source.stream.width, index.source.stream.height)

    def clips(self) -> list[Decoded | Failure]:
        """Decode, and return the result of every clip."""
        spans = [_span(stretch, self.index.times_N) for stretch in self.request.clips]
        frames: dict[str, dict[int, list[Target]]] = defaultdict(lambda: defaultdict(list))
        audio: dict[Sound, dict[Window, list[Target]]] = defaultdict(lambda: defaultdict(list))
        for clip, (first, last) in enumerate(spans):
            for frame_set in dict.fromkeys(self.request.frame_sets) if first < last else ():
                seed = self.request.clips[clip].seed
                indices_T = sampling.indices(frame_set, self.index.times_N[first:last], seed)
                sound = frame_set.picture if isinstance(frame_set.picture, Sound) else None
                for position, index in enumerate((indices_T + first).tolist()):
                    target = (clip, frame_set, position)
                    if sound:
                        window = self.window(sound, self.request.clips[clip], index)
                        audio[sound][window].append(target)
                    else:
                        frames[self.decoder(frame_set)][index].append(target)
        # Audio first: decoding the frames may open the file anew.
        for sound, windows in audio.items():
            self.read_audio(sound, windows)
        for decoder, targets in frames.items():
            self.read_frames(decoder, targets)
        return [self.clip(clip, first, last) for clip, (first, last) in enumerate(spans)]

    def decoder(self, frame_set: FrameSet) -> str:
        """Return the name of the decoder that reads this file for a frame set."""
        return decoder_of(self.index, frame_set, self.trusted)

    def read_frames(self, decoder: str, targets: dict[int, list[Target]]) -> None:
        """Decode frames by their display indices, and write their pictures into the arrays."""
        frames = pictures(decoder, self.request.path, self.index, sorted(targets))
        count = 0
        for index, image in frames:
            self.size = image.size if count == 0 else self.size
            count += 1
            cropped: dict[Crop, np.ndarray] = {}
            for clip, frame_set, position in targets[index]:
                crop = choose_crop(frame_set, *image.size, self.request.clips[clip].seed)
                if crop not in cropped:
                    cropped[crop] = apply_crop(image, crop)
                self.array(clip, frame_set)[position] = cropped[crop]
        if count != len(targets):
            raise RuntimeError(f"{decoder} gave {count} of {len(targets)} frames")

    def window(self, sound: Sound, stretch: Stretch, index: int) -> Window:
        """Return the samples around the middle of the time for which a frame is shown."""
        times_N, (length,) = self.index.times_N, sound.shape
        shown_N = np.diff(times_N)
        last = float(np.median(shown_N)) if len(shown_N) else 0.0  # no file says it of its last
        shown = shown_N[index] if index < len(shown_N) else last
        middle = round((times_N[index] + shown / 2) * sound.rate)
        start, end = stretch.start_seconds, stretch.end_seconds
        low = 0 if start is None else round(start * sound.rate)
        high = round((times_N[-1] + last if end is None else end) * sound.rate)
        return Window(middle - length // 2, length, low, high)

    def read_audio(self, sound: Sound, windows: dict[Window, list[Target]]) -> None:
        """Write the samples of windows into the arrays, with zeros where there are none."""
        source, silent, lost = self.index.source, "no track", 0
        samples: Mapping[Window, np.ndarray] = {}
        try:
            track = source and source.read_audio(
                sound.rate, self.index.start_seconds, list(windows)
            )
            if track:
                samples, silent, lost = track.samples, "", track.lost
        except Exception as error:  # a broken track must not lose the pictures
            silent = f"its track cannot be decoded ({error_text(error)})"
        heard: dict[int, list[np.ndarray]] = defaultdict(list)
        count: Counter[int] = Counter()
        for window, targets in windows.items():
            waveform = samples.get(window)
            for clip, frame_set, position in targets:
                self.array(clip, frame_set)[position] = 0 if waveform is None else waveform
                count[clip] += 1
                heard[clip] += [] if waveform is None else [waveform]
        for clip, waveforms in heard.items():
            notes = [f"{lost} parts of it could not be decoded"] if lost else []
            if silent:
                notes = [f"{silent}, replaced by silence"]
            elif empty := count[clip] - len(waveforms):
                notes.append(f"none at {empty} of {count[clip]} moments")
            elif not any(waveform.any() for waveform in waveforms):
                notes.append("nothing but silence")
            self.audio_notes.setdefault(clip, {}).update(dict.fromkeys(notes))

    def array(self, clip: int, frame_set: FrameSet) -> np.ndarray:
        """Return the array of a clip's frames [T, ...], made on first use."""
        picture = frame_set.picture
        if (clip, frame_set) not in self.arrays:
            shape = (frame_set.frames, *picture.shape)
            self.arrays[clip, frame_set] = np.empty(shape, picture.dtype)
        return self.arrays[clip, frame_set]

    def clip(self, clip: int, first: int, last: int) -> Decoded | Failure:
        """Return the result of a clip with the display indices [first, last)."""
        index, stretch = self.index, self.request.clips[clip]
        if first >= last:
            start, end = stretch.start_seconds or 0.0, stretch.end_seconds
            return Failure(
                "too_short",
                f"no frame between {start:g} s and {'the end' if end is None else f'{end:g} s'}: "
                f"the file's {index.num_frames} frames are from {index.times_N[0]:.3f} s to "
                f"{index.times_N[-1]:.3f} s",
            )
        decoders = sorted({self.decoder(frame_set) for frame_set in self.request.frame_sets})
        facts = Facts(
            num_frames=last - first,
            num_frames_claimed=index.num_frames_claimed,
            fps=index.fps,
            width=self.size[0],
            height=self.size[1],
            decoder="+".join(decoders),
            warning=index.warning,
            sound=", ".join(self.audio_notes[clip]) if clip in self.audio_notes else None,
        )
        frames = tuple(self.arrays[clip, frame_set] for frame_set in self.request.frame_sets)
        return Decoded(frames, facts)


def _span(stretch: Stretch, times_N: np.ndarray) -> tuple[int, int]:
    """Return the display indices [first, last) of a clip; intervals that meet share no frame."""
    start = -np.inf if stretch.start_seconds is None else stretch.start_seconds
    end = np.inf if stretch.end_seconds is None else stretch.end_seconds
    first, last = np.searchsorted(times_N, [start - CLOCK_SLACK_SECONDS, end - CLOCK_SLACK_SECONDS])
    return int(first), int(last)
