"""Commands of heads on a feature store: one run, a grid of runs, their cost, and new videos."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varve.pipeline.cli.options import Json, StoreArgument, progress_for, show, takes
from varve.pipeline.config import BuildSpec, Runtime

if TYPE_CHECKING:
    from varve.pipeline.experiments.sweep_spec import Sweep

# Frames to read of a store of whole videos, as a build names them.
of_whole_videos = takes(
    partial=True, only=("frames", "sampling", "fps", "stride"), sampled=BuildSpec
)
Out = Annotated[Path, typer.Option(help="Folder of the run folders.")]
Backbone = Annotated[str, typer.Option(help="The backbone to read, where the store has several.")]
Order = Annotated[
    Path | None,
    typer.Option(help="File of the classes as they arrive: .txt, .json, .pkl (also vCLIMB's)."),
]
Only = Annotated[Path | None, typer.Option(help="File of the classes to take: .txt, .json, .pkl.")]
Validation = Annotated[
    float, typer.Option(help="Share of training clips to test on, instead of the test split.")
]
Device = Annotated[str, typer.Option(help="Device of the heads: cpu or cuda.")]


@of_whole_videos
def run(
    store: StoreArgument,
    head: Annotated[
        str, typer.Option(help="Name of a head, such as stpr, or a Python file: mine.py.")
    ],
    scenario: Annotated[
        str,
        typer.Option(help="ucf101-10x5 and the like, demo, BASE+KxN (8+4x4, 0+3x2+1), or given."),
    ],
    sampled: dict[str, Any],
    seed: Annotated[int, typer.Option(help="Seed of the class order and of the head.")] = 1000,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the head.")
    ] = None,
    backbone: Backbone = "",
    learn_split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on, such as validation.")] = "test",
    order: Order = None,
    only: Only = None,
    validation: Validation = 0.0,
    out: Out = Path("runs"),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a head on the classes of STORE task by task, and evaluate it after each task.

    Safe to stop at any moment and to run again: it resumes after the last whole task. On a store of
    whole videos (`varve build --sampling all`) --frames and the options beside it say what to read.

    Example: varve run ucf101.zarr --head stpr --scenario ucf101-10x5 --set routing=average
    """
    from varve.pipeline.cli.format_runs import run_facts, run_summary
    from varve.pipeline.experiments.run import run as do

    done = do(store, head, scenario, seed=seed, options=settings(options or []), backbone=backbone,
              splits=(learn_split, test_split), sampled=chosen(sampled), order=order, only=only,
              validation=validation, out=out, device=device,
              progress=progress_for(as_json))  # fmt: skip
    show(as_json, run_facts, run_summary, done)


