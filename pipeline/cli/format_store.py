"""Facts and summaries: what commands print, as JSON for programs and as text for people."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from varve.pipeline.units import clock, size
from varve.stores import FeatureStore
from varve.stores.garbage import GarbageReport

if TYPE_CHECKING:  # torch, which describing a store has no use for
    from varve.pipeline.extraction.build import BuildReport
    from varve.pipeline.extraction.estimate import Estimate
    from varve.pipeline.extraction.passes import Source
    from varve.pipeline.extraction.plan import ColumnPlan, Plan

STATUS_ORDER = ("ready", "pending", "quarantined")


def report_facts(report: "BuildReport") -> dict[str, Any]:
    """A build's report as JSON."""
    quarantined = report.quarantined[["path", "reason", "detail"]]
    return {
        "store": str(report.store),
        "dataset": report.summary,
        "clips": report.clips,
        "new": report.new,
        "changed": report.changed,
        "gone": report.gone,
        "files_hashed": report.hashed,
        "files_decoded": report.decoded,
        "clips_computed": report.computed,
        "frames_computed": report.frames,
        "cells_adopted": report.adopted,
        "cells_copied": report.copied,
        "quarantined": quarantined.reset_index().to_dict("records"),
        "file_bytes": report.file_bytes,
        "block_calls": report.calls,
        "bytes_read": report.bytes_read,
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
    }


def report_summary(report: "BuildReport") -> str:
    """A build's report for a person."""
    seconds = report.seconds
    lines = [
        f"{report.store}: "
        + ", ".join(f"{report.clips[s]} clips {s}" for s in STATUS_ORDER if report.clips.get(s))
    ]
    news = {"new": report.new, "with changed bytes": report.changed, "gone": report.gone}
    if any(news.values()):
        lines.append("  against the last build: " + ", ".join(
            f"{count} {what}" for what, count in news.items() if count))  # fmt: skip
    if report.computed:
        rate = report.frames / max(seconds["all"], 1e-9)
        lines.append(
            f"  decoded {report.decoded} files, computed {report.computed} clips "
            f"({report.frames} frames) in {clock(seconds['all'])}, {rate:.1f} frames/s"
            + (f"; read {size(report.bytes_read)} of features" if report.bytes_read else "")
        )
        parts = ", ".join(
            f"{part} {seconds[part]:.1f} s" for part in ("decode", "forward", "write")
        )
        lines.append(f"  where the time went (summed over workers): {parts}")
    else:
        lines.append(f"  nothing to decode, nothing to compute ({seconds['all']:.1f} s)")
    if report.adopted:
        lines.append(f"  {report.adopted} cells taken over from a build that did not end")
    if report.copied:
        lines.append(f"  {report.copied} cells copied from clips with the same bytes")
    lines.append(f"  features weigh {size(report.file_bytes)}")
    if len(report.quarantined):
        lines += ["quarantined:", failure_lines(report.quarantined)]
    return "\n".join(lines)


