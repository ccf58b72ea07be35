"""STSP: subspaces against loops in float64, and what projected gradients leave unchanged."""

import numpy as np
import pytest
import torch
from torch import nn

from varve.contracts._head_runner import BLOCKS, D, TinyNetwork
from varve.heads import build_head
from varve.heads.parts import models
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.stsp import ETA, STSP, Subspaces, null_space

T, R, WIDTH, CLASSES = 3, 2, 5, 4
SHORT = {"epochs": 3, "first_epochs": 3, "batch_size": 8, "seed": 3}


def subspaces():
    classifier = Subspaces(T * WIDTH, T, R)
    classifier.grow(CLASSES, np.random.default_rng(0))
    return classifier


def test_a_score_is_the_energy_of_unit_frames_in_a_subspace():
    classifier = subspaces()
    bases_CRD = classifier.weight.detach().double().numpy()
    x_BTD = np.random.default_rng(1).normal(size=(2, T, WIDTH))
    expected_BC = np.zeros((2, CLASSES))
    for b, c, t in np.ndindex(2, CLASSES, T):
        frame_D = x_BTD[b, t] / np.linalg.norm(x_BTD[b, t])
        expected_BC[b, c] += np.linalg.norm(bases_CRD[c] @ frame_D) ** 2 / T
    x_BW = torch.from_numpy(x_BTD.reshape(2, -1)).float()
    np.testing.assert_allclose(classifier(x_BW).detach(), expected_BC, rtol=1e-5)
    np.testing.assert_allclose(classifier.logits(x_BW).detach(), ETA * expected_BC, rtol=1e-5)


def test_orthogonality_is_that_of_the_equations():
    classifier = subspaces()
    bases_CRD = classifier.weight.detach().double().numpy()
    intra = np.mean([np.linalg.norm(b @ b.T - np.eye(R)) ** 2 / R for b in bases_CRD])
    inter = np.mean([np.linalg.norm(bases_CRD[c] @ bases_CRD[d].T) ** 2 / R
                     for c, d in np.ndindex(CLASSES, CLASSES) if c != d])  # fmt: skip
    assert float(classifier.orthogonality().detach()) == pytest.approx(intra + inter, rel=1e-5)


def test_a_basis_starts_from_the_frames_of_its_clips():
    classifier = subspaces()
    directions_RD = np.linalg.qr(np.random.default_rng(2).normal(size=(WIDTH, R)))[0].T
    mixes = np.random.default_rng(3).normal(size=(6, T, R))
    x_BW = torch.from_numpy((mixes @ directions_RD).reshape(6, -1)).float()
    classifier.imprint(1, x_BW)
    basis_RD = classifier.weight[1].detach()
    torch.testing.assert_close(basis_RD @ basis_RD.T, torch.eye(R), rtol=0, atol=1e-5)
    torch.testing.assert_close(classifier(x_BW)[:, 1], torch.ones(6), rtol=0, atol=1e-5)


def test_the_null_space_holds_at_most_the_rest_of_the_energy():
    values = np.array([8.0, 1.0, 0.6, 0.3, 0.08, 0.02])  # of 10 in all
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    moment = torch.from_numpy(vectors * values @ vectors.T)
    for energy, kept in [(0.95, 3), (0.985, 2), (0.995, 1), (0.6, 5)]:
        expected = vectors[:, 6 - kept :] @ vectors[:, 6 - kept :].T
        torch.testing.assert_close(null_space(moment, energy), torch.from_numpy(expected))


def test_a_change_in_the_null_space_leaves_the_outputs_of_a_convolution():
    generator = torch.Generator().manual_seed(0)
    spread_cd = torch.randn(6, 3, generator=generator, dtype=torch.float64)  # rank 3 of 6 channels
    x = torch.einsum("cd,bdhw->bchw", spread_cd,
                     torch.randn(4, 3, 7, 7, generator=generator, dtype=torch.float64))  # fmt: skip
    x_nc = x.movedim(1, -1).reshape(-1, 6)
    null_cc = null_space(x_nc.T @ x_nc / len(x_nc), 0.99999999)
    weight = torch.randn(5, 6, 3, 3, generator=generator, dtype=torch.float64)
    change = torch.randn(5, 6, 3, 3, generator=generator, dtype=torch.float64)
    change = torch.einsum("ochw,cd->odhw", change, null_cc)
    assert change.norm() > 1
    before, after = (nn.functional.conv2d(x, w, padding=1) for w in (weight, weight + change))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)


