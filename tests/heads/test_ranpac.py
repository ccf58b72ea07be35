"""RanPAC against numpy's solution of the normal equations of all clips at once."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads.closed_form.ranpac import RIDGES, RanPAC, solved
from varve.heads.parts.clips import Clips

T, D = 3, 6


def draw(seed, clips=80, classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=clips)
    centres = np.random.default_rng(1).normal(size=(classes, 1, D))
    return (centres[labels] + rng.normal(size=(clips, T, D))).astype(np.float32), labels


def vectors(feats, time="mean"):
    x = feats.astype(np.float64)
    return x.mean(axis=1) if time == "mean" else x.reshape(len(x), -1)


def projected(head, feats, time="mean"):
    x, R = vectors(feats, time), head.state_dict()["projection"].double().numpy()
    return np.maximum(x @ R, 0) if R.shape[1] else x


def learn(head, feats, labels, number=0):
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.from_numpy(labels))
    head.learn(Task(clips, number))


def scores(head, feats):
    outputs = head.scores({"vector": torch.from_numpy(feats)}).numpy()
    return outputs[:, np.argsort(head.classes)]


@pytest.mark.parametrize("time", ["mean", "order"])
@pytest.mark.parametrize("projection", [0, 40])
def test_tasks_in_any_cut_are_the_ridge_regression_of_all_clips(projection, time):
    feats, labels = draw(0)
    queries, _ = draw(1)
    for cut in ([np.arange(80)], [np.flatnonzero(labels == c) for c in (2, 0, 3, 1)],
                np.array_split(np.arange(80), 7)):  # fmt: skip
        head = RanPAC(projection=projection, ridge=3.0, time=time)
        for number, indices in enumerate(cut):
            learn(head, feats[indices], labels[indices], number)
        H, Y = projected(head, feats, time), np.eye(4)[labels]
        W = np.linalg.solve(H.T @ H + 3.0 * np.eye(H.shape[1]), H.T @ Y)
        expected = projected(head, queries, time) @ W
        np.testing.assert_allclose(scores(head, queries), expected, atol=2e-5)


def test_the_projection_is_normal_with_the_seed_and_stays():
    feats, labels = draw(0)
    heads = [RanPAC(projection=500, ridge=1.0, seed=seed) for seed in (0, 0, 1)]
    for head in heads:
        learn(head, feats, labels)
    R, same, other = (head.state_dict()["projection"] for head in heads)
    assert torch.equal(R, same)
    assert not torch.equal(R, other)
    assert R.shape == (D, 500)
    assert abs(R.mean()) < 0.05
    assert abs(R.std() - 1) < 0.05
    learn(heads[0], feats, labels, 1)
    assert torch.equal(heads[0].state_dict()["projection"], R)


def test_the_gram_matrix_is_summed_in_float64():
    feats = np.full((3000, 1, 2), 0.1, dtype=np.float32)
    head = RanPAC(projection=0, ridge=1.0)
    learn(head, feats, np.zeros(3000, dtype=np.int64))
    expected = 3000 * float(np.float32(0.1)) ** 2
    np.testing.assert_allclose(head.state_dict()["gram"], expected, rtol=1e-12)


def test_the_ridge_of_the_first_task_has_the_least_squared_error_on_what_is_held_out():
    feats, labels = draw(0)
    head = RanPAC(projection=40, seed=7)
    learn(head, feats, labels)
    order = np.random.default_rng([7, 0, 1]).permutation(80)
    held_out, used = order[:16], order[16:]
    H, Y = projected(head, feats), np.eye(4)[labels]
    errors = {}
    for ridge in RIDGES:
        W = np.linalg.solve(H[used].T @ H[used] + ridge * np.eye(40), H[used].T @ Y[used])
        errors[ridge] = ((H[held_out] @ W - Y[held_out]) ** 2).mean()
    best = min(errors, key=errors.get)
    assert RIDGES[0] < best < RIDGES[-1]
    assert float(head.state_dict()["ridge"]) == best
    more, labels = draw(5, clips=400, classes=6)
    learn(head, more, labels, 1)
    assert float(head.state_dict()["ridge"]) == best


def test_a_projection_separates_what_no_linear_classifier_can():
    rng = np.random.default_rng(0)
    feats = rng.choice([-1.0, 1.0], size=(200, 1, 2)) + 0.1 * rng.normal(size=(200, 1, 2))
    feats = feats.astype(np.float32)
    labels = (np.prod(feats[:, 0], axis=1) > 0).astype(np.int64)  # exclusive or
    correct = {}
    for projection in (0, 100):
        head = RanPAC(projection=projection)
        learn(head, feats, labels)
        correct[projection] = (scores(head, feats).argmax(axis=1) == labels).mean()
    assert correct[100] == 1
    assert correct[0] < 0.7


def test_what_cannot_be_solved_or_chosen_is_refused():
    with pytest.raises(ValueError, match="too small beside a Gram matrix"):
        solved(1e9 * torch.ones(3, 3, dtype=torch.float64), torch.ones(3, 1).double(), 1e-12)
    with pytest.raises(ValueError, match="a ridge above 0"):
        RanPAC(ridge=0.0)
    with pytest.raises(ValueError, match="one clip cannot choose a ridge"):
        learn(RanPAC(projection=8), np.ones((1, 1, 2), dtype=np.float32), np.zeros(1, dtype=int))
