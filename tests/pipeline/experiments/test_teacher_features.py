"""Teacher features: computed once, from cached features, and kept until the run has finished."""

import shutil
from pathlib import Path

import pytest

from varve import BuildSpec, FeatureTensors, Runtime, build, run
from varve.heads.hce import HCE
from varve.pipeline.experiments import head_inputs, teacher_features
from varve.pipeline.experiments.run_folder import Run
from varve.pipeline.experiments.teacher_features import PREFIX
from varve.stores import FeatureStore, SpecMismatch

NAME = "resnet18:random-0"
CLASSES = ("grow", "shrink", "fade in", "fade out")
QUICK = {"blocks": 1, "first_epochs": 1, "epochs": 2, "last_stride": 1}


@pytest.fixture(scope="module")
def built(dataset, built_once) -> Path:
    """A store that tests copy."""
    spec = BuildSpec((NAME,), keep=("layer4.0", "pool"), frames=2)
    return built_once(dataset(CLASSES, 3), spec)


@pytest.fixture
def store(built, tmp_path) -> FeatureStore:
    shutil.copytree(built, tmp_path / "s.zarr")
    return FeatureStore.open(tmp_path / "s.zarr")


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory) -> tuple[Run, list[dict]]:
    """A run on a store of its own, and the teacher features that the head saw in each task."""
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copytree(built, folder / "s.zarr")
    seen = []

    def learn(self, task, do=HCE.learn):
        cells = task.clips.features
        seen.append({name: cells[name] for name in cells if name.startswith(PREFIX)})
        do(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HCE, "learn", learn)
        done = run(folder / "s.zarr", "hce", "2+1x2", options=QUICK, out=folder / "runs")
    return done, seen


def test_teacher_features_are_computed_once_a_task_and_read_in_every_epoch(whole, tmp_path):
    done, seen = whole
    copy = shutil.copytree(done.spec["store"], tmp_path / "s.zarr")
    assert seen[0] == {}
    for old in seen[1:]:
        assert set(old) == {"teacher layer4.1", "teacher vector"}
        assert all(isinstance(cells, FeatureTensors) for cells in old.values())
    for calls in done.cost["stages_recomputed"]:
        assert set(calls) <= {"layer4.1", "pool"}
    changed = [f for f in FeatureStore.open(copy).features() if f.spec.get("grafts")]
    assert {f.name for f in changed} == {"layer4.1", "pool"}
    freed = FeatureStore.open(copy).gc()
    assert len(freed.freed) == len(changed)
    assert done.nme is not None
    diagnostics = done.metrics["diagnostics"]
    assert [set(d) for d in diagnostics] == [set(), *[{"effective channels, layer4.1"}] * 2]
    assert all(0 < share <= 1 for d in diagnostics for share in d.values())


def test_teacher_features_of_a_run_are_no_features_of_another(store, tmp_path):
    options = QUICK | {"parts": "kd", "first_epochs": 0, "epochs": 0}
    run(store, "hce", "2+1x2", options=options, out=tmp_path)
    again = FeatureStore.open(store.path)
    assert "pool" in {f.name for f in again.features() if f.spec.get("grafts")}
    before = {
        name: feature.fingerprint
        for name, feature in head_inputs.find_features(store, NAME, ["vector"]).items()
    }
    done = run(again, "nearest_mean", "2+1x2", out=tmp_path)
    assert done.spec["features"] == before
    with pytest.raises(SpecMismatch, match="no fc of"):
        run(again, "nearest_mean", "2+1x2", options={"feature": "fc"}, out=tmp_path)


def test_teacher_features_are_of_the_frames_that_the_head_reads(whole, tmp_path):
    """The last build of the store has other frames."""
    alone, _ = whole
    shutil.copytree(alone.spec["store"], tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr")
    dataset = store.attributes["dataset"]
    other = BuildSpec(("ViT-S-32:random-0",), ("proj",), 3, "dense", stride=1, dtype="bfloat16")
    build(dataset, store.path, other, runtime=Runtime(serial=True))
    finished = run(store.path, "hce", "2+1x2", options=QUICK, backbone=NAME, out=tmp_path / "b")
    assert finished.matrix.to_json() == alone.matrix.to_json()
    assert finished.cost["stages_recomputed"] != alone.cost["stages_recomputed"]  # they were there
    changed = [f for f in FeatureStore.open(store.path).features() if f.spec.get("grafts")]
    assert {f.spec["frames"]["sampling"] for f in changed} == {"tsn"}


def test_a_store_of_another_precision_is_refused_before_anything_is_learned(
    dataset, built_once, tmp_path
):
    spec = BuildSpec((NAME,), keep=("layer4.0", "pool"), frames=2, precision="bfloat16")
    store = built_once(dataset(CLASSES, 3), spec)
    with pytest.raises(SpecMismatch, match="--precision float32"):
        run(store, "hce", "2+1x2", options=QUICK, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_resumes_with_the_teacher_features_of_the_store(
    store, whole, tmp_path, monkeypatch
):
    complete, _ = whole

    class Stopped(BaseException):
        pass

    def stopping(self, task, do=HCE.learn):
        if task.number == 2:
            raise Stopped
        do(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(HCE, "learn", stopping)
        with pytest.raises(Stopped):
            run(store, "hce", "2+1x2", options=QUICK, out=tmp_path / "b")
    computed = []
    real = teacher_features.update

    def noting(*arguments, **options):
        report = real(*arguments, **options)
        computed.append(report.computed)
        return report

    monkeypatch.setattr(teacher_features, "update", noting)
    resumed = run(store, "hce", "2+1x2", options=QUICK, out=tmp_path / "b")
    assert computed == [0]
    assert resumed.matrix.to_json() == complete.matrix.to_json()
    for name in ("predictions.parquet", "matrix.json"):
        assert (resumed.folder / name).read_bytes() == (complete.folder / name).read_bytes()