@of_whole_videos
@takes(only=("workers", "scheduler", "serial"), runtime=Runtime)
def ablate(
    stores: Annotated[
        list[Path],
        typer.Argument(metavar="STORE...", help="A feature store, or one for each split."),
    ],
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="heads, scenario, [grid].")],
    runtime: Runtime,
    sampled: dict[str, Any],
    scenario: Annotated[str, typer.Option(help="Scenario, instead of the one in the file.")] = "",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of all heads that have it; HEAD.KEY of one.",
        ),
    ] = None,
    backbone: Backbone = "",
    order: Order = None,
    only: Only = None,
    validation: Validation = 0.0,
    out: Out = Path("runs"),
    device: Device = "cpu",
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep all checkpoints, for `varve route`.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="File to write the table to: .csv, .parquet or .tex.")
    ] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Print how long the runs would take, and run none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every combination of a grid for every seed. Finished runs are not run again.

    With several stores, one for each split of a data set, the table has the mean over all runs of
    all of them: varve ablate hmdb51-1.zarr hmdb51-2.zarr hmdb51-3.zarr sweep.toml

    SWEEP.toml: heads = ["stpr"], scenario = "demo", seeds = 3, and under [grid] lists of values,
    such as "stpr.routing" = ["td", "average"]. Exit code 1 where a run failed.

    Example: varve ablate ucf101.zarr sweep.toml --table sweep.tex
    """
    from varve.pipeline.experiments import results
    from varve.pipeline.experiments.sweep import ablate as do
    from varve.pipeline.experiments.sweep_spec import Sweep

    grid = Sweep.read(sweep)
    if table is not None:
        results.writable(table)
    grid = replace(
        grid.with_options(settings(options or [])),
        scenario=scenario or grid.scenario,
        backbone=backbone or grid.backbone,
        sampled={**grid.sampled, **chosen(sampled)},
        order=order or grid.order,
        only=only or grid.only,
        validation=validation or grid.validation,
    )
    if forecast:
        _show_forecast(stores, grid, out, device, as_json)
        return
    rows = do(stores, grid.heads, grid.scenario, grid.grid, grid.seeds, options=grid.options,
              backbone=grid.backbone, splits=grid.splits, sampled=grid.sampled,
              order=grid.order, only=grid.only, validation=grid.validation, out=out, device=device,
              progress=progress_for(as_json), keep_checkpoints=keep_checkpoints,
              runtime=runtime)  # fmt: skip
    if table is not None:
        results.write(rows, table)
    show(as_json, lambda table: json.loads(table.to_json(orient="records")), results.text, rows)
    raise typer.Exit(1 if rows.attrs["errors"] else 0)


def _show_forecast(
    stores: list[Path], sweep: "Sweep", out: Path, device: str, as_json: bool
) -> None:
    from varve.pipeline.cli.format_runs import forecast_text
    from varve.pipeline.experiments.forecast import forecast
    from varve.stores import FeatureStore

    rows = forecast([FeatureStore.open(store) for store in stores], sweep, out, device)
    show(as_json, lambda table: json.loads(table.to_json(orient="records")),
         lambda table: forecast_text(table, device), rows)  # fmt: skip


@of_whole_videos
def cost(
    store: StoreArgument,
    head: Annotated[
        str, typer.Option(help="Name of a head, such as stpr, or a Python file: mine.py.")
    ],
    scenario: Annotated[
        str, typer.Option(help="As for `varve run`: it decides the number of classes and tasks.")
    ],
    sampled: dict[str, Any],
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the head.")
    ] = None,
    backbone: Backbone = "",
    order: Order = None,
    only: Only = None,
    device: Device = "cpu",
    latency: Annotated[
        int, typer.Option(help="Measure the median of so many forwards, with and without grafts.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Print parameters and multiply-adds of a head on STORE, module by module. Trains nothing.

    Frozen stages that come from the cache are counted apart. --latency measures what the grafts of
    a head (adapters, gates, class regularization) add to the time of a clip.

    Example: varve cost ucf101.zarr --head hf_net --scenario ucf101-10x5 --set gates=2 --latency 20
    """
    from varve.pipeline.cli.format_runs import cost_facts, cost_text
    from varve.pipeline.experiments.cost_table import cost as do

    counted = do(store, head, scenario, options=settings(options or []), backbone=backbone,
                 sampled=chosen(sampled), order=order, only=only, device=device,
                 latency=latency)  # fmt: skip
    show(as_json, cost_facts, cost_text, counted)


def route(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")],
    top_k: Annotated[int, typer.Option(help="Number of classes and experts to print.")] = 3,
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="The store of the run, if it was moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode videos and print which experts of a run classify them, and as what.

    Exit code 1 where a video cannot be decoded.

    Example: varve route runs/stpr-demo-1000-41cbf8d4 clip.mp4 --top-k 3
    """
    from varve.pipeline.cli.format_runs import routed_text
    from varve.pipeline.experiments.routing import route as do

    answers = do(run, videos, top_k, store=store)
    text = "\n".join(map(routed_text, answers))
    show(as_json, lambda videos: [asdict(video) for video in videos], lambda _: text, answers)
    raise typer.Exit(1 if any(answer.reason for answer in answers) else 0)


def chosen(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def settings(words: list[str]) -> dict[str, Any]:
    """Return KEY=VALUE words as options: a value is parsed as JSON where it can be, else kept.

    >>> settings(["epochs=20", "routing=td", "time=[1, 2]"])
    {'epochs': 20, 'routing': 'td', 'time': [1, 2]}
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"--set {word}: give KEY=VALUE, such as --set epochs=20")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
