"""Choice of frames and of their square: rules at their edges, pictures against torchvision."""

import numpy as np
import pytest
from PIL import Image

from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders._crop import apply_crop, choose_crop
from varve.pipeline.decoders.sampling import indices

SETS = [
    {"sampling": "tsn"},
    {"sampling": "tsn_random"},
    {"sampling": "tsn_random", "view": 3},
    {"sampling": "uniform_fps", "fps": 7.0},
    {"sampling": "uniform_fps", "fps": 0.5},
    {"sampling": "dense", "stride": 1},
    {"sampling": "dense", "stride": 5, "view": 2},
]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("options", SETS, ids=str)
@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 100, 1001])
@pytest.mark.parametrize("frames", [1, 3, 8, 40])
def test_indices_are_ordered_and_inside_the_clip_whatever_its_length(options, num_frames, frames):
    frame_set = FrameSet(frames=frames, **options)
    for seed in "abcdefgh":
        frame_indices = indices(frame_set, np.arange(num_frames) / 25, seed)
        assert frame_indices.dtype == np.int64
        assert frame_indices.shape == (frames,)
        assert (np.diff(frame_indices) >= 0).all()
        assert frame_indices[0] >= 0
        assert frame_indices[-1] < num_frames


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="none"):
        indices(FrameSet(), np.empty(0))


