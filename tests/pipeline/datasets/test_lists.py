"""Plain lists of clips: their forms, and what is decided about paths, labels and splits."""

from collections import Counter
from pathlib import Path

import pytest

from varve.pipeline.datasets.layouts import ListedClip, read

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


# Plain lists


def test_the_real_list_is_read_with_all_its_splits():
    listing = read(shared("asl24"))
    assert listing.layout == "table"
    assert splits(listing) == {"train": 1024, "gap": 48, "test": 422}
    assert "ignored signer, block" in listing.summary
    assert len(listing.classes) == 24
    assert all((listing.root / clip.path).is_file() for clip in listing.clips)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_delimiters_marks_and_line_ends_make_no_difference(tmp_path, delimiter, encoding, newline):
    rows = [["Video", "Class", "note"], ["a b.mp4", '"é, ""x""; y\ty"', "1"], ["c.mp4", "z", ""]]
    text = "".join(delimiter.join(row) + newline for row in rows)
    listing = read(write(tmp_path / "list.csv", text, encoding))
    assert listing.clips == (ListedClip("a b.mp4", 'é, "x"; y\ty'), ListedClip("c.mp4", "z"))


def test_a_column_named_path_goes_before_others_that_could_be_it(tmp_path):
    path = write(tmp_path / "l.csv", "file,class,path,label\nno.mp4,no,a.mp4,x\n")
    listing = read(path)
    assert listing.clips == (ListedClip("a.mp4", "x"),)
    assert "ignored file, class" in listing.summary


def test_a_list_given_by_name_has_paths_relative_to_its_directory(tmp_path):
    path = write(tmp_path / "lists" / "mine.TSV", "file\tcategory\nv/a.mp4\tx\n")
    listing = read(path)
    assert listing.root == tmp_path / "lists"
    assert paths(listing) == ["v/a.mp4"]


def test_intervals_are_seconds_and_clips_of_one_file_are_several(tmp_path):
    text = "path,label,start,end_seconds\na.mp4,x,,2.5\na.mp4,y,2.5,\na.mp4,z,1e1,11\n"
    assert read(write(tmp_path / "l.csv", text)).clips == (
        ListedClip("a.mp4", "x", "", None, 2.5),
        ListedClip("a.mp4", "y", "", 2.5, None),
        ListedClip("a.mp4", "z", "", 10.0, 11.0),
    )


def test_two_columns_without_a_header_are_read_if_a_path_is_there(tmp_path):
    path = write(tmp_path / "list.csv", "gone.mp4,x\na.mp4,y\n")
    with pytest.raises(
        ValueError, match=r"none of the 2 clips of list\.csv is there, such as gone"
    ):
        read(path)
    put(tmp_path, "a.mp4")
    assert [(c.path, c.label) for c in read(tmp_path).clips] == [("gone.mp4", "x"), ("a.mp4", "y")]
    write(path, "a.mp4,y,1\n")
    with pytest.raises(ValueError, match=r"is no list of clips.* is needed"):
        read(path)


def test_lists_named_after_splits_are_read_together(tmp_path):
    for name in ("my_test", "train", "val"):
        write(tmp_path / f"{name}.csv", f"path,label\n{name}.mp4,x\n")
    assert [(c.path, c.split) for c in read(tmp_path).clips] == [
        ("train.mp4", "train"),
        ("val.mp4", "val"),
        ("my_test.mp4", "test"),
    ]


def test_several_lists_that_are_not_splits_are_a_question(tmp_path):
    for name in ("old", "train"):
        write(tmp_path / f"{name}.csv", "path,label\na.mp4,x\n")
    with pytest.raises(ValueError, match=r"holds 2 lists: old\.csv, train\.csv; name the one"):
        read(tmp_path)
    assert len(read(tmp_path / "old.csv").clips) == 1


def test_repeated_entries_are_taken_once_and_contradictions_named(tmp_path):
    path = tmp_path / "l.csv"
    write(path, "path,label,split\na.mp4,x,train\n./a.mp4,x,train\nb.mp4,y,train\nb.mp4,y,test\n")
    listing = read(path)
    assert [(c.path, c.split) for c in listing.clips] == [("a.mp4", "train"), ("b.mp4", "train")]
    assert "taken once: 2" in listing.summary
    assert "in two splits, of which the first counts: 1" in listing.summary
    write(path, 'path,label\na.mp4,"x\ny"\nv//../a.mp4,z\n')
    with pytest.raises(ValueError, match=r"'x\\ny' \(l\.csv line 2\) and 'z' \(l\.csv line 4\)"):
        read(path)


def test_absolute_paths_inside_the_root_become_relative(tmp_path):
    root = tmp_path / "real"
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    put(root, "v/a.mp4")
    text = f"path,label\n{root}/v/a.mp4,x\n{tmp_path}/link/v/b.mp4,y\n"
    write(root / "l.csv", text)
    assert paths(read(root)) == ["v/a.mp4", "v/b.mp4"]
    assert paths(read(tmp_path / "link")) == ["v/a.mp4", "v/b.mp4"]


def test_backslashes_are_slashes_unless_the_file_has_them_in_its_name(tmp_path):
    put(tmp_path, "odd\\name.mp4")
    write(tmp_path / "l.csv", "path,label\nv\\a.mp4,x\nodd\\name.mp4,y\n")
    assert paths(read(tmp_path, "table")) == ["v/a.mp4", "odd\\name.mp4"]


