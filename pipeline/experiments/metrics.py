"""Metrics: functions of one accuracy matrix, registered by their names.

R[i, j] is the accuracy on the test clips of task j after task i has been learned; tasks count from
0. A metric is a function of a `Matrix` that returns one number, with the decorator `register`.
Everything that shows metrics (metrics.json, tables, LaTeX, the command line) reads the registry, so
that a user's metric needs one function:

    from varve import register

    @register("metrics")
    def last_task(matrix):
        return matrix.accuracy[-1, -1]

Metrics are computed from the matrix of a run whenever they are asked for. A new metric therefore
applies to finished runs, too. Final and average incremental accuracy are different numbers, which
different papers print: they never share a column.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from varve.pipeline.registry import available, register, variant

CLASSIFIERS = ("cnn", "nme")  # the head's own classifier; the nearest mean of exemplars

Metric = TypeVar("Metric", bound=Callable[..., float])


@dataclass(frozen=True, eq=False)
class Matrix:
    """Accuracy after each task on each task, the table that every metric is computed from.

    Attributes:
        accuracy: float64 [tasks, tasks]: share of the test clips of task j that are classified
            correctly after task i; NaN above the diagonal.
        clips: int64 [tasks]: number of test clips of each task.

    Raises:
        ValueError: `accuracy` is not square, not of as many tasks as `clips`, not from 0 to 1 or
            not NaN above the diagonal; or a task has no clip.
    """

    accuracy: np.ndarray
    clips: np.ndarray

    def __post_init__(self) -> None:
        tasks = len(self.clips)
        if self.accuracy.shape != (tasks, tasks) or not tasks or min(self.clips) < 1:
            raise ValueError(
                f"accuracies {list(self.accuracy.shape)} for tasks of {list(self.clips)} test "
                "clips: give a row and a column for each task, and at least one clip in each"
            )
        learned = np.tri(tasks, dtype=bool)
        in_range = (self.accuracy >= 0) & (self.accuracy <= 1)
        if not in_range[learned].all() or not np.isnan(self.accuracy[~learned]).all():
            raise ValueError(
                f"accuracies\n{self.accuracy}\nare no accuracy matrix: give shares from 0 to 1 on "
                "and below the diagonal, and NaN above it, for tasks that are not learned yet"
            )

    def after(self, task: int) -> "Matrix":
        """Return the matrix as it was after a task: the first `task` + 1 rows and columns.

        Raises:
            IndexError: There is no such task.
        """
        if not 0 <= task < len(self.clips):
            raise IndexError(f"no task {task}; there are {len(self.clips)}, from 0")
        return Matrix(self.accuracy[: task + 1, : task + 1], self.clips[: task + 1])

    def metric(self, name: str) -> float:
        """Return a metric of this matrix; NaN where it is undefined.

        Raises:
            ValueError: There is no such metric, or its function fails or returns no number.
        """
        function = variant("metrics", name)
        try:
            value = float(function(self))
            if math.isinf(value):
                raise ValueError("it is infinite; return NaN where it is undefined")
            return value
        except Exception as error:
            raise ValueError(
                f"the metric {name!r} failed on a matrix of {len(self.clips)} tasks: "
                f"{type(error).__name__}: {error}"
            ) from error

    def figures(self) -> dict[str, Any]:
        """Return every metric as JSON, and under "after_each_task" its course over the tasks.

        NaN is None.
        """
        matrices = [self.after(task) for task in range(len(self.clips))]
        courses = {name: [_none(m.metric(name)) for m in matrices] for name in names()}
        return {name: values[-1] for name, values in courses.items()} | {"after_each_task": courses}

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[float]], clips: Sequence[int] | np.ndarray
    ) -> "Matrix":
        """Make a matrix of rows of growing length: [[a], [b, c], [d, e, f]]."""
        accuracy = np.full((len(rows), len(rows)), np.nan)
        for i, row in enumerate(rows):
            if len(row) != i + 1:
                raise ValueError(f"after task {i} there are {i + 1} tasks to test, not {len(row)}")
            accuracy[i, : i + 1] = row
        return cls(accuracy, np.asarray(clips, np.int64))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], classifier: str = "cnn") -> "Matrix":
        """Make a matrix of a run's matrix.json.

        Args:
            content: {"cnn": rows, "nme": rows or null, "clips": ..., "tasks": ...}.
            classifier: "cnn" or "nme".

        Raises:
            ValueError: It has no such matrix.
        """
        try:
            rows = [[math.nan if x is None else float(x) for x in r] for r in content[classifier]]
            return cls(np.array(rows, np.float64), np.array(content["clips"], np.int64))
        except (KeyError, TypeError) as error:
            present = ", ".join(name for name in content if content[name] is not None)
            raise ValueError(
                f"no matrix {classifier!r} among {present or 'nothing'} ({error!r})"
            ) from None

    def to_json(self) -> list[list[float | None]]:
        """Return the rows of accuracies with all their digits; None above the diagonal."""
        return [[_none(value) for value in row] for row in self.accuracy.tolist()]


@dataclass(frozen=True)
class Display:
    """Headings and order of a metric in tables and sentences.

    Attributes:
        title: Heading of its column in tables.
        label: Name in sentences.
        lower_is_better: Whether the best value is the lowest.
        in_tables: Whether tables show it unless they are asked for other columns.
    """

    title: str
    label: str
    lower_is_better: bool = False
    in_tables: bool = True


def display(
    title: str, label: str = "", *, lower_is_better: bool = False, in_tables: bool = True
) -> Callable[[Metric], Metric]:
    """Decorate a metric with how it is shown; see `Display`. Optional, below `register`."""

    def add(metric: Metric) -> Metric:
        vars(metric)["display"] = Display(title, label or title, lower_is_better, in_tables)
        return metric

    return add


def names() -> list[str]:
    """Names of the metrics: Varve's in the order of this file, then those of plugins, sorted."""
    known = available("metrics")
    return sorted(known, key=[*globals(), *known].index)


