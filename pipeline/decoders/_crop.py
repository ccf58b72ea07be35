"""The square of a frame that a view shows, and its resizing to the picture of a network.

Shapes: S the size of the picture in pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders.sampling import generator

SMALLEST_CROP = 0.6

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Crop:
    """Crop of the frames of a clip: one value for all T frames of a view.

    `box` is the (left, upper, right, lower) square of the frame that is resized to the whole
    picture; None for the resizing and crop of the plain view, at `corner`: its view, or 0 for the
    centre.
    """

    picture: Picture
    box: Box | None = None
    flip: bool = False
    corner: int = 0


def choose_crop(frame_set: FrameSet, width: int, height: int, seed: str = "") -> Crop:
    """Choose the square that a view shows of frames of `width` x `height` pixels.

    View 0 is always plain. Whether a view is mirrored does not change its crop, nor the reverse.
    """
    assert isinstance(frame_set.picture, Picture)
    if frame_set.view < 0:
        return Crop(frame_set.picture, corner=frame_set.view)
    if frame_set.view == 0 or not (frame_set.random_crop or frame_set.flip):
        return Crop(frame_set.picture)
    scale, across, down, mirror = generator(seed, frame_set.view, "picture").random(4).tolist()
    box = None
    if frame_set.random_crop:
        shorter = min(width, height)
        side = max(1, round(shorter * (SMALLEST_CROP + (1 - SMALLEST_CROP) * scale)))
        left = min(int(across * (width - side + 1)), width - side)
        upper = min(int(down * (height - side + 1)), height - side)
        box = (left, upper, left + side, upper + side)
    return Crop(frame_set.picture, box, frame_set.flip and mirror < 0.5)


def apply_crop(image: Image.Image, crop: Crop) -> np.ndarray:
    """Crop, resize and mirror one frame.

    The plain view equals `Resize` and `CenterCrop` of torchvision on Pillow images, the
    preprocessing of open_clip and timm, bit for bit.

    Returns:
        uint8 [S, S, 3] RGB, a new array.
    """
    size, resize = crop.picture.size, crop.picture.resize
    resample = Image.Resampling[crop.picture.interpolation.upper()]
    image = image.convert("RGB")
    if crop.box is not None:
        # Not `resize(box=...)`: its filter reads pixels outside the box.
        image = image.crop(crop.box).resize((size, size), resample)
    elif crop.picture.resize_mode == "squash":
        image = image.resize((size, size), resample)
    else:
        width, height = image.size
        if width <= height:
            width, height = resize, int(resize * height / width)
        else:
            width, height = int(resize * width / height), resize
        image = image.resize((width, height), resample)
        # Python rounds halves to even, and so does the reference: an odd margin matters here.
        left, upper = round((width - size) / 2.0), round((height - size) / 2.0)
        if crop.corner:
            right, lower = crop.corner in (-2, -4), crop.corner in (-3, -4)
            left, upper = right * (width - size), lower * (height - size)
        image = image.crop((left, upper, left + size, upper + size))
    if crop.flip:
        image = ImageOps.mirror(image)
    return np.array(image, dtype=np.uint8)
