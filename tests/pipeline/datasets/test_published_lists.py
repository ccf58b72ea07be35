"""Lists of published data sets and of other tools: what is decided about each form."""

import json
from collections import Counter
from pathlib import Path

import pytest

from varve.pipeline.datasets.layouts import ListedClip, read


def put(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def triples(listing) -> list[tuple[str, str, str]]:
    return [(clip.path, clip.label, clip.split) for clip in listing.clips]


# Lists of mmaction2, VideoMAE and SlowFast


@pytest.mark.parametrize("delimiter", [" ", "\t", ",", ";", "  "])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_lines_of_paths_and_labels_are_read_by_any_delimiter(
    tmp_path, delimiter, counted, header, start
):
    put(tmp_path, "v/a b.mp4", "v/c.webm")
    names = ["path", "num_frames", "label"] if counted else ["path", "label"]
    rows = [["v/a b.mp4", "120", "1"], ["v/c.webm", "7", "0"]]
    rows = [row if counted else [row[0], row[2]] for row in rows]
    lines = [delimiter.join(row) for row in ([names] if header else []) + rows]
    if header and delimiter in ("\t", ",", ";"):
        names[0] = "frame_dir"  # a header `path,label` is that of a table
        lines[0] = delimiter.join(names)
    write(tmp_path / "my_train.txt", start + "\r\n".join(lines) + "\r\n")
    listing = read(tmp_path)
    assert listing.layout == "video_lists"
    assert triples(listing) == [("v/a b.mp4", "1", "train"), ("v/c.webm", "0", "train")]
    assert ("numbers of frames in the lists, not used: 2" in listing.summary) == counted
    assert "labels are numbers, no file of names beside the list" in listing.summary


def test_mmaction_lists_find_their_folders_their_splits_and_their_names(tmp_path):
    write(tmp_path / "k400_train_list_videos.txt", "x/1.mp4 1\nx/2.mp4 10\ny/1.mp4 0\n")
    write(tmp_path / "k400_val_list_videos.txt", "x/1.mp4 1\n")
    write(tmp_path / "label_map_k400.txt", "".join(f"action {i}\n" for i in range(11)))
    put(tmp_path, "videos_train/x/1.mp4", "videos_train/y/1.mp4", "videos_val/x/1.mp4")
    listing = read(tmp_path)
    assert triples(listing) == [
        ("videos_train/x/1.mp4", "action 1", "train"),
        ("videos_train/x/2.mp4", "action 10", "train"),
        ("videos_train/y/1.mp4", "action 0", "train"),
        ("videos_val/x/1.mp4", "action 1", "val"),
    ]
    assert listing.classes == tuple(f"action {i}" for i in range(11))
    assert "listed but not on the disk: 1" in listing.summary
    assert "names of classes from label_map_k400.txt" in listing.summary


def test_rawframes_are_folders_and_numbered_splits_are_chosen(tmp_path):
    for split in (1, 2):
        text = f"A/clip{split} 30 0\nB/77 40 1\n"
        write(tmp_path / "lists" / f"ucf_train_split_{split}_rawframes.txt", text)
    write(tmp_path / "lists" / "classInd.txt", "1 Archery\n2 Biking\n")
    put(tmp_path, *(f"rawframes/{name}/img_1.jpg" for name in ("A/clip1", "A/clip2", "B/77")))
    listing = read(tmp_path, "video_lists", split="2")
    assert triples(listing) == [
        ("rawframes/A/clip2", "Archery", "train"),
        ("rawframes/B/77", "Biking", "train"),
    ]
    assert "split 2 of 2" in listing.summary
    assert "whose numbers begin with 1 and the list's with 0" in listing.summary
    assert read(tmp_path, "video_lists").clips[0].path == "rawframes/A/clip1"
    with pytest.raises(ValueError, match="lists of videos has no split '3'; found 1, 2"):
        read(tmp_path, "video_lists", split="3")


def test_a_train_csv_among_class_folders_is_read_and_not_passed_over(tmp_path):
    put(tmp_path, "A/x.mp4", "B/y.mp4")
    write(tmp_path / "train.csv", "A/x.mp4 riding a bike\nB/y.mp4 running\n")
    listing = read(tmp_path)
    assert (listing.layout, listing.classes) == ("video_lists", ("riding a bike", "running"))
    assert "--layout class_folders" in listing.summary


def test_a_list_of_any_name_is_read_when_it_is_given(tmp_path):
    put(tmp_path, "A/x.mp4")
    assert triples(read(write(tmp_path / "mine.txt", "A/x.mp4 3\n"))) == [("A/x.mp4", "3", "")]


@pytest.mark.parametrize("line", ["A/x.mp4 3 5 7", "A/x 30 3 5", "A/x.mp4,30,3,5"])
def test_several_labels_of_a_clip_are_refused(tmp_path, line):
    put(tmp_path, "A/x.mp4", "A/x/1.jpg")
    with pytest.raises(ValueError, match=r"train\.txt line 1: .* one class, so keep one label"):
        read(write(tmp_path / "train.txt", line + "\n"), "video_lists")


def test_a_line_of_another_form_is_named(tmp_path):
    put(tmp_path, "x.mp4")
    lines = [f"x.mp4 {i % 3}\n" for i in range(120)]
    write(tmp_path / "train.txt", "".join([*lines, "nonsense\n"]))
    with pytest.raises(ValueError, match=r"train\.txt line 121: 'nonsense' is neither"):
        read(tmp_path)


def test_a_list_of_missing_clips_is_refused_and_lists_of_two_kinds_are_a_question(
    tmp_path,
):
    write(tmp_path / "small_train.txt", "A/x.mp4 0\n")
    with pytest.raises(ValueError, match=r"none of the 1 clips of small_train\.txt is there"):
        read(tmp_path)
    write(tmp_path / "large_train.txt", "A/x.mp4 0\n")
    with pytest.raises(ValueError, match=r"lists of 2 kinds: large_train\.txt, small_train\.txt"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "walk, fast\r\njump\r\n"),
        ("labels.csv", 'id,name\n0,"walk, fast"\n1,jump\n'),
        ("label_map.json", '["walk, fast", "jump"]'),
        ("class_names.json", '{"walk, fast": 0, "jump": 1}'),
        ("classInd.txt", "1 walk, fast\n2 jump\n"),
        ("moments_categories.txt", "walk, fast,0\njump,1\n"),
    ],
)
def test_numbers_get_their_names_from_any_form_of_names_file(tmp_path, name, text):
    write(tmp_path / name, text)
    write(tmp_path / "l.csv", "path,label\na.mp4,1\nb.mp4,0\n")
    listing = read(tmp_path / "l.csv")
    assert [clip.label for clip in listing.clips] == ["jump", "walk, fast"]
    assert listing.classes == ("walk, fast", "jump")
    assert f"names of classes from {name}" in listing.summary