def display_of(name: str) -> Display:
    """Display of a metric; by default its name, where a higher value is better."""
    plain = Display(name, name.replace("_", " "))
    shown: Display = getattr(variant("metrics", name), "display", plain)
    return shown


@register("metrics")
@display("final", "final accuracy")
def final(matrix: Matrix) -> float:
    """Return the accuracy after the last task, where every clip counts alike (StPR, vCLIMB)."""
    return float(np.average(matrix.accuracy[-1], weights=matrix.clips))


@register("metrics")
@display("final (tasks)", "final accuracy over tasks")
def final_over_tasks(matrix: Matrix) -> float:
    """Return the accuracy after the last task, where every task counts alike."""
    return float(matrix.accuracy[-1].mean())


@register("metrics")
@display("avg. inc.", "average incremental accuracy")
def average_incremental(matrix: Matrix) -> float:
    """Return the mean of `final` after each task, the first included (TCD, FrameMaker, HCE)."""
    return float(np.mean([final(matrix.after(task)) for task in range(len(matrix.clips))]))


@register("metrics")
@display("BWF", lower_is_better=True)
def bwf(matrix: Matrix) -> float:
    """Return backward forgetting: the mean over earlier tasks j of R[j, j] - R[-1, j].

    Positive means forgetting. NaN after the first task, which has no earlier one.
    """
    return _mean((np.diag(matrix.accuracy) - matrix.accuracy[-1])[:-1])


@register("metrics")
@display("forgetting", lower_is_better=True, in_tables=False)
def forgetting(matrix: Matrix, include_last: bool = True) -> float:
    """Return `bwf` with the best accuracy of a task so far in the place of its first.

    Args:
        include_last: Whether the best may be that after the last task, so that nothing is below 0
            (PILOT); False takes the best before it (AV-CIL).
    """
    rows = matrix.accuracy[: len(matrix.clips) - (not include_last), :-1]
    best = np.fmax.reduce(rows, axis=0, initial=-np.inf)
    return _mean(best - matrix.accuracy[-1, :-1])


