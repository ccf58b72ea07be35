"""The clock of a file: its earliest stream starts at 0, and clips are intervals of it."""

import shutil
import subprocess

import numpy as np
import pytest

from varve import BuildSpec, FeatureStore, Runtime, build
from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders import Request, Stretch, _index, decode

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")
SERIAL = Runtime(serial=True)
FRAMES, FPS, LATE = 40, 5, 1.0
TICKS = [round(1000 * LATE) + n * 1000 // FPS for n in range(FRAMES)]
NAMES = ("late.mp4", "late.mkv", "late.ts")
SIZE = 128
SQUARE = Picture(SIZE, SIZE)
# What the audio codec puts before its sound moves the start of some containers.
DELAY = 0.07


@pytest.fixture(scope="module")
def late(tmp_path_factory, encode):
    """Videos whose frames, at 5 frames a second, start 1 s after the sound."""
    folder = tmp_path_factory.mktemp("late")
    for name in NAMES:
        encode(folder / name, "libx264", FRAMES, (SIZE, SIZE), ticks=TICKS, sound_first=True,
               bf="2")  # fmt: skip
    return folder


def frames_of(path, start, end, number_of, **options):
    """Numbers of the frames that an interval gives, and the facts of the clip."""
    frame_set = FrameSet(**{"frames": 4, "picture": SQUARE} | options)
    (clip,) = decode(Request(str(path), (Stretch(start, end),), (frame_set,)))
    return [number_of(np.asarray(picture)) for picture in clip.frames[0]], clip.facts


@pytest.mark.parametrize("proof", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_frame_has_the_time_at_which_it_is_shown(late, name, proof):
    index = _index.read(str(late / name), proof)
    assert index.times_N[0] == pytest.approx(LATE, abs=DELAY)
    np.testing.assert_allclose(np.diff(index.times_N), 1 / FPS, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_interval_is_one_of_the_clock_of_the_file(late, name, number_of):
    frames, facts = frames_of(late / name, 2.1, 3.7, number_of)
    assert (frames, facts.num_frames) == ([7, 9, 11, 13], 8)
    (early,) = decode(Request(str(late / name), (Stretch(0.0, 0.9),), (FrameSet(picture=SQUARE),)))
    assert early.reason == "too_short"
    assert "40 frames are from " in early.detail


@pytest.mark.parametrize("options", [{}, {"sampling": "uniform_fps", "fps": 2.0},
                                     {"sampling": "dense", "stride": 3}], ids=str)  # fmt: skip
def test_frames_of_a_whole_file_do_not_depend_on_when_it_starts(late, encode, tmp_path, options,
                                                                 number_of):  # fmt: skip
    ticks = [tick - TICKS[0] for tick in TICKS]
    plain = encode(tmp_path / "plain.mp4", "libx264", FRAMES, (SIZE, SIZE), ticks=ticks, bf="2")
    expected, _ = frames_of(plain, None, None, number_of, **options)
    for name in NAMES:
        assert frames_of(late / name, None, None, number_of, **options)[0] == expected


@pytest.mark.parametrize(
    "name", ["h264.mp4", "h264.mkv", "h264_open.ts", "mpeg4_b.avi", "mpeg2.mpg", "cut_h264.mp4"]
)
def test_a_video_that_starts_first_has_its_first_frame_at_0(videos, name):
    for proof in (True, False):
        assert _index.read(str(videos[name].path), proof).times_N[0] == 0


def test_a_container_without_presentation_times_has_its_first_frame_at_0(encode, tmp_path):
    path = encode(tmp_path / "a.avi", "mpeg4", sound_first=True, bf="2")
    assert _index.read(str(path)).times_N[0] == 0


def test_video_far_behind_its_sound_is_at_its_time_too(encode, tmp_path):
    """Longer than FFmpeg looks for the start of a stream."""
    ticks = [30_000 + 100 * n for n in range(10)]
    path = encode(tmp_path / "a.ts", "libx264", 10, ticks=ticks, sound_first=True)
    assert _index.read(str(path)).times_N[0] == pytest.approx(30, abs=DELAY)


def test_whole_videos_have_the_times_of_the_file(late, tmp_path):
    lines = ["path,label,start,end"]
    lines += [line for name in NAMES for line in (f"{name},a,2.1,3.7", f"{name},b,,")]
    (late / "clips.csv").write_text("\n".join(lines))
    spec = BuildSpec("resnet18:random-0", "stem:pool", sampling="all", dtype="float32")
    report = build(late, tmp_path / "s.zarr", spec, runtime=SERIAL)
    assert report.clips == {"ready": 6}
    (feature,) = FeatureStore.open(tmp_path / "s.zarr").features()
    for row in (0, 2, 4):
        assert feature.frames(row).tolist() == list(range(6, 14)), row
        shown = feature.times(row + 1) - feature.times(row + 1)[0]
        np.testing.assert_allclose(shown, np.arange(FRAMES) / FPS, atol=2e-3)
        assert feature.times(row + 1)[0] == pytest.approx(LATE, abs=DELAY)
    direct = BuildSpec("resnet18:random-0", "stem:pool", frames=4, dtype="float32")
    build(late, tmp_path / "direct.zarr", direct, runtime=SERIAL)
    (alone,) = FeatureStore.open(tmp_path / "direct.zarr").features()
    np.testing.assert_allclose(feature.sampled(frames=4).read(), alone.read(), atol=1e-6)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_intervals_are_those_of_ffmpeg(late, name, number_of):
    cut = ["ffmpeg", "-v", "error", "-ss", "2.1", "-t", "1.6", "-i", str(late / name)]
    raw_video = ["-map", "0:v", "-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough"]
    raw = subprocess.run([*cut, *raw_video, "-"], capture_output=True, check=True).stdout
    shown = np.frombuffer(raw, np.uint8).reshape(-1, SIZE, SIZE, 3)
    expected = [number_of(picture) for picture in shown]
    assert expected == list(range(6, 14))
    assert frames_of(late / name, 2.1, 3.7, number_of, frames=8)[0] == expected
