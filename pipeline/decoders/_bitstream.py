"""Classification of packets by their bytes: is one a whole picture, and a clean start?

The key flag of a container is a promise about time, not about references: after a recovery point,
or in an open group of pictures, frames may still refer to earlier ones. The bytes of the packet
decide here. A codec that is not in `READERS` proves nothing, and its files are decoded from the
start.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial


class Shape(IntEnum):
    """Content of one packet."""

    UNCLEAR = 0  # no picture, several, a hidden one, or bytes that make no sense
    PICTURE = 1  # one whole shown picture
    START = 2  # such a picture without references, which no reference crosses


def reader(codec: str, extradata: bytes) -> Callable[[bytes], Shape] | None:
    """Return the function that classifies packets of a codec; None where there is none."""
    return partial(READERS[codec], extradata) if codec in READERS else None


def _h264(extradata: bytes, data: bytes) -> Shape:
    length_size = (extradata[4] & 3) + 1 if len(extradata) > 4 and extradata[0] == 1 else 0
    kinds, firsts, settings = set(), 0, False
    for unit in _units(data, length_size):
        if unit is None or len(unit) < 2 or unit[0] & 0x80:
            return Shape.UNCLEAR
        kind = unit[0] & 31
        if 1 <= kind <= 5:
            kinds.add(kind)
            firsts += unit[1] >> 7  # first_mb_in_slice == 0
        settings |= kind in (7, 8)
    if firsts != 1 or not kinds <= {1, 5}:  # 2 to 4 are data partitions
        return Shape.UNCLEAR
    if kinds == {5}:
        return Shape.START
    # A jump would lose parameters that change between starts.
    return Shape.UNCLEAR if settings else Shape.PICTURE


def _hevc(extradata: bytes, data: bytes) -> Shape:
    length_size = (extradata[21] & 3) + 1 if len(extradata) > 22 and extradata[0] == 1 else 0
    kinds, firsts, settings = set(), 0, False
    for unit in _units(data, length_size):
        if unit is None or len(unit) < 3 or unit[0] & 0x80:
            return Shape.UNCLEAR
        kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
        if kind < 32 and layer == 0:
            kinds.add(kind)
            firsts += unit[2] >> 7  # first_slice_segment_in_pic_flag
        settings |= kind in (32, 33, 34)
    if firsts != 1:
        return Shape.UNCLEAR
    if kinds <= set(range(16, 22)):
        return Shape.START
    return Shape.UNCLEAR if settings else Shape.PICTURE


def _mpeg4(extradata: bytes, data: bytes) -> Shape:
    # Two pictures in a packet, then a placeholder of 7 bytes or so: "packed" B-frames.
    if len(data) <= 8 or data.count(b"\0\0\1\xb6") != 1:
        return Shape.UNCLEAR
    header = data.find(b"\0\0\1\xb6") + 4
    if header >= len(data):
        return Shape.UNCLEAR
    return Shape.START if data[header] >> 6 == 0 else Shape.PICTURE


def _mpeg2(extradata: bytes, data: bytes) -> Shape:
    header = data.find(b"\0\0\1\0")
    # Two picture headers are two fields.
    if header < 0 or data.count(b"\0\0\1\0") != 1 or header + 5 >= len(data):
        return Shape.UNCLEAR
    intra = data[header + 5] >> 3 & 7 == 1
    return Shape.START if intra and b"\0\0\1\xb3" in data[:header] else Shape.PICTURE


def _vp8(extradata: bytes, data: bytes) -> Shape:
    if len(data) < 4 or not data[0] & 0x10:  # an alternate reference is not shown
        return Shape.UNCLEAR
    return Shape.PICTURE if data[0] & 1 else Shape.START


def _vp9(extradata: bytes, data: bytes) -> Shape:
    if not data or data[0] >> 6 != 2:
        return Shape.UNCLEAR
    if data[0] & 0x30 == 0x30:  # profile 3 has one more bit; leave it to the decoder
        return Shape.PICTURE
    existing, inter = data[0] >> 3 & 1, data[0] >> 2 & 1
    return Shape.PICTURE if existing or inter else Shape.START


def _whole(extradata: bytes, data: bytes) -> Shape:
    return Shape.START if data else Shape.UNCLEAR


READERS: dict[str, Callable[[bytes, bytes], Shape]] = {
    "h264": _h264,
    "hevc": _hevc,
    "mpeg4": _mpeg4,
    "mpeg1video": _mpeg2,
    "mpeg2video": _mpeg2,
    "vp8": _vp8,
    "vp9": _vp9,
    # Every frame is independent. In AV1 a temporal unit has one shown frame, and containers set the
    # key flag only on shown key frames, which reset all references.
    "mjpeg": _whole,
    "prores": _whole,
    "dnxhd": _whole,
    "rawvideo": _whole,
    "av1": _whole,
}


def _units(data: bytes, length_size: int) -> Iterator[memoryview | None]:
    """Yield the NAL units of a packet, by length prefixes or start codes; None at wrong lengths."""
    view, start = memoryview(data), 0
    if length_size:
        while start < len(data):
            length = int.from_bytes(view[start : start + length_size], "big")
            start += length_size
            if length == 0 or start + length > len(data):
                yield None
                return
            yield view[start : start + length]
            start += length
        return
    start = data.find(b"\0\0\1")
    while start >= 0:
        following = data.find(b"\0\0\1", start + 3)
        yield view[start + 3 : following if following >= 0 else len(data)]
        start = following
