"""A folder of frames as JPEG or PNG files, in natural order (Something-Something v1).

Such a folder has no clock: its frames are 1/12 s apart, the rate Something-Something was cut at.
"""

import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from varve.pipeline.datasets.media import FRAME_SUFFIXES, frame_files
from varve.pipeline.decoders._index import Index
from varve.pipeline.decoders._stream import Undecodable, refused

FPS = 12.0


def read(path: str) -> Index:
    """Index the frames of the folder at `path`. Hidden files and other kinds are passed over.

    Raises:
        Undecodable: `too_short` where it holds no frame; `unreadable`.
    """
    try:
        files = tuple(str(file) for file in frame_files(path))
    except OSError as error:
        raise refused(error) from error
    if not files:
        raise Undecodable("too_short", f"the folder holds no {', '.join(FRAME_SUFFIXES)} file")
    return Index(np.arange(len(files)) / FPS, 0, FPS, proven=True, files=files)


def pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (place in natural order, RGB image) for each wanted frame.

    Raises:
        Undecodable: `corrupt`, `empty`, `missing` or `unreadable`, naming the frame's file.
    """
    for number in wanted_N:
        file = index.files[number]
        name = os.path.basename(file)
        try:
            if os.path.getsize(file) == 0:
                raise Undecodable("empty", f"its frame {name} has 0 bytes")
            with Image.open(file) as image:
                yield number, image.convert("RGB")
        except UnidentifiedImageError as error:
            raise Undecodable("corrupt", f"its frame {name} is no picture") from error
        except OSError as error:
            if error.errno is None:  # Pillow's word for a picture that ends early
                raise Undecodable("corrupt", f"its frame {name}: {error}") from error
            raise refused(error) from error
