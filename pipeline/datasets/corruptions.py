"""Ways to spoil a video file, one of each kind that real directories hold: for demo and tests.

Each takes the bytes of a whole .mp4 whose index comes first and gives those of the spoilt file.
Light to import (numpy, av). Equal bytes in, equal bytes out.
"""

from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import av
import numpy as np


class Breakage(NamedTuple):
    """How a whole .mp4 (index first) is spoilt, and what a build is to say of it.

    `reason` is one of pipeline.decoders.REASONS, or "" where the file is to be decoded.
    """

    make: Callable[[bytes], bytes]
    reason: str


def empty(whole: bytes) -> bytes:
    """Nothing at all."""
    return b""


def text(whole: bytes) -> bytes:
    """A note in words under a video's name."""
    return b"Camera 2 was off; ask for the tape of the morning.\n" * 40


def cut_short(whole: bytes) -> bytes:
    """A download that stopped: the index promises every frame, the data end in the sixth tenth."""
    places = _packets(whole)
    start, size = places[len(places) * 6 // 10]
    return whole[: start + size // 2]


def no_index(whole: bytes) -> bytes:
    """A recording that was never closed: data without the index (moov) that explains them."""
    boxes = _boxes(whole)
    return b"".join(box for kind, box in boxes if kind != "moov")[: len(whole) * 2 // 3]


def duplicate(whole: bytes) -> bytes:
    """The same bytes again."""
    return whole


def sound_only(whole: bytes) -> bytes:
    """One second of a 440 Hz tone, and no picture."""
    rate, block = 16_000, 1024
    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        stream.codec_context.options = {"flags": "+bitexact"}
        for start in range(0, rate, block):
            times_S = np.arange(start, start + block) / rate
            tone_1S = 0.2 * np.sin(2 * np.pi * 440 * times_S)[None].astype(np.float32)
            sound = av.AudioFrame.from_ndarray(tone_1S, "fltp", "mono")
            sound.sample_rate = rate
            sound.pts = start
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return file.getvalue()


def garbage_inside(whole: bytes) -> bytes:
    """A bad disk: index intact, the packets of the middle half overwritten with noise."""
    places = _packets(whole)
    spoilt = bytearray(whole)
    noise = np.random.default_rng(0)
    for start, size in places[len(places) // 4 : len(places) * 3 // 4]:
        spoilt[start : start + size] = noise.bytes(size)
    return bytes(spoilt)


# By file name. A data set files them under train and test in turn: a duplicate of a train clip
# has to stay in train.
BREAKAGES = {
    "empty": Breakage(empty, "empty"),
    "text": Breakage(text, "not_video"),
    "cut short": Breakage(cut_short, ""),
    "no index": Breakage(no_index, "not_video"),
    "duplicate": Breakage(duplicate, ""),
    "sound only": Breakage(sound_only, "no_video_stream"),
    "garbage inside": Breakage(garbage_inside, ""),
}


def _packets(whole: bytes) -> list[tuple[int, int]]:
    """(offset, size) of each video packet, in file order."""
    with av.open(BytesIO(whole), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(packet.pos or 0, packet.size) for packet in packets]


def _boxes(whole: bytes) -> list[tuple[str, bytes]]:
    """The top-level boxes of an .mp4 below 4 GiB: kind, and bytes with their header."""
    boxes, start = [], 0
    while start < len(whole):
        size = int.from_bytes(whole[start : start + 4])
        boxes.append((whole[start + 4 : start + 8].decode("ascii"), whole[start : start + size]))
        start += size
    return boxes