@pytest.mark.parametrize(
    "path",
    ["../a.mp4", "v/../../a.mp4", "..\\a.mp4", "/etc/a.mp4", "C:\\a.mp4", ".", "", "..", "\0"],
)
def test_a_path_that_leaves_the_root_is_an_error_that_names_its_line(tmp_path, path):
    write(tmp_path / "l.csv", f'path,label\n"{path}",x\n')
    with pytest.raises(ValueError, match=r"l\.csv line 2: .*(give paths relative|is no path)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,x,-1,2", "'-1' is no time in seconds"),
        ("a.mp4,x,nan,2", "'nan' is no time"),
        ("a.mp4,x,00:01,2", "'00:01' is no time"),
        ("a.mp4,x,2,1", "ends at 1 s, no later than it starts"),
        ("a.mp4,x,y,1,2", "5 values for 4 columns"),
        ("a.mp4,x", "2 values for 4 columns"),
        ('a.mp4,"x,1,2', "unexpected end of data"),
    ],
)
def test_a_wrong_row_of_a_list_is_named(tmp_path, row, message):
    write(tmp_path / "l.csv", f"path,label,start,end\nb.mp4,x,1,2\n\n{row}\n")
    with pytest.raises(ValueError, match=rf"l\.csv line 4: .*{message}"):
        read(tmp_path)


def test_a_list_in_another_encoding_is_refused_with_its_line(tmp_path):
    write(tmp_path / "l.csv", "path,label\na.mp4,x\ncafé.mp4,y\n", "latin-1")
    with pytest.raises(ValueError, match=r"l\.csv line 3 is not UTF-8; save the list as UTF-8"):
        read(tmp_path)


def test_a_list_without_labelled_clips_is_refused(tmp_path):
    write(tmp_path / "l.csv", "path,label\na.mp4,\n")
    with pytest.raises(ValueError, match="no clip with a label"):
        read(tmp_path)


def test_a_header_alone_is_refused(tmp_path):
    write(tmp_path / "l.csv", "path,label\n")
    with pytest.raises(ValueError, match="no clip with a label"):
        read(tmp_path)


# Text made regular


def test_blanks_and_marks_around_values_are_no_part_of_them(tmp_path):
    rows = ["a.mp4 ,walk,train", " b.mp4, walk,test ", "c.mp4,walk\u00a0,\ufefftrain"]
    rows.append('"d.mp4","x\t", test')
    path = write(tmp_path / "l.csv", "path, label ,split\r\n" + "\r\n".join(rows))
    listing = read(path)
    assert [(c.path, c.label, c.split) for c in listing.clips] == [
        ("a.mp4", "walk", "train"),
        ("b.mp4", "walk", "test"),
        ("c.mp4", "walk", "train"),
        ("d.mp4", "x", "test"),
    ]
    assert listing.classes == ("walk", "x")


def test_a_blank_at_the_end_of_a_file_name_is_kept_where_there_is_such_a_file(tmp_path):
    put(tmp_path, "a.mp4 ")
    write(tmp_path / "l.csv", "path,label\na.mp4 ,x\nb.mp4 ,x\n")
    assert paths(read(tmp_path / "l.csv")) == ["a.mp4 ", "b.mp4"]


def test_labels_that_differ_in_case_or_form_alone_stay_and_are_named(tmp_path):
    rows = ["a.mp4,Walk", "b.mp4,walk", "c.mp4,caf\u00e9", "d.mp4,cafe\u0301", "e.mp4,run"]
    listing = read(write(tmp_path / "l.csv", "path,label\n" + "\n".join(rows)))
    assert len(listing.classes) == 5
    assert "DIFFERENT labels that differ in case or Unicode form alone: " in listing.summary
    assert "'Walk', 'walk'" in listing.summary
    assert "'cafe\u0301', 'caf\u00e9'" in listing.summary
    assert "run" not in listing.summary
    path = write(tmp_path / "m.csv", "path,label,split\na.mp4,x,Train\nb.mp4,x,train\n")
    assert "DIFFERENT splits that differ in case" in read(path).summary


def test_a_path_that_begins_with_a_slash_is_of_the_root_if_it_is_there(tmp_path):
    put(tmp_path, "v/a.mp4", "v/b.mp4")
    rows = "/v/a.mp4,x\n./v/b.mp4,y\n//v/a.mp4,x\n"
    listing = read(write(tmp_path / "l.csv", f"path,label\n{rows}"))
    assert paths(listing) == ["v/a.mp4", "v/b.mp4"]
    assert "repeated entries, taken once: 1" in listing.summary


def test_labels_that_are_whole_numbers_are_in_the_order_of_their_values(tmp_path):
    rows = [f"{i}.mp4,{label}" for i, label in enumerate(("10", "9", "0", "011", "-1"))]
    listing = read(write(tmp_path / "l.csv", "path,label\n" + "\n".join(rows)))
    assert listing.classes == ("-1", "0", "9", "10", "011")
    listing = read(write(tmp_path / "l.csv", "path,label\n" + "\n".join([*rows, "z.mp4,b"])))
    assert listing.classes == ("-1", "0", "011", "10", "9", "b")
