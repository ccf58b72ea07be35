"""The index of a file's frames: proven by its packets, or else found by decoding all of it.

`read` demuxes the file once. Its packets prove the frames where each, by its own bytes, is one
whole shown picture with a time of its own, and the first is a clean start. A wanted frame then
costs the decoding of its group of pictures alone. Where anything is unclear (packed B-frames, edit
lists, discarded or damaged packets, an unknown codec) the file is decoded from the start, which is
slower and needs no proof.

Times are of the file's clock, on which the earliest stream starts at 0, as for `ffmpeg -ss`. Where
that is the video, its first frame has the time 0, whatever its time stamp is.

`pyav.pictures` compares each decoded frame with the index, and raises `Contradicted` where the
packets promised another; the file is then read again with `proof=False`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from varve.pipeline.decoders import _audio
from varve.pipeline.decoders._bitstream import Shape, reader
from varve.pipeline.decoders._cut import cut_off
from varve.pipeline.decoders._stream import Undecodable, VideoPacket, decode, demux, open_video

# Bytes kept in memory to save a second pass over the file. A larger file is read twice.
KEPT_PACKET_BYTES = 64 << 20
PACKET_OVERHEAD_BYTES = 640  # of a packet in memory, beside its own bytes; measured 611
KEPT_FRAME_BYTES = 256 << 20

# MPEG-4 "packed" streams put placeholders of 7 bytes or so where a frame came a packet early.
PLACEHOLDER_BYTES = 8

# Share of the promised seconds by which headers of whole files are off.
SLACK_OF_PROMISE = 0.01
# Step of the time stamps of a container as a whole; each stream has a finer clock of its own.
CLOCK_STEP_SECONDS = 1e-6

# The rate that ffmpeg assumes for a file without times and rate.
ASSUMED_FPS = 25.0


class Contradicted(Exception):
    """Decoding gave other frames than the index has."""


@dataclass(frozen=True, eq=False)
class Index:
    """The frames of a file in display order.

    Attributes:
        times_N: Presentation times in seconds of the file's clock, float64 [N], increasing.
        num_frames_claimed: Number of frames by the header; 0 for none there.
        fps: Average frame rate.
        hazard: Why a decoder other than PyAV may fail on the file; "" for a plain file.
        warning: What is wrong with a file that could be decoded, for a person; "" for nothing.
        proven: Whether the packets prove the frames; nothing has been decoded then.
        files: Paths of the frames of a folder; else empty.
        start_seconds: Time stamp in the container of the time 0.
        source: The open stream; None for a folder.
    """

    times_N: np.ndarray
    num_frames_claimed: int
    fps: float
    hazard: str = ""
    warning: str = ""
    proven: bool = True
    files: tuple[str, ...] = ()
    start_seconds: float = 0.0
    source: "Source | None" = field(default=None, repr=False)

    @property
    def num_frames(self) -> int:
        """Number of frames, N."""
        return len(self.times_N)


@dataclass(eq=False)
class Source:
    """An open video stream, and what a decoder needs to read it.

    Attributes:
        path: Path of the file.
        container: The open file.
        stream: The video stream of `container`.
        ticks_N: Presentation times of the packets in the stream's time base, sorted, int64 [N];
            empty where they prove nothing.
        starts: Display indices, increasing, of frames from which decoding may begin. The packet of
            such a frame has the same index in the file. Empty where nothing is proven.
        packets: All packets, where they are few enough to be kept; else None.
        frames: All decoded frames of an unproven file, where kept; else None.
        audio: All packets of the audio track, where they are wanted and few enough; else None.
    """

    path: str
    container: InputContainer
    stream: VideoStream
    ticks_N: np.ndarray
    starts: list[int]
    packets: list[VideoPacket] | None
    frames: list[av.VideoFrame] | None = None
    audio: list[_audio.AudioPacket] | None = None

    def read_audio(
        self, rate: int, start_seconds: float, windows: Sequence[_audio.Window]
    ) -> _audio.Track | None:
        """Read windows of the audio track; see `_audio.read`. None where there is no track."""
        stream, kept = _audio.best_stream(self.container), self.audio
        if stream is None:
            return None
        if kept is not None:
            self.audio = None  # the decoder has read them then
            return _audio.read(stream, kept, rate, start_seconds, windows)
        container, _ = open_video(self.path)
        with container:
            stream = _audio.best_stream(container)
            assert stream is not None
            return _audio.read(stream, demux(container, stream), rate, start_seconds, windows)

    def rewind(self, fresh: bool = False) -> Iterator[VideoPacket]:
        """Return all packets in file order, read again where they were not kept, or if `fresh`.

        Reading again opens the file anew, with a new decoder: take `stream` afterwards. Demuxing
        from the start gives the same packets every time; seeking in a container may not.
        """
        if self.packets is not None and not fresh:
            return iter(self.packets)
        self.container.close()
        self.container, self.stream = open_video(self.path)
        return demux(self.container, self.stream)


@dataclass
class _Table:
    """Properties of the packets, in file order, and of the file as a whole."""

    ticks: list[int | None] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    doubts: set[str] = field(default_factory=set)
    hazards: set[str] = field(default_factory=set)
    packets: list[VideoPacket] | None = field(default_factory=list)
    audio: list[_audio.AudioPacket] | None = None
    hidden: int = 0  # packets of frames that an edit list does not show
    start_seconds: float = math.inf  # of the video, as the next one
    end_seconds: float = -math.inf
    time_base: float = 0.0
    end_of_all_seconds: float = 0.0
    damage: str = ""


def read(path: str, proof: bool = True, audio: bool = False) -> Index:
    """Index the frames of the video file at `path`.

    Args:
        path: Path of a regular file.
        proof: False to decode all of it, whatever the packets prove.
        audio: Whether the packets of the audio track are kept too.

    Raises:
        Undecodable: The reasons of `open_video`; `corrupt` or `too_short` where no frame can be
            decoded.
    """
    container, stream = open_video(path)
    table = _tabulate(container, stream, _audio.best_stream(container) if audio else None)
    claimed = max(stream.frames, 0)
    fps = float(stream.average_rate or stream.guessed_rate or 0) or ASSUMED_FPS
    ticks, starts = _starts(table)
    promised = _promised(container, stream, table, claimed / fps)
    source = Source(path, container, stream, ticks, starts, table.packets, audio=table.audio)
    proven = proof and bool(starts)
    seconds, start = float(stream.time_base), _start_time(container)
    if proven:
        first, times_N = float(ticks[0]) * seconds, (ticks - ticks[0]) * seconds
    else:
        first, times_N = _decode_all(source, fps)
    start = start if first - start > CLOCK_STEP_SECONDS else first
    times_N = times_N + (first - start)
    warning = "; ".join(_warnings(table, claimed, len(times_N), promised, path))
    hazard = ", ".join(sorted(table.hazards))
    return Index(times_N, claimed, fps, hazard, warning, proven, (), start, source)


def _tabulate(container: InputContainer, stream: VideoStream, audio: AudioStream | None) -> _Table:
    table, kept_bytes = _Table(audio=[] if audio else None), 0
    table.time_base = float(stream.time_base)
    context = stream.codec_context
    shape = reader(context.codec.canonical_name, context.extradata or b"")
    try:
        for packet in container.demux():
            if not packet.size:
                continue
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                start = float(time * packet.time_base)
                end = start + float((packet.duration or 0) * packet.time_base)
                table.end_of_all_seconds = max(table.end_of_all_seconds, end)
                if packet.stream_index == stream.index:
                    table.start_seconds = min(table.start_seconds, start)
                    table.end_seconds = max(table.end_seconds, end)
            if audio and packet.stream_index == audio.index and table.audio is not None:
                kept_bytes += packet.size + PACKET_OVERHEAD_BYTES
                table.audio.append(cast(_audio.AudioPacket, packet))
            if packet.stream_index != stream.index:
                continue
            if not table.ticks and not packet.is_keyframe:
                table.hazards.add("the first packet is no key frame")
            if packet.is_discard:
                table.hidden += 1
                table.hazards.add("packets to be discarded")
                table.doubts.add("discard")
            if packet.pts is not None and packet.pts < 0:
                table.hazards.add("times below 0")
            if packet.size <= PLACEHOLDER_BYTES:
                table.hazards.add("placeholder packets")
            if packet.is_corrupt:
                table.damage = table.damage or "a packet is damaged or cut off"
            if table.ticks and packet.has_sidedata("new_extradata"):
                table.doubts.add("parameters change")
            table.ticks.append(packet.pts)
            table.keys.append(packet.is_keyframe)
            table.shapes.append(shape(bytes(packet)) if shape else Shape.UNCLEAR)
            kept_bytes += packet.size + PACKET_OVERHEAD_BYTES
            if kept_bytes > KEPT_PACKET_BYTES:
                table.packets = table.audio = None
            if table.packets is not None:
                table.packets.append(cast(VideoPacket, packet))
    except av.error.FFmpegError as error:
        table.damage = table.damage or f"reading ends early: {error.strerror}"
    return table


def _starts(table: _Table) -> tuple[np.ndarray, list[int]]:
    """Return the sorted times of the frames and the clean starts; empty if nothing is proven."""
    nothing: tuple[np.ndarray, list[int]] = np.empty(0, np.int64), []
    times = set(table.ticks) - {None}
    unclear = table.doubts or table.damage or Shape.UNCLEAR in table.shapes
    if not times or len(times) < len(table.ticks) or unclear:
        return nothing
    ticks_N = np.array(table.ticks, np.int64)
    sorted_N = np.sort(ticks_N)
    # No picture shown before a start may follow it in the file, and none shown after may precede.
    before_N = np.maximum.accumulate(ticks_N) == ticks_N
    after_N = np.minimum.accumulate(ticks_N[::-1])[::-1] == ticks_N
    clean_N = before_N & after_N & np.array(table.keys)
    clean_N &= np.array(table.shapes) == Shape.START
    starts = np.flatnonzero(clean_N).tolist()
    return (sorted_N, starts) if starts and starts[0] == 0 else nothing


def _decode_all(source: Source, fps: float) -> tuple[float, np.ndarray]:
    """Count the frames by decoding all of them, and keep them if they are few.

    Returns:
        Time of the first frame by the container's clock, and the times of all counted from it.
    """
    ticks: list[int | None] = []
    kept: list[av.VideoFrame] | None = []
    kept_bytes = 0
    packets = source.rewind()
    for frame in decode(source.stream, packets):
        ticks.append(frame.pts)
        kept_bytes += sum(plane.buffer_size for plane in frame.planes)
        if kept_bytes > KEPT_FRAME_BYTES:
            kept = None
        if kept is not None:
            kept.append(frame)
    source.frames = kept
    if not ticks:
        cut = cut_off(source.path)
        raise Undecodable("corrupt", cut or "the video stream holds no frame that can be decoded")
    known = [tick for tick in ticks if tick is not None]
    if len(known) == len(ticks) and (np.diff(known) > 0).all():
        seconds = float(source.stream.time_base)
        return known[0] * seconds, (np.array(known, np.int64) - known[0]) * seconds
    # Some frames have no time, or times decrease: only the display order is known.
    return (source.container.start_time or 0) / av.time_base, np.arange(len(ticks)) / fps


def _start_time(container: InputContainer) -> float:
    """Return the time stamp, in seconds, of a container's earliest stream; infinity if unknown."""
    # AVI has no presentation times. FFmpeg makes them of the order of decoding, and the delay of
    # B-frames would be a late start.
    if container.start_time is None or container.format.name == "avi":
        return np.inf
    return container.start_time / av.time_base


