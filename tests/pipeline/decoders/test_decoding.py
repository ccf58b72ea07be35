"""Decoding, exact to the frame: against numbers in the pictures, a whole decode, and ffmpeg."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders import Decoded, Failure, Request, Stretch, _index, decode, pyav

REAL = Path(__file__).parents[4] / "shared" / "data"
SMALL = Picture(size=96, resize=96)
KINDS = ["h264.mp4", "h264_open.mp4", "h264_open.ts", "h264.mkv", "h264.avi", "uneven.mp4",
         "uneven.mkv", "sound_first.mp4", "full_range.mp4", "ten_bit.mp4", "interlaced.ts",
         "odd.mkv", "single.mp4", "mpeg4.avi", "mpeg4_b.avi", "mpeg4_b.mp4", "mpeg2.mpg",
         "hevc.mp4", "vp9.webm", "vp8.webm", "motion.avi", "sorenson.flv", "cut_h264.mp4",
         "cut_h264_open.mp4", "cut_mpeg4_b.mp4"]  # fmt: skip


def index_and_frames(path, wanted=None):
    """Decode as a child does: trust the index until decoding contradicts it."""
    index = _index.read(str(path))
    try:
        numbers = list(range(index.num_frames)) if wanted is None else wanted
        return index, [np.asarray(image) for _, image in pyav.pictures(str(path), index, numbers)]
    except _index.Contradicted:
        index = _index.read(str(path), proof=False)
        numbers = list(range(index.num_frames)) if wanted is None else wanted
        return index, [np.asarray(image) for _, image in pyav.pictures(str(path), index, numbers)]


def whole_decode(path):
    """Every frame in decoding order, by the shortest use of PyAV there is."""
    with av.open(str(path)) as container:
        return [
            frame.to_ndarray(format="rgb24", interpolation=Interpolation.BICUBIC)
            for frame in container.decode(container.streams.video[0])
        ]


def ffmpeg_frames(path, height, width):
    """Every frame as the command line tool gives it."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed: not compared with it")
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), "-map", "0:v:0",
               "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    raw = subprocess.run(command, capture_output=True, check=False).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def decode_one(path, frame_set=None, **stretch):
    (answer,) = decode(
        Request(str(path), (Stretch(**stretch),), (frame_set or FrameSet(picture=SMALL),))
    )
    return answer


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_shows_its_number(videos, number_of, name):
    index, frames = index_and_frames(videos[name].path)
    assert index.num_frames == len(videos[name].numbers)
    assert [number_of(frame) for frame in frames] == videos[name].numbers


@pytest.mark.parametrize("name", KINDS)
def test_a_few_frames_are_the_same_frames_as_all_of_them(videos, name):
    index, frames = index_and_frames(videos[name].path)
    for stride in (7, 23):
        wanted = list(range(stride // 2, index.num_frames, stride)) or [0]
        _, few = index_and_frames(videos[name].path, wanted)
        for number, frame in zip(wanted, few, strict=True):
            np.testing.assert_array_equal(frame, frames[number])


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"ten_bit.mp4", "interlaced.ts"}))
def test_frames_equal_a_whole_decode_to_the_bit(videos, name):
    _, frames = index_and_frames(videos[name].path)
    expected = whole_decode(videos[name].path)
    assert len(frames) == len(expected)
    for frame, reference in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame, reference)


@pytest.mark.parametrize("name", [*KINDS, "turned.mp4"])
def test_frames_equal_ffmpegs_to_the_bit(videos, name):
    _, frames = index_and_frames(videos[name].path)
    expected = ffmpeg_frames(videos[name].path, *frames[0].shape[:2])
    assert len(frames) == len(expected)
    for frame, reference in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame, reference)


def real_videos():
    return [
        *sorted(REAL.glob("ucf101_few/*/*.avi"))[::2],
        *sorted(REAL.glob("asl20/*.mkv"))[::7],
        *sorted(REAL.glob("asl24/*/*.mp4"))[::300],
    ]


