"""Ablations: a grid of runs as one table.

`ablate` expands a sweep into runs (`expand`), groups those that train alike (`group`), executes
them side by side (`execute`), and aggregates their results over the seeds, and over the splits of a
data set where there is a store for each (`summarise`).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from varve.pipeline.config import Runtime
from varve.pipeline.experiments import checkpoints, results, scenarios
from varve.pipeline.experiments.head_source import HeadSource, find_head
from varve.pipeline.experiments.run import run
from varve.pipeline.experiments.run_spec import prepare_run
from varve.pipeline.experiments.scenarios import SEEDS, ClassList
from varve.pipeline.experiments.sweep_spec import Sweep
from varve.pipeline.progress import Progress
from varve.pipeline.registry import VARIABLE
from varve.stores import FeatureStore

AnyStore = str | Path | FeatureStore
# Marks a run folder whose checkpoints are there only for other runs of the sweep.
TEMPORARY_CHECKPOINTS = "temporary_checkpoints"
# Kinds of variants that runs use; worker processes must find those of the user.
USED_KINDS = ("backbones", "reductions", "scenarios", "metrics")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        store: The store that it reads.
        arguments: Those of `varve.run` in which the runs of a sweep differ.
        folder: Its run folder.
        training_digest: Runs that share it train alike.
        spec: What decides its numbers; see `varve.pipeline.experiments.run_spec`.
    """

    store: FeatureStore
    arguments: dict[str, Any]
    folder: Path
    training_digest: str
    spec: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """The run folder is finished."""
        return (self.folder / "metrics.json").exists()

    def __str__(self) -> str:
        return "{head} {options} seed {seed}".format(**self.arguments)


@dataclass(frozen=True)
class Group:
    """Unfinished runs that train alike: the first trains, unless a donor has done so before.

    Attributes:
        runs: The runs.
        donor: A finished run with checkpoints that trained alike; None where there is none.
    """

    runs: list[PlannedRun]
    donor: Path | None


