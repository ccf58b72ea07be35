"""Results: run folders as tables, over seeds, on paper, and class by class.

`read` gives a row a run: `run` (its folder), `finished`, what was asked (`head`, `scenario`,
`seed`, `backbone`, `option.NAME`, `features.NAME`...), the figures of both classifiers as shares of
1 (`cnn.final`, `nme.bwf`...; `varve.pipeline.experiments.metrics` says what they are), and the
costs
(`cost.trainable`...). `summary` puts seeds together: `n` runs, and `.mean` and `.std` of every
figure and cost.

What a run folder holds is said in `varve.pipeline.experiments.run`; reading one takes no torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.experiments import metrics
from varve.pipeline.units import size

SHOWN = (
    "cnn.final",
    "cnn.final_over_tasks",
    "cnn.average_incremental",
    "cnn.bwf",
    "nme.final",
    "nme.final_over_tasks",
    "nme.average_incremental",
    "nme.bwf",
    "cost.trainable",
    "cost.seconds_per_task",
    "cost.stages_recomputed",
    "cost.bytes_read",
    "cost.peak_memory_bytes",
)
TITLES = {
    "final_over_tasks": "final (tasks)",
    "average_incremental": "avg. inc.",
    "bwf": "BWF",
    "seconds_per_task": "s/task",
    "stages_recomputed": "stages",
    "bytes_read": "read",
    "peak_memory_bytes": "peak",
}
LOWER_IS_BETTER = ("bwf", "forgetting")
# Of a specification: what differs with the seed, or says again what other columns say.
NOT_COLUMNS = ("digest", "text", "clips", "tasks", "network", "threads", "method")
SEEDS = ("seed", "option.seed")
KINDS = ("cnn", "nme")
NUMBERS = ("cnn.", "nme.", "cost.")
ESCAPES = str.maketrans(
    {mark: f"\\{mark}" for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def read(folders: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """A row for every run folder in `folders`, which are run folders or hold them at any depth.

    A run that has not ended has `finished` False and no figures.

    Raises:
        ValueError: There is no run folder, or a file in one is damaged.
    """
    places = [Path(p) for p in ([folders] if isinstance(folders, str | Path) else folders)]
    found: dict[Path, None] = {}
    for place in places:
        whole = (place / "spec.json").exists()
        specs = [place / "spec.json"] if whole else sorted(place.rglob("spec.json"))
        found |= dict.fromkeys(file.parent for file in specs)
    if not found:
        raise ValueError(
            f"no run folder (with a spec.json) in {', '.join(map(str, places)) or 'nothing'}; "
            "`varve run` makes one"
        )
    table = pd.DataFrame([_record(folder) for folder in found])
    numbers = [name for name in table if name.startswith(NUMBERS)]
    asked = [name for name in table if name not in numbers]
    for name in asked:
        table[name] = _plain(table[name])
    return pd.concat([table[asked], table[numbers].astype("float64")], axis=1)


def summary(runs: pd.DataFrame, by: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean and standard deviation (n - 1 in its denominator) of finished runs over the seeds.

    Args:
        runs: From `read`.
        by: Columns that tell configurations apart: by default all that was asked for but seeds.

    Returns:
        A row a configuration, in order of appearance: `by`, `n`, and of each figure and cost
        `.mean` and `.std`; NaN where one of the runs lacks it, and `.std` of a single run.

    Raises:
        ValueError: No run has finished, or a configuration has a seed twice.
    """
    done = runs[runs["finished"]]
    if done.empty:
        raise ValueError(f"none of {len(runs)} runs has finished; `varve run` goes on with one")
    aside = ("run", "finished", *SEEDS)
    keys = (
        [c for c in runs if not c.startswith(NUMBERS) and c not in aside] if by is None else [*by]
    )
    seeds = [name for name in SEEDS if name in runs]
    twice = done["run"][done.duplicated([*keys, *seeds], keep=False)]
    if len(twice):
        raise ValueError(
            f"runs of one configuration and seed: {', '.join(twice[:4])}"
            f"{', ...' if len(twice) > 4 else ''}. Leave some out, or add the column in which they "
            "differ to `by`"
        )
    groups = done.groupby(keys, dropna=False, sort=False)
    parts = {"n": groups.size()}
    for name in (name for name in runs if name.startswith(NUMBERS)):
        parts[f"{name}.mean"] = groups[name].agg(lambda values: values.mean(skipna=False))
        parts[f"{name}.std"] = groups[name].agg(lambda values: values.std(ddof=1, skipna=False))
    return pd.DataFrame(parts).reset_index()


def writable(path: str | Path) -> Path:
    """Where a table can be written.

    Raises:
        ValueError: The ending is none of .csv, .parquet, .tex, or there is no such folder.
    """
    path = Path(path)
    if (
        path.suffix.lower() not in (".csv", ".parquet", ".tex")
        or not path.absolute().parent.is_dir()
    ):
        raise ValueError(f"{path}: a table is .csv, .parquet or .tex, in a folder that there is")
    return path


