"""Fine-tuning: its loss against numpy, and that it forgets as it must."""

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.closed_form.nearest_mean import NearestMean
from varve.heads.linear import Linear
from varve.heads.parts.clips import Clips

N, T, D = 12, 3, 5


def task(labels, number=0, seed=0, losses=None):
    feats = np.random.default_rng([seed, 3]).normal(size=(len(labels), T, D)).astype(np.float32)
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.tensor(labels))
    losses = [] if losses is None else losses
    return feats, Task(clips, number, on_epoch_end=lambda done, epochs, loss: losses.append(loss))


def cross_entropy(feats, weight, bias, columns):
    """Mean over clips, of the time-mean vector made 16 long."""
    losses = []
    for x_TD, column in zip(feats.astype(np.float64), columns, strict=True):
        x = x_TD.sum(axis=0) / T
        logits = weight @ (16 * x / np.linalg.norm(x)) + bias
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[column])
    return np.mean(losses)


def parameters(head):
    state = head.state_dict()
    return [state[f"classifier.{name}"].double().numpy() for name in ("weight", "bias")]


def test_the_loss_is_the_cross_entropy_over_all_columns_so_far():
    losses = []
    head = build_head(Linear, dict(first_epochs=3, epochs=2, weight_decay=0))
    feats, first = task([4, 2] * 6, losses=losses)
    head.learn(first)
    # New columns start at zero, so the first loss is that of chance.
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    weight, bias = parameters(head)
    feats, second = task([7, 2] * 6, 1, 1, losses=losses)
    head.learn(second)
    weight, bias = np.vstack([weight, np.zeros(D)]), np.append(bias, 0)
    assert len(losses) == 3 + 2
    assert losses[3] == pytest.approx(cross_entropy(feats, weight, bias, [2, 0] * 6), rel=1e-5)


def test_one_step_is_a_gradient_of_that_loss_with_decay():
    head = build_head(Linear, dict(first_epochs=1, lr=0.02, weight_decay=0.1))
    feats, first = task([1, 0, 2] * 4)
    head.learn(first)
    head = build_head(Linear, dict(first_epochs=1, epochs=1, lr=0.02, weight_decay=0.1))
    head.learn(first)
    weight, bias = parameters(head)
    head.learn(task([1, 0, 2] * 4, 1)[1])
    columns, step = [1, 0, 2] * 4, 1e-5
    for c in range(3):
        for d in range(D):
            up, down = weight.copy(), weight.copy()
            up[c, d] += step
            down[c, d] -= step
            slope = (
                cross_entropy(feats, up, bias, columns) - cross_entropy(feats, down, bias, columns)
            ) / (2 * step)
            expected = weight[c, d] - 0.02 * (slope + 0.1 * weight[c, d])
            assert parameters(head)[0][c, d] == pytest.approx(expected, abs=2e-6)


def test_fine_tuning_forgets_what_a_nearest_mean_keeps(runner):
    correct = {}
    for build in (Linear, NearestMean):
        run = runner(build)
        for number in range(6):
            run.learn([number], clips=12, seed=number)
        tokens, labels = run.tokens(range(6), seed=99)
        hits = run.predicted(tokens) == labels
        correct[build] = hits[labels < 5].float().mean(), hits[labels == 5].float().mean()
    old, new = correct[Linear]
    assert new == 1
    assert old < 0.5
    assert min(correct[NearestMean]) > 0.95


def test_the_seed_draws_the_order_of_clips_and_nothing_else():
    feats, first = task([0, 1, 2] * 16)
    batch = {"vector": torch.from_numpy(feats)}
    scores = {}
    for size in (8, 48):
        for seed in (0, 1):
            head = build_head(Linear, dict(seed=seed, first_epochs=3, batch_size=size))
            head.learn(first)
            scores[size, seed] = head.scores(batch)
    # All clips in one batch are the same sum in any order.
    torch.testing.assert_close(scores[48, 0], scores[48, 1], atol=1e-4, rtol=1e-4)
    assert (scores[8, 0] - scores[8, 1]).abs().max() > 0.1


def test_a_rate_that_diverges_is_refused_and_changes_nothing():
    head = build_head(Linear, dict(first_epochs=2))
    _, first = task([0, 1] * 6)
    head.learn(first)
    before = head.state_dict()
    wild = build_head(Linear, dict(epochs=200, lr=1e30))
    wild.load_state_dict(before)
    with pytest.raises(ValueError, match="diverged"):
        wild.learn(task([2, 3] * 6, 1)[1])
    assert wild.classes == [0, 1]
    after = wild.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
