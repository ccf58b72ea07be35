"""Results: run folders as tables, over seeds, for papers, and class by class.

`read` gives a row for each run: `run` (its folder), `finished`, what was requested (`head`,
`scenario`, `seed`, `backbone`, `option.NAME`, `features.NAME`...), every metric of
`varve.pipeline.experiments.metrics` for both classifiers (`cnn.final`, `nme.bwf`...), and the costs
(`cost.trainable`...). `summary` aggregates over seeds: `n` runs, and `.mean` and `.std` of every
metric and cost. Metrics are computed from matrix.json, so that a new metric has values for finished
runs, too.

`varve.pipeline.experiments.run_folder` lists the files of a run. Reading them needs no torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.experiments import metrics
from varve.pipeline.experiments.metrics import CLASSIFIERS, Matrix
from varve.pipeline.experiments.run_folder import check_format
from varve.pipeline.units import size

# Columns of costs that tables show, and their headings.
COSTS = {
    "trainable": "trainable",
    "seconds_per_task": "s/task",
    "stages_recomputed": "stages",
    "bytes_read": "read",
    "peak_memory_bytes": "peak",
}
# Of a specification: what differs with the seed, or repeats other columns.
NOT_COLUMNS = ("format", "digest", "text", "clips", "tasks", "network", "threads", "head_source")
SEEDS = ("seed", "option.seed")
NUMBERS = (*(f"{classifier}." for classifier in CLASSIFIERS), "cost.")
ENDINGS = (".csv", ".parquet", ".tex")
ESCAPES = str.maketrans(
    {mark: f"\\{mark}" for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def read(folders: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read run folders into a table, a row for each.

    A run that has not finished has `finished` False and no metrics.

    Args:
        folders: Run folders, or folders that contain them at any depth.

    Raises:
        ValueError: There is no run folder, or one has a damaged file or another format.
    """
    roots = [Path(p) for p in ([folders] if isinstance(folders, str | Path) else folders)]
    runs: dict[Path, None] = {}
    for root in roots:
        is_run = (root / "spec.json").exists()
        specs = [root / "spec.json"] if is_run else sorted(root.rglob("spec.json"))
        runs |= dict.fromkeys(file.parent for file in specs)
    if not runs:
        raise ValueError(
            f"no run folder (with a spec.json) in {', '.join(map(str, roots)) or 'nothing'}; "
            "`varve run` makes one"
        )
    table = pd.DataFrame([_record(folder) for folder in runs])
    is_number = table.columns.str.startswith(NUMBERS)
    numbers = table.loc[:, is_number].astype("float64")
    return pd.concat([table.loc[:, ~is_number].apply(_one_type), numbers], axis=1)


def requested(runs: pd.DataFrame) -> list[str]:
    """Return the columns of what was requested of runs, but for their seeds."""
    aside = ("run", "finished", *SEEDS)
    return [name for name in runs if name not in aside and not name.startswith(NUMBERS)]


def summary(
    runs: pd.DataFrame, by: Sequence[str] | None = None, over: Sequence[str] = SEEDS
) -> pd.DataFrame:
    """Mean and standard deviation (n - 1 in its denominator) of finished runs over the seeds.

    Args:
        runs: Table of `read`.
        by: Columns in which configurations differ: by default all that was requested but `over`.
        over: Columns in which the runs of a configuration differ: the seeds, and with `store` the
            splits of a data set, where there is a store for each.

    Returns:
        A row for each configuration, in order of appearance: `by`, `n`, and of each metric and
        cost `.mean` and `.std`; NaN where one of the runs lacks it, and `.std` of a single run.

    Raises:
        ValueError: No run has finished, or a configuration has twice the same values of `over`.
    """
    finished = runs[runs["finished"]]
    if finished.empty:
        raise ValueError(f"none of {len(runs)} runs has finished; `varve run` resumes one")
    keys = [name for name in requested(runs) if name not in over] if by is None else [*by]
    seeds = [name for name in over if name in runs]
    repeated = finished["run"][finished.duplicated([*keys, *seeds], keep=False)]
    if len(repeated):
        raise ValueError(
            f"runs of one configuration and seed: {', '.join(repeated[:4])}"
            f"{', ...' if len(repeated) > 4 else ''}. Leave some out, or add the column in which "
            "they differ to `by`"
        )
    groups = finished.groupby(keys, dropna=False, sort=False)
    parts = {"n": groups.size()}
    for name in (name for name in runs if name.startswith(NUMBERS)):
        parts[f"{name}.mean"] = groups[name].agg(lambda values: values.mean(skipna=False))
        parts[f"{name}.std"] = groups[name].agg(lambda values: values.std(ddof=1, skipna=False))
    return pd.DataFrame(parts).reset_index()


