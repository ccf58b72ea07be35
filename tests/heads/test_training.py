"""The loop of gradient descent against the same steps by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from varve.heads.parts.clips import Clips
from varve.heads.parts.training import OptimConfig, fit

N, D = 7, 3
PLAIN = OptimConfig(batch_size=N, lr=0.1, weight_decay=0.0)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    feats = torch.from_numpy(rng.normal(size=(N, 1, D)).astype(np.float32))
    return Clips({"x": feats}, torch.from_numpy(rng.integers(0, 2, size=N)))


def trained(clips, start=0.1, seed=3, parameters=None, **options):
    """Return the weight of least squares after training, and the calls of the callback."""
    weight = nn.Parameter(torch.full((D,), start))
    reports = []

    def step(indices, batch):
        return (batch["x"][:, 0] @ weight - clips.labels[indices]).square().mean()

    optim = OptimConfig(**{"epochs": 4, "batch_size": 3, "lr": 0.05, "weight_decay": 0.0} | options)
    groups = [weight] if parameters is None else parameters(weight)
    rng = np.random.default_rng(seed)
    fit(step, groups, clips, optim, epochs=optim.epochs, rng=rng,
        on_epoch_end=lambda *epoch: reports.append(epoch))  # fmt: skip
    return weight, reports


def by_hand(clips, start=0.1, seed=3, epochs=4, size=3, lr=0.05, momentum=0.9, decay=0.0,
            factor=lambda epoch, epochs: 1.0, clip=math.inf):  # fmt: skip
    rng = np.random.default_rng(seed)
    x, y = clips.features["x"][:, 0].double().numpy(), clips.labels.numpy()
    weight, moved, means = np.full(D, start), np.zeros(D), []
    for epoch in range(epochs):
        order, total = rng.permutation(N), 0.0
        for a in range(0, N, size):
            rows = order[a : a + size]
            off = x[rows] @ weight - y[rows]
            total += (off**2).sum()
            slope = 2 * off @ x[rows] / len(rows)
            slope = slope * min(1.0, clip / np.linalg.norm(slope))
            moved = momentum * moved + slope + decay * weight
            weight = weight - lr * factor(epoch, epochs) * moved
        means.append(total / N)
    return weight, means


def halving(epoch, epochs):
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.parametrize(
    ("options", "hand"),
    [
        ({}, {"factor": halving}),
        ({"schedule": "constant"}, {}),
        ({"schedule": "constant", "momentum": 0.0}, {"momentum": 0.0}),
        ({"schedule": "constant", "weight_decay": 0.3}, {"decay": 0.3}),
        ({"schedule": "constant", "clip_norm": 0.2}, {"clip": 0.2}),
        (
            {"schedule": "step", "milestones": [1, 3]},
            {"factor": lambda epoch, epochs: [1.0, 0.1, 0.1, 0.01][epoch]},
        ),
    ],
    ids=["cosine", "constant", "no_momentum", "decay", "clipped", "step"],
)
def test_steps_and_mean_losses_are_those_by_hand(options, hand):
    clips = draw()
    weight, reports = trained(clips, **options)
    expected, means = by_hand(clips, **hand)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert [done for done, _, _ in reports] == [1, 2, 3, 4]
    assert {epochs for _, epochs, _ in reports} == {4}
    np.testing.assert_allclose([loss for _, _, loss in reports], means, rtol=1e-5)


def test_a_group_may_have_a_separate_rate():
    clips = draw()
    options = {"schedule": "constant", "lr": 0.05}
    half, _ = trained(clips, parameters=lambda w: [{"params": [w], "lr": 0.025}], **options)
    expected, _ = by_hand(clips, lr=0.025)
    np.testing.assert_allclose(half.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_group_by_group():
    clips, weights = draw(), [nn.Parameter(torch.zeros(2)) for _ in range(3)]

    def step(indices, batch):
        return 30 * weights[0].sum() + 0.1 * weights[1].sum() + 40 * weights[2].sum()

    groups = [{"params": [weights[0], weights[2]]}, {"params": [weights[1]]}]
    rng = np.random.default_rng(0)
    fit(step, groups, clips, replace(PLAIN, lr=1.0, clip_norm=1.0), epochs=1, rng=rng)
    for weight, slope in zip(weights, (0.6 / 2**0.5, 0.1, 0.8 / 2**0.5), strict=True):
        torch.testing.assert_close(weight.detach(), torch.full((2,), -slope))


def test_equal_seeds_give_equal_bits_and_another_seed_another_order():
    clips = draw()
    first, second, other = (trained(clips, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_every_clip_is_seen_once_an_epoch_and_each_epoch_in_another_order():
    clips, seen = draw(), []
    weight = nn.Parameter(torch.zeros(D))

    def step(indices, batch):
        assert torch.equal(batch["x"], clips.features["x"][indices])
        seen.append(indices.tolist())
        return (batch["x"] @ weight).mean()

    fit(step, [weight], clips, replace(PLAIN, batch_size=4), epochs=2, rng=np.random.default_rng(0))
    assert [len(indices) for indices in seen] == [4, 3, 4, 3]
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second


def test_the_global_generators_are_not_changed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is looked at
    trained(draw())
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_a_loss_that_is_not_finite_is_refused_with_its_epoch():
    with pytest.raises(ValueError, match=r"mean loss of epoch \d+ of 400 is (nan|inf), at lr=50"):
        trained(draw(), lr=50.0, epochs=400)


def test_a_loss_that_is_not_finite_is_refused_though_its_gradients_were():
    clips, weight = draw(), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"epoch 1 of 1 is inf"):
        fit(
            lambda indices, batch: weight.sum() + torch.inf,
            [weight], clips, PLAIN, epochs=1, rng=np.random.default_rng(0),
        )  # fmt: skip


def test_a_parameter_that_is_not_finite_is_refused_though_its_loss_was():
    clips, weight = draw(), nn.Parameter(torch.zeros(1))

    def step(indices, batch):
        return weight.sum().sqrt()  # 0, with an infinite slope

    with pytest.raises(ValueError, match=r"diverged.* epoch 1 of 1 is 0\.0"):
        fit(step, [weight], clips, PLAIN, epochs=1, rng=np.random.default_rng(0))


def test_training_works_where_gradients_are_switched_off_outside():
    with torch.no_grad():
        weight, _ = trained(draw())
    assert torch.equal(weight, trained(draw())[0])


def test_no_epochs_train_nothing():
    weight, reports = trained(draw(), epochs=0)
    assert reports == []
    assert torch.equal(weight, torch.full((D,), 0.1))


@pytest.mark.parametrize("options", [{"schedule": "linear"}, {"epochs": -1}])
def test_unknown_schedules_and_negative_epochs_are_refused(options):
    with pytest.raises(ValueError, match="cosine, step, constant"):
        trained(draw(), **options)
