"""Folders of frames, which are read whatever decoder is chosen."""

import numpy as np
import pytest
from PIL import Image

from varve.contracts.videos import number_of, numbered
from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders import Request, Stretch, _images, decode, read_index

WANTED = [0, 1, 11, 12, 13, 30, 47, 59]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    for number in range(60):
        Image.fromarray(numbered(number)).save(path / f"frame{number}.png")
    return str(path)


@pytest.mark.parametrize("wanted", [WANTED, [0], [59], [25]])
def test_frames_are_those_requested_in_order_and_unchanged(folder, wanted):
    frames = list(_images.pictures(folder, read_index(folder), wanted))
    assert [index for index, _ in frames] == wanted
    for index, image in frames:
        assert (image.mode, image.size) == ("RGB", (160, 96))
        np.testing.assert_array_equal(np.asarray(image), numbered(index))


@pytest.mark.parametrize("decoder", ["auto", "decord", "torchcodec"])
def test_no_decoder_is_used_for_a_folder(folder, decoder):
    frame_set = FrameSet(frames=60, decoder=decoder, picture=Picture(size=96, resize=96))
    (answer,) = decode(Request(folder, (Stretch(),), (frame_set,)))
    assert (answer.facts.decoder, answer.facts.num_frames) == ("images", 60)
    # The centre crop begins 32 pixels in: the two lowest bits are outside.
    wide = [np.pad(picture, ((0, 0), (32, 32), (0, 0))) for picture in answer.frames[0]]
    assert [number_of(picture) for picture in wide] == [n & ~0b11 for n in range(60)]