class LinearMlp(nn.Module):
    token_wise = True

    def __init__(self, generator):
        super().__init__()
        self.linear = nn.Linear(D, D)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(D, D, generator=generator) / D**0.5)
            self.linear.bias.zero_()

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class LinearNetwork(TinyNetwork):
    """The tiny network with linear layers in its MLPs."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for i in range(BLOCKS):
            self.modules[f"blocks.{i}.mlp"] = LinearMlp(generator).requires_grad_(False)


def learned(runner, *tasks, **options):
    run = runner(STSP, **SHORT | options)
    run.network = LinearNetwork()
    run.head.attach(run.network)
    for number, labels in enumerate(tasks):
        run.learn(labels, seed=number)
    return run


def linears(run):
    """Return copies of the weights of linear layers that train, by the name of their stage."""
    stages = run.head._suffix.stages()
    return {
        name: stage.linear.weight.detach().double().clone()
        for name, stage in stages
        if name.endswith(".mlp")
    }


def moments_of(run, tokens):
    """Return E[x x'] of the inputs of each linear layer over all positions, in float64."""
    moments = {}
    x = run.network.run(tokens.flatten(0, 1), run.head.reads[0]).double()
    for name, stage in run.head._suffix.stages():
        if name.endswith(".mlp"):
            flat = x.reshape(-1, D).numpy()
            moments[name] = sum(np.outer(row, row) for row in flat) / len(flat)
        with torch.no_grad():
            x = stage.double()(x)
        stage.float()
    return moments


@pytest.mark.parametrize("batch", [32, 5])
def test_second_moments_are_those_of_the_inputs_of_the_task(runner, monkeypatch, batch):
    monkeypatch.setattr(models, "BATCH", batch)  # 12 clips, and 5 + 5 + 2
    run = learned(runner, [4, 2])
    expected = moments_of(run, torch.stack([run.seen[row][0] for row in range(12)]))
    moments = dict(zip(expected, run.head.moments.values(), strict=True))
    for name, moment_cc in moments.items():
        np.testing.assert_allclose(moment_cc, expected[name], rtol=1e-4, atol=1e-5)
    first = {name: moment_cc.clone() for name, moment_cc in run.head.moments.items()}
    run.learn([7], seed=1)
    expected = moments_of(run, torch.stack([run.seen[row][0] for row in range(12, 18)]))
    for (name, moment_cc), added in zip(run.head.moments.items(), expected.values(), strict=True):
        np.testing.assert_allclose(moment_cc - first[name], added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_weights_move_in_the_null_space_of_earlier_tasks_alone(runner, energy):
    run = learned(runner, [4, 2], energy=energy, lr=0.02)
    before = linears(run)
    moments = dict(zip(before, run.head.moments.values(), strict=True))
    run.learn([7, 1], seed=1)
    for name, weight in linears(run).items():
        values, vectors = np.linalg.eigh(moments[name].numpy())
        null = vectors[:, np.cumsum(values) <= (1 - energy) * values.sum()]
        assert 0 < null.shape[1] < D
        change = (weight - before[name]).numpy()
        inside = change @ null @ null.T
        assert np.linalg.norm(inside) > 1e-4
        np.testing.assert_allclose(change, inside, atol=1e-6)


def test_parameters_without_a_null_space_are_frozen_after_the_first_task(runner):
    run = learned(runner, [4, 2], lr=0.02)
    before = {name: x.clone() for name, x in run.head._suffix.own().items()}
    run.learn([7, 1], seed=1)
    after = run.head._suffix.own()
    names = {name for name in after if not name.endswith("linear.weight")}
    assert any(name.endswith("bias") for name in names)
    assert any(name.endswith("mix") for name in names)
    for name in after:
        assert torch.equal(after[name], before[name]) == (name in names), name


def test_without_a_projection_all_parameters_train(runner):
    run = learned(runner, [4, 2], lr=0.02, energy=0.0)
    assert run.head.moments == {}
    before = {name: x.clone() for name, x in run.head._suffix.own().items()}
    run.learn([7, 1], seed=1)
    assert not any(torch.equal(x, before[name]) for name, x in run.head._suffix.own().items())


def test_old_bases_stay_and_new_ones_become_orthogonal_to_them(runner):
    run = learned(runner, [4, 2], orthogonal=0.0)
    loose = learned(runner, [4, 2], orthogonal=0.0)
    first = run.head.state_dict()["classifier.weight"]
    for each, weight in ((run, 10.0), (loose, 0.0)):
        each.head.orthogonal = weight
        each.learn([7, 1], seed=1)
    bases = [each.head.state_dict()["classifier.weight"] for each in (run, loose)]
    assert all(torch.equal(basis[:2], first) for basis in bases)
    overlaps = [(b[2:].flatten(0, 1) @ b[:2].flatten(0, 1).T).norm() for b in bases]
    assert overlaps[0] < 0.9 * overlaps[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"orthogonal": -1.0}, "orthogonal=-1"),
        ({"energy": 1.0}, "a share below 1"),
        ({"classifier": "linear"}, "a classifier of its own"),
        ({"optimizer": "adam"}, "out of the null space"),
        ({"weight_decay": 5e-4}, "out of the null space"),
    ],
)
def test_options_that_do_not_go_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_head(STSP, options)
    with pytest.raises(ValueError, match="frames in order"):
        STSP(encoder=EncoderConfig("mean"))
