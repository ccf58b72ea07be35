"""Tests of every decoder, on videos whose every frame shows its number."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varve.contracts.options import names
from varve.contracts.videos import encode, number_of
from varve.pipeline.decoders import Contradicted, Undecodable, read_index, require
from varve.pipeline.registry import variant

WANTED = [0, 1, 11, 12, 13, 30, 47, 59]
X264 = {"g": "12", "bf": "2", "preset": "veryfast"}
VIDEOS = {
    "h264.mp4": ("libx264", X264),
    "mpeg4.avi": ("mpeg4", {"g": "12", "b": "2M"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "h264.mkv": ("libx264", X264),
}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("decoder", names(metafunc.config, "decoders"))


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    return {
        name: str(encode(folder / name, codec, **options))
        for name, (codec, options) in VIDEOS.items()
    }


@pytest.fixture
def decode(decoder, paths):
    """Decode wanted frames of a plain video."""
    try:
        require(decoder)
    except ValueError as error:
        pytest.skip(str(error))
    module = variant("decoders", decoder)
    pictures = getattr(module, "pictures", module)

    def run(wanted, name="h264.mp4"):
        return list(pictures(paths[name], read_index(paths[name]), wanted))

    return run


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_asked_for_in_order(decode, name):
    frames = decode(WANTED, name)
    assert [index for index, _ in frames] == WANTED
    assert [number_of(np.asarray(image)) for _, image in frames] == WANTED


@pytest.mark.parametrize("wanted", [[0], [59], [25]])
def test_a_single_frame_does_not_depend_on_the_others(decode, wanted):
    alone = decode(wanted)
    among = dict(decode(list(range(60))))
    assert [index for index, _ in alone] == wanted
    np.testing.assert_array_equal(np.asarray(alone[0][1]), np.asarray(among[wanted[0]]))


def test_pictures_are_rgb_at_the_videos_own_size(decode):
    ((_, image),) = decode([7])
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (160, 96))


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damage_is_reported_and_no_other_frame_is_given(decoder, decode, paths, tmp_path, damage):
    """The file is damaged after it was indexed; PyAV is then asked, which needs `Contradicted`."""
    path, whole = tmp_path / "damaged.mkv", decode(WANTED, "h264.mkv")
    data = bytearray(Path(paths["h264.mkv"]).read_bytes())
    path.write_bytes(data)
    index = read_index(str(path))
    middle = len(data) // 2
    if damage == "cut":
        del data[middle:]
    else:
        data[middle : middle + 600] = bytes(range(250)) * 2 + bytes(100)
    path.write_bytes(data)
    if index.source is not None:
        index.source.packets = None  # read the file as it is now
    module = variant("decoders", decoder)
    frames = []
    with contextlib.suppress(Contradicted, Undecodable):
        for index_and_image in getattr(module, "pictures", module)(str(path), index, WANTED):
            frames.append(index_and_image)
        assert len(frames) == len(WANTED), "fewer frames than wanted, and no error"
    for (number, image), (expected_number, expected) in zip(frames, whole, strict=False):
        assert number == expected_number
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
        assert difference.mean() <= 2, f"frame {number} is another picture than before the damage"


def test_pictures_agree_between_decoders(decode, paths):
    path = paths["h264.mp4"]
    reference = variant("decoders", "pyav").pictures(path, read_index(path), WANTED)
    for (_, image), (_, expected) in zip(decode(WANTED), reference, strict=True):
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
        assert difference.mean() <= 2
