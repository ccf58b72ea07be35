"""KLDA against the kernel it approximates, and against LDA of all clips at once in numpy."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads.closed_form.klda import KernelLDA
from varve.heads.parts.clips import Clips

T, D, M = 3, 6, 40


def draw(seed, clips=120, classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=clips)
    centres = 2 * np.random.default_rng(1).normal(size=(classes, 1, D))
    return (centres[labels] + rng.normal(size=(clips, T, D))).astype(np.float32), labels


def learn(head, feats, labels, number=0):
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.from_numpy(labels))
    head.learn(Task(clips, number))


def test_products_of_random_features_approximate_the_kernel():
    feats, _ = draw(0, clips=20)
    head = KernelLDA(features=200_000, gamma=0.4)
    head._form = (D, 0.4)
    x = feats.astype(np.float64).mean(axis=1)
    squared = ((x[:, None] - x) ** 2).sum(axis=-1)
    phi = head.mapped({"vector": torch.from_numpy(feats)}, 0).numpy()
    np.testing.assert_allclose(phi @ phi.T, np.exp(-(0.4**2) * squared / 2), atol=0.01)


def test_it_is_discriminant_analysis_of_the_random_features_of_all_clips():
    feats, labels = draw(0)
    queries, _ = draw(1)
    head = KernelLDA(features=M, gamma=0.3, shrinkage=1e-3, seed=5)
    for number, classes in enumerate([(2, 0), (1, 3)]):
        some = np.isin(labels, classes)
        learn(head, feats[some], labels[some], number)
    rng = np.random.default_rng([5, 0])
    omega, beta = 0.3 * rng.normal(size=(D, M)), rng.uniform(0, 2 * np.pi, M)

    def phi(clips):
        return np.sqrt(2 / M) * np.cos(clips.astype(np.float64).mean(axis=1) @ omega + beta)

    x, S, means = phi(feats), np.zeros((M, M)), []
    for c in range(4):
        means.append(x[labels == c].mean(axis=0))
        S += (x[labels == c] - means[-1]).T @ (x[labels == c] - means[-1]) / len(x)
    P = np.linalg.inv((1 - 1e-3) * S + 1e-3 * np.trace(S) / M * np.eye(M))
    expected = np.stack([phi(queries) @ P @ mu - mu @ P @ mu / 2 for mu in means], axis=1)
    scores = head.scores({"vector": torch.from_numpy(queries)}).numpy()
    assert head.classes == [0, 2, 1, 3]
    np.testing.assert_allclose(scores[:, [0, 2, 1, 3]], expected, rtol=1e-5,
                               atol=1e-5 * np.abs(expected).max())  # fmt: skip


def test_it_separates_a_ball_from_its_shell_where_a_linear_classifier_cannot():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, D))
    labels = (np.arange(400) % 2).astype(np.int64)
    x = np.where(labels[:, None] == 1, 4.0, 1.0) * x / np.linalg.norm(x, axis=1, keepdims=True)
    feats = np.repeat(x[:, None], T, axis=1).astype(np.float32)
    head = KernelLDA(features=300)
    learn(head, feats[:300], labels[:300])
    predicted = head.scores({"vector": torch.from_numpy(feats[300:])}).argmax(dim=1).numpy()
    assert (predicted == labels[300:]).mean() > 0.95


def test_an_ensemble_is_the_mean_of_its_members_probabilities():
    feats, labels = draw(0)
    batch = {"vector": torch.from_numpy(draw(1)[0])}
    head = KernelLDA(features=M, members=3)
    learn(head, feats, labels)
    each = []
    for number, member in enumerate(head._members):
        scores = member.scores({"phi": head.mapped(batch, number)[:, None]})
        each.append(scores.double().softmax(dim=1))
    assert not torch.allclose(each[0], each[1])
    torch.testing.assert_close(head.scores(batch).double(), sum(each) / 3, rtol=1e-5, atol=1e-6)


def test_equal_clips_ask_for_a_width_of_the_kernel():
    feats, labels = draw(0, clips=10)
    with pytest.raises(ValueError, match="give gamma"):
        learn(KernelLDA(), np.ones_like(feats), labels)
