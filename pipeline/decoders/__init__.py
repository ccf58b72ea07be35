"""Decoders: from a video file to the wanted frames, exactly those, or a true reason why not.

This file is the contract; every other module here is one decoder, found by its file name.
A decoder module has one function:

    pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image]]
        Yield (frame index, PIL RGB image at the video's own size) for each of `wanted_N`,
        sorted and distinct, in display order.

Light to import (numpy, PIL, av): it is what a decoding child process loads. No torch.
"""

from varve.pipeline.decoders._child import decode
from varve.pipeline.decoders._pool import DecodePool, require
from varve.pipeline.decoders._values import (
    REASONS,
    Decoded,
    Facts,
    Failure,
    Request,
    Stretch,
)

__all__ = [
    "REASONS",
    "DecodePool",
    "Decoded",
    "Facts",
    "Failure",
    "Request",
    "Stretch",
    "decode",
    "require",
]
