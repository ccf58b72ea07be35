"""FrameMaker: condensed frames against loops, their learning, and their replay."""

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

from varve.contracts._head_runner import Mlp
from varve.heads import build_head
from varve.heads.framemaker import FrameMaker, condense
from varve.heads.parts.classifiers import LENGTH
from varve.heads.parts.clips import part_of

SHORT = {"epochs": 2, "first_epochs": 2, "batch_size": 8, "tune_epochs": 2, "seed": 3, "budget": 3}
STEP = 1e-6


def learned(runner, *tasks, **options):
    run = runner(FrameMaker, **SHORT | options)
    for number, labels in enumerate(tasks):
        run.learn(labels, seed=number)
    return run


def exemplars_of(run):
    """Return the whole clips of the exemplars, as the head reads them."""
    rows = run.head.exemplars
    return run.clips(torch.stack([run.seen[row][0] for row in rows.tolist()]),
                     torch.tensor([run.seen[row][1] for row in rows.tolist()]), rows)  # fmt: skip


def test_a_condensed_clip_is_the_weighted_sum_and_the_prompt():
    rng = np.random.default_rng(0)
    x, weights, prompts = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3)), rng.normal(
        size=(2, 4, 5))  # fmt: skip
    result = condense(*map(torch.from_numpy, (x, weights, prompts)))
    for b in range(2):
        frame = prompts[b].copy()
        for t in range(3):
            frame += weights[b, t] * x[b, t]
        np.testing.assert_allclose(result[b], frame, rtol=1e-12)


def test_without_steps_it_is_the_mean_frame(runner):
    run = learned(runner, [4, 2], condense_epochs=0)
    kept = run.head._exemplars
    clips = exemplars_of(run)
    name = run.head.reads[0]
    replayed = kept.replayed(clips)[torch.arange(6)][name]
    mean = clips[torch.arange(6)][name].mean(dim=1, keepdim=True)
    torch.testing.assert_close(replayed, mean.expand_as(replayed))


def clip_loss(run, frame, target, column, weight):
    """Return CE and the distance of vectors of a frame that is repeated, in float64."""
    stages, classifier = run.head._suffix.stages(), run.head._model.classifier
    x = frame
    with torch.no_grad():
        for _, stage in stages:
            x = stage.double()(x)
            stage.float()
        vector = layer_norm(x[0], (16,))
        scores = LENGTH * classifier.weight.double() @ (vector / vector.norm())
        scores = scores + classifier.bias.double()
        distance = ((vector - target) ** 2).sum()
        return float(scores.logsumexp(dim=0) - scores[column] + weight * distance)


def test_a_step_follows_the_gradient_of_the_two_losses(runner):
    """Adam's first step is its rate against the sign of each derivative."""
    options = {"classifier": "linear", "condense": 0.3, "condense_lr": 0.01, "lr": 0.02}
    run = learned(runner, [4, 2], condense_epochs=1, **options)
    head, kept = run.head, run.head._exemplars
    cells = exemplars_of(run)[torch.arange(6)][head.reads[0]].double()
    for m in (0, 4):
        clip = cells[m]  # [T, L, D]
        x = clip
        with torch.no_grad():
            for _, stage in head._suffix.stages():
                x = stage.double()(x)
                stage.float()
        target = layer_norm(x[:, 0], (16,)).mean(dim=0)
        column = head.classes.index(int(kept.labels[m]))
        start = clip.mean(dim=0)

        def slope(change, start=start, target=target, column=column):
            ends = [clip_loss(run, start + sign * STEP * change, target, column, 0.3)
                    for sign in (1, -1)]  # fmt: skip
            return (ends[0] - ends[1]) / (2 * STEP)

        expected = start.clone()
        for frame in clip:
            assert abs(slope(frame)) > 1e-4
            expected -= 0.01 * np.sign(slope(frame)) * frame
        derivatives = torch.zeros_like(start)
        for index in np.ndindex(*start.shape):
            unit = torch.zeros_like(start)
            unit[index] = 1.0
            derivatives[index] = slope(unit)
        expected -= 0.01 * derivatives.sign()
        sure = derivatives.abs() > 1e-5
        assert sure.double().mean() > 0.3
        np.testing.assert_allclose(kept.condensed[m][sure], expected[sure], rtol=1e-3, atol=1e-4)


