"""Garbage collection of networks that methods change: what an update holds, what goes, and when."""

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
    """The network as training leaves it after so many tasks."""

    def after(tasks):
        backbone = resnet.unfreeze("layer4.1")
        with torch.no_grad():
            backbone.stage("layer4.1").module.conv1.weight.mul_(1 + tasks / 8)
        return backbone

    return after


def features(store: Path) -> dict[str, bytes]:
    root = store / "features"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def held(store: Path) -> set[str]:
    return {fingerprint for r in references.read_all(store) for fingerprint in r.fingerprints}


def test_the_model_before_stays_readable_while_a_run_needs_it(built, store, run, trained):
    keep = ("layer4.1:pool", "pool")
    first = update(store, trained(1), keep, holder=run).fingerprints
    second = update(store, trained(2), keep).fingerprints
    assert held(store) == set(first.values())
    report = FeatureStore.open(store).gc()
    assert {column.fingerprint for column in report.freed} == set(second.values())
    assert {column.fingerprint for column in report.kept} == set(first.values())
    opened = FeatureStore.open(store)
    old = opened.feature(NETWORK, "pool", fingerprint=first["pool"])
    assert np.isfinite(old.read()).all()
    assert not np.array_equal(old.read(), opened.feature(NETWORK, "pool").read())
    update(store, trained(3), keep, holder=run)
    assert len(held(store)) == 4
    shutil.rmtree(run)
    assert len(FeatureStore.open(store).gc().freed) == 4
    assert features(store) == features(built)


def test_what_was_freed_comes_back_the_same_from_the_same_ancestor(store, run, trained):
    update(store, trained(1), ("pool",), holder=run)
    before = features(store)
    opened = FeatureStore.open(store)
    opened.remove_reference(run)
    opened.gc()
    report = update(store, trained(1), ("pool",), holder=run)
    assert (report.computed, report.decoded) == (2, 0)
    assert features(store) == before


def test_columns_are_held_before_anything_is_computed(store, run, trained, monkeypatch):
    def died(*arguments):
        assert len(held(store)) == 1
        with pytest.raises(lock.StoreLocked):
            FeatureStore.open(store).gc()
        raise KeyboardInterrupt

    monkeypatch.setattr("varve.pipeline.extraction.update.carry_out", died)
    with pytest.raises(KeyboardInterrupt):
        update(store, trained(1), ("pool",), holder=run)
    assert len(held(store)) == 1


def test_every_view_is_held(videos, tmp_path, run, trained):
    store = tmp_path / "views.zarr"
    spec = BuildSpec((NETWORK,), ("layer4.0",), frames=2, views=2, flip=True, dtype="float32")
    build(videos, store, spec, runtime=SERIAL)
    found = update(store, trained(1), ("pool",), holder=run).fingerprints
    assert held(store) == {found["pool", 0], found["pool", 1]}
    assert len(held(store)) == 2


def test_an_update_that_found_everything_there_holds_it_too(store, run, trained):
    update(store, trained(1), ("pool",))
    assert update(store, trained(1), ("pool",), holder=run).computed == 0
    assert len(held(store)) == 1


def test_nothing_is_begun_for_a_run_folder_that_is_not_there(store, tmp_path, trained):
    before = features(store)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        update(store, trained(1), ("pool",), holder=tmp_path / "nowhere")
    assert features(store) == before


class Killed(BaseException):
    """Stands for a kill: nothing catches it on the way."""


def test_a_store_whose_collection_was_killed_opens_verifies_and_builds(
    built, videos, store, run, tmp_path, trained, monkeypatch
):
    """At each rename: that is how a column leaves."""
    drop = FeatureStore.open(store).feature(NETWORK, "pool").fingerprint
    update(store, trained(1), ("layer4.1:pool", "pool"))
    real = os.rename
    for moment in itertools.count():
        mine = Path(shutil.copytree(store, tmp_path / f"{moment}.zarr"))
        left = moment

        def dying(*arguments):
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            real(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "rename", dying)
            FeatureStore.open(mine).gc(drop=[drop])
            break
        result = verify(mine, sample=0)
        assert result.findings == [], moment
        store_commands.info(mine)
        # The network's own column is mended by a build; a method's by its update, or it goes.
        if moment % 3 == 0:
            update(mine, trained(1), ("layer4.1:pool", "pool"))
        assert build(videos, mine, SPEC, runtime=SERIAL).clips == {"ready": 2}
        FeatureStore.open(mine).gc()
        assert features(mine) == features(built), moment
    assert moment > 12


def test_the_command_says_what_it_would_free_and_then_frees_it(store, run, trained, varve):
    made = update(store, trained(1), ("layer4.1:pool",)).fingerprints["layer4.1:pool"]
    kept = update(store, trained(2), ("pool",), holder=run).fingerprints["pool"]
    before = features(store)
    done = varve("gc", store, "--dry-run")
    assert (done.returncode, features(store)) == (0, before)
    first, second, last = done.stdout.splitlines()
    assert first.startswith("would free ")
    assert made[:16] in first
    assert "a method changed layer4.1" in first
    assert second.startswith("keeps ")
    assert second.endswith(f"{kept[:16]}: needed by {run}")
    assert last.startswith("would free ")
    assert last.endswith(" in 1 column")
    done = varve("gc", store, "--json")
    told = json.loads(done.stdout)
    freed = before.keys() - features(store).keys()
    assert done.returncode == 0
    assert [column["fingerprint"] for column in told["freed"]] == [made]
    assert [column["holders"] for column in told["kept"]] == [[str(run)]]
    sizes = [len(before[name]) for name in freed if made[:16] in name]
    assert told["freed_bytes"] == sum(sizes)
    assert varve("gc", store).stdout.splitlines()[-1] == "nothing is to be freed"
    shutil.rmtree(run)
    done = varve("gc", store)
    assert f"forgot the run folder {run}" in done.stdout
    assert f"its run folder {run} no longer exists" in done.stdout


def test_the_command_refuses_with_a_sentence(store, run, trained, varve):
    kept = update(store, trained(1), ("pool",), holder=run).fingerprints["pool"]
    before = features(store)
    for options, said in (
        (["--drop", kept[:8]], "delete that folder or release it"),
        (["--drop", "123"], "too short"),
        (["--drop", "0123456789"], "begins with"),
    ):
        done = varve("gc", store, *options)
        assert done.returncode == 2
        assert said in done.stderr
    with lock.locked(store):
        done = varve("gc", store)
        assert (done.returncode, f"process {os.getpid()}" in done.stderr) == (2, True)
        assert varve("gc", store, "--dry-run").returncode == 0
    assert features(store) == before
    own = FeatureStore.open(store).feature(NETWORK, "pool").fingerprint
    done = varve("gc", store, "--drop", own[:8])
    assert (done.returncode, "named to be dropped" in done.stdout) == (0, True)
