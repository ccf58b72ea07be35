"""Forecast: how long the runs of a sweep take on this device, from short trials.

For each head and its options, trials learn the first two tasks from 2 and from 6 clips of each
class, for one epoch; of a slow head from 2 alone. What a clip more costs counts for every clip,
exemplar and epoch of the real tasks, what is left for every task. Test clips count alike, for every
task after which they are scored, and for every expert. Nothing is written. It is a forecast: what a
head does once a clip, whatever its epochs, is counted with every epoch, and other programs share
the device.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from varve.heads import ReplaysExemplars, Routes, Task, UsesTeacher
from varve.heads.parts.clips import Clips
from varve.pipeline.experiments.run import scores_of
from varve.pipeline.experiments.run_spec import PreparedRun, prepare_run
from varve.pipeline.experiments.sweep import PlannedRun, check_stores, expand, group
from varve.pipeline.experiments.sweep_spec import Sweep
from varve.stores import FeatureStore

PER_CLASS = (2, 6)
EPOCHS = ("first_epochs", "epochs")
COLUMNS = ["head", "options", "runs", "trainings", "training_seconds", "score_seconds", "seconds"]
BATCH = 32
WARM_SECONDS, SLOW_SECONDS = 2.0, 10.0


@dataclass(frozen=True)
class Line:
    """Seconds of some work: `start`, and `each` for every clip."""

    start: float
    each: float

    @classmethod
    def through(cls, few: tuple[int, float], more: tuple[int, float]) -> "Line":
        """Return the line through two measurements of clips and seconds, nowhere negative.

        >>> Line.through((2, 1.0), (6, 3.0))
        Line(start=0.0, each=0.5)
        >>> Line.through((2, 1.0), (6, 0.9))
        Line(start=0.9, each=0.0)
        >>> Line.through((2, 1.0), (2, 1.0))
        Line(start=0.0, each=0.5)
        """
        (n, seconds), (m, longer) = few, more
        if n == m:
            return cls(0.0, longer / m)
        each = max(0.0, (longer - seconds) / (m - n))
        return cls(max(0.0, longer - each * m), each)

    def of(self, clips: int) -> float:
        return self.start + self.each * clips


def forecast(
    stores: Sequence[FeatureStore], sweep: Sweep, out: str | Path = "runs", device: str = "cpu"
) -> pd.DataFrame:
    """Forecast the seconds of the runs of a sweep that have not finished.

    Args:
        stores: As for `varve.ablate`.
        sweep: The runs.
        out: Folder of the run folders: finished runs take no time.
        device: "cpu" or "cuda". On a CPU, a run is forecast for all threads that torch uses; runs
            side by side share them.

    Returns:
        A row for each head and its options, without the seed: "head", "options" (those of the
        grid, as text), "runs" (not finished), "trainings" (runs that train alike train once),
        "training_seconds" of one training, "score_seconds" of one run, and "seconds" of all. Runs
        that train alike are measured once.

    Raises:
        ValueError, SpecMismatch: As `varve.ablate`.
    """
    runs = [planned for store in stores for planned in expand(store, sweep, Path(out), device)]
    check_stores(stores, runs)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    measured: dict[tuple[str, str], tuple[float, float]] = {}
    for members in group(runs):
        keys = [_without_seed(planned.arguments) for planned in members.runs]
        if keys[0] not in measured:
            measured[keys[0]] = _measured(members.runs[0], sweep, device)
        training, score = measured[keys[0]]
        for number, key in enumerate(keys):
            start = (*key, 0, 0, training, score, 0.0)
            row = rows.setdefault(key, dict(zip(COLUMNS, start, strict=True)))
            trains = number == 0 and members.donor is None
            row["runs"] += 1
            row["trainings"] += trains
            row["seconds"] += training * trains + score
    return pd.DataFrame([*rows.values()], columns=COLUMNS)


def _without_seed(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Return the head, and its options but the seed."""
    chosen = {**arguments["options"], **(arguments["sampled"] or {})}
    options = ", ".join(f"{name}={value}" for name, value in chosen.items() if name != "seed")
    return arguments["head"].name, options


