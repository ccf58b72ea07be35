"""What every layout must do, over whatever the folder contains.

A layout is given to the suite by one function, `build_<layout>`: it makes a small dataset, with
labels as awkward as the form can hold, and returns them.
"""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from varve.pipeline.datasets.layouts import read
from varve.pipeline.registry import available, variant

AWKWARD = ["../up", 'say "hi", twice', "two\nlines", " spaced ", "日本 naïve", "C:\\x\\..\\y"]
IN_NAMES = ['say "hi", twice', " spaced ", "日本 naïve", "it's [50%] *"]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def write_csv(path: Path, rows: list[list[str]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def build_class_folders(root: Path) -> list[str]:
    for label in IN_NAMES:
        for name in ("same.avi", "10.MP4", "9.mp4", ".hidden.mp4", "notes.txt"):
            touch(root / label / name)
        touch(root / label / "frames" / "00001.jpg")
    return IN_NAMES


def build_ucf101(root: Path) -> list[str]:
    labels = ["Zumba", "HandstandPushups", "日本Naïve"]
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    lists.joinpath("classInd.txt").write_text(
        "".join(f"{i} {label}\r\n" for i, label in enumerate(labels, 1)), encoding="utf-8"
    )
    for k in "12":
        for kind, take in (("train", "01"), ("test", "02")):
            names = [f"{label}/v_{label.upper()}_g{take}_c01.avi" for label in labels]
            numbers = [f" {i}" if kind == "train" else "" for i in (1, 2, 3)]
            lists.joinpath(f"{kind}list0{k}.txt").write_text(
                "".join(f"{a}{b}\r\n" for a, b in zip(names, numbers, strict=True)), "utf-8"
            )
            for name in names:
                touch(root / "UCF-101" / name)
    return labels


def build_hmdb51(root: Path) -> list[str]:
    labels = ["brush_hair", "ça va", "it's [50%] *"]
    for label in labels:
        names = [f"Who(1)_{label}_u_nm_{i}.avi" for i in range(3)]
        for k in "123":
            path = root / "testTrainMulti_7030_splits" / f"{label}_test_split{k}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{n} {i} \n" for i, n in enumerate(names)), "utf-8")
        for name in names:
            touch(root / label / name)
    return labels


def build_kinetics(root: Path) -> list[str]:
    header = ["label", "youtube_id", "time_start", "time_end", "split"]
    for split in ("train", "val"):
        rows = [
            [label, f"{split[:2]}_-abcDEF{i}", str(i), str(i + 10), split]
            for i, label in enumerate(AWKWARD)
        ]
        write_csv(root / "annotations" / f"{split}.csv", [header, *rows])
        for _, name, start, end, _ in rows:
            touch(root / split / f"{name}_{int(start):06d}_{int(end):06d}.mp4")
    return AWKWARD


def build_something_something(root: Path) -> list[str]:
    labels = root / "labels"
    labels.mkdir(parents=True)
    numbers = {label: str(i) for i, label in enumerate(AWKWARD)}
    labels.joinpath("something-something-v2-labels.json").write_text(json.dumps(numbers), "utf-8")
    for kind, base in (("train", 100), ("validation", 200)):
        items = [
            {"id": str(base + i), "label": "x", "template": f"{label[:1]}[{label[1:]}]"}
            for i, label in enumerate(AWKWARD)
        ]
        path = labels / f"something-something-v2-{kind}.json"
        path.write_text(json.dumps(items), "utf-8")
        for item in items:
            touch(root / "20bn-something-something-v2" / f"{item['id']}.webm")
    return AWKWARD


def build_table(root: Path) -> list[str]:
    rows = [[f"{folder}/clip.mp4", label, "test"] for folder, label in enumerate(AWKWARD)]
    write_csv(root / "clips.csv", [["Path", "Class", "split"], *rows])
    for path, *_ in rows:
        touch(root / path)
    return AWKWARD


@pytest.fixture(params=available("layouts"))
def layout(request):
    return request.param


@pytest.fixture
def dataset(layout, tmp_path):
    """A dataset's directory and the labels it holds."""
    root = tmp_path / "data set"
    return root, globals()[f"build_{layout}"](root)


