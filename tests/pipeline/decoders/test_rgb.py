"""Conversion of every mode and format of pictures to RGB, by its stated rule."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from varve.contracts.videos import numbered
from varve.pipeline.datasets import media
from varve.pipeline.decoders import _images, read_index
from varve.pipeline.decoders._rgb import BITS, PHOTOMETRIC, upright_rgb
from varve.pipeline.decoders._stream import Undecodable

GREY = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
ORIENTATION = 274
WHITE_IS_ZERO = 0


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def rgb(image: Image.Image) -> np.ndarray:
    picture = upright_rgb(image, "1.png")
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_shifted_by_eight(kind):
    image = Image.fromarray(GREY)
    pictures = rgb(saved(image.convert("I") if kind == "PPM" else image, kind))
    assert (pictures.min(), pictures.max()) == (0, 255)
    np.testing.assert_array_equal(pictures, np.repeat((GREY >> 8)[..., None], 3, axis=2))


def test_depths_of_a_part_of_the_range_stay_different():
    depth = np.linspace(1000, 3540, 48 * 64).astype(np.uint16).reshape(48, 64)
    assert sorted(np.unique(rgb(saved(Image.fromarray(depth), "PNG")))) == list(range(3, 14))


def test_tiff_files_in_which_white_is_zero_are_inverted():
    image = saved(Image.fromarray(GREY), "TIFF", tiffinfo={PHOTOMETRIC: WHITE_IS_ZERO})
    np.testing.assert_array_equal(rgb(image)[..., 0], 255 - (GREY >> 8))


def test_twelve_bits_are_shifted_by_four():
    image = saved(Image.fromarray(GREY >> 4), "TIFF")
    image.load()
    image.tag_v2[BITS] = (12,)
    np.testing.assert_array_equal(rgb(image)[..., 0], GREY >> 8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_by_pillow(mode):
    image = Image.fromarray(numbered(37)).convert(mode)
    np.testing.assert_array_equal(rgb(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_dropped(mode, kind):
    colours = np.full((8, 8, 3), 204, np.uint8)
    image = Image.fromarray(colours).convert(mode)
    if mode == "P":
        options = {"transparency": image.getpixel((0, 0))} if kind == "PNG" else {}
    else:
        image.putalpha(0)
        options = {"exact": True}
    np.testing.assert_array_equal(rgb(saved(image, kind, lossless=True, **options)), colours)


@pytest.mark.parametrize("mode", ["I", "F", "LAB", "La"])
def test_modes_without_a_known_range_are_refused_by_name(mode):
    with pytest.raises(Undecodable, match=rf"frame 1\.png has the mode {mode} of Pillow.*8 bits"):
        upright_rgb(Image.new(mode, (4, 4)), "1.png")
    if mode in "IF":
        with pytest.raises(Undecodable, match=f"mode {mode} "):
            upright_rgb(saved(Image.new(mode, (4, 4)), "TIFF"), "1.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_orientation_is_applied_once(kind, orientation, turns):
    stored = np.zeros((96, 128, 3), np.uint8)
    stored[:48, :64] = 255  # the upper left quarter is white
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = rgb(saved(Image.fromarray(stored), kind, exif=exif))
    np.testing.assert_allclose(upright, np.rot90(stored, turns), atol=48 * (kind != "PNG"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_a_file_of_several_pictures_is_no_frame(kind):
    first, *rest = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(3)]
    image = saved(first, kind, save_all=True, append_images=rest)
    with pytest.raises(Undecodable, match=rf"1\.png is a file of 3 pictures \({kind}\); save each"):
        upright_rgb(image, "1.png")


@pytest.mark.parametrize("suffix", ["bmp", "tif", "tiff", "webp", "ppm", "png", "TIF"])
def test_every_format_of_frames_is_read_in_order(tmp_path, suffix):
    for number in (1, 2, 10):
        lossless = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(numbered(number)).save(tmp_path / f"f{number}.{suffix}", **lossless)
    frames = dict(_images.pictures(str(tmp_path), read_index(str(tmp_path)), [0, 1, 2]))
    for index, number in enumerate((1, 2, 10)):
        np.testing.assert_array_equal(np.asarray(frames[index]), numbered(number))


def test_frames_of_two_kinds_are_unreadable_and_named(tmp_path):
    for name in ("img_1.png", "frame_1.png"):
        Image.fromarray(numbered(1)).save(tmp_path / name)
    with pytest.raises(Undecodable, match=r"frame_#\.png \(1\), img_#\.png \(1\)") as caught:
        read_index(str(tmp_path))
    assert caught.value.reason == "unreadable"


# Keys of folders whose pixels the first release read otherwise


def digest_of(folder, images, kind, **options) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.{kind}", **options)
    return media.content_digest(folder)


def plain_digest(folder) -> str:
    """Return the digest of a folder by the first release."""
    total = hashlib.sha256(b"folder")
    for file in media.frame_files(folder):
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_ordinary_pictures_keep_their_digest(tmp_path, mode):
    image = Image.fromarray(numbered(5)).convert(mode)
    assert digest_of(tmp_path / "a", [image], "png") == plain_digest(tmp_path / "a")
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    upright = digest_of(tmp_path / "b", [image.convert("RGB")], "jpg", exif=exif)
    assert upright == plain_digest(tmp_path / "b")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_turned_pictures_have_another_digest(tmp_path, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = digest_of(tmp_path / "a", [Image.fromarray(numbered(5))], kind, exif=exif)
    assert turned != plain_digest(tmp_path / "a")


def test_pictures_of_sixteen_bits_have_another_digest(tmp_path):
    assert digest_of(tmp_path / "a", [Image.fromarray(GREY)], "png") != plain_digest(tmp_path / "a")


def test_a_damaged_picture_has_a_digest(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8Exif and no more")
    assert media.content_digest(tmp_path) == plain_digest(tmp_path)


def test_folders_of_older_stores_are_digested_once_more(tmp_path):
    file = tmp_path / "1.jpg"
    file.write_bytes(b"x")
    newest = max(file.stat().st_mtime_ns, tmp_path.stat().st_mtime_ns)
    assert media.size_and_mtime(tmp_path) == (1, newest + 1)
    assert media.size_and_mtime(file) == (1, file.stat().st_mtime_ns)
