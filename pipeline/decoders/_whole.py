"""Whole videos in a decoding process: the timeline of a file, and its parts one after the other.

A process keeps the last file open where it stopped, and the pictures of the last part, so that a
file whose pages or windows are requested in order is indexed once and decoded once, from its first
requested part on.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av.error
import numpy as np
from PIL import Image

from varve.pipeline.config import FrameSet
from varve.pipeline.decoders import _images, _index, sampling
from varve.pipeline.decoders._crop import Crop, apply_crop, choose_crop
from varve.pipeline.decoders._stream import Undecodable
from varve.pipeline.decoders._values import Decoded, Facts, Request, Timeline
from varve.pipeline.registry import source_digest, variant

# Frames between two windows that are decoded too. Where there are more, decoding starts at the
# keyframe before the window.
READ_OVER = 64


def read_index(path: str, proof: bool = True, audio: bool = False) -> _index.Index:
    """Index the frames of a video file or of a folder of frames; see `_index.read`.

    Raises:
        Undecodable: It has no frames that can be decoded.
    """
    return _images.read(path) if os.path.isdir(path) else _index.read(path, proof, audio)


def decoder_of(index: _index.Index, frame_set: FrameSet, trusted: bool = True) -> str:
    """Return the name of the decoder that reads an indexed file for a frame set.

    Args:
        trusted: False where a decoder contradicted an earlier index: PyAV decodes then.
    """
    if index.files:
        return "images"
    if frame_set.decoder == "auto" or not trusted:
        return "pyav"
    plain = getattr(variant("decoders", frame_set.decoder), "PLAIN_FILES_ONLY", False)
    return "pyav" if plain and index.hazard else frame_set.decoder


def pictures(
    decoder: str, path: str, index: _index.Index, wanted_N: list[int]
) -> Iterator[tuple[int, Image.Image]]:
    """Return an iterator of (display index, picture) over wanted frames, by a decoder's name.

    A decoder of the user's raises `DecoderError` in it where its own code fails.
    """
    module: Any = _images if decoder == "images" else variant("decoders", decoder)
    frames: Iterator[tuple[int, Image.Image]] = getattr(module, "pictures", module)(
        path, index, wanted_N
    )
    users = decoder != "images" and source_digest("decoders", decoder)
    return _checked(decoder, frames) if users else frames


class DecoderError(RuntimeError):
    """A user's decoder failed, or gave what it may not: an error in its code, not in the file."""


