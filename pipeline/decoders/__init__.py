"""Decoders: from a video file to the wanted frames, exactly those, or the reason why not.

This file is the contract; every other module here is one decoder, found by its file name. A
decoder of your own is a function, or a class, with the decorator `register("decoders", NAME)`. A
module has one function; a registered function is that function itself:

    pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image]]
        Yield (frame index, PIL RGB image at the video's own size) for each of `wanted_N`, which
        is sorted and distinct, in display order. `index` has the presentation times of all frames.
        Raise `Contradicted` where the file has other frames than the index: it is then decoded
        by PyAV from its start. Raise `Undecodable` with one of REASONS where it cannot be decoded.
        Any other error, but for one of the operating system or of PyAV, ends the build: it is an
        error in the decoder's code, and no clip is blamed for it.

and may have two constants:

    LIBRARY = ""                The package that it needs; a build without it is refused.
    PLAIN_FILES_ONLY = False    Whether PyAV decodes the files for which `index.hazard` is set.

Nobody chooses a decoder for a folder of frames: `_images` reads each, whatever the frame set says.

Light to import (numpy, PIL, av, pebble): decoding processes load it. No torch.
"""

from varve.pipeline.decoders._child import decode as decode
from varve.pipeline.decoders._index import Contradicted as Contradicted
from varve.pipeline.decoders._index import Index as Index
from varve.pipeline.decoders._pool import DecodePool as DecodePool
from varve.pipeline.decoders._pool import require as require
from varve.pipeline.decoders._stream import Undecodable as Undecodable
from varve.pipeline.decoders._values import REASONS as REASONS
from varve.pipeline.decoders._values import Decoded as Decoded
from varve.pipeline.decoders._values import Facts as Facts
from varve.pipeline.decoders._values import Failure as Failure
from varve.pipeline.decoders._values import Request as Request
from varve.pipeline.decoders._values import Stretch as Stretch
from varve.pipeline.decoders._values import Timeline as Timeline
from varve.pipeline.decoders._whole import read_index as read_index
