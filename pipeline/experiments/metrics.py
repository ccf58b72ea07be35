"""Metrics: what is read off one full accuracy matrix, and off the predictions behind it.

R[i, j] is the accuracy on task j's test clips after task i, tasks counted from 0. Final and average
incremental accuracy are different numbers, printed by different papers: they never share a column.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

FIGURES = ("final", "final_over_tasks", "average_incremental", "bwf", "forgetting")


@dataclass(frozen=True, eq=False)
class Matrix:
    """Accuracy by stage and task, the one table that every figure is taken from.

    Attributes:
        accuracy: float64 [stages, tasks]: share of task j's test clips that are named rightly
            after task i; NaN above the diagonal.
        clips: int64 [tasks]: test clips of each task.

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
                "clips: a stage and a column a task is needed, and a clip in each"
            )
        seen = np.tri(tasks, dtype=bool)
        inside = (self.accuracy >= 0) & (self.accuracy <= 1)
        if not inside[seen].all() or not np.isnan(self.accuracy[~seen]).all():
            raise ValueError(
                f"accuracies\n{self.accuracy}\nare no matrix: shares from 0 to 1 belong on and "
                "below the diagonal, NaN above it, for what was not learned yet"
            )

    def stage(self, i: int) -> float:
        """Accuracy over all classes seen after task i, every clip counting alike."""
        seen = self._seen(i)
        return float(np.average(self.accuracy[i, seen], weights=self.clips[seen]))

    @property
    def final(self) -> float:
        """The last stage's accuracy, every clip counting alike (StPR, vCLIMB)."""
        return self.stage(len(self.clips) - 1)

    @property
    def final_over_tasks(self) -> float:
        """The last stage's accuracy, every task counting alike."""
        return float(self.accuracy[-1].mean())

    @property
    def average_incremental(self) -> float:
        """Mean of the stage accuracies, the first task's included (TCD, FrameMaker, HCE)."""
        return float(np.mean([self.stage(i) for i in range(len(self.clips))]))

    def bwf(self, i: int) -> float:
        """Backward forgetting after task i: mean over j < i of R[j, j] - R[i, j].

        Positive means forgetting. NaN after the first task, which has none before it.
        """
        earlier = self._seen(i)[:-1]
        return _mean(np.diag(self.accuracy)[earlier] - self.accuracy[i, earlier])

    def forgetting(self, i: int, now: bool = True) -> float:
        """As `bwf`, with a task's best accuracy so far in place of its first.

        Args:
            now: The best may be that after task i itself, so that nothing is below 0 (PILOT);
                False takes the best before it (AV-CIL).
        """
        earlier = self._seen(i)[:-1]
        best = np.fmax.reduce(self.accuracy[: i + now, earlier], axis=0, initial=-np.inf)
        return _mean(best - self.accuracy[i, earlier])

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[float]], clips: Sequence[int] | np.ndarray
    ) -> "Matrix":
        """From the accuracies after each task on the tasks so far: [[a], [b, c], [d, e, f]]."""
        accuracy = np.full((len(rows), len(rows)), np.nan)
        for i, row in enumerate(rows):
            if len(row) != i + 1:
                raise ValueError(f"after task {i} there are {i + 1} tasks to test, not {len(row)}")
            accuracy[i, : i + 1] = row
        return cls(accuracy, np.asarray(clips, np.int64))

    @classmethod
    def from_json(cls, both: Mapping[str, Any], kind: str = "cnn") -> "Matrix":
        """From a run's matrix.json: {"cnn": rows, "nme": rows or null, "clips": ..., "tasks": ...}.

        Raises:
            ValueError: It has no such matrix.
        """
        try:
            rows = [[math.nan if x is None else float(x) for x in row] for row in both[kind]]
            return cls(np.array(rows, np.float64), np.array(both["clips"], np.int64))
        except (KeyError, TypeError) as error:
            held = ", ".join(name for name in both if both[name] is not None)
            raise ValueError(f"no matrix {kind!r} among {held or 'nothing'} ({error!r})") from None

    def to_json(self) -> list[list[float | None]]:
        """Rows of accuracies, as exact as they are; None above the diagonal."""
        return [[_none(value) for value in row] for row in self.accuracy.tolist()]

    def figures(self) -> dict[str, Any]:
        """Every figure as JSON; those after each task under "stages". None stands for NaN."""
        stages = range(len(self.clips))
        by_stage = {
            "accuracy": [self.stage(i) for i in stages],
            "bwf": [_none(self.bwf(i)) for i in stages],
            "forgetting": [_none(self.forgetting(i)) for i in stages],
        }
        return {
            "final": self.final,
            "final_over_tasks": self.final_over_tasks,
            "average_incremental": self.average_incremental,
            "bwf": _none(self.bwf(stages[-1])),
            "forgetting": _none(self.forgetting(stages[-1])),
            "stages": by_stage,
        }

    def _seen(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self.clips):
            raise IndexError(f"no task {i}; there are {len(self.clips)}, from 0")
        return np.arange(i + 1)