def _checked(
    decoder: str, frames: Iterator[tuple[int, Image.Image]]
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the frames of a user's decoder, whose errors other than of a file end the build."""
    try:
        for number, image in frames:
            if not isinstance(image, Image.Image):
                raise TypeError(f"frame {number} is a {type(image).__name__}, not a PIL image")
            yield number, image
    except (Undecodable, _index.Contradicted, OSError, av.error.FFmpegError):
        raise
    except Exception as error:
        raise DecoderError(f"decoder {decoder!r}: {type(error).__name__}: {error}") from error


def timeline(request: Request) -> Timeline:
    """Return which frames of a file its whole-video frame set keeps, and facts of the file.

    Raises:
        Undecodable: It has no frames that can be decoded.
    """
    stream = _opened(request)
    return Timeline(stream.index.times_N, stream.kept_K, stream.facts)


def parts(request: Request) -> list[Decoded]:
    """Return the frames of each requested page or window, and facts of the file.

    Raises:
        Undecodable: The file cannot be opened, or has other frames than its packets promised.
    """
    return [_part(request, clip.part) for clip in request.clips if clip.part]


def _part(request: Request, part: tuple[int, int]) -> Decoded:
    stream = _opened(request)
    try:
        return Decoded(stream.part(*part, request.frame_sets), stream.facts)
    except _index.Contradicted as error:
        promised_K = stream.kept_K
        stream = _opened(request, proof=False)
        if not np.array_equal(stream.kept_K, promised_K):
            raise Undecodable(
                "corrupt",
                f"decoding gives other frames than its packets promise ({error}); keep a fixed "
                "number of frames, such as --sampling tsn, or convert the file",
            ) from error
        return Decoded(stream.part(*part, request.frame_sets), stream.facts)


@dataclass(eq=False)
class _Stream:
    """An open file, the pictures of the last part, and the decoded frames that follow it."""

    key: tuple[Any, ...]
    path: str
    index: _index.Index
    decoder: str
    kept_K: np.ndarray = field(repr=False)
    facts: Facts
    position: int = 0
    frames: Iterator[tuple[int, Image.Image]] | None = None
    # The last window: the first of its kept frames and the one after it, and its pictures.
    window: tuple[int, int] = (0, 0)
    known: dict[FrameSet, np.ndarray] = field(default_factory=dict, repr=False)

    def part(
        self, first: int, count: int, frame_sets: tuple[FrameSet, ...]
    ) -> tuple[np.ndarray, ...]:
        """Return `count` kept frames from the `first` on, by frame set: uint8 [frames, S, S, 3].

        A window has T frames; the last is repeated where there are fewer.
        """
        arrays = {
            fs: np.empty((count if fs.in_pages else fs.frames, *fs.picture.shape), np.uint8)
            for fs in frame_sets
        }
        shared = 0
        if self.window[0] <= first < self.window[1] and arrays.keys() <= self.known.keys():
            shared = min(self.window[1] - first, count)
            for frame_set, array in arrays.items():
                array[:shared] = self.known[frame_set][first - self.window[0] :][:shared]
        for i in range(shared, count):
            image = self._picture(first + i)
            cropped: dict[Crop, np.ndarray] = {}
            for frame_set, array in arrays.items():
                crop = choose_crop(frame_set, *image.size, "")
                if crop not in cropped:
                    cropped[crop] = apply_crop(image, crop)
                array[i] = cropped[crop]
        for array in arrays.values():
            array[count:] = array[count - 1]
        self.window = first, first + count
        self.known = {fs: array for fs, array in arrays.items() if not fs.in_pages}
        return tuple(arrays.values())

    def _picture(self, wanted: int) -> Image.Image:
        """Return a kept frame, by reading on where few frames are before it, else by seeking."""
        if self.frames is None or not 0 <= wanted - self.position <= READ_OVER:
            self.position = wanted
            rest = self.kept_K[wanted:].tolist()
            self.frames = pictures(self.decoder, self.path, self.index, rest)
        while True:
            number, image = next(self.frames, (-1, None))
            if image is None or number != self.kept_K[self.position]:
                raise _index.Contradicted(f"frame {self.kept_K[self.position]} was not decoded")
            self.position += 1
            if self.position > wanted:
                return image


_LAST: list[_Stream] = []


def _opened(request: Request, proof: bool = True) -> _Stream:
    """Return the request's file, open; the last one where it is the same and has not changed."""
    first = request.frame_sets[0]
    stat = os.stat(request.path) if os.path.exists(request.path) else None
    version = stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    key = (request.path, version, first.grid, first.decoder)
    if not _LAST or _LAST[0].key != key or not proof:
        _LAST.clear()
        index = read_index(request.path, proof)
        kept_K, decoder = sampling.kept(first, index.times_N), decoder_of(index, first, proof)
        # The first picture shows the size as it is seen, after a rotation.
        _, image = next(pictures(decoder, request.path, index, kept_K[:1].tolist()))
        facts = Facts(
            num_frames=index.num_frames,
            num_frames_claimed=index.num_frames_claimed,
            fps=index.fps,
            width=image.size[0],
            height=image.size[1],
            decoder=decoder,
            warning=index.warning,
        )
        _LAST.append(_Stream(key, request.path, index, decoder, kept_K, facts))
    return _LAST[0]


def forget() -> None:
    """Close the file that is open; the next page opens its file anew, where decoding failed."""
    _LAST.clear()
