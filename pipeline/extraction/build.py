"""Build: compute a data set's features into a store. `plan` returns what a build would do.

A first build, resuming after a crash, new or replaced videos and another backbone are one
operation: list the clips, compare keys, decode and compute what is missing, write, mark done.
"""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch

from varve.pipeline import backbones as networks
from varve.pipeline.backbones import (
    Backbone,
    ClassPrompts,
    check_prompts,
    class_features,
    class_features_key,
)
from varve.pipeline.config import WHOLE, BuildSpec, FrameSet, Runtime
from varve.pipeline.datasets import layouts
from varve.pipeline.datasets.layouts import Listing
from varve.pipeline.decoders import require
from varve.pipeline.extraction import whole_videos
from varve.pipeline.extraction.clip_status import Outcome, enter, enter_known, settle
from varve.pipeline.extraction.commit import Done, device_of, job_of, run_plan
from varve.pipeline.extraction.disk_space import check_disk, explained
from varve.pipeline.extraction.estimate import Estimate, probe
from varve.pipeline.extraction.passes import passes
from varve.pipeline.extraction.plan import Plan, make_plan
from varve.pipeline.extraction.scan import Scan, scan
from varve.pipeline.extraction.sources import StoreInventory
from varve.pipeline.extraction.update import Rows, open_store, prepare_update
from varve.pipeline.extraction.whole_videos import settle_clips
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore, atomic, clips, lock, staging, text_features
from varve.stores.locations import local_folder
from varve.stores.pages import read as read_pages
from varve.stores.windows import Parts

LOGS = "logs"


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before any work starts. A plan of whole videos is over `parts`."""

    listing: Listing
    scan: Scan
    backbones: dict[str, Backbone]
    plan: Plan
    parts: Parts | None = None


@dataclass(frozen=True)
class BuildReport:
    """Report of a build.

    Attributes:
        store: The store's folder.
        summary: Description of the recognised layout.
        clips: Number of clips of the present listing, by status.
        new, changed, gone: Numbers of clips, compared with the build before.
        moved: Clips that were at another path before, recognised by their bytes.
        duplicates: Numbers of clips whose bytes and interval a clip of another split has, by the
            splits; see `clips.shared_between_splits`.
        hashed: Files whose bytes were read for their digest.
        decoded: Files decoded.
        computed: Clips computed; pages or windows, of whole videos.
        frames: Frames that went through a network, in all passes together.
        adopted: Cells that an unfinished build had left staged.
        copied: Cells copied from another row with the same bytes.
        quarantined: Rows of the table that failed, in this build or an earlier one.
        seconds: Seconds in all, and by part (decode, forward, write: summed over workers).
        file_bytes: Size of the columns' files.
        calls: Calls of each stage, "network stage"; a call is one batch.
        bytes_read: Bytes of the features that computations started from.
        left_out: Files of the data set that are no clip, by kind.
        unit: What `computed` counts, "clips", "pages" or "windows".
        same_prompts: Groups of classes that have the same prompts, and so one text feature.
    """

    store: Path
    summary: str
    clips: dict[str, int]
    new: int
    changed: int
    gone: int
    moved: int
    duplicates: dict[str, int]
    hashed: int
    decoded: int
    computed: int
    frames: int
    adopted: int
    copied: int
    quarantined: pd.DataFrame
    seconds: dict[str, float]
    file_bytes: int
    calls: dict[str, int]
    bytes_read: int
    left_out: tuple[tuple[str, int], ...] = ()
    unit: str = "clips"
    same_prompts: tuple[tuple[str, ...], ...] = ()


def build(
    dataset: str | Path,
    store: str | Path,
    spec: BuildSpec,
    *,
    layout: str = "auto",
    split: str | None = None,
    splits: str = "auto",
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Compute the features of a data set that a store does not have.

    Args:
        dataset: Directory of the videos, or a list of clips.
        store: Folder of the store; created where it does not exist.
        spec: The requested features.
        layout: Name of the directory's layout; `auto` recognises it.
        split: One of the data set's official splits.
        splits: `none` to read folders named after splits (train/, test/) as classes.
        runtime: Device, workers, deadline.
        progress: Receives the progress; silent by default.

    Returns:
        What was done. Clips that cannot be decoded are in `quarantined`; they do not end a build.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: The request cannot be met (unknown layout, stage, network; other data set).
        StoreLocked: Another process builds this store.
        OSError: The store cannot be written or its disk is too small. What was finished is kept.
    """
    runtime, progress = runtime or Runtime(), progress or Progress()
    began = time.perf_counter()
    root, path = Path(dataset), local_folder(store)
    layouts.check_root(root)
    prepared = partial(prepare, root, path, spec, layout=layout, split=split, splits=splits)
    ready = None
    if not (path / "zarr.json").exists():
        # A request that cannot be met leaves nothing behind, so it is checked first.
        ready = prepared(runtime=runtime, progress=progress)
        check_disk(ready.plan, path)
    with explained(path):
        opened = FeatureStore.create(path)
    with explained(path), lock.locked(path):
        atomic.clear_temporary(path)
        if ready is None or len(opened.clips):
            ready = prepared(runtime=runtime, progress=progress)
            check_disk(ready.plan, path)
        table, plan = ready.scan.table, ready.plan
        _record(opened, ready, root, spec)
        clips.write(opened.path, table)
        networks = ready.backbones if runtime.serial else {}
        parts = ready.parts
        if parts is not None:
            whole_videos.write_parts(opened.path, parts)
        job = job_of(plan, path, runtime, describe=parts is None)
        done = run_plan(plan, job, runtime, progress, networks)
        if parts is not None:
            settle_clips(table, ready.scan.rows, plan, parts, done.failed, done.overflowed)
        else:
            settle(table, plan, ready.scan.rows)
        clips.write(opened.path, table)
        staging.drop(opened.path, staging.facts_files(opened.path))
        if spec.text:
            for backbone in ready.backbones.values():
                keep_text(opened.path, backbone, ready.listing.classes, progress)
        done.seconds["all"] = time.perf_counter() - began
        if plan.decodes or ready.scan.new or ready.scan.changed:
            _log(opened.path, spec, runtime, done)
        atomic.clear_temporary(opened.path)
    listed = table.loc[ready.scan.rows]
    return BuildReport(
        store=opened.path,
        summary=ready.listing.summary,
        clips=dict(Counter(listed["status"])),
        new=ready.scan.new,
        changed=ready.scan.changed,
        gone=ready.scan.gone,
        moved=ready.scan.moved,
        duplicates=clips.shared_between_splits(listed),
        hashed=ready.scan.hashed,
        decoded=plan.decodes,
        computed=plan.clips,
        frames=done.frames,
        adopted=sum(len(column.staged) for column in plan.all_columns),
        copied=sum(len(column.copied) for column in plan.all_columns),
        quarantined=listed[listed["status"] == "quarantined"],
        seconds=done.seconds,
        file_bytes=plan.disk_bytes,
        calls=dict(done.calls),
        bytes_read=plan.bytes_read,
        left_out=plan.left_out,
        unit=plan.unit,
        same_prompts=plan.prompts.shared if plan.prompts else (),
    )