def test_real_videos_equal_a_whole_decode_and_ffmpeg():
    paths = real_videos()
    if not paths:
        pytest.skip(f"no real videos at {REAL}")
    for path in paths:
        whole = whole_decode(path)
        count = len(whole)
        wanted = sorted({(2 * i + 1) * count // 16 for i in range(8)} | {0, count - 1})
        index, frames = index_and_frames(path, wanted)
        assert index.num_frames == count, path.name
        for number, frame in zip(wanted, frames, strict=True):
            np.testing.assert_array_equal(frame, whole[number], err_msg=path.name)
        if shutil.which("ffmpeg"):
            expected = ffmpeg_frames(path, *frames[0].shape[:2])
            assert len(expected) == count, path.name
            for number, frame in zip(wanted, frames, strict=True):
                # MPEG-4's inverse transform has changed by one level between releases of FFmpeg.
                assert np.abs(frame.astype(np.int16) - expected[number]).max() <= 1, path.name


def test_a_turned_video_is_shown_upright(videos, number_of):
    _, (frame,) = index_and_frames(videos["turned.mp4"].path, [5])
    assert frame.shape == (160, 96, 3)
    assert number_of(np.rot90(frame, -1)) == 5


def test_only_groups_of_pictures_with_a_wanted_frame_are_decoded(videos, monkeypatch):
    index = _index.read(str(videos["h264.mp4"].path))
    assert index.proven
    assert index.source.starts == [0, 12, 24, 36, 48]
    fed = []

    class Spy:
        def __init__(self, context):
            self.context = context

        def __getattr__(self, name):
            return getattr(self.context, name)

        def decode(self, packet):
            fed.append(packet)
            return self.context.decode(packet)

    class Stream:
        codec_context = Spy(index.source.stream.codec_context)

    monkeypatch.setattr(index.source, "stream", Stream)
    list(pyav.pictures("", index, [49, 50]))
    assert 3 <= len(fed) <= 12


@pytest.mark.parametrize("kept", ["nothing", "packets", "frames"])
@pytest.mark.parametrize("name", ["h264.mp4", "cut_h264.mp4", "mpeg4_b.avi", "sorenson.flv"])
def test_what_is_too_large_to_be_kept_is_read_again_to_the_same_frames(
    videos, name, kept, monkeypatch
):
    _, expected = index_and_frames(videos[name].path, [3, 30, 40])
    if kept != "packets":
        monkeypatch.setattr(_index, "KEPT_PACKET_BYTES", 1000)
    if kept != "frames":
        monkeypatch.setattr(_index, "KEPT_FRAME_BYTES", 1000)
    index, frames = index_and_frames(videos[name].path, [3, 30, 40])
    assert (index.source.packets is None) == (kept != "packets")
    assert (index.source.frames is None) == (index.proven or kept != "frames")
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("h264.mp4", 5),
        ("h264.mkv", 5),
        ("h264_open.mp4", 1),  # later groups begin with pictures that refer to the one before
        ("mpeg2.mpg", 1),
        ("mpeg4.avi", 5),
        ("mpeg4_b.avi", 1),
        ("vp9.webm", 5),
        ("motion.avi", 60),
        ("cut_h264.mp4", 0),
        ("cut_mpeg4_b.mp4", 0),
        ("sorenson.flv", 0),
    ],
)
def test_decoding_may_begin_only_where_nothing_refers_across(videos, name, starts):
    index = _index.read(str(videos[name].path))
    assert len(index.source.starts) == starts
    assert index.proven == (starts > 0)
    numbers = list(range(index.num_frames))
    assert [n for n, _ in pyav.pictures("", index, numbers)] == numbers


def test_a_frame_that_is_not_where_the_index_has_it_contradicts_the_index(videos):
    path = str(videos["h264.mp4"].path)
    moved = _index.read(path)
    moved.source.ticks_N[5] += 1
    with pytest.raises(_index.Contradicted):
        list(pyav.pictures(path, moved, [7]))
    short = _index.read(path)
    del short.source.packets[-1]
    with pytest.raises(_index.Contradicted):
        list(pyav.pictures(path, short, [59]))


def test_a_contradicted_index_is_replaced_by_counting(videos):
    path = str(videos["h264.avi"].path)  # this container has no presentation times: guesses
    with pytest.raises(_index.Contradicted):
        list(pyav.pictures(path, _index.read(path), [30]))
    assert decode_one(path).facts.num_frames == 60


