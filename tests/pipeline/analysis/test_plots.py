"""Plots draw the numbers of their arguments, which are read back from the axes."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

from varve.heads import Routing
from varve.pipeline.analysis import plots
from varve.pipeline.experiments import results
from varve.pipeline.experiments.metrics import Matrix
from varve.pipeline.experiments.run_folder import FORMAT, Run

TASKS = (("ant", "bee"), ("cat", "dog", "elk"), ("fox",))
CLIPS = (4, 6, 2)


def random_run(rng: np.random.Generator, tasks=TASKS, nme=False) -> Run:
    def matrix() -> Matrix:
        return Matrix.from_rows([rng.random(i + 1).tolist() for i in range(len(tasks))], CLIPS)

    return Run(Path(), {"tasks": [list(task) for task in tasks]}, matrix(),
               matrix() if nme else None, {}, {})  # fmt: skip


@pytest.fixture
def seeds() -> dict[str, list[Run]]:
    rng = np.random.default_rng(0)
    return {"no position": [random_run(rng, nme=True) for _ in range(3)],
            "position learned": [random_run(rng, nme=True) for _ in range(2)]}  # fmt: skip


def by_hand(matrices: list[Matrix]) -> tuple[list[float], list[float]]:
    """Mean and deviation, in per cent, of the stage accuracies."""
    means, deviations = [], []
    for i in range(len(CLIPS)):
        values = []
        for matrix in matrices:
            right = sum(matrix.accuracy[i, j] * CLIPS[j] for j in range(i + 1))
            values.append(100 * right / sum(CLIPS[: i + 1]))
        mean = sum(values) / len(values)
        means.append(mean)
        squares = sum((value - mean) ** 2 for value in values)
        deviations.append(math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan)
    return means, deviations


@pytest.mark.parametrize("classifier", ["cnn", "nme"])
def test_lines_are_means_over_seeds_and_bands_one_deviation(seeds, classifier):
    axes = plots.accuracy(seeds, classifier).axes[0]
    assert len(axes.lines) == len(axes.collections) == 2
    for line, band, (name, runs) in zip(axes.lines, axes.collections, seeds.items(), strict=True):
        matrices = [run.matrix if classifier == "cnn" else run.nme for run in runs]
        means, deviations = by_hand(matrices)
        assert line.get_xdata().tolist() == [2, 5, 6]  # classes learned
        np.testing.assert_allclose(line.get_ydata(), means)
        assert line.get_label() == f"{name} (n = {len(runs)})"
        corners = band.get_paths()[0].vertices
        for at, mean, deviation in zip((2, 5, 6), means, deviations, strict=True):
            heights = corners[corners[:, 0] == at, 1]
            np.testing.assert_allclose(heights.min(), mean - deviation)
            np.testing.assert_allclose(heights.max(), mean + deviation)
        assert to_hex(band.get_facecolor()) == to_hex(line.get_color())
    assert axes.get_xlabel() == "classes learned"
    assert "(%)" in axes.get_ylabel()


def test_a_single_seed_has_no_band(seeds):
    figure = plots.accuracy({"one": seeds["no position"][:1]})
    assert not figure.axes[0].collections
    assert "n = 1" in figure.legends[0].get_texts()[0].get_text()


def test_what_cannot_be_in_one_line_is_refused(seeds):
    rng = np.random.default_rng(1)
    other = random_run(rng, tasks=(("ant",), ("bee",), ("cat",)))
    with pytest.raises(ValueError, match="tasks of"):
        plots.accuracy({"mixed": [*seeds["no position"], other]})
    with pytest.raises(ValueError, match="0 have 'nme'"):
        plots.accuracy({"none": [random_run(rng)]}, "nme")
    with pytest.raises(ValueError, match="'knn'"):
        plots.accuracy(seeds, "knn")


def test_the_matrix_is_drawn_in_per_cent_with_its_numbers():
    matrix = Matrix.from_rows([[1.0], [0.25, 0.504], [0.0, 0.7, 0.998]], CLIPS)
    figure = plots.forgetting(matrix)
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn, np.nan), 100 * matrix.accuracy)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "100", (0, 1): "25", (1, 1): "50", (0, 2): "0", (1, 2): "70",
                       (2, 2): "100"}  # fmt: skip
    for text in axes.texts:
        column, row = text.get_position()
        cell = axes.images[0].to_rgba(drawn)[row, column, :3]
        assert contrast(cell, to_rgb(text.get_color())) > 4  # W3C asks 3 of large letters
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tested on task", "after learning task")
    assert figure.axes[1].get_ylabel() == "accuracy (%)"


LABELS = ["fox", "cat", "ant", "elk", "cat", "ant", "bee"]
ORDERED = [2, 5, 6, 1, 4, 3, 0]


def routing_of(weights_NK: list[list[float]]) -> Routing:
    weights = torch.tensor(weights_NK)
    order = weights.argsort(dim=1, descending=True, stable=True)
    nothing = torch.zeros_like(order)
    return Routing(order, weights.gather(1, order), nothing, nothing.float())


def test_weights_are_drawn_by_class_and_expert():
    weights_NK = np.random.default_rng(2).random((7, 3)).astype(np.float32).tolist()
    axes = plots.routing(routing_of(weights_NK), LABELS, TASKS).axes[0]
    drawn = axes.images[0].get_array()
    for row, clip in enumerate(ORDERED):
        for expert in range(3):
            assert drawn[row, expert] == np.float32(weights_NK[clip][expert])
    ticks = {t.get_text(): at for t, at in zip(axes.get_yticklabels(), axes.get_yticks())}  # noqa: B905
    assert ticks == {"ant": 0.5, "bee": 2, "cat": 3.5, "elk": 5, "fox": 6}  # no dog
    frames = {(p.get_xy(), p.get_width(), p.get_height()) for p in axes.patches
              if isinstance(p, Rectangle)}  # fmt: skip
    assert frames == {((-0.5, -0.5), 1, 3), ((0.5, 2.5), 1, 3), ((1.5, 5.5), 1, 1)}
    expert_of = {"ant": 0, "bee": 0, "cat": 1, "elk": 1, "fox": 2}
    hits = sum(
        max(range(3), key=weights_NK[i].__getitem__) == expert_of[LABELS[i]] for i in range(7)
    )
    assert f"{hits / 7:.0%}" in axes.get_title()


def test_an_expert_that_was_not_evaluated_is_blank():
    routing = routing_of([[0.1, 0.7, 0.2]] * 7)
    two = Routing(*(x[:, :2] for x in routing))
    drawn = plots.routing(two, LABELS, TASKS).axes[0].images[0].get_array()
    assert np.ma.getmaskarray(drawn).tolist() == [[True, False, False]] * 7


def test_equal_weights_are_a_picture_too():
    figure = plots.routing(routing_of([[1 / 3] * 3] * 7), LABELS, TASKS)
    assert figure._repr_png_()


def test_many_classes_go_without_names_and_many_tasks_without_some_numbers():
    tasks = [[f"c{task}.{i}" for i in range(3)] for task in range(20)]
    labels = [label for task in tasks for label in task]
    weights = np.random.default_rng(3).random((60, 20)).tolist()
    axes = plots.routing(routing_of(weights), labels, tasks).axes[0]
    assert not {t.get_text() for t in axes.get_yticklabels()} & set(labels)
    assert axes.get_xticks().tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize(
    ("labels", "tasks", "message"),
    [
        (LABELS[1:], TASKS, "6 labels for 7 clips"),
        (["gnu", *LABELS[1:]], TASKS, "of no task: gnu"),
        (["ant"] * 7, TASKS[:2], "3 experts and 2 tasks"),
    ],
)
def test_routing_that_does_not_fit_is_refused(labels, tasks, message):
    with pytest.raises(ValueError, match=message):
        plots.routing(routing_of([[0.1, 0.7, 0.2]] * 7), labels, tasks)


def principal(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two first eigenvectors of the covariance, and their shares of its trace."""
    mean = sum(x_ND) / len(x_ND)
    covariance = sum(np.outer(x - mean, x - mean) for x in x_ND) / len(x_ND)
    values, vectors = np.linalg.eigh(covariance)
    axes = []
    for column in (-1, -2):
        vector = vectors[:, column]
        axes.append(vector * np.sign(vector[np.abs(vector).argmax()]))
    return np.stack(axes), values[[-1, -2]] / values.sum()


