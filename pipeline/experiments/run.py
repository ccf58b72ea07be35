"""Experiments: one head through one scenario on one store, in a run folder.

For each task: its clips -> learn -> scores of all test clips seen so far -> a row of the accuracy
matrix -> a checkpoint. A run folder holds

    spec.json            what decides the numbers, and its digest; see
    `varve.pipeline.experiments.run_spec` method/              of a head of one's own: its code; see
    `varve.pipeline.experiments.head_source`
    matrix.json          accuracy after each task on each task's test clips, CNN and NME
    metrics.json         written last: a folder that has it is finished
    cost.json            see `Run.cost`
    predictions.parquet  stage, row, label, classifier, top1 to top5
    checkpoints/         see `varve.pipeline.experiments.checkpoints`

A killed run goes on from its last whole task to the same numbers, on a CPU to the bit.
"""

import contextlib
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from varve.pipeline.experiments.run_spec import Prepared, learning_of, prepare
from varve.pipeline.experiments.scenarios import Scenario
from varve.pipeline.progress import Progress
from varve.stores import Feature, FeatureStore, SpecMismatch, atomic, lock

SCORE_BATCH_BYTES = 64 << 20
TOP = 5
CNN, NME = "cnn", "nme"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Where it lies.
        spec: What decided its numbers.
        matrix: Accuracy by the head's own classifier.
        nme: By the nearest mean of exemplars; None for heads that keep none.
        metrics: "cnn" and "nme", the figures of `Matrix.figures`; `left_out`, how many clips of
            the store neither taught nor tested, and why; `told`, by task what the head has to say
            of how it learned (`varve.heads.ReportsDiagnostics`).
        cost: `trainable` numbers; `multiply_adds` of the head for a clip, its network's included
            where it runs; `seconds` of learning and `score_seconds` by task; `peak_memory_bytes` of
            the process; `bytes_read` of the store; `state_bytes` and `exemplar_bytes` that the
            head keeps; `stages_recomputed`, calls of each stage by task.
    """

    folder: Path
    spec: Mapping[str, Any]
    matrix: Matrix
    nme: Matrix | None
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]

    @cached_property
    def predictions(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "predictions.parquet")

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """A finished run's folder.

        Raises:
            ValueError: It is none, or not finished.
        """
        folder = Path(folder)
        if not (folder / "metrics.json").exists():
            raise ValueError(f"{folder} is no finished run: it has no metrics.json")
        spec, both, metrics, cost = (
            json.loads((folder / f"{name}.json").read_bytes())
            for name in ("spec", "matrix", "metrics", "cost")
        )
        nme = Matrix.from_json(both, NME) if both[NME] else None
        return cls(folder, spec, Matrix.from_json(both), nme, metrics, cost)


def run(
    store: str | Path | FeatureStore,
    head: str | Path | head_source.Method,
    scenario: str | Scenario,
    *,
    seed: int = 1000,
    options: Mapping[str, Any] | None = None,
    backbone: str = "",
    splits: tuple[str, str] = ("train", "test"),
    out: str | Path = "runs",
    device: str = "cpu",
    threads: int = 0,
    keep_checkpoints: bool = True,
    learned: str | Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Teach a head the classes of a store task by task, and measure it after each.

    A finished run of the same specification is returned as it is; an unfinished one is gone on
    with.

    Args:
        store: Built, with the features that the head reads.
        head: Its file name in `heads/`, or the path of a file of one's own (METHODS.md). The run
            is named by its stem and by what the file says, and keeps a copy; not by where it lies.
        scenario: A name, `BASE+KxN`, or a scenario of one's own.
        seed: Of the class order, and of the head where `options` has no seed for it.
        options: Of the head.
        backbone: Whose features, where the store has several.
        splits: To learn from, and to test on.
        out: The run folder is made here.
        device: Where the head works.
        threads: Of torch; 0 leaves them. A resumed run takes those that it began with.
        keep_checkpoints: Whether they stay when the run has ended.
        learned: A finished run that differs in options alone which decide scores and nothing of
            what is learned (`varve.heads.HasInferenceOptions`): the states in its checkpoints are
            taken in the place
            of learning, and what that cost there is told in `cost`. Where they are gone, it learns.

    Raises:
        ValueError: No such head, option, scenario or backbone; classes that have no clips; a file
            that is no head.
        FileNotFoundError: No such file.
        SpecMismatch: The store lacks a feature; the message has the command that adds it. Or
            `learned` has learned something else.
        StoreLocked: Another process works on this run.
    """
    progress = progress or Progress()
    plan = prepare(store, head, scenario, seed, options or {}, backbone, splits, device)
    folder = Path(out) / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    with lock.locked(folder):
        if not (folder / "metrics.json").exists():
            atomic.clear_temporary(folder)
            with _threads(_written(folder, plan, threads)):
                _carry_out(
                    plan, folder, progress, None if learned is None else _teacher(plan, learned)
                )
        if not keep_checkpoints:
            checkpoints.remove(folder)
    return Run.read(folder)


