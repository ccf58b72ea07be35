"""Plots that compare configurations: accuracy against cost, and the change against a baseline.

`varve.pipeline.analysis.plots` describes what all plots share. Runs come by configuration, one for
each seed, such as from `plots.groups`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from varve.pipeline.analysis.plots import GREY, blank, style_of
from varve.pipeline.experiments.metrics import CLASSIFIERS, Matrix, display_of
from varve.pipeline.experiments.run_folder import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "trainable": "trained parameters",
    "multiply_adds": "multiply-adds a clip, computed from the cache",
    "seconds": "seconds of training",
    "score_seconds": "seconds of scoring",
    "state_bytes": "bytes of the head's state",
    "exemplar_bytes": "bytes of exemplars",
}
LOGARITHMIC = 10  # a ratio of the greatest to the smallest cost from which the axis is logarithmic


def against_cost(
    runs: Mapping[str, Sequence[Run]],
    cost: str | Mapping[str, float] = "multiply_adds",
    metric: str = "final",
    classifier: str = "cnn",
) -> "Figure":
    """Draw a metric against a cost, a point for each configuration, with the Pareto front.

    A point is the mean over the runs of a name, its bar one standard deviation (n - 1 in the
    denominator) to either side; a single run has no bar. The front joins the configurations that no
    other one beats: at most as costly and at least as good, and better in one of the two.

    Args:
        runs: Finished runs by name.
        cost: Name of a number of `Run.cost`, such as "multiply_adds", "trainable" or "seconds",
            which is summed over the tasks; or costs by the names of the runs, such as totals of
            `varve.cost` on raw video.
        metric: Name of a metric.
        classifier: "cnn" or "nme".

    Raises:
        ValueError: There are no runs, one lacks the classifier or the cost, or the metric is
            undefined for it.
    """
    lower_is_better = display_of(metric).lower_is_better
    points = []
    for name, alike in runs.items():
        values = [100 * matrix.metric(metric) for matrix in _matrices(name, alike, classifier)]
        costs = [_cost(run, name, cost) for run in alike]
        if not np.isfinite([*values, *costs]).all():
            raise ValueError(f"{name}: {metric} {values}, costs {costs}: leave it out")
        deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
        points.append((np.mean(costs), np.mean(values), deviation))
    if not points:
        raise ValueError("no runs, so there is nothing to draw")
    costs_R, values_R, deviations_R = np.array(points, np.float64).T
    figure = blank(6.4, 3.8 + 0.25 * len(runs))
    axes = figure.add_subplot()
    front = pareto(costs_R, -values_R if lower_is_better else values_R)
    axes.plot(costs_R[front], values_R[front], color=GREY, linewidth=1.2, zorder=1,
              drawstyle="steps-post", label="Pareto front")  # fmt: skip
    outline = axes.xaxis.label.get_color()  # of whatever style, not the background's
    for number, (name, alike) in enumerate(runs.items()):
        style: dict[str, Any] = style_of(number) | {"label": _label(name, alike), "markersize": 6}
        if number in front:
            style |= {"markersize": 10, "markeredgecolor": outline, "markeredgewidth": 1.5}
        bar = None if np.isnan(deviations_R[number]) else deviations_R[number]
        axes.errorbar(costs_R[number], values_R[number], bar, linestyle="none", capsize=3, **style)
    if costs_R.min() > 0 and costs_R.max() >= LOGARITHMIC * costs_R.min():
        axes.set_xscale("log")
    label = AXES.get(cost, cost) if isinstance(cost, str) else "cost"
    axes.set(xlabel=label, ylabel=f"{display_of(metric).label} (%)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center")
    return figure


def pareto(costs: np.ndarray, values: np.ndarray) -> list[int]:
    """Return the indices of the points that no other one beats, by ascending cost.

    Args:
        costs: [R], lower is better.
        values: [R], higher is better.

    >>> pareto(np.array([3.0, 1.0, 2.0, 1.0]), np.array([0.7, 0.5, 0.4, 0.3]))
    [1, 0]
    """
    front = [
        i
        for i in range(len(costs))
        if not any(
            costs[j] <= costs[i]
            and values[j] >= values[i]
            and (costs[j] < costs[i] or values[j] > values[i])
            for j in range(len(costs))
        )
    ]
    return sorted(front, key=lambda i: (costs[i], i))


def change(
    runs: Mapping[str, Sequence[Run]],
    baseline: str,
    metric: str = "final",
    classifier: str = "cnn",
) -> "Figure":
    """Draw the difference of a metric from a baseline after each task, in percentage points.

    As in StPR's Figs. 4 and 5. Each run is compared with the baseline of its own seed. A line is
    the mean of the differences, and its band one standard deviation (n - 1 in the denominator) to
    either side; a single seed has no band.

    Args:
        runs: Finished runs by name, the baseline among them.
        baseline: Name of the baseline, which is the line at 0.
        metric: Name of a metric: after task i it is that of the first tasks up to i.
        classifier: "cnn" or "nme".

    Raises:
        ValueError: There is no such baseline or nothing to compare with it, a run lacks the
            classifier, or the baseline has no run of its seed and tasks.
    """
    if baseline not in runs or len(runs) < 2:
        raise ValueError(f"no baseline {baseline!r} and another beside it among {', '.join(runs)}")
    courses = {
        name: {
            (run.spec["seed"], repr(run.spec["tasks"])): _course(matrix, metric)
            for run, matrix in zip(alike, _matrices(name, alike, classifier), strict=True)
        }
        for name, alike in runs.items()
    }
    figure = blank(6.4, 3.8 + 0.25 * len(runs))
    axes = figure.add_subplot()
    axes.axhline(
        0, color=GREY, linewidth=1.2, label=_label(f"baseline: {baseline}", runs[baseline])
    )
    for number, (name, alike) in enumerate(runs.items()):
        if name == baseline:
            continue
        missing = [seed for seed, tasks in courses[name] if (seed, tasks) not in courses[baseline]]
        if missing:
            raise ValueError(
                f"{name}: {baseline} has no run of seed {', '.join(map(str, missing))} on the same "
                "tasks; compare runs of equal seeds and scenarios"
            )
        changes_RS = np.array([x - courses[baseline][key] for key, x in courses[name].items()])
        stages, means_S = np.arange(changes_RS.shape[1]), changes_RS.mean(axis=0)
        style = style_of(number)
        axes.plot(stages, means_S, label=_label(name, alike), markersize=5, **style)
        if len(changes_RS) > 1:
            deviations_S = changes_RS.std(axis=0, ddof=1)
            axes.fill_between(stages, means_S - deviations_S, means_S + deviations_S,
                              linewidth=0.8, facecolor=(style["color"], 0.12),
                              edgecolor=(style["color"], 0.5))  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    label = display_of(metric).label
    axes.set(xlabel="after learning task", ylabel=f"change of {label} (percentage points)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center")
    return figure


def _matrices(name: str, runs: Sequence[Run], classifier: str) -> list[Matrix]:
    matrices = [run.matrix if classifier == CLASSIFIERS[0] else run.nme for run in runs]
    present = [matrix for matrix in matrices if matrix is not None]
    if classifier not in CLASSIFIERS or not present or len(present) != len(matrices):
        raise ValueError(
            f"{name}: {len(present)} of {len(matrices)} runs have {classifier!r}: draw by a "
            f"classifier that all of them have, of {', '.join(CLASSIFIERS)}"
        )
    return present


def _course(matrix: Matrix, metric: str) -> np.ndarray:
    """Return a metric in per cent after each task, [S]."""
    stages = range(len(matrix.clips))
    return 100 * np.array([matrix.after(stage).metric(metric) for stage in stages])


def _cost(run: Run, name: str, cost: str | Mapping[str, float]) -> float:
    """Return a cost of a run as one number.

    Raises:
        ValueError: There is none of that name.
    """
    costs = run.cost if isinstance(cost, str) else cost
    value = costs.get(cost if isinstance(cost, str) else name)
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, int | float) for part in parts):
        raise ValueError(
            f"{name}: no cost {cost if isinstance(cost, str) else name!r}; there are numbers for "
            f"{', '.join(n for n, x in costs.items() if not isinstance(x, dict))}"
        )
    return float(sum(parts))


def _label(name: str, runs: Sequence[Run]) -> str:
    return textwrap.fill(f"{name} (n = {len(runs)})", 75)
