"""Forecasts: what is counted, of which runs, and in proportion to what."""

import json

import pytest
from typer.testing import CliRunner

from varve import BuildSpec, Runtime, ablate
from varve.heads import Task
from varve.pipeline.cli.app import app
from varve.pipeline.experiments import forecast as module
from varve.pipeline.experiments.forecast import forecast
from varve.pipeline.experiments.sweep_spec import Sweep
from varve.stores import FeatureStore

CLASSES = ("grow", "shrink", "fade in")
SCENARIO = "1+1x2"


@pytest.fixture(scope="module")
def store(dataset, built_once) -> FeatureStore:
    spec = BuildSpec(("resnet18:random-0",), keep=("layer4.0", "pool"), frames=2)
    return FeatureStore.open(built_once(dataset(CLASSES, 9), spec))


@pytest.fixture
def clock(monkeypatch):
    """A clock that a head moves: 10 ms for each clip and epoch, and 100 ms for each task."""
    from varve.heads.linear import Linear

    now = [0.0]

    def learn(self, task: Task) -> None:
        clips = len(task.clips) + (0 if task.memory is None else len(task.memory))
        epochs = self._optim.epochs_of(first_task=not self.classes)
        now[0] += 0.1 + 0.01 * clips * epochs
        self.classes = task.classes_after(self.classes)

    def scores_of(score, clips):
        now[0] += 0.005 * len(clips)

    monkeypatch.setattr(Linear, "learn", learn)
    monkeypatch.setattr(module, "scores_of", scores_of)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])


def test_seconds_are_those_of_every_clip_epoch_and_task(store, clock, tmp_path):
    options = {"linear": {"first_epochs": 7, "epochs": 3}}
    sweep = Sweep(["linear"], SCENARIO, seeds=2, options=options)
    (row,) = forecast([store], sweep, tmp_path).to_dict("records")
    table = store.clips
    train, test = (table[table["split"] == split]["label"].value_counts() for split in
                   ("train", "test"))  # fmt: skip
    clips, tests = int(train.iloc[0]), int(test.iloc[0])
    assert set(train) == {clips}
    assert row["training_seconds"] == pytest.approx(0.3 + 0.01 * clips * (7 + 3 + 3))
    assert row["score_seconds"] == pytest.approx(0.005 * tests * (1 + 2 + 3))
    assert (row["runs"], row["trainings"]) == (2, 2)
    assert row["seconds"] == pytest.approx(2 * (row["training_seconds"] + row["score_seconds"]))


def test_a_slow_head_is_measured_by_one_trial(store, clock, monkeypatch, tmp_path):
    """All of its time counts for its clips."""
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.0)
    calls = []
    trial = module._trial
    monkeypatch.setattr(module, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(
        module, "_trial", lambda plan, clips: calls.append(clips) or trial(plan, clips)
    )
    sweep = Sweep(["linear"], SCENARIO, seeds=1, options={"linear": {"first_epochs": 1}})
    (row,) = forecast([store], sweep, tmp_path).to_dict("records")
    assert calls == [module.PER_CLASS[0]]
    table = store.clips
    clips = int((table["split"] == "train").sum()) // len(CLASSES)
    each = (0.1 + 0.01 * 2) / 2  # of a trial of two clips
    epochs = 1 + 2 * 30  # the default of later tasks
    assert row["training_seconds"] == pytest.approx(each * clips * epochs)


def test_finished_runs_take_no_time_and_runs_that_train_alike_train_once(store, tmp_path):
    grid = {"routing": ["td", "average"], "layers": [1, 2]}
    options = {"stpr": {"text": "means", "ffn": 16, "epochs": 1, "first_epochs": 1}}
    sweep = Sweep(["stpr"], SCENARIO, grid, 1, options)
    rows = forecast([store], sweep, tmp_path)
    assert rows["runs"].tolist() == [1] * 4
    assert sorted(rows["trainings"]) == [0, 0, 1, 1]
    assert (rows["seconds"] > 0).all()
    assert list(tmp_path.iterdir()) == []
    ablate(store, "stpr", SCENARIO, grid | {"layers": [1]}, 1, options=options, out=tmp_path,
           runtime=Runtime(serial=True))  # fmt: skip
    rows = forecast([store], sweep, tmp_path)
    assert len(rows) == 2
    assert rows["options"].str.contains("layers=2").all()


@pytest.mark.parametrize(
    ("head", "options", "expected"),
    [
        ("icarl", {"budget": 2}, [0, 2, 4]),
        ("icarl", {"budget": 3, "shared": True}, [0, 3, 3]),
        ("joint", {}, [0, "clips", "2 clips"]),
        ("slda", {}, [0, 0, 0]),
    ],
)
def test_exemplars_count_as_clips(store, head, options, expected):
    plan = module.prepare_run(store, head, SCENARIO, options=options)
    sizes = [len(rows) for rows in plan.division.train]
    counted = {"clips": sizes[0], "2 clips": sizes[0] + sizes[1]}
    kept = [counted.get(each, each) for each in expected]
    assert module._clips(plan) == [size + more for size, more in zip(sizes, kept, strict=True)]


def test_heads_that_train_blocks_with_a_teacher_are_measured(store, tmp_path):
    options = {"first_epochs": 1, "epochs": 1, "parts": "kd", "blocks": 1}
    sweep = Sweep(["hce"], SCENARIO, {}, 1, {"hce": options})
    (row,) = forecast([store], sweep, tmp_path).to_dict("records")
    assert row["training_seconds"] > 0
    assert row["score_seconds"] > 0


def test_what_an_ablation_refuses_has_no_forecast(store, tmp_path):
    sweep = Sweep(["nearest_mean"], SCENARIO)
    with pytest.raises(ValueError, match="have the same clips to train and to test on"):
        forecast([store, FeatureStore.open(store.location)], sweep, tmp_path)
    with pytest.raises(ValueError, match="no store"):
        forecast([], sweep, tmp_path)


def test_the_command_prints_it_and_runs_nothing(store, tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('heads = ["nearest_mean", "slda"]\nscenario = "1+1x2"\nseeds = 3\n')
    call = ["ablate", str(store.location), str(file), "--out", str(tmp_path / "runs"), "--forecast"]
    text = CliRunner().invoke(app, call)
    assert text.exit_code == 0
    assert "on cpu, one run after another" in text.stdout
    rows = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert [(row["head"], row["runs"]) for row in rows] == [("nearest_mean", 3), ("slda", 3)]
    assert not (tmp_path / "runs").exists()
