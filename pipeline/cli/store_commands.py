"""The command line. Light to import: each command loads what it needs.

Exit codes: 0 done, 1 done with quarantined clips or a failed check, 2 not done (the request or its
surroundings were wrong; the message says what and what to do), 130 interrupted.
"""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varve.pipeline.cli import run_commands

if TYPE_CHECKING:
    from varve.pipeline.config import BuildSpec, Runtime

INTERRUPTED = 130

app = typer.Typer(
    name="varve",
    help="A layered feature store for video: decode once, run frozen networks once, keep layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Dataset = Annotated[Path, typer.Argument(help="Directory of labelled videos, or a list (CSV/TSV).")]
StoreOption = Annotated[Path, typer.Option("--store", "-s", help="Folder of the feature store.")]
StoreArgument = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of the feature store.")
]
Layout = Annotated[str, typer.Option(help="How DATASET is laid out; auto recognises it.")]
Split = Annotated[str | None, typer.Option(help="Which official split, where there are several.")]
Backbones = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone", help="NAME:TAG, NAME:/path/weights.safetensors or NAME:random-SEED."
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="STAGE or STAGE:REDUCTION to keep (tokens cls mean grid7 map pool). "
                      "Default: each network's final vector."),
]  # fmt: skip
Frames = Annotated[int, typer.Option(help="Frames a clip.")]
Sampling = Annotated[str, typer.Option(help="tsn, tsn_random, uniform_fps or dense.")]
Fps = Annotated[float, typer.Option(help="For uniform_fps: frames a second.")]
Stride = Annotated[int, typer.Option(help="For dense: step in frames.")]
Views = Annotated[int, typer.Option(help="Views of each clip; the first is the plain one.")]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror half of the views after the first.")]
RandomCrop = Annotated[
    bool, typer.Option("--random-crop", help="Crop the views after the first at random.")
]
Dtype = Annotated[str, typer.Option(help="On disk: float16, float32 or bfloat16.")]
Precision = Annotated[
    str,
    typer.Option(help="Of the networks: float32, bfloat16 (4 x faster on some CPUs), float16."),
]
DecoderOption = Annotated[str, typer.Option(help="auto (PyAV), pyav, decord or torchcodec.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Workers = Annotated[int, typer.Option(help="Worker processes; 0 chooses by cores.")]
Scheduler = Annotated[str, typer.Option(help="tcp://HOST:PORT of a running Dask scheduler.")]
Serial = Annotated[bool, typer.Option("--serial", help="No cluster; for debugging.")]
Retry = Annotated[bool, typer.Option("--retry", help="Try quarantined clips again.")]
Deadline = Annotated[float, typer.Option(help="Seconds that decoding one file may take.")]
Text = Annotated[bool, typer.Option(help="Also keep text features of the class prompts (CLIP).")]
As = typer.Option(help="As in `build`; by default as the store's last build was asked.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def build(
    dataset: Dataset,
    store: StoreOption,
    backbone: Backbones = None,
    keep: Keep = None,
    layout: Layout = "auto",
    split: Split = None,
    frames: Frames = 8,
    sampling: Sampling = "tsn",
    fps: Fps = 0.0,
    stride: Stride = 0,
    views: Views = 1,
    flip: Flip = False,
    random_crop: RandomCrop = False,
    dtype: Dtype = "float16",
    precision: Precision = "float32",
    decoder: DecoderOption = "auto",
    text: Text = True,
    device: Device = "auto",
    workers: Workers = 0,
    scheduler: Scheduler = "",
    serial: Serial = False,
    deadline: Deadline = 120.0,
    retry: Retry = False,
    as_json: Json = False,
) -> None:
    """Compute whatever features of DATASET the store lacks.

    Safe to stop at any moment and to run again: only what is missing is computed.

    Example: varve build videos/ --store ucf101.zarr --backbone ViT-B-16:openai --keep proj
    --keep blocks.10.mlp:cls
    """
    from varve.pipeline.cli.format_store import report_facts, report_summary
    from varve.pipeline.datasets.layouts import check_root
    from varve.pipeline.extraction.build import build as run
    from varve.pipeline.progress import Progress, default_progress

    check_root(dataset)
    spec = _spec(backbone, keep, frames, sampling, fps, stride, views, flip, random_crop, decoder,
                 precision, dtype, text)  # fmt: skip
    runtime = _runtime(device, workers, scheduler, serial, deadline, retry)
    progress = Progress() if as_json else default_progress()
    report = run(
        dataset, store, spec, layout=layout, split=split, runtime=runtime, progress=progress
    )
    if as_json:
        _print_json(report_facts(report))
    else:
        print(report_summary(report))
    raise typer.Exit(1 if len(report.quarantined) else 0)


@app.command()
def plan(
    dataset: Dataset,
    store: StoreOption,
    backbone: Backbones = None,
    keep: Keep = None,
    layout: Layout = "auto",
    split: Split = None,
    frames: Frames = 8,
    sampling: Sampling = "tsn",
    fps: Fps = 0.0,
    stride: Stride = 0,
    views: Views = 1,
    flip: Flip = False,
    random_crop: RandomCrop = False,
    dtype: Dtype = "float16",
    precision: Precision = "float32",
    decoder: DecoderOption = "auto",
    text: Text = True,
    device: Device = "auto",
    workers: Workers = 0,
    scheduler: Scheduler = "",
    serial: Serial = False,
    deadline: Deadline = 120.0,
    retry: Retry = False,
    as_json: Json = False,
    estimate: Annotated[bool, typer.Option(help="Probe this machine for the time.")] = True,
) -> None:
    """Say what `build` with the same options would do. Writes nothing.

    Example: varve plan videos/ --store ucf101.zarr --backbone ViT-B-16:openai --keep proj
    """
    from varve.pipeline.cli.format_store import plan_facts, plan_summary
    from varve.pipeline.datasets.layouts import check_root
    from varve.pipeline.extraction.build import plan as run
    from varve.pipeline.progress import Progress, default_progress

    check_root(dataset)
    spec = _spec(backbone, keep, frames, sampling, fps, stride, views, flip, random_crop, decoder,
                 precision, dtype, text)  # fmt: skip
    runtime = _runtime(device, workers, scheduler, serial, deadline, retry)
    progress = Progress() if as_json else default_progress()
    made, seconds = run(dataset, store, spec, layout=layout, split=split, runtime=runtime,
                        progress=progress, estimate=estimate)  # fmt: skip
    if as_json:
        _print_json(plan_facts(made, seconds, store))
    else:
        print(plan_summary(made, seconds, store))


@app.command()
def info(store: StoreArgument, as_json: Json = False) -> None:
    """Say what a store holds.

    Example: varve info ucf101.zarr
    """
    from varve.pipeline.cli.format_store import store_facts, store_summary
    from varve.stores import FeatureStore

    opened = FeatureStore.open(store)
    if as_json:
        _print_json(store_facts(opened))
    else:
        print(store_summary(opened))


@app.command()
def failures(store: StoreArgument, as_json: Json = False) -> None:
    """List quarantined clips and why. Exit code 1 where there are any.

    Example: varve failures ucf101.zarr
    """
    from varve.pipeline.cli.format_store import failure_lines
    from varve.stores import FeatureStore

    table = FeatureStore.open(store).clips
    failed = table[table["status"] == "quarantined"]
    if as_json:
        columns = ["path", "start_seconds", "end_seconds", "label", "split", "reason", "detail"]
        _print_json(json.loads(failed[columns].reset_index().to_json(orient="records")))
    else:
        print(failure_lines(failed) or "no clip is quarantined")
    raise typer.Exit(1 if len(failed) else 0)


@app.command()
def verify(
    store: StoreArgument,
    dataset: Annotated[
        Path | None, typer.Option(help="Where the videos lie, if not where they were.")
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="Weights to load for the network of that name, if not as they were."),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Clips to compute again from their videos.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    as_json: Json = False,
) -> None:
    """Read every chunk's checksum and compute a sample of cells again. Exit code 1 on a finding.

    Example: varve verify ucf101.zarr --sample 16
    """
    from dataclasses import asdict

    from varve.pipeline.extraction.verify import verify as run
    from varve.pipeline.progress import Progress, default_progress
    from varve.stores.digests import store_name

    given = {store_name(name): name for name in backbone or []}
    progress = Progress() if as_json else default_progress()
    result = run(
        store, dataset=dataset, backbones=given, sample=sample, seed=seed, progress=progress
    )
    if as_json:
        _print_json(asdict(result))
    else:
        print(f"{result.chunks} cells read, checksums verified")
        print(f"{result.equal + result.close} cells computed again: {result.equal} equal to the "
              f"bit, {result.close} within rounding")  # fmt: skip
        if result.changed:
            print(f"{result.changed} columns of changed networks: checksums alone")
        for finding in result.findings:
            where = "  ".join(
                part for part in (finding.column, finding.shard, finding.clip) if part
            )
            print(f"BAD {where}: {finding.problem}")
        print("nothing differs" if not result.findings else f"{len(result.findings)} findings")
    raise typer.Exit(1 if result.findings else 0)


@app.command()
def diff(
    store: StoreArgument,
    backbone: Annotated[list[str] | None, As] = None,
    keep: Annotated[list[str] | None, As] = None,
    frames: Annotated[int | None, As] = None,
    sampling: Annotated[str | None, As] = None,
    fps: Annotated[float | None, As] = None,
    stride: Annotated[int | None, As] = None,
    views: Annotated[int | None, As] = None,
    flip: Annotated[bool | None, As] = None,
    random_crop: Annotated[bool | None, As] = None,
    dtype: Annotated[str | None, As] = None,
    precision: Annotated[str | None, As] = None,
    decoder: Annotated[str | None, As] = None,
    as_json: Json = False,
) -> None:
    """Say of every column what in its key is not as asked, and why it cannot serve.

    Example: varve diff ucf101.zarr --frames 16
    """
    from varve.pipeline.extraction.diff import diff as run
    from varve.pipeline.extraction.diff import facts, lines, request_of

    spec = request_of(store, backbones=backbone, keep=keep, frames=frames, sampling=sampling,
                      fps=fps, stride=stride, views=views, flip=flip, random_crop=random_crop,
                      dtype=dtype, precision=precision, decoder=decoder)  # fmt: skip
    found = run(store, spec)
    if as_json:
        _print_json(facts(found))
    else:
        print("\n".join(lines(found)) or "the store has no column")


@app.command()
def gc(
    store: StoreArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say what would be freed.")
    ] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Also this column: the beginning of its fingerprint, from 6 digits on."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove columns of networks that methods changed and no run folder needs; say what it freed.

    Columns of networks as published stay, unless --drop names them.

    Example: varve gc ucf101.zarr --dry-run
    """
    from dataclasses import asdict

    from varve.pipeline.cli.format_store import garbage_lines
    from varve.stores import FeatureStore

    report = FeatureStore.open(store).gc(dry_run, drop or ())
    if as_json:
        facts = asdict(report) | {"store": str(store), "freed_bytes": report.freed_bytes}
        _print_json(facts)
    else:
        print(garbage_lines(report))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the videos and the store.")] = Path("demo"),
    backbone: Backbones = None,
    precision: Precision = "float32",
    clips_per_class: Annotated[int, typer.Option(help="Videos to make of each class.")] = 20,
    sound: Annotated[
        bool, typer.Option("--sound", help="With sound, and four classes told by it alone.")
    ] = False,
) -> None:
    """Make a small data set of real videos, build a store of it, learn its classes task by task.

    Needs no network: unless --backbone names weights, the networks are small and random.

    Example: varve demo --out demo
    """
    from varve.pipeline.cli.demo import run
    from varve.pipeline.progress import default_progress

    run(out, backbone, precision, clips_per_class, sound, default_progress())


app.add_typer(run_commands.app)


def main() -> None:
    """Run the command line; errors are sentences unless --debug asks for more."""
    debug = "--debug" in sys.argv[1:]
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        with _noted_interrupts() as interrupts:
            code = app(args=arguments, standalone_mode=False, prog_name="varve") or 0
        if code == INTERRUPTED or interrupts:  # the option parser turns Ctrl-C into this
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        _complain(error)
        sys.exit(2)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C as ever, and a note of it: one that comes within a callback is raised and lost."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    # Another thread may set no handler, and one that is not Python's own is somebody's wish.
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _complain(error: Exception) -> None:
    show = getattr(error, "show", None)
    if show is not None:  # the option parser's own: usage, and what was wrong with it
        show()
        return
    expected = isinstance(error, ValueError | OSError | LookupError | RuntimeError)
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    if isinstance(error, OSError) and error.filename:
        text += f": {error.filename}"
    kind = "error" if expected else f"unexpected {type(error).__name__} (--debug shows where)"
    print(f"varve: {kind}: {text}", file=sys.stderr)


def _spec(
    backbone: list[str] | None, keep: list[str] | None, frames: int, sampling: str, fps: float,
    stride: int, views: int, flip: bool, random_crop: bool, decoder: str, precision: str,
    dtype: str, text: bool,
) -> "BuildSpec":  # fmt: skip
    from varve.pipeline.config import BuildSpec

    return BuildSpec(
        tuple(backbone or ()), tuple(keep or ()), frames, sampling, fps, stride, views, flip,
        random_crop, decoder, precision, dtype, text,
    )  # fmt: skip


def _runtime(
    device: str, workers: int, scheduler: str, serial: bool, deadline: float, retry: bool
) -> "Runtime":
    from varve.pipeline.config import Runtime

    return Runtime(device, workers, scheduler, serial, deadline, retry)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
