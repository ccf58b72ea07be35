"""Published sweeps of the repository: each is one call, tested at a small size."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from varve import BuildSpec, Runtime, ablate
from varve.pipeline.experiments import results
from varve.pipeline.experiments.run_spec import option_defaults
from varve.pipeline.experiments.scenarios import make_scenario
from varve.pipeline.experiments.sweep_spec import Sweep
from varve.stores import FeatureStore

FOLDER = Path(__file__).parents[3] / "benchmarks" / "sweeps"
FILES = sorted(file.stem for file in FOLDER.glob("*.toml"))
NAME = "ViT-S-32:random-0"
CLASSES = ("grow", "shrink")
SMALL = {"layers": 1, "heads": 1, "ffn": 8, "first_epochs": 1, "epochs": 1}


@pytest.fixture(scope="module")
def store(dataset, built_once) -> FeatureStore:
    keep = ("proj", "blocks.0.attn", "blocks.11.attn:cls")
    spec = BuildSpec((NAME,), keep=keep, frames=2)
    return FeatureStore.open(built_once(dataset(CLASSES, 3), spec))


def ends(grid):
    """Keep the first and the last of numbers: those between run the same code."""
    return {
        name: [values[0], values[-1]] if {type(v) for v in values} <= {int, float} else values
        for name, values in grid.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_a_sweep_names_options_that_there_are(name):
    sweep = Sweep.read(FOLDER / f"{name}.toml")
    assert sweep.seed_list() == [1000, 1993, 2021]
    expected = 0
    for head in sweep.heads:
        axes = [v for name, v in sweep.grid.items() if name.rpartition(".")[0] in ("", head)]
        expected += 3 * math.prod(map(len, axes))
    assert len(sweep.runs()) == expected


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("stpr_")])
def test_rows_of_the_paper_are_one_call(store, tmp_path, name):
    sweep = Sweep.read(FOLDER / f"{name}.toml")
    options, grid = {"stpr": {**sweep.options.get("stpr", {}), **SMALL}}, ends(sweep.grid)
    table = ablate(store, sweep.heads, "1+1x1", grid, 1, options=options, out=tmp_path,
                   runtime=Runtime(serial=True))  # fmt: skip
    assert table.attrs["errors"] == []
    assert len(table) == math.prod(map(len, grid.values()))
    runs = {tuple(r[f"option.{key}"] for key in grid): r for r in table.attrs["runs"]}
    assert len(runs) == len(table)
    for record in runs.values():
        cost = json.loads((Path(record["run"]) / "cost.json").read_bytes())
        # Adapters everywhere: all blocks run, from the first cached feature on, and none before.
        ran = set().union(*cost["stages_recomputed"])
        adapted = record["option.adapters"] in ("all", '"all"')
        assert {"blocks.0.mlp", "blocks.11.mlp", "proj"} <= ran if adapted else not ran
        assert not ran & {"stem", "blocks.0.attn"}
        experts = record.get("option.routing") != "none"
        assert (record["cost.trainable"] > 0) == (experts or adapted)


@pytest.fixture(scope="module")
def maps(dataset, built_once, tmp_path_factory) -> FeatureStore:
    spec = BuildSpec(("resnet18:random-0",), keep=("layer2.1", "layer3.1", "layer4.0", "pool"),
                     frames=2)  # fmt: skip
    path = tmp_path_factory.mktemp("maps") / "s.zarr"
    shutil.copytree(built_once(dataset(CLASSES, 3), spec), path)  # runs add teacher features
    return FeatureStore.open(path)


@pytest.mark.parametrize(
    "name",
    [
        "hce_parts",
        "hce_levels",
        "hce_scalar",
        "hce_sizes",
        "hf_net_gates",
        "hf_net_trn",
        "class_regularization",
        "tcd",
    ],
)
def test_rows_of_methods_that_train_blocks_are_one_call(maps, tmp_path, name):
    sweep = Sweep.read(FOLDER / f"{name}.toml")
    (head,) = sweep.heads
    options, grid = sweep.options.get(head, {}), ends(sweep.grid)
    options = {head: {**options, "first_epochs": 1, "epochs": 1}}
    table = ablate(maps, head, "1+1x1", grid, 1, options=options, out=tmp_path,
                   runtime=Runtime(serial=True))  # fmt: skip
    assert table.attrs["errors"] == []
    assert len(table) == math.prod(map(len, grid.values()))
    first = "layer3.0" if name == "hf_net_gates" else "layer4.0"
    for record in table.attrs["runs"]:
        cost = json.loads((Path(record["run"]) / "cost.json").read_bytes())
        for calls in cost["stages_recomputed"]:
            assert min(name for name in calls if name.startswith("layer")) == first


JOINT = {"joint_hmdb51": 51, "joint_ucf101": 101, "joint_ssv2": 174}


@pytest.mark.parametrize("name", JOINT)
def test_joint_training_is_one_task_of_all_classes(name):
    sweep, first = (Sweep.read(FOLDER / f"{n}.toml") for n in (name, "joint_hmdb51"))
    classes = [str(number) for number in range(JOINT[name])]
    assert [len(task) for task in make_scenario(sweep.scenario, classes).tasks] == [JOINT[name]]
    assert (sweep.heads, sweep.grid, sweep.options) == (first.heads, first.grid, first.options)
    assert list(sweep.splits) == ["train", "validation" if name == "joint_ssv2" else "test"]


def test_all_classes_at_once_over_several_splits_are_one_call(maps, dataset, built_once, tmp_path):
    sweep = Sweep.read(FOLDER / "joint_hmdb51.toml")
    spec = BuildSpec(("resnet18:random-0",), keep=("layer3.1", "pool"), frames=2)
    stores = [maps, built_once(dataset(CLASSES, 4), spec)]
    options = {head: {**sweep.options[head], "first_epochs": 1} for head in sweep.heads}
    table = ablate(stores, sweep.heads, "0+2x1", sweep.grid, 1, options=options, out=tmp_path,
                   runtime=Runtime(serial=True))  # fmt: skip
    assert table.attrs["errors"] == []
    assert table["n"].tolist() == [2] * 4
    runs = pd.DataFrame(table.attrs["runs"])
    assert runs.groupby("store").size().tolist() == [4, 4]
    for head, rows in runs.groupby("head"):
        means = table.loc[table["head"] == head, "cnn.final.mean"]
        assert means.mean() == pytest.approx(rows["cnn.final"].mean())
    assert "nme.final.mean" not in table  # no exemplars


def test_rivals_train_the_same_blocks_in_one_call(maps, tmp_path):
    sweep = Sweep.read(FOLDER / "field.toml")
    assert {*Sweep.read(FOLDER / "rivals.toml").heads} < {*sweep.heads}
    short = {"first_epochs": 1, "epochs": 1, "condense_epochs": 1, "tune_epochs": 1}
    short |= {"correct_epochs": 1, "features": 64}
    options = {
        source.name: {k: v for k, v in short.items() if k in option_defaults(source.build)}
        for source in sweep.sources()
    }
    table = ablate(maps, sweep.heads, "1+1x1", {"blocks": [1]}, 1, options=options, out=tmp_path,
                   runtime=Runtime(serial=True))  # fmt: skip
    assert table.attrs["errors"] == []
    assert len(table) == len(sweep.heads)
    trains = {source.name: "blocks" in option_defaults(source.build) for source in sweep.sources()}
    assert sum(trains.values()) >= 13
    for record in table.attrs["runs"]:
        cost = json.loads((Path(record["run"]) / "cost.json").read_bytes())
        for calls in cost["stages_recomputed"]:
            maps_of = [stage for stage in calls if stage.startswith("layer")]
            assert maps_of == (["layer4.1"] if trains[record["head"]] else [])


def test_the_parts_of_had_are_one_call(dataset, built_once, tmp_path):
    spec = BuildSpec((NAME, "mel_resnet18:random-0"), keep=("proj", "pool"), frames=2)
    store = FeatureStore.open(built_once(dataset(CLASSES, 3), spec))
    sweep = Sweep.read(FOLDER / "had.toml")
    options = {"had": {"width": 16, "ffn": 16, "epochs": 2, "first_epochs": 2, "budget": 8}}
    table = ablate(store, "had", "1+1x1", sweep.grid, 1, options=options, out=tmp_path,
                   runtime=Runtime(serial=True))  # fmt: skip
    assert table.attrs["errors"] == []
    assert len(table) == len(sweep.grid["parts"]) == 10
    for record in table.attrs["runs"]:
        assert record["cost.stages_recomputed"] == 0


def test_the_command_line_runs_and_sweeps(vector_store, tmp_path, varve):
    store, out = vector_store.path, tmp_path / "runs"
    output = varve("run", store, "--head", "nearest_mean", "--scenario", "2+2x2", "--out", out,
                   "--set", "time=order")  # fmt: skip
    assert output.returncode == 0
    assert "final accuracy" in output.stdout
    json_output = varve("run", store, "--head", "nearest_mean", "--scenario", "2+2x2", "--out", out,
                        "--set", "time=order", "--json")  # fmt: skip
    facts = json.loads(json_output.stdout)
    assert facts["spec"]["options"]["time"] == "order"
    assert varve("run", store, "--head", "nearest_mean", "--scenario", "2+2x2", "--set",
                 "time").returncode == 2  # fmt: skip

    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        'heads = ["nearest_mean"]\nscenario = "demo"\n[grid]\ntime = ["mean", "order"]\n'
    )
    for form in ("csv", "parquet", "tex"):
        output = varve("ablate", store, sweep, "--scenario", "2+2x2", "--out", out, "--serial",
                       "--table", tmp_path / f"table.{form}")  # fmt: skip
        assert output.returncode == 0
        assert [line.split()[:2] for line in output.stdout.splitlines()[-2:]] == [
            ["nearest_mean", "mean"], ["nearest_mean", "order"],
        ]  # fmt: skip
        assert (tmp_path / f"table.{form}").stat().st_size > 100
    twice = varve("ablate", store, store, sweep, "--scenario", "2+2x2", "--out", out, "--serial")
    assert twice.returncode == 2
    assert "a store for each split, and each once" in " ".join(twice.stderr.split())
    records = json.loads(varve("ablate", store, sweep, "--scenario", "2+2x2", "--out", out,
                               "--serial", "--json").stdout)  # fmt: skip
    assert [record["n"] for record in records] == [3, 3]
    finished = results.read(out)
    assert finished["finished"].all()
    assert len(finished) == 6
