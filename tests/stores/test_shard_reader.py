"""The shard reader returns the bits that zarr-python reads, while files change or fail."""

import contextlib
import errno
import gc
import multiprocessing
import os
import pickle
import resource
import threading
import time
from functools import partial

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from varve.stores import Damaged, Feature, FeatureStore, columns, shard_reader
from varve.stores.columns import MISSING, STORED, Column, ColumnSpec
from varve.stores.shard_reader import ShardReader
from varve.stores.zarr_reader import ZarrReader

CELL = (4, 6)
SLOTS = 8  # clips a shard
INDEX_BYTES = 16 * SLOTS + 4
# A fork of a process with threads (pytest's, Zarr's) is what a data loader does by default.
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def cells_of(rows, dtype="float16", salt=0):
    """Return stored bits whose every number encodes the row and the version."""
    values = np.array([np.full(CELL, 2 * row + salt, np.float32) for row in rows]).reshape(
        -1, *CELL
    )
    values += np.arange(CELL[1], dtype=np.float32) / 8 if dtype == "float32" else 0
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


class StoredColumn:
    """A store with one column in shards of 8 clips, written as a build writes it."""

    def __init__(self, write_rows, path, count, absent=(), dtype="float16"):
        self.store, self.dtype, self.write_rows = FeatureStore.create(path), dtype, write_rows
        self.column = Column(path, ColumnSpec("net:tag", "pool", "ab" * 32, CELL, dtype, {}))
        self.write(np.setdiff1d(np.arange(count), absent), count)

    def write(self, rows, count, salt=0):
        cells = partial(cells_of, dtype=self.dtype, salt=salt)
        self.write_rows(self.store.path, self.column, rows, count, cells)

    def feature(self) -> Feature:
        return FeatureStore.open(self.store.path).feature("net:tag", "pool")

    def whole(self) -> np.ndarray:
        """Return all cells as zarr-python reads them."""
        return zarr.open_array(str(self.column.path), mode="r")[:]

    def shard(self, number=0):
        return self.column.shard_file(number)

    def rewrite(self, **options) -> None:
        """Write the array again in another form that Zarr supports."""
        array = zarr.open_array(str(self.column.path), mode="r")
        whole, attributes = array[:], dict(array.attrs)
        layout = {"shards": (SLOTS, *CELL), "chunks": (1, *CELL), "compressors": None}
        layout |= options
        zarr.create_array(
            str(self.column.path), shape=whole.shape, dtype=whole.dtype, filters=None,
            fill_value=MISSING[self.dtype], attributes=attributes,
            overwrite=True, **layout,
        )[:] = whole  # fmt: skip


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(columns, "MAX_SHARD_CLIPS", SLOTS)
    monkeypatch.setattr(shard_reader, "SPAN_BYTES", 150)  # spans of three cells or four


@pytest.fixture
def make(tmp_path, write_rows):
    """Return a function that makes a store of some clips, without those in `absent`."""
    return lambda *of, name="s", **options: StoredColumn(
        write_rows, tmp_path / name, *of, **options
    )


def numbers(bits, dtype):
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits


@pytest.mark.parametrize("dtype", STORED)
def test_rows_in_any_order_are_what_zarr_reads(make, dtype):
    stored = make(60, absent=[*range(16, 24), 3, 40], dtype=dtype)
    whole, feature = stored.whole(), stored.feature()
    assert isinstance(feature._reader, ShardReader)
    there, rng = np.flatnonzero(feature.valid), np.random.default_rng(0)
    assert len(there) == 50
    for count in [1, 2, 5, 20, 20, 20, 50, 200]:
        drawn, near = rng.choice(there, count), rng.choice(there[10:20], count)
        for rows in (drawn, np.sort(drawn), near, np.sort(near), there[:count]):
            result = feature.read(rows)
            assert result.tobytes() == numbers(whole[rows], dtype).tobytes()
            assert result.shape == (len(rows), *CELL)
    assert feature.bits(np.arange(60)).tobytes() == whole.tobytes()
    assert feature.read([]).shape == (0, *CELL)