def test_names_that_contradict_each_other_or_lack_a_class_are_refused(tmp_path):
    write(tmp_path / "l.csv", "path,label\na.mp4,2\n")
    write(tmp_path / "classes.txt", "walk\njump\n")
    with pytest.raises(ValueError, match=r"l\.csv line 2: class 2 has no name in classes\.txt"):
        read(tmp_path)
    write(tmp_path / "labels.txt", "walk\njump\nrun\n")
    with pytest.raises(ValueError, match=r"classes\.txt and labels\.txt give different names"):
        read(tmp_path)


def test_words_need_no_names(tmp_path):
    write(tmp_path / "l.csv", "path,label\na.mp4,run\n")
    write(tmp_path / "classes.txt", "walk\njump\n")
    assert read(tmp_path).classes == ("run",)


# ActivityNet


def anet(root: Path, **videos: object) -> Path:
    return write(root / "anet.json", json.dumps({"version": "1.3", "database": videos}))


def test_segments_of_activitynet_are_clips(tmp_path):
    segments = [{"label": "Polo", "segment": [1.5, 9]}, {"label": "Golf ", "segment": [9, 20.25]}]
    path = anet(
        tmp_path,
        abc={"subset": "training", "annotations": segments},
        d={"subset": "validation", "annotations": [{"label": "Polo", "segment": [3, 3]}]},
        e={"subset": "validation", "annotations": [{"label": "Polo", "segment": [0, 3]}]},
        f={"subset": "testing", "annotations": []},
    )
    put(tmp_path, "videos/v_abc.mkv", "videos/e.mp4", "v_f.mp4")
    listing = read(tmp_path)
    assert (listing.layout, listing.classes) == ("activitynet", ("Golf", "Polo"))
    assert listing.clips == (
        ListedClip("videos/v_abc.mkv", "Polo", "train", 1.5, 9.0),
        ListedClip("videos/v_abc.mkv", "Golf", "train", 9.0, 20.25),
        ListedClip("videos/e.mp4", "Polo", "val", 0.0, 3.0),
    )
    assert "videos without annotations, left out: 1" in listing.summary
    assert "segments without a length, left out: 1" in listing.summary
    assert read(path).clips == listing.clips


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"annotations": [{"label": "a", "segment": [1]}]}, "is no segment"),
        ({"annotations": [{"segment": [1, 2]}]}, "is no segment"),
        ({"annotations": [{"label": "a", "segment": [-1, 2]}]}, "'-1' is no time in seconds"),
    ],
)
def test_a_wrong_segment_is_named(tmp_path, video, message):
    anet(tmp_path, abc=video)
    with pytest.raises(ValueError, match=rf"anet\.json video abc: .*{message}"):
        read(tmp_path)


