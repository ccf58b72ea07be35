"""Ablations: a grid of runs, side by side, as one table."""

import contextlib
import itertools
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from varve.pipeline.config import Runtime
from varve.pipeline.experiments import checkpoints, results, scenarios
from varve.pipeline.experiments.head_source import Method, method_of
from varve.pipeline.experiments.run import run
from varve.pipeline.experiments.run_spec import inspect_options, prepare
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore

SEEDS = scenarios.SEEDS
PASSING = "passing"  # in a run folder: its checkpoints are there for others of the grid alone


@dataclass(frozen=True)
class Sweep:
    """What an ablation runs.

    Attributes:
        heads: File names in `heads/`, or paths of files of one's own, which are called by their
            stems in `grid` and `options`.
        scenario: A name or `BASE+KxN`.
        grid: Values of options, by "head.option", or "option" for every head that has it. Every
            combination is run.
        seeds: Of class order and head: a list, or how many of 1000, 1993, 2021.
        options: Of heads, the same in all runs: by head, a table of options.
        backbone: Whose features, where the store has several.
        splits: To learn from, and to test on.
    """

    heads: Sequence[str | Path | Method]
    scenario: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: int | Sequence[int] = len(SEEDS)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backbone: str = ""
    splits: Sequence[str] = ("train", "test")

    @classmethod
    def read(cls, file: str | Path) -> "Sweep":
        """From TOML, with the attributes as keys. "null" stands for None, which TOML has not.

        Paths of heads are relative to the folder that the file lies in.

        Raises:
            ValueError: It is no such file.
        """
        try:
            given = _nulls(tomllib.loads(Path(file).read_text()))
            if strange := sorted(set(given) - {one.name for one in fields(cls)}):
                raise ValueError(f"it has {', '.join(strange)}")
            found = cls(**given)
            own = [Path(file).parent / h if h.endswith(".py") else h for h in map(str, found.heads)]
            return replace(found, heads=own)
        except (ValueError, TypeError) as error:  # what TOML and UTF-8 are not is a ValueError too
            raise ValueError(
                f"{file} is no sweep: {error}. One has `heads`, `scenario`, and maybe `seeds`, "
                "`backbone`, `splits`, [grid] and [options.HEAD]"
            ) from error

    def with_options(self, options: Mapping[str, Any]) -> "Sweep":
        """With options in the place of its own, by "head.option", or "option" of all that have it.

        Raises:
            ValueError: No head has one, or it is in the grid.
        """
        known = {one.name: inspect_options(one.build) for one in map(method_of, self.heads)}
        merged = {head: dict(self.options.get(head, {})) for head in known}
        for name, value in options.items():
            head, _, option = name.rpartition(".")
            having = [one for one in known if option in known[one] and head in ("", one)]
            swept = {option, *(f"{one}.{option}" for one in having)} & set(self.grid)
            if not having or swept:
                raise ValueError(
                    f"--set {name}: "
                    + (f"none of {', '.join(known)} has it" if not having else "the grid has it")
                )
            for one in having:
                merged[one][option] = value
        return replace(self, options=merged)

    def seed_list(self) -> list[int]:
        if isinstance(self.seeds, int):
            if not 1 <= self.seeds <= len(SEEDS):
                raise ValueError(
                    f"seeds={self.seeds}: a number from 1 to {len(SEEDS)}, or a list of seeds"
                )
            return list(SEEDS[: self.seeds])
        return [int(seed) for seed in self.seeds]

    def runs(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Head, seed and options of every run, each once, seeds of one combination together.

        Raises:
            ValueError: The grid names a head or an option that there is not, or two heads have one
                name.
        """
        methods = [method_of(head) for head in self.heads]
        known = {method.name: inspect_options(method.build) for method in methods}
        texts = {(method.name, tuple(sorted(method.files.items()))) for method in methods}
        if len(texts) > len(known):
            raise ValueError(
                f"heads {', '.join(method.file for method in methods)}: results know a file by its "
                "name alone, so rename one of two that share it"
            )
        names = ", ".join(known)
        for name in self.options:
            if name not in known:
                raise ValueError(f"options of {name}, which is none of {names}")
        axes: dict[str, dict[str, Sequence[Any]]] = {head: {} for head in known}
        for name, values in self.grid.items():
            head, dot, option = name.rpartition(".")
            having = [one for one in known if option in known[one] and head in ("", one)]
            if not having or (dot and head not in known):
                raise ValueError(
                    f"the grid's {name}: none of {names} has it; options are\n"
                    + "\n".join(f"  {one}: {', '.join(known[one])}" for one in known)
                )
            if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
                raise ValueError(f"the grid's {name} = {values!r}: give a list of values")
            for one in having:
                if option in axes[one]:
                    raise ValueError(
                        f"the grid has {option} of {one} twice, with and without a head"
                    )
                axes[one][option] = values
        found = []
        for head in known:
            fixed = dict(self.options.get(head, {}))
            for values in itertools.product(*axes[head].values()):
                options = fixed | dict(zip(axes[head], values, strict=True))
                found += [(head, seed, options) for seed in self.seed_list()]
        return found


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_nulls(one) for one in value]
    return None if value == "null" else value


def ablate(
    store: str | Path | FeatureStore,
    heads: str | Path | Sequence[str | Path | Method],
    scenario: str,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | Sequence[int] = len(SEEDS),
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    backbone: str = "",
    splits: Sequence[str] = ("train", "test"),
    out: str | Path = "runs",
    device: str = "cpu",
    runtime: Runtime | None = None,
    client: Any = None,
    keep_checkpoints: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Run every combination of a grid for every seed, and tell mean and deviation over the seeds.

    What has a finished run folder with the same specification is not run again. Runs that differ in
    options alone which decide scores and nothing of what is learned
    (`varve.heads.HasInferenceOptions`), such as the
    ways to route of one StPR, learn once. A run that fails leaves the others alone, but for those
    that learn the same; its error is in the table.

    Args:
        heads, scenario, grid, seeds, options, backbone, splits: See `Sweep`. Files of one's own
            are read once: an edit meanwhile is for the next ablation.
        out: Where the run folders are made.
        runtime: Where the runs run: by default side by side, a process for each core.
        client: A Dask client to run them on, in the place of `runtime`.
        keep_checkpoints: Whether they stay when a run has ended.

    Returns:
        A row a combination; `varve.pipeline.experiments.results` says which columns. The row of
        every single run is in `.attrs["runs"]`, as a DataFrame's records.

    Raises:
        ValueError, SpecMismatch: As `run`, before anything is run.
        RuntimeError: Every run failed.
    """
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    named = (heads,) if isinstance(heads, str | Path) else tuple(heads)
    read = [method_of(head) for head in named]
    methods = {method.name: method for method in read}
    sweep = Sweep(read, scenario, grid or {}, seeds, options or {}, backbone)
    progress, runtime = progress or Progress(), runtime or Runtime()
    out = Path(out).absolute()
    learn, test = splits
    folders: dict[Path, str] = {}  # and the digest of what is learned
    groups: dict[str, list[dict[str, Any]]] = {}  # those that learn the same
    learned: dict[str, Path] = {}  # where one of them was finished before
    for head, seed, chosen in sweep.runs():
        method = methods[head]
        plan = prepare(opened, method, scenario, seed, chosen, backbone, (learn, test), device)
        folder = out / plan.name
        if folder in folders:
            continue
        folders[folder] = plan.learning
        if not (folder / "metrics.json").exists():
            groups.setdefault(plan.learning, []).append(
                {"head": method, "seed": seed, "options": chosen}
            )
            if not (keep_checkpoints or folder.exists()):
                folder.mkdir(parents=True)
                (folder / PASSING).touch()
        elif checkpoints.whole(folder, len(plan.tasks)):
            learned[plan.learning] = folder
    waiting = sum(map(len, groups.values()))
    done, spared = len(folders) - waiting, waiting - len(groups.keys() - learned.keys())
    progress.message(
        f"{len(folders)} runs"
        + (f", {done} of them finished before" if done else "")
        + (f", {spared} learn what another does" if spared else "")
    )
    common = {"scenario": scenario, "backbone": backbone, "out": out, "device": device,
              "splits": (learn, test)}  # fmt: skip
    errors: list[str] = []
    if waiting:
        with progress.bars(runs=(waiting, "runs")):
            spread = _spread(opened, common, groups, learned, runtime, client, progress)
            for spec, error in spread:
                progress.advance("runs", 1)
                if error is not None:
                    errors.append(f"{spec['head']} {spec['options']} seed {spec['seed']}: {error}")
                    progress.message(f"FAILED {errors[-1]}")
    if errors and len(errors) == len(folders):
        raise RuntimeError(f"every run failed; the first: {errors[0]}")
    finished = [folder for folder in folders if (folder / "metrics.json").exists()]
    for folder in finished:
        if (folder / PASSING).exists() and not keep_checkpoints:
            checkpoints.remove(folder)
        (folder / PASSING).unlink(missing_ok=True)
    runs = results.read(finished)
    table = results.summary(runs)
    table.attrs["runs"], table.attrs["errors"] = runs.to_dict("records"), errors
    return table


def _spread(
    store: FeatureStore,
    common: Mapping[str, Any],
    groups: Mapping[str, list[dict[str, Any]]],
    before: Mapping[str, Path],
    runtime: Runtime,
    client: Any,
    progress: Progress,
) -> Iterator[tuple[dict[str, Any], Exception | None]]:
    """Run them; each comes with its error when it ends. The first of a group learns for it."""
    place = str(store.location)
    if runtime.serial:
        for learning, group in groups.items():
            learned = before.get(learning)
            for spec in group:
                try:
                    learned = run(
                        store, progress=progress, learned=learned, **spec, **common
                    ).folder
                    yield spec, None
                except Exception as error:
                    yield spec, error
        return
    from distributed import as_completed

    from varve.pipeline.extraction.cluster import connected

    count = min(sum(map(len, groups.values())), runtime.workers or os.cpu_count() or 1)
    with contextlib.ExitStack() as stack:
        if client is None:
            workers = [{"nthreads": 1}] * count
            client = stack.enter_context(connected(runtime.scheduler, workers, threads=1))
        progress.message(f"Dask dashboard: {client.dashboard_link}")
        # One thread: as many runs as cores go on beside each other.
        common = {**common, "threads": 1, "pure": False}
        futures = {}
        for learning, (first, *others) in groups.items():
            known = before.get(learning)
            learns = client.submit(_one, place, learned=known, **first, **common)
            futures[learns] = first
            futures |= {client.submit(_one, place, learned=known or learns, **spec, **common): spec
                        for spec in others}  # fmt: skip
        for future in as_completed(futures):
            yield futures[future], future.exception()


def _one(store: str, **options: Any) -> str:
    return str(run(store, **options).folder)
