"""A folder of frames as JPEG or PNG files, in natural order (Something-Something v1).

Such a folder has no clock: its frames are 1/12 s apart, the rate Something-Something was cut at.
"""

import os
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.decoders._index import Index
from pipeline.decoders._stream import Undecodable, refused

FPS = 12.0
SUFFIXES = (".jpg", ".jpeg", ".png")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that counts: frame2 before frame10, whatever the padding.

    >>> sorted(["f10.jpg", "f2.jpg", "f010b.jpg"], key=natural)
    ['f2.jpg', 'f10.jpg', 'f010b.jpg']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def read(path: str) -> Index:
    """Index the frames of the folder at `path`. Hidden files and other kinds are passed over.

    Raises:
        Undecodable: `too_short` where it holds no frame; `unreadable`.
    """
    try:
        names = os.listdir(path)
    except OSError as error:
        raise refused(error) from error
    frames = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not frames:
        raise Undecodable("too_short", f"the folder holds no {', '.join(SUFFIXES)} file")
    # The name itself settles 1.jpg against 01.jpg.
    frames.sort(key=lambda name: (natural(name), name))
    files = tuple(os.path.join(path, name) for name in frames)
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