def side_by_side(**matrices: Matrix | None) -> pd.DataFrame:
    """The FIGURES of several matrices, a row each: `side_by_side(cnn=run.matrix, nme=run.nme)`."""
    told = {name: matrix.figures() for name, matrix in matrices.items() if matrix is not None}
    return pd.DataFrame.from_dict(told, orient="index")[list(FIGURES)].astype(float)


def from_predictions(
    predictions: pd.DataFrame, tasks: Sequence[Sequence[str]], classifier: str = "cnn"
) -> Matrix:
    """The matrix of a run's predictions.

    Args:
        predictions: Columns stage, row, label, classifier, top1: a row for every test clip of the
            tasks up to the stage, at every stage.
        tasks: Class names of each task.
        classifier: Which rows are meant.

    Raises:
        ValueError: They are not the predictions of such a run.
    """
    task = {label: j for j, labels in enumerate(tasks) for label in labels}
    mine = predictions[predictions["classifier"] == classifier]
    columns = mine["label"].map(task)
    if columns.isna().any():
        strange = sorted(set(mine["label"][columns.isna()]))
        raise ValueError(f"predictions of clips of no task: {', '.join(strange[:5])}")
    cells = (mine["label"] == mine["top1"]).groupby([mine["stage"], columns.astype(int)])
    hits, clips = (
        found.unstack().reindex(index=range(len(tasks)), columns=range(len(tasks))).to_numpy()
        for found in (cells.sum(), cells.size())
    )
    counts = np.diag(clips)
    expected = np.where(np.tri(len(tasks)), counts, np.nan)
    if not np.array_equal(clips, expected, equal_nan=True) or np.isnan(counts).any():
        raise ValueError(
            f"{len(mine)} predictions of {classifier!r} (there are those of "
            f"{', '.join(sorted(set(predictions['classifier']))) or 'none'}) are not, at every "
            f"stage, of all clips of the tasks so far; clips by stage and task:\n{clips}"
        )
    return Matrix(hits / counts, counts.astype(np.int64))


def confusion(labels: Sequence[str], named: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """How many clips of each class (rows) were given each name (columns), in order of `classes`.

    Raises:
        ValueError: A label or a name is none of the classes.
    """
    if strange := sorted({*labels, *named}.difference(classes)):
        raise ValueError(f"no class {', '.join(map(repr, strange[:5]))} among {len(classes)}")
    place = {label: i for i, label in enumerate(classes)}
    counts_CC = np.zeros((len(classes), len(classes)), np.int64)
    rows, columns = ([place[label] for label in one] for one in (labels, named))
    np.add.at(counts_CC, (rows, columns), 1)
    return pd.DataFrame(counts_CC, pd.Index(classes, name="label"), pd.Index(classes, name="named"))


def per_class(labels: Sequence[str], named: Sequence[str]) -> pd.DataFrame:
    """Accuracy of each class that has clips, and the class that most of its others were taken for.

    Returns:
        Indexed by label, sorted: clips, accuracy, confused_with ("" where all are right; of
        equals the first by name), confused_share of the class's clips.

    Raises:
        ValueError: There is no clip.
    """
    if not labels:
        raise ValueError("no clip to count: give a label for each of some clips")
    table = confusion(labels, named, sorted({*labels, *named}))
    counts_CC = table.to_numpy()
    clips_C = counts_CC.sum(axis=1)
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    with_C, worst_C = wrong_CC.argmax(axis=1), wrong_CC.max(axis=1)
    share_C = np.maximum(clips_C, 1)
    found = pd.DataFrame(
        {
            "clips": clips_C,
            "accuracy": np.diag(counts_CC) / share_C,
            "confused_with": np.where(worst_C > 0, table.columns.to_numpy(object)[with_C], ""),
            "confused_share": worst_C / share_C,
        },
        table.index,
    )
    return found[found["clips"] > 0]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _none(value: float) -> float | None:
    return None if math.isnan(value) else value
