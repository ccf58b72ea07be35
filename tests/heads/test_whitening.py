"""Tests of whitened features, an option of every head that trains nothing of the network."""

import numpy as np
import pytest
import torch

from varve.heads import ReplaysExemplars, Routes, Task, build_head, options_of
from varve.heads._whitening import oas
from varve.heads.closed_form.nearest_mean import NearestMean
from varve.heads.hf_net import HFNet
from varve.heads.icarl import ICaRL
from varve.heads.parts.clips import Clips
from varve.heads.stpr import StPR

T, D = 3, 6
SMALL = {"layers": 1, "ffn": 16, "epochs": 2, "first_epochs": 2}


def task(labels, number=0, seed=0, rows=0, memory=None):
    """A task of clips whose channels differ in scale, as those of networks do."""
    rng = np.random.default_rng([seed, number])
    scales = 10.0 ** np.linspace(-1, 1, D)
    feats = (rng.normal(size=(len(labels), T, D)) * scales + 3).astype(np.float32)
    feats[:, :, 0] += np.array(labels)[:, None]
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.tensor(labels),
                  torch.arange(rows, rows + len(labels)))  # fmt: skip
    return Task(clips, number, memory=memory)


def map_by_hand(clips):
    """Return the mean m and the map S^(-1/2), by numpy."""
    x = clips.features["vector"].double().numpy().mean(axis=1)
    labels = clips.labels.numpy()
    within = np.concatenate([x[labels == c] - x[labels == c].mean(axis=0) for c in set(labels)])
    covariance = within.T @ within / len(x)
    share = oas(torch.from_numpy(covariance), len(x))
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / D * np.eye(D)
    root = np.linalg.cholesky(np.linalg.inv(shrunk))
    values, vectors = np.linalg.eigh(shrunk)
    inverse = vectors @ np.diag(values**-0.5) @ vectors.T
    np.testing.assert_allclose(root @ root.T, inverse @ inverse, rtol=1e-9)
    return x.mean(axis=0), inverse


def by_hand(clips, mean, inverse):
    x = (clips.features["vector"].double().numpy() - mean) @ inverse
    return Clips({"vector": torch.from_numpy(x).float()}, clips.labels, clips.rows)


def test_a_head_learns_and_scores_what_the_first_task_whitens():
    first, second = task([4, 2] * 12), task([7, 3] * 12, 1, rows=24)
    head, plain = build_head(NearestMean, {"whiten": "first"}), build_head(NearestMean)
    mean, inverse = map_by_hand(first.clips)
    for each in (first, second):
        head.learn(each)
        plain.learn(Task(by_hand(each.clips, mean, inverse), each.number))
    query = task([2, 3, 4, 7] * 3, 2).clips
    expected = plain.scores(by_hand(query, mean, inverse)[torch.arange(12)])
    torch.testing.assert_close(head.scores(query[torch.arange(12)]), expected, rtol=0, atol=1e-5)
    unchanged = build_head(NearestMean)
    unchanged.learn(first)
    unchanged.learn(second)
    assert not torch.allclose(unchanged.scores(query[torch.arange(12)]), expected, atol=0.05)


def test_a_state_has_the_whitening_and_is_resumed():
    head, other = (build_head(NearestMean, {"whiten": "first"}) for _ in range(2))
    assert not [name for name in head.state_dict() if name.startswith("whitening")]
    head.learn(task([4, 2] * 12))
    other.load_state_dict(head.state_dict())
    for each in (head, other):
        each.learn(task([7, 3] * 12, 1))
    query = task([2, 3, 4, 7], 2).clips[torch.arange(4)]
    assert torch.equal(head.scores(query), other.scores(query))


def test_exemplars_and_scores_that_call_another_are_whitened_once():
    head = build_head(ICaRL, {"whiten": "first", "encoder": "mean", "budget": 3})
    assert isinstance(head, ReplaysExemplars)
    assert isinstance(head, ICaRL)
    first = task([4, 2] * 12)
    head.learn(first)
    index = {int(row): i for i, row in enumerate(first.clips.rows)}
    chosen = torch.tensor([index[int(row)] for row in head.exemplars])
    memory = Clips({"vector": first.clips.features["vector"][chosen]},
                   first.clips.labels[chosen], head.exemplars)  # fmt: skip
    head.learn(task([7, 3] * 12, 1, rows=24, memory=memory))
    query = task([2, 3, 4, 7] * 3, 2).clips[torch.arange(12)]
    assert torch.equal(head.scores(query), head.nearest(query))
    mean, inverse = map_by_hand(first.clips)
    plain = build_head(ICaRL, {"encoder": "mean", "budget": 3})
    plain.learn(Task(by_hand(first.clips, mean, inverse)))
    assert plain.exemplars.tolist() == head.exemplars.tolist()[:6]


def test_routing_is_of_whitened_features():
    head = build_head(StPR, SMALL | {"whiten": "first", "text": "means"})
    assert isinstance(head, Routes)
    for number, labels in enumerate(([4, 2] * 6, [7, 3] * 6)):
        head.learn(task(labels, number))
    query = task([2, 3, 4, 7], 2).clips[torch.arange(4)]
    routes = head.routing(query)
    weights_BK = torch.zeros(4, 2).scatter(1, routes.experts, routes.weights)
    torch.testing.assert_close(head.scores_with(query, weights_BK), head.scores(query))
    residuals_BKD = head.residuals(query, [1])
    assert residuals_BKD.shape == (4, 1, D)
    nearest = head.residuals(query)[:, 1:]
    assert torch.equal(residuals_BKD, nearest)


def test_a_training_that_fails_leaves_no_whitening():
    head = build_head(NearestMean, {"whiten": "first"})
    bad = task([4, 2] * 4)
    bad.clips.features["vector"][3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        head.learn(bad)
    good, other = task([4, 2] * 12), build_head(NearestMean, {"whiten": "first"})
    head.learn(good)
    other.learn(good)
    query = good.clips[torch.arange(4)]
    assert torch.equal(head.scores(query), other.scores(query))


def test_what_cannot_be_whitened_is_refused():
    with pytest.raises(ValueError, match="choose from '' and 'first'"):
        build_head(NearestMean, {"whiten": "last"})
    with pytest.raises(ValueError, match="trains a part of the network"):
        build_head(HFNet, {"whiten": "first"})
    assert options_of(NearestMean)["whiten"].default == ""
    head = build_head(StPR, SMALL | {"whiten": "first"})
    clips = task([4, 2] * 4).clips
    with pytest.raises(ValueError, match="features are whitened"):
        head.learn(Task(clips, text=torch.eye(2, D)))
