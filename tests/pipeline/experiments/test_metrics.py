"""Metrics: small matrices worked by hand, and the definitions as loops."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from varve.pipeline.experiments.metrics import (
    Matrix,
    bwf,
    confusion,
    forgetting,
    from_predictions,
    names,
    per_class,
    side_by_side,
)

NAN = math.nan
# Task 1 has three times the clips of task 0, and one and a half times those of task 2.
BY_HAND = Matrix(
    np.array([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.6, 0.2, 0.7]]), np.array([20, 60, 40])
)
HAND = {
    # 18/20, (10 + 48)/80, (12 + 12 + 28)/120
    "final": [0.9, 0.725, 52 / 120],
    # 0.9 - 0.5; ((0.9 - 0.6) + (0.8 - 0.2)) / 2
    "bwf": [None, 0.4, 0.45],
    # the same here: every task was best when it was learned
    "forgetting": [None, 0.4, 0.45],
}


def test_figures_of_a_matrix_worked_by_hand():
    figures = BY_HAND.figures()
    for name, values in HAND.items():
        assert figures["after_each_task"][name] == pytest.approx(values)
    assert figures["final"] == pytest.approx(52 / 120)
    assert figures["final_over_tasks"] == pytest.approx(0.5)  # (0.6 + 0.2 + 0.7) / 3
    assert figures["average_incremental"] == pytest.approx((0.9 + 0.725 + 52 / 120) / 3)
    assert figures["bwf"] == pytest.approx(0.45)
    assert set(figures) == {*names(), "after_each_task"}


def test_the_first_the_best_and_the_best_before_differ_where_a_task_gets_better():
    #   task 0: 0.5, then 0.7, then 0.8; task 1: 0.9, then 0.6
    matrix = Matrix.from_rows([[0.5], [0.7, 0.9], [0.8, 0.6, 1.0]], [1, 1, 1])
    after_1 = matrix.after(1)
    assert bwf(after_1) == pytest.approx(-0.2)  # positive is forgetting, this is gain
    assert forgetting(after_1) == 0
    assert forgetting(after_1, include_last=False) == pytest.approx(-0.2)
    assert bwf(matrix) == pytest.approx((-0.3 + 0.3) / 2)
    assert forgetting(matrix) == pytest.approx((0 + 0.3) / 2)
    assert forgetting(matrix, include_last=False) == pytest.approx((-0.1 + 0.3) / 2)


def test_a_single_task_has_no_forgetting():
    matrix = Matrix.from_rows([[0.25]], [4])
    assert math.isnan(bwf(matrix))
    assert math.isnan(forgetting(matrix))
    assert math.isnan(forgetting(matrix, include_last=False))
    assert matrix.figures()["bwf"] is None
    for name in ("final", "final_over_tasks", "average_incremental"):
        assert matrix.metric(name) == 0.25
    json.dumps(matrix.figures(), allow_nan=False)


# The definitions as loops over Python numbers, tasks counted from 1 as in the papers.


def loops(R, n):
    K = len(n)
    stage = []
    for i in range(1, K + 1):
        right, all_of_them = 0.0, 0
        for j in range(1, i + 1):
            right += R[i, j] * n[j]
            all_of_them += n[j]
        stage.append(right / all_of_them)
    first, best_now, best_before = [], [], []
    for i in range(2, K + 1):
        lost, lost_now, lost_before = 0.0, 0.0, 0.0
        for j in range(1, i):
            lost += R[j, j] - R[i, j]
            lost_now += max(R[k, j] for k in range(j, i + 1)) - R[i, j]
            lost_before += max(R[k, j] for k in range(j, i)) - R[i, j]
        first.append(lost / (i - 1))
        best_now.append(lost_now / (i - 1))
        best_before.append(lost_before / (i - 1))
    over_tasks = sum(R[K, j] for j in range(1, K + 1)) / K
    return stage, over_tasks, first, best_now, best_before


@st.composite
def matrices(draw):
    tasks = draw(st.integers(1, 7))
    whole = draw(hnp.arrays(np.float64, (tasks, tasks), elements=st.floats(0, 1)))
    clips = draw(st.lists(st.integers(1, 1000), min_size=tasks, max_size=tasks))
    return Matrix(np.where(np.tri(tasks), whole, NAN), np.array(clips))


@given(matrices())
def test_figures_are_the_definitions(matrix):
    tasks = len(matrix.clips)
    R = {(i + 1, j + 1): float(matrix.accuracy[i, j]) for i in range(tasks) for j in range(i + 1)}
    n = {j + 1: int(count) for j, count in enumerate(matrix.clips)}
    stage, over_tasks, lost, now, before = loops(R, n)
    close = {"rel": 1e-12, "abs": 1e-12}
    assert matrix.metric("average_incremental") == pytest.approx(sum(stage) / tasks, **close)
    assert matrix.metric("final_over_tasks") == pytest.approx(over_tasks, **close)
    later = [matrix.after(i) for i in range(1, tasks)]
    assert [forgetting(m, include_last=False) for m in later] == pytest.approx(before, **close)
    figures = matrix.figures()
    courses = figures.pop("after_each_task")
    assert courses["final"] == pytest.approx(stage, **close)
    assert courses["bwf"][0] is courses["forgetting"][0] is None
    assert courses["bwf"][1:] == pytest.approx(lost, **close)
    assert courses["forgetting"][1:] == pytest.approx(now, **close)
    assert figures == {name: values[-1] for name, values in courses.items()}


@given(matrices(), matrices())
def test_json_gives_back_every_bit(cnn, nme):
    both = {"cnn": cnn.to_json(), "nme": None, "clips": cnn.clips.tolist(), "tasks": []}
    both = json.loads(json.dumps(both, allow_nan=False))
    again = Matrix.from_json(both)
    np.testing.assert_array_equal(again.accuracy, cnn.accuracy)
    np.testing.assert_array_equal(again.clips, cnn.clips)
    assert all(value is None for i, row in enumerate(both["cnn"]) for value in row[i + 1 :])
    with pytest.raises(ValueError, match="no matrix 'nme' among cnn"):
        Matrix.from_json(both, "nme")


def test_rows_make_the_matrix():
    matrix = Matrix.from_rows([[0.9], [0.5, 0.8], [0.6, 0.2, 0.7]], [20, 60, 40])
    np.testing.assert_array_equal(matrix.accuracy, BY_HAND.accuracy)
    with pytest.raises(ValueError, match="after task 1 there are 2 tasks to test, not 1"):
        Matrix.from_rows([[0.9], [0.5]], [1, 1])


@pytest.mark.parametrize(
    ("accuracy", "clips"),
    [
        ([[0.5, NAN]], [1, 1]),
        ([[0.5]], [1, 1]),
        ([[0.5]], [0]),
        (np.empty((0, 0)), []),
        ([[NAN]], [1]),
        ([[1.1]], [1]),
        ([[-0.1]], [1]),
        ([[55.0]], [1]),  # per cent
        ([[0.5, 0.0], [0.5, 0.5]], [1, 1]),  # zeros in place of NaN
        ([[0.5, NAN], [NAN, 0.5]], [1, 1]),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(accuracy, clips):
    with pytest.raises(ValueError, match="accuracies"):
        Matrix(np.array(accuracy), np.array(clips, np.int64))


@pytest.mark.parametrize("i", [-1, 3])
def test_a_stage_that_is_not_there_is_refused(i):
    with pytest.raises(IndexError, match=f"no task {i}"):
        BY_HAND.after(i)


def test_cnn_and_nme_stand_side_by_side():
    nme = Matrix.from_rows([[1.0], [0.5, 0.5], [0.0, 0.5, 1.0]], BY_HAND.clips)
    table = side_by_side(cnn=BY_HAND, nme=nme)
    assert list(table.columns) == names()
    assert table.loc["cnn", "final"] == BY_HAND.metric("final")
    assert table.loc["nme", "bwf"] == bwf(nme)
    alone = side_by_side(cnn=Matrix.from_rows([[0.5]], [2]), nme=None)
    assert list(alone.index) == ["cnn"]
    assert math.isnan(alone.loc["cnn", "bwf"])


TASKS = [["a", "b"], ["c"]]


def predictions():
    """Stage 0: 2 of 3 right. Stage 1: 1 of 3, and 1 of 2."""
    rows = [
        (0, 4, "a", "a"),
        (0, 2, "a", "b"),
        (0, 9, "b", "b"),
        (1, 4, "a", "c"),
        (1, 2, "a", "b"),
        (1, 9, "b", "b"),
        (1, 5, "c", "c"),
        (1, 6, "c", "a"),
    ]
    cnn = pd.DataFrame(rows, columns=["stage", "row", "label", "top1"]).assign(classifier="cnn")
    nme = cnn.assign(classifier="nme", top1=cnn["label"])
    return pd.concat([cnn, nme], ignore_index=True)


def test_predictions_give_the_matrix_whatever_the_order_of_their_rows():
    table = predictions().sample(frac=1, random_state=0)
    matrix = from_predictions(table, TASKS)
    np.testing.assert_allclose(matrix.accuracy, [[2 / 3, NAN], [1 / 3, 1 / 2]])
    np.testing.assert_array_equal(matrix.clips, [3, 2])
    assert from_predictions(table, TASKS, "nme").metric("final") == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.drop(index=3), "all clips of the tasks so far"),
        (lambda p: p[p["stage"] == 1], "all clips of the tasks so far"),
        (lambda p: p[p["label"] != "c"], "all clips of the tasks so far"),
        (lambda p: p[:0], "all clips of the tasks so far"),
        (lambda p: p.assign(stage=1 - p["stage"]), "all clips of the tasks so far"),
        (lambda p: p.assign(classifier="nmc"), "there are those of nmc"),
        (lambda p: p.assign(label="z"), "of no task: z"),
    ],
)
def test_predictions_of_another_run_make_no_matrix(spoil, message):
    with pytest.raises(ValueError, match=message):
        from_predictions(spoil(predictions()), TASKS)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), max_size=40))
def test_confusion_and_classes_are_counted_one_by_one(pairs):
    labels, named = [a for a, _ in pairs], [b for _, b in pairs]
    table = confusion(labels, named, list("dcba"))
    assert list(table.index) == list(table.columns) == list("dcba")
    for a in "abcd":
        for b in "abcd":
            assert table.loc[a, b] == sum(pair == (a, b) for pair in pairs)
    if not pairs:
        with pytest.raises(ValueError, match="no clip"):
            per_class(labels, named)
        return
    classes = per_class(labels, named)
    assert list(classes.index) == sorted(set(labels))
    for label, row in classes.iterrows():
        taken = [b for a, b in pairs if a == label]
        wrong = [b for b in taken if b != label]
        assert row["clips"] == len(taken)
        assert row["accuracy"] == taken.count(label) / len(taken)
        if wrong:
            most = min(wrong, key=lambda b: (-wrong.count(b), b))
            assert row["confused_with"] == most
            assert row["confused_share"] == wrong.count(most) / len(taken)
        else:
            assert row["confused_with"] == ""
            assert row["confused_share"] == 0


def test_a_name_of_no_class_is_refused():
    with pytest.raises(ValueError, match=r"no class 'z' among 2"):
        confusion(["a"], ["z"], ["a", "b"])