def test_two_files_of_segments_are_a_question(tmp_path):
    path = anet(tmp_path, a={"annotations": [{"label": "a", "segment": [1, 2]}]})
    (tmp_path / "other.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"2 files of segments: anet\.json, other\.json; name"):
        read(tmp_path)


# Moments in Time


def test_moments_in_time(tmp_path):
    write(tmp_path / "moments_categories.txt", "clapping,4\nadult+female+singing,2\n")
    write(tmp_path / "trainingSet.csv", "clapping/a-1.mp4,clapping,3,0\n")
    write(
        tmp_path / "validationSet.csv",
        "adult+female+singing/b.mp4,adult+female+singing,2,1\r\nclapping/c.mp4,clapping,1,0\r\n",
    )
    put(tmp_path, "training/clapping/a-1.mp4", "validation/adult+female+singing/b.mp4")
    listing = read(tmp_path)
    assert (listing.layout, listing.classes) == (
        "moments_in_time",
        ("adult+female+singing", "clapping"),
    )
    assert triples(listing) == [
        ("training/clapping/a-1.mp4", "clapping", "train"),
        ("validation/adult+female+singing/b.mp4", "adult+female+singing", "val"),
        ("validation/clapping/c.mp4", "clapping", "val"),
    ]
    assert "listed but not on the disk: 1" in listing.summary


def test_rows_of_moments_with_several_labels_are_refused(tmp_path):
    write(tmp_path / "trainingSet.csv", "a/a.mp4,a,b,c\n")
    with pytest.raises(ValueError, match=r"trainingSet\.csv line 1: .*a clip has one class"):
        read(tmp_path)


# AVE


def test_ave_is_split_by_its_sets(tmp_path):
    lines = [f"Church bell&v{i}-_&good&{i}&10\n" for i in range(4)]
    header = "Category&VideoID&Quality&StartTime&EndTime\n"
    write(tmp_path / "Annotations.txt", header + "".join(lines))
    for number, name in enumerate(("train", "val", "test")):
        write(tmp_path / f"{name}Set.txt", lines[number])
    put(tmp_path, *(f"AVE/v{i}-_.mp4" for i in range(4)))
    listing = read(tmp_path)
    splits = ("train", "val", "test", "")
    assert triples(listing) == [
        (f"AVE/v{i}-_.mp4", "Church bell", split) for i, split in enumerate(splits)
    ]
    assert all(clip.start_seconds is None for clip in listing.clips)
    assert "1 in no split" in listing.summary
    assert "clips are whole videos, times of events not used" in listing.summary


def test_a_wrong_line_of_ave_is_named(tmp_path):
    write(tmp_path / "Annotations.txt", "a&b&good&0&10\nc&d&0&10\n")
    with pytest.raises(ValueError, match=r"Annotations\.txt line 2: 'c&d&0&10' is not Category"):
        read(tmp_path)


# Hugging Face


def test_metadata_of_a_videofolder_is_relative_to_its_folder(tmp_path):
    write(tmp_path / "train" / "metadata.csv", 'file_name,label,n\na.mp4,"x, y",1\nd/b.mp4,z,2\n')
    items = [{"file_name": "./c.mp4", "label": "z"}, {"file_name": "e.mp4", "label": None}]
    write(tmp_path / "test" / "metadata.jsonl", "\r\n".join(map(json.dumps, items)))
    put(tmp_path, "train/a.mp4", "train/d/b.mp4", "test/c.mp4", "test/e.mp4")
    listing = read(tmp_path)
    assert listing.layout == "videofolder"
    assert triples(listing) == [
        ("train/a.mp4", "x, y", "train"),
        ("train/d/b.mp4", "z", "train"),
        ("test/c.mp4", "z", "test"),
    ]
    assert "without a label, left out: 1" in listing.summary


def test_metadata_in_the_root_takes_splits_and_classes_from_paths(tmp_path):
    rows = ["training/walk/a.mp4", "validation/run/b.mp4", "test/c.mp4"]
    write(
        tmp_path / "metadata.csv", "\ufefffile_name,caption\n" + "".join(f"{r},?\n" for r in rows)
    )
    put(tmp_path, *rows[:2])
    listing = read(tmp_path)
    assert triples(listing) == [
        ("training/walk/a.mp4", "walk", "train"),
        ("validation/run/b.mp4", "run", "val"),
    ]
    assert "without a label, left out: 1" in listing.summary


def test_a_path_that_leaves_the_folder_of_its_metadata_is_refused(tmp_path):
    write(tmp_path / "train" / "metadata.csv", "file_name,label\n../../x.mp4,a\n")
    with pytest.raises(ValueError, match=r"train/metadata\.csv line 2: .*is not inside"):
        read(tmp_path)


def test_splits_are_counted_by_their_usual_names(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,label,split\na.mp4,a,Train \nb.mp4,a,Train\n")
    assert Counter(clip.split for clip in read(tmp_path).clips) == {"Train": 2}
