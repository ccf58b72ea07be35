"""Stores and data sets that were damaged or changed in odd ways, and what the next build makes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torchvision
from PIL import Image

from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.extraction.build import build
from varve.pipeline.extraction.verify import verify
from varve.stores import FeatureStore, atomic, clips

SERIAL = Runtime(serial=True)
SPEC = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=2)

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


class Killed(BaseException):
    """Stands for a kill: nothing catches it on the way."""


@pytest.fixture
def videos(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset(("grow", "shrink"), 3), tmp_path / "set"))


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "s.zarr"


@pytest.fixture(scope="module")
def undisturbed(dataset, built_once) -> Path:
    return built_once(dataset(("grow", "shrink"), 3), SPEC)


@pytest.fixture
def built(undisturbed, store) -> Path:
    return Path(shutil.copytree(undisturbed, store))


def killed_before_the_shard(videos, store, spec, monkeypatch) -> None:
    """A build that ends when everything is staged and nothing is in place."""
    real = atomic.write

    def dying(where, target, *pieces):
        if "/c/" in target.as_posix():
            raise Killed
        real(where, target, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", dying)
        with pytest.raises(Killed):
            build(videos, store, spec, runtime=SERIAL)


def features(store: Path) -> dict[str, bytes]:
    root = store / "features"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def loud_weights(folder: Path) -> Path:
    """A ResNet whose first block leaves float16's range."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.bn2.weight"].fill_(1e7)
    safetensors.torch.save_file(state, folder / "loud.safetensors")
    return folder / "loud.safetensors"