def ablate(
    store: AnyStore | Sequence[AnyStore],
    heads: str | Path | Sequence[str | Path | HeadSource],
    scenario: str,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | Sequence[int] = len(SEEDS),
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    backbone: str = "",
    splits: Sequence[str] = ("train", "test"),
    sampled: Mapping[str, Any] | None = None,
    order: ClassList | None = None,
    only: ClassList | None = None,
    validation: float = 0.0,
    out: str | Path = "runs",
    device: str = "cpu",
    runtime: Runtime | None = None,
    client: Any = None,
    keep_checkpoints: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Run every combination of a grid for every seed; return mean and deviation over the runs.

    A run that has a finished folder of the same specification is not run again. Runs that differ
    only in inference-only options (`varve.heads.HasInferenceOptions`), such as the routings of one
    StPR, train once. A run that fails leaves the others alone, but for those that train alike; its
    error is in the table.

    Args:
        store: A store with the features that the heads read. Or several, one for each split of a
            data set: mean and deviation are then over all seeds of all of them.
        heads, scenario, grid, seeds, options, backbone, splits, sampled, order, only, validation:
            See `Sweep`. A user's files are read once: an edit meanwhile has effect in the next
            ablation.
        out: Folder in which run folders are made.
        device: Where the heads work: "cpu" or "cuda".
        runtime: Where the runs run: by default side by side, a process for each core.
        client: A Dask client to run them on, in the place of `runtime`.
        keep_checkpoints: Whether checkpoints stay when a run has finished.
        progress: Where progress is shown.

    Returns:
        A row for each combination; `varve.pipeline.experiments.results` lists the columns. The row
        of every single run is in `.attrs["runs"]`, as records of a DataFrame, and the errors are
        in `.attrs["errors"]`.

    Raises:
        ValueError, SpecMismatch: As `run`, before anything is run. Or several stores differ in
            more than their clips, or two of them have the same.
        RuntimeError: Every run failed.
    """
    listed_stores = [store] if isinstance(store, str | Path | FeatureStore) else [*store]
    stores = [s if isinstance(s, FeatureStore) else FeatureStore.open(s) for s in listed_stores]
    progress, out = progress or Progress(), Path(out).absolute()
    listed = (heads,) if isinstance(heads, str | Path) else tuple(heads)
    sources = [find_head(head) for head in listed]
    sweep = Sweep(sources, scenario, grid or {}, seeds, options or {}, backbone, splits,
                  sampled=sampled or {}, order=order, only=only,
                  validation=validation)  # fmt: skip
    runs = [planned for each in stores for planned in expand(each, sweep, out, device)]
    check_stores(stores, runs)
    groups = group(runs)
    waiting = [planned for group in groups for planned in group.runs]
    finished = len(runs) - len(waiting)
    shared = len(waiting) - sum(group.donor is None for group in groups)
    progress.message(
        f"{len(runs)} runs"
        + (f", {finished} of them finished before" if finished else "")
        + (f", {shared} train as another does" if shared else "")
    )
    for planned in waiting:
        if not (keep_checkpoints or planned.folder.exists()):
            planned.folder.mkdir(parents=True)
            (planned.folder / TEMPORARY_CHECKPOINTS).touch()
    common = {"backbone": backbone, "out": out, "device": device, "splits": tuple(splits),
              "validation": validation}  # fmt: skip
    errors: list[str] = []
    if waiting:
        with progress.bars(runs=(len(waiting), "runs")):
            for planned, error in execute(groups, common, runtime or Runtime(), client, progress):
                progress.advance("runs", 1)
                if error is not None:
                    errors.append(f"{planned}: {error}")
                    progress.message(f"FAILED {errors[-1]}")
    return summarise(runs, errors, keep_checkpoints)


def expand(store: FeatureStore, sweep: Sweep, out: Path, device: str) -> list[PlannedRun]:
    """Expand a sweep into its runs, each once, and check them all before anything is run."""
    sources = {source.name: source for source in sweep.sources()}
    train, test = sweep.splits
    runs: dict[Path, PlannedRun] = {}
    for head, seed, options, sampled in sweep.runs():
        scenario = scenarios.make_scenario(sweep.scenario, store.attributes["classes"], seed,
                                           order=sweep.order, only=sweep.only)  # fmt: skip
        plan = prepare_run(store, sources[head], scenario, seed, options, sweep.backbone,
                           (train, test), device, sampled, validation=sweep.validation)  # fmt: skip
        varied = {"head": sources[head], "scenario": scenario, "seed": seed, "options": options,
                  "sampled": sampled}  # fmt: skip
        folder = out / plan.name
        planned = PlannedRun(store, varied, folder, plan.training_digest, plan.spec)
        runs.setdefault(folder, planned)
    return list(runs.values())


def check_stores(stores: Sequence[FeatureStore], runs: Sequence[PlannedRun]) -> None:
    """Refuse several stores that are not of one data set in as many splits.

    Raises:
        ValueError: Two have the same clips in the same splits, or other features or classes.
    """
    if not stores:
        raise ValueError("no store: give one, or one for each split of a data set")
    by_store = [[planned for planned in runs if planned.store is each] for each in stores]
    first = by_store[0]
    for store, others in zip(stores, by_store, strict=True):
        different = {key for a, b in zip(first, others, strict=False) for key in a.spec
                     if key != "clips" and a.spec[key] != b.spec.get(key)}  # fmt: skip
        if different or len(first) != len(others):
            raise ValueError(
                f"{stores[0].location} and {store.location} give runs of different "
                f"{', '.join(sorted(different)) or 'numbers'}: a mean over stores is of one data "
                "set in several splits, built with the same options"
            )
    stores_of: dict[Path, list[str]] = {}
    for planned in runs:
        same = stores_of.setdefault(planned.folder, [])
        same.append(str(planned.store.location))
        if len(same) > 1:
            raise ValueError(
                f"{' and '.join(same)} have the same clips to train and to test on: give a store "
                "for each split, and each once"
            )


def group(runs: Sequence[PlannedRun]) -> list[Group]:
    """Group the unfinished runs that train alike, and find a finished run to donate the states."""
    donors = {
        planned.training_digest: planned.folder
        for planned in runs
        if planned.finished
        and checkpoints.complete(planned.folder, len(planned.arguments["scenario"].tasks))
    }
    groups: dict[str, Group] = {}
    for planned in runs:
        if not planned.finished:
            digest = planned.training_digest
            groups.setdefault(digest, Group([], donors.get(digest))).runs.append(planned)
    return list(groups.values())


def execute(
    groups: Sequence[Group],
    common: Mapping[str, Any],
    runtime: Runtime,
    client: Any,
    progress: Progress,
) -> Iterator[tuple[PlannedRun, BaseException | None]]:
    """Execute the runs of all groups; give each when it ends, with its error or None."""
    if runtime.serial:
        yield from _execute_here(groups, common, progress)
        return
    from distributed import as_completed

    from varve.pipeline.extraction.cluster import connected

    count = sum(len(group.runs) for group in groups)
    with contextlib.ExitStack() as stack:
        if client is None:
            workers = [{"nthreads": 1}] * min(count, runtime.workers or os.cpu_count() or 1)
            client = stack.enter_context(connected(runtime.scheduler, workers, 1, USED_KINDS))
        progress.message(f"Dask dashboard: {client.dashboard_link}")
        # One thread: as many runs as cores run side by side.
        common = {**common, "threads": 1, "plugins": os.environ.get(VARIABLE, ""), "pure": False}

        def submit(planned: PlannedRun, states_from: Any) -> Any:
            return client.submit(
                _run_in_worker, str(planned.store.location), states_from=states_from,
                **planned.arguments, **common,
            )  # fmt: skip

        futures = {}
        for group in groups:
            first, *others = group.runs
            donor = submit(first, group.donor)
            futures[donor] = first
            futures |= {submit(planned, group.donor or donor): planned for planned in others}
        for future in as_completed(futures):
            yield futures[future], future.exception()


def summarise(
    runs: Sequence[PlannedRun], errors: Sequence[str], keep_checkpoints: bool
) -> pd.DataFrame:
    """Aggregate the finished runs over seeds and stores, and remove temporary checkpoints.

    Raises:
        RuntimeError: Every run failed.
    """
    if errors and len(errors) == len(runs):
        raise RuntimeError(f"every run failed; the first: {errors[0]}")
    folders = [planned.folder for planned in runs if planned.finished]
    for folder in folders:
        if (folder / TEMPORARY_CHECKPOINTS).exists() and not keep_checkpoints:
            checkpoints.remove(folder)
        (folder / TEMPORARY_CHECKPOINTS).unlink(missing_ok=True)
    records = results.read(folders)
    several = len({planned.store.location for planned in runs}) > 1
    table = results.summary(records, over=(*results.SEEDS, *["store"] * several))
    table.attrs["runs"], table.attrs["errors"] = records.to_dict("records"), list(errors)
    return table


def _execute_here(
    groups: Sequence[Group], common: Mapping[str, Any], progress: Progress
) -> Iterator[tuple[PlannedRun, BaseException | None]]:
    for group in groups:
        donor = group.donor
        for planned in group.runs:
            try:
                arguments = {**planned.arguments, **common}
                done = run(planned.store, states_from=donor, progress=progress, **arguments)
                donor = done.folder
                yield planned, None
            except Exception as error:
                yield planned, error


def _run_in_worker(store: str, plugins: str, **arguments: Any) -> str:
    os.environ[VARIABLE] = plugins  # a worker of a client may be older than the plugins
    return str(run(store, **arguments).folder)
