"""The command line's part about experiments; see `varve.pipeline.cli.store_commands`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

StoreArgument = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of the feature store.")
]
Out = Annotated[Path, typer.Option(help="Folder that run folders are made in.")]
Backbone = Annotated[str, typer.Option(help="Whose features, where the store has several.")]
Device = Annotated[str, typer.Option(help="cpu or cuda: where heads work.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def run(
    store: StoreArgument,
    head: Annotated[
        str, typer.Option(help="File name in heads/, such as stpr, or a file of your own: mine.py.")
    ],
    scenario: Annotated[
        str, typer.Option(help="ucf101-10x5 and the like, demo, or BASE+KxN (8+4x4).")
    ],
    seed: Annotated[int, typer.Option(help="Of the class order, and of the head.")] = 1000,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the head.")
    ] = None,
    backbone: Backbone = "",
    learn_split: Annotated[str, typer.Option(help="Clips to learn from.")] = "train",
    test_split: Annotated[str, typer.Option(help="Clips to test on, such as validation.")] = "test",
    out: Out = Path("runs"),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Teach a head the classes of STORE task by task, and measure it after each.

    Safe to stop at any moment and to run again: it goes on after its last whole task.

    Example: varve run ucf101.zarr --head stpr --scenario ucf101-10x5 --set routing=average
    """
    from varve.pipeline.cli.format_runs import run_facts, run_summary
    from varve.pipeline.experiments.run import run as do
    from varve.pipeline.progress import Progress, default_progress

    progress = Progress() if as_json else default_progress()
    done = do(store, head, scenario, seed=seed, options=settings(options or []), backbone=backbone,
              splits=(learn_split, test_split), out=out, device=device,
              progress=progress)  # fmt: skip
    print(json.dumps(run_facts(done), indent=1) if as_json else run_summary(done))


@app.command()
def ablate(
    store: StoreArgument,
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="heads, scenario, [grid].")],
    scenario: Annotated[str, typer.Option(help="In the place of the sweep's.")] = "",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of all heads that have it; HEAD.KEY of one.",
        ),
    ] = None,
    backbone: Backbone = "",
    out: Out = Path("runs"),
    device: Device = "cpu",
    workers: Annotated[int, typer.Option(help="Runs side by side; 0: one a core.")] = 0,
    scheduler: Annotated[str, typer.Option(help="tcp://HOST:PORT of a Dask scheduler.")] = "",
    serial: Annotated[bool, typer.Option("--serial", help="One by one, without Dask.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Of every run, for `varve route`.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="Also write the table there: .csv, .parquet or .tex.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every combination of a grid for every seed. Finished runs are not run again.

    SWEEP.toml: heads = ["stpr"], scenario = "demo", seeds = 3, and under [grid] lists of values,
    such as "stpr.routing" = ["td", "average"]. Exit code 1 where a run failed.

    Example: varve ablate ucf101.zarr sweep.toml --table sweep.tex
    """
    from varve.pipeline.config import Runtime
    from varve.pipeline.experiments import results
    from varve.pipeline.experiments.sweep import ablate as do
    from varve.pipeline.experiments.sweep_spec import Sweep
    from varve.pipeline.progress import Progress, default_progress

    asked = Sweep.read(sweep)
    if table is not None:
        results.writable(table)
    progress = Progress() if as_json else default_progress()
    asked = asked.with_options(settings(options or []))
    found = do(store, asked.heads, scenario or asked.scenario, asked.grid, asked.seeds,
               options=asked.options, backbone=backbone or asked.backbone, splits=asked.splits,
               out=out, device=device, progress=progress, keep_checkpoints=keep_checkpoints,
               runtime=Runtime(workers=workers, scheduler=scheduler, serial=serial))  # fmt: skip
    if table is not None:
        results.write(found, table)
    if as_json:
        print(json.dumps(json.loads(found.to_json(orient="records")), indent=1))
    else:
        print(results.text(found))
    raise typer.Exit(1 if found.attrs["errors"] else 0)


@app.command()
def route(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Files to ask about.")],
    top_k: Annotated[int, typer.Option(help="How many classes and experts to tell.")] = 3,
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="Where the run's store is, if moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode videos and say which experts of a run answer, and what. Exit code 1 on a broken video.

    Example: varve route runs/stpr-demo-1000-41cbf8d4 clip.mp4 --top-k 3
    """
    from dataclasses import asdict

    from varve.pipeline.cli.format_runs import routed_text
    from varve.pipeline.experiments.routing import route as do

    found = do(run, videos, top_k, store=store)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))
    else:
        print("\n".join(map(routed_text, found)))
    raise typer.Exit(1 if any(one.reason for one in found) else 0)


def settings(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE as options: a value is JSON where it reads as such, else its text.

    >>> settings(["epochs=20", "routing=td", "time=[1, 2]"])
    {'epochs': 20, 'routing': 'td', 'time': [1, 2]}
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"--set {word}: give KEY=VALUE, such as --set epochs=20")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