def test_residuals_and_anchors_lie_in_the_plane_of_the_clips():
    rng = np.random.default_rng(4)
    x_ND = rng.normal(size=(30, 9)) * np.arange(1, 10)
    labels = [("ant", "bee", "cat")[i % 3] for i in range(30)]
    anchors_CD = np.stack([x_ND[1::3].mean(axis=0), x_ND[::3].mean(axis=0)])
    figure = plots.residuals(torch.from_numpy(x_ND), labels, anchors_CD, ["bee", "ant"])
    axes = figure.axes[0]
    vectors_2D, shares = principal(x_ND)
    drawn = {points.get_label(): points.get_offsets() for points in axes.collections}
    assert set(drawn) == {"other classes", "bee", "ant", "_anchor of bee", "_anchor of ant"}
    for name, first in (("ant", 0), ("bee", 1), ("other classes", 2)):
        class_vectors = x_ND[first::3] - x_ND.mean(axis=0)
        expected = [[float(x @ vector) for vector in vectors_2D] for x in class_vectors]
        np.testing.assert_allclose(drawn[name], expected, atol=1e-9)
        if first < 2:
            np.testing.assert_allclose(drawn[f"_anchor of {name}"], [np.mean(expected, axis=0)])
    colours = {points.get_label(): to_hex(points.get_facecolor()[0]) for points in axes.collections}
    assert colours["ant"] == colours["_anchor of ant"]
    assert len({colours[name] for name in ("ant", "bee", "other classes")}) == 3
    assert axes.get_xlabel() == f"first component ({shares[0]:.0%} of the variance)"
    assert axes.get_ylabel() == f"second component ({shares[1]:.0%} of the variance)"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["other classes", "bee", "ant"]


