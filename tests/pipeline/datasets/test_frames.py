"""Folders of frames: which pictures of a folder are the clip, their order, bytes and digest."""

import hashlib
from pathlib import Path

import pytest

from varve.pipeline.datasets import media
from varve.pipeline.datasets.frame_names import FLOW, OTHER, SECOND_FORMAT, choose_frames


def numbered(pattern: str, count: int = 20) -> list[str]:
    return [pattern.replace("#", f"{number:05d}") for number in range(1, count + 1)]


FLOWS = [*numbered("flow_x_#.jpg"), *numbered("flow_y_#.jpg")]


@pytest.mark.parametrize(
    "rgb",
    ["img_#.jpg", "image_#.png", "frame#.jpg", "Frame-#.JPG", "#.jpg", "rgb_#.jpg", "v_Dive_#.jpg"],
)
@pytest.mark.parametrize(
    "flow",
    [
        ("flow_x_#.jpg", "flow_y_#.jpg"),
        ("flow-x-#.png", "flow-y-#.png"),
        ("u_#.jpg", "v_#.jpg"),
        ("#_x.jpg", "#_y.jpg"),
        ("flow_i_#.jpg", "FlowU#.jpg"),
    ],
)
def test_rgb_frames_are_taken_and_flow_is_skipped(rgb, flow):
    frames = numbered(rgb)
    both = [*numbered(flow[0]), *frames, *numbered(flow[1])]
    chosen = choose_frames(reversed(both))
    assert list(chosen.names) == frames
    assert chosen.skipped == {FLOW: 40}


def test_order_is_of_the_numbers_and_not_of_the_digits():
    names = ["img_10.jpg", "img_2.jpg", "img_1.jpg", "IMG_3.JPEG"]
    assert choose_frames(["flow_x_1.jpg", *names]).names == (
        "IMG_3.JPEG",
        "img_1.jpg",
        "img_2.jpg",
        "img_10.jpg",
    )


@pytest.mark.parametrize(
    "only",
    ["flow_x_#.jpg", "depth_#.png", "S01_take2_#.jpg", "frame_#_of_20.jpg", "whatever #.jpg"],
)
def test_a_pattern_that_stands_alone_is_taken_whatever_its_name(only):
    frames = numbered(only)
    assert choose_frames(frames) == choose_frames([*frames, "Notes.txt", ".hidden1.jpg"])
    assert list(choose_frames(frames).names) == frames


@pytest.mark.parametrize(
    ("beside", "kind"),
    [
        (["cover.jpg", "poster.png"], OTHER),
        (["depth_00001.png", "00001_mask.png"], OTHER),
        (["img_00001.bmp", "img_00001.tif"], SECOND_FORMAT),
        (["scene_00001.jpg", "scene_00002.jpg"], OTHER),
    ],
)
def test_other_pictures_beside_frames_are_skipped_and_counted(beside, kind):
    frames = numbered("img_#.jpg")
    assert list(choose_frames([*beside, *frames]).names) == frames
    assert choose_frames([*beside, *frames]).skipped == {kind: 2}


def test_names_without_a_number_are_frames_where_no_name_has_one():
    assert choose_frames(["b.jpg", "a.png", "C.jpg"]).names == ("C.jpg", "a.png", "b.jpg")
    assert choose_frames(["b.jpg", "1.png"]).names == ("1.png",)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("img_#.jpg", "frame#.jpg"), r"2 kinds of frames: frame#\.jpg \(20\), img_#\.jpg \(20\)"),
        (("left#.jpg", "right#.jpg"), r"2 kinds of frames: left#\.jpg \(20\), right#\.jpg"),
        (("cam1_#.jpg", "cam2_#.jpg"), r"2 series of frames: cam1_#\.jpg \(20\), cam2_#\.jpg"),
        (("#.jpg", "#.png"), r"frames in several formats: #\.jpg \(20\), #\.png \(20\); keep one"),
        (("flow_x_#.jpg", "flow_y_#.jpg"), r"no RGB frames, only: flow_x_#\.jpg \(20\), flow_y"),
    ],
)
def test_two_clips_in_one_folder_are_an_error_that_names_them(tmp_path, patterns, message):
    for name in [name for pattern in patterns for name in numbered(pattern)]:
        (tmp_path / name).write_bytes(b"x")
    for examine in (media.frame_files, media.content_digest, media.size_and_mtime):
        with pytest.raises(media.AmbiguousFrames, match=message):
            examine(tmp_path)


def test_the_digest_is_of_the_frames_alone_in_order(tmp_path):
    for name in ("img_2.jpg", "img_10.jpg", "img_1.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    alone = media.content_digest(tmp_path)
    expected = hashlib.sha256(b"folder")
    for name in ("img_1.jpg", "img_2.jpg", "img_10.jpg"):
        expected.update(hashlib.sha256(name.encode()).digest())
    assert alone == expected.hexdigest()
    for name in FLOWS:
        (tmp_path / name).write_bytes(b"flow")
    assert media.content_digest(tmp_path) == alone


def test_a_folder_of_frames_and_flow_has_the_size_of_its_frames(tmp_path):
    (tmp_path / "img_1.jpg").write_bytes(b"four")
    (tmp_path / "flow_x_1.jpg").write_bytes(b"many bytes")
    assert media.size_and_mtime(tmp_path)[0] == 4
    assert media.frame_files(tmp_path) == [Path(tmp_path, "img_1.jpg")]
