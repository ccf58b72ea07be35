"""Commands that build, describe, check and clean a feature store. Each loads what it needs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from varve.pipeline.cli.options import Json, StoreArgument, progress_for, show, takes
from varve.pipeline.config import BuildSpec, Runtime


def _existing(dataset: Path) -> Path:
    """Return the path; a data set that is missing is reported before any other option."""
    from varve.pipeline.datasets.layouts import check_root

    check_root(dataset)
    return dataset


Dataset = Annotated[
    Path,
    typer.Argument(help="Directory of labelled videos, or a list (CSV/TSV).", callback=_existing),
]
StoreOption = Annotated[Path, typer.Option("--store", "-s", help="Folder of the feature store.")]
Layout = Annotated[str, typer.Option(help="How DATASET is laid out; auto recognises it.")]
Split = Annotated[str | None, typer.Option(help="Which official split, where there are several.")]

Splits = Annotated[
    str, typer.Option(help="none: folders named train, test... are classes; auto: they are splits.")
]


@takes(spec=BuildSpec, runtime=Runtime)
def build(
    dataset: Dataset,
    store: StoreOption,
    spec: BuildSpec,
    runtime: Runtime,
    layout: Layout = "auto",
    split: Split = None,
    splits: Splits = "auto",
    as_json: Json = False,
) -> None:
    """Compute the features of DATASET that the store lacks.

    Safe to stop at any moment and to run again: only missing features are computed.

    Example: varve build videos/ --store ucf101.zarr --backbone ViT-B-16:openai --keep proj
    --keep blocks.10.mlp:cls
    """
    from varve.pipeline.cli.format_store import report_facts, report_summary
    from varve.pipeline.extraction.build import build as run

    report = run(dataset, store, spec, layout=layout, split=split, splits=splits,
                 runtime=runtime, progress=progress_for(as_json))  # fmt: skip
    show(as_json, report_facts, report_summary, report)
    raise typer.Exit(1 if len(report.quarantined) else 0)


@takes(unless="backbones", spec=BuildSpec, runtime=Runtime)
def plan(
    dataset: Dataset,
    spec: BuildSpec | None,
    runtime: Runtime,
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="Folder of the feature store.")
    ] = None,
    layout: Layout = "auto",
    split: Split = None,
    splits: Splits = "auto",
    as_json: Json = False,
    estimate: Annotated[bool, typer.Option(help="Measure this machine to estimate time.")] = True,
) -> None:
    """Print what `build` with the same options would do. Writes nothing.

    Without --backbone: print what was recognised in DATASET, and what was left out.

    Example: varve plan videos/ --store ucf101.zarr --backbone ViT-B-16:openai --keep proj
    """
    if spec is None:
        from varve.pipeline.cli.format_dataset import listing_facts, listing_lines
        from varve.pipeline.datasets.layouts import read

        show(as_json, listing_facts, listing_lines, read(dataset, layout, split))
        return
    if store is None:
        raise ValueError("a plan of a build needs --store; without --backbone DATASET is described")
    from varve.pipeline.cli.format_store import plan_facts, plan_summary
    from varve.pipeline.extraction.build import plan as run

    work, seconds = run(dataset, store, spec, layout=layout, split=split, splits=splits,
                        runtime=runtime, progress=progress_for(as_json),
                        estimate=estimate)  # fmt: skip
    show(as_json, plan_facts, plan_summary, work, seconds, store)


def datasets(as_json: Json = False) -> None:
    """List the layouts of data sets that are recognised, with a picture of each.

    Example: varve datasets
    """
    from varve.pipeline.cli.format_dataset import layout_facts, layout_lines
    from varve.pipeline.datasets.layouts import find
    from varve.pipeline.registry import available

    show(as_json, layout_facts, layout_lines, {name: find(name) for name in available("layouts")})


def info(store: StoreArgument, as_json: Json = False) -> None:
    """Describe the clips and features of a store.

    Example: varve info ucf101.zarr
    """
    from varve.pipeline.cli.format_store import store_facts, store_summary
    from varve.stores import FeatureStore

    show(as_json, store_facts, store_summary, FeatureStore.open(store))


def failures(store: StoreArgument, as_json: Json = False) -> None:
    """List quarantined clips and why. Exit code 1 where there are any.

    Example: varve failures ucf101.zarr
    """
    from varve.pipeline.cli.format_store import failure_facts, failure_lines
    from varve.stores import FeatureStore

    table = FeatureStore.open(store).clips
    failed = table[table["status"] == "quarantined"]
    show(as_json, failure_facts, failure_lines, failed)
    raise typer.Exit(1 if len(failed) else 0)


def verify(
    store: StoreArgument,
    dataset: Annotated[
        Path | None, typer.Option(help="Folder of the videos, if they were moved.")
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="NAME:WEIGHTS of a network, if its weight file was moved."),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Clips to compute again from their videos.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    as_json: Json = False,
) -> None:
    """Read every chunk's checksum and compute a sample of cells again. Exit code 1 on a finding.

    Example: varve verify ucf101.zarr --sample 16
    """
    from varve.pipeline.cli.format_store import verification_lines
    from varve.pipeline.extraction.verify import verify as run
    from varve.stores.digests import store_name

    weights = {store_name(name): name for name in backbone or []}
    result = run(store, dataset=dataset, backbones=weights, sample=sample, seed=seed,
                 progress=progress_for(as_json))  # fmt: skip
    show(as_json, asdict, verification_lines, result)
    raise typer.Exit(1 if result.findings else 0)


@takes(partial=True, changes=BuildSpec)
def diff(store: StoreArgument, changes: dict[str, Any], as_json: Json = False) -> None:
    """Compare the key of every column with a request, and print why it differs.

    Options are those of `build`; the default is the request of the store's last build.

    Example: varve diff ucf101.zarr --frames 16
    """
    from varve.pipeline.extraction.diff import diff as run
    from varve.pipeline.extraction.diff import facts, lines, request_of

    differences = run(store, request_of(store, **changes))
    text = "\n".join(lines(differences)) or "the store has no column"
    show(as_json, facts, lambda _: text, differences)


def gc(
    store: StoreArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; print what would be freed.")
    ] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Also remove this column: 6 or more first digits of its fingerprint."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove columns of changed networks that no run folder needs, and print what was freed.

    Columns of networks as published stay, unless --drop names them.

    Example: varve gc ucf101.zarr --dry-run
    """
    from varve.pipeline.cli.format_store import garbage_facts, garbage_lines
    from varve.stores import FeatureStore

    report = FeatureStore.open(store).gc(dry_run, drop or ())
    show(as_json, garbage_facts, garbage_lines, report)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the videos and the store.")] = Path("demo"),
    backbone: Annotated[
        list[str] | None, typer.Option(help="NAME:WEIGHTS, instead of small random networks.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Number format of the networks.")] = "float32",
    clips_per_class: Annotated[int, typer.Option(help="Videos to make of each class.")] = 20,
    sound: Annotated[
        bool, typer.Option("--sound", help="Add audio, and four classes that only audio shows.")
    ] = False,
) -> None:
    """Make a small data set of videos, build a store of it, and train heads task by task.

    Needs no download: unless --backbone names weights, the networks are small and random.

    Example: varve demo --out demo
    """
    from varve.pipeline.cli.demo import run
    from varve.pipeline.progress import default_progress

    run(out, backbone, precision, clips_per_class, sound, default_progress())
