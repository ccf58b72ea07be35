"""Ablations: the runs of a grid, finished runs, shared states, and the table."""

import json

import numpy as np
import pandas as pd
import pytest

from varve import Runtime, ablate, run
from varve.heads.stpr import StPR
from varve.pipeline.experiments import sweep
from varve.pipeline.experiments.sweep_spec import Sweep
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore, SpecMismatch, clips

SERIAL = Runtime(serial=True)
GRID = {"nearest_mean.time": ["mean", "order"], "unit": [True, False]}


class Notes(Progress):
    """Progress that keeps its messages."""

    def __init__(self):
        self.lines, self.done = [], 0

    def message(self, line):
        self.lines.append(line)

    def advance(self, name, count, frames=0):
        self.done += count * (name == "runs")


def test_a_grid_is_every_combination_for_every_seed():
    runs = Sweep(("nearest_mean",), "demo", GRID, seeds=2).runs()
    assert len(runs) == 8
    assert {(seed, o["time"], o["unit"]) for _, seed, o, _ in runs} == {
        (seed, time, unit)
        for seed in (1000, 1993)
        for time in ("mean", "order")
        for unit in (True, False)
    }


def test_options_of_the_command_line_replace_those_of_the_sweep():
    heads, options = ("nearest_mean", "linear"), {"linear": {"lr": 0.5, "epochs": 3}}
    sweep = Sweep(heads, "demo", {"nearest_mean.time": ["mean", "order"]}, options=options)
    replaced = sweep.with_options({"lr": 0.1, "nearest_mean.unit": False})
    assert replaced.options == {"nearest_mean": {"unit": False}, "linear": {"lr": 0.1, "epochs": 3}}
    assert sweep.options == options
    for overrides, message in (({"nosuch": 1}, "none of nearest_mean, linear has it"),
                               ({"nearest_mean.time": "mean"}, "the grid has it"),
                               ({"time": "mean"}, "the grid has it"),
                               ({"linear.unit": 1}, "none of")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sweep.with_options(overrides)


def test_an_option_of_one_head_is_not_given_to_another():
    heads = ("nearest_mean", "linear")
    sweep = Sweep(heads, "demo", {"nearest_mean.time": ["mean", "order"], "linear.lr": [0.1]},
                  seeds=[5], options={"linear": {"epochs": 3}})  # fmt: skip
    assert [(head, options) for head, _, options, _ in sweep.runs()] == [
        ("nearest_mean", {"time": "mean"}),
        ("nearest_mean", {"time": "order"}),
        ("linear", {"epochs": 3, "lr": 0.1}),
    ]


def test_a_table_has_mean_and_deviation_over_the_seeds(vector_store, tmp_path):
    table = ablate(vector_store, "nearest_mean", "2+2x2", {"time": ["mean", "order"]}, seeds=3,
                   out=tmp_path, runtime=SERIAL)  # fmt: skip
    assert len(table) == 2
    assert table["n"].tolist() == [3, 3]
    for time, row in table.set_index("option.time").iterrows():
        finals = [
            run(vector_store, "nearest_mean", "2+2x2", seed=seed, options={"time": time},
                out=tmp_path).matrix.metric("final")
            for seed in (1000, 1993, 2021)
        ]  # fmt: skip
        assert row["cnn.final.mean"] == pytest.approx(np.mean(finals))
        assert row["cnn.final.std"] == pytest.approx(np.std(finals, ddof=1))
    assert len(pd.DataFrame(table.attrs["runs"])) == 6
    assert table.attrs["errors"] == []


def of_split(store, number):
    """Move the test clips of a store, as another split of its data set has them."""
    table = store.clips.copy()
    table["split"] = np.roll(table["split"], number)
    clips.write(store.path, table)
    return FeatureStore.open(store.path)


def test_several_stores_are_the_splits_of_one_data_set(make_vector_store, tmp_path, client):
    stores = [of_split(make_vector_store(tmp_path / f"{n}.zarr"), n) for n in range(3)]
    table = ablate(stores, "nearest_mean", "2+2x2", {"time": ["mean", "order"]}, seeds=2,
                   out=tmp_path / "runs", runtime=SERIAL)  # fmt: skip
    assert table["n"].tolist() == [6, 6]
    for time, row in table.set_index("option.time").iterrows():
        finals = [
            run(store, "nearest_mean", "2+2x2", seed=seed, options={"time": time},
                out=tmp_path / "runs").matrix.metric("final")
            for store in stores
            for seed in (1000, 1993)
        ]  # fmt: skip
        assert row["cnn.final.mean"] == pytest.approx(np.mean(finals))
        assert row["cnn.final.std"] == pytest.approx(np.std(finals, ddof=1))
    assert {r["store"] for r in table.attrs["runs"]} == {str(s.location) for s in stores}
    paths = [store.path for store in stores]
    again = ablate(paths, "nearest_mean", "2+2x2", {"time": ["mean", "order"]}, seeds=2,
                   out=tmp_path / "processes", client=client)  # fmt: skip
    names = ["option.time", "n", "cnn.final.mean", "cnn.final.std"]
    pd.testing.assert_frame_equal(again[names], table[names])


def test_stores_of_other_data_are_refused_before_anything_runs(make_vector_store, tmp_path):
    first, second = (of_split(make_vector_store(tmp_path / f"{n}.zarr"), n) for n in range(2))
    out = tmp_path / "runs"
    with pytest.raises(ValueError, match=r"0\.zarr have the same clips .* each once"):
        ablate([first, first.path], "nearest_mean", "2+2x2", seeds=1, out=out, runtime=SERIAL)
    with pytest.raises(ValueError, match="no store"):
        ablate([], "nearest_mean", "2+2x2", seeds=1, out=out, runtime=SERIAL)
    other = of_split(make_vector_store(tmp_path / "o.zarr", dtype="float16"), 2)
    with pytest.raises(ValueError, match=r"0\.zarr and .*o\.zarr give runs of different features"):
        ablate([first, second, other], "nearest_mean", "2+2x2", seeds=1, out=out, runtime=SERIAL)
    assert not out.exists()


def test_finished_runs_are_not_run_again(vector_store, tmp_path, monkeypatch):
    first = ablate(vector_store, "nearest_mean", "2+2x2", seeds=2, out=tmp_path, runtime=SERIAL)
    seeds = []
    monkeypatch.setattr(sweep, "run", lambda *rest, **options: seeds.append(options["seed"]))
    notes = Notes()
    again = ablate(vector_store, "nearest_mean", "2+2x2", seeds=[1000, 1993], out=tmp_path,
                   runtime=SERIAL, progress=notes)  # fmt: skip
    assert seeds == []
    assert notes.lines == ["2 runs, 2 of them finished before"]
    pd.testing.assert_frame_equal(first, again)


STPR = {"text": "codes", "layers": 1, "heads": 1, "ffn": 8, "first_epochs": 2, "epochs": 2}
WAYS = {"routing": ["td", "average", "adapter"], "softmax": [None, 0.1]}


def numbers(folder):
    """Results and states of a run, without what differs in time."""
    files = {name: (folder / name).read_bytes() for name in ("matrix.json", "predictions.parquet")}
    states = sorted((folder / "checkpoints").glob("*.safetensors"))
    return files, [file.read_bytes() for file in states]


def test_runs_that_train_alike_train_once(vector_store, tmp_path, monkeypatch):
    """Shared states give the results that a run of its own gives."""
    learned = []
    monkeypatch.setattr(StPR, "learn", lambda self, task, do=StPR.learn: (
        learned.append(task.number), do(self, task)))  # fmt: skip
    notes = Notes()
    table = ablate(vector_store, "stpr", "2+2x2", WAYS, 2, options={"stpr": STPR}, runtime=SERIAL,
                   out=tmp_path / "a", keep_checkpoints=True, progress=notes)  # fmt: skip
    assert learned == 2 * [0, 1, 2]
    assert notes.lines[0] == "12 runs, 10 train as another does"
    assert notes.done == 12
    assert table["n"].tolist() == [2] * 6
    for record in table.attrs["runs"]:
        if record["seed"] != 1000 or record["option.softmax"] is not None:
            continue  # for the time that all take
        options = STPR | {name: record[f"option.{name}"] for name in WAYS}
        alone = run(vector_store, "stpr", "2+2x2", seed=record["seed"], options=options,
                    out=tmp_path / "b")  # fmt: skip
        together = tmp_path / "a" / alone.folder.name
        assert numbers(alone.folder) == numbers(together)
        assert len(numbers(together)[1]) == 3
    assert len(learned) == 2 * 3 + 3 * 3
    seconds = {(r["seed"], r["cost.seconds"]) for r in table.attrs["runs"]}
    assert len(seconds) == 2


def test_processes_share_states_too(vector_store, tmp_path, client):
    table, expected = (
        ablate(vector_store, "stpr", "2+2x2", {"routing": WAYS["routing"]}, 1, out=tmp_path / n,
               options={"stpr": STPR | {"first_epochs": 1, "epochs": 1}}, **where)
        for n, where in (("a", {"client": client}), ("b", {"runtime": SERIAL}))
    )  # fmt: skip
    assert table.attrs["errors"] == []
    assert len(table) == 3
    assert len({record["cost.seconds"] for record in table.attrs["runs"]}) == 1
    columns = ["option.routing", "cnn.final.mean", "cnn.average_incremental.mean"]
    pd.testing.assert_frame_equal(table[columns], expected[columns])
    assert not list(tmp_path.glob("*/*/checkpoints"))


def test_a_run_with_shared_states_reports_the_cost_of_their_training(vector_store, tmp_path):
    ablate(vector_store, "stpr", "2+2x2", {"routing": ["td", "average"]}, 1, runtime=SERIAL,
           options={"stpr": STPR}, out=tmp_path)  # fmt: skip
    costs = [json.loads(file.read_bytes()) for file in sorted(tmp_path.glob("*/cost.json"))]
    for name in ("seconds", "bytes_read", "peak_memory_bytes", "stages_recomputed"):
        assert costs[0][name] == costs[1][name]
    assert costs[0]["score_seconds"] != costs[1]["score_seconds"]


def test_a_stopped_ablation_resumes_with_its_states_and_leaves_no_checkpoints(
    vector_store, tmp_path, monkeypatch
):
    ways = {"routing": ["td", "average", "adapter"]}
    learned = []
    monkeypatch.setattr(StPR, "learn", lambda self, task, do=StPR.learn: (
        learned.append(task.number), do(self, task)))  # fmt: skip

    class Stopped(BaseException):
        pass

    class Stopping(Notes):
        def advance(self, name, count, frames=0):
            super().advance(name, count)
            if self.done == 2:
                raise Stopped

    common = {"options": {"stpr": STPR}, "runtime": SERIAL, "out": tmp_path}
    with pytest.raises(Stopped):
        ablate(vector_store, "stpr", "2+2x2", ways, 1, progress=Stopping(), **common)
    assert len(list(tmp_path.glob("*/checkpoints"))) == 2
    notes = Notes()
    table = ablate(vector_store, "stpr", "2+2x2", ways, 1, progress=notes, **common)
    assert notes.lines[0] == "3 runs, 2 of them finished before, 1 train as another does"
    assert learned == [0, 1, 2]
    assert len(table) == 3
    assert not list(tmp_path.glob("*/checkpoints"))
    assert not list(tmp_path.glob("*/temporary_checkpoints"))


def test_a_run_trains_where_the_states_of_another_are_missing(vector_store, tmp_path):
    first = run(vector_store, "stpr", "2+2x2", options=STPR, out=tmp_path / "a")
    (first.folder / "checkpoints" / "task-01.json").unlink()
    options = STPR | {"routing": "average"}
    trained = run(vector_store, "stpr", "2+2x2", options=options, out=tmp_path / "a",
                  states_from=first.folder)  # fmt: skip
    alone = run(vector_store, "stpr", "2+2x2", options=options, out=tmp_path / "b")
    assert numbers(trained.folder) == numbers(alone.folder)


def test_equal_numbers_are_one_run_and_an_option_comes_once(vector_store, tmp_path):
    grid = {"weight": [10, 1e1, 2.5], "epochs": [2.0]}
    options = {"stpr": {k: v for k, v in STPR.items() if k != "epochs"} | {"first_epochs": 1}}
    table = ablate(vector_store, "stpr", "2+2x2", grid, 1, options=options, out=tmp_path,
                   runtime=SERIAL)  # fmt: skip
    assert table["option.weight"].tolist() == [10.0, 2.5]
    assert table["option.epochs"].tolist() == [2, 2]
    twice = Sweep(("stpr",), "demo", {"routing": ["td"], "stpr.routing": ["average"]})
    with pytest.raises(ValueError, match="routing of stpr twice"):
        twice.runs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2.5}, "epochs=2.5: give int"),
        ({"lr": "fast"}, "lr='fast': give float"),
        ({"softmax": "x"}, r"softmax='x': give float \| None"),
        ({"epochs": True}, "epochs=True"),
        ({"adapters": [1]}, r"adapters=\[1\]: give int \| str"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"tau": 0}, "tau=0"),
        ({"doubt": float("nan")}, "doubt=nan"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_learned(
    vector_store, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        run(vector_store, "stpr", "2+2x2", options=STPR | options, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_states_of_another_specification_are_refused(vector_store, tmp_path):
    first = run(vector_store, "stpr", "2+2x2", options=STPR, out=tmp_path)
    with pytest.raises(SpecMismatch, match="was trained with another specification"):
        run(vector_store, "stpr", "2+2x2", options=STPR | {"lr": 0.1}, out=tmp_path,
            states_from=first.folder)  # fmt: skip
    none = run(vector_store, "stpr", "2+2x2", options=STPR | {"routing": "none"}, out=tmp_path)
    with pytest.raises(SpecMismatch, match="was trained with another specification"):
        run(vector_store, "stpr", "2+2x2", options=STPR | {"routing": "average"}, out=tmp_path,
            states_from=none.folder)  # fmt: skip
    with pytest.raises(SpecMismatch, match="was trained with another specification"):
        run(
            vector_store,
            "stpr",
            "2+2x2",
            seed=7,
            options=STPR,
            out=tmp_path,
            states_from=first.folder,
        )


def test_checkpoints_of_runs_that_were_there_before_stay(vector_store, tmp_path):
    before = run(vector_store, "nearest_mean", "2+2x2", out=tmp_path)
    ablate(vector_store, "nearest_mean", "2+2x2", seeds=2, out=tmp_path, runtime=SERIAL)
    assert len(list(before.folder.glob("checkpoints/*.safetensors"))) == 3
    assert len(list(tmp_path.glob("*/checkpoints"))) == 1


def test_a_run_that_fails_does_not_stop_the_others(vector_store, tmp_path):
    notes = Notes()
    table = ablate(vector_store, "linear", "2+2x2", {"lr": [0.01, 1e30]}, seeds=1, out=tmp_path,
                   options={"linear": {"epochs": 3}}, runtime=SERIAL, progress=notes)  # fmt: skip
    assert table["option.lr"].tolist() == [0.01]
    (error,) = table.attrs["errors"]
    assert "1e+30" in error
    assert any(line.startswith("FAILED linear") for line in notes.lines)
    assert notes.done == 2


def test_where_every_run_fails_there_is_no_table(vector_store, tmp_path):
    with pytest.raises(RuntimeError, match="every run failed; the first: linear"):
        ablate(vector_store, "linear", "2+2x2", {"lr": [1e30]}, seeds=1, out=tmp_path,
               options={"linear": {"epochs": 3}}, runtime=SERIAL)  # fmt: skip


def test_processes_give_the_numbers_of_one_after_the_other(vector_store, tmp_path):
    arguments = {"grid": {"time": ["mean", "order"]}, "seeds": 2}
    serial = ablate(
        vector_store, "nearest_mean", "2+2x2", out=tmp_path / "a", runtime=SERIAL, **arguments
    )
    notes = Notes()
    both = ablate(vector_store, "nearest_mean", "2+2x2", out=tmp_path / "b", progress=notes,
                  runtime=Runtime(workers=2), **arguments)  # fmt: skip
    numbers = [name for name in serial if name.startswith("cnn.")]
    pd.testing.assert_frame_equal(serial[numbers], both[numbers])
    assert any("Dask dashboard: http" in line for line in notes.lines)
    assert notes.done == 4


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"heads": "stprr"}, "no 'stprr' in heads/"),
        ({"grid": {"nearest_mean.tiem": [1]}}, r"tiem: none of nearest_mean has it; options are"),
        ({"grid": {"linear.lr": [1]}}, "linear.lr: none of nearest_mean has it"),
        ({"grid": {"time": "mean"}}, "give a list of values"),
        ({"seeds": 9}, "a number from 1 to 3, or a list of seeds"),
        ({"options": {"linear": {}}}, "options of linear, which is none of nearest_mean"),
        ({"scenario": "9+9x9"}, "90 classes"),
        ({"grid": {"time": ["max"]}}, "choose from mean, order"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_run(
    vector_store, tmp_path, requested, message
):
    defaults = {"heads": "nearest_mean", "scenario": "2+2x2", "out": tmp_path, "runtime": SERIAL}
    with pytest.raises(ValueError, match=message):
        ablate(vector_store, **defaults | requested)
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_read_from_toml(tmp_path):
    (tmp_path / "s.toml").write_text(
        'heads = ["stpr"]\nscenario = "demo"\nseeds = [1, 2]\n[grid]\n"stpr.routing" = ["td"]\n'
        "[options.stpr]\nepochs = 3\n"
    )
    read = Sweep.read(tmp_path / "s.toml")
    assert read.runs() == [("stpr", seed, {"epochs": 3, "routing": "td"}, {}) for seed in (1, 2)]
    (tmp_path / "s.toml").write_text(
        'heads = ["stpr"]\nscenario = "demo"\nseeds = 1\n[grid]\nposition = ["null", "learned"]\n'
        '[options.stpr]\nclip_norm = "null"\n'
    )
    all_options = [options for _, _, options, _ in Sweep.read(tmp_path / "s.toml").runs()]
    assert all_options == [{"clip_norm": None, "position": each} for each in (None, "learned")]
    (tmp_path / "s.toml").write_text('head = "stpr"\n')
    with pytest.raises(ValueError, match=r"s.toml is no sweep: .*head"):
        Sweep.read(tmp_path / "s.toml")


def test_an_option_may_be_a_list_or_a_table(vector_store, tmp_path):
    done = run(vector_store, "linear", "2+2x2", out=tmp_path, options={
        "encoder": "expert", "expert": {"layers": 1, "heads": 1, "ffn": 8}, "epochs": 1,
        "first_epochs": 1})  # fmt: skip
    assert done.spec["options"]["expert"]["ffn"] == 8
    with pytest.raises(ValueError, match=r"strengths=0.3: give Sequence\[float\]"):
        run(vector_store, "class_regularization", "2+2x2", options={"strengths": 0.3}, out=tmp_path)
