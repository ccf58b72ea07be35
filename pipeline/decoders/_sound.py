"""What is heard around the moments of a file's frames.

One track at one rate, the mean of its channels, on the clock of the frames: sample 0 is heard with
the first of them. libswresample does it all, with the numbers of

    ffmpeg -i FILE -f f32le -af \\
        aresample=RATE:async=1:first_pts=0:ochl=mono:osf=flt:rematrix_maxval=1 OUT

where a file's clock starts at 0, of a release that leaves out what a codec puts before a track.
Gaps in a track are silent; drifts of less than 0.1 seconds between its clock and its samples are
left as they are.
"""

import contextlib
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


def heard(
    stream: AudioStream,
    packets: Iterable[AudioPacket],
    rate: int,
    start_seconds: float,
    windows: Iterable[Window],
) -> Mapping[Window, np.ndarray]:
    """The samples of windows, float32 [length] each. A window that nothing is heard in has none.

    Args:
        start_seconds: Of the container's clock, where sample 0 is.
    """
    wanted = sorted(set(windows), key=lambda one: min(one.begin + one.length, one.high))
    found: dict[Window, np.ndarray] = {}
    place = 0
    for samples in _resampled(stream, packets, rate, round(start_seconds * rate)):
        end = place + len(samples)
        for one in wanted:
            first = int(max(place, one.begin, one.low))
            last = int(min(end, one.begin + one.length, one.high))
            if first < last:
                own = found.setdefault(one, np.zeros(one.length, np.float32))
                own[first - one.begin : last - one.begin] = samples[first - place : last - place]
        while wanted and min(wanted[0].begin + wanted[0].length, wanted[0].high) <= end:
            wanted.pop(0)
        if not wanted:
            break
        place = end
    return found


def _resampled(
    stream: AudioStream, packets: Iterable[AudioPacket], rate: int, first: int
) -> Iterator[np.ndarray]:
    """Consecutive stretches of the track from sample `first` of the container's clock on."""
    graph: av.filter.Graph | None = None
    kind: tuple[object, ...] = ()
    for frame in _decoded(stream, packets):
        own = (frame.format.name, frame.layout.name, frame.sample_rate)
        if graph is None:
            kind, graph = own, _graph(frame, rate, first)
        if own != kind:
            break  # a track that becomes another in its midst is heard up to there
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _decoded(stream: AudioStream, packets: Iterable[AudioPacket]) -> Iterator[av.AudioFrame]:
    """A packet that cannot be decoded is passed over, as `ffmpeg` does."""
    for packet in packets:
        with contextlib.suppress(av.error.InvalidDataError):
            yield from stream.codec_context.decode(packet)
    with contextlib.suppress(av.error.InvalidDataError, EOFError):
        yield from stream.codec_context.decode(None)


def _graph(frame: av.AudioFrame, rate: int, first: int) -> av.filter.Graph:
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