def test_it_recognises_its_own_form_and_no_other_list_layout_does(layout, dataset):
    root, _ = dataset
    seen = {n for n in available("layouts") if variant("layouts", n).recognise(root)}
    assert layout in seen
    assert seen <= {layout, "class_folders"}  # videos of a list may lie in folders as well


def test_auto_takes_it_and_says_what_else_would_do(layout, dataset):
    root, _ = dataset
    listing = read(root)
    assert listing.layout == layout
    generic = layout != "class_folders" and variant("layouts", "class_folders").recognise(root)
    assert ("--layout class_folders" in listing.said) == bool(generic)
    assert listing.clips == read(root, layout).clips


def test_it_recognises_nothing_in_an_empty_directory_or_among_papers(layout, tmp_path):
    module = variant("layouts", layout)
    assert module.recognise(tmp_path) is None
    touch(tmp_path / "readme.txt")
    touch(tmp_path / "papers" / "a.pdf")
    tmp_path.joinpath("notes.csv").write_text("name,age\nx,3\n", "utf-8")
    tmp_path.joinpath("train.json").write_text("[1]", "utf-8")
    assert module.recognise(tmp_path) is None
    with pytest.raises(ValueError, match=r"does not fit .* it holds .*1 \.pdf[\s\S]* needs "):
        read(tmp_path, layout)


def test_clips_do_not_depend_on_the_order_of_the_directory(layout, dataset, monkeypatch):
    root, _ = dataset
    before = read(root, layout)
    assert read(root, layout) == before
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert read(root, layout) == before


def test_paths_are_relative_and_name_what_is_on_the_disk(layout, dataset):
    root, _ = dataset
    listing = read(root, layout)
    for clip in listing.clips:
        assert not os.path.isabs(clip.path)
        assert os.path.normpath(clip.path) == clip.path
        assert ".." not in clip.path.split("/")
        assert (listing.root / clip.path).exists()
    assert listing.root == root


def test_labels_are_kept_to_the_letter(layout, dataset):
    root, labels = dataset
    listing = read(root, layout)
    assert {clip.label for clip in listing.clips} == set(labels)
    assert sorted(listing.classes) == sorted(labels)


def test_equal_file_names_in_different_folders_are_different_clips(layout, dataset):
    root, _ = dataset
    clips = read(root, layout).clips
    assert len({clip.path for clip in clips}) == len(clips)
    if layout in ("class_folders", "table"):
        assert len({clip.path.rsplit("/", 1)[1] for clip in clips}) < len(clips)


def test_a_listed_clip_that_the_disk_lacks_is_listed(layout, dataset):
    root, _ = dataset
    before = read(root, layout)
    if layout != "class_folders":
        (root / before.clips[0].path).unlink()
        after = read(root, layout)
        assert len(after.clips) == len(before.clips)
        assert after.clips[0].label == before.clips[0].label
        assert not (root / after.clips[0].path).exists()
        return
    path = root / before.clips[0].path
    path.unlink()
    path.symlink_to("nowhere.mp4")
    assert read(root, layout).clips == before.clips


def test_links_are_followed_and_a_loop_of_them_ends(layout, dataset, tmp_path):
    root, _ = dataset
    before = read(root, layout)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to("self")
    for folder in [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]:
        (folder / "up").symlink_to(root, target_is_directory=True)
        moved = tmp_path / "elsewhere" / folder.name
        moved.parent.mkdir(exist_ok=True)
        folder.rename(moved)
        folder.symlink_to(moved, target_is_directory=True)
    assert read(root, layout).clips == before.clips


opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def test_it_opens_no_video(layout, dataset):
    root, _ = dataset
    opened.clear()
    listing = read(root)
    touched = set(opened)
    assert not {str(root / clip.path) for clip in listing.clips} & touched
    if layout != "class_folders":
        assert any(name.endswith((".csv", ".txt", ".json")) for name in touched)


def test_a_split_it_does_not_have_is_refused(layout, dataset):
    root, _ = dataset
    with pytest.raises(ValueError, match=r"has no numbered splits|has no split '7'; found 1, 2"):
        read(root, layout, split="7")