@dataclass(frozen=True)
class _Promise:
    """Seconds that the header promises, and how many of them are not there."""

    seconds: float
    missing: float


def _promised(
    container: InputContainer, stream: VideoStream, table: _Table, seconds_claimed: float
) -> _Promise:
    """Compare the end of the video with the one that the header promises.

    The header of Matroska counts from the start of the clock, others from the first frame. A header
    with the length of all streams alone is compared with the last packet of any.
    """
    whole = (container.duration or 0) / av.time_base
    start = min((container.start_time or 0) / av.time_base, table.start_seconds)
    formats = container.format.name.split(",")
    if "avi" in formats:  # whose frames have one length; its own seconds are estimated from bytes
        promised, there = seconds_claimed, table.end_seconds - table.start_seconds
    elif "matroska" in formats and (tag := _tagged_seconds(stream)):
        promised, there = min(tag, whole), table.end_seconds
    elif "matroska" in formats:
        promised, there = whole, table.end_of_all_seconds
    elif stream.duration:
        promised = float(stream.duration * stream.time_base)
        there = table.end_seconds - table.start_seconds
    else:
        promised, there = whole, table.end_of_all_seconds - start
    return _Promise(promised, promised - max(there, 0.0))


def _tagged_seconds(stream: VideoStream) -> float:
    """Return the length of a stream by its tag "DURATION", "00:00:02.400"; 0 without one."""
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), "")
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", tag)
    if not match:
        return 0.0
    hours, minutes, seconds = map(float, match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _warnings(
    table: _Table, claimed: int, num_frames: int, promised: _Promise, path: str
) -> Iterator[str]:
    """Yield what is wrong with a file that could be decoded."""
    times = np.unique([tick for tick in table.ticks if tick is not None])
    longest = float(np.diff(times).max(initial=0)) * table.time_base
    # The length of the last frame is unknown, and headers are rounded.
    is_short = promised.missing > max(1.5 * longest, SLACK_OF_PROMISE * promised.seconds)
    shown = len(table.ticks) - table.hidden
    if claimed > num_frames and (is_short or shown > num_frames):
        there = claimed if is_short else min(claimed, shown)
        yield f"the header promises {there} frames, {num_frames} could be decoded"
    elif is_short:
        yield (
            f"the header promises {promised.seconds:.2f} seconds, the last "
            f"{promised.missing:.2f} of them are not there"
        )
    if cut := cut_off(path):
        yield cut
    if table.damage:
        yield table.damage