def plan_facts(made: "Plan", seconds: "Estimate | None", store: str | Path) -> dict[str, Any]:
    """A plan as JSON."""
    from varve.pipeline.extraction.disk_space import free_bytes, needed_bytes

    columns = []
    for one, plans in zip(made.passes, made.columns, strict=False):
        for column in plans:
            spec = column.output.spec
            columns.append(
                {
                    "backbone": spec.backbone,
                    "feature": spec.feature,
                    "view": one.frame_set.view,
                    "fingerprint": spec.fingerprint,
                    "shape": [len(made.table), *spec.cell],
                    "dtype": spec.dtype,
                    "valid": int(column.valid.sum()),
                    "stale": int(column.stale.sum()),
                    "missing": column.missing,
                    "from": _sources(column),
                    "bytes": spec.file_bytes(column.after),
                    "shards": int(np.unique(np.flatnonzero(column.after) // spec.shard_clips).size),
                }
            )
    return {
        "clips": len(made.table),
        "not_there": _not_there(made),
        "decodes": made.decodes,
        "clips_to_compute": made.clips,
        "block_calls": sum(made.calls(i) for i in range(len(made.passes))),
        "passes": [_pass_facts(made, i) for i in range(len(made.passes)) if made.batches(i)],
        "bytes_to_read": made.bytes_read,
        "bytes": made.file_bytes,
        "bytes_to_write": made.file_bytes - made.disk_bytes,
        "bytes_needed": needed_bytes(made),
        "bytes_free": free_bytes(Path(store)),
        "seconds": None if seconds is None else round(seconds.seconds, 1),
        "columns": columns,
    }


def plan_summary(made: "Plan", seconds: "Estimate | None", store: str | Path) -> str:
    """A plan for a person."""
    facts = plan_facts(made, seconds, store)
    lines = [f"{facts['clips']} clips; columns of {store}:"]
    if facts["not_there"]:
        first, *more = facts["not_there"]
        rest = f" and {len(more)} more" if more else ""
        lines.insert(0, f"NOT THERE: {first}{rest}: looked for in the data set's folder")
    for c in facts["columns"]:
        view = f" view {c['view']}" if c["view"] else ""
        sources = ", ".join(f"{count} from {source}" for source, count in c["from"].items())
        lines.append(
            f"  {c['backbone']}  {c['feature']}{view}  {tuple(c['shape'][1:])} {c['dtype']}: "
            f"{c['valid']} valid, {c['stale']} stale, {c['missing']} missing"
            + (f" ({sources})" if sources else "")
            + f"; {size(c['bytes'])} in {c['shards']} shard{'s' * (c['shards'] != 1)}"
        )
    for p in facts["passes"]:
        view = f" view {p['view']}" if p["view"] else ""
        stages = p["stages"]
        run = f"{stages[0]} to {stages[-1]}" if stages else "no stage"
        lines.append(
            f"  {p['backbone']}{view} from {p['from']}: {p['clips']} clips in {p['batches']} "
            f"batches through {run} ({len(stages)} of {p['of_stages']} stages), "
            f"{p['block_calls']} block calls"
        )
    lines.append(
        f"to do: {facts['decodes']} files to decode, {facts['clips_to_compute']} clips to compute, "
        f"{facts['block_calls']} block calls"
        + (f", {size(facts['bytes_to_read'])} of features to read" * bool(facts["bytes_to_read"]))
    )
    lines.append(
        f"disk: {size(facts['bytes_to_write'])} to write, {size(facts['bytes'])} in all; "
        f"{size(facts['bytes_free'])} free"
    )
    if facts["bytes_needed"] > facts["bytes_free"]:
        lines.append(f"  NOT ENOUGH: {size(facts['bytes_needed'])} are needed while it runs")
    if seconds is not None:
        lines.append(f"time: about {clock(seconds.seconds)} on this machine")
    elif not made.blocks:
        lines.append("time: nothing is to be computed")
    return "\n".join(lines)


def _not_there(made: "Plan") -> list[str]:
    """Paths of listed clips without a file."""
    return sorted(set(made.table.loc[made.table["reason"] == "missing", "path"]))


def store_facts(opened: FeatureStore) -> dict[str, Any]:
    """What a store holds, as JSON."""
    table = opened.clips
    features = [
        {
            "backbone": feature.backbone,
            "feature": feature.name,
            "fingerprint": feature.fingerprint,
            "view": feature.spec["frames"]["view"],
            "shape": list(feature.shape),
            "dtype": feature.dtype,
            "changed_at": feature.spec.get("grafts", []),
            "modules": feature.spec.get("modules", []),
            "resumed_from": feature.spec.get("resumed", []),
            "valid": int(feature.valid.sum()),
            "bytes": _folder_bytes(feature.path) + _folder_bytes(Path(f"{feature.path}.done")),
        }
        for feature in opened.features()
    ]
    return {
        "store": str(opened.path),
        "dataset": opened.attributes.get("dataset"),
        "layout": opened.attributes.get("layout"),
        "clips": len(table),
        "status": {s: int((table["status"] == s).sum()) for s in STATUS_ORDER},
        "splits": {str(k): int(v) for k, v in table["split"].value_counts().sort_index().items()},
        "classes": opened.attributes.get("classes", []),
        "features": features,
        "bytes": _folder_bytes(opened.path),
    }


def store_summary(opened: FeatureStore) -> str:
    """What a store holds, for a person."""
    facts = store_facts(opened)
    status = ", ".join(f"{count} {name}" for name, count in facts["status"].items() if count)
    splits = ", ".join(
        f"{count} {name or 'of no split'}" for name, count in facts["splits"].items()
    )
    lines = [
        f"{facts['store']}: {facts['clips']} clips ({status}; {splits}) "
        f"of {len(facts['classes'])} classes, {size(facts['bytes'])}",
        f"  from {facts['dataset']} ({facts['layout']})",
    ]
    for f in facts["features"]:
        view = f" view {f['view']}" if f["view"] else ""
        lines.append(
            f"  {f['backbone']}  {f['feature']}{view}  {tuple(f['shape'])} {f['dtype']}  "
            f"{f['valid']} valid  {size(f['bytes'])}  {f['fingerprint'][:16]}"
            + (f"  changed at {_changes(f)}" if f["changed_at"] else "")
            + (f"  from {' and '.join(f['resumed_from'])}" if f["resumed_from"] else "")
        )
    return "\n".join(lines)


def _changes(facts: dict[str, Any]) -> str:
    named = itertools.zip_longest(facts["changed_at"], facts["modules"], fillvalue="?")
    return ", ".join(f"{stage} ({module})" for stage, module in named)


def failure_lines(failed: pd.DataFrame) -> str:
    """A line a clip: row, path, why."""
    return "\n".join(
        f"  row {row}  {clip['path']}  {clip['reason']}: {clip['detail']}"
        for row, clip in failed.iterrows()
    )


def garbage_lines(report: GarbageReport) -> str:
    """What a garbage collection freed, or would, for a person."""
    freed, forgot = ("would free", "would forget") if report.dry_run else ("freed", "forgot")
    lines = [
        f"{verb} {size(c.size_bytes)}  {c.backbone}  {c.feature}  {c.fingerprint[:16]}: {c.why}"
        for verb, columns in ((freed, report.freed), ("keeps", report.kept))
        for c in columns
    ]
    lines += [
        f"{forgot} the run folder {folder}: it no longer exists"
        for folder in report.missing_holders
    ]
    count = len(report.freed)
    total = f"{freed} {size(report.freed_bytes)} in {count} column{'s' * (count != 1)}"
    return "\n".join([*lines, total if count else "nothing is to be freed"])


def _sources(column: "ColumnPlan") -> dict[str, int]:
    counts = {
        "the video": int(column.from_video.sum()),
        **{_name(source): int((rows >= 0).sum()) for source, rows in column.sources},
        "a clip with the same bytes": len(column.copied),
        "a build that did not end": len(column.staged),
    }
    return {source: count for source, count in counts.items() if count}


def _name(source: "Source") -> str:
    return f"{source.feature} {source.dtype}"


def _pass_facts(made: "Plan", number: int) -> dict[str, Any]:
    """One run of a network from one beginning: what it calls, and how often."""
    one = made.passes[number]
    return {
        "backbone": one.outputs[0].spec.backbone,
        "view": one.frame_set.view,
        "from": _name(one.source) if one.source else "the video",
        "clips": sum(block.clips_of(number) for block in made.blocks),
        "batches": made.batches(number),
        "block_calls": made.calls(number),
        "stages": one.run_stages(set().union(*(block.outputs_of(number) for block in made.blocks))),
        "of_stages": len(one.stage_keys),
    }


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
