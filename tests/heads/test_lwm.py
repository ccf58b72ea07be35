"""LwM: attention maps against finite differences in float64, and its losses against loops."""

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

from varve.heads import build_head
from varve.heads.lwm import AttentionDistillation, LwM
from varve.heads.parts.classifiers import LENGTH, Linear

SHORT = {"epochs": 2, "first_epochs": 2, "batch_size": 8, "seed": 3}
STEP = 1e-5


def learned(runner, *tasks, **options):
    run = runner(LwM, **SHORT | options)
    for number, labels in enumerate(tasks):
        run.learn(labels, seed=number)
    return run


def logits_of(run, x_TLD):
    """Return the logits of a clip from the input of the last attention on, in float64."""
    stages, classifier = dict(run.head._suffix.stages()), run.head._model.classifier
    for name in ("blocks.2.attn", "blocks.2.mlp"):
        x_TLD = stages[name].double()(x_TLD)
        stages[name].float()
    vector_D = layer_norm(x_TLD[:, 0], (16,)).mean(dim=0)
    unit_D = vector_D / vector_D.norm()
    return LENGTH * classifier.weight.double() @ unit_D + classifier.bias.double()


def test_the_attention_map_is_grad_cam(runner):
    run = learned(runner, [4, 2], lr=0.05)
    head, network = run.head, run.network
    tokens, _ = run.tokens([4, 2], clips=1, seed=9)
    columns_B = torch.tensor([0, 1])
    maps_BTL = head.attention(head._suffix, head._model, run.batch(tokens), columns_B).detach()
    for b, clip_TLD in enumerate(tokens):
        x = network.run(clip_TLD, head.reads[0])
        for name, stage in head._suffix.stages():
            if name == "blocks.2.attn":
                break
            x = stage(x)
        x = x.detach().double()
        gradient = torch.zeros_like(x)
        for index in np.ndindex(*x.shape):
            moved = torch.zeros_like(x)
            moved[index] = STEP
            change = logits_of(run, x + moved)[b] - logits_of(run, x - moved)[b]
            gradient[index] = change.detach() / (2 * STEP)
        expected_TL = np.zeros(x.shape[:2])
        for t in range(len(x)):
            alpha_D = gradient[t].numpy().mean(axis=0)
            for s in range(x.shape[1]):
                expected_TL[t, s] = max(0.0, float(alpha_D @ x[t, s].numpy()))
        assert expected_TL.max() > 0
        np.testing.assert_allclose(maps_BTL[b], expected_TL, rtol=1e-3, atol=1e-5)


def test_the_gradient_runs_through_the_weights_of_the_channels(runner):
    run = learned(runner, [4, 2], lr=0.05)
    tokens, _ = run.tokens([4, 2], clips=1, seed=9)
    suffix = run.head._suffix.requires_grad_(True)
    maps = run.head.attention(suffix, run.head._model, run.batch(tokens), torch.tensor([0, 1]))
    # The last MLP comes after the map: it can be reached through alpha alone.
    after = dict(suffix.stages())["blocks.2.mlp"].weight
    (gradient,) = torch.autograd.grad(maps.sum(), after)
    assert gradient.abs().max() > 0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def entropy(logits_BK, targets_BK):
    total = 0.0
    for b, k in np.ndindex(*logits_BK.shape):
        g = sigmoid(logits_BK[b, k])
        total -= targets_BK[b, k] * np.log(g) + (1 - targets_BK[b, k]) * np.log(1 - g)
    return total / len(logits_BK)


def test_columns_of_the_task_learn_from_labels_alone():
    head, classifier = build_head(LwM, {}), Linear(5)
    classifier.grow(3)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(rng.normal(size=(3, 5))))
    x_BW = torch.from_numpy(rng.normal(size=(4, 5))).float()
    columns_B = torch.tensor([1, 2, 2, 1])
    offsets_C = torch.tensor([-torch.inf, 0, 0])
    logits_BC = classifier.logits(x_BW).detach().double().numpy()
    expected = entropy(logits_BC[:, 1:], np.eye(3)[columns_B.numpy()][:, 1:])
    result = head.classification_loss(classifier, x_BW, columns_B, offsets_C)
    assert float(result.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0)])
def test_the_distillation_is_that_of_the_equations(runner, monkeypatch, beta, gamma):
    run = learned(runner, [4, 2], lr=0.05, beta=beta, gamma=gamma)
    head, seen = run.head, {}
    build = LwM.task_loss
    with monkeypatch.context() as patch:
        patch.setattr(LwM, "task_loss", lambda self, t: seen.update(training=t) or build(self, t))
        run.learn([7, 2], seed=1)  # 2 is learned again, so that only 4 is distilled
    first, training = learned(runner, [4, 2], lr=0.05).head, seen["training"]
    assert head.classes == [2, 4, 7]
    tokens, _ = run.tokens([7, 2], clips=2, seed=9)
    batch = run.batch(tokens)

    first.beta, first.gamma = beta, gamma
    terms = AttentionDistillation(first, training)
    with torch.no_grad():
        vectors = training.suffix(batch)[0]
        encoded = training.model.vectors(vectors)
        logits_BC = training.classifier.logits(encoded).double().numpy()
        teacher_BK = first._model.classifier.logits(
            first._model.vectors(first._suffix(batch)[0])
        ).double().numpy()  # fmt: skip
    expected = beta * entropy(logits_BC[:, 1:2], sigmoid(teacher_BK[:, 1:]))
    if gamma:
        top_B = torch.from_numpy(teacher_BK.argmax(axis=1))
        pair = [head.attention(*model, batch, top_B).detach().double().numpy() for model in
                ((training.suffix, training.model), (first._suffix, first._model))]  # fmt: skip
        total = 0.0
        for b, t in np.ndindex(*pair[0].shape[:2]):
            new, old = (q[b, t] / max(np.linalg.norm(q[b, t]), 1e-12) for q in pair)
            total += np.abs(new - old).sum()
        assert total > 0
        expected += gamma * total / np.prod(pair[0].shape[:2])
    result = terms.loss(torch.arange(4), batch, vectors | {"encoded": encoded}, [])
    assert float(result.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("part", ["beta", "gamma"])
def test_each_term_changes_what_is_learned(runner, part):
    whole = learned(runner, [4, 2], [7, 1], lr=0.03)
    without = learned(runner, [4, 2], [7, 1], lr=0.03, **{part: 0.0})
    tokens, _ = whole.tokens([4, 7], seed=9)
    assert not torch.equal(whole.scores(tokens), without.scores(tokens))


@pytest.mark.parametrize("part", ["beta", "gamma"])
def test_negative_weights_are_refused(part):
    with pytest.raises(ValueError, match=f"{part}=-1"):
        build_head(LwM, {part: -1.0})
