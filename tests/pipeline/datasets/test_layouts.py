"""Properties of single layouts, and the choice of one; varve.contracts has the rest."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from varve.pipeline.datasets.layouts import ListedClip, find, read

DATA = Path(__file__).parents[3].parent / "shared" / "data"


def shared(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"no ../shared/data/{name} beside the repository")
    return DATA / name


def put(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def splits(listing) -> dict[str, int]:
    return dict(Counter(clip.split for clip in listing.clips))


def paths(listing) -> list[str]:
    return [clip.path for clip in listing.clips]


# Choosing a layout


def test_a_root_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset at .*nowhere"):
        read(tmp_path / "nowhere")


def test_a_root_that_is_a_video_is_refused_with_the_next_move(tmp_path):
    put(tmp_path, "a.mp4")
    with pytest.raises(NotADirectoryError, match="name the directory that holds the videos"):
        read(tmp_path / "a.mp4")


def test_for_an_empty_directory_the_needs_of_each_layout_are_reported(tmp_path):
    with pytest.raises(ValueError, match="it holds no file") as caught:
        read(tmp_path)
    for name in ("class_folders", "hmdb51", "kinetics", "something_something", "table", "ucf101"):
        assert f"{name} needs " in str(caught.value)


def test_videos_without_classes_are_counted_by_kind(tmp_path):
    put(tmp_path, "a.mkv", "b.MKV", "c.txt", "README")
    with pytest.raises(ValueError, match=r"it holds 2 \.mkv, 1 without extension, 1 \.txt"):
        read(tmp_path)


def test_an_unknown_layout_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"no 'folders' in layouts; .*class_folders, hmdb51"):
        read(tmp_path, "folders")


def test_two_datasets_in_one_directory_are_refused_as_ambiguous(tmp_path):
    put(tmp_path, "ucf/trainlist01.txt", "hmdb/hmdb51_trainlist01.txt")
    with pytest.raises(ValueError, match=r"2 ways[\s\S]*--layout hmdb51[\s\S]*--layout ucf101"):
        read(tmp_path)


def test_a_list_goes_before_folders_and_an_official_list_before_a_plain_one(tmp_path):
    write(tmp_path / "list.csv", "path,label\nA/v_A_g01_c01.avi,mine\n")
    put(tmp_path, "A/v_A_g01_c01.avi")
    listing = read(tmp_path)
    assert listing.layout == "table"
    assert "--layout class_folders" in listing.summary
    write(tmp_path / "lists" / "trainlist01.txt", "A/v_A_g01_c01.avi 1\n")
    listing = read(tmp_path)
    assert listing.layout == "ucf101"
    assert "--layout table" in listing.summary
    assert read(tmp_path, "table").clips[0].label == "mine"


# Class folders


def test_folders_and_numbers_are_in_natural_order(tmp_path):
    put(tmp_path, "b/2.avi", "b/10.avi", "b/1.avi", "a 10/x.avi", "a 9/x.avi")
    listing = read(tmp_path)
    assert paths(listing) == ["a 9/x.avi", "a 10/x.avi", "b/1.avi", "b/2.avi", "b/10.avi"]
    assert listing.classes == ("a 10", "a 9", "b")


@pytest.mark.parametrize(
    "kind",
    ["avi", "mp4", "mkv", "webm", "mov", "mpg", "mpeg", "m4v", "wmv", "flv", "3gp", "ts", "AVI"],
)
def test_every_kind_of_video_is_a_clip(tmp_path, kind):
    put(tmp_path, f"a/x.{kind}", "a/x.srt", "a/._x.avi", ".cache/y.avi", "a/x.avi.part")
    assert paths(read(tmp_path)) == [f"a/x.{kind}"]


def test_the_class_is_the_first_folder_however_deep_the_clip(tmp_path):
    put(tmp_path, "a/x.avi", "b/group 1/day 2/y.avi", "z.avi")
    listing = read(tmp_path)
    assert [(c.path, c.label) for c in listing.clips] == [
        ("a/x.avi", "a"),
        ("b/group 1/day 2/y.avi", "b"),
    ]
    assert "without a class, left out: 1" in listing.summary


def test_a_folder_of_frames_is_a_clip_but_pictures_of_a_class_or_beside_videos_are_not(tmp_path):
    put(tmp_path, "a/clip/1.jpg", "a/clip/2.JPEG", "b/clip/1.png", "b/thumb.jpg", "c/d/x.avi")
    put(tmp_path, "c/d/x.jpg", "pictures/1.jpg", "a/.hidden/1.jpg", "a/secret/.1.jpg")
    assert paths(read(tmp_path)) == ["a/clip", "b/clip", "c/d/x.avi"]


def test_a_folder_around_the_classes_is_pointed_at(tmp_path):
    put(tmp_path, "videos/a/x.avi", "videos/b/y.avi")
    listing = read(tmp_path)
    assert listing.classes == ("videos",)
    assert "classes are the folders in videos/, name that directory" in listing.summary


def test_a_name_that_is_not_unicode_is_an_error_that_shows_it(tmp_path):
    folder = os.fsencode(tmp_path) + b"/a"
    os.mkdir(folder)
    with open(folder + b"/caf\xe9.avi", "wb"):
        pass
    with pytest.raises(ValueError, match=r"is not Unicode; rename it"):
        read(tmp_path)


def test_a_pipe_named_like_a_video_is_not_one(tmp_path):
    put(tmp_path, "a/x.avi")
    os.mkfifo(tmp_path / "a" / "y.avi")
    assert paths(read(tmp_path)) == ["a/x.avi"]


def test_real_class_folders():
    listing = read(shared("ucf101_few"))
    assert (listing.layout, len(listing.clips)) == ("class_folders", 15)
    assert listing.classes == ("ApplyEyeMakeup", "BenchPress", "Diving")


def test_real_videos_without_folders_are_refused():
    with pytest.raises(ValueError, match=r"no layout fits .*: it holds 20 \.mkv"):
        read(shared("asl20"))


@pytest.mark.parametrize("layout", ["class_folders", "table"])
def test_equal_file_names_in_different_folders_are_different_clips(layout, tmp_path):
    find(layout).example(tmp_path / "set")
    clips = read(tmp_path / "set", layout).clips
    assert len({clip.path for clip in clips}) == len(clips)
    assert len({clip.path.rsplit("/", 1)[1] for clip in clips}) < len(clips)


# UCF101


@pytest.mark.parametrize(
    ("split", "train", "test"), [("1", 9537, 3783), ("2", 9586, 3734), ("3", 9624, 3696)]
)
def test_real_ucf101_lists(tmp_path, split, train, test):
    shutil.copytree(shared("splits/ucf101"), tmp_path / "ucfTrainTestlist")
    listing = read(tmp_path, split=split)
    assert listing.layout == "ucf101"
    assert splits(listing) == {"train": train, "test": test}
    assert len(listing.classes) == 101
    assert listing.classes[:3] == ("ApplyEyeMakeup", "ApplyLipstick", "Archery")
    assert listing.classes[36:38] == ("HandstandPushups", "HandstandWalking")
    assert {clip.label for clip in listing.clips} == set(listing.classes)
    assert f"split {split} of 3" in listing.summary


def test_the_first_ucf101_split_is_the_default_and_a_fourth_is_refused(tmp_path):
    shutil.copytree(shared("splits/ucf101"), tmp_path, dirs_exist_ok=True)
    assert read(tmp_path).clips == read(tmp_path, split="1").clips
    assert read(tmp_path).clips[0].path == "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"
    with pytest.raises(ValueError, match="UCF101 has no split '4'; found 1, 2, 3"):
        read(tmp_path, split="4")


LISTED = "HandstandPushups/v_HandStandPushups_g01_c01.avi"


@pytest.mark.parametrize(
    "path",
    [
        LISTED,
        f"UCF-101/{LISTED}",
        "UCF-101/HandStandPushups/v_HandStandPushups_g01_c01.avi",
        "HandstandPushups/v_HandstandPushups_g01_c01.avi",
        "videos/v_HandStandPushups_g01_c01.avi",
        "v_HandStandPushups_g01_c01.avi",
        "mp4/HandstandPushups/v_HandStandPushups_g01_c01.mp4",
        "frames/HandstandPushups/v_HandStandPushups_g01_c01/00001.jpg",
    ],
)
def test_ucf101_videos_are_found_wherever_they_lie(tmp_path, path):
    write(tmp_path / "classInd.txt", "37 HandstandPushups\n38 HandstandWalking\n")
    write(tmp_path / "testlist01.txt", LISTED + "\n")
    put(tmp_path, path)
    clip = read(tmp_path).clips[0]
    assert clip == ListedClip(path.removesuffix("/00001.jpg"), "HandstandPushups", "test")


def test_a_missing_ucf101_clip_is_expected_beside_the_others(tmp_path):
    write(tmp_path / "trainlist01.txt", "A/v_A_g01_c01.avi 1\nA/v_A_g01_c02.avi 1\n")
    put(tmp_path, "UCF-101/A/v_A_g01_c01.avi")
    listing = read(tmp_path)
    assert paths(listing) == ["UCF-101/A/v_A_g01_c01.avi", "UCF-101/A/v_A_g01_c02.avi"]
    assert "listed but not on the disk: 1" in listing.summary


def test_a_clip_in_another_class_folder_is_another_clip(tmp_path):
    write(tmp_path / "trainlist01.txt", "A/x.avi 1\nB/x.avi 2\n")
    put(tmp_path, "videos/B/x.avi")
    assert paths(read(tmp_path)) == ["videos/A/x.avi", "videos/B/x.avi"]


def test_a_flat_ucf101_list_takes_its_classes_from_numbers_and_names(tmp_path):
    write(tmp_path / "classInd.txt", "37 HandstandPushups\n7 Bowling\n")
    write(tmp_path / "trainlist01.txt", "v_x_g01_c01.avi 37\n")
    write(tmp_path / "testlist01.txt", "v_HandStandPushups_g02_c01.avi\n")
    listing = read(tmp_path)
    assert [c.label for c in listing.clips] == ["HandstandPushups"] * 2
    assert listing.classes == ("Bowling", "HandstandPushups")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../../etc/x.avi 1", r"trainlist01\.txt line 2: .* is not inside"),
        ("C/v_C_g01_c01.avi 3", r"trainlist01\.txt line 2: the label 'C' is none of .* 1 classes"),
        ("x.avi 2", r"trainlist01\.txt line 2: class 2 is not in the class index"),
        ("x.avi", r"trainlist01\.txt line 2: x\.avi says no class"),
    ],
)
def test_a_wrong_ucf101_line_is_named(tmp_path, line, message):
    write(tmp_path / "classInd.txt", "1 A\n")
    write(tmp_path / "trainlist01.txt", f"A/v_A_g01_c01.avi 1\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("line", ["B", "1 B", "2 A"])
def test_a_wrong_line_of_a_class_index_is_named(tmp_path, line):
    write(tmp_path / "classInd.txt", f"1 A\n{line}\n")
    write(tmp_path / "trainlist01.txt", "A/v_A_g01_c01.avi 1\n")
    with pytest.raises(ValueError, match=r"classInd\.txt line 2"):
        read(tmp_path)


# HMDB51


@pytest.mark.parametrize("split", ["1", "2", "3"])
def test_real_hmdb51_lists(tmp_path, split):
    shutil.copytree(shared("splits/hmdb51"), tmp_path / "lists")
    listing = read(tmp_path, split=split)
    assert listing.layout == "hmdb51"
    assert splits(listing) == {"train": 3570, "test": 1530}
    assert [listing.clips[0].split, listing.clips[-1].split] == ["train", "test"]
    assert len(listing.classes) == 51
    assert listing.classes[0] == "brush_hair"
    assert listing.classes[17] == "cartwheel"
    assert all(clip.path.startswith(f"{clip.label}/") for clip in listing.clips)


def official_hmdb51(root: Path, flags: dict[str, str], split: int = 1) -> None:
    for name, flag in flags.items():
        label, file = name.split("/")
        path = root / f"{label}_test_split{split}.txt"
        before = path.read_text("utf-8") if path.exists() else ""
        write(path, f"{before}{file} {flag} \n")


def test_hmdb51_flags_are_train_test_and_neither(tmp_path):
    official_hmdb51(tmp_path, {"wave/a.avi": "1", "wave/b.avi": "2", "brush_hair/c.avi": "0"})
    listing = read(tmp_path)
    assert listing.clips == (
        ListedClip("brush_hair/c.avi", "brush_hair", ""),
        ListedClip("wave/a.avi", "wave", "train"),
        ListedClip("wave/b.avi", "wave", "test"),
    )
    assert "1 in no split" in listing.summary
    assert listing.classes == ("brush_hair", "wave")


def test_the_requested_hmdb51_split_decides(tmp_path):
    official_hmdb51(tmp_path, {"wave/a.avi": "1"}, split=1)
    official_hmdb51(tmp_path, {"wave/a.avi": "2"}, split=2)
    assert [read(tmp_path, split=k).clips[0].split for k in "12"] == ["train", "test"]
    with pytest.raises(ValueError, match="HMDB51 has no split '3'; found 1, 2"):
        read(tmp_path, split="3")


def test_both_hmdb51_forms_of_the_real_lists_agree(tmp_path):
    shutil.copytree(shared("splits/hmdb51"), tmp_path / "a")
    listed = read(tmp_path / "a")
    by_class: dict[str, list[str]] = {}
    for clip in listed.clips:
        flag = "1" if clip.split == "train" else "2"
        by_class.setdefault(clip.label, []).append(f"{clip.path.split('/')[1]} {flag} \n")
    for label, rows in by_class.items():
        write(tmp_path / "b" / "splits" / f"{label}_test_split1.txt", "".join(rows))
    official = read(tmp_path / "b")
    assert set(official.clips) == set(listed.clips)
    assert official.classes == tuple(sorted(listed.classes))


@pytest.mark.parametrize("line", ["a.avi", "a.avi 3", "../../a.avi 1"])
def test_a_wrong_hmdb51_line_is_named(tmp_path, line):
    write(tmp_path / "wave_test_split1.txt", f"x.avi 1\ny.avi 1\nz.avi 0\n{line}\n")
    with pytest.raises(ValueError, match=r"wave_test_split1\.txt line 4"):
        read(tmp_path)


# Kinetics


KINETICS = "label,youtube_id,time_start,time_end,split,is_cc\n"
ID = "-_bcdEFGHIJ"
CUT = f"{ID}_000003_000013"


@pytest.mark.parametrize(
    "path",
    [
        f"train/riding a bike/{CUT}.mp4",
        f"train/riding_a_bike/{CUT}.mp4",
        f"train/{CUT}.mp4",
        f"riding a bike/{CUT}.mkv",
        f"videos/{CUT}.webm",
        f"{CUT}.mp4",
    ],
)
def test_cut_kinetics_files_are_whole_clips_wherever_they_lie(tmp_path, path):
    write(tmp_path / "train.csv", f"{KINETICS}riding a bike,{ID},3,13,train,0\n")
    put(tmp_path, path, f"{ID}.mp4")
    assert read(tmp_path).clips == (ListedClip(path, "riding a bike", "train"),)


def test_an_uncut_kinetics_file_gives_its_stretch(tmp_path):
    write(
        tmp_path / "annotations" / "k.csv", f"{KINETICS}a,{ID},3,13,val,0\na,{ID},20,30.5,val,0\n"
    )
    put(tmp_path, f"val/{ID}.mp4")
    listing = read(tmp_path)
    assert listing.clips == (
        ListedClip(f"val/{ID}.mp4", "a", "val", 3.0, 13.0),
        ListedClip(f"val/{ID}.mp4", "a", "val", 20.0, 30.5),
    )
    assert "stretches of uncut videos: 2" in listing.summary


def test_kinetics_ids_that_differ_in_case_are_different_and_a_missing_file_is_listed(tmp_path):
    rows = f"a,{ID},3,13,train,0\nb,{ID.upper()},3,13,train,0\n"
    write(tmp_path / "train.csv", KINETICS + rows)
    put(tmp_path, f"train/{CUT}.mp4")
    listing = read(tmp_path)
    assert paths(listing) == [f"train/{CUT}.mp4", f"{ID.upper()}_000003_000013.mp4"]
    assert "listed but not on the disk: 1" in listing.summary


def test_a_kinetics_file_is_taken_from_its_split_and_class(tmp_path):
    write(tmp_path / "train.csv", f"{KINETICS}a b,{ID},3,13,train,0\n")
    write(tmp_path / "val.csv", f"{KINETICS}c,{ID},3,13,val,0\n")
    put(tmp_path, f"val/c/{CUT}.mp4", f"train/a_b/{CUT}.mp4")
    assert [(c.path, c.label) for c in read(tmp_path).clips] == [
        (f"train/a_b/{CUT}.mp4", "a b"),
        (f"val/c/{CUT}.mp4", "c"),
    ]


def test_a_kinetics_file_in_its_class_folder_goes_before_a_copy_nearer_the_root(tmp_path):
    write(tmp_path / "train.csv", f"{KINETICS}a b,{ID},3,13,train,0\n")
    put(tmp_path, f"{CUT}.mp4", f"old/{CUT}.mp4", f"train/a_b/{CUT}.mp4")
    assert paths(read(tmp_path)) == [f"train/a_b/{CUT}.mp4"]


def test_a_kinetics_file_in_another_class_folder_is_another_clip(tmp_path):
    write(tmp_path / "train.csv", f"{KINETICS}c,{ID},3,13,train,0\na b,x,3,13,train,0\n")
    put(tmp_path, f"all/a_b/{CUT}.mp4")
    assert paths(read(tmp_path)) == [f"{CUT}.mp4", "x_000003_000013.mp4"]


def test_kinetics_lists_are_read_train_first_and_unlabelled_rows_left_out(tmp_path):
    write(tmp_path / "a_val.csv", f"{KINETICS}a,{ID},0,10,,0\n")
    write(tmp_path / "b_train.csv", f"{KINETICS}a,{ID},10,20,,0\n")
    write(tmp_path / "k_test.csv", f"youtube_id,time_start,time_end,split\n{ID},30,40,test\n")
    listing = read(tmp_path)
    assert [clip.split for clip in listing.clips] == ["train", "val"]
    assert "without a label, left out: 1" in listing.summary


@pytest.mark.parametrize(
    "row",
    [
        "a,../x,1,2,train,0",
        "a,x/../y,1,2,train,0",
        "a,,1,2,train,0",
        "a,x,-1,2,train,0",
        "a,x,2,2,train,0",
        "a,b,x,1,2,train,0",
    ],
)
def test_a_wrong_kinetics_row_is_named(tmp_path, row):
    write(tmp_path / "train.csv", f"{KINETICS}a,ok,1,2,train,0\n{row}\n")
    with pytest.raises(ValueError, match=r"train\.csv line 3: "):
        read(tmp_path)


def test_kinetics_in_the_form_of_cvdf(tmp_path):
    write(tmp_path / "annotations" / "train.csv", f"{KINETICS}a b,{ID},3,13,train,0\n")
    write(tmp_path / "annotations" / "validate.csv", f"{KINETICS}c, Val01 ,3,13,validate,0\n")
    write(tmp_path / "annotations" / "test.csv", "youtube_id,time_start,time_end,split\nx,0,9,\n")
    put(tmp_path, f"train/{CUT}.mp4", f"replacement/replacement_for_corrupted_k400/{CUT}.mp4")
    put(tmp_path, "test/Val01_000003_000013.mp4", "validate/Val01_000003_000013.mp4")
    listing = read(tmp_path)
    assert [(c.path, c.label, c.split) for c in listing.clips] == [
        (f"replacement/replacement_for_corrupted_k400/{CUT}.mp4", "a b", "train"),
        ("validate/Val01_000003_000013.mp4", "c", "val"),
    ]
    assert "taken from replacement: 1" in listing.summary
    assert "without a label, left out: 1" in listing.summary


# Something-Something


def v2(root: Path, **lists: object) -> None:
    for kind, value in lists.items():
        write(root / "labels" / f"something-something-v2-{kind}.json", json.dumps(value))


def test_something_v2_classes_are_templates_in_the_order_of_their_numbers(tmp_path):
    item = {"label": "holding a cup", "placeholders": ["a cup"]}
    v2(
        tmp_path,
        labels={"Holding something": "10", "Pushing something": "9"},
        train=[{"id": "7", "template": "Holding [something]", **item}],
        validation=[{"id": 8, "template": "Pushing [something]", **item}],
        test=[{"id": "9"}],
    )
    put(tmp_path, "videos/7.webm", "videos/8.mp4", "videos/9.webm")
    listing = read(tmp_path)
    assert listing.clips == (
        ListedClip("videos/7.webm", "Holding something", "train"),
        ListedClip("videos/8.mp4", "Pushing something", "validation"),
    )
    assert listing.classes == ("Pushing something", "Holding something")
    assert "without a label, left out: 1" in listing.summary


def test_something_v2_is_also_known_by_its_newer_file_names(tmp_path):
    item = {"id": "7", "template": "Holding [something]"}
    write(tmp_path / "labels" / "train.json", json.dumps([item]))
    write(tmp_path / "labels" / "labels.json", json.dumps({"Holding something": "0"}))
    put(tmp_path, "20bn/7.webm")
    assert paths(read(tmp_path)) == ["20bn/7.webm"]


def test_something_v1_clips_are_folders_of_frames(tmp_path):
    write(tmp_path / "something-something-v1-train.csv", '7;Moving something, "up"\n8;Turning\n')
    write(tmp_path / "something-something-v1-labels.csv", 'Turning\nMoving something, "up"\n')
    write(tmp_path / "something-something-v1-test.csv", "9\n")
    put(tmp_path, "20bn-something-something-v1/7/00001.jpg")
    listing = read(tmp_path)
    assert listing.clips == (
        ListedClip("20bn-something-something-v1/7", 'Moving something, "up"', "train"),
        ListedClip("20bn-something-something-v1/8", "Turning", "train"),
    )
    assert listing.classes == ("Turning", 'Moving something, "up"')


@pytest.mark.parametrize(
    ("labels", "train", "message"),
    [
        ({"A": "0"}, [{"id": "1", "template": "B"}], "entry 1: the label 'B' is none of"),
        ({"A": "0"}, [{"id": "../1", "template": "A"}], "entry 1: '../1' is no clip's id"),
        ({"A": "0", "B": "0"}, [{"id": "1", "template": "A"}], "2 labels have 1 numbers"),
        ({"A": "0", "[A]": "1"}, [{"id": "1", "template": "A"}], "has 'A' twice"),
        ({"A": "x"}, [{"id": "1", "template": "A"}], "every label needs its number"),
    ],
)
def test_a_wrong_something_list_is_named(tmp_path, labels, train, message):
    v2(tmp_path, labels=labels, train=train)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