def test_a_temporal_module_sees_all_frames(runner, monkeypatch):
    """With a module that has `frames`, the frame is shown T times: here, to the same effect."""
    plain = learned(runner, [4, 2], condense_epochs=3).head
    monkeypatch.setattr(Mlp, "frames", 4, raising=False)
    whole = learned(runner, [4, 2], condense_epochs=3).head
    expected = plain._exemplars.condensed
    torch.testing.assert_close(whole._exemplars.condensed, expected, rtol=1e-3, atol=1e-4)


def test_condensing_brings_the_vectors_nearer(runner):
    gaps = []
    for epochs in (0, 40):
        run = learned(runner, [4, 2], condense_epochs=epochs, condense=10.0)
        clips, head = exemplars_of(run), run.head
        whole, condensed = (
            head._model.vectors(head.frame_vectors(each[torch.arange(6)]))
            for each in (clips, head._exemplars.replayed(clips))
        )
        # The last norm gives the vector of T equal frames a length that a mean does not reach.
        gaps.append(float(1 - torch.cosine_similarity(whole, condensed).mean()))
    assert gaps[1] < 0.5 * gaps[0]


def test_condensed_frames_are_replayed_in_the_place_of_exemplars(runner):
    run = learned(runner, [4, 2])
    kept, name = run.head._exemplars, run.head.reads[0]
    task = run.task([7], seed=1)
    clips = kept.rehearsal(task)
    assert torch.equal(clips.rows[6:], task.memory.rows)
    cells = clips[torch.arange(len(clips))][name]
    new = task.clips[torch.arange(6)][name]
    assert torch.equal(cells[:6], new)
    order = {row: m for m, row in enumerate(kept.rows.tolist())}
    numbers = [order[row] for row in task.memory.rows.tolist()]
    expected = kept.condensed[numbers][:, None].expand_as(cells[6:])
    assert torch.equal(cells[6:], expected)
    backwards = part_of(clips, torch.arange(len(clips)).flip(0))
    assert torch.equal(backwards[torch.arange(len(clips))][name], cells.flip(0))


def test_frames_of_earlier_tasks_stay_and_the_means_are_of_condensed_clips(runner):
    run = learned(runner, [4, 2])
    before = run.head._exemplars
    run.learn([7, 1], seed=1)
    kept = run.head._exemplars
    assert torch.equal(kept.rows[:6], before.rows)
    assert torch.equal(kept.condensed[:6], before.condensed)
    assert len(kept.condensed) == len(kept.rows) == 12

    head = run.head
    condensed = kept.replayed(exemplars_of(run))[torch.arange(12)]
    vectors = head._model.vectors(head.frame_vectors(condensed)).detach().double().numpy()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    tokens, _ = run.tokens([4], seed=9)
    query = head._model.vectors(head.frame_vectors(run.batch(tokens))).detach().double().numpy()
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    means = np.stack([units[kept.labels == c].mean(axis=0) for c in head.classes])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(head.nearest(run.batch(tokens)), query @ means.T, atol=1e-5)


def test_a_class_with_fewer_exemplars_keeps_the_frames_of_the_first(runner):
    run = learned(runner, [4, 2], budget=8, shared=True)
    before = run.head._exemplars
    run.learn([7, 1], seed=1)
    kept = run.head._exemplars
    assert len(kept.rows) == 8
    for m, row in enumerate(kept.rows[:4].tolist()):
        old = before.rows.tolist().index(row)
        assert torch.equal(kept.condensed[m], before.condensed[old])


def test_condensing_changes_what_is_learned_later(runner):
    whole, plain = (
        learned(runner, [4, 2], [7, 1]),
        learned(runner, [4, 2], [7, 1], condense_epochs=0),
    )
    tokens, _ = whole.tokens([4, 2, 7], seed=9)
    assert not torch.equal(whole.scores(tokens), plain.scores(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd": -1.0}, "0 or more"),
        ({"condense_lr": 0.0}, "a rate above 0"),
        ({"exemplar_frames": 2}, "leave it at 1"),
    ],
)
def test_options_that_do_not_go_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_head(FrameMaker, options)
