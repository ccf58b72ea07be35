"""Streaming LDA against LDA of all clips at once, in numpy."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads._whitening import oas
from varve.heads.closed_form.slda import StreamingLDA
from varve.heads.parts.clips import Clips

T, D = 3, 6


def draw(seed, clips=90, classes=5):
    """Clips far from the origin, whose spread is not the same in all directions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=clips)
    mix = np.random.default_rng(0).normal(size=(D, D))
    centres = 3 * np.random.default_rng(1).normal(size=(classes, 1, D)) + 50
    return (centres[labels] + rng.normal(size=(clips, T, D)) @ mix).astype(np.float32), labels


def batch_lda(feats, labels, queries, shrinkage, time="mean"):
    """Scores from the covariance about the class means of all clips, divided by N."""

    def vectors(x):
        x = x.astype(np.float64)
        return x.mean(axis=1) if time == "mean" else x.reshape(len(x), -1)

    x, q = vectors(feats), vectors(queries)
    W, S, means = x.shape[1], np.zeros((x.shape[1],) * 2), []
    for c in range(labels.max() + 1):
        means.append(x[labels == c].mean(axis=0))
        for vector in x[labels == c]:
            S += np.outer(vector - means[-1], vector - means[-1]) / len(x)
    P = np.linalg.inv((1 - shrinkage) * S + shrinkage * np.trace(S) / W * np.eye(W))
    scores = [[mu @ P @ vector - mu @ P @ mu / 2 for mu in means] for vector in q]
    return np.array(scores), S


def learn(head, feats, labels):
    head.learn(Task(Clips({"vector": torch.from_numpy(feats)}, torch.from_numpy(labels))))


def scores(head, feats):
    outputs = head.scores({"vector": torch.from_numpy(feats)}).numpy()
    return outputs[:, np.argsort(head.classes)]


@pytest.mark.parametrize("time", ["mean", "order"])
@pytest.mark.parametrize("parts", ["one clip after the other", "by class", "two halves", "at once"])
def test_streaming_in_any_cut_and_order_is_lda_of_all_clips(parts, time):
    feats, labels = draw(0)
    queries, _ = draw(1)
    head = StreamingLDA(time=time, shrinkage=1e-3)
    cuts = {
        "one clip after the other": [[n] for n in range(90)],
        "by class": [np.flatnonzero(labels == c) for c in (3, 1, 4, 0, 2)],
        "two halves": [np.arange(45), np.arange(45, 90)],
        "at once": [np.arange(90)],
    }
    for indices in cuts[parts]:
        learn(head, feats[indices], labels[indices])
    expected, _ = batch_lda(feats, labels, queries, 1e-3, time)
    streamed = scores(head, queries)
    # float32 scores; what is compared among classes are differences of numbers 100 times greater.
    np.testing.assert_allclose(streamed, expected, rtol=1e-6, atol=1e-5 * np.abs(expected).max())


def test_the_covariance_of_a_stream_is_exact_to_float64():
    feats, labels = draw(0)
    head = StreamingLDA()
    for indices in np.array_split(np.random.default_rng(5).permutation(90), 30):
        learn(head, feats[indices], labels[indices])
    state = head.state_dict()
    _, S = batch_lda(feats, labels, feats[:1], 0.1)
    np.testing.assert_allclose(state["scatter"] / 90, S, rtol=1e-11, atol=1e-11)
    order = np.argsort(head.classes)
    np.testing.assert_array_equal(state["counts"][order], np.bincount(labels))


def test_scores_do_not_follow_a_linear_change_of_the_features_but_for_shrinkage():
    feats, labels = draw(0)
    queries, _ = draw(1)
    mix = np.random.default_rng(3).normal(size=(D, D)).astype(np.float32)
    relative_scores = []
    for change in (np.eye(D, dtype=np.float32), mix):
        head = StreamingLDA(shrinkage=1e-9)
        learn(head, (feats - 50) @ change, labels)
        class_scores = scores(head, (queries - 50) @ change)
        relative_scores.append(class_scores - class_scores[:, :1])
    # The change is rounded to float32, and the inverse of the covariance makes more of it.
    np.testing.assert_allclose(*relative_scores, atol=2e-3 * np.abs(relative_scores[0]).max())


def test_oas_is_the_published_formula():
    feats, labels = draw(0, clips=12)
    _, S = batch_lda(feats, labels, feats[:1], 0.1)
    p, n = D, 12
    alpha, mu = (S**2).sum() / p**2, np.trace(S) / p
    # scikit-learn's form of Chen et al.'s Eq. 23, n and p as there.
    expected = min(1.0, (alpha + mu**2) / ((n + 1) * (alpha - mu**2 / p)))
    full = ((1 - 2 / p) * p**2 * alpha + (p * mu) ** 2) / (
        (n + 1 - 2 / p) * (p**2 * alpha - (p * mu) ** 2 / p)
    )
    assert oas(torch.from_numpy(S), n) == pytest.approx(min(1.0, full), rel=1e-12)
    assert oas(torch.from_numpy(S), n) == pytest.approx(expected, rel=0.2)
    head = StreamingLDA(shrinkage=None)
    learn(head, feats, labels)
    queries, _ = draw(1)
    wanted, _ = batch_lda(feats, labels, queries, oas(torch.from_numpy(S), n))
    np.testing.assert_allclose(scores(head, queries), wanted, rtol=1e-5)


def test_classes_of_one_clip_each_are_distinguished_by_distance():
    head = StreamingLDA()
    feats = np.eye(3, D, dtype=np.float32)[:, None]
    learn(head, feats, np.arange(3))
    assert scores(head, feats).argmax(axis=1).tolist() == [0, 1, 2]


def test_a_shrinkage_out_of_range_is_refused():
    for shrinkage in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0 and up to 1, or None for OAS"):
            StreamingLDA(shrinkage=shrinkage)