@pytest.mark.parametrize("what", ["cells", "half the file", "facts"])
def test_damaged_staging_is_computed_again(videos, store, undisturbed, monkeypatch, what):
    killed_before_the_shard(videos, store, SPEC, monkeypatch)
    pattern = "*.json" if what == "facts" else "*.npz"
    (file,) = (store / ".staging").rglob(pattern)
    data = bytearray(file.read_bytes())
    if what == "cells":
        data[len(data) // 2] ^= 1
    else:
        data = data[: len(data) // 2]
    file.write_bytes(data)
    build(videos, store, SPEC, runtime=SERIAL)
    assert features(store) == features(undisturbed)
    assert FeatureStore.open(store).clips["num_frames"].min() > 0


def test_a_retry_after_a_kill_knows_what_was_learnt(videos, store, monkeypatch):
    killed_before_the_shard(videos, store, SPEC, monkeypatch)
    build(videos, store, SPEC, runtime=Runtime(serial=True, retry=True))
    table = FeatureStore.open(store).clips
    assert table["num_frames"].min() > 0
    assert set(table["status"]) == {"ready"}


def test_an_overflow_loses_its_cell_and_no_other(videos, store, tmp_path, monkeypatch):
    weights = loud_weights(tmp_path)
    spec = BuildSpec((f"resnet18:{weights}", "resnet18:random-0"), ("stem:pool", "layer1.0:pool"),
                     frames=2)  # fmt: skip
    killed_before_the_shard(videos, store, spec, monkeypatch)
    report = build(videos, store, spec, runtime=SERIAL)
    assert set(report.quarantined["reason"]) == {"not_finite"}
    valid = {(f.backbone, f.name): int(f.valid.sum()) for f in FeatureStore.open(store).features()}
    assert valid == {
        ("resnet18:loud", "layer1.0:pool"): 0,
        ("resnet18:loud", "stem:pool"): 6,
        ("resnet18:random-0", "stem:pool"): 6,
        ("resnet18:random-0", "layer1.0:pool"): 6,
    }
    assert build(videos, store, spec, runtime=SERIAL).decoded == 0
    narrower = BuildSpec(spec.backbones, ("stem:pool",), frames=2)
    report = build(videos, store, narrower, runtime=SERIAL)
    assert (report.decoded, len(report.quarantined)) == (0, 0)
    assert len(build(videos, store, spec, runtime=SERIAL).quarantined) == 6


def test_a_network_without_finite_values_is_named_and_no_retry_adds_to_it(videos, store, tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.bn2.weight"].fill_(3e38)
    safetensors.torch.save_file(state, tmp_path / "huge.safetensors")
    spec = BuildSpec((f"resnet18:{tmp_path}/huge.safetensors",), ("layer1.0:pool",), frames=2,
                     dtype="float32")  # fmt: skip
    first = build(videos, store, spec, runtime=SERIAL).quarantined
    assert set(first["reason"]) == {"not_finite"}
    assert "infinite or not a number in the network itself" in first["detail"].iloc[0]
    assert "--dtype" not in first["detail"].iloc[0]
    for _ in range(2):
        again = build(videos, store, spec, runtime=Runtime(serial=True, retry=True)).quarantined
        assert again["detail"].tolist() == first["detail"].tolist()


def test_two_weight_files_of_equal_content_or_equal_name_are_two_backbones(videos, store, tmp_path):
    loud = loud_weights(tmp_path)
    (tmp_path / "a").mkdir()
    twin = shutil.copy(loud, tmp_path / "a" / "twin.safetensors")
    state = torchvision.models.resnet18(weights=None).state_dict()
    safetensors.torch.save_file(state, tmp_path / "a" / "loud.safetensors")
    names = (loud, twin, tmp_path / "a" / "loud.safetensors", f"{tmp_path}/./loud.safetensors")
    spec = BuildSpec(tuple(f"resnet18:{name}" for name in names), ("stem:pool",), frames=2)
    report = build(videos, store, spec, runtime=SERIAL)
    assert (report.clips, report.decoded) == ({"ready": 6}, 6)
    stored = FeatureStore.open(store).features()
    assert sorted(f.backbone for f in stored) == ["resnet18:loud", "resnet18:loud", "resnet18:twin"]
    assert all(feature.valid.all() for feature in stored)
    result = verify(store, sample=2)
    assert (result.findings, result.equal) == ([], 6)


def test_a_folder_of_frames_is_its_frames_and_nothing_else_in_it(tmp_path, store):
    folder = tmp_path / "set" / "wave" / "clip"
    folder.mkdir(parents=True)
    for i in (1, 2, 10):
        Image.fromarray(np.full((64, 64, 3), 20 * i, np.uint8)).save(folder / f"{i}.jpg")
    spec = BuildSpec(SPEC.backbones, SPEC.keep, frames=3)
    build(tmp_path / "set", store, spec, runtime=SERIAL)
    (folder / "notes.txt").write_text("not a frame")
    assert build(tmp_path / "set", store, spec, runtime=SERIAL).decoded == 0
    (folder / "10.jpg").rename(folder / "10.jpg.bak")
    assert build(tmp_path / "set", store, spec, runtime=SERIAL).decoded == 1
    assert FeatureStore.open(store).clips.at[0, "num_frames"] == 2


def test_a_clip_that_changed_under_the_build_is_tried_again(videos, store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "varve.pipeline.extraction.extract._changed", lambda file: "clip_001" in file.path
        )
        report = build(videos, store, SPEC, runtime=SERIAL)
    assert set(report.quarantined["reason"]) == {"changed"}
    assert build(videos, store, SPEC, runtime=SERIAL).clips == {"ready": 6}


def test_a_removed_clip_is_not_learnt_from_and_no_fault_to_verify(videos, built):
    gone = FeatureStore.open(built).clips.at[1, "path"]
    (videos / gone).unlink()
    report = build(videos, built, SPEC, runtime=SERIAL)
    assert (report.decoded, report.copied, report.gone) == (0, 0, 1)
    opened = FeatureStore.open(built)
    (feature,) = opened.features()
    assert sorted(feature.dataset().rows.tolist()) == [0, 2, 3, 4, 5]
    assert verify(built, sample=7).findings == []


def test_bytes_that_went_and_came_back_are_described_again(videos, built):
    before = FeatureStore.open(built).clips
    path = videos / before.at[2, "path"]
    data = path.read_bytes()
    path.write_bytes(b"garbage")
    assert len(build(videos, built, SPEC, runtime=SERIAL).quarantined) == 1
    path.write_bytes(data)
    report = build(videos, built, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed) == (1, 0)
    after = FeatureStore.open(built).clips
    columns = [name for name in clips.COLUMNS if name != "mtime_ns"]
    assert after[columns].equals(before[columns])


@pytest.mark.parametrize("damage", ["marks", "metadata", "shard"])
def test_damage_is_named_by_verify_and_mended_by_removal(videos, built, undisturbed, damage):
    (feature,) = FeatureStore.open(built).features()
    file = {
        "marks": Path(f"{feature.path}.done", "c", "0", "0"),
        "metadata": feature.path / "zarr.json",
        "shard": feature.path / "c" / "0" / "0" / "0",
    }[damage]
    file.write_bytes(file.read_bytes()[:100])
    findings = verify(built, sample=0).findings
    assert findings
    assert all(feature.path.name in f.column + f.shard + f.problem for f in findings)
    if damage == "marks":
        shutil.rmtree(f"{feature.path}.done")
    else:
        file.unlink()
    assert build(videos, built, SPEC, runtime=SERIAL).clips == {"ready": 6}
    assert features(built) == features(undisturbed)
    assert verify(built, sample=6).findings == []
