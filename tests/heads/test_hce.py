"""HCE's loss by its parts, its state from task to task, and what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.hce import HCE
from varve.heads.parts.clips import Clips

STILL = {"lr": 0.0, "has_lr": 0.0, "momentum": 0.0, "batch_size": 999, "classifier": "linear",
         "tune_epochs": 0, "blocks": 1}  # fmt: skip


def second(runner, **options):
    """A runner after one task, and a second whose old features are noise: its loss, its clips."""
    run = runner(HCE, seed=3, **STILL | options)
    run.learn([4, 2])
    task = run.task([7, 9, 9], seed=1)
    rng = np.random.default_rng(0)
    parts = []
    for clips in (task.clips, task.memory):
        features = {name: cells.cells for name, cells in clips.features.items()}
        for name, cells in features.items():
            if name.startswith("teacher "):
                noise = torch.from_numpy(rng.normal(size=cells.shape)).float()
                features[name] = cells + 0.3 * noise
        parts.append(Clips(features, clips.labels, clips.rows))
    losses = []
    on_epoch_end = lambda done, epochs, loss: losses.append(loss)  # noqa: E731
    run.head.learn(Task(parts[0], 1, None, parts[1], on_epoch_end))
    return run.head, parts, losses


def unit(x):
    return x / np.linalg.norm(x)


def passed(head, parts):
    """Return features, vectors, logits, maps by block (new and teacher) and H of all clips."""
    cells = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    with torch.no_grad():
        vectors, outputs = head._suffix({head.reads[0]: cells[head.reads[0]]})
        logits = head._model(vectors)
    maps = [name for name in head._suffix.trained if f"teacher {name}" in cells]
    maps = maps[-1:] if head.importance == "single" else maps
    pairs = {}
    for name in maps:
        new_maps = outputs[head._suffix.trained.index(name)]
        # The four patches of a frame are a map of 2 x 2, behind the class token.
        pairs[name] = [
            x.flatten(0, 1)[:, 1:].mT.reshape(-1, 16, 2, 2)
            for x in (new_maps, cells[f"teacher {name}"])
        ]
    h = {}
    if head._has is not None:
        with torch.no_grad():
            h = head._has({n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})
    return cells, vectors, logits, pairs, h


def by_hand(head, parts):
    """CE without offsets, L_kd and L_hc, of all clips, by loops."""
    labels = torch.cat([part.labels for part in parts]).tolist()
    cells, vectors, logits, pairs, h = passed(head, parts)
    logits = logits.double().numpy()
    ce = [
        np.log(np.exp(row).sum()) - row[head.classes.index(label)]
        for row, label in zip(logits, labels, strict=True)
    ]
    new = vectors["vector"].double().numpy().reshape(-1, 16)
    kd = hc = 0.0
    if "teacher vector" in cells:
        old = cells["teacher vector"].double().numpy().reshape(-1, 16)
        kd = np.mean([((unit(a) - unit(b)) ** 2).sum() for a, b in zip(new, old, strict=True)])
    for name, (a, b) in pairs.items():
        total = 0.0
        for n in range(len(a)):
            x, y = unit(a[n].double().numpy()), unit(b[n].double().numpy())
            for c in range(16):
                weight = 1.0 if head._has is None else float(h[name][n, c])
                total += weight * ((x[c] - y[c]) ** 2).sum()
        hc += total / (len(a) * 16)
    return np.mean(ce), kd, hc, logits, labels


def log_ratio(head, parts):
    """CRM's R of old classes less that of new ones: the task's clips come before the exemplars."""
    *_, h = passed(head, parts)
    clips = torch.cat([x.unflatten(0, (-1, 4)).flatten(1) for x in h.values()], 1).double().numpy()
    sides = clips[: len(parts[0])], clips[len(parts[0]) :]
    new, old = (sum(((x - side.mean(axis=0)) ** 2).sum() for x in side) for side in sides)
    return math.log(old / new)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"parts": ""}, (1, 0, 0)),
        ({"parts": "kd"}, (1, 1, 0)),
        ({"parts": "kd", "kd": 2.5}, (1, 2.5, 0)),
        ({"parts": "hc", "weight": 10.0}, (1, 0, 10)),
        ({"parts": "kd+hc", "weight": 10.0, "blocks": 2}, (1, 1, 10)),
        ({"parts": "hc", "importance": "multi", "weight": 10.0, "blocks": 2}, (1, 0, 10)),
        ({"parts": "hc", "importance": "single", "weight": 10.0, "blocks": 2}, (1, 0, 10)),
        ({"weight": 10.0}, (1, 1, 10)),
    ],
)
def test_the_loss_is_the_sum_of_its_parts(runner, options, terms):
    head, parts, epoch_losses = second(runner, **{"epochs": 1} | options)
    ce, kd, hc, _, _ = by_hand(head, parts)
    # In eval mode HAS's batch norms are not what they were in training.
    if head._has is not None:
        head._has.train()
        ce, kd, hc, _, _ = by_hand(head, parts)
    expected = terms[0] * ce + terms[1] * kd + terms[2] * hc
    np.testing.assert_allclose(epoch_losses[0], expected, rtol=1e-4)
    assert (terms[2] > 0) == (hc > 0)


@pytest.mark.parametrize(("levels", "layers"), [(1, "4"), (3, "234"), (4, "1234")])
def test_levels_are_map_sizes_from_the_coarsest(levels, layers):
    sizes = {"1": 56, "2": 28, "3": 14, "4": 7}
    shapes = {f"layer{n}.{i}": (8, size, size) for n, size in sizes.items() for i in (0, 1)}
    shapes = {"stem": (8, 56, 56)} | shapes | {"vector": (8,)}
    network = SimpleNamespace(
        stages=list(shapes), find=lambda name: "stem" if name == "blocks.-9" else name,
        shape=shapes.__getitem__, time_steps=lambda name: 2,
    )  # fmt: skip
    head = build_head(HCE, {"blocks": 8, "levels": levels})
    head.attach(network)
    assert head.distilled_stages == [f"layer{n}.{i}" for n in layers for i in (0, 1)]


def test_the_logits_are_offset_from_the_second_epoch_on_by_crm(runner):
    head, parts, epoch_losses = second(runner, weight=0.0, parts="hc+crm", epochs=3)
    head._has.train()
    _, _, _, logits, labels = by_hand(head, parts)
    offset = log_ratio(head, parts)
    assert abs(offset) > 0.1

    def loss(offset):
        moved = logits + np.array([offset] * 2 + [0.0] * 2)
        losses = [np.log(np.exp(row).sum()) - row[head.classes.index(label)]
                  for row, label in zip(moved, labels, strict=True)]  # fmt: skip
        return np.mean(losses)

    np.testing.assert_allclose(epoch_losses, [loss(0.0), loss(offset), loss(offset)], rtol=1e-4)
    assert abs(epoch_losses[1] - epoch_losses[0]) > 1e-3


def test_class_counts_may_be_the_offsets(runner):
    head, parts, epoch_losses = second(runner, weight=0.0, parts="hc+number", epochs=1)
    _, _, _, logits, labels = by_hand(head, parts)
    moved = logits + np.array([math.log(labels.count(label)) for label in head.classes])
    losses = [np.log(np.exp(row).sum()) - row[head.classes.index(label)]
              for row, label in zip(moved, labels, strict=True)]  # fmt: skip
    np.testing.assert_allclose(epoch_losses[0], np.mean(losses), rtol=1e-5)


def test_has_is_trained_from_task_to_task_and_is_absent_in_the_first(runner):
    run = runner(HCE, epochs=2, first_epochs=2, has_lr=0.01)
    run.learn([4, 2])
    assert run.head._has is None
    run.learn([7], seed=1)
    before = {name: x.clone() for name, x in run.head._has.state_dict().items()}
    run.learn([9], seed=2)
    after = run.head._has.state_dict()
    moved = [name for name, x in before.items() if not torch.equal(x, after[name])]
    assert any("weight" in name for name in moved)
    again = runner(HCE, epochs=2, first_epochs=2, has_lr=0.01)
    again.head.load_state_dict(run.head.state_dict())
    assert all(torch.equal(x, again.head._has.state_dict()[name]) for name, x in after.items())


def test_the_offset_may_be_of_the_batch_itself(runner):
    head, parts, epoch_losses = second(runner, weight=0.0, parts="hc+crm", epochs=1, crm="batch")
    head._has.train()
    _, _, _, logits, labels = by_hand(head, parts)
    moved = logits + np.array([log_ratio(head, parts)] * 2 + [0.0] * 2)
    losses = [np.log(np.exp(row).sum()) - row[head.classes.index(label)]
              for row, label in zip(moved, labels, strict=True)]  # fmt: skip
    np.testing.assert_allclose(epoch_losses, [np.mean(losses)], rtol=1e-4)


def test_with_the_offset_of_the_batch_cross_entropy_trains_has(runner):
    """L_hc has no weight here, so that nothing else could."""
    options = {"weight": 0.0, "parts": "hc+crm", "epochs": 1, "has_lr": 0.1}
    still, moved = (
        second(runner, crm=crm, **options)[0]._has.state_dict() for crm in ("epoch", "batch")
    )
    assert not torch.equal(still["linear.0.weight"], moved["linear.0.weight"])


def test_the_number_of_effective_channels_of_has_is_reported(runner):
    head, parts, _ = second(runner, epochs=1)
    head._has.train()
    *_, h = passed(head, parts)
    expected = {}
    for name, x in h.items():
        p = x.double().numpy() / x.double().numpy().sum(axis=1, keepdims=True)
        expected[f"effective channels, {name}"] = np.exp(-(p * np.log(p)).sum(axis=1)).mean() / 16
    assert head.diagnostics == pytest.approx(expected, rel=1e-4)


def test_clips_without_teacher_maps_are_refused(runner):
    run = runner(HCE, blocks=1, epochs=1, first_epochs=1)
    run.learn([4, 2])
    task = run.task([7], seed=1)
    bare = {n: c for n, c in task.clips.features.items() if not n.startswith("teacher ")}
    bare = Clips(bare, task.clips.labels, task.clips.rows)
    memory = {n: c for n, c in task.memory.features.items() if not n.startswith("teacher ")}
    memory = Clips(memory, task.memory.labels, task.memory.rows)
    with pytest.raises(ValueError, match=r"clips without .teacher blocks.2.*teacher vector."):
        run.head.learn(Task(bare, 1, None, memory))


@pytest.mark.parametrize(
    "options",
    [{"parts": "kd+nothing"}, {"importance": "all"}, {"parts": "kd+crm"},
     {"parts": "kd+hc+crm+number"}, {"parts": "hc+crm", "importance": "multi"}],
)  # fmt: skip
def test_parts_that_exclude_each_other_are_refused(options):
    with pytest.raises(ValueError, match="parts="):
        build_head(HCE, options)


@pytest.mark.parametrize(
    "options",
    [{"mix": "stack"}, {"h": "free"}, {"last_stride": 3}, {"frames": 0}, {"crm": "clip"},
     {"levels": 0}, {"has_lr": -1.0}, {"tune_epochs": -1}, {"batch_size": 0}, {"schedule": "none"},
     {"classifier_rate": 0.0}],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_learned(options):
    with pytest.raises(ValueError, match=next(iter(options)).removeprefix("tune_")):
        build_head(HCE, options)