@overload
def plan(
    dataset: str | Path,
    store: str | Path,
    spec: BuildSpec,
    *,
    layout: str = "auto",
    split: str | None = None,
    splits: str = "auto",
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    estimate: bool = True,
) -> tuple[Plan, Estimate | None]: ...
@overload
def plan(
    dataset: str | Path | FeatureStore,
    store: Backbone,
    keep: Sequence[str] = (),
    rows: Rows = None,
    *,
    spec: BuildSpec | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    estimate: bool = True,
) -> tuple[Plan, Estimate | None]: ...
def plan(
    dataset: Any,
    store: Any,
    *arguments: Any,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    estimate: bool = True,
    **options: Any,
) -> tuple[Plan, Estimate | None]:
    """Plan what `build` or `update` with the same arguments would do. Writes nothing.

    Returns:
        The plan, and an estimate of its time from a short probe of this machine (None where
        nothing is to be computed or `estimate` is False).

    Raises:
        ValueError: As of `build` and `update`.
    """
    progress = progress or Progress()
    if isinstance(store, Backbone):
        runtime, opened = runtime or Runtime(serial=True), open_store(dataset)
        path = opened.path
        backbones, work, _ = prepare_update(opened, store, *arguments, runtime=runtime, **options)
    else:
        runtime, path = runtime or Runtime(), local_folder(store)
        ready = prepare(dataset, path, *arguments, runtime=runtime, progress=progress, **options)
        backbones, work = ready.backbones, ready.plan
    if not estimate or not work.blocks:
        return work, None
    return work, probe(work, job_of(work, path, runtime), runtime, progress, backbones)


