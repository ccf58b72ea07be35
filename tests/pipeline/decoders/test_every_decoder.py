"""What every decoder in pipeline/decoders must do, found by file name."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from varve.pipeline.decoders import _index, images
from varve.pipeline.registry import available, variant

LIBRARIES = {"pyav": "av", "images": "PIL"}
WANTED = [0, 1, 11, 12, 13, 30, 47, 59]


@pytest.fixture(params=available("decoders"))
def decoder(request):
    library = LIBRARIES.get(request.param, request.param)
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return request.param


@pytest.fixture
def decode(decoder, videos, tmp_path):
    """Decode wanted frames of a plain video, or of the same frames as a folder."""

    def run(wanted, name="h264.mp4"):
        path = str(videos[name].path)
        index = _index.read(path)
        if decoder == "images":
            for number, image in variant("decoders", "pyav").pictures(
                path, index, list(range(index.num_frames))
            ):
                image.save(tmp_path / f"frame{number}.png")
            path, index = str(tmp_path), images.read(str(tmp_path))
        return list(variant("decoders", decoder).pictures(path, index, wanted))

    return run


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi", "vp9.webm", "h264.mkv"])
def test_frames_are_those_asked_for_in_order(decode, number_of, name):
    found = decode(WANTED, name)
    assert [number for number, _ in found] == WANTED
    assert [number_of(np.asarray(image)) for _, image in found] == WANTED


@pytest.mark.parametrize("wanted", [[0], [59], [25]])
def test_a_single_frame_does_not_depend_on_the_others(decode, wanted):
    alone = decode(wanted)
    among = dict(decode(list(range(60))))
    assert [number for number, _ in alone] == wanted
    np.testing.assert_array_equal(np.asarray(alone[0][1]), np.asarray(among[wanted[0]]))


def test_pictures_are_rgb_at_the_videos_own_size(decode):
    ((_, image),) = decode([7])
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (160, 96))


def test_pictures_agree_between_decoders(decode, videos):
    path = str(videos["h264.mp4"].path)
    reference = variant("decoders", "pyav").pictures(path, _index.read(path), WANTED)
    for (_, image), (_, expected) in zip(decode(WANTED), reference, strict=True):
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
        assert difference.mean() <= 2
