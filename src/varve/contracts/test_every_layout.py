"""Tests of every layout, on the dataset dataset that its own `example` writes."""

import os
import sys
from pathlib import Path

import pytest

from varve.contracts.options import names
from varve.pipeline.datasets.layouts import find, read
from varve.pipeline.registry import available


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", names(metafunc.config, "layouts"))


@pytest.fixture
def layout(name):
    return find(name)


@pytest.fixture
def dataset(layout, tmp_path):
    """The directory of a dataset, and the labels that it has."""
    assert layout.example, "no function example(root); see varve.pipeline.datasets.layouts"
    root = tmp_path / "data set"
    return root, layout.example(root)


@pytest.fixture
def recognised(layout, dataset):
    """Names of the layouts that recognise the dataset."""
    if layout.recognise is None:
        pytest.skip("a function without `recognise` is read by its name only")
    others = {other: find(other).recognise for other in available("layouts")}
    return {other for other, check in others.items() if check and check(dataset[0])}


def test_it_recognises_its_own_form_and_no_other_list_layout_does(name, recognised):
    assert name in recognised
    # Videos of a list may be in folders as well.
    assert all(find(other).specific == 0 for other in recognised - {name})


def test_auto_takes_it_and_names_the_other_choices(name, dataset, recognised):
    root, _ = dataset
    listing = read(root)
    assert listing.layout == name
    for other in recognised - {name}:
        assert f"--layout {other}" in listing.summary
    assert ("--layout" in listing.summary) == (recognised != {name})
    assert listing.clips == read(root, name).clips


def test_it_recognises_nothing_in_an_empty_directory_or_among_papers(name, layout, tmp_path):
    if layout.recognise is None:
        pytest.skip("a function without `recognise` is read by its name only")
    assert layout.recognise(tmp_path) is None
    (tmp_path / "readme.txt").write_bytes(b"")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.pdf").write_bytes(b"")
    (tmp_path / "notes.csv").write_text("name,age\nx,3\n", "utf-8")
    (tmp_path / "train.json").write_text("[1]", "utf-8")
    assert layout.recognise(tmp_path) is None
    with pytest.raises(ValueError, match=r"does not fit .* it holds .*1 \.pdf[\s\S]* needs "):
        read(tmp_path, name)


def test_clips_do_not_depend_on_the_order_of_the_directory(name, dataset, monkeypatch):
    root, _ = dataset
    before = read(root, name)
    assert read(root, name) == before
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
    assert read(root, name) == before


def test_paths_are_relative_and_exist_on_the_disk(name, dataset):
    root, _ = dataset
    listing = read(root, name)
    for clip in listing.clips:
        assert not os.path.isabs(clip.path)
        assert os.path.normpath(clip.path) == clip.path
        assert ".." not in clip.path.split("/")
        assert (listing.root / clip.path).exists()
    assert listing.root == root


def test_labels_are_kept_to_the_letter_but_for_blanks_around_them(name, dataset):
    root, labels = dataset
    labels = [label.strip() for label in labels]
    listing = read(root, name)
    assert {clip.label for clip in listing.clips} == set(labels)
    assert sorted(listing.classes) == sorted(labels)


def test_every_clip_is_listed_once(name, dataset):
    root, _ = dataset
    clips = read(root, name).clips
    assert clips
    assert len({(clip.path, clip.start_seconds, clip.end_seconds) for clip in clips}) == len(clips)


def test_a_listed_clip_that_the_disk_lacks_is_listed(name, layout, dataset):
    root, _ = dataset
    before = read(root, name)
    path = root / before.clips[0].path
    path.unlink()
    if layout.specific == 0:  # names on the disk are the list: a link to nothing is one
        path.symlink_to("nowhere.mp4")
        assert read(root, name).clips == before.clips
        return
    after = read(root, name)
    assert len(after.clips) == len(before.clips)
    assert after.clips[0].label == before.clips[0].label
    assert not (root / after.clips[0].path).exists()


def test_links_are_followed_and_a_loop_of_them_ends(name, dataset, tmp_path):
    root, _ = dataset
    before = read(root, name)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to("self")
    for folder in [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]:
        (folder / "up").symlink_to(root, target_is_directory=True)
        moved = tmp_path / "elsewhere" / folder.name
        moved.parent.mkdir(exist_ok=True)
        folder.rename(moved)
        folder.symlink_to(moved, target_is_directory=True)
    assert read(root, name).clips == before.clips


opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def test_it_opens_its_lists_and_no_video(name, layout, dataset):
    root, _ = dataset
    opened.clear()
    listing = read(root, name)
    files = set(opened)
    assert not {str(root / clip.path) for clip in listing.clips} & files
    if layout.specific > 0:
        assert any(Path(root) in Path(file).parents for file in files)


def test_a_split_that_it_does_not_have_is_refused(name, dataset):
    root, _ = dataset
    with pytest.raises(ValueError, match=r"no (numbered splits, )?split '7'"):
        read(root, name, split="7")