def _measured(planned: PlannedRun, sweep: Sweep, device: str) -> tuple[float, float]:
    """Return the seconds of a whole training and of all scoring, from trials."""
    options = planned.spec["options"]
    short = {name: 1 for name in EPOCHS if options.get(name) is not None}
    arguments = planned.arguments

    def prepared() -> PreparedRun:
        train, test = sweep.splits
        return prepare_run(planned.store, arguments["head"], arguments["scenario"],
                           arguments["seed"], {**arguments["options"], **short}, sweep.backbone,
                           (train, test), device, arguments["sampled"],
                           validation=sweep.validation)  # fmt: skip

    few = _trial(prepared(), PER_CLASS[0])
    if few.seconds < WARM_SECONDS:  # a first call warms up
        few = _trial(prepared(), PER_CLASS[0])
    # Of a slow head a few clips say enough: all of its time is taken for theirs.
    more = _trial(prepared(), PER_CLASS[1]) if few.seconds < SLOW_SECONDS else few
    learn = [Line.through(a, b) for a, b in zip(few.learned, more.learned, strict=True)]
    score = Line.through(few.scored, more.scored)
    plan = prepared()
    training = sum(
        learn[min(task, 1)].of(clips * epochs)
        for task, (clips, epochs) in enumerate(
            zip(_clips(plan), _epochs(plan, options), strict=True)
        )
    )
    tests = np.cumsum([len(rows) for rows in plan.division.test])
    experts = np.arange(1, len(tests) + 1) / len(few.learned) if few.routes else np.ones(len(tests))
    return training, score.each * float(tests @ experts) + score.start * len(tests)


@dataclass(frozen=True)
class _Trial:
    """Clips and seconds of each learned task, and of scores; whether the head routes."""

    learned: list[tuple[int, float]]
    scored: tuple[int, float]
    routes: bool

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in (*self.learned, self.scored))


def _trial(plan: PreparedRun, per_class: int) -> _Trial:
    """Learn the first two tasks from so many clips of each class, and score as many."""
    head, learned = plan.head, []
    for task, rows in enumerate(plan.division.train[:2]):
        chosen, started = _few(plan, rows, per_class), time.perf_counter()
        memory = None
        if isinstance(head, ReplaysExemplars) and len(head.exemplars):
            memory = _with_teacher(plan, head.exemplars.numpy())
        clips, text = _with_teacher(plan, chosen), None
        if plan.class_text is not None:
            text = plan.class_text[sorted(set(clips.labels.tolist()))].to(plan.device)
        head.learn(Task(clips, task, text, memory))
        _synchronise(plan.device)
        seconds = time.perf_counter() - started
        learned.append((len(clips) + (0 if memory is None else len(memory)), seconds))
    test, started = _few(plan, plan.division.test[0], per_class), time.perf_counter()
    clips = plan.test_clips(test)
    scores_of(head.scores, clips)
    if isinstance(head, ReplaysExemplars) and len(head.exemplars):
        scores_of(head.nearest, clips)
    _synchronise(plan.device)
    routes = isinstance(head, Routes) and head.experts > 1
    return _Trial(learned, (len(clips), time.perf_counter() - started), routes)


def _few(plan: PreparedRun, rows: np.ndarray, per_class: int) -> np.ndarray:
    """Return the first rows of each class."""
    labels = plan.labels[rows]
    return np.concatenate([rows[labels == label][:per_class] for label in np.unique(labels)])


def _with_teacher(plan: PreparedRun, rows: np.ndarray) -> Clips:
    """Return clips with the teacher's outputs, where they are used; they are kept in memory."""
    head, clips = plan.head, plan.training_clips(rows, [])
    if not isinstance(head, UsesTeacher) or not head.classes or plan.network is None:
        return clips
    parts: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for _, batch in clips.batches(BATCH):
            outputs = head.suffix(batch[head.reads[0]])
            for name in head.teacher_stages:
                parts.setdefault(f"teacher {name}", []).append(outputs[plan.network.find(name)])
    teacher = {name: torch.cat(outputs) for name, outputs in parts.items()}
    return Clips({**clips.features, **teacher}, clips.labels, clips.rows)


def _clips(plan: PreparedRun) -> list[int]:
    """Return the number of clips and exemplars that each task trains on."""
    options, sizes = plan.spec["options"], [len(rows) for rows in plan.division.train]
    known = np.cumsum([0, *(len(task) for task in plan.tasks)])
    counts = []
    for task, size in enumerate(sizes):
        kept = 0
        if isinstance(plan.head, ReplaysExemplars):
            seen = sum(sizes[:task])
            budget = options.get("budget")
            kept = seen if budget is None else min(
                seen, budget if options.get("shared") else budget * int(known[task])
            )  # fmt: skip
        counts.append(size + kept)
    return counts


def _epochs(plan: PreparedRun, options: Mapping[str, Any]) -> list[int]:
    """Return the number of epochs of each task; 1 for a head without epochs."""
    first, later = (options.get(name) for name in EPOCHS)
    later = 1 if later is None else later
    return [later if task or first is None else first for task in range(len(plan.tasks))]


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