def prepare(
    dataset: str | Path,
    path: Path,
    spec: BuildSpec,
    *,
    layout: str = "auto",
    split: str | None = None,
    splits: str = "auto",
    runtime: Runtime,
    progress: Progress,
) -> Prepared:
    """List the clips, build the networks for their keys, scan, and plan. Writes nothing.

    Args:
        path: The store's folder, new or empty where there is no store yet.
    """
    root = Path(dataset)
    layouts.check_root(root)
    opened = FeatureStore.open(path) if (path / "zarr.json").exists() else None
    if opened is None and path.is_dir():
        FeatureStore.check_empty(path)
    require(spec.decoder)
    listing = layouts.read(root, layout, split, splits)
    progress.message(listing.summary)
    backbones = requested_networks(spec)
    prompts = _class_prompts(spec, backbones, listing.classes)
    requested = passes(spec, backbones, opened, device_of(runtime))
    old = opened.clips if opened else clips.empty()
    base = listing.root.absolute()
    # What another decoder, or another version of it, could not read is tried again.
    decoder = FrameSet(decoder=spec.decoder).code or spec.decoder
    known = opened.attributes.get("decoder", decoder) if opened else decoder
    retry = runtime.retry or known != decoder
    scanned = scan(old, listing, base, retry)
    enter_known(old, scanned.table)
    left = map(Outcome.from_json, staging.all_facts(path))
    enter(scanned.table, (o for o in left if not (retry and (o.reason or o.overflowed))))
    for message in StoreInventory(path, opened, len(scanned.table)).lost_tables():
        progress.message(message)
    parts, table, rows = None, scanned.table, scanned.rows
    if spec.sampling == WHOLE:
        frame_set = requested[0].frame_set
        pages = read_pages(path, frame_set.grid)
        pages = whole_videos.describe(pages, table, rows, base, frame_set, runtime, progress)
        parts = whole_videos.parts_of(path, frame_set, pages, table, rows)
        table, rows = whole_videos.part_table(table, rows, parts)
    inventory = StoreInventory(path, opened, len(table))
    plan = make_plan(inventory, table, rows, base, requested, backbones, parts=parts)
    plan = replace(plan, left_out=listing.left_out, prompts=prompts)
    here = device_of(runtime) == "cpu" and not runtime.scheduler
    if plan.blocks and here and (warning := networks.precision_warning(spec.precision)):
        progress.message(warning)
    return Prepared(listing, scanned, backbones, plan, parts)


def _class_prompts(
    spec: BuildSpec, backbones: Mapping[str, Backbone], classes: Sequence[str]
) -> ClassPrompts | None:
    """Return the prompts of the classes; None where no text features are requested.

    Raises:
        ValueError: A prompt is longer than a text tower can read.
    """
    towers = [backbone.text for backbone in backbones.values() if backbone.text] * spec.text
    checked = [check_prompts(text, classes) for text in towers if classes]
    if not checked:
        return None
    shared = dict.fromkeys(group for prompts in checked for group in prompts.shared)
    return replace(checked[0], shared=tuple(shared))


def keep_text(store: Path, backbone: Backbone, classes: Iterable[str], progress: Progress) -> None:
    """Store the text features of the classes' prompts, for a backbone that has a text tower."""
    names = list(classes)
    if backbone.text is None or not names:
        return
    key = class_features_key(backbone.text)
    known = text_features.stored(store, backbone.name, key)
    if missing := [name for name in names if name not in known]:
        progress.message(f"text features of {len(missing)} classes for {backbone.name}")
        computed = class_features(backbone.text, missing).numpy()
        known |= dict(zip(missing, computed, strict=True))
    values = np.stack([known[name] for name in names])
    features = text_features.TextFeatures(tuple(names), values)
    text_features.write(store, backbone.name, key, features)


def _record(opened: FeatureStore, ready: Prepared, root: Path, spec: BuildSpec) -> None:
    """Record in the store where its data set and weights are, for `verify` and for people."""
    names = {name: list(names) for name, names in opened.attributes.get("backbones", {}).items()}
    for name, backbone in ready.backbones.items():
        # Two weight files of one stem share a name; their columns' keys tell them apart.
        names[backbone.name] = sorted({*names.get(backbone.name, []), name})
    opened.set_attributes(
        {
            "dataset": str(root.resolve()),
            "layout": ready.listing.layout,
            "classes": list(ready.listing.classes),
            "backbones": names,
            "request": {**asdict(spec), "backbones": list(ready.backbones)},
            "decoder": FrameSet(decoder=spec.decoder).code or spec.decoder,
        }
    )


def requested_networks(spec: BuildSpec) -> dict[str, Backbone]:
    """Load the networks of a request, by name with the absolute path of a weight file.

    Workers may run elsewhere, and one file is one network.
    """
    precision = getattr(torch, spec.precision)
    names = dict.fromkeys(map(_weights_in_full, spec.backbones))
    return {name: networks.seal(networks.load(name, precision)) for name in names}


def _weights_in_full(backbone: str) -> str:
    network, colon, weights = backbone.partition(":")
    path = Path(weights)
    named = path.is_file() or ("/" in weights and path.is_dir())
    return f"{network}:{path.resolve()}" if colon and named else backbone


def _log(store: Path, spec: BuildSpec, runtime: Runtime, done: Done) -> None:
    """Write a build log, the only file of a store that has the time and the machine."""
    packages = ("torch", "torchvision", "open_clip_torch", "timm", "av", "zarr", "numpy")
    record = {
        "ended": time.strftime("%F %T%z"),
        "machine": f"{platform.node()} {platform.machine()} {os.cpu_count()} cores",
        "versions": {name: version(name) for name in packages},
        "spec": asdict(spec),
        "runtime": asdict(runtime),
        "frames": done.frames,
        "seconds": {name: round(value, 3) for name, value in done.seconds.items()},
    }
    name = f"build-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.json"
    atomic.write(store, store / LOGS / name, json.dumps(record, indent=1).encode())
