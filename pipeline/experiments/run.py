"""Runs: one head through one scenario on one store, in a run folder.

For each task `RunState` trains the head (`learn_task`), appends a row to the accuracy matrix
(`evaluate`), and saves what a resumed run needs (`commit`); after the last task `finish` writes the
results. The files are those of `varve.pipeline.experiments.run_folder`.

A killed run resumes after its last complete task with the same numbers, on a CPU to the bit.
"""

import contextlib
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from varve.heads import ReplaysExemplars, ReportsDiagnostics, Task, UsesTeacher
from varve.heads.parts.clips import Batch, Clips
from varve.pipeline.backbones import precision_warning
from varve.pipeline.experiments import checkpoints, head_source, teacher_features
from varve.pipeline.experiments.cost import memory_peak, multiply_adds
from varve.pipeline.experiments.metrics import Matrix
from varve.pipeline.experiments.run_folder import CNN, NME, Run, write_json
from varve.pipeline.experiments.run_spec import PreparedRun, prepare_run, training_digest
from varve.pipeline.experiments.scenarios import ClassList, Scenario
from varve.pipeline.progress import Progress
from varve.stores import Feature, FeatureStore, SpecMismatch, atomic, lock
from varve.stores.digests import digest

SCORE_BATCH_BYTES = 64 << 20
TOP = 5
TRAINING_COSTS = ("seconds", "peak_memory_bytes", "bytes_read", "stages_recomputed")


