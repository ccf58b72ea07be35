"""LoRanPAC against least squares and truncated decompositions in numpy."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads.closed_form.loranpac import LoRanPAC
from varve.heads.parts.clips import Clips

T, D, M = 3, 6, 50


def draw(seed, clips, classes=4):
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % classes
    centres = 2 * np.random.default_rng(1).normal(size=(classes, 1, D))
    return (centres[labels] + rng.normal(size=(clips, T, D))).astype(np.float32), labels


def learn(head, feats, labels, number=0):
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.from_numpy(labels))
    head.learn(Task(clips, number))


def projected(feats, seed=0):
    R = np.random.default_rng([seed, 0]).normal(size=(D, M))
    return np.maximum(feats.astype(np.float64).mean(axis=1) @ R, 0).T  # [M, N]


def test_without_truncation_it_is_the_least_squares_of_smallest_norm():
    feats, labels = draw(0, 32)
    queries, _ = draw(1, 20)
    head = LoRanPAC(projection=M, truncation=0.0)
    for number, some in enumerate([labels < 2, labels >= 2]):
        learn(head, feats[some], labels[some], number)
    W = np.linalg.pinv(projected(feats).T) @ np.eye(4)[labels]
    scores = head.scores({"vector": torch.from_numpy(queries)}).numpy()
    np.testing.assert_allclose(scores, projected(queries).T @ W, rtol=1e-4, atol=1e-5)


def test_truncation_leaves_out_the_smallest_singular_values_of_every_task():
    feats, labels = draw(0, 40)
    queries, _ = draw(1, 20)
    head = LoRanPAC(projection=M, truncation=0.25)
    scaled, targets = np.zeros((M, 0)), np.zeros((M, 4))
    for number, some in enumerate([labels < 2, labels >= 2]):
        learn(head, feats[some], labels[some], number)
        H = projected(feats[some])
        U, S, _ = np.linalg.svd(np.concatenate([scaled, H], axis=1), full_matrices=False)
        kept = round(0.75 * len(S))
        scaled = U[:, :kept] * S[:kept]
        targets += H @ np.eye(4)[labels[some]]
        assert head.state_dict()["scaled"].shape == (M, kept)
    W = U[:, :kept] @ np.diag(S[:kept] ** -2) @ U[:, :kept].T @ targets
    scores = head.scores({"vector": torch.from_numpy(queries)}).numpy()
    np.testing.assert_allclose(scores, projected(queries).T @ W, rtol=1e-4, atol=1e-5)


def test_more_clips_than_random_features_are_the_same_in_parts(monkeypatch):
    feats, labels = draw(0, 300)
    queries, _ = draw(1, 20)
    whole = LoRanPAC(projection=M, truncation=0.25)
    monkeypatch.setattr("varve.heads.closed_form.loranpac.BATCH", 7)
    learn(whole, feats, labels)
    U, S, _ = np.linalg.svd(projected(feats), full_matrices=False)
    kept = round(0.75 * M)
    W = U[:, :kept] @ np.diag(S[:kept] ** -2) @ U[:, :kept].T
    W = W @ projected(feats) @ np.eye(4)[labels]
    scores = whole.scores({"vector": torch.from_numpy(queries)}).numpy()
    np.testing.assert_allclose(scores, projected(queries).T @ W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"projection": 0}, {"truncation": 1.0}, {"time": "sum"}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=r"projection=|time="):
        LoRanPAC(**options)
