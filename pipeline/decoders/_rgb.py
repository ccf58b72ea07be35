"""Any picture that Pillow opens, upright and as RGB with 8 bits a channel, or refused by name.

- RGB, grey (`L`), black and white (`1`), palettes (`P`), `CMYK`, `YCbCr`, `HSV`: Pillow's own
  conversion.
- Transparency (`RGBA`, `LA`, `PA`, and in a palette) is dropped, not composed, as of videos.
- 16 bits (`I;16`, and `I` of PGM and PNG files): value >> 8. TIFF files of 12 bits: value >> 4.
- `I` and `F` with 32 bits (TIFF) have no known range, and `LAB` no known white: refused.

An EXIF orientation is applied. Of several pictures in one file (animation, pages) none is taken;
of an MPO file, which is a JPEG with previews, the first.
"""

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffTags

from varve.pipeline.decoders._stream import Undecodable

CONVERTED = frozenset(
    ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA", "RGBa", "LA", "PA")
)
_TAGS = {info.name: tag for tag, info in TiffTags.TAGS_V2.items()}
BITS, PHOTOMETRIC = _TAGS["BitsPerSample"], _TAGS["PhotometricInterpretation"]
WHITE_IS_ZERO = 0


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return the picture as RGB, turned as its orientation says.

    Args:
        image: An open picture. It may be changed.
        name: Name of its file, for the message.

    Raises:
        Undecodable: `corrupt`: the file has several pictures, or a mode without a stated rule.
        OSError: The file cannot be read, or ends early.
    """
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":
        raise Undecodable(
            "corrupt",
            f"its frame {name} is a file of {count} pictures ({image.format}); save each as a file",
        )
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in CONVERTED:
        return image.convert("RGB")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_high_bits(image)).convert("RGB")
    raise Undecodable(
        "corrupt",
        f"its frame {name} has the mode {image.mode} of Pillow, whose range is not known; save it "
        "with 8 bits or 16 bits a channel, as grey or RGB",
    )


def _high_bits(image: Image.Image) -> np.ndarray:
    """Return the 8 highest bits of a grey picture of 16 bits, or of 12, uint8 [height, width]."""
    tags = getattr(image, "tag_v2", {})
    bits: int = max(tags.get(BITS, (16,)))
    values: np.ndarray = np.clip(np.asarray(image).astype(np.int64), 0, (1 << bits) - 1) >> (
        bits - 8
    )
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 255 - values
    return values.astype(np.uint8)
