"""PODNet on the tiny network: what trains, its losses against loops, its tuning."""

import copy

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.podnet import PODNet


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def started(runner, **options):
    """A runner after one task, and the same once more, not to be trained on."""
    runs = []
    for _ in range(2):
        run = runner(PODNet, batch_size=99, momentum=0, seed=3, **options)
        run.learn([4, 2])
        runs.append(run)
    return runs


def second(run, epochs=None):
    """Learn the next task; return the features and columns of all its clips."""
    task = run.task([7, 9], seed=1)
    on_epoch_end = (
        (lambda *epoch: epochs.append(epoch)) if epochs is not None else task.on_epoch_end
    )
    parts = [part.whole(run.head.reads[0]) for part in (task.clips, task.memory)]
    labels = torch.cat([task.clips.labels, task.memory.labels]).tolist()
    run.head.learn(Task(task.clips, 1, None, task.memory, on_epoch_end))
    return torch.cat(parts), [run.head.classes.index(label) for label in labels]


def outputs(head, feats):
    """Vectors of the clips [N, W], and the trained stages' tokens, by the head's own modules."""
    with torch.no_grad():
        vectors, tokens = head._suffix({head.reads[0]: feats})
        return (
            head._model.vectors(vectors).double().numpy(),
            [stage_tokens.double().numpy() for stage_tokens in tokens],
        )


def similarities(theta, f):
    out = np.zeros((len(f), len(theta)))
    for n in range(len(f)):
        for c in range(len(theta)):
            cosines = np.array([unit(f[n]) @ unit(proxy) for proxy in theta[c]])
            out[n, c] = (np.exp(cosines) / np.exp(cosines).sum()) @ cosines
    return out


def nca_by_loops(y, eta, columns, margin=0.6):
    losses = []
    for n, column in enumerate(columns):
        others = sum(np.exp(eta * y[n, c]) for c in range(y.shape[1]) if c != column)
        losses.append(max(np.log(others) - eta * (y[n, column] - margin), 0))
    return np.mean(losses)


def pool_by_loops(tokens):
    """Return the sums of squares over rows, over columns, and the rest, of [1 + 2 * 2, C]."""
    squares, grid = tokens**2, (tokens[1:] ** 2).reshape(2, 2, -1)
    parts = [grid[u].sum(axis=0) for u in range(2)] + [grid[:, v].sum(axis=0) for v in range(2)]
    return unit(np.concatenate([*parts, squares[0]]))


def distances(new, old):
    """POD-spatial without its weight."""
    per_stage = []
    for h, g in zip(new, old, strict=True):
        gaps = [
            np.linalg.norm(pool_by_loops(h[n, t]) - pool_by_loops(g[n, t]))
            for n in range(len(h))
            for t in range(h.shape[1])
        ]
        per_stage.append(np.mean(gaps))
    return np.mean(per_stage)


@pytest.mark.parametrize("flat", [1.0, 0.0])
def test_the_loss_is_nca_and_both_distillations(runner, flat):
    options = {"proxies": 3, "tune_epochs": 0, "lr": 0.4, "weight_decay": 0, "flat": flat}
    one_epoch, old = started(runner, epochs=1, **options)
    two_epochs, _ = started(runner, epochs=2, **options)
    feats, columns = second(one_epoch)
    epochs = []
    second(two_epochs, epochs)
    # Both train their first epoch, one step, at the full rate: the second starts where one ends.
    f, tokens = outputs(one_epoch.head, feats)
    f_old, tokens_old = outputs(old.head, feats)
    state = one_epoch.head.state_dict()
    y = similarities(state["classifier.weight"].double().numpy(), f)
    spatial = distances(tokens, tokens_old)
    assert spatial > 1e-3
    gaps = np.mean([1 - unit(a) @ unit(b) for a, b in zip(f, f_old, strict=True)])
    expected = nca_by_loops(y, float(state["classifier.scale"]), columns)
    expected += np.sqrt(4 / 2) * (flat * gaps + 3 * spatial)
    assert epochs[1][2] == pytest.approx(expected, rel=1e-4)


