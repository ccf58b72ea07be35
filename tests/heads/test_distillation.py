"""Losses of the baselines against loops in float64."""

import numpy as np
import pytest
import torch

from varve.heads.parts.losses import (
    less_forget,
    margin_ranking,
    nca,
    pooled,
    relations,
    sigmoid_distillation,
    softened,
)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, len(shape)]).normal(size=shape)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def unit(x):
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_sigmoid_distillation(weight):
    logits, old, columns = 3 * draw(5, 4), 3 * draw(5, 2, seed=1), [3, 2, 1, 3, 1]
    taught = [False, True, True, True]
    expected = 0.0
    for b in range(5):
        for c in range(4):
            g = 1 / (1 + np.exp(-logits[b, c]))
            q = float(c == columns[b]) if taught[c] else 1 / (1 + np.exp(-old[b, c]))
            term = -(q * np.log(g) + (1 - q) * np.log(1 - g))
            expected += term * (1.0 if taught[c] else weight) / 5
    loss = sigmoid_distillation(*tensors(logits, columns, old, taught), weight)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_sigmoid_distillation_of_a_first_task_is_the_cross_entropy_of_each_column():
    logits, columns = draw(5, 3), [0, 2, 1, 1, 0]
    loss = sigmoid_distillation(*tensors(logits, columns, draw(5, 0), [True] * 3))
    onehot = np.eye(3)[columns]
    g = 1 / (1 + np.exp(-logits))
    expected = -(onehot * np.log(g) + (1 - onehot) * np.log(1 - g)).sum(axis=1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_softened():
    new, old, temperature = 3 * draw(5, 4), 3 * draw(5, 4, seed=1), 2.0
    expected = 0.0
    for b in range(5):
        p, q = (np.exp(x[b] / temperature) / np.exp(x[b] / temperature).sum() for x in (old, new))
        expected += temperature**2 * (p * np.log(p / q)).sum() / 5
    assert float(softened(*tensors(new, old), temperature)) == pytest.approx(expected, rel=1e-12)
    assert float(softened(*tensors(old, old), temperature)) == pytest.approx(0, abs=1e-12)


def test_relations():
    new, old = draw(6, 4), draw(6, 4, seed=1)
    expected = 0.0
    for i in range(6):
        for j in range(6):
            new_cosine, old_cosine = (unit(x[i]) @ unit(x[j]) for x in (new, old))
            expected += (new_cosine - old_cosine) ** 2 / 36
    assert float(relations(*tensors(new, old))) == pytest.approx(expected, rel=1e-12)
    # Turned as a whole, vectors keep their cosines.
    turned = old @ np.linalg.qr(draw(4, 4, seed=2))[0]
    assert float(relations(*tensors(turned, old))) == pytest.approx(0, abs=1e-12)
    # Each clip for itself where a leading axis says so.
    parts = [float(relations(*tensors(new[a : a + 3], old[a : a + 3]))) for a in (0, 3)]
    loss = float(relations(*tensors(new.reshape(2, 3, 4), old.reshape(2, 3, 4))))
    assert loss == pytest.approx(np.mean(parts), rel=1e-12)


def test_less_forget():
    x, old = draw(6, 4), draw(6, 4, seed=1)
    expected = np.mean([1 - unit(a) @ unit(b) for a, b in zip(x, old, strict=True)])
    assert float(less_forget(*tensors(x, old))) == pytest.approx(expected, rel=1e-12)
    assert float(less_forget(*tensors(x, 5 * x))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("fresh", "top"), [([2, 4, 5], 2), ([2, 4, 5], 3), ([5], 2)])
def test_margin_ranking(fresh, top):
    cosines, columns = np.tanh(draw(8, 6)), [0, 5, 1, 2, 3, 3, 4, 0]
    losses = []
    for b, column in enumerate(columns):
        if column in fresh:
            continue
        hardest = sorted((cosines[b, k] for k in fresh), reverse=True)[:top]
        losses.append(sum(max(0.5 - cosines[b, column] + cosine, 0) for cosine in hardest))
    assert any(losses)
    mask = np.isin(np.arange(6), fresh)
    loss = margin_ranking(*tensors(cosines, columns, mask), top, 0.5)
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_margin_ranking_of_a_batch_without_exemplars_is_zero_and_has_a_gradient():
    cosines = torch.zeros(2, 3, requires_grad=True)
    loss = margin_ranking(cosines, torch.tensor([1, 2]), torch.tensor([False, True, True]))
    loss.backward()
    assert loss.item() == 0
    assert cosines.grad.tolist() == [[0.0] * 3] * 2


def test_nca():
    y, columns, eta, margin = np.tanh(draw(7, 4)), [0, 3, 1, 2, 0, 1, 3], 6.0, 0.6
    losses = []
    for b, column in enumerate(columns):
        others = sum(np.exp(eta * y[b, i]) for i in range(4) if i != column)
        losses.append(max(-np.log(np.exp(eta * (y[b, column] - margin)) / others), 0))
    assert np.count_nonzero(losses) > 0
    loss = nca(*tensors(y, columns, eta), margin)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-12)


def test_nca_stops_where_a_class_is_far_enough_above_the_others():
    y = torch.tensor([[0.99, -0.9, -0.9]], requires_grad=True)
    loss = nca(y, torch.tensor([0]), torch.tensor(10.0))
    loss.backward()
    assert loss.item() == 0
    assert not y.grad.any()


def test_nca_of_a_single_class_is_zero_with_a_finite_gradient():
    y = torch.tensor([[0.3], [0.1]], requires_grad=True)
    loss = nca(y, torch.tensor([0, 0]), torch.tensor(10.0))
    loss.backward()
    assert loss.item() == 0
    assert y.grad.tolist() == [[0.0], [0.0]]


def pool_by_loops(h):
    """Return p of the map of a frame, [C, H, V]."""
    C, H, V = h.shape
    rows = [sum(h[c, u, v] ** 2 for v in range(V)) for c in range(C) for u in range(H)]
    columns = [sum(h[c, u, v] ** 2 for u in range(H)) for c in range(C) for v in range(V)]
    return np.array(rows + columns)


def test_pooled_outputs_of_maps():
    new = [draw(2, 3, 4, 5, 3), draw(2, 3, 6, 2, 2)]
    old = [draw(*maps.shape, seed=1) for maps in new]
    expected = 0.0
    for h, g in zip(new, old, strict=True):
        for b in range(2):
            for t in range(3):
                gap = unit(pool_by_loops(h[b, t])) - unit(pool_by_loops(g[b, t]))
                expected += np.linalg.norm(gap) / (2 * 3 * 2)
    assert float(pooled(tensors(*new), tensors(*old))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pooled_outputs_of_tokens_are_those_of_their_grid_and_class_tokens(prefix):
    new, old = draw(2, 2, prefix + 16, 3), draw(2, 2, prefix + 16, 3, seed=1)
    expected = 0.0
    for b in range(2):
        for t in range(2):
            parts = []
            for tokens in (new, old):
                grid = tokens[b, t, prefix:].reshape(4, 4, 3).transpose(2, 0, 1)
                first = (tokens[b, t, :prefix] ** 2).ravel()
                parts.append(unit(np.concatenate([pool_by_loops(grid), first])))
            expected += np.linalg.norm(parts[0] - parts[1]) / 4
    assert float(pooled(tensors(new), tensors(old))) == pytest.approx(expected, rel=1e-12)
