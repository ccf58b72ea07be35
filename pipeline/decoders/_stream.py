"""One video stream of a file: opening it, decoding its packets, converting a frame to RGB.

Frames equal those of the `ffmpeg` command line, bit for bit: the same stream is chosen, the same
swscale path is used, and a rotation in the metadata is applied.
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import av.filter
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.video.stream import VideoStream
from PIL import Image

from varve.pipeline.decoders._cut import cut_off

# Without this FFmpeg takes a text file for a playlist, and opens what it names, on the network too.
FILES_ONLY = {"protocol_whitelist": "file"}

# Formats that FFmpeg recognises in arbitrary text.
TEXT_FORMATS = frozenset(
    """ass srt subviewer subviewer1 microdvd mpl2 mpsub jacosub sami realtext stl tty vplayer pjs
    webvtt lrc aqtitle scc tedcaptions concat hls dash ffmetadata sdp""".split()  # noqa: SIM905
)

type VideoPacket = av.Packet[VideoStream]


class Undecodable(Exception):
    """A file, or a clip of it, cannot be decoded; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def check_file(path: str) -> None:
    """Refuse a path that cannot be a video before any library opens it.

    Raises:
        Undecodable: `missing`, `empty`, `unreadable`, or `not_video` where it is no regular file
            (opening a named pipe would wait for ever).
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Undecodable("not_video", f"{kind_of(status.st_mode)}, not a regular file")
        if status.st_size == 0:
            raise Undecodable("empty", "the file has 0 bytes")
        with open(path, "rb") as file:
            file.read(1)
    except ValueError as error:  # a null byte in the path
        raise Undecodable("missing", f"no such file: {error}") from error
    except OSError as error:
        raise from_os_error(error) from error


def from_os_error(error: OSError) -> Undecodable:
    """Return an error of the operating system as `missing` or `unreadable`."""
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
    detail = error.strerror or str(error)
    return Undecodable("missing" if missing else "unreadable", detail)


def kind_of(mode: int) -> str:
    """Describe what a path that is no regular file is.

    >>> kind_of(stat.S_IFIFO)
    'a named pipe'
    """
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something special")


def open_video(path: str) -> tuple[InputContainer, VideoStream]:
    """Open a file and choose its video: the largest stream, the default one first, no cover art.

    Raises:
        Undecodable: `check_file`'s reasons, `not_video`, `no_video_stream`, or `corrupt` where no
            decoder knows the stream's format.
    """
    check_file(path)
    try:
        # "file:" keeps a colon in a name from being read as a protocol. Titles in Latin-1 or
        # Shift-JIS are no reason to fail.
        container = av.open("file:" + path, container_options=FILES_ONLY)
    except av.error.FFmpegError as error:
        if cut := cut_off(path):
            raise Undecodable("not_video", f"{cut}; copy or download it again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise Undecodable("unreadable", error_text(error)) from error
        raise Undecodable(
            "not_video", f"it does not open as a video: {error_text(error)}"
        ) from error
    formats = set(container.format.name.split(","))
    if formats & TEXT_FORMATS:
        container.close()
        raise Undecodable("not_video", f"a text file (recognised as {container.format.name})")
    pictures = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        kinds = sorted({"cover art" if s.type == "video" else s.type for s in container.streams})
        container.close()
        raise Undecodable("no_video_stream", f"it holds no video, only: {', '.join(kinds)}")
    default = av.stream.Disposition.default
    stream = max(
        streams, key=lambda s: s.width * s.height + 5_000_000 * bool(s.disposition & default)
    )
    if stream.codec_context is None:
        container.close()
        raise Undecodable("corrupt", "no decoder knows the format of its video stream")
    # The children share the cores; threads within one only add start-up time and memory.
    stream.codec_context.thread_count = 1
    return container, stream


def demux[S: (AudioStream, VideoStream)](
    container: InputContainer, stream: S
) -> "Iterator[av.Packet[S]]":
    """Yield the packets of a stream that have bytes; empty ones only flush the decoder."""
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def decode(stream: VideoStream, packets: Iterable[VideoPacket]) -> Iterator[av.VideoFrame]:
    """Decode packets in order, then flush the decoder.

    A packet that cannot be decoded is skipped, as by `ffmpeg`.
    """
    for packet in packets:
        # Damage is common, and the frames after it are wanted.
        with contextlib.suppress(av.error.InvalidDataError):
            yield from stream.codec_context.decode(packet)
    with contextlib.suppress(av.error.InvalidDataError, EOFError):
        yield from stream.codec_context.decode(None)


class Converter:
    """Conversion of frames to RGB images, by one filter graph for frames of one kind.

    The graph is the one of the `ffmpeg` command line between a decoder and rgb24. Calling swscale
    directly differs from it, on interlaced frames and where a chroma position is given.
    """

    def __init__(self) -> None:
        self._kind: tuple[object, ...] = ()
        self._graph = av.filter.Graph()

    def image(self, frame: av.VideoFrame) -> Image.Image:
        """Return the frame as a PIL RGB image, upright.

        Rotations by multiples of 90 degrees, mirrored or not, are applied; other angles are
        ignored.
        """
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if kind != self._kind:
            self._kind, self._graph = kind, _to_rgb(frame)
        self._graph.vpush(frame)
        rgb = self._graph.vpull()
        plane = rgb.planes[0]
        image = Image.frombuffer(
            "RGB", (rgb.width, rgb.height), bytes(plane), "raw", "RGB", plane.line_size, 1
        )
        turn = _turn(frame)
        return image if turn is None else image.transpose(turn)


def _to_rgb(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    # Times do not matter here: any time base will do.
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
    )
    graph.link_nodes(
        source,
        # `ffmpeg` sets plain bicubic. Accurate rounding or full chroma interpolation would move
        # colours at edges by up to 60 grey levels.
        graph.add("scale", "flags=bicubic"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph


def error_text(error: BaseException) -> str:
    """Return an error as part of a sentence: the text of FFmpeg, without numbers and paths."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    """Return the transposition of a frame's display matrix; None for none."""
    if SideData.DISPLAYMATRIX not in frame.side_data:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(frame.side_data[SideData.DISPLAYMATRIX])[:36])
    signs = tuple((x > 0) - (x < 0) for x in (a, b, c, d))
    return {
        (0, 1, -1, 0): Image.Transpose.ROTATE_270,
        (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
        (0, -1, 1, 0): Image.Transpose.ROTATE_90,
        (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
        (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
        (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    }.get(signs)
