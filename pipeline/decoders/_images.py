"""Folders of frames as picture files, in the order of their numbers (Something-Something v1).

Such a folder has no clock. Its frames count as 1/12 s apart, the rate of Something-Something.
"""

import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from varve.pipeline.datasets.media import FRAME_SUFFIXES, frame_files
from varve.pipeline.decoders._index import Index
from varve.pipeline.decoders._rgb import upright_rgb
from varve.pipeline.decoders._stream import Undecodable, from_os_error

FPS = 12.0


def read(path: str) -> Index:
    """Index the frames of the folder at `path`. Other files and pictures are ignored.

    Raises:
        Undecodable: `too_short` where the folder has no frame; `missing`; `unreadable`, also where
            its pictures are several clips.
    """
    try:
        files = tuple(str(file) for file in frame_files(path))
    except OSError as error:
        raise from_os_error(error) from error
    if not files:
        raise Undecodable("too_short", f"the folder holds no {', '.join(FRAME_SUFFIXES)} file")
    return Index(np.arange(len(files)) / FPS, 0, FPS, proven=True, files=files)


def pictures(path: str, index: Index, wanted_N: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index in natural order, RGB image) for each wanted frame.

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
                yield number, upright_rgb(image, name)
        except UnidentifiedImageError as error:
            raise Undecodable("corrupt", f"its frame {name} is no picture") from error
        except OSError as error:
            if error.errno is None:  # Pillow raises it for a picture that ends early
                raise Undecodable("corrupt", f"its frame {name}: {error}") from error
            raise from_os_error(error) from error
