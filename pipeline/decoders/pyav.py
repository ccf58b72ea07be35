"""PyAV: the default decoder, and the reference for the others.

Frames equal those of `ffmpeg -fps_mode passthrough`, index for index and bit for bit.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

import av
from PIL import Image

from varve.pipeline.decoders._index import Contradicted, Index, Source
from varve.pipeline.decoders._stream import Converter, decode


def pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (display index, RGB image) for each wanted frame, in display order.

    Where the index is proven, only groups of pictures with a wanted frame are decoded, each as far
    as its last wanted frame.

    Raises:
        Contradicted: The decoded frames are not those that the packets promised.
    """
    source = index.source
    if source is None:
        raise ValueError(f"{path} was not indexed as a video file")
    converter = Converter()
    frames = _proven(source, wanted_N) if index.proven else _from_start(source, wanted_N)
    for number, frame in frames:
        yield number, converter.image(frame)


def _proven(source: Source, wanted_N: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    wanted = deque(wanted_N)
    packets = source.rewind()
    context = source.stream.codec_context
    if not context.is_open:
        # Damage must contradict the index, and not be concealed.
        context.options = {"err_detect": "explode"}
    shown = 0
    # The None at the end makes the decoder return the frames that it still has.
    for number, packet in enumerate(chain(packets, [None])):
        start = source.starts[bisect_right(source.starts, wanted[0]) - 1]
        if packet is not None and number < start:
            continue
        if number == start:
            context.flush_buffers()
            shown = start
        try:
            frames = context.decode(packet)
        except av.error.InvalidDataError as error:
            raise Contradicted(f"packet {number}: {error.strerror}") from error
        for frame in frames:
            if shown >= len(source.ticks_N) or frame.pts != source.ticks_N[shown]:
                raise Contradicted(f"frame {shown} came with the time {frame.pts}")
            if shown == wanted[0]:
                yield wanted.popleft(), frame
                if not wanted:
                    return
            shown += 1
    raise Contradicted(f"frame {wanted[0]} was not decoded")


def _from_start(source: Source, wanted_N: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    wanted, last = set(wanted_N), max(wanted_N)
    frames: Iterable[av.VideoFrame] | None = source.frames
    if frames is None:
        packets = source.rewind(fresh=True)
        frames = decode(source.stream, packets)
    for number, frame in enumerate(frames):
        if number in wanted:
            yield number, frame
        if number == last:
            return
    raise Contradicted(f"a second decoding gave fewer frames than {last + 1}")
