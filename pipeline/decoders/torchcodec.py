"""The library torchcodec: NVDEC on a machine with a CUDA device, else the CPU.

Unlike the other decoders it loads torch into the decoding child.
"""

from collections.abc import Iterator

from PIL import Image

from varve.pipeline.decoders._index import Contradicted, Index
from varve.pipeline.decoders._stream import Undecodable

LIBRARY = "torchcodec"


def pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (display index, RGB image) for each wanted frame, in display order.

    Raises:
        ModuleNotFoundError: torchcodec is not installed.
        Contradicted: torchcodec counts other frames than the index.
        Undecodable: `corrupt`, where torchcodec raises an error.
    """
    import torch
    from torchcodec.decoders import VideoDecoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # "exact" scans the packets; the approximate mode trusts the header's rate and count.
        video = VideoDecoder(
            path, dimension_order="NHWC", num_ffmpeg_threads=1, device=device, seek_mode="exact"
        )
        if len(video) != index.num_frames:
            raise Contradicted(f"torchcodec counts {len(video)} frames, not {index.num_frames}")
        frames_NHWC = video.get_frames_at(indices=wanted_N).data.cpu().numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        first = str(error).strip().splitlines()[0]
        raise Undecodable("corrupt", f"torchcodec: {first}; try --decoder auto") from error
    for number, frame_HWC in zip(wanted_N, frames_NHWC, strict=True):
        yield number, Image.fromarray(frame_HWC)