def side_by_side(**matrices: Matrix | None) -> pd.DataFrame:
    """Metrics of several matrices, a row each: `side_by_side(cnn=run.matrix, nme=run.nme)`."""
    rows = {
        label: {name: matrix.metric(name) for name in names()}
        for label, matrix in matrices.items()
        if matrix is not None
    }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def from_predictions(
    predictions: pd.DataFrame, tasks: Sequence[Sequence[str]], classifier: str = "cnn"
) -> Matrix:
    """Compute the matrix from the predictions of a run.

    Args:
        predictions: Columns stage (the last task learned), row, label, classifier, top1: a row for
            every test clip of the tasks so far, after every task.
        tasks: Class names of each task.
        classifier: "cnn" or "nme": the rows to take.

    Raises:
        ValueError: They are not the predictions of such a run.
    """
    task_of = {label: j for j, labels in enumerate(tasks) for label in labels}
    chosen = predictions[predictions["classifier"] == classifier]
    columns = chosen["label"].map(task_of)
    if columns.isna().any():
        unknown = sorted(set(chosen["label"][columns.isna()]))
        raise ValueError(f"predictions of clips of no task: {', '.join(unknown[:5])}")
    cells = (chosen["label"] == chosen["top1"]).groupby([chosen["stage"], columns.astype(int)])
    correct, clips = (
        counts.unstack().reindex(index=range(len(tasks)), columns=range(len(tasks))).to_numpy()
        for counts in (cells.sum(), cells.size())
    )
    counts = np.diag(clips)
    expected = np.where(np.tri(len(tasks)), counts, np.nan)
    if not np.array_equal(clips, expected, equal_nan=True) or np.isnan(counts).any():
        raise ValueError(
            f"{len(chosen)} predictions of {classifier!r} (there are those of "
            f"{', '.join(sorted(set(predictions['classifier']))) or 'none'}) are not, after every "
            f"task, of all clips of the tasks so far; clips after each task, by task:\n{clips}"
        )
    return Matrix(correct / counts, counts.astype(np.int64))


def confusion(
    labels: Sequence[str], predicted: Sequence[str], classes: Sequence[str]
) -> pd.DataFrame:
    """Count the clips of each class (rows) by the class predicted (columns), ordered as `classes`.

    Raises:
        ValueError: A label or a prediction is none of the classes.
    """
    if unknown := sorted({*labels, *predicted}.difference(classes)):
        raise ValueError(f"no class {', '.join(map(repr, unknown[:5]))} among {len(classes)}")
    pairs = pd.DataFrame({"label": labels, "predicted": predicted}, dtype=object)
    counts: pd.DataFrame = pd.crosstab(pairs["label"], pairs["predicted"])
    return counts.reindex(index=classes, columns=classes, fill_value=0)


def per_class(labels: Sequence[str], predicted: Sequence[str]) -> pd.DataFrame:
    """Accuracy of each class that has clips, and the class that it is most often taken for.

    Returns:
        Indexed by label, sorted: clips, accuracy, confused_with (the most frequent wrong
        prediction, of equals the first by name; "" where all are correct), confused_share (its
        share of the class's clips).

    Raises:
        ValueError: There is no clip.
    """
    if not labels:
        raise ValueError("no clip to count: give a label for each of some clips")
    table = confusion(labels, predicted, sorted({*labels, *predicted}))
    counts_CC = table.to_numpy()
    clips_C = counts_CC.sum(axis=1)
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    with_C, most_C = wrong_CC.argmax(axis=1), wrong_CC.max(axis=1)
    total_C = np.maximum(clips_C, 1)
    classes = pd.DataFrame(
        {
            "clips": clips_C,
            "accuracy": np.diag(counts_CC) / total_C,
            "confused_with": np.where(most_C > 0, table.columns.to_numpy(object)[with_C], ""),
            "confused_share": most_C / total_C,
        },
        table.index,
    )
    return classes[classes["clips"] > 0]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _none(value: float) -> float | None:
    return None if math.isnan(value) else value
