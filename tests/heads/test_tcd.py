"""TCD against its equations by loops in float64: distances, diversity, and the importance."""

import numpy as np
import pytest
import torch

from varve.heads import build_head
from varve.heads.parts import classifiers
from varve.heads.parts.losses import nca_as_coded
from varve.heads.tcd import TCD, diversity, map_distance

B, T, S, C = 2, 3, 5, 4
SHORT = {"epochs": 2, "first_epochs": 2, "batch_size": 8, "tune_epochs": 2, "seed": 3}


def unit(x):
    return x / np.linalg.norm(x)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("weighted", [True, False])
def test_maps_are_compared_channel_by_channel_and_frame_by_frame(weighted):
    x, teacher = drawn(B, T, S, C), drawn(B, T, S, C, seed=1)
    weights = drawn(T, C, seed=2) ** 2 if weighted else np.ones((T, C))
    total = 0.0
    for b in range(B):
        for t in range(T):
            for c in range(C):
                difference = unit(x[b, t, :, c] ** 2) - unit(teacher[b, t, :, c] ** 2)
                total += weights[t, c] * np.linalg.norm(difference)
    expected = total / (B * T * C) / np.sqrt(T)
    result = map_distance(torch.from_numpy(x), torch.from_numpy(teacher), torch.tensor(weights))
    assert float(result) == pytest.approx(expected, rel=1e-12)


def test_diversity_is_that_of_the_equation():
    x, total = drawn(B, T, S, C), 0.0
    for b in range(B):
        for c in range(C):
            cosines = [[unit(x[b, s, :, c]) @ unit(x[b, t, :, c]) for t in range(T)]
                       for s in range(T)]  # fmt: skip
            total += np.linalg.norm(np.array(cosines) - np.eye(T))
    expected = total / (T * (T - 1)) / B
    assert float(diversity(torch.from_numpy(x))) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_that_of_the_public_code():
    scores = drawn(4, 3)
    columns = np.array([0, 1, 2, 2])
    total = 0.0
    for s, y in zip(scores, columns, strict=True):
        shifted = s - s.max()
        denominator = shifted.copy()
        denominator[y] = 0.0
        total -= shifted[y] - np.log(np.exp(denominator).sum())
    result = nca_as_coded(torch.from_numpy(scores), torch.from_numpy(columns))
    assert float(result) == pytest.approx(total / 4, rel=1e-12)
    single = torch.zeros(2, 1)
    assert float(nca_as_coded(single, torch.zeros(2, dtype=torch.int64))) == 0


def learned(runner, *tasks, **options):
    run = runner(TCD, **SHORT | options)
    for number, labels in enumerate(tasks):
        run.learn(labels, seed=number)
    return run


def test_importance_is_the_mean_squared_gradient_of_each_channel_at_each_time(runner, monkeypatch):
    # At the usual scale all clips are learned, and their gradients vanish in float32.
    monkeypatch.setattr(classifiers.Cosine.__init__, "__defaults__", (1, 2.0))
    run = learned(runner, [4, 2], blocks=1)
    head, network = run.head, run.network
    clips = [run.seen[row] for row in range(12)]
    gradients = {"blocks.2.attn": [], "blocks.2.mlp": [], "vector": []}
    classifier = head._model.classifier
    stages = dict(head._suffix.stages())
    for tokens, label in clips:
        x = network.run(tokens, head.reads[0]).double()
        kept = {}
        for name in ("blocks.2.attn", "blocks.2.mlp"):
            x = stages[name].double()(x)
            kept[name] = x
        kept["vector"] = x = torch.nn.functional.layer_norm(x[:, 0], (16,))
        theta = torch.nn.functional.normalize(classifier.weight[:, 0].double(), dim=1)
        cosines = theta @ torch.nn.functional.normalize(x.mean(dim=0), dim=0)
        y = head.classes.index(label)
        scaled = classifier.scale.double() * cosines
        loss = torch.stack([scaled.max(), scaled[1 - y]]).logsumexp(dim=0) - scaled[y]
        for name, gradient in zip(kept, torch.autograd.grad(loss, [*kept.values()]), strict=True):
            squares = gradient.detach() ** 2
            gradients[name].append(squares if name == "vector" else squares.sum(dim=1))
    for stage in stages.values():
        stage.float()
    for name, each in gradients.items():
        expected = torch.stack(each).mean(dim=0)
        expected = (expected / expected.mean()).float()
        torch.testing.assert_close(head.importance[name], expected, rtol=1e-3, atol=1e-4)


def test_importance_is_that_of_the_training_and_not_of_the_tuning(runner, monkeypatch):
    monkeypatch.setattr(classifiers.Cosine.__init__, "__defaults__", (1, 2.0))
    plain, tuned = (learned(runner, [4, 2], [7, 1], tune_lr=1.0, tune_epochs=n) for n in (0, 9))
    weights = [run.head.state_dict()["classifier.weight"] for run in (plain, tuned)]
    assert not torch.equal(*weights)
    for name, expected in plain.head.importance.items():
        assert torch.equal(tuned.head.importance[name], expected)


def test_a_state_has_the_importance_of_the_next_task(runner):
    first = learned(runner, [4, 2])
    second = runner(TCD, **SHORT)
    second.head.load_state_dict(first.head.state_dict())
    second.seen, second.number, second.next_row = dict(first.seen), 1, first.next_row
    for run in (first, second):
        run.learn([7, 1], seed=1)
    tokens, _ = first.tokens([4, 2, 7], seed=9)
    assert torch.equal(first.scores(tokens), second.scores(tokens))
    plain = learned(runner, [4, 2], [7, 1], importance=False)
    assert plain.head.importance == {}
    assert not torch.equal(first.scores(tokens), plain.scores(tokens))


def test_old_proxies_do_not_change_in_training_and_in_tuning(runner):
    run = learned(runner, [4, 2], tune_lr=0.05)
    before = run.head.state_dict()["classifier.weight"]
    run.learn([7, 1], seed=1)
    after = run.head.state_dict()["classifier.weight"]
    assert torch.equal(after[:2], before)


@pytest.mark.parametrize("part", ["kd", "maps", "diversity"])
def test_each_term_changes_what_is_learned(runner, part):
    whole = learned(runner, [4, 2], [7, 1])
    without = learned(runner, [4, 2], [7, 1], **{part: 0.0})
    whole = whole if part != "kd" else learned(runner, [4, 2], [7, 1], kd=100.0)
    tokens, _ = whole.tokens([4, 7], seed=9)
    assert not torch.equal(whole.scores(tokens), without.scores(tokens))
    if part != "diversity":
        names = {"kd": "vector", "maps": "blocks.2.mlp"}
        assert names[part] in whole.head.teacher_stages
        assert names[part] not in without.head.teacher_stages


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kd": -1.0}, "0 or more"), ({"classifier": "linear"}, "one of cosines")],
)
def test_options_that_do_not_go_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_head(TCD, options)
