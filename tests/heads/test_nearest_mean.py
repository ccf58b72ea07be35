"""The nearest class mean against the same computation by hand."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads.closed_form.nearest_mean import NearestMean
from varve.heads.parts.clips import Clips


def learn(head, feats, labels):
    head.learn(Task(Clips({"vector": feats}, labels)))


def scores(head, feats):
    return head.scores({"vector": feats.float()})


def draw(seed, clips=12, frames=3, width=5):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-1, 1, size=(clips, 1, 1))
    feats = (scales * rng.normal(size=(clips, frames, width))).astype(np.float32)
    return feats, np.arange(clips) % 3


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("time", ["mean", "order"])
@pytest.mark.parametrize("unit_first", [True, False])
def test_scores_are_cosines_to_the_class_means(time, unit_first):
    feats, labels = draw(0)
    queries, _ = draw(1)

    def vectors(x):
        x = x.astype(np.float64)
        return x.mean(axis=1) if time == "mean" else x.reshape(len(x), -1)

    learned = unit(vectors(feats)) if unit_first else vectors(feats)
    means = np.stack([learned[labels == c].mean(axis=0) for c in range(3)])
    expected = unit(vectors(queries)) @ unit(means).T

    head = NearestMean(time=time, unit=unit_first)
    learn(head, torch.from_numpy(feats), torch.from_numpy(labels))
    np.testing.assert_allclose(scores(head, torch.from_numpy(queries)), expected, atol=1e-6)


@pytest.mark.parametrize(("time", "apart"), [("mean", False), ("order", True)])
def test_only_order_distinguishes_a_motion_from_its_reverse(time, apart):
    feats = torch.from_numpy(draw(0)[0])
    head = NearestMean(time=time)
    learn(head, torch.cat([feats, feats.flip(1)]), torch.arange(2).repeat_interleave(len(feats)))
    forwards_N, backwards_N = scores(head, feats).T
    assert torch.allclose(forwards_N, backwards_N) is not apart


def test_a_class_learned_in_parts_is_the_class_learned_at_once():
    rng = np.random.default_rng(0)
    feats = torch.from_numpy(rng.normal(10.0, 1.0, size=(4000, 2, 8)).astype(np.float32))
    labels = torch.from_numpy(np.arange(4000) // 2 % 2)
    once, parts = NearestMean(), NearestMean()
    learn(once, feats, labels)
    for start in range(0, 4000, 100):
        learn(parts, feats[start : start + 100], labels[start : start + 100])
    # In float32 these sums differ from 1e-5 on.
    sums = (head.state_dict()["sums"] for head in (once, parts))
    torch.testing.assert_close(*sums, rtol=1e-13, atol=0)


def test_unit_keeps_a_long_feature_from_outvoting_short_ones():
    feats = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 100.0]]])
    labels = torch.zeros(3, dtype=torch.int64)
    queries = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    short_wins, long_wins = NearestMean(unit=True), NearestMean(unit=False)
    for head in (short_wins, long_wins):
        learn(head, feats, labels)
    assert scores(short_wins, queries).argmax(dim=0).tolist() == [0]
    assert scores(long_wins, queries).argmax(dim=0).tolist() == [1]


def test_a_clip_of_zeros_scores_zero_and_not_nan():
    head = NearestMean()
    learn(head, torch.ones(2, 1, 4), torch.tensor([0, 1]))
    assert scores(head, torch.zeros(1, 1, 4)).tolist() == [[0.0, 0.0]]


def test_an_unknown_way_to_treat_time_is_refused():
    with pytest.raises(ValueError, match="choose from mean, order"):
        NearestMean(time="max")


def test_labels_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="int64"):
        learn(NearestMean(), torch.ones(1, 1, 4), torch.tensor([0.5]))


def test_half_precision_features_are_summed_exactly():
    feats = torch.full((3000, 1, 2), 0.1, dtype=torch.float16)
    head = NearestMean(unit=False)
    learn(head, feats, torch.zeros(3000, dtype=torch.int64))
    expected = float(torch.tensor(0.1, dtype=torch.float16)) * 3000
    sums = head.state_dict()["sums"]
    torch.testing.assert_close(
        sums, torch.full((1, 2), expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