def run(
    store: str | Path | FeatureStore,
    head: str | Path | head_source.HeadSource,
    scenario: str | Scenario,
    *,
    seed: int = 1000,
    options: Mapping[str, Any] | None = None,
    backbone: str = "",
    splits: tuple[str, str] = ("train", "test"),
    sampled: Mapping[str, Any] | None = None,
    order: ClassList | None = None,
    only: ClassList | None = None,
    validation: float = 0.0,
    out: str | Path = "runs",
    device: str = "cpu",
    threads: int = 0,
    keep_checkpoints: bool = True,
    states_from: str | Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train a head on the classes of a store task by task, and evaluate it after each.

    A finished run of the same specification is returned as it is; an unfinished one is resumed.

    Args:
        store: A store with the features that the head reads.
        head: A file name in `heads/`, or the path of a user's file (METHODS.md). The run is named
            by the stem and the text of the file, wherever it lies, and keeps a copy.
        scenario: A registered scenario, `BASE+KxN`, or a `Scenario`.
        seed: Seed of the class order, and of the head where `options` has none for it.
        options: Options of the head.
        backbone: The backbone whose features are read, where the store has several.
        splits: The splits to train on and to test on.
        sampled: Frames to read of a store of whole videos: options of `FeatureStore.sampled`, such
            as {"frames": 8, "sampling": "tsn"}.
        order: The classes as they arrive, or a file of them; see `make_scenario`.
        only: The classes to shuffle, or a file of them.
        validation: Share of the training clips of each class to test on in the place of the test
            split, and not to train on: to choose options by. See `scenarios.divide`.
        out: Folder in which the run folder is made.
        device: Where the head works: "cpu" or "cuda".
        threads: Number of threads of torch; 0 leaves it as it is. A resumed run takes the number
            that it was started with.
        keep_checkpoints: Whether checkpoints stay when the run has finished.
        states_from: A finished run that differs only in inference-only options
            (`varve.heads.HasInferenceOptions`): its checkpoints take the place of training, and
            `cost` has what the training cost there. The head is trained where they are gone.

    Raises:
        ValueError: No such head, option, scenario or backbone; classes without clips; a file that
            is no head.
        FileNotFoundError: No such file.
        SpecMismatch: The store lacks a feature; the message has the command that adds it. Or
            `states_from` was trained with another specification.
        StoreLocked: Another process works on this run.
    """
    progress = progress or Progress()
    plan = prepare_run(
        store,
        head,
        scenario,
        seed,
        options or {},
        backbone,
        splits,
        device,
        sampled,
        order,
        only,
        validation,
    )
    folder = Path(out) / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    with lock.locked(folder):
        if not (folder / "metrics.json").exists():
            atomic.clear_temporary(folder)
            with _threads(_start_or_resume(folder, plan, threads)):
                donor = None if states_from is None else _check_donor(plan, states_from)
                state = RunState(plan, folder, donor, progress)
                gc.collect()  # else memory of this run would include reference cycles of others
                for task in range(state.committed, len(plan.tasks)):
                    with memory_peak() as peak:
                        state.learn_task(task)
                        state.evaluate(task)
                    state.commit(task, peak())
                state.finish()
        if not keep_checkpoints:
            checkpoints.remove(folder)
    return Run.read(folder)


def scores_of(score: Callable[[Batch], Tensor], clips: Clips) -> Tensor:
    """Return the scores of all clips, float32 [N, C], on the CPU: the mean over their views."""
    cell_bytes = sum(cells.cell_bytes for cells in clips.features.values())  # type: ignore[attr-defined]
    size = int(min(256, max(1, SCORE_BATCH_BYTES // cell_bytes)))
    scores = [
        torch.cat([score(batch).cpu() for _, batch in view.batches(size)])
        for view in clips.each_view()
    ]
    return torch.stack(scores).mean(dim=0) if len(scores) > 1 else scores[0]


class RunState:
    """A run in progress, resumed from the last checkpoint of its folder.

    The states of the donor, a finished run, take the place of training; None to train.

    Attributes:
        committed: Number of tasks that the checkpoint has.
        accuracy: Rows of the accuracy matrix so far, by classifier ("cnn", "nme").
        costs: For each task: seconds, score_seconds, peak_memory_bytes, bytes_read and
            stages_recomputed.
        diagnostics: For each task what the head reports of its training.
        predictions: Tables of predictions so far.
        test_clips: Test clips of each task so far.
    """

    def __init__(
        self, plan: PreparedRun, folder: Path, donor: Run | None, progress: Progress
    ) -> None:
        self.plan, self.folder, self.donor, self.progress = plan, folder, donor, progress
        last, state, records = checkpoints.read(folder)
        self.committed = last + 1
        self.accuracy: dict[str, list[list[float]]] = records.get("accuracy", {CNN: [], NME: []})
        self.costs: list[dict[str, Any]] = records.get("costs", [])
        self.diagnostics: list[dict[str, float]] = records.get("diagnostics", [])
        self.predictions: list[pd.DataFrame] = []
        self.test_clips = [plan.test_clips(rows) for rows in plan.division.test[: self.committed]]
        self._train_clips: list[Clips] = []
        self._cost: dict[str, Any] = {}
        self._donated = False
        if self.committed:
            plan.head.load_state_dict(state)
            table = pd.read_parquet(folder / "predictions.parquet")
            self.predictions.append(table[table["stage"] <= last])
            progress.message(f"resuming after task {self.committed} of {len(plan.tasks)}")
        precision = plan.spec["options"].get("precision", "float32")
        if plan.device == "cpu" and (warning := precision_warning(precision)):
            progress.message(warning)

    def learn_task(self, task: int) -> None:
        """Train the head on the clips of a task and its exemplars, or load the donor's state."""
        plan, head = self.plan, self.plan.head
        rows, exemplars = plan.division.train[task], np.zeros(0, np.int64)
        if isinstance(head, ReplaysExemplars):
            exemplars = head.exemplars.numpy()
        donated = self._donated_state(task)
        self._donated = donated is not None
        teacher: list[dict[str, Feature]] = []
        if isinstance(head, UsesTeacher) and task and not donated:
            teacher = teacher_features.compute_teacher_features(
                plan, head, [*rows, *exemplars], self.folder, self.progress
            )
        clips = plan.training_clips(rows, teacher)
        memory = plan.training_clips(exemplars, teacher) if len(exemplars) else None
        self._train_clips = [clips] if memory is None else [clips, memory]
        started = time.perf_counter()
        if donated:
            state, self._cost = donated
            head.load_state_dict(state)
        else:
            text = None
            if plan.class_text is not None:
                text = plan.class_text[sorted(set(clips.labels.tolist()))].to(plan.device)
            with _epoch_bar(self.progress, f"task {task + 1}/{len(plan.tasks)}") as on_epoch_end:
                keys = digest(plan.spec["features"])
                head.learn(Task(clips, task, text, memory, on_epoch_end, keys))
            if plan.views and not head.trainable:
                raise ValueError(
                    f"views={1 + len(plan.views)}: {plan.spec['head']} trains nothing by gradient "
                    "descent, and has read the plain view alone: leave `views` out"
                )
            self._cost = {"seconds": time.perf_counter() - started}
        report = {} if donated or not isinstance(head, ReportsDiagnostics) else head.diagnostics
        self.diagnostics.append(dict(report))

    def evaluate(self, task: int) -> None:
        """Append the row of the accuracy matrix: accuracy on the test clips of each task so far."""
        head, started = self.plan.head, time.perf_counter()
        self.test_clips.append(self.plan.test_clips(self.plan.division.test[task]))
        classifiers = {CNN: head.scores}
        if isinstance(head, ReplaysExemplars) and len(head.exemplars):
            classifiers[NME] = head.nearest
        for name, score in classifiers.items():
            tables = [self._predict(score, clips) for clips in self.test_clips]
            self.accuracy[name].append([float((t["top1"] == t["label"]).mean()) for t in tables])
            predictions = pd.concat(tables, ignore_index=True)
            predictions.insert(0, "stage", task)
            predictions.insert(3, "classifier", name)
            self.predictions.append(predictions)
        self._cost["score_seconds"] = time.perf_counter() - started

    def commit(self, task: int, peak_memory_bytes: int) -> None:
        """Save the predictions, the state and the records of a task; a killed run resumes here."""
        plan, head = self.plan, self.plan.head
        calls = plan.network.calls if plan.network else Counter[str]()
        measured = {
            "peak_memory_bytes": peak_memory_bytes,
            "bytes_read": _bytes_read([*self._train_clips, *self.test_clips]),
            "stages_recomputed": dict(calls),
        }
        calls.clear()
        self._train_clips = []
        self.costs.append(measured | self._cost)  # a donor's training costs are its own
        table = pd.concat(self.predictions, ignore_index=True)
        atomic.write(
            self.folder, self.folder / "predictions.parquet", table.to_parquet(index=False)
        )
        records = {"accuracy": self.accuracy, "costs": self.costs, "diagnostics": self.diagnostics}
        checkpoints.write(self.folder, task, head.state_dict(), records)
        counts, seconds = [len(clips) for clips in self.test_clips], self._cost["seconds"]
        accuracy = np.average(self.accuracy[CNN][-1], weights=counts)
        self.progress.message(
            f"task {task + 1}/{len(plan.tasks)}: {accuracy:.1%} of {sum(counts)} clips of "
            f"{len(head.classes)} classes, "
            + ("trained by another run" if self._donated else f"trained in {seconds:.1f} s")
        )

    def finish(self) -> None:
        """Write cost.json and matrix.json, and then metrics.json, which marks the run finished."""
        plan, head = self.plan, self.plan.head
        counts = np.array([len(rows) for rows in plan.division.test])
        matrices = {name: Matrix.from_rows(rows, counts) if rows else None
                    for name, rows in self.accuracy.items()}  # fmt: skip
        exemplars = len(head.exemplars) if isinstance(head, ReplaysExemplars) else 0
        kept = plan.spec["options"].get("exemplar_frames", 0)  # time steps; 0 for all
        clip_bytes = 0
        for cells in self.test_clips[0].features.values():
            steps = cells.feature.shape[1]  # type: ignore[attr-defined]
            part = min(kept or steps, steps)
            clip_bytes += cells.cell_bytes // steps * part  # type: ignore[attr-defined]
        by_task = {name: [cost[name] for cost in self.costs] for name in self.costs[0]}
        cost = {
            "trainable": head.trainable,
            "multiply_adds": multiply_adds(head, self.test_clips[0]),
            **by_task,
            "peak_memory_bytes": max(by_task["peak_memory_bytes"]),
            "bytes_read": sum(by_task["bytes_read"]),
            "state_bytes": sum(tensor.nbytes for tensor in head.state_dict().values()),
            "exemplars": exemplars,
            "exemplar_bytes": exemplars * clip_bytes,
        }
        write_json(self.folder, "cost", cost)
        accuracies = {name: matrix and matrix.to_json() for name, matrix in matrices.items()}
        tasks = [list(task) for task in plan.tasks]
        write_json(self.folder, "matrix", accuracies | {"clips": counts.tolist(), "tasks": tasks})
        if isinstance(head, UsesTeacher):
            FeatureStore.open(plan.store).remove_reference(self.folder)  # the columns may go
        figures = {name: matrix and matrix.figures() for name, matrix in matrices.items()}
        reports: dict[str, Any] = {
            "left_out": dict(plan.division.left_out),
            "diagnostics": self.diagnostics,
        }
        if plan.division.shared:
            reports["test_clips_also_in_training"] = plan.division.shared
        write_json(self.folder, "metrics", figures | reports)

    def _donated_state(self, task: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the donor's state after a task and the cost of its training; None to train."""
        if self.donor is None:
            return None
        with contextlib.suppress(ValueError):  # an incomplete checkpoint
            number, state, records = checkpoints.read(self.donor.folder, task)
            if number == task:
                return state, {name: records["costs"][task][name] for name in TRAINING_COSTS}
        self.progress.message(
            f"{self.donor.folder} has no state after task {task + 1}: training on it"
        )
        return None

    def _predict(self, score: Callable[[Batch], Tensor], clips: Clips) -> pd.DataFrame:
        """Return row, label and the five likeliest classes of each clip, "" beyond all classes."""
        names = np.array([self.plan.classes[label] for label in self.plan.head.classes])
        scores = scores_of(score, clips)
        count = min(TOP, scores.shape[1])
        # Stable: of equal scores the class that was learned first.
        top = scores.argsort(dim=1, descending=True, stable=True)[:, :count].numpy()
        labels = np.array([self.plan.classes[label] for label in clips.labels.tolist()])
        table: dict[str, Any] = {"row": clips.rows.numpy(), "label": labels}
        for rank in range(TOP):
            table[f"top{rank + 1}"] = names[top[:, rank]] if rank < count else ""
        return pd.DataFrame(table)


def _start_or_resume(folder: Path, plan: PreparedRun, threads: int) -> int:
    """Write the specification, or check that of a started run. Return its number of threads."""
    file = folder / "spec.json"
    if file.exists():
        started = json.loads(file.read_bytes())
        if started["digest"] != plan.digest:
            raise SpecMismatch(f"{folder} is a run of another specification; remove it")
        return int(started["threads"])
    count = threads or torch.get_num_threads()
    head_source.save_source(plan.source, folder)
    origin = {"head_source": plan.source.digest, "digest": plan.digest, "store": plan.store}
    write_json(folder, "spec", {**plan.spec, **origin, "threads": count})
    return count


def _check_donor(plan: PreparedRun, folder: str | Path) -> Run:
    """Read the run whose states are to be taken, and check that it trained as this one would."""
    donor = Run.read(folder)
    spec = {name: donor.spec[name] for name in plan.spec if name in donor.spec}
    same_code = all(spec[name] == plan.spec[name] for name in ("head", "code"))
    if not same_code or training_digest(spec, plan.source) != plan.training_digest:
        raise SpecMismatch(f"{folder} was trained with another specification than {plan.name}")
    return donor


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes_read(clips: list[Clips]) -> int:
    """Return the bytes read from the store since the last call, and count from 0 again."""
    total = 0
    for part in clips:
        for cells in chain.from_iterable(view.values() for view in (part.features, *part.views)):
            total += cells.bytes_read  # type: ignore[attr-defined]
            cells.bytes_read = 0  # type: ignore[attr-defined]
    return total


@contextlib.contextmanager
def _epoch_bar(progress: Progress, name: str) -> Iterator[Callable[[int, int, float], None]]:
    """Show a bar over the epochs of a task, from the first finished one on: give the callback."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:

        def on_epoch_end(done: int, epochs: int, loss: float) -> None:
            if done == 1:
                stack.enter_context(progress.bars(started, **{name: (epochs, "epochs")}))
            progress.advance(name, 1)

        yield on_epoch_end
