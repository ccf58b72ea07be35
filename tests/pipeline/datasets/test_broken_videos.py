"""Files that are broken, cut off or no videos at all: what they hold, or a true reason why not."""

import os
import re
import shutil
import socket
import subprocess

import av
import numpy as np
import pytest

from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders import (
    REASONS,
    Decoded,
    Failure,
    Request,
    Stretch,
    _index,
    decode,
    pyav,
)

SMALL = Picture(size=96, resize=96)


def decode_one(path, frame_set=None, **stretch):
    (answer,) = decode(
        Request(str(path), (Stretch(**stretch),), (frame_set or FrameSet(picture=SMALL),))
    )
    return answer


@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.mkv", "fast.mp4"])
def test_a_truncated_file_is_decoded_as_far_as_it_goes(videos, encode, tmp_path, number_of, name):
    if name == "fast.mp4":
        whole = tmp_path / name
        with (
            av.open(str(videos["h264.mp4"].path)) as old,
            av.open(str(whole), "w", options={"movflags": "faststart"}) as new,
        ):
            copy = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = copy
                    new.mux(packet)
    else:
        # Long enough that the header's seconds tell.
        whole = encode(tmp_path / name, "mpeg4" if name.endswith("avi") else "libx264", 120, g="12")
    content = whole.read_bytes()
    part = tmp_path / f"part_{name}"
    part.write_bytes(content[: len(content) // 2])
    answer = decode_one(part)
    assert 5 < answer.facts.num_frames < (60 if name == "fast.mp4" else 110)
    assert "header promises" in answer.facts.warning
    # Up to the last, which may be half a picture.
    wanted = list(range(answer.facts.num_frames - 1))
    pictures = pyav.pictures(str(part), _index.read(str(part), proof=False), wanted)
    assert [number_of(np.asarray(image)) for _, image in pictures] == wanted


def with_sound(path, video_seconds, sound_seconds, codec="libx264", sound_codec="aac"):
    """A file whose video and sound have different lengths, their packets in order of time."""
    packets = []
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25, options={"g": "12"})
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        sound = container.add_stream(sound_codec, rate=16000, layout="mono")
        for number in range(round(video_seconds * 25)):
            picture = np.full((96, 160, 3), number * 4 % 256, np.uint8)
            packets += video.encode(av.VideoFrame.from_ndarray(picture, "rgb24"))
        for start in range(0, round(sound_seconds * 16000), 1024):
            noise = np.random.default_rng(start).normal(size=(1, 1024)) / 10
            frame = av.AudioFrame.from_ndarray(noise.astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            packets += sound.encode(frame)
        packets += [*video.encode(None), *sound.encode(None)]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def test_whole_files_have_no_warning(videos):
    warnings = {name: decode_one(video.path).facts.warning for name, video in videos.items()}
    assert {name: text for name, text in warnings.items() if text} == {}


@pytest.mark.parametrize("seconds", [(2, 4), (4, 2)])
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts", "a.avi"])
def test_sound_of_another_length_is_no_cut(name, seconds, tmp_path):
    codecs = ("mpeg4", "libmp3lame") if name == "a.avi" else ("libx264", "aac")
    facts = decode_one(with_sound(tmp_path / name, *seconds, *codecs)).facts
    assert (facts.num_frames, facts.warning) == (seconds[0] * 25, "")


@pytest.mark.parametrize(
    "name", ["h264.mkv", "uneven.mkv", "odd.mkv", "vp8.webm", "mpeg4.avi", "h264_open.ts"]
)
@pytest.mark.parametrize("percent", [40, 60, 90, 97])
def test_a_cut_file_says_so(videos, name, percent, tmp_path):
    whole = videos[name].path.read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * percent // 100])
    facts = decode_one(tmp_path / name).facts
    assert "the file is cut off" in facts.warning
    if name.endswith((".mkv", ".webm")) and percent < 90:
        last = _index.read(str(tmp_path / name)).times_N[-1]
        promised, missing = re.search(
            r"promises ([\d.]+) seconds, the last ([\d.]+) of them are not there", facts.warning
        ).groups()
        assert float(promised) == pytest.approx(3.034 if name == "uneven.mkv" else 2.4, abs=0.01)
        assert float(promised) - float(missing) == pytest.approx(last + 0.04, abs=0.021)


def test_a_cut_file_that_declares_no_bytes_is_known_by_its_seconds(videos, tmp_path):
    whole = videos["sorenson.flv"].path.read_bytes()
    (tmp_path / "cut.flv").write_bytes(whole[: len(whole) * 9 // 10])
    warning = decode_one(tmp_path / "cut.flv").facts.warning
    assert re.match(r"the header promises 2\.4. seconds, the last 0\.[2-5]. of them", warning)


@pytest.mark.parametrize("percent", [30, 60, 92])
def test_an_mp4_without_its_index_says_so(videos, percent, tmp_path):
    whole = videos["h264.mp4"].path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * percent // 100])
    answer = decode_one(tmp_path / "cut.mp4")
    assert answer.reason in ("not_video", "corrupt")
    assert re.match(
        "no moov atom: the file is cut off" if percent < 90 else "the moov atom, its index, is cut",
        answer.detail,
    )
    assert "Invalid data" not in answer.detail


@pytest.mark.parametrize("name", ["mpeg4_b.avi", "h264.mp4", "vp9.webm", "mpeg2.mpg"])
def test_damaged_bytes_give_ffmpegs_count_or_a_reason(videos, tmp_path, name):
    content = bytearray(videos[name].path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 900] = np.random.default_rng(0).bytes(900)
    damaged = tmp_path / name
    damaged.write_bytes(content)
    answer = decode_one(damaged, FrameSet(frames=60, picture=SMALL))
    assert isinstance(answer, Decoded)
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed: its count is not compared")
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(damaged), "-vsync",
               "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    raw = subprocess.run(command, capture_output=True, check=False).stdout
    assert answer.facts.num_frames * 160 * 96 * 3 == len(raw)


def broken_files(folder, videos, encode):
    """Name, what to make at a path, and the reason that is due."""
    video = videos["h264.mp4"].path

    def fifo(path):
        os.mkfifo(path)

    def folder_of(*names):
        def make(path):
            path.mkdir()
            for name in names:
                (path / name).write_bytes(b"no picture")

        return make

    def sound(path):
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    return {
        "missing": (lambda path: None, "missing"),
        "empty.mp4": (lambda path: path.write_bytes(b""), "empty"),
        "text.mp4": (lambda path: path.write_text("no video at all\n" * 200), "not_video"),
        "subtitles.mp4": (
            lambda path: path.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n\n" * 50),
            "not_video",
        ),
        "playlist.mp4": (
            lambda path: path.write_text(f"#EXTM3U\n#EXTINF:9,\n{video}\n#EXT-X-ENDLIST\n"),
            "not_video",
        ),
        "concat.mp4": (
            lambda path: path.write_text(f"ffconcat version 1.0\nfile {video.name}\n"),
            "not_video",
        ),
        "noise.avi": (
            lambda path: path.write_bytes(np.random.default_rng(1).bytes(50_000)),
            "not_video",
        ),
        "headless.mp4": (
            lambda path: path.write_bytes(video.read_bytes()[: video.stat().st_size // 2]),
            "not_video",
        ),
        "sound.mp4": (sound, "no_video_stream"),
        "pipe.mp4": (fifo, "not_video"),
        "bare": (folder_of(), "too_short"),
        "notes": (folder_of("readme.txt", "._1.jpg"), "too_short"),
        "frames": (folder_of("1.jpg", "2.jpg"), "corrupt"),
        "link.mp4": (lambda path: path.symlink_to(path.parent / "nowhere"), "missing"),
        "bad\0name.mp4": (lambda path: None, "missing"),
    }


def test_every_broken_file_has_its_reason(videos, encode, tmp_path):
    for name, (make, reason) in broken_files(tmp_path, videos, encode).items():
        make(tmp_path / name)
        answer = decode_one(tmp_path / name)
        assert isinstance(answer, Failure), name
        assert (name, answer.reason) == (name, reason), answer
        assert answer.reason in REASONS
        assert len(answer.detail) > 10, answer


def test_a_socket_is_no_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.mp4")
        assert decode_one("s.mp4") == Failure("not_video", "a socket, not a regular file")


def test_a_file_that_may_not_be_read_is_unreadable(videos, tmp_path, monkeypatch):
    path = tmp_path / "locked.mp4"
    shutil.copy(videos["h264.mp4"].path, path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        refused = PermissionError(13, "Permission denied")
        monkeypatch.setattr("builtins.open", lambda *args, **more: (_ for _ in ()).throw(refused))
    assert decode_one(path) == Failure("unreadable", "Permission denied")


def test_an_interval_without_frames_reports_where_the_file_ends(videos):
    answer = decode_one(videos["h264.mp4"].path, start_seconds=5.0, end_seconds=9.0)
    assert answer == Failure(
        "too_short",
        "no frame between 5 s and 9 s: the file's 60 frames are from 0.000 s to 2.360 s",
    )


def test_names_with_colons_percents_and_other_bytes_are_only_names(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "http:x.mp4", "100%d.mp4", "sp ace 'q' \"é\".mp4", "\udcff\udcfe.mp4"):
        shutil.copy(videos["h264.mp4"].path, name)
        assert isinstance(decode_one(name), Decoded), ascii(name)
        assert isinstance(decode_one(os.path.join(tmp_path, name)), Decoded), ascii(name)


def test_metadata_in_another_encoding_is_no_reason_to_fail(encode, tmp_path):
    path = encode(tmp_path / "plain.mkv", "libx264", 10, metadata={"title": "caf@@"})
    content = path.read_bytes()
    assert content.count(b"caf@@") == 1
    path.write_bytes(content.replace(b"caf@@", b"caf\xe9\xff"))
    assert decode_one(path).facts.num_frames == 10
