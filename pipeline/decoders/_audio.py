"""The audio around the times of a file's frames.

One track at one rate, the mean of its channels, on the clock of the file: sample 0 is at the time
0 of the frames. libswresample does all of it, with the options of

    ffmpeg -i FILE -f f32le -af \\
        aresample=RATE:async=1:first_pts=0:ochl=mono:osf=flt:rematrix_maxval=1 OUT

for a file whose clock starts at 0, in a release that leaves out the samples which a codec puts
before a track. Gaps in a track are silent. Drifts of less than 0.1 seconds between its clock and
its samples are not corrected. Packets that cannot be decoded are silent, and counted.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from typing import cast

import av
import av.filter
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer

MEAN = "ochl=mono:osf=flt:rematrix_maxval=1"

type AudioPacket = av.Packet[AudioStream]


@dataclass(frozen=True)
class Window:
    """Samples [begin, begin + length) of a track; those outside [low, high) are zeros."""

    begin: int
    length: int
    low: float
    high: float


def best_stream(container: InputContainer) -> AudioStream | None:
    """Return the audio stream that FFmpeg chooses by default; None where there is none."""
    stream = container.streams.best("audio")
    return None if stream is None or stream.codec_context is None else cast(AudioStream, stream)


@dataclass(frozen=True)
class Track:
    """Samples of an audio track.

    Attributes:
        samples: float32 [length] by window. A window outside the track has no entry.
        lost: Number of packets that could not be decoded, and of runs of samples that were not
            finite.
    """

    samples: Mapping[Window, np.ndarray]
    lost: int


def read(
    stream: AudioStream,
    packets: Iterable[AudioPacket],
    rate: int,
    start_seconds: float,
    windows: Iterable[Window],
) -> Track:
    """Read the samples of windows.

    Args:
        stream: The audio stream, whose decoder has read nothing yet.
        packets: All its packets, in order.
        rate: Samples per second of the result.
        start_seconds: Time of the container's clock at sample 0.
        windows: The samples to return, in any order.
    """
    waiting = deque(sorted(set(windows), key=lambda window: window.begin))
    unfinished: list[Window] = []
    waveforms: dict[Window, np.ndarray] = {}
    lost: list[str] = []
    frames = _decoded(stream, packets, lost)
    for first, samples in _resampled(frames, rate, start_seconds):
        if not np.isfinite(samples).all():
            lost.append("no numbers")
            samples = np.where(np.isfinite(samples), samples, np.float32(0))
        end = first + len(samples)
        while waiting and waiting[0].begin < end:
            unfinished.append(waiting.popleft())
        for window in unfinished:
            low = int(max(first, window.begin, window.low))
            high = int(min(end, window.begin + window.length, window.high))
            if low < high:
                waveform = waveforms.setdefault(window, np.zeros(window.length, np.float32))
                waveform[low - window.begin : high - window.begin] = samples[
                    low - first : high - first
                ]
        unfinished = [window for window in unfinished if window.begin + window.length > end]
        if not waiting and not unfinished:
            break
    return Track(waveforms, len(lost))


def _resampled(
    frames: Iterable[av.AudioFrame], rate: int, start_seconds: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield runs of samples of the track, each with the index of its first sample.

    A track that changes its format (rate, channels, numbers) continues in a new filter graph, at
    the time of its clock.
    """
    position = 0
    runs = groupby(frames, lambda f: (f.format.name, f.layout.name, f.sample_rate))
    for number, (_, run) in enumerate(runs):
        first, first_seconds = next(run), start_seconds
        if number and first.pts is not None:
            first_seconds = max(start_seconds, float(first.pts * first.time_base))
            position = round((first_seconds - start_seconds) * rate)
        graph = _graph(first, rate, first_seconds)
        for frame in chain([first], run, [None]):  # None makes it return what it still has
            graph.push(frame)
            for samples in _pulled(graph):
                yield position, samples
                position += len(samples)


def _decoded(
    stream: AudioStream, packets: Iterable[AudioPacket], lost: list[str]
) -> Iterator[av.AudioFrame]:
    """Decode packets in order; skip one that cannot be decoded, as `ffmpeg` does."""
    for packet in packets:
        try:
            yield from stream.codec_context.decode(packet)
        except av.error.FFmpegError as error:
            lost.append(str(error))
    with contextlib.suppress(av.error.FFmpegError):
        yield from stream.codec_context.decode(None)


def _graph(frame: av.AudioFrame, rate: int, first_seconds: float) -> av.filter.Graph:
    first = round(first_seconds * frame.sample_rate)  # counted before the resampling
    graph = av.filter.Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add_abuffer(
            format=frame.format,
            layout=frame.layout,
            sample_rate=frame.sample_rate,
            time_base=frame.time_base,
        ),
        graph.add("aresample", f"{rate}:async=1:first_pts={first}:{MEAN}"),
        graph.add("abuffersink"),
    ).configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[np.ndarray]:
    while True:
        try:
            yield graph.pull().to_ndarray()[0]
        except (BlockingIOError, EOFError):
            return