def test_previous_proxies_stay_until_the_tuning_which_moves_proxies_alone(runner):
    untuned, old = started(runner, epochs=5, tune_epochs=0)
    tuned, _ = started(runner, epochs=5, tune_epochs=5)
    epochs = []
    second(untuned)
    second(tuned, epochs)
    before, after, moved = (run.head.state_dict() for run in (old, untuned, tuned))
    assert torch.equal(after["classifier.weight"][:2], before["classifier.weight"])
    assert not torch.equal(moved["classifier.weight"][:2], before["classifier.weight"])
    same = [name for name in after if torch.equal(after[name], moved[name])]
    assert set(after) - set(same) == {"classifier.weight"}
    assert [(done, total) for done, total, _ in epochs] == [(n, 10) for n in range(1, 11)]


def test_the_tuning_sees_as_many_clips_of_each_class(runner):
    run, _ = started(runner, epochs=1, tune_epochs=1, budget=2)
    epochs = []
    second(run, epochs)
    rows = run.head.exemplars.tolist()
    labels = [run.seen[row][1] for row in rows]
    assert labels == [2, 2, 4, 4, 7, 7, 9, 9]
    untuned, _ = started(runner, epochs=1, tune_epochs=0, budget=2)
    second(untuned)
    state = untuned.head.state_dict()
    tokens = torch.stack([run.seen[row][0] for row in rows])
    f, _ = outputs(untuned.head, run.batch(tokens)[run.head.reads[0]])
    y = similarities(state["classifier.weight"].double().numpy(), f)
    expected = nca_by_loops(y, float(state["classifier.scale"]), [0, 0, 1, 1, 2, 2, 3, 3])
    assert epochs[1][2] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_last_blocks_train_and_nothing_else_of_the_network(runner, blocks):
    run = runner(PODNet, blocks=blocks)
    assert run.head.reads == (f"blocks.-{blocks + 1}",)
    network = copy.deepcopy(run.network.modules)
    run.learn([0, 1])
    for name, module in run.network.modules.items():
        for parameter, before in zip(module.parameters(), network[name].parameters(), strict=True):
            assert torch.equal(parameter, before)
            assert not parameter.requires_grad
    first = 3 - blocks
    trained = {name for name in run.head.state_dict() if name.startswith("network.")}
    assert len(trained) == 2 * blocks
    frozen = [
        p
        for stage in run.network.stages[2 * first : 6]
        for p in run.network.modules[stage].parameters()
    ]
    for name, start in zip(sorted(trained), frozen, strict=True):
        assert not torch.equal(run.head.state_dict()[name], start)
    expected = sum(p.numel() for p in frozen) + 2 * 10 * 16 + 1
    assert run.head.trainable == expected


def test_the_next_task_starts_from_the_blocks_that_the_last_one_trained(runner):
    run, old = started(runner, epochs=0, tune_epochs=0)
    second(run)
    before, after = old.head.state_dict(), run.head.state_dict()
    names = [name for name in before if name.startswith("network.")]
    assert all(torch.equal(after[name], before[name]) for name in names)
    start = run.network.modules["blocks.2.attn"].mix
    assert not torch.equal(before[names[0]], start)


def test_heavier_distillation_keeps_the_teachers_outputs(runner):
    drifts = {}
    for spatial in (0.0, 30.0):
        run, old = started(runner, spatial=spatial, flat=0.0, lr=0.1, tune_epochs=0)
        feats, _ = second(run)
        drifts[spatial] = distances(outputs(run.head, feats)[1], outputs(old.head, feats)[1])
    assert drifts[30.0] < 0.5 * drifts[0.0]


def test_previous_and_new_classes_are_distinguished_by_both_classifiers(runner):
    run = runner(PODNet)
    for number in range(3):
        run.learn([2 * number, 2 * number + 1], clips=12, seed=number)
    tokens, labels = run.tokens(range(6), seed=99)
    assert (run.predicted(tokens) == labels).float().mean() > 0.95
    nearest = torch.tensor(run.head.classes)[run.head.nearest(run.batch(tokens)).argmax(dim=1)]
    assert (nearest == labels).float().mean() > 0.95


def test_without_a_network_or_with_another_ones_features_it_refuses(runner):
    run = runner(PODNet)
    task = run.task([0, 1])
    with pytest.raises(ValueError, match="no network was attached"):
        build_head(PODNet).learn(task)
    with pytest.raises(ValueError, match="train a block at least"):
        build_head(PODNet, dict(blocks=0))
    run.head.learn(task)
    with pytest.raises(ValueError, match="use the store of the network attached"):
        run.head.scores({run.head.reads[0]: torch.zeros(1, 4, 6, 16)})