def test_random_draws_cover_each_segment_and_nothing_else():
    frame_set = FrameSet(frames=4, sampling="tsn_random")
    drawn = np.stack([indices(frame_set, np.arange(10), str(seed)) for seed in range(200)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [
        [0, 1],
        [2, 3, 4],
        [5, 6],
        [7, 8, 9],
    ]


def test_draws_follow_the_clip_and_the_view_and_repeat_exactly():
    def draw(seed, view):
        frame_set = FrameSet(frames=8, sampling="tsn_random", view=view)
        return indices(frame_set, np.arange(1000), seed).tolist()

    assert draw("a", 1) == draw("a", 1)
    assert len({tuple(draw(seed, view)) for seed in "abc" for view in range(3)}) == 9
    # Golden: a change here changes what every stored view above 0 means.
    assert draw("clip", 1) == [97, 232, 273, 412, 558, 737, 792, 937]


def test_uniform_fps_follows_the_clock_not_the_count():
    # Ten frames in the first second, then one a second: the moment decides, not the middle index.
    times = np.concatenate([np.arange(10) / 10, np.arange(1, 10)])
    frame_indices = indices(FrameSet(frames=3, sampling="uniform_fps", fps=0.5), times)
    # Shown for 9 + 9/18 seconds: the moments are 2.75, 4.75 and 6.75 s.
    assert times[frame_indices].tolist() == [2.0, 4.0, 6.0]


def test_uniform_fps_repeats_a_frame_until_the_next_is_due():
    times = np.array([0.0, 0.1, 5.0, 5.1])
    frame_indices = indices(FrameSet(frames=4, sampling="uniform_fps", fps=1.0), times)
    assert frame_indices.tolist() == [1, 1, 1, 1]


def test_uniform_fps_at_the_rate_of_the_clip_takes_neighbours_despite_rounded_clocks():
    for scale in (1 / 25, 1001 / 30000, 1 / 29.97):
        frame_indices = indices(FrameSet(frames=6, sampling="uniform_fps", fps=1 / scale),
                                np.arange(41) * scale)  # fmt: skip
        assert np.diff(frame_indices).tolist() == [1] * 5


def test_dense_starts_are_drawn_from_all_that_fit():
    starts = {
        int(
            indices(FrameSet(frames=3, sampling="dense", stride=2, view=1), np.arange(8), str(i))[0]
        )
        for i in range(200)
    }
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "size", [(320, 240), (240, 320), (341, 256), (224, 224), (225, 224), (161, 97), (30, 1000)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (256, 224), (96, 63)])
def test_pictures_equal_torchvisions_resize_and_centre_crop(size, interpolation, resize, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])
    image = noise(*size)
    spec = Picture(size=crop, resize=resize, interpolation=interpolation)
    cropped = apply_crop(image, choose_crop(FrameSet(picture=spec), *size))
    assert cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, np.asarray(reference(image)))


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (225, 224)])
@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (256, 224), (96, 63)])
def test_corners_equal_torchvisions_five_crops(size, resize, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode("bilinear")
    image = noise(*size)
    reference = transforms.FiveCrop(crop)(transforms.Resize(resize, mode)(image))
    spec = Picture(size=crop, resize=resize, interpolation="bilinear")
    for view, expected in zip((-1, -2, -3, -4, 0), reference, strict=True):
        cropped = apply_crop(image, choose_crop(FrameSet(picture=spec, view=view), *size))
        np.testing.assert_array_equal(cropped, np.asarray(expected))


def test_corners_show_the_frames_of_the_plain_view():
    times = np.arange(50) / 25
    for options in ({"sampling": "tsn_random"}, {"sampling": "dense", "stride": 2}):
        plain, corner = (FrameSet(4, view=view, **options) for view in (0, -2))
        assert indices(corner, times, "a").tolist() == indices(plain, times, "a").tolist()
    with pytest.raises(ValueError, match="view=-1"):
        FrameSet(view=-1, flip=True)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_equal_the_preprocessing_of_open_clip(resize_mode, interpolation):
    open_clip = pytest.importorskip("open_clip")
    transforms = pytest.importorskip("torchvision.transforms")
    reference = open_clip.image_transform(
        224, is_train=False, resize_mode=resize_mode, interpolation=interpolation
    )
    names = [type(step).__name__ for step in reference.transforms]
    to_tensor = next(i for i, name in enumerate(names) if name.endswith("ToTensor"))
    before = transforms.Compose(reference.transforms[:to_tensor])
    image = noise(352, 240)
    spec = Picture(resize_mode=resize_mode, interpolation=interpolation)
    cropped = apply_crop(image, choose_crop(FrameSet(picture=spec), 352, 240))
    np.testing.assert_array_equal(cropped, np.asarray(before(image)))


def test_the_plain_view_is_never_cropped_or_mirrored():
    for seed in "abcdef":
        plain = choose_crop(FrameSet(view=0, flip=True, random_crop=True), 320, 240, seed)
        assert plain == choose_crop(FrameSet(), 320, 240)


@pytest.mark.parametrize(("width", "height"), [(320, 240), (97, 161), (3, 2), (1, 1)])
def test_drawn_squares_lie_inside_the_frame_and_use_all_of_it(width, height):
    frame_set = FrameSet(view=1, random_crop=True)
    boxes = [choose_crop(frame_set, width, height, str(seed)).box for seed in range(400)]
    shorter = min(width, height)
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        assert right - left == lower - upper
        assert round(0.6 * shorter) - 1 <= right - left <= shorter
    assert min(box[0] for box in boxes) == 0
    assert max(box[2] for box in boxes) >= width - width // 20
    assert len({box[2] - box[0] for box in boxes}) >= min(shorter * 0.3, 50)


def test_half_of_the_clips_are_mirrored_and_the_crop_does_not_change_with_it():
    both = [
        choose_crop(FrameSet(view=1, random_crop=True, flip=True), 320, 240, str(s))
        for s in range(400)
    ]
    only = [choose_crop(FrameSet(view=1, random_crop=True), 320, 240, str(s)) for s in range(400)]
    assert [c.box for c in both] == [c.box for c in only]
    assert 160 < sum(c.flip for c in both) < 240
    assert not any(c.flip for c in only)


def test_a_mirrored_picture_is_the_picture_mirrored():
    image = noise(320, 240)
    flips = {}
    for seed in range(20):
        crop = choose_crop(FrameSet(view=1, flip=True), 320, 240, str(seed))
        flips[crop.flip] = apply_crop(image, crop)
    np.testing.assert_array_equal(flips[True], flips[False][:, ::-1])


def test_a_drawn_square_shows_that_part_of_the_frame():
    image = noise(320, 240)
    spec = Picture(size=64, resize=64, interpolation="bilinear")
    crop = choose_crop(FrameSet(view=1, random_crop=True, picture=spec), 320, 240, "clip")
    part = image.crop(crop.box).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(apply_crop(image, crop), np.asarray(part))


def test_grey_and_transparent_images_become_rgb():
    for mode in ("L", "RGBA", "P", "CMYK"):
        cropped = apply_crop(noise(40, 30).convert(mode), choose_crop(FrameSet(), 40, 30))
        assert cropped.shape == (224, 224, 3)


def test_the_drawn_view_has_not_changed():
    crop = choose_crop(FrameSet(view=1, random_crop=True, flip=True), 320, 240, "clip")
    assert (crop.box, crop.flip) == ((18, 28, 223, 233), True)


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"size": 225}, {"interpolation": "nearest"}, {"resize_mode": "longest"}],
)
def test_pictures_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="picture"):
        Picture(**options)
