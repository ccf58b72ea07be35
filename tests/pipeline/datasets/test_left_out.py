"""Clips by their name or first bytes, and the counts of all files that are no clip."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from varve.contracts.videos import numbered
from varve.pipeline.datasets.containers import OTHER, PICTURE, VIDEO, kind_of
from varve.pipeline.datasets.layouts import read

CODECS = {"mp4": "mpeg4", "matroska": "mpeg4", "avi": "mpeg4", "mpegts": "mpeg2video",
          "mpeg": "mpeg2video", "flv": "flv", "asf": "mpeg4", "mxf": "mpeg2video", "nut": "mpeg4",
          "yuv4mpegpipe": "rawvideo", "mov": "mpeg4"}  # fmt: skip


def put(root: Path, *files: str, content: bytes = b"") -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def paths(listing) -> list[str]:
    return [clip.path for clip in listing.clips]


def film(path: Path, container: str) -> None:
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(CODECS[container], rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered(number))
            file.mux(stream.encode(frame.reformat(format="yuv420p")))
        file.mux(stream.encode())


def animation(path: Path, kind: str, count: int = 3) -> None:
    first, *rest = [Image.fromarray(numbered(number)) for number in range(count)]
    first.save(path, kind, **({"save_all": True, "append_images": rest} if rest else {}))


@pytest.mark.parametrize("container", CODECS)
@pytest.mark.parametrize("name", ["no extension", "v.mp4_original", "odd.kind"])
def test_a_container_is_known_by_its_first_bytes(tmp_path, container, name):
    (tmp_path / "a").mkdir()
    film(tmp_path / "a" / name, container)
    with av.open(str(tmp_path / "a" / name)) as file:  # it is one that PyAV opens
        assert len(list(file.decode(video=0))) == 30
    listing = read(tmp_path)
    assert paths(listing) == [f"a/{name}"]
    assert listing.left_out == ()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("name", ["x.{kind}", "x"])
def test_animated_pictures_are_clips_and_stills_are_not(tmp_path, kind, name):
    for folder, count in (("animated", 3), ("still", 1)):
        (tmp_path / "a" / folder).mkdir(parents=True)
        animation(tmp_path / "a" / folder / name.format(kind=kind.lower()), kind, count)
    clips = [f"a/animated/{name.format(kind=kind.lower())}"]
    if kind != "GIF" and "." in name:
        clips.append("a/still")  # a folder of one frame
    listing = read(tmp_path)
    assert paths(listing) == clips
    assert listing.left_out == (() if len(clips) == 2 else (("pictures", 1),))


def test_a_long_gif_is_told_by_its_second_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)
    first = Image.fromarray(noise)
    first.save(tmp_path / "two.gif", save_all=True, append_images=[Image.fromarray(255 - noise)])
    first.save(tmp_path / "still.gif")
    assert (kind_of(tmp_path / "two.gif"), kind_of(tmp_path / "still.gif")) == (VIDEO, PICTURE)


@pytest.mark.parametrize(
    "suffix",
    "gif apng vob asf divx f4v h264 265 hevc mxf y4m rm rmvb dv ogm 3g2 m2v qt".split(),  # noqa: SIM905
)
def test_files_that_are_not_readable_are_clips_by_their_extension(tmp_path, suffix):
    put(tmp_path, f"a/x.{suffix}", f"a/Y.{suffix.upper()}", f"a/space.{suffix} ")
    assert len(read(tmp_path).clips) == 3
    assert read(tmp_path).left_out == ()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", OTHER),
        (b"text of some kind", OTHER),
        (b"RIFF\0\0\0\0WAVEfmt ", OTHER),
        (b"\0\0\0\x20ftypM4A \0", OTHER),
        (b"OggS" + b"\0" * 24 + b"\x01vorbis", OTHER),
        (b"OggS" + b"\0" * 24 + b"\x80theora", VIDEO),
        (b"\0\0\0\x20ftypheic\0", PICTURE),
        (b"\xff\xd8\xff\xe0", PICTURE),
        (b"G" + b" " * 187 + b"G", OTHER),
        ((b"G" + b" " * 187) * 5, VIDEO),
        ((b"\0\0\0\0G" + b" " * 187) * 5, VIDEO),
        (b"\0\0\0\x08wide\0\0\0\0mdat", VIDEO),
        (b"\0\0\0\x01\x67\x42", VIDEO),
        (b".RMF\0\0\0\x12", VIDEO),
    ],
)
def test_first_bytes_decide_where_the_name_does_not(tmp_path, content, kind):
    (tmp_path / "x.unknown").write_bytes(content)
    assert kind_of(tmp_path / "x.unknown") == kind
    (tmp_path / "x.txt").write_bytes(content)
    assert kind_of(tmp_path / "x.txt") == OTHER


def test_a_file_that_has_changed_is_judged_anew(tmp_path):
    (tmp_path / "x").write_bytes(b"no video")
    assert kind_of(tmp_path / "x") == OTHER
    (tmp_path / "x").write_bytes(b"YUV4MPEG2 W2 H2")
    assert kind_of(tmp_path / "x") == VIDEO


SYSTEM = ["@eaDir", "#recycle", "$RECYCLE.BIN", ".Trash-1000", "__MACOSX", "lost+found",
          ".ipynb_checkpoints", "System Volume Information", "@EADIR"]  # fmt: skip


@pytest.mark.parametrize("folder", SYSTEM)
def test_folders_of_systems_are_no_classes_and_no_clips(tmp_path, folder):
    put(tmp_path, "a/x.mp4", f"{folder}/y.mp4", f"a/{folder}/z.mp4", f"a/{folder}/1.jpg")
    listing = read(tmp_path)
    assert paths(listing) == ["a/x.mp4"]
    assert listing.classes == ("a",)
    assert listing.left_out == (("hidden or system entries", 2),)
    assert listing.summary.endswith("left out: 2 hidden or system entries")


def test_files_of_systems_are_skipped(tmp_path):
    put(tmp_path, "a/x.mp4", "a/._x.mp4", "a/.DS_Store", "a/Thumbs.db", "Desktop.ini")
    assert paths(read(tmp_path)) == ["a/x.mp4"]
    assert read(tmp_path).left_out == (("hidden or system entries", 4),)


def test_all_that_is_left_out_is_counted_by_kind(tmp_path):
    put(tmp_path, "a/x.mp4", "a/x.srt", "a/y.srt", "a/README", "a/poster.jpg", "top.mp4")
    put(tmp_path, "b/clip/img_1.jpg", "b/clip/img_2.jpg", "b/clip/flow_x_1.jpg", "b/clip/n.txt")
    listing = read(tmp_path)
    assert paths(listing) == ["a/x.mp4", "b/clip"]
    assert listing.left_out == (
        (".srt", 2),
        (".txt", 1),
        ("pictures", 1),
        ("pictures of optical flow", 1),
        ("videos", 1),
        ("without extension", 1),
    )
    assert "left out: 2 .srt, 1 .txt, 1 pictures, 1 pictures of optical flow" in listing.summary


def test_videos_that_no_list_names_are_counted_and_its_texts_are_not(tmp_path):
    put(tmp_path, "a/x.mp4", "a/y.mp4", "a/frames/1.jpg", "notes.txt", "a/x.wav")
    (tmp_path / "list.csv").write_text("path,label\na/x.mp4,x\n", "utf-8")
    assert read(tmp_path).left_out == ((".wav", 1), ("pictures", 1), ("videos", 1))
    # A list that is named itself chooses the files; the folders around it are not searched.
    assert read(tmp_path / "list.csv").left_out == ()
