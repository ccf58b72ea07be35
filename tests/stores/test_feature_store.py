"""`FeatureStore`: features are found, read and refused by name, row and format."""

import json

import numpy as np
import pytest

from varve.pipeline.datasets.media import content_digest
from varve.stores import FORMAT, Damaged, FeatureStore, NotAStore, SpecMismatch, clips


def expected(rows):
    cell = np.arange(12, dtype=np.float32).reshape(4, 3)
    return np.stack([cell + 16 * row for row in rows])


@pytest.fixture
def feature(store):
    return store.feature("net:tag", "blocks.0:cls", fingerprint="ab")


def test_rows_come_in_the_requested_order_with_repeats(feature, dtype):
    rows = [1, 0, 1]
    result = feature.read(rows)
    assert result.dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(result, expected(rows))
    np.testing.assert_array_equal(feature.read(np.array([0])), expected([0]))
    np.testing.assert_array_equal(feature.read(slice(0, 2)), expected([0, 1]))
    assert feature.read([]).shape == (0, 4, 3)
    np.testing.assert_array_equal(feature.read(feature.valid), expected([0, 1]))
    np.testing.assert_array_equal(feature.read(np.array([False, True, False])), expected([1]))
    assert len(feature.dataset([True, False, False])) == 1
    for wrong in ([True, False], [0.0, 1.0]):
        with pytest.raises(IndexError):
            feature.read(wrong)


def test_a_row_without_a_feature_is_refused_with_its_reason(feature):
    assert feature.valid.tolist() == [True, True, False]
    with pytest.raises(
        LookupError, match=r"row 2 \(a/z.mp4; quarantined: corrupt no frame decodes\)"
    ):
        feature.read([0, 2])
    with pytest.raises(LookupError):
        feature.read()


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_outside_the_table_is_refused(feature, row):
    with pytest.raises(IndexError, match="table of 3 clips"):
        feature.read([row])


def test_a_changed_clip_makes_its_cell_invalid_and_the_rest_stay(store):
    table = store.clips.copy()
    table.loc[0, "digest"] = "f" * 64
    clips.write(store.path, table)
    feature = FeatureStore.open(store.path).feature("net:tag", "blocks.0:cls", fingerprint="ab")
    assert feature.valid.tolist() == [False, True, False]