def write(table: pd.DataFrame, path: str | Path, **options: Any) -> None:
    """Write a table by the ending of its name: .csv, .parquet, or .tex (with options of `latex`).

    Raises:
        ValueError: Another ending, or .tex for a table that is no summary.
    """
    path, ending = writable(path), Path(path).suffix.lower()
    if ending not in (".csv", ".parquet", ".tex") or (options and ending != ".tex"):
        raise ValueError(f"{path}: a table is .csv, .parquet or .tex, and only .tex has options")
    # Without the attrs: what a caller hangs on a table need not be JSON, as Parquet wants it.
    plain = pd.DataFrame(table)
    if ending == ".tex":
        path.write_text(latex(table, **options), "utf-8")
    elif ending == ".csv":
        plain.to_csv(path, index=False)
    else:
        plain.to_parquet(path, index=False)


def text(table: pd.DataFrame, figures: Sequence[str] = SHOWN) -> str:
    """A summary for a terminal: what its rows differ in, and figures in per cent, mean ± std."""
    columns = _columns(table, figures, 1, " ± ", str)
    return str(pd.DataFrame(columns).to_string(index=False))


def latex(
    table: pd.DataFrame, figures: Sequence[str] = SHOWN, bold: bool = False, digits: int = 1
) -> str:
    """A summary as a LaTeX tabular (package booktabs): figures in per cent, mean ± std.

    Args:
        table: From `summary`.
        figures: Those to print, of which the runs may lack some.
        bold: The best of each figure is bold, among the rows of one scenario and backbone; what
            reads alike is alike. Costs are not compared.
        digits: After the decimal point.

    Raises:
        ValueError: It is no summary, or has none of the figures.
    """
    columns = _columns(table, figures, digits, r" $\pm$ ", _escaped, bold)
    words = list(columns).index("n")
    rows = [map(_escaped, columns), *zip(*columns.values(), strict=True)]
    head, *body = (" & ".join(row) + r" \\" for row in rows)
    start = rf"\begin{{tabular}}{{{'l' * words}{'r' * (len(columns) - words)}}}"
    lines = [start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def per_class(run: str | Path, stage: int | None = None, classifier: str = "cnn") -> pd.DataFrame:
    """`metrics.per_class` of a run after a stage, by default its last.

    Raises:
        ValueError: The run has no such predictions.
    """
    found = _predictions(run, stage, classifier)
    return metrics.per_class(found["label"].tolist(), found["top1"].tolist())


def changes(
    before: str | Path, after: str | Path, stage: int | None = None, classifier: str = "cnn"
) -> pd.DataFrame:
    """What became of each class between two runs, and what it was confused with in each.

    Args:
        before: Run folder, of another head or other options.
        after: Run folder that was tested on the same clips.
        stage: Of both; by default the last of each.
        classifier: "cnn" or "nme".

    Returns:
        Indexed by label, most improved first: clips, before, after (accuracies), change, and
        confused_before, confused_share_before, confused_after, confused_share_after: the class
        that most of the others were taken for, and the share of the class's clips.

    Raises:
        ValueError: A run has no such predictions, or they are of other clips.
    """
    found = [_predictions(run, stage, classifier) for run in (before, after)]
    clips = [set(zip(one["row"], one["label"], strict=True)) for one in found]
    if clips[0] != clips[1]:
        raise ValueError(
            f"{before} was tested on {len(clips[0])} clips, {after} on {len(clips[1])}, "
            f"{len(clips[0] & clips[1])} of them the same; compare runs of one store and scenario, "
            "at a stage where they know the same classes"
        )
    old, new = (metrics.per_class(one["label"].tolist(), one["top1"].tolist()) for one in found)
    table = pd.DataFrame(
        {
            "clips": old["clips"],
            "before": old["accuracy"],
            "after": new["accuracy"],
            "change": new["accuracy"] - old["accuracy"],
            "confused_before": old["confused_with"],
            "confused_share_before": old["confused_share"],
            "confused_after": new["confused_with"],
            "confused_share_after": new["confused_share"],
        }
    )
    return table.sort_values("change", ascending=False, kind="stable")


def _predictions(run: str | Path, stage: int | None, classifier: str) -> pd.DataFrame:
    file = Path(run) / "predictions.parquet"
    if not file.exists():
        raise ValueError(f"{run} has no predictions.parquet; give a run folder that has begun")
    table = pd.read_parquet(file)
    mine = table[table["classifier"] == classifier]
    last = mine["stage"].max() if stage is None else stage
    found = mine[mine["stage"] == last]
    if found.empty:
        asked = repr(classifier) if stage is None else f"{classifier!r} at stage {stage}"
        held = table.groupby("classifier")["stage"].max().items()
        raise ValueError(
            f"{run} has no predictions of {asked}; it has "
            + (", ".join(f"{name!r}, stages 0 to {top}" for name, top in held) or "none")
        )
    return found


def _record(folder: Path) -> dict[str, Any]:
    spec = _json(folder / "spec.json")
    record = {"run": str(folder), "finished": (folder / "metrics.json").exists()}
    first = ("head", "scenario", "seed", "backbone")
    for key in (*first, *(key for key in spec if key not in (*first, *NOT_COLUMNS))):
        value = spec.get(key)
        name = "option" if key == "options" else key
        record |= (
            {f"{name}.{one}": part for one, part in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    if record["finished"]:
        figures = _json(folder / "metrics.json")
        for kind in KINDS:
            for name in metrics.FIGURES if figures.get(kind) else ():
                record[f"{kind}.{name}"] = figures[kind].get(name)
        record |= {f"cost.{key}": value for key, value in _costs(_json(folder / "cost.json"))}
    return record


def _costs(cost: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Costs as numbers: what is there task by task, summed; stages by how many of them ran."""
    for key, value in cost.items():
        if key == "stages_recomputed" and not isinstance(value, int):
            tasks = value if isinstance(value, list) else [value]
            yield key, len({stage for calls in tasks for stage in calls})
            yield "stage_calls", sum(sum(calls.values()) for calls in tasks)
        elif isinstance(value, list):
            yield key, sum(value)
            yield f"{key}_per_task", sum(value) / max(len(value), 1)
        else:
            yield key, value


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove its folder and run it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no object; remove its folder and run it again")
    return value


def _plain(column: pd.Series) -> pd.Series:
    """Of one type: whole numbers stay whole beside rows without; mixed values become JSON."""
    kinds = {
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value)
        for value in column
        if value is not None and value == value
    }
    if len(kinds) > 1 or kinds & {list, dict}:
        told = [None if v is None or v != v else json.dumps(v, sort_keys=True) for v in column]
        column = pd.Series(told, column.index)
    return column.convert_dtypes()


def _columns(
    table: pd.DataFrame,
    figures: Sequence[str],
    digits: int,
    plus_minus: str,
    plain: Callable[[str], str],
    bold: bool = False,
) -> dict[str, list[str]]:
    """A summary's cells as printed: the head, what else the rows differ in, n, the figures."""
    shown = [
        name for name in figures if f"{name}.mean" in table and table[f"{name}.mean"].notna().any()
    ]
    if not shown:
        raise ValueError(
            f"no summary with {', '.join(figures)}: its columns are "
            f"{', '.join(map(str, table))}. `summary(read(folders))` makes one"
        )
    words = list(table)[: list(table).index("n")]
    # The code of a head, and an option that others lack, are said by its name.
    heads = table.groupby("head" if "head" in table else np.zeros(len(table)))
    own = {name for name in words if heads[name].nunique(dropna=False).max() == 1
           and (name == "code" or table[name].isna().any())} - {"head"}  # fmt: skip
    differ = [
        name
        for name in words
        if name == "head" or (table[name].nunique(dropna=False) > 1 and name not in own)
    ]
    # Fingerprints say again what options say, mostly.
    short = [name for name in differ if not name.startswith("features.")]
    if not table.duplicated(short).any():
        differ = short
    columns = {
        name.removeprefix("option."): [
            "" if pd.isna(value) else plain(str(value).strip('"')) for value in table[name]
        ]
        for name in differ
    }
    columns["n"] = [str(n) for n in table["n"]]
    groups = [name for name in ("scenario", "backbone") if name in table]
    group = table.groupby(groups, dropna=False).ngroup() if groups else pd.Series(0, table.index)
    for name in shown:
        kind, _, figure = name.partition(".")
        title = TITLES.get(figure, figure)
        means, stds = table[f"{name}.mean"], table[f"{name}.std"]
        if kind == "cost":
            columns[title] = [_cost(figure, mean) for mean in means]
            continue
        printed = pd.Series([f"{100 * mean:.{digits}f}" for mean in means], table.index)
        worth = printed.astype(float) * (-1 if figure in LOWER_IS_BETTER else 1)
        best = (worth == worth.groupby(group).transform("max")) & bold
        columns[f"{kind.upper()} {title}"] = [
            ""
            if np.isnan(mean)
            else (rf"\textbf{{{word}}}" if is_best else word)
            + ("" if np.isnan(std) else f"{plus_minus}{100 * std:.{digits}f}")
            for word, mean, std, is_best in zip(printed, means, stds, best, strict=True)
        ]
    return columns


def _cost(figure: str, value: float) -> str:
    if np.isnan(value):
        return ""
    if figure.endswith("bytes") or figure.startswith("bytes"):
        return size(value)
    return f"{value:.1f}" if "seconds" in figure else f"{value:,.0f}"


def _escaped(word: str) -> str:
    return word.translate(ESCAPES)
