"""Format builds, plans and stores: as JSON for programs, as text for people."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from varve.pipeline.units import clock, printable, size
from varve.stores import FeatureStore, clips
from varve.stores.garbage import GarbageReport

if TYPE_CHECKING:  # they load torch, which a description of a store does not need
    from varve.pipeline.backbones import ClassPrompts
    from varve.pipeline.extraction.build import BuildReport
    from varve.pipeline.extraction.estimate import Estimate
    from varve.pipeline.extraction.passes import Source
    from varve.pipeline.extraction.plan import ColumnPlan, Plan
    from varve.pipeline.extraction.verify import Verified

MOST_PROMPTS = 4
STATUS_ORDER = ("ready", "pending", "quarantined")
# Attributes of a report that have another name in JSON.
IN_JSON = {"summary": "dataset", "hashed": "files_hashed", "decoded": "files_decoded",
           "computed": "clips_computed", "frames": "frames_computed", "adopted": "cells_adopted",
           "copied": "cells_copied", "calls": "block_calls"}  # fmt: skip


def report_facts(report: "BuildReport") -> dict[str, Any]:
    """Return the report of a build as JSON."""
    facts = {IN_JSON.get(f.name, f.name): getattr(report, f.name) for f in fields(report)}
    quarantined = report.quarantined[["path", "reason", "detail"]]
    return facts | {
        "store": str(report.store),
        "quarantined": quarantined.reset_index().to_dict("records"),
        "left_out": dict(report.left_out),
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
    }


def report_summary(report: "BuildReport") -> str:
    """Return the report of a build as text."""
    seconds = report.seconds
    lines = [
        f"{report.store}: "
        + ", ".join(f"{report.clips[s]} clips {s}" for s in STATUS_ORDER if report.clips.get(s))
    ]
    news = {"new": report.new, "with changed bytes": report.changed, "gone": report.gone,
            "moved": report.moved}  # fmt: skip
    if any(news.values()):
        lines.append("  against the last build: " + ", ".join(
            f"{count} {what}" for what, count in news.items() if count))  # fmt: skip
    if report.computed:
        rate = report.frames / max(seconds["all"], 1e-9)
        lines.append(
            f"  decoded {report.decoded} files, computed {report.computed} {report.unit} "
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
    if warning := clips.shared_text(report.duplicates):
        lines.append(f"  {warning}")
    lines += same_prompts_lines(report.same_prompts)
    lines.append(f"  features weigh {size(report.file_bytes)}")
    if len(report.quarantined):
        lines += ["quarantined:", failure_lines(report.quarantined)]
    return "\n".join(lines)


def plan_facts(work: "Plan", seconds: "Estimate | None", store: str | Path) -> dict[str, Any]:
    """Return a plan as JSON."""
    from varve.pipeline.extraction.disk_space import free_bytes, needed_bytes

    columns = []
    for pass_, plans in zip(work.passes, work.columns, strict=False):
        for column in plans:
            spec = column.output.spec
            columns.append(
                {
                    "backbone": spec.backbone,
                    "feature": spec.feature,
                    "view": pass_.frame_set.view,
                    "fingerprint": spec.fingerprint,
                    "shape": [len(work.table), *spec.cell],
                    "dtype": spec.dtype,
                    "valid": int(column.valid.sum()),
                    "stale": int(column.stale.sum()),
                    "missing": column.missing,
                    "from": _sources(column),
                    "bytes": spec.file_bytes(column.after),
                    "shards": int(np.unique(np.flatnonzero(column.after) // spec.shard_clips).size),
                }
            )
    prompts = work.prompts
    return {
        "clips": len(work.table),
        "unit": work.unit,
        "prompts": dict(prompts.words) if prompts else {},
        "same_prompts": list(map(list, prompts.shared)) if prompts else [],
        "left_out": dict(work.left_out),
        "not_there": sorted(set(work.table.loc[work.table["reason"] == "missing", "path"])),
        "decodes": work.decodes,
        "clips_to_compute": work.clips,
        "block_calls": sum(work.calls(i) for i in range(len(work.passes))),
        "passes": [_pass_facts(work, i) for i in range(len(work.passes)) if work.batches(i)],
        "bytes_to_read": work.bytes_read,
        "bytes": work.file_bytes,
        "bytes_to_write": work.file_bytes - work.disk_bytes,
        "bytes_needed": needed_bytes(work),
        "bytes_free": free_bytes(Path(store)),
        "seconds": None if seconds is None else round(seconds.seconds, 1),
        "columns": columns,
    }


def plan_summary(work: "Plan", seconds: "Estimate | None", store: str | Path) -> str:
    """Return a plan as text."""
    facts = plan_facts(work, seconds, store)
    unit = facts["unit"]
    lines = [f"{facts['clips']} {unit}; columns of {store}:"]
    if facts["not_there"]:
        first, *more = facts["not_there"]
        rest = f" and {len(more)} more" if more else ""
        lines.insert(0, f"NOT THERE: {printable(first)}{rest}: looked for in the data set's folder")
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
            f"  {p['backbone']}{view} from {p['from']}: {p['clips']} {unit} in {p['batches']} "
            f"batches through {run} ({len(stages)} of {p['of_stages']} stages), "
            f"{p['block_calls']} block calls"
        )
    lines.append(
        f"to do: {facts['decodes']} files to decode, {facts['clips_to_compute']} {unit} to "
        f"compute, {facts['block_calls']} block calls"
        + (f", {size(facts['bytes_to_read'])} of features to read" * bool(facts["bytes_to_read"]))
    )
    lines.append(
        f"disk: {size(facts['bytes_to_write'])} to write, {size(facts['bytes'])} in all; "
        f"{size(facts['bytes_free'])} free"
    )
    if facts["bytes_needed"] > facts["bytes_free"]:
        lines.append(f"  NOT ENOUGH: {size(facts['bytes_needed'])} are needed while it runs")
    lines += prompt_lines(work.prompts) if work.prompts else []
    if seconds is not None:
        lines.append(f"time: about {clock(seconds.seconds)} on this machine")
    elif not work.blocks:
        lines.append("time: nothing is to be computed")
    return "\n".join(lines)


def prompt_lines(prompts: "ClassPrompts") -> list[str]:
    """Return lines of the words that stand for classes in prompts, first those that differ."""
    words = {label: phrase for label, phrase in prompts.words.items() if label != phrase}
    shown = [*words.items()][:MOST_PROMPTS] or [*prompts.words.items()][:1]
    lines = [
        f"text: prompts of {len(prompts.words)} classes, {len(words)} of them in other words than "
        "the label:"
    ]
    lines += [f'  {printable(label)}: "{printable(phrase)}"' for label, phrase in shown]
    return lines + same_prompts_lines(prompts.shared)


def same_prompts_lines(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return a warning for each group of classes that have one text feature."""
    return [
        f"  ONE TEXT FEATURE for {' and '.join(map(printable, group))}: their prompts are the "
        "same; rename or merge these classes"
        for group in groups
    ]


