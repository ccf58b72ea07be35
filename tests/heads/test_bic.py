"""BiC against loops in float64: its loss, the clips that it holds out, and the correction."""

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.bic import BiC
from varve.heads.parts import models
from varve.heads.parts.classifiers import BiasCorrected
from varve.heads.parts.clips import Clips, part_of

T, D = 3, 5
PLAIN = {"lr": 0.05, "weight_decay": 0, "momentum": 0, "budget": 4}


def task(labels, number=0, rows=0, memory=None, losses=None):
    feats = np.random.default_rng([number, 3]).normal(size=(len(labels), T, D)).astype(np.float32)
    clips = Clips({"vector": torch.from_numpy(feats)}, torch.tensor(labels),
                  torch.arange(rows, rows + len(labels)))  # fmt: skip
    report = lambda done, epochs, loss: None if losses is None else losses.append(loss)  # noqa: E731
    return Task(clips, number, memory=memory, on_epoch_end=report)


def memory_of(head, clips):
    index = {row: i for i, row in enumerate(clips.rows.tolist())}
    return part_of(clips, torch.tensor([index[row] for row in head.exemplars.tolist()]))


def logits(feats, state, gain=1.0, shift=0.0):
    x = feats.astype(np.float64).mean(axis=1)
    x = 16 * x / np.linalg.norm(x, axis=1, keepdims=True)
    W, b = (state[f"classifier.{name}"].double().numpy() for name in ("weight", "bias"))
    return (x @ W.T + b) * gain + shift


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_the_first_loss_of_a_task_is_that_of_the_equations():
    losses = []
    first = task([4, 2] * 6)
    head = build_head(BiC, PLAIN | dict(first_epochs=4, epochs=1, batch_size=99, held_out=0.2))
    head.learn(first)
    before = head.state_dict()
    second = task([7, 3, 9] * 4, 1, rows=12, memory=memory_of(head, first.clips), losses=losses)
    drawn = second.rng(0)
    head.learn(second)
    clips = [*zip(second.clips.features["vector"].numpy(), [7, 3, 9] * 4, strict=True),
             *zip(second.memory[torch.arange(8)]["vector"].numpy(), second.memory.labels.tolist(),
                  strict=True)]  # fmt: skip
    classes = [2, 4, 3, 7, 9]
    validation = []
    for label in classes:  # one of the four clips of the smallest classes
        indices = [i for i, (_, each) in enumerate(clips) if each == label]
        validation.append(int(drawn.permutation(indices)[0]))
    total = 0.0
    trained = [clip for i, clip in enumerate(clips) if i not in validation]
    grown = {n: torch.cat([x, x.new_zeros(3, *x.shape[1:])]) for n, x in before.items()
             if n in ("classifier.weight", "classifier.bias")}  # fmt: skip
    for feats, label in trained:
        o, teacher = logits(feats[None], grown)[0], logits(feats[None], before)[0]
        teacher_p = np.exp(log_softmax(teacher / 2))
        distilled = (teacher_p * (log_softmax(teacher / 2) - log_softmax(o[:2] / 2))).sum()
        total += 2 / 5 * distilled - 3 / 5 * log_softmax(o)[classes.index(label)]
    assert losses[0] == pytest.approx(total / len(trained), rel=1e-5)
    assert len(trained) == 12 + 8 - 5


def test_gain_and_shift_minimise_the_loss_of_the_held_out_clips():
    first = task([4, 2] * 10)
    options = PLAIN | dict(epochs=30, held_out=0.5, correct_epochs=3000, correct_lr=0.1)
    head = build_head(BiC, options)
    head.learn(first)
    assert head.state_dict()["classifier.gain"].tolist() == [1, 1]
    second = task([7, 3] * 30, 1, rows=20, memory=memory_of(head, first.clips))
    drawn = {}
    real = BiC._divided

    def divided(self, training):
        drawn["clips"], (drawn["trained"], drawn["held"]) = training.clips, real(self, training)
        return drawn["trained"], drawn["held"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BiC, "_divided", divided)
        head.learn(second)
    clips = part_of(drawn["clips"], drawn["held"])
    assert np.bincount(clips.labels)[[2, 3, 4, 7]].tolist() == [2, 2, 2, 2]
    assert not set(drawn["held"].tolist()) & set(drawn["trained"].tolist())
    state = head.state_dict()
    gain, shift = (state[f"classifier.{name}"] for name in ("gain", "shift"))
    assert gain[:2].tolist() == [1, 1]
    assert shift[:2].tolist() == [0, 0]
    assert gain[2] == gain[3] != 1
    assert shift[2] == shift[3] != 0
    feats, classes = clips.whole(models.ENCODED)[:, None].numpy(), head.classes
    y = np.array([classes.index(label) for label in clips.labels.tolist()])

    def loss(alpha, beta):
        o = logits(feats, state, np.array([1, 1, alpha, alpha]), np.array([0, 0, beta, beta]))
        return -log_softmax(o)[np.arange(len(y)), y].mean()

    reached = loss(float(gain[2]), float(shift[2]))
    assert reached < loss(1.0, 0.0)
    near = [loss(float(gain[2]) + a, float(shift[2]) + b) for a in (-0.1, 0, 0.1)
            for b in (-0.1, 0, 0.1)]  # fmt: skip
    assert min(near) > reached - 2e-3
    scores = head.scores({"vector": torch.from_numpy(feats)})
    np.testing.assert_allclose(
        scores, logits(feats, state, gain.double().numpy(), shift.double().numpy()), atol=1e-4
    )


def test_a_class_with_one_clip_is_in_both_sets_and_a_returning_one_is_corrected_anew():
    first = task([4, 2] * 3)
    head = build_head(BiC, PLAIN | dict(epochs=2, budget=1, correct_epochs=3))
    head.learn(first)
    second = task([4, 7, 7], 1, rows=6, memory=memory_of(head, first.clips))
    head.learn(second)
    gain = head.state_dict()["classifier.gain"]
    assert gain[0] == 1
    assert gain[1] == gain[2] != 1
    again = build_head(BiC, PLAIN | dict(epochs=2, budget=1, correct_epochs=3))
    again.load_state_dict(head.state_dict())
    batch = second.clips[torch.arange(3)]
    assert torch.equal(again.scores(batch), head.scores(batch))
    assert isinstance(models.learned(again._model).classifier, BiasCorrected)


@pytest.mark.parametrize(
    "options", [{"held_out": 0.0}, {"held_out": 1.0}, {"correct_epochs": -1}, {"correct_lr": 0.0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        build_head(BiC, options)
