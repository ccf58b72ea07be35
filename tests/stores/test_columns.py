"""Columns on disk after a write, a rewrite and a growth. No cell has a key that is not its own."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

from varve.stores import atomic, columns
from varve.stores.columns import MISSING, STORED, Column, ColumnSpec, node_name, runs

CELL = (2, 1 << 17)  # 1 MB in float32, 512 kB in float16: shards of 64 and 128 clips


def spec(dtype="float16", cell=CELL):
    return ColumnSpec("net:tag", "blocks.0.mlp:cls", "ab" * 32, cell, dtype, {"frames": {"T": 2}})


def cells_of(rows, dtype="float16", cell=CELL, salt=0):
    """Return cells whose every value encodes the row."""
    values = np.array([np.full(cell, r + salt / 4, np.float32) for r in rows])
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def keys_of(rows, salt=0):
    return np.array([[r + 1, salt + 1, *[7] * 14] for r in rows], np.uint8)


def write_cells(column, rows, clips, salt=0, dtype="float16", cell=CELL):
    rows = np.array(rows, np.int64)
    for shard in np.unique(rows // column.spec.shard_clips):
        in_shard = rows[rows // column.spec.shard_clips == shard]
        column.write_shard(
            int(shard),
            in_shard,
            cells_of(in_shard, dtype, cell, salt),
            keys_of(in_shard, salt),
            clips,
        )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", STORED)
def test_cells_come_back_and_absent_ones_have_no_chunk(tmp_path, dtype):
    column = Column(tmp_path, spec(dtype))
    column.create(5)
    write_cells(column, [0, 1, 3], 5, dtype=dtype)
    np.testing.assert_array_equal(
        column.read_cells(np.array([0, 1, 3])), cells_of([0, 1, 3], dtype)
    )
    assert column.done(5).any(axis=1).tolist() == [True, True, False, True, False]
    slots = column.spec.shard_clips
    index = np.frombuffer(column.shard_file(0).read_bytes()[-16 * slots - 4 : -4], "<u8")
    present = index.reshape(slots, 2)[:, 0] != 2**64 - 1
    assert np.flatnonzero(present).tolist() == [0, 1, 3]
    whole = zarr.open_array(str(column.path), mode="r")[:]
    np.testing.assert_array_equal(whole[2], np.full(CELL, MISSING[dtype], STORED[dtype]))


def test_a_row_of_zeros_is_a_row_and_not_an_absence(tmp_path):
    column = Column(tmp_path, spec())
    column.create(2)
    zeros = np.zeros((1, *CELL), np.float16)
    column.write_shard(0, np.array([1]), zeros, keys_of([1]), 2)
    whole = zarr.open_array(str(column.path), mode="r")[:]
    assert (whole[1] == 0).all()
    assert np.isnan(whole[0]).all()


def test_rows_added_in_any_order_and_any_number_of_builds_give_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "SHARD_BYTES", 64 * 2048)
    small = spec(cell=(2, 512))
    assert small.shard_clips == 64
    write = partial(write_cells, cell=small.cell)
    at_once, in_parts = Column(tmp_path / "a", small), Column(tmp_path / "b", small)
    at_once.create(140)
    write(at_once, range(140), 140)
    in_parts.create(100)
    write(in_parts, range(50, 100), 100)
    write(in_parts, range(50), 100)
    in_parts.create(140)
    write(in_parts, [139, *range(100, 130)][1:], 140)
    write(in_parts, range(130, 140), 140)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_every_chunk_has_a_checksum_that_a_flipped_bit_breaks(tmp_path):
    column = Column(tmp_path, spec())
    column.create(3)
    write_cells(column, [0, 1, 2], 3)
    shard = column.shard_file(0)
    data = bytearray(shard.read_bytes())
    data[column.spec.cell_bytes + 4 + 100] ^= 1  # within row 1
    shard.write_bytes(data)
    again = Column(tmp_path, spec())
    np.testing.assert_array_equal(again.read_cells(np.array([0])), cells_of([0]))
    with pytest.raises(Exception, match=r"(?i)checksum|crc"):
        again.read_cells(np.array([1]))


@pytest.mark.parametrize("killed_at", ["before the shard", "before the marks"])
def test_after_a_kill_while_a_row_is_replaced_no_new_cells_are_under_the_previous_key(
    tmp_path, monkeypatch, killed_at
):
    column = Column(tmp_path, spec())
    column.create(2)
    write_cells(column, [0, 1], 2)
    real, shard = atomic.write, column.shard_file(0)

    def dies(store, target, *pieces):
        if killed_at == "before the shard" and target == shard:
            raise KeyboardInterrupt
        if (
            killed_at == "before the marks"
            and shard.stat().st_mtime_ns != before
            and target != shard
        ):
            raise KeyboardInterrupt
        real(store, target, *pieces)

    before = shard.stat().st_mtime_ns
    monkeypatch.setattr("varve.stores.columns.atomic.write", dies)
    with pytest.raises(KeyboardInterrupt):
        write_cells(column, [1], 2, salt=1)
    done = Column(tmp_path, spec()).done(2)
    assert (done[0] == keys_of([0])[0]).all()
    # Were the old key still there, the old bytes' return would make the new cell valid.
    assert not done[1].any()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("present", [[0], [0, 1, 2, 3], [1, 70, 150]])
def test_the_size_is_known_before_anything_is_written(tmp_path, dtype, present):
    cell = (2, 1 << 16)
    column = Column(tmp_path, spec(dtype, cell))
    column.create(200)
    write_cells(column, present, 200, dtype=dtype, cell=cell)
    mask = np.zeros(200, bool)
    mask[present] = True
    values = sum(len(data) for data in files(column.path).values())
    done = sum(len(data) for data in files(column.done_path).values())
    assert column.spec.file_bytes(mask) == values + done


def test_shards_have_64_to_128_megabytes_whatever_the_cell():
    for cell in [(8, 384), (8, 512), (8, 197, 768), (8, 256, 14, 14)]:
        column = spec(cell=cell)
        assert 64 << 20 <= column.shard_clips * column.cell_bytes < 128 << 20
    assert spec(cell=(1, 1)).shard_clips == 16384


def test_each_name_becomes_one_node():
    for name in ("hf-hub:a/b", "../x", "_hidden", ".dot", "50%"):
        node = node_name(name)
        assert "/" not in node
        assert node[0] not in "._"
    assert len({node_name(n) for n in ("a/b", "a%2Fb", "a%b")}) == 3


def test_runs_cover_every_row_once():
    rows = np.array([0, 1, 2, 5, 9, 10])
    assert [rows[a:b].tolist() for a, b in runs(rows)] == [[0, 1, 2], [5], [9, 10]]
    assert runs(np.array([], int)) == []


def test_the_metadata_of_a_column_does_not_change(tmp_path):
    """A changed byte changes every store, and must be a decision."""
    column = Column(tmp_path, spec())
    column.create(3)
    metadata = json.loads((column.path / "zarr.json").read_bytes())
    assert metadata["shape"] == [3, *CELL]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [128, *CELL]
    assert metadata["attributes"] == {
        "dtype": "float16", "fingerprint": "ab" * 32, "frames": {"T": 2},
    }  # fmt: skip
    sharding = metadata["codecs"][0]["configuration"]
    assert sharding["chunk_shape"] == [1, *CELL]
    assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "crc32c"]
    assert metadata["fill_value"] == "NaN"
    assert metadata["dimension_names"] == ["clip", "frame", "blocks.0.mlp:cls.0"]