def store_facts(opened: FeatureStore) -> dict[str, Any]:
    """Return the contents of a store as JSON."""
    table = opened.clips
    features = [
        {
            "backbone": feature.backbone,
            "feature": feature.name,
            "fingerprint": feature.fingerprint,
            "view": feature.spec["frames"]["view"],
            "shape": list(feature.shape),
            "dtype": feature.dtype,
            "whole_videos": feature.spec.get("pages", ""),
            "windows": feature.spec.get("windows"),
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
        "duplicates": clips.shared_between_splits(table[table["reason"] != "missing"]),
        "classes": opened.attributes.get("classes", []),
        "features": features,
        "bytes": _folder_bytes(opened.path),
    }


def store_summary(opened: FeatureStore) -> str:
    """Return the contents of a store as text."""
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
    if warning := clips.shared_text(facts["duplicates"]):
        lines.append(f"  {warning}")
    for f in facts["features"]:
        view = f" view {f['view']}" if f["view"] else ""
        named = itertools.zip_longest(f["changed_at"], f["modules"], fillvalue="?")
        changes = ", ".join(f"{stage} ({module})" for stage, module in named)
        lines.append(
            f"  {f['backbone']}  {f['feature']}{view}  {tuple(f['shape'])} {f['dtype']}  "
            f"{f['valid']} valid  {size(f['bytes'])}  {f['fingerprint'][:16]}"
            + (f"  whole videos ({f['whole_videos']})" if f["whole_videos"] else "")
            + (f"  windows of whole videos ({_windows(f['windows'])})" if f["windows"] else "")
            + (f"  changed at {changes}" if changes else "")
            + (f"  from {' and '.join(f['resumed_from'])}" if f["resumed_from"] else "")
        )
    return "\n".join(lines)


def _windows(of: Mapping[str, Any]) -> str:
    return f"{of['frames']} frames of {of['grid']}, every {of['step']}"


def failure_facts(failed: pd.DataFrame) -> list[dict[str, Any]]:
    """Return quarantined clips as JSON."""
    columns = ["path", "start_seconds", "end_seconds", "label", "split", "reason", "detail"]
    rows: list[dict[str, Any]] = json.loads(failed[columns].reset_index().to_json(orient="records"))
    return rows


def failure_lines(failed: pd.DataFrame) -> str:
    """Return a line for each quarantined clip: row, path, reason."""
    lines = (
        f"  row {row}  {printable(clip['path'])}  {clip['reason']}: "
        # The sentences of a detail are on lines of their own.
        + printable(clip["detail"].replace("\n", "; "))
        for row, clip in failed.iterrows()
    )
    return "\n".join(lines) or "no clip is quarantined"


def verification_lines(result: "Verified") -> str:
    """Return the result of a verification as text."""
    lines = [
        f"{result.chunks} cells read, checksums verified",
        f"{result.equal + result.close} cells computed again: {result.equal} equal to the bit, "
        f"{result.close} within rounding",
    ]
    if result.changed:
        lines.append(f"{result.changed} columns of changed networks: checksums alone")
    if result.whole:
        lines.append(f"{result.whole} columns of whole videos: checksums alone")
    for finding in result.findings:
        where = "  ".join(filter(None, (finding.column, finding.shard, finding.clip)))
        lines.append(f"BAD {printable(where)}: {finding.problem}")
    findings = len(result.findings)
    return "\n".join([*lines, f"{findings} findings" if findings else "nothing differs"])


def garbage_facts(report: GarbageReport) -> dict[str, Any]:
    """Return what a garbage collection freed, or would free, as JSON."""
    return asdict(report) | {"store": str(report.store), "freed_bytes": report.freed_bytes}


def garbage_lines(report: GarbageReport) -> str:
    """Return what a garbage collection freed, or would free, as text."""
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


def _pass_facts(work: "Plan", number: int) -> dict[str, Any]:
    """Return a pass of a network from one source: its stages and its number of calls."""
    pass_ = work.passes[number]
    return {
        "backbone": pass_.outputs[0].spec.backbone,
        "view": pass_.frame_set.view,
        "from": _name(pass_.source) if pass_.source else "the video",
        "clips": sum(block.clips_of(number) for block in work.blocks),
        "batches": work.batches(number),
        "block_calls": work.calls(number),
        "stages": pass_.run_stages(
            set().union(*(block.outputs_of(number) for block in work.blocks))
        ),
        "of_stages": len(pass_.stage_keys),
    }


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
