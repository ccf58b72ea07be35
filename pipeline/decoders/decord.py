"""The library decord, for the files that it decodes exactly; PyAV decodes the others.

On other files it was seen to hang, to count frames that do not exist, and to return neighbours of
the wanted frames. The facts of a clip name the decoder that was used. A file is plain where no
packet is to be discarded, none has a time below 0, none is a placeholder of 8 bytes or fewer, and
the first is a key frame.
"""

from collections.abc import Iterator

from PIL import Image

from varve.pipeline.decoders._index import Contradicted, Index
from varve.pipeline.decoders._stream import Undecodable

LIBRARY = "decord"
PLAIN_FILES_ONLY = True


def pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (display index, RGB image) for each wanted frame, in display order.

    Raises:
        Contradicted: decord counts other frames than the index.
        Undecodable: `corrupt`, where decord raises an error.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(video) != index.num_frames:
            raise Contradicted(f"decord counts {len(video)} frames, the index {index.num_frames}")
        frames_NHWC = video.get_batch(wanted_N).asnumpy()
    except decord.DECORDError as error:
        first = str(error).strip().splitlines()[-1]
        raise Undecodable("corrupt", f"decord: {first}; --decoder auto may do better") from error
    for number, frame_HWC in zip(wanted_N, frames_NHWC, strict=True):
        yield number, Image.fromarray(frame_HWC)
