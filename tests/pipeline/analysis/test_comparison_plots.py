"""Comparisons draw the numbers of the runs, which are read back from the axes."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from varve.pipeline.analysis import comparison_plots
from varve.pipeline.experiments.metrics import Matrix
from varve.pipeline.experiments.run_folder import Run

TASKS = [["ant", "bee"], ["cat"], ["dog"]]
CLIPS = (4, 6, 2)


def random_run(rng: np.random.Generator, seed: int, cost: float, nme=False, tasks=TASKS) -> Run:
    def matrix() -> Matrix:
        return Matrix.from_rows([rng.random(i + 1).tolist() for i in range(len(CLIPS))], CLIPS)

    costs = {"multiply_adds": cost, "seconds": [1.0, 2.0, cost], "stages_recomputed": [{}] * 3}
    return Run(Path(), {"tasks": tasks, "seed": seed}, matrix(), matrix() if nme else None, {},
               costs)  # fmt: skip


@pytest.fixture
def runs() -> dict[str, list[Run]]:
    rng = np.random.default_rng(3)
    kinds = {"plain": (10, (1, 2, 3)), "gates": (500, (3, 1, 2)), "one": (50, (2,))}
    return {
        name: [random_run(rng, seed, cost + seed, nme=True) for seed in seeds]
        for name, (cost, seeds) in kinds.items()
    }


def accuracy(matrix: Matrix, task: int) -> float:
    """Accuracy after a task over all clips so far, in per cent, by hand."""
    right = sum(matrix.accuracy[task, j] * CLIPS[j] for j in range(task + 1))
    return 100 * right / sum(CLIPS[: task + 1])


@pytest.mark.parametrize("classifier", ["cnn", "nme"])
def test_points_are_means_over_seeds_at_their_mean_costs(runs, classifier):
    axes = comparison_plots.against_cost(runs, classifier=classifier).axes[0]
    assert len(axes.containers) == len(runs)
    for container, (name, alike) in zip(axes.containers, runs.items(), strict=True):
        matrices = [run.matrix if classifier == "cnn" else run.nme for run in alike]
        values = [accuracy(matrix, 2) for matrix in matrices]
        mean = statistics.mean(values)
        point, _, bars = container.lines
        assert point.get_xdata().item() == pytest.approx(
            statistics.mean(run.cost["multiply_adds"] for run in alike)
        )
        assert point.get_ydata().item() == pytest.approx(mean)
        assert container.get_label() == f"{name} (n = {len(alike)})"
        if len(alike) == 1:
            assert not container.has_yerr
            continue
        ((_, low), (_, high)) = bars[0].get_segments()[0]
        deviation = statistics.stdev(values)
        assert (low, high) == pytest.approx((mean - deviation, mean + deviation))
    assert axes.get_xscale() == "log"  # from 12 to 502
    assert "multiply-adds" in axes.get_xlabel()
    assert axes.get_ylabel() == "final accuracy (%)"


def test_costs_of_tasks_are_summed_and_other_costs_may_be_given(runs):
    axes = comparison_plots.against_cost(runs, "seconds").axes[0]
    seconds = [c.lines[0].get_xdata().item() for c in axes.containers]
    assert seconds == pytest.approx([15, 505, 55])
    figure = comparison_plots.against_cost(runs, {"plain": 3.0, "gates": 5.0, "one": 4.0})
    costs = [c.lines[0].get_xdata().item() for c in figure.axes[0].containers]
    assert costs == [3.0, 5.0, 4.0]
    assert figure.axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("metric", ["final", "bwf"])
def test_the_front_has_the_configurations_that_no_other_one_beats(metric):
    rng = np.random.default_rng(0)
    runs = {str(n): [random_run(rng, 1, float(rng.integers(1, 6)))] for n in range(12)}
    axes = comparison_plots.against_cost(runs, metric=metric).axes[0]
    sign = -1 if metric == "bwf" else 1  # less forgetting is better
    points = [
        (each[0].cost["multiply_adds"], sign * 100 * each[0].matrix.metric(metric))
        for each in runs.values()
    ]
    best: dict[float, float] = {}
    for cost, value in sorted(points):
        if all(value > other for other in best.values()):
            best[cost] = value
    line = next(line for line in axes.lines if line.get_label() == "Pareto front")
    drawn = zip(line.get_xdata(), line.get_ydata(), strict=True)
    assert dict(drawn) == pytest.approx({cost: sign * value for cost, value in best.items()})
    larger = [c.lines[0].get_markersize() > 8 for c in axes.containers]
    assert larger == [best.get(cost) == value for cost, value in points]


def test_equal_points_are_all_on_the_front():
    costs, values = np.array([1.0, 1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.5, 0.6])
    assert comparison_plots.pareto(costs, values) == [0, 1, 3]


def test_costs_that_runs_lack_are_refused(runs):
    with pytest.raises(ValueError, match="no cost 'watts'; there are numbers for multiply_adds"):
        comparison_plots.against_cost(runs, "watts")
    with pytest.raises(ValueError, match="no cost 'gates'"):
        comparison_plots.against_cost(runs, {"plain": 1.0})
    with pytest.raises(ValueError, match="no cost 'stages_recomputed'"):
        comparison_plots.against_cost(runs, "stages_recomputed")
    bare = random_run(np.random.default_rng(0), 1, 1.0)
    with pytest.raises(ValueError, match="0 of 1 runs have 'nme'"):
        comparison_plots.against_cost({"bare": [bare]}, classifier="nme")
    with pytest.raises(ValueError, match="no runs"):
        comparison_plots.against_cost({})


def test_changes_are_differences_of_equal_seeds(runs):
    axes = comparison_plots.change(runs, "plain").axes[0]
    zero, *lines = axes.lines
    assert set(zero.get_ydata()) == {0}
    assert zero.get_label() == "baseline: plain (n = 3)"
    assert [line.get_label() for line in lines] == ["gates (n = 3)", "one (n = 1)"]
    plain = {run.spec["seed"]: run.matrix for run in runs["plain"]}
    assert len(axes.collections) == 1  # a single seed has no band
    for line, name in zip(lines, ("gates", "one"), strict=True):
        for task in range(3):
            differences = [
                accuracy(run.matrix, task) - accuracy(plain[run.spec["seed"]], task)
                for run in runs[name]
            ]
            assert line.get_xdata()[task] == task
            mean = statistics.mean(differences)
            assert line.get_ydata()[task] == pytest.approx(mean)
            if name == "gates":
                corners = axes.collections[0].get_paths()[0].vertices
                heights = corners[corners[:, 0] == task, 1]
                deviation = statistics.stdev(differences)
                assert heights.min() == pytest.approx(mean - deviation)
                assert heights.max() == pytest.approx(mean + deviation)
    assert axes.get_xlabel() == "after learning task"
    assert axes.get_ylabel() == "change of final accuracy (percentage points)"


def test_a_metric_that_is_undefined_after_the_first_task_begins_with_the_second(runs):
    line = comparison_plots.change(runs, "plain", "bwf").axes[0].lines[1]
    assert np.isnan(line.get_ydata()).tolist() == [True, False, False]


def test_runs_that_no_baseline_matches_are_refused(runs):
    with pytest.raises(ValueError, match="no baseline 'mean'"):
        comparison_plots.change(runs, "mean")
    with pytest.raises(ValueError, match="plain"):
        comparison_plots.change({"plain": runs["plain"]}, "plain")
    with pytest.raises(ValueError, match="one has no run of seed 1, 3"):
        comparison_plots.change({"plain": runs["plain"], "one": runs["one"]}, "one")
    other = random_run(np.random.default_rng(0), 2, 1.0, tasks=[["ant"], ["bee"], ["cat"]])
    with pytest.raises(ValueError, match="plain has no run of seed 2 on the same tasks"):
        comparison_plots.change({"plain": runs["plain"], "other": [other]}, "plain")
