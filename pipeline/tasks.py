"""Tasks: classes that arrive group by group, and the accuracy matrix of a head that learns them.

Shapes: N clips, T frames, D feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heads import Head, Task
from heads.parts.clips import Clips
from pipeline.tensors import FeatureTensors
from stores import Feature


@dataclass(frozen=True)
class Matrix:
    """Accuracy by stage and task, the one table that every figure is taken from.

    Attributes:
        accuracy: float64 [stages, tasks]: share of task j's test clips that are named rightly
            after task i; NaN above the diagonal.
        clips: int64 [tasks]: test clips of each task.
    """

    accuracy: np.ndarray
    clips: np.ndarray

    def stage(self, i: int) -> float:
        """Accuracy over all classes seen after task i, every clip counting alike."""
        seen = slice(0, i + 1)
        return float(np.average(self.accuracy[i, seen], weights=self.clips[seen]))

    @property
    def final(self) -> float:
        return self.stage(len(self.clips) - 1)

    @property
    def average_incremental(self) -> float:
        """Mean of the stage accuracies, the first task's included."""
        return float(np.mean([self.stage(i) for i in range(len(self.clips))]))


def split_classes(count: int, base: int, increment: int) -> list[list[int]]:
    """Class numbers of each task: the first `base`, then `increment` at a time.

    Raises:
        ValueError: The classes do not come out even.

    >>> split_classes(7, base=3, increment=2)
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    if not 0 < base <= count or increment < 1 or (count - base) % increment:
        raise ValueError(f"{count} classes are no {base} and then tasks of {increment}")
    starts = range(base, count, increment)
    return [list(range(base)), *(list(range(a, a + increment)) for a in starts)]


def learn_by_task(
    head: Head,
    feature: Feature,
    numbers: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    tasks: Sequence[Sequence[int]],
) -> Matrix:
    """Show a head the tasks in turn; after each, test it on every class it has seen.

    Args:
        head: Learns; it is given each training clip once.
        feature: What it sees of a clip, (T, ...) with everything after T laid flat.
        numbers: Class number of every row of the table.
        train: Row ids to learn from.
        test: Row ids to test on.
        tasks: Class numbers of each task.

    Raises:
        ValueError: A task has no clip to learn from or none to test on.
    """
    accuracy = np.full((len(tasks), len(tasks)), np.nan)
    counts = np.zeros(len(tasks), np.int64)
    seen: list[tuple[Clips, np.ndarray]] = []
    for i, classes in enumerate(tasks):
        fit, held_out = (rows[np.isin(numbers[rows], classes)] for rows in (train, test))
        if not len(fit) or not len(held_out):
            raise ValueError(
                f"task {i} (classes {list(classes)}) has {len(fit)} clips to learn from and "
                f"{len(held_out)} to test on; it needs some of both"
            )
        (name,) = head.reads
        head.learn(Task(_clips(name, feature, fit, numbers), number=i))
        seen.append((_clips(name, feature, held_out, numbers), numbers[held_out]))
        counts[i] = len(held_out)
        columns = np.array(head.classes)
        for j, (clips, truth) in enumerate(seen):
            scores = torch.cat([head.scores(batch) for _, batch in clips.batches(256)])
            named = columns[scores.argmax(dim=1).numpy()]
            accuracy[i, j] = (named == truth).mean()
    return Matrix(accuracy, counts)


def _clips(name: str, feature: Feature, rows: np.ndarray, numbers: np.ndarray) -> Clips:
    cells = _Flat(FeatureTensors(feature, rows))
    return Clips({name: cells}, torch.from_numpy(numbers[rows]), torch.from_numpy(rows))


class _Flat:
    """Cells with everything after T laid flat, for heads that take one vector a frame."""

    def __init__(self, cells: FeatureTensors) -> None:
        self.cells, self.stays = cells, cells.stays

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        return self.cells[places].flatten(2)
