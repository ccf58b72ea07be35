"""Update: compute a changed network's features from the deepest features that are still valid.

It is the operation of a build, for a backbone that a method has changed: compare keys, choose for
each missing cell the deepest valid source, run the stages between, write, mark done. The clips
are those of the table. A video is opened only where no feature can serve.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.backbones import Backbone, snapshot
from varve.pipeline.config import WHOLE, BuildSpec, Runtime
from varve.pipeline.decoders import require
from varve.pipeline.extraction.commit import device_of, job_of, run_plan
from varve.pipeline.extraction.disk_space import check_disk, explained
from varve.pipeline.extraction.passes import passes
from varve.pipeline.extraction.plan import Plan, make_plan
from varve.pipeline.extraction.sources import StoreInventory
from varve.pipeline.extraction.whole_videos import part_table, parts_of
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore, SpecMismatch, atomic, lock, windows
from varve.stores.clips import row_ids
from varve.stores.pages import Pages
from varve.stores.pages import read as read_pages
from varve.stores.windows import Parts, Windows

Rows = Sequence[int] | np.ndarray | slice | None


@dataclass(frozen=True)
class UpdateReport:
    """Report of an update.

    Attributes:
        store: The store's folder.
        fingerprints: Fingerprints of the requested columns, by the name of the feature and by
            (feature, view). `FeatureStore.feature(..., fingerprint=)` takes one.
        computed: Clips computed; pages or windows, of whole videos.
        decoded: Files decoded; 0 unless no feature could serve.
        frames: Frames that went through the network.
        adopted: Cells that an unfinished update had left staged.
        calls: Calls of each stage, "network stage"; a call is one batch. Stages that are missing
            here did not run.
        bytes_read: Bytes of the features that the computation started from.
        failed: Clips, or pages or windows of whole videos, that lack a feature, with `reason` and
            `detail`.
        seconds: Seconds in all, and by part.
    """

    store: Path
    fingerprints: Mapping[str | tuple[str, int], str]
    computed: int
    decoded: int
    frames: int
    adopted: int
    calls: Mapping[str, int]
    bytes_read: int
    failed: pd.DataFrame
    seconds: Mapping[str, float]


def update(
    store: str | Path | FeatureStore,
    backbone: Backbone,
    keep: Sequence[str] = (),
    rows: Rows = None,
    *,
    spec: BuildSpec | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    holder: str | Path | None = None,
) -> UpdateReport:
    """Compute the features that a store lacks of a backbone that a method has changed.

    The backbone is used as it is now, in eval mode. Columns of its other states stay.

    Args:
        store: A store that a build has made.
        backbone: A backbone that is grafted, unfrozen or as loaded.
        keep: Features to keep, as in a build; by default the last vector.
        rows: Rows of the table of clips, a slice of them or a mask; by default every ready clip.
        spec: How clips become frames, and the number format on disk; by default as in the
            store's last build. Its networks, `keep` and `precision` are ignored.
        runtime: Device and workers; by default this process, without a cluster.
        progress: Receives the progress; silent by default.
        holder: A run folder that needs the columns: `FeatureStore.gc` keeps them while it exists.
            By default there is none, and the next `gc` may free them.

    Raises:
        ValueError: The backbone has no such feature; the clips have another number of frames than
            its temporal modules; the store has another precision; `holder` is no folder.
        SpecMismatch: A store that no build of this version has made, and no `spec`.
        StoreLocked: Another process writes this store.
        IndexError: A row is outside the table.
        OSError: The store cannot be written or its disk is too small. What was finished is kept.
    """
    runtime, progress = runtime or Runtime(serial=True), progress or Progress()
    began = time.perf_counter()
    path = open_store(store).path
    with explained(path), lock.locked(path):
        opened = FeatureStore.open(path)
        atomic.clear_temporary(path)
        networks, plan, parts = prepare_update(
            opened, backbone, keep, rows, spec=spec, runtime=runtime
        )
        check_disk(plan, path)
        if holder is not None:
            opened.add_reference(holder, _fingerprints(plan).values())
        if isinstance(parts, Windows):
            windows.write(path, parts)
        job = job_of(plan, path, runtime, describe=False)
        done = run_plan(plan, job, runtime, progress, networks)
        atomic.clear_temporary(path)
    done.seconds["all"] = time.perf_counter() - began
    failed = plan.table.loc[sorted(done.failed), ["path"]].copy()
    failed["reason"] = [done.failed[row][0] for row in sorted(done.failed)]
    failed["detail"] = [done.failed[row][1] for row in sorted(done.failed)]
    return UpdateReport(
        store=path,
        fingerprints=_fingerprints(plan),
        computed=plan.clips,
        decoded=plan.decodes,
        frames=done.frames,
        adopted=sum(len(column.staged) for column in plan.all_columns),
        calls=dict(done.calls),
        bytes_read=plan.bytes_read,
        failed=failed,
        seconds=done.seconds,
    )


def open_store(store: str | Path | FeatureStore) -> FeatureStore:
    """Return the store, opened where it is given by its folder."""
    return store if isinstance(store, FeatureStore) else FeatureStore.open(store)


def prepare_update(
    opened: FeatureStore,
    backbone: Backbone,
    keep: Sequence[str] = (),
    rows: Rows = None,
    *,
    spec: BuildSpec | None = None,
    runtime: Runtime,
) -> tuple[dict[str, Backbone], Plan, Parts | None]:
    """Return the network as it is now, by its name in the plan; the plan; and what its rows are.

    These are pages or windows of whole videos; None for clips.
    """
    frozen = snapshot(backbone)
    precision = str(backbone.precision).removeprefix("torch.")
    _check_precision(opened, backbone.name, precision)
    # Two states of one network may be worked on in one process at once.
    name = f"{backbone.name}#{uuid.uuid4().hex[:12]}"
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    request = spec or recorded_request(opened)
    wanted = replace(request, backbones=(name,), keep=keep, precision=precision)
    require(wanted.decoder)
    networks = {name: frozen}
    requested = passes(wanted, networks, opened, device_of(runtime))
    table = opened.clips.copy()
    ready = (table["status"] == "ready").to_numpy()
    chosen = np.flatnonzero(ready) if rows is None else np.unique(row_ids(rows, len(table)))
    base = Path(str(opened.attributes.get("dataset", "")))
    base = base.parent if base.is_file() else base
    parts = None
    if wanted.sampling == WHOLE:
        frame_set = requested[0].frame_set
        pages = read_pages(opened.path, frame_set.grid)
        _check_pages(opened, table.loc[chosen], pages)
        parts = parts_of(opened.path, frame_set, pages, table, chosen)
        table, chosen = part_table(table, chosen, parts)
    inventory = StoreInventory(opened.path, opened, len(table))
    plan = make_plan(
        inventory, table, chosen, base, requested, networks, describe=False, parts=parts
    )
    return networks, plan, parts


def _check_pages(opened: FeatureStore, clips: pd.DataFrame, pages: Pages) -> None:
    """Refuse clips of whole videos whose frames are not known; a build reads them."""
    first, last = pages.spans(clips).T
    lacking = clips["path"][first == last].tolist()
    if lacking:
        raise ValueError(
            f"{opened.path} does not know the frames of {len(lacking)} clips in {pages.grid} "
            f"({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}): build them with "
            "--sampling all first, or give `rows` without them"
        )


def recorded_request(opened: FeatureStore) -> BuildSpec:
    """Return the request of the store's last build.

    Raises:
        SpecMismatch: No build of this version has recorded it.
    """
    try:
        request: dict[str, Any] = dict(opened.attributes["request"])
        request |= {name: tuple(request[name]) for name in ("backbones", "keep")}
        return BuildSpec(**request)
    except (KeyError, TypeError) as error:
        raise SpecMismatch(
            f"{opened.path} does not say how its clips became frames ({error}): build it once "
            "more with this version (no valid cell is computed again), or give `spec`"
        ) from error


def _check_precision(opened: FeatureStore, name: str, precision: str) -> None:
    """Refuse to compute a whole network again where only the precision differs."""
    features = [feature for feature in opened.features() if feature.backbone == name]
    stored = sorted({str(feature.spec["stages"][0]["precision"]) for feature in features})
    if stored and precision not in stored:
        raise ValueError(
            f"{opened.path} has {name} in {' and '.join(stored)}, and this backbone runs in "
            f"{precision}: no feature of the store could serve it. Load it with "
            f"backbones.load(..., torch.{stored[0]}), or build the store with --precision "
            f"{precision} first"
        )


def _fingerprints(plan: Plan) -> dict[str | tuple[str, int], str]:
    fingerprints: dict[str | tuple[str, int], str] = {}
    for pass_, columns in zip(plan.passes, plan.columns, strict=False):
        for column in columns:
            spec = column.output.spec
            fingerprints[spec.feature, pass_.frame_set.view] = spec.fingerprint
            if pass_.frame_set.view == 0:
                fingerprints[spec.feature] = spec.fingerprint
    return fingerprints
