"""Update: a changed network's features into a store, from the deepest features that still hold.

The same operation as a build, for a backbone that a method has changed: compare keys, find for
each missing cell the deepest valid ancestor, run the stages between, write, mark done. The clips
are those of the table; a video is opened only where no feature can serve.
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
from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.decoders import require
from varve.pipeline.extraction.commit import carry_out, device_of, job_of
from varve.pipeline.extraction.disk_space import check_disk, explained
from varve.pipeline.extraction.estimate import Estimate, probe
from varve.pipeline.extraction.passes import passes
from varve.pipeline.extraction.plan import Plan, make_plan
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore, SpecMismatch, atomic, lock
from varve.stores.clips import row_ids

Rows = Sequence[int] | np.ndarray | slice | None


@dataclass(frozen=True)
class UpdateReport:
    """What an update did.

    Attributes:
        store: Its folder.
        fingerprints: Of the columns asked for, by the name of the feature and, where the store
            has several views, by (feature, view). `FeatureStore.feature(..., fingerprint=)` takes
            one.
        computed: Clips computed.
        decoded: Files decoded; 0 unless no feature could serve.
        frames: Through the network.
        adopted: Cells that an unfinished update had left staged.
        calls: Of each stage, "network stage"; a call is one batch. Stages that are missing here
            did not run.
        bytes_read: Of the features that the computation began from.
        failed: Clips that gave no feature, with `reason` and `detail`.
        seconds: In all, and by part.
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
    """Compute what a store lacks of a backbone that a method has changed.

    The backbone is taken as it is now, in eval mode. Columns of other states of it stay.

    Args:
        store: A store that a build has made.
        backbone: Grafted, unfrozen or as loaded.
        keep: Features to keep, as in a build; by default the last vector.
        rows: Rows of the table of clips, a slice of them or a mask; by default every clip that is
            ready.
        spec: How clips become frames, and the number format on disk; by default as in the
            store's last build. Its networks, `keep` and `precision` are not looked at.
        runtime: By default this process, without a cluster.
        holder: A run folder that needs the columns asked for: `FeatureStore.gc` leaves them while
            it exists. By default nobody's, and the next `gc` may free them.

    Raises:
        ValueError: A feature that the backbone has not; clips of another number of frames than
            its grafts look across; a store of another precision; a `holder` that is no folder.
        SpecMismatch: A store that no build of this version has made, and no `spec`.
        StoreLocked: Another process writes this store.
        IndexError: A row is outside the table.
        OSError: The store cannot be written or its disk is too small. What was finished is kept.
    """
    runtime, progress = runtime or Runtime(serial=True), progress or Progress()
    began = time.perf_counter()
    opened = _opened(store)
    path = opened.path
    with explained(path), lock.locked(path):
        opened = FeatureStore.open(path)
        atomic.clear_temporary(path)
        name, frozen, plan = _prepare(opened, backbone, keep, rows, spec, runtime)
        check_disk(plan, path)
        if holder is not None:
            opened.add_reference(holder, _fingerprints(plan).values())
        job = job_of(plan, path, runtime, describe=False)
        done = carry_out(plan, job, runtime, progress, {name: frozen})
        atomic.clear_temporary(path)
    done.seconds["all"] = time.perf_counter() - began
    failed = opened.clips.loc[sorted(done.failed), ["path"]].copy()
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


def plan_update(
    store: str | Path | FeatureStore,
    backbone: Backbone,
    keep: Sequence[str] = (),
    rows: Rows = None,
    *,
    spec: BuildSpec | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    estimate: bool = True,
) -> tuple[Plan, Estimate | None]:
    """What `update` with the same arguments would do. Writes nothing. Returns as `plan` does."""
    runtime, progress = runtime or Runtime(serial=True), progress or Progress()
    opened = _opened(store)
    name, frozen, plan = _prepare(opened, backbone, keep, rows, spec, runtime)
    if not estimate or not plan.blocks:
        return plan, None
    job = job_of(plan, opened.path, runtime, describe=False)
    return plan, probe(plan, job, runtime, progress, {name: frozen})


def _opened(store: str | Path | FeatureStore) -> FeatureStore:
    return store if isinstance(store, FeatureStore) else FeatureStore.open(store)


def _prepare(
    opened: FeatureStore,
    backbone: Backbone,
    keep: Sequence[str],
    rows: Rows,
    spec: BuildSpec | None,
    runtime: Runtime,
) -> tuple[str, Backbone, Plan]:
    """The network's name in the plan, the network as it is now, and the plan."""
    frozen = snapshot(backbone)
    precision = str(backbone.precision).removeprefix("torch.")
    _check_precision(opened, backbone.name, precision)
    # Two states of one network may be worked on in one process at once.
    name = f"{backbone.name}#{uuid.uuid4().hex[:12]}"
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    wanted = replace(
        spec or recorded_request(opened), backbones=(name,), keep=keep, precision=precision
    )
    require(wanted.decoder)
    asked = passes(wanted, {name: frozen}, opened, device_of(runtime))
    table = opened.clips
    ready = (table["status"] == "ready").to_numpy()
    chosen = np.flatnonzero(ready) if rows is None else np.unique(row_ids(rows, len(table)))
    base = Path(str(opened.attributes.get("dataset", "")))
    base = base.parent if base.is_file() else base
    plan = make_plan(
        opened.path, opened, table.copy(), chosen, base, asked, {name: frozen}, describe=False
    )
    return name, frozen, plan


def recorded_request(opened: FeatureStore) -> BuildSpec:
    """What the store's last build was asked for.

    Raises:
        SpecMismatch: No build of this version has written it down.
    """
    try:
        held: dict[str, Any] = dict(opened.attributes["request"])
        held |= {name: tuple(held[name]) for name in ("backbones", "keep")}
        return BuildSpec(**held)
    except (KeyError, TypeError) as error:
        raise SpecMismatch(
            f"{opened.path} does not say how its clips became frames ({error}): build it once "
            "more with this version (nothing that holds is computed again), or give `spec`"
        ) from error


def _check_precision(opened: FeatureStore, name: str, precision: str) -> None:
    """Refuse to compute a whole network anew where nothing but the precision is another."""
    own = [feature for feature in opened.features() if feature.backbone == name]
    held = sorted({str(feature.spec["stages"][0]["precision"]) for feature in own})
    if held and precision not in held:
        raise ValueError(
            f"{opened.path} holds {name} in {' and '.join(held)}, and this backbone runs in "
            f"{precision}: no feature of the store could serve it. Load it with "
            f"backbones.load(..., torch.{held[0]}), or build the store with --precision "
            f"{precision} first"
        )


def _fingerprints(plan: Plan) -> dict[str | tuple[str, int], str]:
    found: dict[str | tuple[str, int], str] = {}
    for one, columns in zip(plan.passes, plan.columns, strict=False):
        for column in columns:
            spec = column.output.spec
            found[spec.feature, one.frame_set.view] = spec.fingerprint
            if one.frame_set.view == 0:
                found[spec.feature] = spec.fingerprint
    return found
