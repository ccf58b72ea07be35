"""Results: run folders as tables, over seeds, on paper; classes of two runs against each other."""

import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varve.pipeline.cli.format_runs import run_summary
from varve.pipeline.experiments import results
from varve.pipeline.experiments.metrics import Matrix, names
from varve.pipeline.experiments.results import changes, latex, per_class, read, summary, text, write
from varve.pipeline.experiments.run_folder import FORMAT, Run

NAN = math.nan


def make_run(
    folder, head="stpr", seed=1000, rows=((0.9,), (0.5, 0.8)), nme=None, finished=True, **spec
):
    """A run folder as `varve.pipeline.experiments.run` leaves it."""
    folder.mkdir(parents=True)
    matrices = {"cnn": rows, **({"nme": nme} if nme else {})}
    spec = {
        "format": FORMAT,
        "head": head,
        "options": {"seed": seed},
        "scenario": "2+1x1",
        "seed": seed,
        "backbone": "ViT-B-16%3Aopenai",
        "tasks": [["a", "b"], ["c"]],
        "features": {"vector": "0123abcd"},
        "network": {"deep": {"er": 1}},
        "text": None,
        "clips": "beef",
        "device": "cpu",
        "digest": f"{seed:x}",
        "threads": 1,
    } | spec
    cost = {
        "trainable": 1179648,
        "multiply_adds": 85_400_000,
        "seconds": [1.5, 2.5],
        "peak_memory_bytes": 2_420_736,
        "bytes_read": 23_000_000_000,
        "state_bytes": 10,
        "exemplar_bytes": 0,
        "stages_recomputed": [{"blocks.11.mlp": 3}, {"blocks.11.mlp": 4, "proj": 4}],
    }
    (folder / "checkpoints").mkdir()
    (folder / "spec.json").write_text(json.dumps(spec))
    if finished:
        matrix_of = {kind: Matrix.from_rows(x, [3, 1]) for kind, x in matrices.items()}
        figures = {"nme": None} | {kind: matrix.figures() for kind, matrix in matrix_of.items()}
        figures |= {"left_out": {"quarantined": 4}, "diagnostics": [{}, {}]}
        content = {"nme": None} | {kind: matrix.to_json() for kind, matrix in matrix_of.items()}
        content |= {"clips": [3, 1], "tasks": spec["tasks"]}
        (folder / "matrix.json").write_text(json.dumps(content))
        (folder / "metrics.json").write_text(json.dumps(figures))
        (folder / "cost.json").write_text(json.dumps(cost))
    return folder


def test_a_run_is_a_row(tmp_path):
    folder = make_run(tmp_path / "one", nme=((1.0,), (0.5, 0.5)), options={"seed": 1, "width": 64})
    (row,) = read(folder).to_dict("records")
    expected = {
        "run": str(folder),
        "finished": True,
        "head": "stpr",
        "scenario": "2+1x1",
        "seed": 1000,
        "backbone": "ViT-B-16%3Aopenai",
        "option.seed": 1,
        "option.width": 64,
        "features.vector": "0123abcd",
        "device": "cpu",
        # (3 x 0.5 + 1 x 0.8) / 4, (0.5 + 0.8) / 2, (0.9 + 0.575) / 2, 0.9 - 0.5
        "cnn.final": pytest.approx(0.575),
        "cnn.final_over_tasks": pytest.approx(0.65),
        "cnn.average_incremental": pytest.approx(0.7375),
        "cnn.bwf": pytest.approx(0.4),
        "cnn.forgetting": pytest.approx(0.4),
        "nme.final": pytest.approx(0.5),
        "nme.final_over_tasks": pytest.approx(0.5),
        "nme.average_incremental": pytest.approx(0.75),
        "nme.bwf": pytest.approx(0.5),
        "nme.forgetting": pytest.approx(0.5),
        "cost.trainable": 1179648,
        "cost.multiply_adds": 85_400_000,
        "cost.seconds": 4,
        "cost.seconds_per_task": 2,
        "cost.peak_memory_bytes": 2_420_736,
        "cost.bytes_read": 23_000_000_000,
        "cost.state_bytes": 10,
        "cost.exemplar_bytes": 0,
        "cost.stages_recomputed": 2,
        "cost.stage_calls": 11,
    }
    assert row == expected
    assert list(row) == list(expected)


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    a = make_run(tmp_path / "a" / "deep" / "x", seed=1)
    b = make_run(tmp_path / "b", seed=2)
    assert read(tmp_path)["run"].tolist() == [str(a), str(b)]
    assert read(str(tmp_path))["seed"].tolist() == [1, 2]
    assert read([b, a, tmp_path])["run"].tolist() == [str(b), str(a)]
    for nothing in ([], tmp_path / "a" / "deep" / "x" / "checkpoints"):
        with pytest.raises(ValueError, match="no run folder"):
            read(nothing)