@pytest.mark.parametrize("damage", ["removed", "cut off", "emptied", "flipped"])
def test_a_damaged_shard_is_named_and_never_read_as_numbers(feature, damage):
    shard = feature.path / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    if damage == "removed":
        shard.unlink()
    elif damage == "flipped":
        data[3] ^= 16
        shard.write_bytes(data)
    else:
        shard.write_bytes(data[: len(data) // 2] if damage == "cut off" else b"")
    with pytest.raises(Damaged, match=r"c/0/0/0 is damaged near row 0 \(a/x\.mp4\)"):
        feature.read([0, 1])


def test_the_error_of_a_damaged_table_names_the_repair(store):
    (store.path / clips.FILE).write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"clips\.parquet is damaged .*Move it away"):
        FeatureStore.open(store.path).clips  # noqa: B018


def test_a_shard_replaced_in_the_middle_of_a_read_is_read_again(feature, dtype):
    """A builder renames a new file over the old one, between the reads of index and chunks."""
    real, shard = feature._array, feature.path / "c" / "0" / "0" / "0"

    class Torn:
        shards, dtype, reads = real.shards, real.dtype, 0

        def __getitem__(self, rows):
            self.reads += 1
            if self.reads == 1:
                other = shard.with_name("other")
                other.write_bytes(shard.read_bytes())
                other.replace(shard)
                return real[rows] * 0
            return real[rows]

    torn = Torn()
    torn.shape, torn.attrs = real.shape, real.attrs
    feature._array = torn
    np.testing.assert_array_equal(feature.read([0, 1]), expected([0, 1]))
    assert torn.reads == 2


def test_dask_and_torch_see_the_same_numbers(feature):
    import torch

    np.testing.assert_array_equal(feature.to_dask()[:2].compute(), expected([0, 1]))
    dataset = feature.dataset()
    assert (len(dataset), dataset.labels) == (2, ["clap", "wave"])
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    cells, numbers = next(iter(loader))
    np.testing.assert_array_equal(cells.float().numpy(), expected([0, 1]))
    assert numbers.tolist() == [1, 0]


def test_a_feature_is_found_by_the_name_of_its_request(store):
    result = store.feature("net:/some/where/tag.safetensors", "blocks.0:cls", fingerprint="ab")
    assert result.fingerprint == "ab" * 32
    assert store.feature("net", "blocks.0:cls", fingerprint="cd").fingerprint == "cd" * 32


def test_the_error_of_several_matching_columns_lists_their_differences(store):
    with pytest.raises(
        SpecMismatch, match=r"2 columns.*\n.*ab.*frames.frames=4\n.*cd.*frames.frames=5"
    ):
        store.feature("net:tag", "blocks.0:cls")


def test_the_error_of_a_missing_feature_lists_the_others(store):
    with pytest.raises(SpecMismatch, match=r"no net:tag proj; it has\n  net:tag blocks.0:cls ab"):
        store.feature("net:tag", "proj")


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    for call in (FeatureStore.open, FeatureStore.create):
        with pytest.raises(NotAStore, match=r"no zarr\.json"):
            call(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    for call in (FeatureStore.open, FeatureStore.create):
        with pytest.raises(NotAStore, match="not written by Varve"):
            call(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt", "zarr.json"]


def test_a_file_is_no_store(tmp_path):
    file = tmp_path / "s.zarr"
    file.write_text("")
    with pytest.raises(NotAStore, match="is a file"):
        FeatureStore.create(file)


@pytest.mark.parametrize("call", [FeatureStore.open, FeatureStore.create])
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT + 1, f"format {FORMAT + 1}, this version reads format {FORMAT};.*a newer Varve"),
        (FORMAT - 1, f"format {FORMAT - 1}, which an older .* Build it again into a new folder"),
    ],
)
def test_another_format_is_refused_and_unchanged(store, call, version, message):
    file = store.path / "zarr.json"
    root = json.loads(file.read_bytes())
    root["attributes"]["varve"]["format"] = version
    file.write_text(json.dumps(root))
    before = file.read_bytes()
    with pytest.raises(NotAStore, match=message):
        call(store.path)
    assert file.read_bytes() == before


def test_the_table_survives_a_round_trip_with_any_labels(tmp_path):
    labels = ["a b", "naïve ‘quote’", "../x", 'q"uote', "新しい", "line\nbreak", ""]
    rows = [clips.blank(f"{i}.mp4", label, "") for i, label in enumerate(labels)]
    rows[1]["start_seconds"] = 0.1
    rows[2] |= {"overflowed": ("0123456789abcdef", "fedcba9876543210"), "duplicate_of": 1}
    import pandas as pd

    table = pd.DataFrame(rows).astype(clips.COLUMNS).rename_axis(index="row")
    clips.write(tmp_path, table)
    pd.testing.assert_frame_equal(clips.read(tmp_path), table)
    assert clips.encode(table) == clips.encode(clips.read(tmp_path))


def test_the_row_key_identifies_bytes_and_interval(tmp_path):
    whole = clips.row_key("ab", np.nan, np.nan)
    assert len(whole) == 16
    others = {clips.row_key("ab", 0.0, np.nan), clips.row_key("ab", np.nan, 1.0),
              clips.row_key("cd", np.nan, np.nan), whole}  # fmt: skip
    assert len(others) == 4
    assert clips.row_key("", np.nan, np.nan) == bytes(16)


def test_the_digest_of_a_frame_folder_depends_on_frames_and_order(tmp_path):
    def folder(name, files):
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return content_digest(tmp_path / name)

    same = folder("a", {"2.jpg": "x", "10.jpg": "y"})
    assert folder("b", {"3.jpg": "x", "4.jpg": "y", ".hidden": "z"}) == same
    assert folder("c", {"2.jpg": "y", "10.jpg": "x"}) != same
    assert folder("d", {"2.jpg": "xy"}) != same
