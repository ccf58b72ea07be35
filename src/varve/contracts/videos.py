"""Videos whose every frame shows its number, to test which frame a decoder returned."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FPS, BITS, BLOCK = 160, 96, 25, 8, 16


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Draw a picture [height, width, 3] that shows `number` as eight black or white blocks.

    The lower half moves, so that frames differ in many pixels, and B-frames save bytes.
    """
    picture = np.full((height, width, 3), 90, np.uint8)
    for bit in range(BITS):
        shade = 235 if number >> bit & 1 else 20
        picture[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = shade
    across = (np.arange(width) * 3 + number * 5) % 256
    picture[height // 2 :, :, 0] = across
    picture[height // 2 :, :, 2] = 255 - across
    return picture


def number_of(picture: np.ndarray) -> int:
    """Return the number that a decoded picture shows."""
    middle = BLOCK // 2
    return sum(
        1 << bit
        for bit in range(BITS)
        if picture[4 : BLOCK - 4, bit * BLOCK + middle - 4 : bit * BLOCK + middle + 4].mean() > 128
    )


def encode(
    path: Path,
    codec: str,
    frames: int = 60,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pix_fmt: str = "yuv420p",
    ticks: list[int] | None = None,
    rotation: int = 0,
    sound_first: bool = False,
    metadata: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write numbered frames. `ticks` are presentation times in 1/1000 s, for a variable rate."""
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        if sound_first:
            sound = container.add_stream("aac", rate=16000, layout="mono")
        stream = container.add_stream(codec, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound_first:
            samples = np.zeros((1, 16000 * 4), np.float32)
            silence = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), "rgb24")
            frame.pts = ticks[number] if ticks else number
            frame.time_base = Fraction(1, 1000) if ticks else Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
