"""Tests of iCaRL: nearest mean of herded exemplars, and its loss where something trains."""

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.icarl import ICaRL
from varve.heads.parts.clips import Clips

T, D = 3, 5
SMALL = {"layers": 1, "heads": 1, "ffn": 16}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clips(labels, rows, seed):
    feats = np.random.default_rng([seed, 3]).normal(size=(len(labels), T, D)).astype(np.float32)
    return Clips({"vector": torch.from_numpy(feats)}, torch.tensor(labels), torch.tensor(rows))


def memory_of(head, *past):
    """The clips of the head's exemplars, from those of the past."""
    feats = {}
    for task_clips in past:
        cells = zip(
            task_clips.rows.tolist(),
            task_clips.features["vector"],
            task_clips.labels.tolist(),
            strict=True,
        )
        feats |= {row: (cell, label) for row, cell, label in cells}
    cells, labels = zip(*(feats[row] for row in head.exemplars.tolist()), strict=True)
    return Clips({"vector": torch.stack(cells)}, torch.tensor(labels), head.exemplars)


def herd_by_loops(phi, count):
    mean, order = phi.mean(axis=0), []
    for k in range(1, count + 1):
        left = [index for index in range(len(phi)) if index not in order]
        total = sum((phi[j] for j in order), np.zeros(phi.shape[1]))
        order.append(min(left, key=lambda p: np.linalg.norm(mean - (phi[p] + total) / k)))
    return order


def vectors(feats, encoder="mean"):
    x = feats.double().numpy()
    return unit(x.mean(axis=1) if encoder == "mean" else x.reshape(len(x), -1))


@pytest.mark.parametrize("encoder", ["mean", "order"])
def test_a_clip_goes_to_the_nearest_mean_of_herded_exemplars(encoder):
    first, second = clips([4, 2] * 8, range(16), 0), clips([7, 3] * 8, range(16, 32), 1)
    head = build_head(ICaRL, dict(encoder=encoder, budget=3))
    head.learn(Task(first))
    head.learn(Task(second, 1, memory=memory_of(head, first)))
    assert head.classes == [2, 4, 3, 7]
    assert head.trainable == 0
    queries = clips([0] * 5, range(5), 9).features["vector"]
    expected = np.zeros((5, 4))
    for column, (label, task_clips) in enumerate(
        zip([2, 4, 3, 7], [first] * 2 + [second] * 2, strict=True)
    ):
        of_class = task_clips.labels == label
        phi = vectors(task_clips.features["vector"][of_class], encoder)
        taken = herd_by_loops(phi, 3)
        assert (
            task_clips.rows[of_class][taken].tolist()
            == head.exemplars[3 * column : 3 * column + 3].tolist()
        )
        expected[:, column] = vectors(queries, encoder) @ unit(phi[taken].mean(axis=0))
    scores = head.scores({"vector": queries})
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert torch.equal(head.nearest({"vector": queries}), scores)


def test_the_loss_is_of_new_clips_and_exemplars_with_the_teachers_outputs():
    losses = []
    options = {"predict": "classifier", "budget": 2, "weight_decay": 0, "batch_size": 99}
    head = build_head(ICaRL, dict(first_epochs=20, epochs=1, **options))
    first, second = clips([4, 2] * 8, range(16), 0), clips([7] * 6, range(16, 22), 1)
    head.learn(Task(first))
    state = head.state_dict()
    W, b = (state[f"classifier.{name}"].double().numpy() for name in ("weight", "bias"))
    memory = memory_of(head, first)
    head.learn(Task(second, 1, None, memory, lambda done, epochs, loss: losses.append(loss)))
    feats = torch.cat([part.features["vector"] for part in (second, memory)])
    columns = [2] * 6 + [0, 0, 1, 1]
    old = 16 * vectors(feats) @ W.T + b
    g_old = 1 / (1 + np.exp(-old))
    total = 0.0
    for n, column in enumerate(columns):
        total -= np.log(0.5)  # the new column starts at 0, for either label
        for c in range(2):
            q = g = g_old[n, c]
            total -= q * np.log(g) + (1 - q) * np.log(1 - g)
        assert column in (0, 1, 2)
    assert losses == pytest.approx([total / 10], rel=1e-5)


def test_with_an_expert_the_means_move_with_the_representation(runner):
    run = runner(ICaRL, encoder="expert", expert=SMALL)
    run.learn([0, 1])
    before = run.head.state_dict()
    run.learn([2, 3], seed=1)
    after = run.head.state_dict()
    assert run.head.trainable > 0
    assert torch.equal(after["exemplars.rows"][:10], before["exemplars.rows"])
    assert not torch.allclose(after["exemplars.means"][:2], before["exemplars.means"])
    tokens, labels = run.tokens([0, 1, 2, 3], seed=5)
    assert (run.predicted(tokens) == labels).float().mean() > 0.9


def test_a_shared_budget_is_split_and_one_too_small_is_refused_before_training(runner):
    run = runner(ICaRL, budget=7, shared=True, predict="classifier")
    run.learn([0, 1])
    assert len(run.head.exemplars) == 6
    run.learn([2], seed=1)
    assert len(run.head.exemplars) == 6
    task, epochs = run.task([3, 4, 5, 6, 7], seed=2), []
    task = Task(task.clips, 2, None, task.memory, lambda *epoch: epochs.append(epoch))
    with pytest.raises(ValueError, match="shared by 8 classes"):
        run.head.learn(task)
    assert run.head.classes == [0, 1, 2]
    assert not epochs


def test_the_papers_hybrid_scores_by_its_classifier(runner):
    run = runner(ICaRL, predict="classifier")
    run.learn([0, 1])
    run.learn([2, 3], seed=1)
    tokens, labels = run.tokens([0, 1, 2, 3], seed=5)
    state = run.head.state_dict()
    W, b = (state[f"classifier.{name}"].double().numpy() for name in ("weight", "bias"))
    x = vectors(run.batch(tokens)["vector"])
    np.testing.assert_allclose(run.scores(tokens), 16 * x @ W.T + b, atol=1e-4)
    nearest = torch.tensor(run.head.classes)[run.head.nearest(run.batch(tokens)).argmax(dim=1)]
    assert (nearest == labels).float().mean() > 0.95
    with pytest.raises(ValueError, match="nme, classifier"):
        build_head(ICaRL, dict(predict="best"))
