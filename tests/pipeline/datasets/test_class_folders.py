"""Splits by the names of folders in the layout class_folders, and frames beside their video."""

from pathlib import Path

import pytest

from varve.pipeline.datasets.layouts import read


def put(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def clips(listing) -> list[tuple[str, str, str]]:
    return [(clip.path, clip.label, clip.split) for clip in listing.clips]


def test_first_folders_named_after_splits_are_splits(tmp_path):
    put(tmp_path, "train/a/x.avi", "test/a/x.avi", "Validation/b/c/y.avi", "train/b/frames/1.jpg")
    assert clips(read(tmp_path)) == [
        ("Validation/b/c/y.avi", "b", "val"),
        ("test/a/x.avi", "a", "test"),
        ("train/a/x.avi", "a", "train"),
        ("train/b/frames", "b", "train"),
    ]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train", "Training", "trainset", "train_set", "TRAIN", "training-set"), "train"),
        (("val", "valid", "validation", "Validate", "valset", "Val_Set"), "val"),
        (("test", "testing", "testset", "Test Set"), "test"),
    ],
)
@pytest.mark.parametrize("around", ["", "data/", "data set.v2/"])
def test_splits_are_known_by_all_their_names(tmp_path, names, split, around):
    other = "test" if split == "train" else "train"
    for number, name in enumerate(names):
        root = tmp_path / str(number)
        put(root, f"{around}{name}/a/x.avi", f"{around}{other}/b/y.avi")
        assert {c[1:] for c in clips(read(root))} == {("a", split), ("b", other)}
        assert "in folders of splits" in read(root).summary


def test_numbered_splits_are_chosen_and_the_others_counted(tmp_path):
    put(tmp_path, "split1/train/a/x.avi", "split1/test/b/y.avi")
    put(tmp_path, "split2/train/b/y.avi", "split2/Testing/a/x.avi", "split2/test/a/z.avi")
    listing = read(tmp_path)
    assert clips(listing) == [
        ("split1/test/b/y.avi", "b", "test"),
        ("split1/train/a/x.avi", "a", "train"),
    ]
    assert "split 1 of 2" in listing.summary
    assert "of other splits (split2), left out: 3" in listing.summary
    assert read(tmp_path, split="1") == listing
    with pytest.raises(ValueError, match="Testing and test: both mean test"):
        read(tmp_path, split="2")
    with pytest.raises(ValueError, match="class folders has no split '3'; found 1, 2"):
        read(tmp_path, split="3")


def test_splits_within_each_class_are_read(tmp_path):
    put(tmp_path, "walk/train/x.avi", "walk/test/y.avi", "run/Training/x.avi", "run/val/f/1.jpg")
    assert clips(read(tmp_path)) == [
        ("run/Training/x.avi", "run", "train"),
        ("run/val/f", "run", "val"),
        ("walk/test/y.avi", "walk", "test"),
        ("walk/train/x.avi", "walk", "train"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("walk/x.avi", "run/x.avi", "test/x.avi"), r"by test: test/x\.avi is no class folder"),
        (("walk/x.avi", "test/a/x.avi"), r"by test: walk/ is no class folder of a split"),
        (("train/x.avi", "plane/y.avi"), r"by train: train/x\.avi is no"),
        (("train/x.avi", "test/y.avi"), r"by test, train: test/y\.avi is no"),
        (("train/a/x.avi", "test/y.avi"), r"by test, train: test/y\.avi is no"),
        (("train/a/x.avi", "test/a/x.avi", "extra/a/x.avi"), r"by test, train: extra/ is no"),
        (("train/a/x.avi", "training/b/y.avi"), r"by train and training: both mean train"),
        (("walk/train/x.avi", "run/y.avi"), r"second folder of walk/train/x\.avi: run/y\.avi"),
        (("c1/train/a/x.avi", "c2/train/a/x.avi"), r"by c1/train: folders are below it"),
    ],
)
def test_what_could_be_splits_or_classes_is_refused_with_the_choice(tmp_path, files, message):
    put(tmp_path, *files)
    choice = "--layout class_folders --splits none"
    with pytest.raises(ValueError, match=rf"{message}.*{choice}"):
        read(tmp_path)
    listing = read(tmp_path, "class_folders", splits="none")
    assert {c[1:] for c in clips(listing)} == {(name.split("/")[0], "") for name in files}
    assert len(listing.clips) == len(files)


@pytest.mark.parametrize("label", ["trainer", "testimony", "validity", "set", "split1", "test 2"])
def test_other_names_are_classes(tmp_path, label):
    put(tmp_path, f"{label}/a/x.avi", "walk/a/y.avi")
    assert set(read(tmp_path).classes) == {label, "walk"}


def test_splits_is_auto_or_none_and_of_layouts_that_read_folders(tmp_path):
    put(tmp_path, "train/a/x.avi")
    with pytest.raises(ValueError, match="splits is 'some'; give auto or none"):
        read(tmp_path, splits="some")
    with pytest.raises(ValueError, match="--splits none has no numbered splits, split '1'"):
        read(tmp_path, split="1", splits="none")
    (tmp_path / "list.csv").write_text("path,label\ntrain/a/x.avi,a\n", "utf-8")
    with pytest.raises(ValueError, match=r"'table' reads its splits from lists.*class_folders"):
        read(tmp_path, splits="none")


def test_frames_beside_their_own_video_are_left_out(tmp_path):
    put(tmp_path, "a/x.mp4", "a/x/1.jpg", "a/x/2.jpg", "a/y/1.jpg", "b/x/1.jpg")
    listing = read(tmp_path)
    assert [clip.path for clip in listing.clips] == ["a/x.mp4", "a/y", "b/x"]
    assert "frames beside their own video, left out: 1" in listing.summary
    assert listing.left_out == (("pictures", 2),)
