"""Format runs and routed videos: as JSON for programs, as text for people."""

import json
from math import isnan
from typing import Any

import pandas as pd

from varve.pipeline.experiments.cost_table import FROM_CACHE, FROM_VIDEO, Cost
from varve.pipeline.experiments.metrics import Matrix, display_of, names
from varve.pipeline.experiments.routing import Routed
from varve.pipeline.experiments.run_folder import Run
from varve.pipeline.units import clock, size


def run_facts(run: Run) -> dict[str, Any]:
    """Return a finished run as JSON."""
    return {"run": str(run.folder), "spec": run.spec, "metrics": run.metrics, "cost": run.cost}


def run_summary(run: Run) -> str:
    """Return a finished run as text."""
    spec, cost = run.spec, run.cost
    lines = [
        f"{spec['head']} on {spec['backbone']}, {spec['scenario']}, seed {spec['seed']}: "
        f"{len(run.matrix.clips)} tasks",
        "(row: after learning task i; column: on the test clips of task j)",
        matrix_text(run.matrix),
    ]
    if share := spec.get("validation"):
        lines.insert(1, f"VALIDATION: tested on {share:.0%} of the training clips, held out")
    for prefix, matrix in (("", run.matrix), ("nearest mean of exemplars: ", run.nme)):
        if matrix is not None:
            values = {display_of(name).label: matrix.metric(name) for name in names()}
            figures = [f"{label} {x:.1%}" for label, x in values.items() if not isnan(x)]
            lines.append(prefix + ", ".join(figures))
    lines.append(
        f"cost: {cost['trainable']:,} numbers trained in {clock(sum(cost['seconds']))}, "
        f"{cost['multiply_adds'] / 1e6:.3g} M multiply-adds a clip, peak memory "
        f"{size(cost['peak_memory_bytes'])}, {size(cost['bytes_read'])} read"
        + (f", {cost['exemplars']} exemplars" if cost["exemplars"] else "")
    )
    if left_out := run.metrics["left_out"]:
        lines.append("left out: " + ", ".join(f"{n} clips {why}" for why, n in left_out.items()))
    if shared := run.metrics.get("test_clips_also_in_training"):
        lines.append(f"SAME BYTES in training and test: {shared} test clips are training clips too")
    lines.append(f"in {run.folder}")
    return "\n".join(lines)


def cost_facts(cost: Cost) -> dict[str, Any]:
    """Return the cost of a head as JSON."""
    tables = {"parts": cost.parts, "totals": cost.totals(), "latency": cost.latency}
    return {name: json.loads(x.to_json(orient="records")) for name, x in tables.items()}


def cost_text(cost: Cost) -> str:
    """Return the cost of a head, in one variant, as text."""
    rows = [("", "parameters", "multiply-adds")]
    for part in cost.parts.to_dict("records"):
        name = f"{part['part']}, cached" if part["cached"] else part["part"]
        rows.append((name, f"{part['parameters']:,}", f"{part['multiply_adds']:,}"))
    (totals,) = cost.totals().to_dict("records")
    for total in (FROM_CACHE, FROM_VIDEO):
        parameters, count = (totals[f"{n} {total}"] for n in ("parameters", "multiply_adds"))
        rows.append((total, f"{parameters:,}", f"{count:,}"))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:{width}}  {n:>14}  {m:>18}" for name, n, m in rows]
    lines.insert(-2, "-" * len(lines[0]))
    lines.append("(of one clip; a multiply-add is a multiplication with its addition)")
    for row in cost.latency.to_dict("records"):
        line = f"{row['stage']}: {row['milliseconds']:.3g} ms a clip"
        if row["graft"]:
            line += (
                f" with {row['graft']}, {row['milliseconds_without']:.3g} ms without: "
                f"{row['ratio']:.3f} times"
            )
        lines.append(line)
    return "\n".join(lines)


def forecast_text(table: pd.DataFrame, device: str) -> str:
    """Return the forecast of a sweep as text."""
    shown = pd.DataFrame(
        {
            "head": table["head"],
            "options": table["options"],
            "runs": table["runs"],
            "trainings": table["trainings"],
            "a training": [clock(seconds) for seconds in table["training_seconds"]],
            "all": [clock(seconds) for seconds in table["seconds"]],
        }
    )
    total = f"about {clock(table['seconds'].sum())} on {device}, one run after another"
    return f"{shown.to_string(index=False)}\n{total}" if len(table) else "every run has finished"


def routed_text(routed: Routed) -> str:
    """Return the classes and experts of a video as text."""
    if routed.reason:
        return f"{routed.video}: {routed.reason}"
    named = ", ".join(f"{name} {score:.3f}" for name, score in routed.classes)
    lines = [f"{routed.video}: {named}", "  expert  weight  similarity  nearest class"]
    lines += [
        f"  {expert.number:6}  {expert.weight:6.3f}  {expert.similarity:10.3f}  {expert.nearest}"
        for expert in routed.experts
    ]
    return "\n".join(lines)


def matrix_text(matrix: Matrix) -> str:
    """Return the accuracy matrix as a table of text.

    >>> import numpy as np
    >>> print(matrix_text(Matrix(np.array([[1.0, np.nan], [0.5, 0.75]]), np.array([4, 4]))))
          task 0  task 1     all
      0   100.0%          100.0%
      1    50.0%   75.0%   62.5%
    """
    tasks = len(matrix.clips)
    lines = ["    " + "".join(f"  task {j}" for j in range(tasks)) + "     all"]
    for i, row in enumerate(matrix.accuracy):
        cells = "".join("        " if value != value else f"{value:8.1%}" for value in row)
        lines.append(f"  {i} {cells}{matrix.after(i).metric('final'):8.1%}")
    return "\n".join(lines)