def _teacher(plan: Prepared, folder: str | Path) -> Run:
    """The run whose states are taken."""
    teacher = Run.read(folder)
    held = {name: teacher.spec[name] for name in plan.spec}
    own = all(held[name] == plan.spec[name] for name in ("head", "code"))
    if not own or learning_of(held, plan.method) != plan.learning:
        raise SpecMismatch(f"{folder} has learned something else than {plan.name} would")
    return teacher


def _taken(teacher: Run, number: int) -> tuple[dict[str, Tensor], dict[str, list[Any]]] | None:
    """Another run's state after a task, and its costs; None where that checkpoint is gone."""
    try:
        task, state, known = checkpoints.read(teacher.folder, number)
    except ValueError:
        return None
    return (state, known["cost"]) if task == number else None


def _written(folder: Path, plan: Prepared, threads: int) -> int:
    """Write the specification, or read how the run was begun. Returns its threads."""
    file = folder / "spec.json"
    if file.exists():
        held = json.loads(file.read_bytes())
        if held["digest"] != plan.digest:
            raise SpecMismatch(f"{folder} is a run of another specification; remove it")
        return int(held["threads"])
    own = threads or torch.get_num_threads()
    head_source.keep(plan.method, folder)
    text = {
        **plan.spec,
        "method": head_source.text_of(plan.method),
        "digest": plan.digest,
        "store": plan.store,
        "threads": own,
    }
    atomic.write(folder, file, json.dumps(text, indent=1, ensure_ascii=False).encode())
    return own


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _carry_out(plan: Prepared, folder: Path, progress: Progress, teacher: Run | None) -> None:
    last, state, known = checkpoints.read(folder)
    rows: dict[str, list[list[float]]] = known.get("rows", {CNN: [], NME: []})
    cost: dict[str, list[Any]] = known.get(
        "cost", {"seconds": [], "score_seconds": [], "bytes_read": [], "peak_memory_bytes": [],
                 "stages_recomputed": []}
    )  # fmt: skip
    own: list[dict[str, float]] = known.get("told", [])
    told = [pd.read_parquet(folder / "predictions.parquet")] if last >= 0 else []
    told = [frame[frame["stage"] <= last] for frame in told]
    head = plan.head
    if last >= 0:
        head.load_state_dict(state)
        progress.message(f"going on after task {last + 1} of {len(plan.tasks)}")
    precision = plan.spec["options"].get("precision", "float32")
    if plan.device == "cpu" and (warning := precision_warning(precision)):
        progress.message(warning)
    plan.seen = [plan.clips(rows) for rows in plan.division.test[: last + 1]]
    gc.collect()  # what earlier runs left in cycles is not this one's memory
    for number in range(last + 1, len(plan.tasks)):
        with memory_peak() as peak:
            rows_own, rows_kept = plan.division.train[number], np.zeros(0, np.int64)
            if isinstance(head, ReplaysExemplars):
                rows_kept = head.exemplars.numpy()
            taken = teacher and _taken(teacher, number)
            if teacher and not taken:
                progress.message(
                    f"{teacher.folder} has no state after task {number + 1}: learning it"
                )
            old: dict[str, Feature] = {}
            if isinstance(head, UsesTeacher) and number and not taken:
                old = teacher_features.features(
                    plan, head, [*rows_own, *rows_kept], folder, progress
                )
            clips = plan.clips(rows_own, old)
            memory = plan.clips(rows_kept, old) if len(rows_kept) else None
            began = time.perf_counter()
            if taken:
                head.load_state_dict(taken[0])
            else:
                with _told(progress, f"task {number + 1}/{len(plan.tasks)}") as on_epoch_end:
                    text = _text(plan, clips)
                    head.learn(Task(clips, number, text, memory, on_epoch_end, plan.key))
            learned = time.perf_counter()
            plan.seen.append(plan.clips(plan.division.test[number]))
            answers = {CNN: head.scores}
            if isinstance(head, ReplaysExemplars) and len(head.exemplars):
                answers[NME] = head.nearest
            for classifier, answer in answers.items():
                row, frame = _answers(plan, answer, number, classifier)
                rows[classifier].append(row)
                told.append(frame)
        cost["seconds"].append(learned - began)
        cost["score_seconds"].append(time.perf_counter() - learned)
        cost["peak_memory_bytes"].append(peak())
        cost["bytes_read"].append(_bytes_read([clips, *([memory] if memory else []), *plan.seen]))
        calls = plan.network.calls if plan.network else Counter[str]()
        cost["stages_recomputed"].append(dict(calls))
        calls.clear()
        if taken:
            for name in ("seconds", "peak_memory_bytes", "bytes_read", "stages_recomputed"):
                cost[name][-1] = taken[1][name][number]
        own.append(
            dict(head.diagnostics) if isinstance(head, ReportsDiagnostics) and not taken else {}
        )
        _write_parquet(folder, pd.concat(told, ignore_index=True))
        known = {"rows": rows, "cost": cost, "told": own}
        checkpoints.write(folder, number, head.state_dict(), known)
        seen = slice(0, number + 1)
        counts = [len(part) for part in plan.division.test[seen]]
        progress.message(
            f"task {number + 1}/{len(plan.tasks)}: {np.average(rows[CNN][-1], weights=counts):.1%} "
            f"of {sum(counts)} clips of {len(head.classes)} classes, "
            + ("learned by another run" if taken else f"{learned - began:.1f} s of learning")
        )
    _finish(plan, folder, rows, cost, own)


