"""LUCIR: its start, its losses against loops, and what holds still."""

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.lucir import LUCIR
from varve.heads.parts.clips import Clips

T, D = 3, 5
SMALL = {"layers": 1, "heads": 1, "ffn": 16}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clips(labels, rows, seed):
    feats = np.random.default_rng([seed, 3]).normal(size=(len(labels), T, D)).astype(np.float32)
    return Clips({"vector": torch.from_numpy(feats)}, torch.tensor(labels), torch.tensor(rows))


def memory_of(head, task_clips):
    index_of_row = {row: n for n, row in enumerate(task_clips.rows.tolist())}
    indices = torch.tensor([index_of_row[row] for row in head.exemplars.tolist()])
    return Clips(
        {"vector": task_clips.features["vector"][indices]},
        task_clips.labels[indices],
        head.exemplars,
    )


def encoded(head, feats):
    """Return f(x), by the encoder of the head."""
    with torch.no_grad():
        return head._model.encoder(feats).double().numpy()


def two_tasks(epochs, **options):
    """A head after two tasks, what it was after the first, the clips and losses of the second."""
    losses = []
    options = {"budget": 2, "batch_size": 99, "weight_decay": 0, "seed": 3, "momentum": 0} | options
    head, old = (
        build_head(LUCIR, dict(first_epochs=15, epochs=epochs, **options)) for _ in range(2)
    )
    first, second = clips([4, 2] * 8, range(16), 0), clips([7, 9, 8] * 4, range(16, 28), 1)
    head.learn(Task(first))
    old.load_state_dict(head.state_dict())
    memory = memory_of(head, first)
    head.learn(Task(second, 1, None, memory, lambda done, epochs, loss: losses.append(loss)))
    feats = torch.cat([second.features["vector"], memory.features["vector"]])
    columns = [2, 4, 3] * 4 + [0, 0, 1, 1]
    return head, old, feats, columns, losses


def loss_by_loops(theta, eta, f, f_old, columns, lambda_base=5.0, margin=0.5):
    cosines = unit(f) @ unit(theta).T
    ce, forget, ranking = [], [], []
    for n, column in enumerate(columns):
        logits = eta * cosines[n]
        ce.append(np.log(np.exp(logits).sum()) - logits[column])
        forget.append(1 - unit(f[n]) @ unit(f_old[n]))
        if column < 2:
            hardest = sorted((cosines[n, k] for k in (2, 3, 4)), reverse=True)[:2]
            ranking.append(sum(max(margin - cosines[n, column] + cosine, 0) for cosine in hardest))
    weight = lambda_base * np.sqrt(2 / 3)
    return np.mean(ce) + weight * np.mean(forget) + np.mean(ranking)


def imprinted(theta_old, f, columns):
    rows = [theta_old]
    for column in (2, 3, 4):
        mean = unit(unit(f)[np.array(columns) == column].mean(axis=0))
        rows.append(np.linalg.norm(theta_old, axis=1).mean() * mean[None])
    return np.concatenate(rows)


def test_the_second_task_starts_from_imprinted_columns_with_all_three_losses():
    _, old, feats, columns, losses = two_tasks(epochs=1)
    state = old.state_dict()
    theta = state["classifier.weight"][:, 0].double().numpy()
    f = encoded(old, feats)
    start = imprinted(theta, f, columns)
    expected = loss_by_loops(start, float(state["classifier.scale"]), f, f, columns)
    assert losses == pytest.approx([expected], rel=1e-5)


def test_less_forget_constrains_a_representation_that_moves():
    options = {"encoder": "expert", "expert": SMALL, "lr": 0.05, "less_forget": 7.0, "margin": 0.3}
    after_one, old, feats, columns, _ = two_tasks(1, **options)
    # Both train their first epoch, one step, at the full rate: the second starts where one ends.
    _, _, _, _, losses = two_tasks(2, **options)
    state = after_one.state_dict()
    f, f_old = encoded(after_one, feats), encoded(old, feats)
    assert np.abs(f - f_old).max() > 1e-3
    theta = state["classifier.weight"][:, 0].double().numpy()
    eta = float(state["classifier.scale"])
    assert losses[1] == pytest.approx(
        loss_by_loops(theta, eta, f, f_old, columns, 7.0, 0.3), rel=1e-5
    )
    forgets = {}
    for weight in (0.0, 100.0):
        head, old, feats, _, _ = two_tasks(20, **options | {"less_forget": weight, "lr": 0.01})
        f, f_old = unit(encoded(head, feats)), unit(encoded(old, feats))
        forgets[weight] = (1 - (f * f_old).sum(axis=1)).mean()
    assert forgets[100.0] < 0.2 * forgets[0.0]


@pytest.mark.parametrize("hold", [True, False])
def test_previous_columns_are_equal_to_the_bit_where_they_are_frozen(hold):
    head, old, _, _, _ = two_tasks(10, hold=hold, weight_decay=0.1, momentum=0.9)
    now, before = (model.state_dict()["classifier.weight"] for model in (head, old))
    assert torch.equal(now[:2], before) == hold


def test_scores_are_cosines(runner):
    run = runner(LUCIR)
    run.learn([0, 1, 2])
    tokens, _ = run.tokens([0, 1, 2], seed=1)
    x = run.batch(tokens)["vector"].double().mean(dim=1).numpy()
    theta = run.head.state_dict()["classifier.weight"][:, 0].double().numpy()
    np.testing.assert_allclose(run.scores(tokens), unit(x) @ unit(theta).T, atol=1e-6)


def test_previous_and_new_classes_are_distinguished(runner):
    run = runner(LUCIR)
    for number in range(4):
        run.learn([2 * number, 2 * number + 1], clips=12, seed=number)
    tokens, labels = run.tokens(range(8), seed=99)
    assert (run.predicted(tokens) == labels).float().mean() > 0.95
