"""Runs: the files of a run folder, equal numbers after a resume, and what is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from varve import BuildSpec, Runtime, build, run
from varve.heads.parts.clips import Clips
from varve.pipeline.backbones import _weights
from varve.pipeline.experiments import checkpoints, head_inputs, run_spec
from varve.pipeline.experiments.metrics import from_predictions
from varve.pipeline.experiments.run import RunState
from varve.pipeline.experiments.run_folder import Run
from varve.pipeline.experiments.scenarios import Scenario
from varve.pipeline.progress import Lines, Progress
from varve.stores import FeatureStore, SpecMismatch, clips, lock

T, D, TRAIN, TEST = 3, 12, 7, 3
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")
QUICK = {"epochs": 4}


@pytest.fixture
def store(vector_store):
    return vector_store


def files_of(folder: Path) -> dict[str, bytes]:
    """Files whose bytes equal runs share: none that records time."""
    names = ("matrix.json", "metrics.json", "predictions.parquet")
    contents = {name: (folder / name).read_bytes() for name in names}
    for file in sorted((folder / "checkpoints").glob("*.safetensors")):
        contents[file.name] = file.read_bytes()
    return contents


def test_a_run_folder_contains_what_a_paper_needs(store, tmp_path):
    done = run(store, "lucir", "2+2x2", out=tmp_path, options=QUICK)
    names = {file.name for file in done.folder.iterdir()}
    assert {"spec.json", "matrix.json", "metrics.json", "cost.json", "predictions.parquet",
            "checkpoints"} <= names  # fmt: skip
    assert done.folder.name.startswith("lucir-2+2x2-1000-")
    assert [len(task) for task in done.spec["tasks"]] == [2, 2, 2]
    assert done.matrix.clips.tolist() == [6, 6, 6]
    assert done.nme is not None
    assert done.metrics["cnn"]["final"] == done.matrix.metric("final")
    assert done.metrics["nme"]["average_incremental"] == done.nme.metric("average_incremental")
    assert done.metrics["left_out"] == {}
    cost = done.cost
    assert cost["trainable"] > 0
    assert len(cost["seconds"]) == 3
    assert cost["multiply_adds"] >= D * len(CLASSES)
    assert cost["peak_memory_bytes"] > 50e6
    assert cost["exemplar_bytes"] == cost["exemplars"] * T * D * 4
    cells = T * D * 4
    assert cost["bytes_read"] >= (TRAIN + TEST) * len(CLASSES) * cells


def test_predictions_are_of_every_seen_test_clip_and_give_the_matrix(store, tmp_path):
    done = run(store, "icarl", "2+2x2", out=tmp_path, options=QUICK)
    predictions = done.predictions
    assert predictions.groupby(["stage", "classifier"]).size().unstack().to_dict("list") == {
        "cnn": [6, 12, 18], "nme": [6, 12, 18],
    }  # fmt: skip
    for kind, matrix in (("cnn", done.matrix), ("nme", done.nme)):
        again = from_predictions(predictions, done.spec["tasks"], kind)
        np.testing.assert_array_equal(again.accuracy, matrix.accuracy)
    first = predictions[predictions["stage"] == 0]
    seen = set(done.spec["tasks"][0])
    assert set(first["top1"]) | set(first["top2"]) == seen
    assert set(first["top3"]) == {""}
    table = store.clips
    assert (table.loc[predictions["row"], "label"].to_numpy() == predictions["label"]).all()
    assert (table.loc[predictions["row"], "split"] == "test").all()


def test_a_finished_run_is_returned_and_not_run_again(store, tmp_path, monkeypatch):
    done = run(store, "nearest_mean", "2+2x2", out=tmp_path)
    before = {file: file.stat().st_mtime_ns for file in done.folder.iterdir() if file.is_file()}
    monkeypatch.setattr("varve.pipeline.experiments.run.RunState", None)
    again = run(store, "nearest_mean", "2+2x2", out=tmp_path)
    assert again.folder == done.folder
    assert again.metrics == done.metrics
    changed = {name.name for name, at in before.items() if name.stat().st_mtime_ns != at}
    assert changed <= {".lock"}


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1993},
        {"options": {"time": "order"}},
        {"scenario": "3+3x1"},
        {"scenario": Scenario("mine", (CLASSES[:3], CLASSES[3:]), None, tuple(range(6)))},
    ],
    ids=["seed", "option", "scenario", "own"],
)
def test_whatever_decides_the_numbers_is_another_run(store, tmp_path, other):
    arguments = {"scenario": "2+2x2", "out": tmp_path}
    first = run(store, "nearest_mean", **arguments)
    second = run(store, "nearest_mean", **arguments | other)
    assert first.folder != second.folder


def test_another_feature_another_clip_and_edited_code_are_other_runs(
    store, tmp_path, monkeypatch, make_vector_store
):
    plan = run_spec.prepare_run(store, "nearest_mean", "2+2x2")
    half = make_vector_store(tmp_path / "half.zarr", dtype="float16")
    assert run_spec.prepare_run(half, "nearest_mean", "2+2x2").digest != plan.digest
    shutil.copytree(store.path, tmp_path / "moved.zarr")
    assert run_spec.prepare_run(tmp_path / "moved.zarr", "nearest_mean", "2+2x2").digest == (
        plan.digest
    )
    table = store.clips.copy()
    table.loc[table["split"] == "test", "split"] = "other"
    table.loc[table.groupby("label").tail(1).index, "split"] = "test"
    clips.write(tmp_path / "moved.zarr", table)
    fewer = run_spec.prepare_run(
        FeatureStore.open(tmp_path / "moved.zarr"), "nearest_mean", "2+2x2"
    )
    assert fewer.digest != plan.digest
    monkeypatch.setattr(run_spec, "code_digest", lambda source: "edited")
    assert run_spec.prepare_run(store, "nearest_mean", "2+2x2").digest != plan.digest


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module", params=["icarl", "stpr", "slda"])
def whole(request, vector_store, tmp_path_factory) -> Run:
    """A run that was not stopped."""
    options = {"stpr": {"epochs": 3, "first_epochs": 3, "layers": 1, "text": "codes"},
               "icarl": QUICK}.get(request.param, {})  # fmt: skip
    return run(vector_store, request.param, "2+2x2", out=tmp_path_factory.mktemp("whole"),
               options=options, threads=1)  # fmt: skip


@pytest.mark.parametrize("after", [0, 1])
def test_a_run_that_was_stopped_ends_in_the_same_bits(store, tmp_path, monkeypatch, whole, after):
    head, options = whole.spec["head"], whole.spec["options"]
    write = checkpoints.write

    def stopping(folder, task, *rest):
        write(folder, task, *rest)
        if task == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", stopping)
        with pytest.raises(Stop):
            run(store, head, "2+2x2", out=tmp_path / "parts", options=options, threads=1)
    messages = []
    lines = Progress()
    lines.message = messages.append
    torch.manual_seed(99)
    ended = run(store, head, "2+2x2", out=tmp_path / "parts", options=options, progress=lines)
    assert messages[0] == f"resuming after task {after + 1} of 3"
    assert files_of(ended.folder) == files_of(whole.folder)


def test_a_killed_process_resumes_after_its_last_task(store, tmp_path):
    code = (
        "from varve import run; from varve.pipeline.progress import Lines; import sys; "
        f"run({str(store.path)!r}, 'linear', '2+1x4', out={str(tmp_path / 'killed')!r}, "
        "options={'epochs': 400}, threads=1, progress=Lines(sys.stdout, 0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("task 2/5: ") and "trained" in line:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    (folder,) = (tmp_path / "killed").iterdir()
    assert not (folder / "metrics.json").exists()
    options = {"epochs": 400}
    ended = run(store, "linear", "2+1x4", out=tmp_path / "killed", options=options)
    whole = run(store, "linear", "2+1x4", out=tmp_path / "whole", options=options, threads=1)
    assert files_of(ended.folder) == files_of(whole.folder)


def test_a_state_is_written_once_however_many_tasks_follow(store, tmp_path):
    options = {"epochs": 1, "first_epochs": 1, "layers": 1, "text": "codes"}
    done = run(store, "stpr", "2+1x4", out=tmp_path, options=options)
    sizes = [file.stat().st_size for file in sorted(done.folder.rglob("task-*.safetensors"))]
    assert len(sizes) == 5
    assert max(sizes) < 1.2 * min(sizes)


def test_checkpoints_are_in_the_order_of_their_tasks_beyond_a_hundred(tmp_path):
    for task in range(103):
        state = {"all": torch.zeros(3), f"own.{task}": torch.full((2,), float(task))}
        checkpoints.write(tmp_path, task, state, {})
    task, state, _ = checkpoints.read(tmp_path)
    assert task == 102
    assert state["own.102"].tolist() == [102, 102]
    assert checkpoints.read(tmp_path, 99)[1].keys() == {"all", "own.99"}
    sizes = [file.stat().st_size for file in tmp_path.glob("checkpoints/task-1??.safetensors")]
    assert len(set(sizes)) == 1


def test_checkpoints_are_removed_where_they_are_not_kept(store, tmp_path):
    done = run(store, "nearest_mean", "2+2x2", out=tmp_path, keep_checkpoints=False)
    assert not (done.folder / "checkpoints").exists()


def test_a_feature_that_the_store_lacks_is_refused_with_the_command_that_adds_it(store, tmp_path):
    with pytest.raises(SpecMismatch) as error:
        run(store, "nearest_mean", "2+2x2", out=tmp_path, options={"feature": "layer3.1:pool"})
    message = str(error.value)
    assert "has no layer3.1:pool of net:tag" in message
    assert message.endswith(
        f"varve build /videos --store {store.path} --backbone net:/weights/tag.pt --keep "
        "layer3.1:pool --frames 3 --dtype float32"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"head": "nearest"}, "no 'nearest' in heads/; found"),
        ({"options": {"tiem": 1}}, "nearest_mean has no option tiem; it has feature='vector'"),
        ({"options": {"time": "max"}}, "choose from mean, order"),
        ({"scenario": "5+2x2"}, "9 classes"),
        ({"backbone": "vit"}, "backbone 'vit' is 0 of those of"),
        ({"splits": ("train", "validation")}, "no clip to test on"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(store, tmp_path, requested, message):
    arguments = {"head": "nearest_mean", "scenario": "2+2x2", "out": tmp_path} | requested
    with pytest.raises(ValueError, match=message):
        run(store, **arguments)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_work_on_one_run(store, tmp_path):
    plan = run_spec.prepare_run(store, "nearest_mean", "2+2x2")
    (tmp_path / plan.name).mkdir()
    with lock.locked(tmp_path / plan.name), pytest.raises(lock.StoreLocked, match="process"):
        run(store, "nearest_mean", "2+2x2", out=tmp_path)


def test_a_damaged_checkpoint_is_named(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "finish", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run(store, "nearest_mean", "2+2x2", out=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "checkpoints" / "task-02.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"checkpoints is damaged .*: remove .* and run it again"):
        run(store, "nearest_mean", "2+2x2", out=tmp_path)


def loud_for_one_clip(videos: Path, folder: Path) -> str:
    """A ResNet of which one clip of the videos leaves the range of float16, and no other."""
    with _weights.seeded(0):
        state = torchvision.models.resnet18(weights=None).state_dict()
    name, scale = f"resnet18:{folder}/loud.safetensors", 1e4

    def save(scale):
        state["layer1.0.bn2.weight"].fill_(scale)
        safetensors.torch.save_file(state, folder / "loud.safetensors")

    save(scale)
    spec = BuildSpec(name, "layer1.0:pool", frames=2, dtype="float32")
    build(videos, folder / "wide.zarr", spec, runtime=Runtime(serial=True))
    (feature,) = FeatureStore.open(folder / "wide.zarr").features()
    second, first = np.sort(np.abs(feature.read()).max(axis=(1, 2)))[-2:]
    save(scale * 65504 / np.sqrt(first * second))
    return name


@pytest.mark.parametrize("order", [("plain", "loud"), ("loud", "plain"), ("both",)])
def test_an_overflow_of_one_network_takes_no_clip_from_another(dataset, tmp_path, order):
    videos = dataset(("grow", "shrink"), 4)
    loud, plain = loud_for_one_clip(videos, tmp_path), "resnet18:random-0"
    networks = {"plain": [plain], "loud": [loud], "both": [loud, plain]}
    for name in order:
        spec = BuildSpec(tuple(networks[name]), ("layer1.0:pool",), frames=2)
        report = build(videos, tmp_path / "s.zarr", spec, runtime=Runtime(serial=True))
        assert len(report.quarantined) == (name != "plain")
    store = FeatureStore.open(tmp_path / "s.zarr")
    counts = {}
    for name in (plain, "resnet18:loud"):
        (feature,) = (f for f in store.features() if f.backbone == name)
        done = run(store, "nearest_mean", "1+1x1", backbone=name, out=tmp_path / "runs",
                   options={"feature": "layer1.0:pool"})  # fmt: skip
        counts[name] = done.metrics["left_out"], len(feature.dataset())
    assert counts == {plain: ({}, 8), "resnet18:loud": ({"quarantined": 1}, 7)}


@pytest.mark.parametrize("head", ["icarl", "lucir"])
def test_a_budget_smaller_than_the_classes_is_refused_before_the_first_task(store, tmp_path, head):
    options = {**QUICK, "budget": 5, "shared": True}
    with pytest.raises(ValueError, match="shared by 6 classes leave some without: give at least 6"):
        run(store, head, "2+2x2", out=tmp_path, options=options)
    assert not any(tmp_path.iterdir())
    run(store, head, "2+1x3", out=tmp_path, options=options, only=list(CLASSES[:5]))


def test_classes_come_from_files_on_the_command_line(store, tmp_path, varve):
    (tmp_path / "only.txt").write_text("fox\nant\nbee\n")
    (tmp_path / "tasks.pkl").write_bytes(pickle.dumps({"train": [{"fox": []}, {"bee": []}]}))
    options = [store.path, "--head", "nearest_mean", "--out", tmp_path / "runs", "--json"]
    tasks = [
        json.loads(varve("run", *options, *more).stdout)["spec"]["tasks"]
        for more in (
            ["--scenario", "0+2x1+1", "--only", tmp_path / "only.txt"],
            ["--scenario", "given", "--order", tmp_path / "tasks.pkl"],
        )
    ]
    assert [len(task) for task in tasks[0]] == [2, 1]
    assert {label for task in tasks[0] for label in task} == {"fox", "ant", "bee"}
    assert tasks[1] == [["fox"], ["bee"]]
    (tmp_path / "sweep.toml").write_text(
        'heads = ["nearest_mean"]\nscenario = "given"\nseeds = 1\norder = "tasks.pkl"\n'
    )
    sweep = [store.path, tmp_path / "sweep.toml", "--out", tmp_path / "runs", "--serial"]
    assert varve("ablate", *sweep).returncode == 0
    specs = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/spec.json")]
    assert sorted(len(spec["tasks"]) for spec in specs) == [2, 2]


def test_quarantined_clips_are_left_out_and_counted(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "s.zarr")
    table = store.clips.copy()
    table.loc[[0, 1], "status"] = "quarantined"
    clips.write(tmp_path / "s.zarr", table)
    done = run(tmp_path / "s.zarr", "nearest_mean", "2+2x2", out=tmp_path / "runs")
    assert done.metrics["left_out"] == {"quarantined": 2}


def test_progress_has_a_bar_a_task_and_a_line_after_it(store, tmp_path, capsys):
    run(store, "linear", "2+2x2", out=tmp_path, options=QUICK, progress=Lines(every_seconds=0))
    message = capsys.readouterr().err
    assert "task 2/3: 4/4 epochs" in message
    assert "task 3/3: " in message
    assert "of 18 clips of 6 classes" in message


def test_numbers_do_not_depend_on_whether_features_fit_in_memory(store, tmp_path, monkeypatch):
    whole = run(store, "linear", "2+2x2", out=tmp_path / "a", options=QUICK, threads=1)
    make_clips = head_inputs.make_clips
    monkeypatch.setattr(
        head_inputs,
        "make_clips",
        lambda *rest, **options: make_clips(*rest, **options | {"budget_bytes": 0}),
    )
    streamed = run(store, "linear", "2+2x2", out=tmp_path / "b", options=QUICK, threads=1)
    assert files_of(whole.folder) == files_of(streamed.folder)
    plan = run_spec.prepare_run(store, "linear", "2+2x2")
    assert isinstance(plan.test_clips(np.arange(3)), Clips)
    assert not plan.test_clips(np.arange(3)).features["vector"].in_memory


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        Run.read(tmp_path)


def test_json_files_are_json(store, tmp_path):
    done = run(store, "nearest_mean", "2+2x2", out=tmp_path)
    for file in done.folder.glob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
