"""Classifiers that grow, against loops: linear, cosine, proxies, imprinting, frozen columns."""

import numpy as np
import pytest
import torch

from varve.heads.parts.classifiers import LENGTH, Cosine, Linear, columns


def draw(*shape, seed=0):
    return np.random.default_rng([seed, len(shape)]).normal(size=shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_linear_is_the_product_with_a_vector_of_fixed_length():
    head = Linear(5).double()
    head.grow(3)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(draw(3, 5)))
        head.bias.copy_(torch.from_numpy(draw(3)))
    x = 40 * draw(4, 5, seed=1)
    expected = LENGTH * unit(x) @ draw(3, 5).T + draw(3)
    np.testing.assert_allclose(head(torch.from_numpy(x)).detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("proxies", [1, 4])
def test_cosine_is_the_similarity_weighted_by_the_softmax_over_proxies(proxies):
    head = Cosine(5, proxies).double()
    head.grow(3, np.random.default_rng(0))
    theta, x = head.weight.detach().numpy(), 7 * draw(6, 5)
    expected = np.zeros((6, 3))
    for b in range(6):
        for c in range(3):
            cosines = [unit(x[b]) @ unit(theta[c, p]) for p in range(proxies)]
            total = sum(np.exp(cosine) for cosine in cosines)
            expected[b, c] = sum(np.exp(cosine) / total * cosine for cosine in cosines)
    similarities = head(torch.from_numpy(x)).detach()
    np.testing.assert_allclose(similarities, expected, rtol=1e-12)
    np.testing.assert_allclose(head(torch.from_numpy(3 * x)).detach(), similarities, rtol=1e-12)


def test_columns_are_appended_and_previous_columns_stay():
    rng = np.random.default_rng(0)
    linear, cosine = Linear(4), Cosine(4, 2)
    linear.grow(2)
    cosine.grow(2, rng)
    with torch.no_grad():
        linear.weight.fill_(3)
    before = cosine.weight.detach().clone()
    linear.grow(5)
    cosine.grow(5, rng)
    assert linear.weight.tolist() == [[3.0] * 4] * 2 + [[0.0] * 4] * 3
    assert linear.bias.shape == (5,)
    assert cosine.weight.shape == (5, 2, 4)
    assert torch.equal(cosine.weight[:2], before)
    assert cosine.weight.abs().max() <= 0.5
    assert all(p.requires_grad for p in (*linear.parameters(), *cosine.parameters()))


def test_imprinting_starts_from_the_unit_mean_at_the_length_of_other_columns():
    head = Cosine(5).double()
    head.grow(3, np.random.default_rng(0))
    theta, x = head.weight.detach().numpy()[:, 0].copy(), 9 * draw(7, 5)
    mean = unit(sum(unit(vector) for vector in x) / 7)
    expected = np.linalg.norm(theta[:2], axis=1).mean() * mean
    head.imprint(2, torch.from_numpy(x), torch.arange(2), np.random.default_rng(1))
    np.testing.assert_allclose(head.weight.detach()[2, 0], expected, rtol=1e-12)
    np.testing.assert_array_equal(head.weight.detach()[:2, 0], theta[:2])


def test_proxies_are_imprinted_about_the_mean_with_the_clips_deviation():
    head = Cosine(3, 4000).double()
    head.grow(1, np.random.default_rng(0))
    x = draw(9, 3)
    head.imprint(0, torch.from_numpy(x), torch.arange(0), np.random.default_rng(1))
    proxies = head.weight.detach().numpy()[0]
    np.testing.assert_allclose(proxies.mean(axis=0), unit(unit(x).mean(axis=0)), atol=0.05)
    np.testing.assert_allclose(proxies.std(axis=0), unit(x).std(axis=0), rtol=0.05)


def test_proxies_of_a_single_clip_are_drawn_apart():
    head = Cosine(64, 3)
    head.grow(1, np.random.default_rng(0))
    x = torch.from_numpy(draw(1, 64)).float()
    head.imprint(0, x, torch.arange(0), np.random.default_rng(1))
    first, second, _ = head.weight.detach()[0]
    gap = (first - second).norm()
    assert 0.05 < gap < 0.3
    assert torch.cosine_similarity(first, x[0], dim=0) > 0.98


def test_frozen_columns_get_no_gradient():
    head = Cosine(4)
    head.grow(3, np.random.default_rng(0))
    head.frozen = torch.tensor([True, False, True])
    head(torch.from_numpy(draw(5, 4)).float()).sum().backward()
    moved = head.weight.grad.abs().sum(dim=(1, 2)) > 0
    assert moved.tolist() == [False, True, False]


def test_labels_become_columns_in_the_order_of_classes():
    assert columns([7, 3, 5], torch.tensor([5, 7, 3, 3])).tolist() == [2, 0, 1, 1]