def paired(
    runs: pd.DataFrame,
    baseline: Mapping[str, Any],
    figure: str = "cnn.final",
    over: Sequence[str] = SEEDS,
) -> pd.DataFrame:
    """Compare each configuration with a baseline, run by run of the same seed (Student's t).

    Heads that draw nothing have no `option.seed`: their runs are paired by `seed` alone.

    Args:
        runs: Table of `read`.
        baseline: Values of the columns that single out one configuration, such as
            {"head": "nearest_mean"} or {"head": "stpr", "option.routing": "average"}.
        figure: Column to compare, such as "cnn.final" or "nme.bwf".
        over: As for `summary`: the columns that pair the runs.

    Returns:
        A row for each other configuration, in order of appearance: the columns in which any two
        differ; `n`, the number of pairs; `difference`, the mean over them of the configuration less
        the baseline; `standard_error` of that mean; `low` and `high`, the 95 % confidence interval;
        and `p`, two-sided. All but the difference are NaN for a single pair.

    Raises:
        ValueError: There is no such column. No run, or several configurations, are the baseline; or
            another one lacks a run of the same seed, or one on the same clips.
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import ttest_1samp
    except ImportError as error:
        raise ImportError("paired tests need scipy: pip install 'varve[notebooks]'") from error
    lacking = [name for name in (figure, *baseline) if name not in runs]
    if lacking:
        raise ValueError(f"no column {', '.join(lacking)}; there are {', '.join(runs)}")
    finished = runs[runs["finished"] & runs[figure].notna()]
    keys = [name for name in requested(runs) if name not in over]
    numbers = finished.groupby(keys, dropna=False, sort=False).ngroup()
    chosen = np.ones(len(finished), bool)
    for name, value in baseline.items():
        chosen &= (finished[name] == value).fillna(False).to_numpy(bool)
    if len(set(numbers[chosen])) != 1:
        raise ValueError(
            f"{dict(baseline)} are {len(set(numbers[chosen]))} configurations among the finished "
            f"runs with {figure}: give columns and values of one of {', '.join(keys)}"
        )
    reference = finished[chosen]
    varied = [name for name in keys if finished[name].astype(str).nunique() > 1]
    rows = []
    for _, alike in finished[~chosen].groupby(numbers[~chosen], sort=False):
        # What only one of the two has, such as the seed of a head that draws, does not pair runs.
        pairs = [name for name in over if name in runs
                 and alike[name].notna().all() and reference[name].notna().all()]  # fmt: skip
        ours, theirs = (table.set_index(pairs).sort_index() for table in (alike, reference))
        if [*ours.index] != [*theirs.index] or ours.index.has_duplicates:
            raise ValueError(
                f"{alike.iloc[0]['run']} and those like it have {pairs} {[*ours.index]}, and the "
                f"baseline {[*theirs.index]}: compare runs of the same ones, each once"
            )
        for compared, base in zip(ours["run"], theirs["run"], strict=True):
            _check_same_clips(base, compared)
        gaps = (ours[figure].astype(float) - theirs[figure].astype(float)).to_numpy()
        row = {name: alike.iloc[0][name] for name in varied}
        row |= {"n": len(gaps), "difference": gaps.mean()}
        row |= dict.fromkeys(("standard_error", "low", "high", "p"), np.nan)
        if len(gaps) > 1:
            test = ttest_1samp(gaps, 0.0) if gaps.std() else None
            row["standard_error"] = gaps.std(ddof=1) / np.sqrt(len(gaps))
            interval = test.confidence_interval() if test else (gaps.mean(), gaps.mean())
            row["low"], row["high"] = interval
            row["p"] = test.pvalue if test else float(not gaps.any())
        rows.append(row)
    columns = [*varied, "n", "difference", "standard_error", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


def writable(path: str | Path) -> Path:
    """Return a path at which a table can be written.

    Raises:
        ValueError: The ending is none of .csv, .parquet, .tex, or there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: a table is .csv, .parquet or .tex, in an existing folder")
    return path