@pytest.mark.parametrize("checksums", [[], [Crc32cCodec()]], ids=["bare", "crc32c"])
@pytest.mark.parametrize(
    "moved",
    [lambda nth, size: nth * size, lambda nth, size: nth * 64, lambda nth, size: nth * nth * size],
    ids=["side by side", "aligned", "anywhere"],
)
def test_chunks_may_have_any_offset_and_no_checksums(make, checksums, moved):
    stored = make(20, absent=[5])
    whole, rows = stored.whole(), np.delete(np.arange(20), 5)
    stored.rewrite(compressors=checksums)
    size = 48 + 4 * len(checksums)
    data = stored.shard().read_bytes()
    index = np.frombuffer(data[-INDEX_BYTES:-4], "<u8").reshape(SLOTS, 2).copy()
    body = bytearray(moved(SLOTS, size) + size)
    for entry in index:
        if entry[1] == size:
            start = int(entry[0])
            entry[0] = to = moved(start // size, size)
            body[to : to + size] = data[start : start + size]
    checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    stored.shard().write_bytes(bytes(body) + index.tobytes() + checksum)
    feature = stored.feature()
    assert isinstance(feature._reader, ShardReader)
    for _ in range(2):
        assert feature.read(rows[::-1]).tobytes() == whole[rows[::-1]].tobytes()
        assert feature.read([7, 1]).tobytes() == whole[[7, 1]].tobytes()


OTHERS = {
    "compressed": {"compressors": "auto"},
    "unsharded": {"shards": None, "compressors": [Crc32cCodec()]},
    "big-endian": {"compressors": [Crc32cCodec()], "serializer": BytesCodec(endian="big")},
    "index first": {
        "shards": None,
        "chunks": (SLOTS, *CELL),
        "serializer": ShardingCodec(chunk_shape=(1, *CELL), index_location="start"),
    },
    "two clips a chunk": {"chunks": (2, *CELL), "compressors": [Crc32cCodec()]},
    "other keys": {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_arrays_are_read_through_zarr(make, kind):
    stored = make(20, absent=[5])
    whole = stored.whole()
    stored.rewrite(**OTHERS[kind])
    feature = stored.feature()
    assert isinstance(feature._reader, ZarrReader)
    rows = [9, 2, 3, 2, 19, 4]
    assert feature.read(rows).tobytes() == whole[rows].tobytes()
    assert feature.bits(np.arange(20)).tobytes() == whole.tobytes()
    out = np.zeros((2, *CELL), np.float16)
    assert feature.read([7, 8], out) is out
    assert out.tobytes() == whole[[7, 8]].tobytes()
    with pytest.raises(LookupError, match="first is row 5"):
        feature.read([4, 5])


def test_zarr_reads_runs_of_consecutive_rows_and_each_row_once():
    slices = []

    class FakeArray:
        def __getitem__(self, rows):
            slices.append((rows.start, rows.stop))
            return cells_of(range(rows.start, rows.stop))

    out = np.zeros((7, *CELL), np.float16)
    rows = np.array([7, 2, 3, 3, 4, 12, 7])
    absent = ZarrReader(FakeArray(), lambda bits: bits[:, 0, 0] == 24).read(rows, out)
    assert sorted(slices) == [(2, 5), (7, 8), (12, 13)]
    assert absent == [5]
    np.testing.assert_array_equal(out, cells_of(rows))


def test_an_extended_column_is_seen_when_opened_and_does_not_disturb_readers(make):
    stored = make(12)
    old = stored.feature()
    for _ in range(2):
        np.testing.assert_array_equal(old.read([11, 3]), cells_of([11, 3]))
    stored.write(np.arange(12, 30), 30)
    np.testing.assert_array_equal(old.read([11, 3]), cells_of([11, 3]))
    np.testing.assert_array_equal(stored.feature().read(slice(5, 30)), cells_of(range(5, 30)))


@pytest.mark.parametrize("kind", ["plain", *OTHERS])
@pytest.mark.parametrize("near", [0, 12, 1 << 20])
def test_single_items_of_cells_are_what_zarr_reads(make, monkeypatch, kind, near):
    monkeypatch.setattr(shard_reader, "NEAR_BYTES", near)
    stored = make(60, absent=[*range(16, 24), 3, 40], dtype="float32")
    whole = stored.whole()
    if kind != "plain":
        stored.rewrite(**OTHERS[kind])
    feature = stored.feature()
    reader, rng = feature._reader, np.random.default_rng(0)
    assert isinstance(reader, ShardReader) == (kind == "plain")
    there = np.flatnonzero(feature.valid)
    for count in [1, 3, 40]:
        rows, items = rng.choice(there, count), rng.integers(0, CELL[0], count)
        in_order = np.lexsort((items, rows))
        out = np.zeros((count, CELL[1]), np.float32)
        for order in (np.arange(count), in_order):
            assert reader.read_items(rows[order], items[order], out) == []
            assert out.tobytes() == whole[rows[order], items[order]].tobytes()
    rows, items = np.repeat(there[:5], CELL[0]), np.tile(np.arange(CELL[0]), 5)
    out = np.zeros((20, CELL[1]), np.float32)
    assert reader.read_items(rows, items, out) == []
    assert out.tobytes() == whole[there[:5]].tobytes()
    absent = reader.read_items(np.array([2, 17, 3, 2]), np.array([1, 1, 2, 0]), out[:4])
    assert sorted(absent) == [1, 2]
    assert out[[0, 3]].tobytes() == whole[2, [1, 0]].tobytes()
    assert reader.read_items(rows[:0], items[:0], out[:0]) == []


def items_of(feature, rows, verify=True):
    """Return the second item of some cells."""
    out = np.zeros((len(rows), CELL[1]), np.float16)
    items = np.ones(len(rows), np.int64)
    feature._reader.read_items(np.array(rows), items, out, verify)
    return out


def test_a_chunk_is_checked_when_an_item_of_it_is_first_read_and_after_its_replacement(
    make, monkeypatch
):
    stored = make(20)
    feature, real, sizes = stored.feature(), os.preadv, []

    def counting(descriptor, buffers, start):
        sizes.append(sum(map(len, buffers)))
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", counting)
    chunk, item = 4 * 12 + 4, 12
    for expected in ([chunk, item], [item], [item]):
        del sizes[:]
        np.testing.assert_array_equal(items_of(feature, [9]), cells_of([9])[:, 1])
        assert sizes[-len(expected) :] == expected
    stored.write(np.arange(8, 16), 20, salt=1)
    np.testing.assert_array_equal(items_of(feature, [9]), cells_of([9], salt=1)[:, 1])
    assert sizes[-2:] == [chunk, item]
    del sizes[:]
    items_of(stored.feature(), [9], verify=False)
    assert chunk not in sizes


@pytest.mark.parametrize("damage", ["a cell", "its checksum", "an entry", "cut in a cell"])
def test_damage_is_found_by_the_items_of_a_chunk(make, damage):
    stored = make(20)
    before, after = stored.feature(), stored.feature()
    items_of(before, [2, 18])
    spoil(stored, damage)
    for feature in (before, after):
        for _ in range(2):
            with pytest.raises(shard_reader.Unreadable) as caught:
                items_of(feature, [18, 2])
            assert caught.value.row == 2
    stored.shard().write_bytes(b"")
    with pytest.raises(shard_reader.Unreadable, match="cut off"):
        items_of(after, [2])


def test_a_failing_disk_is_no_item(make, monkeypatch):
    feature = make(8).feature()
    items_of(feature, [2])

    def failing(descriptor, buffers, start):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(shard_reader.Unreadable):
        items_of(feature, [2])


def test_a_replaced_shard_is_detected(make):
    stored = make(20)
    feature = stored.feature()
    for salt in (1, 0, 1):
        stored.write(np.arange(8, 16), 20, salt)
        for rows in ([9], [19, 9, 1], range(20), [9, 1]):
            expected = cells_of(rows)
            expected[(np.array(rows) // 8) == 1] += salt
            np.testing.assert_array_equal(feature.read(rows), expected)


def test_a_read_during_a_replacement_has_one_version_of_the_shard(make, monkeypatch):
    """Index and chunks of two versions would pass the checksums, since the rows have moved."""
    stored = make(8, absent=[0, 1, 2])
    feature, real = stored.feature(), os.preadv
    feature.read([3])

    def replacing(descriptor, buffers, start):
        monkeypatch.setattr(os, "preadv", real)
        stored.write(np.arange(8), 8, salt=1)
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", replacing)
    np.testing.assert_array_equal(feature.read([6, 3]), cells_of([6, 3]))
    np.testing.assert_array_equal(feature.read([6, 3]), cells_of([6, 3], salt=1))


def spoil(stored, damage):
    data = bytearray(stored.shard().read_bytes())
    if damage == "a cell":
        data[52 * 2 + 5] ^= 1
    elif damage == "its checksum":
        data[52 * 3 - 1] ^= 1
    elif damage == "the index":
        data[-20] ^= 1
    elif damage == "an entry":
        index = np.frombuffer(data, "<u8", 2 * SLOTS, len(data) - INDEX_BYTES)
        index[4] = len(data) - INDEX_BYTES - 51
        data[-4:] = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    elif damage == "cut in a cell":
        data = data[: 52 * 2 + 30]
    elif damage == "cut in the index":
        data = data[: len(data) - 30]
    stored.shard().write_bytes(b"" if damage == "emptied" else data)


@pytest.mark.parametrize(
    "damage",
    ["a cell", "its checksum", "the index", "an entry", "cut in a cell", "cut in the index",
     "emptied"],
)  # fmt: skip
@pytest.mark.parametrize("rows", [[2], [17, 2, 18], range(20)], ids=["one", "few", "all"])
def test_damage_is_named_after_any_earlier_reads(make, damage, rows):
    stored = make(20)
    before, after = stored.feature(), stored.feature()
    before.read([18, 2])
    before.read([18, 2])
    spoil(stored, damage)
    for feature in (before, after):
        for _ in range(2):
            with pytest.raises(
                Damaged, match=r"pool/abab\w+/c/0/0/0 is damaged near row \d \(\d\.mp4\): it.* "
                r"`varve verify` lists"
            ) as caught:  # fmt: skip
                feature.read(rows)
            if "cell" in damage or "checksum" in damage or "entry" in damage:
                assert "near row 2 " in str(caught.value) or "cut" in damage
            np.testing.assert_array_equal(feature.read([18, 9]), cells_of([18, 9]))
    stored.shard().unlink()
    with pytest.raises(Damaged, match=r"near row 2 .*no chunk for a row marked done"):
        after.read([18, 2])


@pytest.mark.parametrize("rows", [[2, 4], range(8)], ids=["few", "all"])
def test_the_index_is_checked_also_without_verification(make, rows):
    stored = make(8)
    spoil(stored, "a cell")
    result = stored.feature().read(rows, verify=False)
    wrong = (result != cells_of(rows)).any(axis=(1, 2))
    assert [row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong] == [2]
    spoil(stored, "an entry")
    with pytest.raises(Damaged, match="index points to where no chunk can be"):
        stored.feature().read(rows, verify=False)
    spoil(stored, "the index")
    with pytest.raises(Damaged, match="index does not match its checksum"):
        stored.feature().read(rows, verify=False)


@pytest.mark.parametrize("rows", [[2, 4], range(8)], ids=["few", "all"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_truncated_during_a_read_is_damaged(make, monkeypatch, rows, verify):
    stored = make(8)
    feature, real = stored.feature(), os.preadv
    feature.read([1])

    def cutting(descriptor, buffers, start):
        os.truncate(stored.shard(), 52 * 2 + 30)
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(Damaged, match="its index does not match"):
        feature.read(rows, verify=verify)


@pytest.mark.parametrize("rows", [[2, 4], range(8)], ids=["few", "all"])
def test_partial_reads_of_the_kernel_are_combined(make, monkeypatch, rows):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, at: real(d, [buffers[0][:10]], at))
    feature = make(8).feature()
    np.testing.assert_array_equal(feature.read(rows), cells_of(rows))


@pytest.mark.parametrize(("code", "times", "ends"), [("EIO", 9, True), ("ESTALE", 1, False)])
def test_a_failing_disk_is_named_and_a_stale_file_is_opened_again(
    make, monkeypatch, code, times, ends
):
    stored = make(8)
    feature, real, left = stored.feature(), os.preadv, times
    feature.read([1])

    def failing(descriptor, buffers, start):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(getattr(errno, code), code)
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", failing)
    if ends:
        with pytest.raises(Damaged, match=f"near row 1 .*{code}"):
            feature.read([1])
    else:
        np.testing.assert_array_equal(feature.read([1]), cells_of([1]))


@pytest.mark.parametrize("dtype", STORED)
def test_a_passed_buffer_is_filled_and_returned(make, dtype):
    import torch

    stored = make(20, dtype=dtype)
    feature, rows = stored.feature(), [3, 17, 3]
    whole = stored.whole()
    kept = torch.zeros((5, *CELL), dtype=torch.float16 if dtype == "float16" else torch.float32)
    for _ in range(2):
        view = kept[1:4].numpy()
        assert feature.read(rows, out=view) is view
        assert kept[1:4].numpy().tobytes() == numbers(whole[rows], dtype).tobytes()
        assert not kept[[0, 4]].any()
        kept[:] = 0
    if dtype == "bfloat16":
        bits = torch.zeros((3, *CELL), dtype=torch.uint16)
        feature.read(rows, out=bits.numpy())
        assert torch.equal(bits.view(torch.bfloat16).float(), torch.tensor(feature.read(rows)))


def test_a_buffer_that_does_not_fit_is_refused_with_both_shapes(make):
    feature = make(8).feature()
    fitting = r"rows take a writeable, C-contiguous numpy array \(2, 4, 6\) of float16"
    for wrong, named in [
        (np.zeros((3, 4, 6), np.float16), r"\(3, 4, 6\) float16"),
        (np.zeros((2, 4, 6), np.float32), r"\(2, 4, 6\) float32"),
        (np.zeros((2, 6, 4), np.float16).swapaxes(1, 2), "in another layout"),
        (np.frombuffer(bytes(96), np.float16).reshape(2, 4, 6), "read-only"),
        ([0.0], "list"),
    ]:
        with pytest.raises(ValueError, match=f"{named}.*{fitting}"):
            feature.read([0, 1], out=wrong)
    with pytest.raises(ValueError, match="of float32 or uint16"):
        make(8, name="b", dtype="bfloat16").feature().read([0], np.zeros(3))


def test_several_threads_copy_large_cells_and_report_damage(make, monkeypatch):
    monkeypatch.setattr(shard_reader, "THREAD_BYTES", 100)
    monkeypatch.setattr(shard_reader, "SMALL_BYTES", 0)
    monkeypatch.setattr(shard_reader, "_idle_cores", lambda: 7)
    stored = make(40)
    feature, names = stored.feature(), set()
    feature._reader.threads = 3
    real = os.preadv

    def slow(*arguments):
        names.add(threading.current_thread().name)
        time.sleep(0.0005)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    rows = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(feature.read(rows), cells_of(rows))
    assert len(names) == 3
    for module, name, answer in [
        (multiprocessing, "parent_process", "a loader's worker has one"),
        (shard_reader, "_idle_cores", 0),
    ]:
        names.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda answer=answer: answer)
            feature.read(rows)
        assert len(names) == 1
    spoil(stored, "a cell")
    with pytest.raises(Damaged, match="near row 2 "):
        feature.read(rows)


def test_threads_read_whole_cells_while_a_builder_replaces_shards(make):
    stored = make(24)
    files = [stored.shard(number) for number in range(3)]
    versions = [[file.read_bytes() for file in files]]
    stored.write(np.arange(24), 24, salt=1)
    versions.append([file.read_bytes() for file in files])
    feature, ends, wrong = stored.feature(), time.monotonic() + 1, []

    def hammer(seed):
        rng, out = np.random.default_rng(seed), np.zeros((64, *CELL), np.float16)
        while time.monotonic() < ends:
            rows = rng.integers(0, 24, int(rng.integers(1, 64)))
            try:
                result = feature.read(rows, out[: len(rows)]).reshape(len(rows), -1)
            except Exception as error:
                wrong.append(repr(error))
                return
            salt = result - 2 * rows[:, None]
            if not ((salt == salt[:, :1]).all() and np.isin(salt, (0, 1)).all()):
                wrong.append(rows)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    replaced = 0
    while time.monotonic() < ends:
        replaced += 1
        for file, data in zip(files, versions[replaced % 2], strict=True):
            file.with_name("new").write_bytes(data)
            file.with_name("new").replace(file)
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert not wrong
    assert replaced > 10
    np.testing.assert_array_equal(feature.read([20, 4]), cells_of([20, 4], salt=replaced % 2))


@FORKS
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_cells(make, method):
    stored = make(40)
    feature = stored.feature()
    batches = [np.random.default_rng(i).integers(0, 40, 20) for i in range(20)]
    feature.read([1, 30])
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map(feature.read, batches)
        for rows, cells in zip(batches, results, strict=True):
            np.testing.assert_array_equal(cells, cells_of(rows))
        np.testing.assert_array_equal(feature.read([39, 5]), cells_of([39, 5]))


@FORKS
@pytest.mark.parametrize(
    ("method", "kind"), [("fork", "plain"), ("fork", "compressed"), ("spawn", "plain")]
)
def test_a_data_loader_with_workers_returns_every_clip(make, method, kind):
    import torch

    stored = make(40)
    if kind == "compressed":
        stored.rewrite(**OTHERS["compressed"])
    feature = stored.feature()
    feature.read([1, 30])
    loader = torch.utils.data.DataLoader(
        feature.dataset(), batch_size=7, num_workers=2, multiprocessing_context=method
    )
    result = torch.cat([cells for cells, _ in loader]).numpy()
    np.testing.assert_array_equal(result, cells_of(range(40)))


def test_a_pickled_feature_has_no_descriptor(make):
    feature = make(8).feature()
    feature.read([1])
    copy = pickle.loads(pickle.dumps(feature))
    assert "_reader" not in copy.__dict__
    np.testing.assert_array_equal(copy.read([7, 1]), cells_of([7, 1]))
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(feature._reader)


def test_many_shards_need_few_descriptors(make, monkeypatch):
    monkeypatch.setattr(columns, "MAX_SHARD_CLIPS", 1)
    monkeypatch.setattr("varve.stores.atomic.write", lambda store, target, data: (
        target.parent.mkdir(parents=True, exist_ok=True), target.write_bytes(data)))  # fmt: skip
    stored = make(120)
    feature = stored.feature()
    feature.valid  # noqa: B018
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (open_before + shard_reader.OPEN_FILES + 8, limit[1])
    )
    try:
        for seed in range(4):
            monkeypatch.setattr(shard_reader, "NEAR_ROWS", 4 if seed % 2 else 0)
            rows = np.random.default_rng(seed).permutation(120)
            np.testing.assert_array_equal(feature.read(rows), cells_of(rows))
            np.testing.assert_array_equal(feature.read(rows[:9]), cells_of(rows[:9]))
        np.testing.assert_array_equal(feature.read(), cells_of(range(120)))
        # Without free descriptors the reader closes its own.
        others = []
        with contextlib.suppress(OSError):
            while True:
                others.append(os.open(os.devnull, os.O_RDONLY))
        np.testing.assert_array_equal(feature.read([5, 110]), cells_of([5, 110]))
        for descriptor in others:
            os.close(descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(os.listdir("/proc/self/fd")) <= open_before + shard_reader.OPEN_FILES
    del feature
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= open_before


def test_no_cell_is_kept_in_memory(make, monkeypatch):
    stored = make(64)
    feature, real, read = stored.feature(), os.preadv, []
    rows = np.arange(0, 64, 5)
    feature.read(rows)

    def counting(descriptor, buffers, start):
        count = real(descriptor, buffers, start)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    for _ in range(9):
        read.clear()
        np.testing.assert_array_equal(feature.read(rows), cells_of(rows))
        assert sum(read) >= len(rows) * 48