def test_a_run_that_has_not_ended_has_no_figures_and_no_part_in_a_mean(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1993, finished=False)
    runs = read(tmp_path)
    assert runs["finished"].tolist() == [True, False]
    assert math.isnan(runs["cnn.final"][1])
    assert summary(runs)["n"].tolist() == [1]
    with pytest.raises(ValueError, match="none of 1 runs has finished"):
        summary(read(tmp_path / "b"))
    with pytest.raises(ValueError, match="none of 1 runs has finished"):
        summary(runs[~runs["finished"]])


@pytest.mark.parametrize("file", ["spec", "metrics", "matrix", "cost"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_damaged_file_is_named(file, content, tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / f"{file}.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{file}\.json .*; remove its folder"):
        read(tmp_path)


def test_figures_of_held_out_clips_say_so_in_every_table(tmp_path):
    make_run(tmp_path / "a", validation=0.2)
    make_run(tmp_path / "b")
    for file in tmp_path.glob("*/cost.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"exemplars": 0}))
    alone = summary(read(tmp_path / "a"))
    assert "0.2" in text(alone)
    assert "validation" in text(alone)
    assert "validation" in latex(alone)
    assert "VALIDATION: tested on 20% of the training clips" in run_summary(
        Run.read(tmp_path / "a")
    )
    both = summary(read(tmp_path))  # of one configuration and seed otherwise
    assert both["validation"].fillna(0).tolist() == [0.2, 0]
    assert "validation" not in text(summary(read(tmp_path / "b")))
    assert "VALIDATION" not in run_summary(Run.read(tmp_path / "b"))


def test_whole_numbers_stay_whole_and_mixed_options_become_text(tmp_path):
    make_run(tmp_path / "a", options={"width": 64, "position": None, "epochs": [60, 30]})
    make_run(tmp_path / "b", head="linear", options={"fssd": 0.5, "position": "learned"})
    make_run(tmp_path / "c", options={"fssd": "uniform", "width": 128, "epochs": 30})
    make_run(tmp_path / "d", options={"fssd": True, "steps": [1, 2]})
    runs = read(tmp_path)
    assert runs["option.width"].dtype == "Int64"
    assert runs["option.width"].fillna(0).tolist() == [64, 0, 128, 0]
    assert runs["option.fssd"].fillna("-").tolist() == ["-", "0.5", '"uniform"', "true"]
    assert runs["option.epochs"].fillna("-").tolist() == ["[60, 30]", "-", "30", "-"]
    assert runs["option.position"].fillna("-").tolist() == ["-", "learned", "-", "-"]
    assert runs["option.steps"].fillna("-").tolist() == ["-", "-", "-", "[1, 2]"]
    assert summary(runs)["n"].tolist() == [1, 1, 1, 1]


values = st.floats(0, 1)


@given(
    st.lists(st.lists(st.tuples(values, values, values), min_size=1, max_size=5), min_size=1,
             max_size=4)
)  # fmt: skip
def test_seeds_are_put_together_as_by_hand(groups):
    records = [
        {
            "run": f"{i}-{seed}",
            "finished": True,
            "head": "h",
            "seed": seed,
            "option.seed": seed,
            "option.width": i if i else None,
            "cnn.final": a,
            "nme.final": b,
            "cost.seconds": c,
        }
        for i, group in enumerate(groups)
        for seed, (a, b, c) in enumerate(group)
    ]
    # Configurations appear in the order of their first run, however their seeds are mixed.
    records.sort(key=lambda record: record["seed"])
    table = summary(pd.DataFrame(records))
    assert table["n"].tolist() == [len(group) for group in groups]
    for i, group in enumerate(groups):
        for k, name in enumerate(("cnn.final", "nme.final", "cost.seconds")):
            numbers = [figures[k] for figures in group]
            assert table[f"{name}.mean"][i] == pytest.approx(statistics.fmean(numbers))
            if len(numbers) > 1:
                expected = statistics.stdev(numbers)
                assert table[f"{name}.std"][i] == pytest.approx(expected, abs=1e-9)
            else:
                assert math.isnan(table[f"{name}.std"][i])


def test_configurations_differ_by_all_that_was_requested(tmp_path):
    for seed in (1000, 1993, 2021):
        for lam in (0, 1e4):
            options = {"seed": seed, "fssd": lam}
            make_run(tmp_path / f"{lam}-{seed}", seed=seed, options=options)
        make_run(tmp_path / f"frames-{seed}", seed=seed, features={"vector": "other"})
    table = summary(read(tmp_path))
    assert table["n"].tolist() == [3, 3, 3]
    assert "option.seed" not in table
    by_head = summary(read([tmp_path / "0-1000", tmp_path / "0-1993"]), by=["head"])
    assert list(by_head.columns[:2]) == ["head", "n"]
    with pytest.raises(ValueError, match=r"one configuration and seed: .*, \.\.\."):
        summary(read(tmp_path), by=["head", "scenario"])


def finals(tmp_path, **by_head):
    """Runs of heads, a seed for each final accuracy given."""
    for head, values in by_head.items():
        for seed, final in enumerate(values):
            make_run(tmp_path / f"{head}-{seed}", head, seed, rows=((1.0,), (final, final)))
    return read(tmp_path)


def test_pairs_of_one_seed_are_compared_by_student_s_t(tmp_path):
    runs = finals(tmp_path, base=(0.5, 0.6, 0.4), better=(0.58, 0.63, 0.45), same=(0.5, 0.6, 0.4))
    table = results.paired(runs, {"head": "base"}).set_index("head")
    gaps = [0.08, 0.03, 0.05]
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(3)
    t = mean / error
    expected = {
        "n": 3,
        "difference": mean,
        "standard_error": error,
        "low": mean - 4.302653 * error,  # the quantile of Student's t with 2 degrees of freedom
        "high": mean + 4.302653 * error,
        "p": 1 - t / math.sqrt(2 + t * t),  # its distribution in closed form
    }
    assert table.loc["better"].to_dict() == pytest.approx(expected, rel=1e-5)
    assert table.loc["same", ["difference", "low", "high", "p"]].tolist() == [0, 0, 0, 1]


def test_a_single_pair_has_a_difference_alone(tmp_path):
    (row,) = results.paired(finals(tmp_path, a=(0.5,), b=(0.7,)), {"head": "a"}).to_dict("records")
    assert row["difference"] == pytest.approx(0.2)
    assert all(math.isnan(row[name]) for name in ("standard_error", "low", "high", "p"))


def test_runs_without_a_partner_and_an_unclear_baseline_are_refused(tmp_path):
    runs = finals(tmp_path, a=(0.5, 0.6), b=(0.7,))
    with pytest.raises(ValueError, match="compare runs of the same ones"):
        results.paired(runs, {"head": "a"})
    with pytest.raises(ValueError, match="are 2 configurations"):
        results.paired(runs, {"scenario": "2+1x1"})
    with pytest.raises(ValueError, match="are 0 configurations"):
        results.paired(runs, {"head": "c"})
    with pytest.raises(ValueError, match=r"no column final, haed; there are run, "):
        results.paired(runs, {"haed": "a"}, "final")


def test_heads_that_draw_nothing_are_paired_by_the_seed_of_the_class_order(tmp_path):
    for seed, base, value in [(2, 0.5, 0.7), (1, 0.4, 0.5), (3, 0.6, 0.6)]:
        rows = ((0.9,), (value, value))
        make_run(tmp_path / f"a{seed}", "drawn", seed, rows, options={"seed": seed})
        rows = ((0.9,), (base, base))
        make_run(tmp_path / f"b{seed}", "closed", seed, rows, options={})
    for baseline, sign in [("closed", 1), ("drawn", -1)]:
        (row,) = results.paired(read(tmp_path), {"head": baseline}).to_dict("records")
        assert (row["n"], row["difference"]) == (3, pytest.approx(0.1 * sign))


def test_paired_runs_and_changes_are_on_the_same_clips(tmp_path):
    for seed, clips in [(1, "beef"), (2, "cafe")]:
        make_run(tmp_path / f"a{seed}", "a", seed, clips=clips)
        make_run(tmp_path / f"b{seed}", "b", seed, clips="beef")
    with pytest.raises(ValueError, match=r"a2 and .*b2 have other clips"):
        results.paired(read(tmp_path), {"head": "a"})
    before, after = predict(tmp_path / "x", {}), predict(tmp_path / "y", {}, clips="cafe")
    with pytest.raises(ValueError, match="one store, split, scenario and seed"):
        changes(before, after)


def test_a_run_twice_is_refused(tmp_path):
    make_run(tmp_path / "a" / "x")
    make_run(tmp_path / "b" / "x")
    with pytest.raises(ValueError, match=r"a/x, .*b/x\. Leave some out"):
        summary(read(tmp_path))


def test_a_figure_that_one_seed_lacks_has_no_mean(tmp_path):
    make_run(tmp_path / "a", seed=1, nme=((1.0,), (0.5, 0.5)))
    make_run(tmp_path / "b", seed=2)
    make_run(tmp_path / "c", seed=3, nme=((1.0,), (0.5, 0.6)))
    table = summary(read(tmp_path))
    assert table[["nme.final.mean", "nme.final.std"]].isna().all(axis=None)
    assert table[["cnn.final.mean", "cnn.final.std"]].notna().all(axis=None)
    assert "NME" not in text(table)


def test_a_cost_that_one_head_lacks_is_left_blank(tmp_path):
    make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", head="linear")
    cost = json.loads((other / "cost.json").read_text())
    (other / "cost.json").write_text(json.dumps(cost | {"bytes_read": None, "trainable": None}))
    latex_table = latex(summary(read(tmp_path)), ("cost.bytes_read", "cost.trainable"))
    assert r"stpr & 1 & 23 GB & 1,179,648 \\" in latex_table
    assert r"linear & 1 &  &  \\" in latex_table


def ablated(tmp_path):
    """Two heads of two seeds, one without exemplars; one has a name that TeX would take amiss."""
    first, second = ((0.9,), (0.5, 0.8)), ((0.9,), (0.7, 0.8))
    for seed, rows in ((1000, first), (1993, second)):
        make_run(tmp_path / f"a{seed}", "hf_net", seed, rows, options={"way": "50%"})
        nme = ((1.0,), (1.0, 1.0))
        make_run(tmp_path / f"b{seed}", "icarl", seed, first, nme=nme, options={"way": "a&b"})
    return summary(read(tmp_path))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_come_back_from_disk(ending, tmp_path):
    for table in (ablated(tmp_path / "runs"), read(tmp_path / "runs")):
        table.attrs["runs"] = [object()]  # no JSON, and no part of the table
        file = tmp_path / f"table.{ending}"
        write(table, file)
        again = pd.read_csv(file) if ending == "csv" else pd.read_parquet(file)
        pd.testing.assert_frame_equal(again, table, check_dtype=ending == "parquet")
        assert table.attrs["runs"]


def test_latex_is_a_booktabs_table(tmp_path):
    table = ablated(tmp_path / "runs")
    write(table, tmp_path / "t.tex", figures=("cnn.final", "nme.bwf", "cost.bytes_read"))
    # hf_net: 57.5 and 72.5, whose deviation is 15 / sqrt(2)
    assert (tmp_path / "t.tex").read_text() == (
        r"""\begin{tabular}{llrrrr}
\toprule
head & way & n & CNN final & NME BWF & read \\
\midrule
hf\_net & 50\% & 2 & 65.0 $\pm$ 10.6 &  & 23 GB \\
icarl & a\&b & 2 & 57.5 $\pm$ 0.0 & 0.0 $\pm$ 0.0 & 23 GB \\
\bottomrule
\end{tabular}
"""
    )


def test_bold_is_the_best_among_rows_of_one_scenario_and_backbone(tmp_path):
    def add_run(name, last, **spec):
        make_run(tmp_path / name, rows=((0.9,), (last, 0.8)), options={"way": name}, **spec)

    add_run("low", 0.5)
    add_run("high", 0.7)
    add_run("as high", 0.70001)
    add_run("elsewhere", 0.1, scenario="3")
    add_run("otherwise", 0.2, backbone="resnet18")
    figures = ("cnn.final_over_tasks", "cnn.bwf", "cost.trainable")
    latex_table = latex(summary(read(tmp_path)), figures, bold=True)
    rows = [line.split(" & ") for line in latex_table.splitlines() if " & " in line]
    way = rows[0].index("way")
    cells = {row[way]: row[-3:] for row in rows[1:]}
    assert cells["low"] == ["65.0", "40.0", r"1,179,648 \\"]
    for best in ("high", "as high"):
        assert cells[best] == [r"\textbf{75.0}", r"\textbf{20.0}", r"1,179,648 \\"]
    assert cells["elsewhere"][:2] == [r"\textbf{45.0}", r"\textbf{80.0}"]
    assert cells["otherwise"][:2] == [r"\textbf{50.0}", r"\textbf{70.0}"]
    assert "textbf" not in latex(summary(read(tmp_path)), figures)
    # With three digits the two are no longer alike.
    assert latex(summary(read(tmp_path)), figures, bold=True, digits=3).count("textbf") == 6


def test_words_are_spelled_for_tex(tmp_path):
    make_run(tmp_path / "a", options={"way": r"\a_b{c}#~^$&%"})
    make_run(tmp_path / "b", options={"way": "x"})
    spelled = r"\textbackslash{}a\_b\{c\}\#\textasciitilde{}\textasciicircum{}\$\&\%"
    assert spelled in latex(summary(read(tmp_path)))


def test_the_terminal_sees_what_differs_the_figures_and_the_costs(tmp_path):
    lines = text(ablated(tmp_path)).splitlines()
    assert len(lines) == 3
    figures = ("CNN final", "CNN final (tasks)", "CNN avg. inc.", "CNN BWF", "NME final")
    for title in ("head", "way", *figures, "trainable", "s/task", "stages", "read", "peak"):
        assert title in lines[0]
    assert "scenario" not in lines[0]  # the same in all rows
    assert "head" in text(summary(read(tmp_path / "a1000")))
    for cell in ("hf_net", "50%", "65.0 ± 10.6", "1,179,648", "2.0", "23 GB", "2.42 MB"):
        assert cell in lines[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t.xlsx", {}, "a table is .csv, .parquet or .tex"),
        ("t", {}, "a table is .csv, .parquet or .tex"),
        ("t.csv", {"bold": True}, "only .tex has options"),
    ],
)
def test_what_cannot_be_written_is_refused(name, options, message, tmp_path):
    table = ablated(tmp_path / "runs")
    with pytest.raises(ValueError, match=message):
        write(table, tmp_path / name, **options)
    assert not (tmp_path / name).exists()


def test_single_runs_are_no_summary(tmp_path):
    make_run(tmp_path / "a")
    for call in (latex, text, lambda runs: write(runs, tmp_path / "t.tex")):
        with pytest.raises(ValueError, match=r"no summary .*`summary\(read"):
            call(read(tmp_path))
    with pytest.raises(ValueError, match=r"no summary with nme\.final"):
        latex(summary(read(tmp_path)), ("nme.final",))


LABELS = {3: "run", 5: "run", 7: "run", 8: "walk", 9: "walk", 2: "jump"}


def predict(folder, named, stages=(0, 1), classifier="cnn", clips="beef"):
    """Write predictions: correct after task 0; `named` has the later wrong ones, by row."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "stage": stage,
            "row": row,
            "label": label,
            "classifier": classifier,
            "top1": named.get(row, label) if stage else label,
            "top2": "",
        }
        for stage in stages
        for row, label in LABELS.items()
    ]
    pd.DataFrame(rows).to_parquet(folder / "predictions.parquet")
    (folder / "spec.json").write_text(json.dumps({"clips": clips}))
    return folder


def test_changes_of_classes_and_what_they_were_confused_with(tmp_path):
    # run: 0 of 3, taken for walk twice and jump once -> 2 of 3. walk: 2 of 2 -> 1 of 2.
    before = predict(tmp_path / "before", {3: "walk", 5: "walk", 7: "jump"})
    after = predict(tmp_path / "after", {5: "jump", 8: "jump"}, stages=(0, 1, 2))
    table = changes(before, after)
    assert list(table.index) == ["run", "jump", "walk"]
    expected = {
        "clips": [3, 1, 2],
        "before": [0, 1, 1],
        "after": [2 / 3, 1, 1 / 2],
        "change": [2 / 3, 0, -1 / 2],
        "confused_before": ["walk", "", ""],
        "confused_share_before": [2 / 3, 0, 0],
        "confused_after": ["jump", "", "jump"],
        "confused_share_after": [1 / 3, 0, 1 / 2],
    }
    assert list(table) == list(expected)
    for name, column in expected.items():
        if isinstance(column[0], str):
            assert table[name].tolist() == column
        else:
            np.testing.assert_allclose(table[name], column)
    assert not changes(before, after, stage=0)["change"].any()
    back = changes(after, before)
    assert back.loc["run", "change"] == -table.loc["run", "change"]


def test_classes_of_one_run(tmp_path):
    folder = predict(tmp_path / "a", {8: "run"})
    assert per_class(folder)["accuracy"].to_dict() == {"jump": 1, "run": 1, "walk": 0.5}
    assert per_class(folder)["confused_with"].to_dict() == {"jump": "", "run": "", "walk": "run"}
    assert (per_class(folder, stage=0)["accuracy"] == 1).all()


def test_runs_on_other_clips_are_not_compared(tmp_path):
    before = predict(tmp_path / "before", {})
    table = pd.read_parquet(before / "predictions.parquet")
    spoiled = (
        table[table["row"] != 3],
        table.assign(row=table["row"] + 1),
        table.replace({"label": "run"}, "hop"),
    )
    for i, other in enumerate(spoiled):
        after = tmp_path / f"after{i}"
        after.mkdir()
        other.to_parquet(after / "predictions.parquet")
        with pytest.raises(ValueError, match=r"was tested on 6 clips, .* of them the same"):
            changes(before, after)


def test_predictions_that_are_not_there_are_refused_with_those_that_are(tmp_path):
    folder = predict(tmp_path / "a", {})
    with pytest.raises(ValueError, match="no predictions of 'nme'; it has 'cnn', stages 0 to 1"):
        per_class(folder, classifier="nme")
    with pytest.raises(ValueError, match="'cnn' at stage 2; it has 'cnn', stages 0 to 1"):
        per_class(folder, stage=2)
    with pytest.raises(ValueError, match=r"no predictions\.parquet"):
        per_class(tmp_path)


def test_every_shown_figure_is_one_that_runs_have(tmp_path):
    table = summary(read(make_run(tmp_path / "a", nme=((1.0,), (0.5, 0.5)))))
    for name in results.default_columns():
        assert table[f"{name}.mean"].notna().all(), name
    assert {f"{kind}.{figure}.mean" for kind in ("cnn", "nme") for figure in names()} <= set(table)