def test_times_follow_a_variable_rate_from_zero(videos):
    expected = (np.arange(60) * 40 + 17 * (np.arange(60) % 3) + 300 * (np.arange(60) // 20)) / 1000
    for name in ("uneven.mp4", "uneven.mkv"):
        times = _index.read(str(videos[name].path)).times_N
        np.testing.assert_allclose(times, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "hazard"),
    [
        ("h264.mp4", ""),
        ("mpeg4.avi", ""),
        ("cut_h264.mp4", "packets to be discarded, times below 0"),
    ],
)
def test_decord_is_trusted_with_plain_files_alone(videos, name, hazard, monkeypatch):
    assert _index.read(str(videos[name].path)).hazard == hazard
    frame_set = FrameSet(decoder="decord", picture=SMALL)
    if hazard:
        monkeypatch.setitem(sys.modules, "decord", None)  # not even loaded
    else:
        pytest.importorskip("decord")
    assert decode_one(videos[name].path, frame_set).facts.decoder == (
        "pyav" if hazard else "decord"
    )


def test_packed_b_frames_are_counted_by_decoding():
    paths = sorted(REAL.glob("ucf101_few/ApplyEyeMakeup/*.avi"))
    if not paths:
        pytest.skip(f"no real videos at {REAL}")
    index = _index.read(str(paths[0]))
    assert not index.proven
    assert "placeholder" in index.hazard


def test_one_request_answers_clips_and_frame_sets_in_one_pass(videos, number_of, monkeypatch):
    opened = []
    real = _index.open_video
    monkeypatch.setattr(_index, "open_video", lambda path: opened.append(path) or real(path))
    plain = FrameSet(frames=4, picture=Picture(size=96, resize=96, interpolation="bilinear"))
    dense = FrameSet(frames=3, sampling="dense", stride=1, picture=SMALL)
    path = str(videos["h264.mp4"].path)
    clips = (Stretch(seed="a"), Stretch(0.4, 0.8, "b"), Stretch(0.8, None, "c"), Stretch(9, 10))
    answers = decode(Request(path, clips, (plain, dense, plain)))
    assert len(opened) == 1
    assert [type(a) for a in answers] == [Decoded, Decoded, Decoded, Failure]
    assert [a.facts.num_frames for a in answers[:3]] == [60, 10, 40]
    assert [f.shape for f in answers[0].frames] == [(4, 96, 96, 3), (3, 96, 96, 3), (4, 96, 96, 3)]
    assert answers[0].frames[0] is answers[0].frames[2]
    _, frames = index_and_frames(path)
    middle = [frames[n][:, 32:128] for n in (13, 15, 17)]
    assert np.array_equal(decode(Request(path, (Stretch(0.4, 0.8),), (
        FrameSet(frames=5, sampling="tsn", picture=SMALL),)))[0].frames[0][1:4],
        middle)  # fmt: skip


def test_adjacent_intervals_share_no_frame_and_lose_none(videos):
    path = str(videos["uneven.mkv"].path)
    edges = [0.0, 0.04, 0.5, 1.337, 2.0, None]
    clips = tuple(Stretch(a, b) for a, b in pairwise(edges))
    answers = decode(Request(path, clips, (FrameSet(frames=1, picture=SMALL),)))
    assert sum(a.facts.num_frames for a in answers) == 60


def test_facts_report_what_was_counted(videos):
    facts = decode_one(videos["cut_h264.mp4"].path).facts
    assert (facts.num_frames, facts.num_frames_claimed) == (41, 60)
    assert facts.warning == ""  # the other frames are hidden by an edit list
    plain = decode_one(videos["h264.mp4"].path).facts
    assert (plain.num_frames, plain.num_frames_claimed, plain.fps) == (60, 60, 25.0)
    assert (plain.width, plain.height, plain.decoder, plain.warning) == (160, 96, "pyav", "")


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path, number_of, videos):
    path = str(videos["h264.mp4"].path)
    for number, image in pyav.pictures(path, _index.read(path), list(range(60))):
        image.save(tmp_path / f"{number}.png")
    answer = decode_one(tmp_path, FrameSet(frames=60, picture=Picture(size=96, resize=96)))
    assert (answer.facts.num_frames, answer.facts.fps) == (60, 12.0)
    assert (answer.facts.decoder, answer.facts.width) == ("images", 160)
    clip = decode_one(
        tmp_path, FrameSet(frames=1, picture=SMALL), start_seconds=1.0, end_seconds=2.0
    )
    assert clip.facts.num_frames == 12
    _, expected = index_and_frames(path, [18])
    np.testing.assert_array_equal(clip.frames[0][0], expected[0][:, 32:128])


def test_a_decoding_child_loads_neither_torch_nor_dask():
    code = (
        "import sys, varve.pipeline.decoders, varve.pipeline.decoders.pyav\n"
        "heavy = {'torch', 'dask', 'distributed', 'zarr', 'pandas', 'decord'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_decoder_that_is_not_installed_is_no_fault_of_the_file(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ModuleNotFoundError):
        decode_one(videos["h264.mp4"].path, FrameSet(decoder="decord"))