def write(table: pd.DataFrame, path: str | Path, **options: Any) -> None:
    """Write a table by the ending of its name: .csv, .parquet, or .tex (with options of `latex`).

    Raises:
        ValueError: Another ending, or .tex for a table that is no summary.
    """
    path, ending = writable(path), Path(path).suffix.lower()
    if options and ending != ".tex":
        raise ValueError(f"{path}: only .tex has options, not {', '.join(options)}")
    # Without the attrs: they need not be JSON, as Parquet wants.
    plain = pd.DataFrame(table)
    if ending == ".tex":
        path.write_text(latex(table, **options), "utf-8")
    elif ending == ".csv":
        plain.to_csv(path, index=False)
    else:
        plain.to_parquet(path, index=False)


def default_columns() -> list[str]:
    """Columns that tables show unless others are requested: metrics of both classifiers, costs."""
    shown = [name for name in metrics.names() if metrics.display_of(name).in_tables]
    return [f"{classifier}.{name}" for classifier in CLASSIFIERS for name in shown] + [
        f"cost.{name}" for name in COSTS
    ]


def text(table: pd.DataFrame, figures: Sequence[str] | None = None) -> str:
    """Format a summary for a terminal: what its rows differ in, metrics in per cent, mean ± std.

    Args:
        table: Table of `summary`.
        figures: Columns to show, such as "cnn.final"; by default `default_columns`.
    """
    columns = _columns(table, figures, 1, " ± ", str)
    return str(pd.DataFrame(columns).to_string(index=False))


