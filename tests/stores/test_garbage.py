"""Columns that a garbage collection removes, those that it keeps, and what a kill leaves."""

import contextlib
import itertools
import json
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from varve.stores import Damaged, FeatureStore, atomic, clips, garbage, lock, references, staging
from varve.stores.columns import Column, ColumnSpec, group_json, node_name

CELL = (2, 8192)
OWN, ALONE, NEEDED, OTHER = ("ab" * 32, "e1" * 32, "e2" * 32, "e3" * 32)


def add(store, fingerprint, backbone="net:tag", feature="blocks.0:cls", grafts=("blocks.0",)):
    """Add a column of a network that a method has changed, with one staged block."""
    attributes = {"frames": {"frames": 2, "view": 0}}
    attributes |= {"grafts": list(grafts)} if grafts else {}
    spec = ColumnSpec(backbone, feature, fingerprint, CELL, "float16", attributes)
    column = Column(store.path, spec)
    column.create(3)
    keys = clips.row_keys(store.clips)[:2]
    cells = np.ones((2, *CELL), np.float16)
    column.write_shard(0, np.arange(2), cells, keys, 3)
    if grafts:
        staging.put(
            store.path, spec.relative_path, staging.StagedBlock(np.arange(1), keys[:1], cells[:1])
        )


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A store with two columns of the unchanged network."""
    opened = FeatureStore.create(tmp_path_factory.mktemp("plain") / "s.zarr")
    rows = [clips.blank(f"{i}.mp4", "wave", "") | {"digest": f"{i}" * 64} for i in range(3)]
    clips.write(opened.path, pd.DataFrame(rows).astype(clips.COLUMNS).rename_axis(index="row"))
    for fingerprint in (OWN, "cd" * 32):
        add(opened, fingerprint, grafts=())
    return opened.path


@pytest.fixture(scope="session")
def grown(plain, tmp_path_factory) -> Path:
    """The same store with three columns of changed networks, one alone in its groups."""
    opened = FeatureStore(tmp_path_factory.mktemp("grown") / "s.zarr", {})
    shutil.copytree(plain, opened.path)
    add(opened, ALONE)
    add(opened, NEEDED)
    add(opened, OTHER, "hf-hub:a/b", "blocks.1")
    return opened.path


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    return tmp_path / "runs" / "one"


@pytest.fixture
def changed(grown, run, tmp_path):
    """The same store, where a run folder needs one of the three columns."""
    shutil.copytree(grown, tmp_path / "s.zarr")
    opened = FeatureStore.open(tmp_path / "s.zarr")
    opened.add_reference(run, [NEEDED])
    return opened


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def state(store: Path) -> dict[str, tuple]:
    """Return the state of all files below a folder, times included."""
    return {
        str(p.relative_to(store)): (p.stat().st_mtime_ns, p.stat().st_ino, p.is_file())
        for p in [store, *store.rglob("*")]
    }


def short_names(store) -> set[str]:
    return {path.name for _, _, path in store.columns()}


def test_columns_of_changed_networks_are_removed_unless_a_run_folder_needs_them(changed, run):
    before = {p: p.stat().st_size for p in changed.path.rglob("*") if p.is_file()}
    report = changed.gc()
    assert [(c.backbone, c.feature, c.fingerprint) for c in report.freed] == [
        ("hf-hub:a/b", "blocks.1", OTHER),
        ("net:tag", "blocks.0:cls", ALONE),
    ]
    assert "a method changed blocks.0" in report.freed[1].why
    assert [(c.fingerprint, c.holders) for c in report.kept] == [(NEEDED, (str(run),))]
    assert short_names(changed) == {"ab" * 8, "cd" * 8, NEEDED[:16]}
    for column in report.freed:
        sizes = [s for p, s in before.items() if column.fingerprint[:16] in str(p)]
        assert column.size_bytes == sum(sizes) > 0
        assert not list(changed.path.rglob(f"*{column.fingerprint[:16]}*"))
    assert report.freed_bytes == sum(c.size_bytes for c in report.freed)
    assert not (changed.path / "features" / node_name("hf-hub:a/b")).exists()
    assert not (changed.path / atomic.TEMPORARY).exists()
    np.testing.assert_array_equal(
        changed.feature("net:tag", "blocks.0:cls", fingerprint="e2").read([1]), np.ones((1, *CELL))
    )
    assert len(staging.files(changed.path, f"net:tag/blocks.0:cls/{NEEDED[:16]}")) == 1
    again = changed.gc()
    assert (again.freed, again.freed_bytes, len(again.kept)) == ((), 0, 1)


def test_the_rest_has_the_bytes_of_a_store_that_never_had_the_columns(plain, changed, run):
    changed.remove_reference(run)
    changed.gc()
    after = files(changed.path)
    assert after.keys() - files(plain).keys() == {".lock", "references/.lock"}
    assert {name: after[name] for name in files(plain)} == files(plain)


def test_a_deleted_run_folder_needs_nothing(changed, run):
    shutil.rmtree(run)
    assert [r.holder_exists for r in references.read_all(changed.path)] == [False]
    report = changed.gc()
    assert report.missing_holders == (str(run),)
    assert str(run) in next(c.why for c in report.freed if c.fingerprint == NEEDED)
    assert short_names(changed) == {"ab" * 8, "cd" * 8}
    assert references.read_all(changed.path) == []
    assert changed.gc().missing_holders == ()


def test_a_run_folder_that_cannot_be_read_still_counts(changed, run, monkeypatch):
    real = os.stat

    def stat(path, **options):
        if str(path) == str(run):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert NEEDED[:16] in short_names(changed)
    assert [c.holders for c in changed.gc().kept] == [(str(run),)]


def test_references_add_up_until_they_are_removed(changed, run, tmp_path, monkeypatch):
    changed.add_reference(run, [ALONE, NEEDED])
    (reference,) = references.read_all(changed.path)
    assert (reference.holder, reference.fingerprints) == (run, (ALONE, NEEDED))
    # Another spelling of the path is the same holder.
    monkeypatch.chdir(run)
    (tmp_path / "link").symlink_to(run)
    for name in (".", "../one", tmp_path / "link"):
        changed.add_reference(name, [OTHER[:16]])
    (reference,) = references.read_all(changed.path)
    assert reference.fingerprints == (ALONE, NEEDED, OTHER[:16])
    assert reference.file.name == f"{reference.file.stem}.json"
    assert changed.gc().freed == ()
    changed.remove_reference(run)
    changed.remove_reference(run)
    assert len(changed.gc().freed) == 3


def test_a_column_that_two_runs_need_is_kept_for_either(changed, run, tmp_path):
    other = tmp_path / "runs" / "two"
    other.mkdir()
    changed.add_reference(other, [NEEDED, ALONE])
    shutil.rmtree(run)
    report = changed.gc()
    assert [(c.fingerprint, c.holders) for c in report.kept] == [
        (ALONE, (str(other),)), (NEEDED, (str(other),))
    ]  # fmt: skip
    assert report.missing_holders == (str(run),)


@pytest.mark.parametrize("wrong", ["e1", "E1" * 32, "e1" * 33, ""])
def test_a_reference_to_no_fingerprint_is_refused(changed, run, wrong):
    with pytest.raises(ValueError, match="names no column"):
        changed.add_reference(run, [NEEDED, wrong])


def test_a_reference_of_a_missing_folder_is_refused(changed, run):
    with pytest.raises(ValueError, match="two is no folder"):
        changed.add_reference(run.parent / "two", [ALONE])
    assert len(references.read_all(changed.path)) == 1


def test_a_dry_run_reports_the_same_and_changes_nothing(changed, run, monkeypatch):
    """It needs neither the permission to write nor the lock."""
    shutil.rmtree(run)
    (changed.path / "references" / references.LOCK).unlink()

    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    before = state(changed.path)
    with monkeypatch.context() as patch:
        for call in ("open", "rename", "replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, call, forbidden)
        patch.setattr(lock, "locked", forbidden)
        dry = changed.gc(dry_run=True)
        with pytest.raises(PermissionError):
            changed.gc()
    assert state(changed.path) == before
    assert dry.dry_run
    report = changed.gc()
    assert not report.dry_run
    assert (dry.freed, dry.kept, dry.missing_holders) == (
        report.freed,
        report.kept,
        report.missing_holders,
    )
    assert len(dry.freed) == 3


def test_a_column_of_the_unchanged_network_is_removed_by_name(changed):
    report = changed.gc(drop=["ababab"])
    assert [c.why for c in report.freed if c.fingerprint == OWN] == ["named to be dropped"]
    assert short_names(changed) == {"cd" * 8, NEEDED[:16]}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (["ababa"], "too short to name a column: give 6 digits"),
        (["abcdef"], r"no column's fingerprint begins with 'abcdef'(?s:.*)net:tag blocks.0:cls ab"),
        (["cdcdcd", "e2e2e2"], "e2e2.* is needed by the run folder .*one: delete that folder"),
        (["f0f0f0"], "2 begin with 'f0f0f0': give more, or BACKBONE/FEATURE/DIGITS"),
        (["net:tag/blocks.0:cls/"], "too short"),
    ],
)
def test_an_ambiguous_name_removes_nothing(changed, drop, message, dry_run):
    for backbone in ("net:twin", "net:tag"):  # equal weights under two names are one computation
        add(changed, "f0" * 32, backbone, grafts=())
    before = files(changed.path / "features")
    with pytest.raises(ValueError, match=message):
        changed.gc(dry_run, drop)
    assert files(changed.path / "features") == before
    report = changed.gc(drop=["net:twin/blocks.0:cls/f0f0f0"])
    assert "net:twin" in [c.backbone for c in report.freed]
    assert "f0" * 8 in short_names(changed)


def test_a_column_with_damaged_metadata_is_removed_only_by_name(changed):
    file = changed.path / "features/net:tag/blocks.0:cls" / ALONE[:16] / "zarr.json"
    file.write_text("{")
    kept = {c.fingerprint: c for c in changed.gc().kept}
    assert "damaged" in kept[ALONE[:16]].why
    assert ALONE[:16] in short_names(changed)
    changed.gc(drop=[ALONE[:8]])
    assert ALONE[:16] not in short_names(changed)


DAMAGE = {
    "cut off": lambda text: text[: len(text) // 2],
    "emptied": lambda text: "",
    "another folder": lambda text: text.replace("runs/one", "runs/two"),
    "no fingerprints": lambda text: json.dumps({"holder": json.loads(text)["holder"]}),
    "other things": lambda text: text.replace(NEEDED, "everything"),
    "a word": lambda text: json.dumps(json.loads(text) | {"fingerprints": ""}),
    "a list": lambda text: "[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_reference_is_named_and_nothing_is_removed(changed, run, damage):
    (reference,) = references.read_all(changed.path)
    reference.file.write_text(DAMAGE[damage](reference.file.read_text()))
    before = files(changed.path)
    for call in (
        changed.gc,
        lambda: changed.gc(dry_run=True),
        lambda: changed.add_reference(run, [ALONE]),
    ):
        with pytest.raises(Damaged, match=f"{reference.file.name} is damaged"):
            call()
    after = files(changed.path)
    del after[".lock"]  # it names the process that failed
    assert after == before


def test_another_writer_is_named_and_nothing_is_removed(changed):
    before = short_names(changed)
    with lock.locked(changed.path), pytest.raises(lock.StoreLocked, match=f"process {os.getpid()}"):
        changed.gc()
    assert short_names(changed) == before


def test_a_new_reference_waits_while_columns_are_removed(changed, run, monkeypatch):
    """A collection that began earlier cannot remove the columns of a completed reference."""
    thread = threading.Thread(target=changed.add_reference, args=(run, [ALONE]))
    seen = []

    def watching(store, column, real=garbage._remove):
        if not seen:
            thread.start()
            time.sleep(0.2)
        seen.append(thread.is_alive())
        real(store, column)

    monkeypatch.setattr("varve.stores.garbage._remove", watching)
    changed.gc()
    thread.join()
    assert seen == [True, True]
    assert ALONE in references.read_all(changed.path)[0].fingerprints


def test_the_first_reference_of_a_store_lasts_through_a_power_cut(plain, tmp_path, monkeypatch):
    store, flushed = FeatureStore(tmp_path / "s.zarr", {}), []
    shutil.copytree(plain, store.path)
    shutil.rmtree(store.path / "references", ignore_errors=True)
    (tmp_path / "run").mkdir()
    real = atomic.sync_folder
    monkeypatch.setattr(atomic, "sync_folder", lambda f: (flushed.append(f), real(f)))
    store.add_reference(tmp_path / "run", [ALONE])
    assert {store.path, store.path / "references"} <= set(flushed)


def test_a_reference_survives_a_builder_that_empties_its_temporary_files(changed, run, monkeypatch):
    real = os.fsync

    def emptied(descriptor):
        atomic.clear_temporary(changed.path)
        real(descriptor)

    killed = changed.path / "references" / atomic.TEMPORARY / "left by a kill"
    atomic.write(changed.path / "references", killed, b"half")
    monkeypatch.setattr("varve.stores.atomic.os.fsync", emptied)
    changed.add_reference(run, [ALONE])
    assert ALONE in references.read_all(changed.path)[0].fingerprints
    assert not killed.exists()


class Killed(BaseException):
    """Simulates a kill: no handler catches it."""


STEPS = ("rename", "unlink", "rmdir")


def test_a_kill_at_any_step_leaves_whole_columns_and_the_next_collection_completes(
    changed, run, tmp_path, monkeypatch
):
    shutil.rmtree(run)
    FeatureStore.open(shutil.copytree(changed.path, tmp_path / "end.zarr")).gc(drop=[OWN[:8]])
    end = files(tmp_path / "end.zarr")
    left = 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            real(*arguments, **options)

        return call

    for moment in itertools.count():
        store = FeatureStore.open(shutil.copytree(changed.path, tmp_path / f"{moment}.zarr"))
        left = moment
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in STEPS:
                patch.setattr(os, name, dying(getattr(os, name)))
            store.gc(drop=[OWN[:8]])
            break
        sound(store.path)
        named = [OWN[:8]] if OWN[:16] in short_names(store) else []
        store.gc(drop=named)
        assert files(store.path) == end, moment
    assert moment > 25


def sound(store: Path) -> None:
    """Check that readers, builders and `verify` can use the store."""
    for feature in FeatureStore.open(store).features():
        valid = np.flatnonzero(feature.valid)
        assert len(feature.read(valid)) in (0, 2)
        spec = ColumnSpec(feature.backbone, feature.name, feature.fingerprint, CELL, "float16", {})
        assert Column(store, spec).done(3).any(axis=1).sum() == len(valid)
    for marks in store.glob("features/*/*/*.done"):
        assert marks.with_suffix("").joinpath("zarr.json").exists()


def test_references_do_not_disturb_readers(changed):
    """Other libraries and the store list the same nodes as before."""
    assert len(changed.features()) == 5
    assert FeatureStore.create(changed.path).path == changed.path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table of clips is no Zarr node either
        walked = dict(zarr.open_group(str(changed.path), mode="r").members(max_depth=None))
    assert not [name for name in walked if "references" in name]
    assert sum(name.endswith(NEEDED[:16]) for name in walked) == 1
    assert (changed.path / "features" / "zarr.json").read_bytes() == group_json({})
