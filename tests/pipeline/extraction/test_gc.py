"""Garbage collection of changed networks: what an update references, what is removed, and when."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from varve import BuildSpec, Runtime, build, update
from varve.pipeline.cli import store_commands
from varve.pipeline.extraction.verify import verify
from varve.stores import FeatureStore, lock, references

SERIAL = Runtime(serial=True)
NETWORK = "resnet18:random-0"
SPEC = BuildSpec((NETWORK,), ("layer4.0", "pool"), frames=2, dtype="float32")

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(("grow", "shrink"), 1)


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def built(videos, built_once) -> Path:
    return built_once(videos, SPEC)


@pytest.fixture
def store(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "s.zarr"))


@pytest.fixture(scope="module")
def trained(resnet):
    """Return a function that returns the network as trained on a number of tasks."""

    def after(tasks):
        backbone = resnet.unfreeze("layer4.1")
        with torch.no_grad():
            backbone.stage("layer4.1").module.conv1.weight.mul_(1 + tasks / 8)
        return backbone

    return after


def features(store: Path) -> dict[str, bytes]:
    root = store / "features"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def referenced(store: Path) -> set[str]:
    return {fingerprint for r in references.read_all(store) for fingerprint in r.fingerprints}


def test_the_previous_model_stays_readable_while_a_run_needs_it(built, store, run, trained):
    keep = ("layer4.1:pool", "pool")
    first = update(store, trained(1), keep, holder=run).fingerprints
    second = update(store, trained(2), keep).fingerprints
    assert referenced(store) == set(first.values())
    report = FeatureStore.open(store).gc()
    assert {column.fingerprint for column in report.freed} == set(second.values())
    assert {column.fingerprint for column in report.kept} == set(first.values())
    opened = FeatureStore.open(store)
    old = opened.feature(NETWORK, "pool", fingerprint=first["pool"])
    assert np.isfinite(old.read()).all()
    assert not np.array_equal(old.read(), opened.feature(NETWORK, "pool").read())
    update(store, trained(3), keep, holder=run)
    assert len(referenced(store)) == 4
    shutil.rmtree(run)
    assert len(FeatureStore.open(store).gc().freed) == 4
    assert features(store) == features(built)


def test_removed_columns_are_computed_again_with_the_same_bytes(store, run, trained):
    update(store, trained(1), ("pool",), holder=run)
    before = features(store)
    opened = FeatureStore.open(store)
    opened.remove_reference(run)
    opened.gc()
    report = update(store, trained(1), ("pool",), holder=run)
    assert (report.computed, report.decoded) == (2, 0)
    assert features(store) == before


def test_columns_are_referenced_before_they_are_computed(store, run, trained, monkeypatch):
    def died(*arguments):
        assert len(referenced(store)) == 1
        with pytest.raises(lock.StoreLocked):
            FeatureStore.open(store).gc()
        raise KeyboardInterrupt

    monkeypatch.setattr("varve.pipeline.extraction.update.run_plan", died)
    with pytest.raises(KeyboardInterrupt):
        update(store, trained(1), ("pool",), holder=run)
    assert len(referenced(store)) == 1


def test_every_view_is_referenced(videos, tmp_path, run, trained):
    store = tmp_path / "views.zarr"
    spec = BuildSpec((NETWORK,), ("layer4.0",), frames=2, views=2, flip=True, dtype="float32")
    build(videos, store, spec, runtime=SERIAL)
    fingerprints = update(store, trained(1), ("pool",), holder=run).fingerprints
    assert referenced(store) == {fingerprints["pool", 0], fingerprints["pool", 1]}
    assert len(referenced(store)) == 2


def test_an_update_with_nothing_to_compute_references_its_columns_too(store, run, trained):
    update(store, trained(1), ("pool",))
    assert update(store, trained(1), ("pool",), holder=run).computed == 0
    assert len(referenced(store)) == 1


def test_an_update_for_a_missing_run_folder_computes_nothing(store, tmp_path, trained):
    before = features(store)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        update(store, trained(1), ("pool",), holder=tmp_path / "nowhere")
    assert features(store) == before


class Killed(BaseException):
    """Simulates a kill: no handler catches it."""


def test_a_store_whose_collection_was_killed_opens_verifies_and_builds(
    built, videos, store, run, tmp_path, trained, monkeypatch
):
    """The kill is at each rename, by which a column is removed."""
    drop = FeatureStore.open(store).feature(NETWORK, "pool").fingerprint
    update(store, trained(1), ("layer4.1:pool", "pool"))
    real = os.rename
    for moment in itertools.count():
        copy = Path(shutil.copytree(store, tmp_path / f"{moment}.zarr"))
        left = moment

        def dying(*arguments):
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            real(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "rename", dying)
            FeatureStore.open(copy).gc(drop=[drop])
            break
        result = verify(copy, sample=0)
        assert result.findings == [], moment
        store_commands.info(copy)
        # A build repairs the column of the unchanged network. An update repairs a changed network's
        # column, or it is removed.
        if moment % 3 == 0:
            update(copy, trained(1), ("layer4.1:pool", "pool"))
        assert build(videos, copy, SPEC, runtime=SERIAL).clips == {"ready": 2}
        FeatureStore.open(copy).gc()
        assert features(copy) == features(built), moment
    assert moment > 12


def test_the_command_lists_what_it_would_remove_and_then_removes_it(store, run, trained, varve):
    removed = update(store, trained(1), ("layer4.1:pool",)).fingerprints["layer4.1:pool"]
    kept = update(store, trained(2), ("pool",), holder=run).fingerprints["pool"]
    before = features(store)
    done = varve("gc", store, "--dry-run")
    assert (done.returncode, features(store)) == (0, before)
    first, second, last = done.stdout.splitlines()
    assert first.startswith("would free ")
    assert removed[:16] in first
    assert "a method changed layer4.1" in first
    assert second.startswith("keeps ")
    assert second.endswith(f"{kept[:16]}: needed by {run}")
    assert last.startswith("would free ")
    assert last.endswith(" in 1 column")
    done = varve("gc", store, "--json")
    printed = json.loads(done.stdout)
    freed = before.keys() - features(store).keys()
    assert done.returncode == 0
    assert [column["fingerprint"] for column in printed["freed"]] == [removed]
    assert [column["holders"] for column in printed["kept"]] == [[str(run)]]
    sizes = [len(before[name]) for name in freed if removed[:16] in name]
    assert printed["freed_bytes"] == sum(sizes)
    assert varve("gc", store).stdout.splitlines()[-1] == "nothing is to be freed"
    shutil.rmtree(run)
    done = varve("gc", store)
    assert f"forgot the run folder {run}" in done.stdout
    assert f"its run folder {run} no longer exists" in done.stdout


def test_the_command_refuses_with_a_sentence(store, run, trained, varve):
    kept = update(store, trained(1), ("pool",), holder=run).fingerprints["pool"]
    before = features(store)
    for options, message in (
        (["--drop", kept[:8]], "delete that folder or remove its reference"),
        (["--drop", "123"], "too short"),
        (["--drop", "0123456789"], "begins with"),
    ):
        done = varve("gc", store, *options)
        assert done.returncode == 2
        assert message in done.stderr
    with lock.locked(store):
        done = varve("gc", store)
        assert (done.returncode, f"process {os.getpid()}" in done.stderr) == (2, True)
        assert varve("gc", store, "--dry-run").returncode == 0
    assert features(store) == before
    unchanged = FeatureStore.open(store).feature(NETWORK, "pool").fingerprint
    done = varve("gc", store, "--drop", unchanged[:8])
    assert (done.returncode, "named to be dropped" in done.stdout) == (0, True)
