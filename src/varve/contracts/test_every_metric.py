"""Contract of metrics: one number of every accuracy matrix, by the matrix alone."""

import json
import math

import numpy as np

from varve.contracts.options import names
from varve.pipeline import registry
from varve.pipeline.experiments.metrics import Matrix, display_of


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", names(metafunc.config, "metrics"))


def matrices() -> list[Matrix]:
    """Matrices of one to six tasks of unequal sizes, with accuracies of 0 and 1 among them."""
    generator = np.random.default_rng(0)
    drawn = [
        Matrix.from_rows(
            [generator.random(i + 1).round(2).tolist() for i in range(tasks)],
            generator.integers(1, 50, tasks),
        )
        for tasks in range(1, 7)
    ]
    return [*drawn, Matrix.from_rows([[1.0], [0.0, 1.0]], [3, 5])]


def test_it_is_a_finite_number_or_nan_of_every_matrix(name):
    values = [matrix.metric(name) for matrix in matrices()]
    assert all(isinstance(value, float) for value in values)
    assert any(not math.isnan(value) for value in values), "NaN of every matrix"


def test_equal_matrices_have_equal_values_and_are_not_changed(name):
    for matrix in matrices():
        copy = Matrix(matrix.accuracy.copy(), matrix.clips.copy())
        first, second = matrix.metric(name), matrix.metric(name)
        assert first == second or math.isnan(first)
        np.testing.assert_array_equal(matrix.accuracy, copy.accuracy)
        np.testing.assert_array_equal(matrix.clips, copy.clips)


def test_it_is_in_the_figures_of_a_run_as_json(name):
    for matrix in matrices():
        figures = json.loads(json.dumps(matrix.figures(), allow_nan=False))
        course = figures["after_each_task"][name]
        assert len(course) == len(matrix.clips)
        assert figures[name] == course[-1]


def test_it_is_shown_under_a_title_of_its_own(name):
    title = display_of(name).title
    assert title
    others = set(registry.available("metrics")) - {name}
    assert title not in {display_of(other).title for other in others}
