"""Corruptions of a video file, one of each kind in real directories: for the demo and for tests.

Each function takes the bytes of a whole .mp4 whose index comes first, and returns the bytes of the
corrupted file. Equal inputs give equal outputs. Light to import (numpy, av).
"""

from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import av
import numpy as np


class Corruption(NamedTuple):
    """A corruption of a whole .mp4 (index first), and the status that a build must give it.

    `reason` is one of varve.pipeline.decoders.REASONS, or "" where the file must be decoded.
    """

    apply: Callable[[bytes], bytes]
    reason: str


def empty(whole: bytes) -> bytes:
    """Return no bytes."""
    return b""


def text(whole: bytes) -> bytes:
    """Return a note in plain text."""
    return b"Camera 2 was off; ask for the tape of the morning.\n" * 40


def cut_short(whole: bytes) -> bytes:
    """Stop a download: the index promises every frame, the data end at six tenths."""
    packets = _packets(whole)
    start, size = packets[len(packets) * 6 // 10]
    return whole[: start + size // 2]


def no_index(whole: bytes) -> bytes:
    """Leave a recording open: data without the index (moov) that describes them."""
    boxes = _boxes(whole)
    return b"".join(box for kind, box in boxes if kind != "moov")[: len(whole) * 2 // 3]


def duplicate(whole: bytes) -> bytes:
    """Return the same bytes."""
    return whole


def audio_only(whole: bytes) -> bytes:
    """Return one second of a 440 Hz tone, without video."""
    rate, block = 16_000, 1024
    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        stream.codec_context.options = {"flags": "+bitexact"}
        for start in range(0, rate, block):
            times_S = np.arange(start, start + block) / rate
            tone_1S = 0.2 * np.sin(2 * np.pi * 440 * times_S)[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone_1S, "fltp", "mono")
            frame.sample_rate = rate
            frame.pts = start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def garbage_inside(whole: bytes) -> bytes:
    """Overwrite the packets of the middle half with noise, as a bad disk does."""
    packets = _packets(whole)
    corrupted = bytearray(whole)
    noise = np.random.default_rng(0)
    for start, size in packets[len(packets) // 4 : len(packets) * 3 // 4]:
        corrupted[start : start + size] = noise.bytes(size)
    return bytes(corrupted)


# By file name. A dataset puts them into train and test in turn: a duplicate of a train clip must
# stay in train.
CORRUPTIONS = {
    "empty": Corruption(empty, "empty"),
    "text": Corruption(text, "not_video"),
    "cut short": Corruption(cut_short, ""),
    "no index": Corruption(no_index, "not_video"),
    "duplicate": Corruption(duplicate, ""),
    "sound only": Corruption(audio_only, "no_video_stream"),
    "garbage inside": Corruption(garbage_inside, ""),
}


def _packets(whole: bytes) -> list[tuple[int, int]]:
    """Return (offset, size) of each video packet, in file order."""
    with av.open(BytesIO(whole), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(packet.pos or 0, packet.size) for packet in packets]


def _boxes(whole: bytes) -> list[tuple[str, bytes]]:
    """Return the top-level boxes of an .mp4 below 4 GiB: kind, and bytes with their header."""
    boxes, start = [], 0
    while start < len(whole):
        size = int.from_bytes(whole[start : start + 4])
        boxes.append((whole[start + 4 : start + 8].decode("ascii"), whole[start : start + size]))
        start += size
    return boxes