def test_mirrored_vectors_have_the_mirrored_clips_and_the_same_axes():
    x_ND = np.random.default_rng(5).normal(size=(12, 4)) * [4, 3, 2, 1]
    _, axes_2D, shares = plots.plane(x_ND)
    _, mirrored_2D, again = plots.plane(-x_ND)
    np.testing.assert_allclose(axes_2D, mirrored_2D)
    np.testing.assert_allclose(shares, again)
    assert (axes_2D[[0, 1], np.abs(axes_2D).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(axes_2D @ axes_2D.T, np.eye(2), atol=1e-12)


X = np.arange(12.0).reshape(4, 3) ** 2


@pytest.mark.parametrize(
    ("x", "anchors", "message"),
    [
        (X[:3], X[:1], "\\[3, 3\\] of 4 labelled"),
        (X[:, None], X[:1], "\\[4, 1, 3\\]"),
        (X, X[:2], "anchors \\[2, 3\\] of 1 classes"),
        (X, X[:1, :2], "anchors \\[1, 2\\]"),
        (np.ones((4, 3)), X[:1], "span no plane"),
        (X[:, :1], X[:1, :1], "span no plane"),
        (np.where(X == 0, np.nan, X), X[:1], "finite"),
    ],
)
def test_residuals_that_do_not_fit_are_refused(x, anchors, message):
    with pytest.raises(ValueError, match=message):
        plots.residuals(x, ["ant"] * 4, anchors, ["ant"])


def test_every_picture_is_shown_once_and_nothing_global_is_touched():
    code = """
import sys
import numpy as np
from varve.pipeline.analysis import plots
assert not {"matplotlib", "torch"} & set(sys.modules), "imported for nothing"
from varve.pipeline.experiments.metrics import Matrix
figure = plots.forgetting(Matrix(np.ones((1, 1)), np.array([3])))
assert figure._repr_png_().startswith(b"\\x89PNG")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True,
                   cwd=Path(__file__).parents[3])  # fmt: skip


def test_without_matplotlib_the_next_move_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="notebooks"):
        plots.forgetting(Matrix(np.ones((1, 1)), np.array([3])))


def written_run(folder: Path, seed: int, finished: bool = True, **options) -> Path:
    """A run folder of two tasks."""
    folder.mkdir(parents=True)
    matrix = Matrix.from_rows([[0.5], [0.25, 0.75]], [4, 4])
    spec = {"format": FORMAT, "head": "stpr", "scenario": "1+1x1", "seed": seed,
            "backbone": "net:tag", "options": {"seed": seed, **options},
            "tasks": [["ant"], ["bee"]]}  # fmt: skip
    parts = {"spec": spec, "matrix": {"cnn": matrix.to_json(), "nme": None, "clips": [4, 4],
                                      "tasks": spec["tasks"]},
             "cost": {"trainable": 3}}  # fmt: skip
    if finished:
        parts["metrics"] = {"cnn": matrix.figures(), "nme": None, "left_out": {}}
    for name, value in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("through_records", [False, True])
def test_runs_are_grouped_by_what_they_differ_in_but_for_seeds(tmp_path, through_records):
    for position, seed in itertools.product((None, "learned"), (1, 2)):
        written_run(tmp_path / f"{position}{seed}", seed, position=position, tau=0.1)
    written_run(tmp_path / "unfinished", 3, finished=False, position=None, tau=0.1)
    runs = results.read(tmp_path)
    if through_records:  # as an ablation hands them on
        runs = pd.DataFrame(runs.to_dict("records"))
    groups = plots.groups(runs)
    folders = {name: sorted(run.folder.name for run in group) for name, group in groups.items()}
    assert folders == {"no position": ["None1", "None2"],
                       "position learned": ["learned1", "learned2"]}  # fmt: skip
    assert set(plots.groups(runs, ["head"])) == {"stpr"}
    assert set(plots.groups(runs, ["option.tau", "head"])) == {"tau 0.1, stpr"}
    assert len(plots.accuracy(groups).axes[0].lines) == 2


def test_alike_runs_are_one_group_and_unfinished_ones_none(tmp_path):
    written_run(tmp_path / "a", 1)
    assert list(plots.groups(results.read(tmp_path))) == ["stpr"]
    written_run(tmp_path / "none" / "b", 1, finished=False)
    with pytest.raises(ValueError, match="none of 1 runs"):
        plots.groups(results.read(tmp_path / "none"))


# Machado, Oliveira and Fernandes 2009, whole loss of a cone type, on linear RGB.
BLIND = {
    "to nothing": np.eye(3),
    "to red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "to green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                 [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def linear(colour) -> np.ndarray:
    x = np.asarray(colour)
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def contrast(first, second) -> float:
    low, high = sorted(float(linear(x) @ [0.2126, 0.7152, 0.0722]) for x in (first, second))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("blind", BLIND)
def test_lines_differ_for_who_sees_colours_otherwise(blind):
    seen = [np.clip(BLIND[blind] @ linear(to_rgb(x)), 0, 1) ** (1 / 2.2) for x in plots.PALETTE]
    for first, second in itertools.combinations(range(len(seen)), 2):
        assert np.linalg.norm(seen[first] - seen[second]) > 0.15, (first, second)


@pytest.mark.parametrize("page", ["white", "black"])
def test_lines_and_grey_are_seen_on_light_and_dark_pages(page):
    for colour in (*plots.PALETTE, plots.GREY):
        assert contrast(to_rgb(colour), to_rgb(page)) > 2
