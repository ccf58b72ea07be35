"""A user's metric and scenario: one function each, from the command line, Python and processes."""

import json
import subprocess
import sys

import pytest

from varve import ablate, load_plugin, run
from varve.pipeline import registry
from varve.pipeline.experiments import results
from varve.pipeline.experiments.run_folder import Run

SCENARIO = """
from varve import register

@register("scenarios")
def pairs(classes, seed):
    ordered = sorted(classes, reverse=bool(seed % 2))
    return [ordered[i : i + 2] for i in range(0, len(ordered), 2)]
"""
METRIC = """
from varve import register

@register("metrics")
def newest(matrix):
    return matrix.accuracy[-1, -1]
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write and load a file; remove what it registered after the test."""
    monkeypatch.setenv(registry.VARIABLE, "")
    before = {kind: registry.available(kind) for kind in ("scenarios", "metrics")}

    def load(name, text):
        (tmp_path / name).write_text(text)
        load_plugin(tmp_path / name)

    def unload():
        for kind, names in before.items():
            for name in set(registry.available(kind)) - set(names):
                registry.unregister(kind, name)

    load.unload = unload
    yield load
    unload()


def test_a_scenario_is_one_function_and_its_text_names_the_run(vector_store, plugin, tmp_path):
    plugin("mine.py", SCENARIO)
    done = run(vector_store, "nearest_mean", "pairs", seed=3, out=tmp_path / "runs")
    assert done.spec["tasks"] == [["fox", "elk"], ["dog", "cat"], ["bee", "ant"]]
    assert done.spec["scenario_source"] == registry.source_digest("scenarios", "pairs") != ""
    plugin.unload()
    plugin("edited.py", SCENARIO + "# edited")
    again = run(vector_store, "nearest_mean", "pairs", seed=3, out=tmp_path / "runs")
    assert again.spec["tasks"] == done.spec["tasks"]
    assert again.folder != done.folder


def test_both_are_there_in_the_processes_of_an_ablation(vector_store, plugin, tmp_path, client):
    plugin("mine.py", SCENARIO + METRIC)
    table = ablate(vector_store, "nearest_mean", "pairs", {"time": ["mean", "order"]}, 2,
                   out=tmp_path / "runs", client=client)  # fmt: skip
    assert table.attrs["errors"] == []
    assert table["scenario"].tolist() == ["pairs", "pairs"]
    assert table["n"].tolist() == [2, 2]
    for record in table.attrs["runs"]:
        assert Run.read(record["run"]).metrics["cnn"]["newest"] == record["cnn.newest"]


def test_a_metric_is_one_function_and_is_in_every_table(vector_store, plugin, tmp_path):
    before = run(vector_store, "icarl", "2+2x2", options={"epochs": 1}, out=tmp_path / "runs")
    plugin("mine.py", METRIC)
    newest = before.matrix.accuracy[-1, -1]
    assert before.matrix.metric("newest") == newest
    records = results.read(before.folder)  # of a run that finished before there was the metric
    assert records["cnn.newest"].tolist() == [newest]
    assert records["nme.newest"].tolist() == [before.nme.accuracy[-1, -1]]
    table = results.summary(records)
    assert "CNN newest" in results.text(table)
    assert "NME newest" in results.latex(table)
    after = run(vector_store, "nearest_mean", "2+2x2", out=tmp_path / "runs")
    assert after.metrics["cnn"]["newest"] == after.matrix.accuracy[-1, -1]
    assert len(after.metrics["cnn"]["after_each_task"]["newest"]) == 3


def test_the_command_takes_both(vector_store, plugin, tmp_path, varve):
    plugin("mine.py", SCENARIO + METRIC)
    done = varve("run", vector_store.path, "--head", "nearest_mean", "--scenario", "pairs",
                 "--out", tmp_path / "runs")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 tasks" in done.stdout
    assert "newest" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("return [classes[:1], ['gnu']]", "tasks of pairs: 1 of 2 entries are no class"),
        ("return [classes, classes[:1]]", "tasks of pairs: listed twice: ant"),
        ("return [classes, []]", "tasks of pairs: neither a list"),
        ("return 3", "the scenario 'pairs' failed on 6 classes with seed 1000: TypeError"),
        ("return 1 / 0", "the scenario 'pairs' failed .*: ZeroDivisionError: division"),
    ],
)
def test_a_scenario_that_gives_no_tasks_is_refused(vector_store, plugin, tmp_path, text, message):
    plugin("mine.py", "from varve import register\n@register('scenarios')\n"
           f"def pairs(classes, seed):\n    {text}\n")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        run(vector_store, "nearest_mean", "pairs", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("1 / 0", "ZeroDivisionError"), ("return 'x'", "ValueError"), ("return 1e999", "infinite")],
)
def test_a_metric_that_gives_no_number_is_named(vector_store, plugin, tmp_path, text, message):
    done = run(vector_store, "nearest_mean", "2+2x2", out=tmp_path / "runs")
    plugin("mine.py", "from varve import register\n@register('metrics')\n"
           f"def newest(matrix):\n    {text}\n")  # fmt: skip
    with pytest.raises(ValueError, match=f"the metric 'newest' failed .* {message}"):
        done.matrix.metric("newest")


def test_a_name_of_varve_is_not_taken(plugin):
    for name, text in (("final", METRIC.replace("newest", "final")),
                       ("demo", SCENARIO.replace("pairs", "demo"))):  # fmt: skip
        with pytest.raises(ValueError, match=f"'{name}' already.*; give .* another name"):
            plugin(f"{name}.py", text)


def test_contract_suites_judge_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text(SCENARIO + METRIC)
    done = subprocess.run(
        [sys.executable, "-m", "varve.contracts", "--scenario", "mine.py", "--metric", "mine.py",
         "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout


def test_a_run_folder_of_another_format_is_refused(vector_store, tmp_path):
    done = run(vector_store, "nearest_mean", "2+2x2", out=tmp_path)
    spec = json.loads((done.folder / "spec.json").read_text())
    for number in (None, 1):
        old = {**spec, "format": number} if number else {k: spec[k] for k in spec if k != "format"}
        (done.folder / "spec.json").write_text(json.dumps(old))
        for read in (Run.read, results.read):
            with pytest.raises(ValueError, match="is a run folder of format 1, and this version"):
                read(done.folder)
