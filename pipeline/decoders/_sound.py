"""What is heard around the moments of a file's frames.

One track at one rate, the mean of its channels, on the clock of the frames: sample 0 is heard with
the first of them. libswresample does it all, with the numbers of

    ffmpeg -i FILE -f f32le -af \\
        aresample=RATE:async=1:first_pts=0:ochl=mono:osf=flt:rematrix_maxval=1 OUT

where a file's clock starts at 0, of a release that leaves out what a codec puts before a track.
Gaps in a track are silent; drifts of less than 0.1 seconds between its clock and its samples are
left as they are. What cannot be decoded is silent, and counted.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    """Samples [begin, begin + length) of a track, of which those in [low, high) are heard."""

    begin: int
    length: int
    low: float
    high: float


def track(container: InputContainer) -> AudioStream | None:
    """The sound track that FFmpeg takes for the file's own; None where there is none."""
    stream = container.streams.best("audio")
    return None if stream is None or stream.codec_context is None else cast(AudioStream, stream)


def packets(container: InputContainer, stream: AudioStream) -> Iterator[AudioPacket]:
    for packet in container.demux(stream):
        if packet.size:
            yield packet


@dataclass(frozen=True)
class Heard:
    """What was heard of a track.

    Attributes:
        samples: By window, float32 [length]. A window that nothing is heard in has none.
        lost: Packets that could not be decoded, and stretches that held no numbers.
    """

    samples: Mapping[Window, np.ndarray]
    lost: int


def heard(
    stream: AudioStream,
    packets: Iterable[AudioPacket],
    rate: int,
    start_seconds: float,
    windows: Iterable[Window],
) -> Heard:
    """The samples of windows.

    Args:
        start_seconds: Of the container's clock, where sample 0 is.
    """
    waiting = deque(sorted(set(windows), key=lambda one: one.begin))
    open_: list[Window] = []
    found: dict[Window, np.ndarray] = {}
    lost: list[str] = []
    for place, samples in _resampled(stream, packets, rate, start_seconds, lost):
        if not np.isfinite(samples).all():
            lost.append("no numbers")
            samples = np.where(np.isfinite(samples), samples, np.float32(0))
        end = place + len(samples)
        while waiting and waiting[0].begin < end:
            open_.append(waiting.popleft())
        for one in open_:
            first = int(max(place, one.begin, one.low))
            last = int(min(end, one.begin + one.length, one.high))
            if first < last:
                own = found.setdefault(one, np.zeros(one.length, np.float32))
                own[first - one.begin : last - one.begin] = samples[first - place : last - place]
        open_ = [one for one in open_ if one.begin + one.length > end]
        if not waiting and not open_:
            break
    return Heard(found, len(lost))


def _resampled(
    stream: AudioStream,
    packets: Iterable[AudioPacket],
    rate: int,
    start_seconds: float,
    lost: list[str],
) -> Iterator[tuple[int, np.ndarray]]:
    """Stretches of the track, and the sample that each begins with.

    A track that changes its kind (rate, channels, numbers) goes on in a graph of its own, where its
    clock says.
    """
    graph: av.filter.Graph | None = None
    kind: tuple[object, ...] = ()
    place = 0
    for frame in _decoded(stream, packets, lost):
        own = (frame.format.name, frame.layout.name, frame.sample_rate)
        if graph is None or own != kind:
            first_seconds = start_seconds
            if graph is not None:
                graph.push(None)
                for samples in _pulled(graph):
                    yield place, samples
                    place += len(samples)
                if frame.pts is not None:
                    first_seconds = max(start_seconds, float(frame.pts * frame.time_base))
                    place = round((first_seconds - start_seconds) * rate)
            kind, graph = own, _graph(frame, rate, first_seconds)
        graph.push(frame)
        for samples in _pulled(graph):
            yield place, samples
            place += len(samples)
    if graph is not None:
        graph.push(None)
        for samples in _pulled(graph):
            yield place, samples
            place += len(samples)


def _decoded(
    stream: AudioStream, packets: Iterable[AudioPacket], lost: list[str]
) -> Iterator[av.AudioFrame]:
    """A packet that cannot be decoded is passed over, as `ffmpeg` does."""
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