def _finish(
    plan: Prepared,
    folder: Path,
    rows: Mapping[str, list[list[float]]],
    cost: dict[str, list[Any]],
    told: list[dict[str, float]],
) -> None:
    counts = np.array([len(part) for part in plan.division.test])
    matrices = {kind: Matrix.from_rows(rows[kind], counts) for kind in (CNN, NME) if rows[kind]}
    head = plan.head
    kept = len(head.exemplars) if isinstance(head, ReplaysExemplars) else 0
    cell_bytes = sum(cells.cell_bytes for cells in plan.seen[0].features.values())  # type: ignore[attr-defined]
    bytes_read = cost["bytes_read"]
    _write_json(
        folder,
        "cost",
        {
            "trainable": head.trainable,
            "multiply_adds": multiply_adds(head, plan.seen[0]),
            "seconds": cost["seconds"],
            "score_seconds": cost["score_seconds"],
            "peak_memory_bytes": max(cost["peak_memory_bytes"]),
            "bytes_read": sum(bytes_read),
            "state_bytes": sum(tensor.nbytes for tensor in head.state_dict().values()),
            "exemplars": kept,
            "exemplar_bytes": kept * cell_bytes,
            "stages_recomputed": cost["stages_recomputed"],
        },
    )
    table = {kind: one.to_json() for kind, one in matrices.items()}
    tasks = [list(task) for task in plan.tasks]
    _write_json(folder, "matrix", {NME: None, **table, "clips": counts.tolist(), "tasks": tasks})
    if isinstance(head, UsesTeacher):
        teacher_features.forget(plan.store, folder)
    figures = {kind: one.figures() for kind, one in matrices.items()}
    more = {"left_out": dict(plan.division.left_out), "told": told}
    _write_json(folder, "metrics", {NME: None, **figures, **more})


def _answers(
    plan: Prepared, answer: Callable[[Batch], Tensor], number: int, classifier: str
) -> tuple[list[float], pd.DataFrame]:
    """Accuracy on each task's test clips, and the table of predictions."""
    accuracy, frames = [], []
    names = np.array([plan.classes[label] for label in plan.head.classes])
    for clips in plan.seen:
        scores = scores_of(answer, clips)
        count = min(TOP, scores.shape[1])
        # Stable: of equal scores the class that was learned first.
        top = scores.argsort(dim=1, descending=True, stable=True)[:, :count].numpy()
        labels = np.array([plan.classes[label] for label in clips.labels.tolist()])
        accuracy.append(float((names[top[:, 0]] == labels).mean()))
        frame = {"stage": number, "row": clips.rows.numpy(), "label": labels,
                 "classifier": classifier}  # fmt: skip
        for rank in range(TOP):
            frame[f"top{rank + 1}"] = names[top[:, rank]] if rank < count else ""
        frames.append(pd.DataFrame(frame))
    return accuracy, pd.concat(frames, ignore_index=True)


def scores_of(answer: Callable[[Batch], Tensor], clips: Clips) -> Tensor:
    """A head's scores of all the clips, float32 [N, C], on the CPU."""
    cell_bytes = sum(cells.cell_bytes for cells in clips.features.values())  # type: ignore[attr-defined]
    size = int(min(256, max(1, SCORE_BATCH_BYTES // cell_bytes)))
    return torch.cat([answer(batch).cpu() for _, batch in clips.batches(size)])


def _text(plan: Prepared, clips: Clips) -> Tensor | None:
    if plan.text is None:
        return None
    return plan.text[sorted(set(clips.labels.tolist()))].to(plan.device)


def _bytes_read(clips: Sequence[Clips]) -> int:
    """Of the store, since the last time it was asked."""
    total = 0
    for one in clips:
        for cells in one.features.values():
            total += cells.bytes_read  # type: ignore[attr-defined]
            cells.bytes_read = 0  # type: ignore[attr-defined]
    return total


@contextlib.contextmanager
def _told(progress: Progress, name: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar over the epochs of a task, which is there from the first one on."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:

        def on_epoch_end(done: int, epochs: int, loss: float) -> None:
            if done == 1:
                stack.enter_context(progress.bars(began, **{name: (epochs, "epochs")}))
            progress.advance(name, 1)

        yield on_epoch_end


def _write_json(folder: Path, name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    atomic.write(folder, folder / f"{name}.json", text.encode())


def _write_parquet(folder: Path, frame: pd.DataFrame) -> None:
    atomic.write(folder, folder / "predictions.parquet", frame.to_parquet(index=False))