def latex(
    table: pd.DataFrame, figures: Sequence[str] | None = None, bold: bool = False, digits: int = 1
) -> str:
    """Format a summary as a LaTeX tabular (package booktabs): metrics in per cent, mean ± std.

    Args:
        table: Table of `summary`.
        figures: Columns to show, such as "cnn.final"; by default `default_columns`. The runs may
            lack some of them.
        bold: Whether the best value of each metric is bold, among the rows of one scenario and
            backbone; values that are printed alike are equal. Costs are not compared.
        digits: Number of digits after the decimal point.

    Raises:
        ValueError: It is no summary, or has none of the columns.
    """
    columns = _columns(table, figures, digits, r" $\pm$ ", _escaped, bold)
    left = list(columns).index("n")
    rows = [map(_escaped, columns), *zip(*columns.values(), strict=True)]
    head, *body = (" & ".join(row) + r" \\" for row in rows)
    start = rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(columns) - left)}}}"
    lines = [start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def per_class(run: str | Path, stage: int | None = None, classifier: str = "cnn") -> pd.DataFrame:
    """Return `metrics.per_class` of a run after a task, by default its last.

    Raises:
        ValueError: The run has no such predictions.
    """
    predictions = _predictions(run, stage, classifier)
    return metrics.per_class(predictions["label"].tolist(), predictions["top1"].tolist())


def changes(
    before: str | Path, after: str | Path, stage: int | None = None, classifier: str = "cnn"
) -> pd.DataFrame:
    """Compare the accuracies and confusions of each class between two runs.

    Args:
        before: Run folder, of another head or other options.
        after: Run folder that was tested on the same clips.
        stage: Number of the last task learned, in both; by default the last of each.
        classifier: "cnn" or "nme".

    Returns:
        Indexed by label, most improved first: clips, before, after (accuracies), change, and
        confused_before, confused_share_before, confused_after, confused_share_after: the most
        frequent wrong prediction, and its share of the class's clips.

    Raises:
        ValueError: A run has no such predictions, or they are of other clips or another order.
    """
    tables = [_predictions(run, stage, classifier) for run in (before, after)]
    clips = [set(zip(table["row"], table["label"], strict=True)) for table in tables]
    if clips[0] != clips[1]:
        raise ValueError(
            f"{before} was tested on {len(clips[0])} clips, {after} on {len(clips[1])}, "
            f"{len(clips[0] & clips[1])} of them the same; compare runs of one store and scenario, "
            "after a task where they have learned the same classes"
        )
    _check_same_clips(before, after)
    old, new = (metrics.per_class(t["label"].tolist(), t["top1"].tolist()) for t in tables)
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


def _check_same_clips(before: str | Path, after: str | Path) -> None:
    """Refuse two runs whose tasks have other clips to train or to test on."""
    clips = [_read_json(Path(run) / "spec.json").get("clips") for run in (before, after)]
    if clips[0] != clips[1]:
        raise ValueError(
            f"{before} and {after} have other clips to train or to test on, task by task: compare "
            "runs of one store, split, scenario and seed"
        )


def _predictions(run: str | Path, stage: int | None, classifier: str) -> pd.DataFrame:
    file = Path(run) / "predictions.parquet"
    if not file.exists():
        raise ValueError(f"{run} has no predictions.parquet; give a run folder that has started")
    table = pd.read_parquet(file)
    of_classifier = table[table["classifier"] == classifier]
    last = of_classifier["stage"].max() if stage is None else stage
    chosen = of_classifier[of_classifier["stage"] == last]
    if chosen.empty:
        wanted = repr(classifier) if stage is None else f"{classifier!r} at stage {stage}"
        present = table.groupby("classifier")["stage"].max().items()
        raise ValueError(
            f"{run} has no predictions of {wanted}; it has "
            + (", ".join(f"{name!r}, stages 0 to {top}" for name, top in present) or "none")
        )
    return chosen


def _record(folder: Path) -> dict[str, Any]:
    """Return the row of a run folder."""
    spec = _read_json(folder / "spec.json")
    check_format(folder, spec)
    record = {"run": str(folder), "finished": (folder / "metrics.json").exists()}
    first = ("head", "scenario", "seed", "backbone")
    for key in (*first, *(key for key in spec if key not in (*first, *NOT_COLUMNS))):
        value, name = spec.get(key), "option" if key == "options" else key
        if isinstance(value, dict):
            record |= {f"{name}.{part}": content for part, content in value.items()}
        else:
            record[name] = value
    if record["finished"]:
        matrices = _read_json(folder / "matrix.json")
        for classifier in (c for c in CLASSIFIERS if _read_json(folder / "metrics.json").get(c)):
            matrix = Matrix.from_json(matrices, classifier)
            record |= {f"{classifier}.{name}": matrix.metric(name) for name in metrics.names()}
        costs = _costs(_read_json(folder / "cost.json"))
        record |= {f"cost.{name}": value for name, value in costs}
    return record


def _costs(cost: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Give costs as numbers: sums over the tasks, and the number of different stages that ran."""
    for name, value in cost.items():
        if name == "stages_recomputed":
            yield name, len({stage for calls in value for stage in calls})
            yield "stage_calls", sum(sum(calls.values()) for calls in value)
        elif isinstance(value, list):
            yield name, sum(value)
            yield f"{name}_per_task", sum(value) / max(len(value), 1)
        else:
            yield name, value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove its folder and run it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains no object; remove its folder and run it again")
    return content


def _one_type(column: pd.Series) -> pd.Series:
    """Convert a column to one type: whole numbers stay whole beside NaN; mixed become JSON."""
    if pd.api.types.infer_dtype(column) in ("mixed", "mixed-integer"):
        texts = [None if v is None or v != v else json.dumps(v, sort_keys=True) for v in column]
        column = pd.Series(texts, column.index)
    return column.convert_dtypes()


def _columns(
    table: pd.DataFrame,
    figures: Sequence[str] | None,
    digits: int,
    plus_minus: str,
    escape: Callable[[str], str],
    bold: bool = False,
) -> dict[str, list[str]]:
    """Return the cells of a summary as printed: head, what else the rows differ in, n, figures."""
    figures = default_columns() if figures is None else figures
    shown = [
        name for name in figures if f"{name}.mean" in table and table[f"{name}.mean"].notna().any()
    ]
    if not shown:
        raise ValueError(
            f"no summary with {', '.join(figures)}: its columns are "
            f"{', '.join(map(str, table))}. `summary(read(folders))` makes one"
        )
    columns = {
        name.removeprefix("option."): [
            "" if pd.isna(value) else escape(str(value).strip('"')) for value in table[name]
        ]
        for name in _differing(table)
    }
    columns["n"] = [str(n) for n in table["n"]]
    for name in shown:
        kind, _, figure = name.partition(".")
        means, stds = table[f"{name}.mean"], table[f"{name}.std"]
        if kind == "cost":
            columns[COSTS.get(figure, figure)] = [_cost(figure, mean) for mean in means]
            continue
        display = metrics.display_of(figure)
        printed = pd.Series([f"{100 * mean:.{digits}f}" for mean in means], table.index)
        best = _best(table, printed, display.lower_is_better) & bold
        columns[f"{kind.upper()} {display.title}"] = [
            ""
            if np.isnan(mean)
            else (rf"\textbf{{{word}}}" if is_best else word)
            + ("" if np.isnan(std) else f"{plus_minus}{100 * std:.{digits}f}")
            for word, mean, std, is_best in zip(printed, means, stds, best, strict=True)
        ]
    return columns


def _differing(table: pd.DataFrame) -> list[str]:
    """Return the columns that tell the rows of a summary apart, the head first.

    Figures of clips held out of training are never shown without their share.
    """
    names = list(table)[: list(table).index("n")]
    # The name of a head identifies its code, and options that other heads lack.
    heads = table.groupby("head" if "head" in table else np.zeros(len(table)))
    implied = {name for name in names if heads[name].nunique(dropna=False).max() == 1
               and (name == "code" or table[name].isna().any())} - {"head"}  # fmt: skip
    differing = [
        name
        for name in names
        if name in ("head", "validation")
        or (table[name].nunique(dropna=False) > 1 and name not in implied)
    ]
    # Fingerprints mostly repeat the options.
    short = [name for name in differing if not name.startswith("features.")]
    return differing if table.duplicated(short).any() else short


def _best(table: pd.DataFrame, printed: pd.Series, lower_is_better: bool) -> pd.Series:
    """Return which printed values are the best among the rows of one scenario and backbone."""
    names = [name for name in ("scenario", "backbone") if name in table]
    group = table.groupby(names, dropna=False).ngroup() if names else pd.Series(0, table.index)
    values = printed.astype(float) * (-1 if lower_is_better else 1)
    best: pd.Series = values == values.groupby(group).transform("max")
    return best


def _cost(name: str, value: float) -> str:
    if np.isnan(value):
        return ""
    if name.endswith("bytes") or name.startswith("bytes"):
        return size(value)
    return f"{value:.1f}" if "seconds" in name else f"{value:,.0f}"


def _escaped(word: str) -> str:
    return word.translate(ESCAPES)
