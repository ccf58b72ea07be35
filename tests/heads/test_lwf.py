"""LwF-MC: its loss against loops, and that it holds what fine-tuning loses."""

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.linear import Linear
from varve.heads.lwf import LwF
from varve.heads.parts.clips import Clips

T, D = 3, 5


def task(labels, number, losses):
    feats = np.random.default_rng([number, 3]).normal(size=(len(labels), T, D)).astype(np.float32)
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.tensor(labels))
    return feats, Task(clips, number, on_epoch_end=lambda done, epochs, loss: losses.append(loss))


def logits(feats, weight, bias):
    x = feats.astype(np.float64).mean(axis=1)
    return 16 * x / np.linalg.norm(x, axis=1, keepdims=True) @ weight.T + bias


def loss_by_loops(new, old, columns, taught, weight):
    total = 0.0
    for b, column in enumerate(columns):
        for c in range(new.shape[1]):
            g = 1 / (1 + np.exp(-new[b, c]))
            target = float(c == column) if c in taught else 1 / (1 + np.exp(-old[b, c]))
            scale = 1 if c in taught else weight
            total -= scale * (target * np.log(g) + (1 - target) * np.log(1 - g))
    return total / len(columns)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_loss_has_targets_from_labels_and_from_the_teacher(weight):
    losses = []
    # Without decay and at one step an epoch, the first loss is that of the start.
    head = build_head(
        LwF, dict(first_epochs=4, epochs=2, weight=weight, lr=0.05, weight_decay=0, momentum=0)
    )
    head.learn(task([4, 2] * 6, 0, losses)[1])
    assert losses[0] == pytest.approx(2 * np.log(2), rel=1e-6)
    old = [head.state_dict()[f"classifier.{name}"].double().numpy() for name in ("weight", "bias")]
    # A twin of one epoch has the parameters after the first step: both steps are at the full rate.
    twin = build_head(LwF, dict(epochs=1, weight=weight, lr=0.05, weight_decay=0, momentum=0))
    twin.load_state_dict(head.state_dict())
    losses.clear()
    feats, second = task([7, 2, 9] * 4, 1, losses)
    head.learn(second)
    twin.learn(task([7, 2, 9] * 4, 1, [])[1])
    columns, taught = [2, 0, 3] * 4, [0, 2, 3]
    start = [np.concatenate([parameter, np.zeros((2, *parameter.shape[1:]))]) for parameter in old]
    moved = [
        twin.state_dict()[f"classifier.{name}"].double().numpy() for name in ("weight", "bias")
    ]
    for loss, (W, b) in zip(losses, (start, moved), strict=True):
        expected = loss_by_loops(logits(feats, W, b), logits(feats, *old), columns, taught, weight)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_moving_representation_is_distilled_from_the_teachers_outputs():
    """With a fixed encoder untaught columns answer as before by themselves, and nothing is seen."""
    expert = {"encoder": "expert", "expert": {"layers": 1, "heads": 1, "ffn": 16}}
    options = expert | {"lr": 0.05, "weight_decay": 0, "momentum": 0}
    epoch_losses = []
    old, one_epoch, two_epochs = (
        build_head(LwF, dict(first_epochs=15, epochs=epochs, **options)) for epochs in (0, 1, 2)
    )
    old.learn(task([4, 2] * 6, 0, [])[1])
    for head, losses in ((one_epoch, []), (two_epochs, epoch_losses)):
        head.load_state_dict(old.state_dict())
        feats, second = task([7, 4] * 6, 1, losses)  # 4 moves the encoder at once: it has weights
        head.learn(second)
    # Both train their first epoch, one step, at the full rate: the second starts where one ends.
    answers = [
        head.scores({"vector": torch.from_numpy(feats)}).double().numpy()
        for head in (one_epoch, old)
    ]
    assert np.abs(answers[0][:, 0] - answers[1][:, 0]).max() > 0.01
    expected = loss_by_loops(*answers, [2, 1] * 6, [1, 2], 1.0)
    assert epoch_losses[1] == pytest.approx(expected, rel=1e-5)


def test_lwf_forgets_less_than_fine_tuning(runner):
    kept = {}
    for build in (Linear, LwF):
        run = runner(build)
        for number in range(4):
            run.learn([2 * number, 2 * number + 1], clips=12, seed=number)
        tokens, labels = run.tokens(range(6), seed=99)
        kept[build] = (run.predicted(tokens) == labels).float().mean()
        tokens, labels = run.tokens([6, 7], seed=99)
        assert (run.predicted(tokens) == labels).float().mean() > 0.9
    assert kept[LwF] > kept[Linear] + 0.2


def test_without_the_teachers_outputs_previous_columns_do_not_move():
    """They have no labels either: with weight 0 nothing trains them."""
    head = build_head(LwF, dict(first_epochs=5, epochs=5, weight=0, weight_decay=0))
    head.learn(task([4, 2] * 6, 0, [])[1])
    before = head.state_dict()["classifier.weight"]
    head.learn(task([7] * 6, 1, [])[1])
    after = head.state_dict()["classifier.weight"]
    assert torch.equal(after[:2], before)
    assert after[2].any()
