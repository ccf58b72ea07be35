"""Herding and the nearest mean against loops, and what of the memory stays when budgets change."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads.parts.clips import Clips
from varve.heads.parts.exemplars import ExemplarConfig, Exemplars, herd


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def herd_by_loops(vectors, count):
    """Return the order of herding (iCaRL, Alg. 4)."""
    phi = unit(np.asarray(vectors, dtype=np.float64))
    mean = sum(phi) / len(phi)
    order = []
    for k in range(1, min(count, len(phi)) + 1):
        best, least = None, np.inf
        for index in range(len(phi)):
            if index in order:
                continue
            so_far = phi[index] + sum(phi[j] for j in order)
            gap = np.sqrt(((mean - so_far / k) ** 2).sum())
            if gap < least:
                best, least = index, gap
        order.append(best)
    return order


def clips(labels, rows=None, seed=0, width=6):
    rng = np.random.default_rng(seed)
    feats = torch.from_numpy(rng.normal(size=(len(labels), width)) * rng.uniform(0.1, 9))
    return feats, Clips({"vector": feats[:, None]}, torch.tensor(labels), rows)


@pytest.mark.parametrize("seed", range(5))
def test_herding_takes_what_the_loop_takes(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(30, 4)) * 10.0 ** rng.uniform(-2, 2, size=(30, 1))
    assert herd(torch.from_numpy(vectors), 12).tolist() == herd_by_loops(vectors, 12)


def test_herding_takes_each_clip_once_the_first_of_equals_and_no_more_than_there_are():
    same = torch.ones(4, 3)
    assert herd(same, 9).tolist() == [0, 1, 2, 3]
    assert herd(same, 2).tolist() == [0, 1]


def test_herding_stays_nearer_to_the_mean_than_a_draw():
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(60, 8)) + 1)
    mean = vectors.mean(axis=0)
    taken = vectors[herd(torch.from_numpy(vectors), 5)].mean(axis=0)
    drawn = [vectors[rng.permutation(60)[:5]].mean(axis=0) for _ in range(200)]
    gaps = [np.linalg.norm(mean - drawn_mean) for drawn_mean in drawn]
    assert np.linalg.norm(mean - taken) < min(gaps)


def learn(exemplars, labels, classes, rows, seed, memory=None):
    """One task; of every clip the vector is a function of its row."""
    feats = torch.stack([vector_of(row) for row in rows])
    clips = Clips({"vector": feats[:, None]}, torch.tensor(labels), torch.tensor(rows))
    task = Task(clips, memory=memory)
    whole = exemplars.rehearsal(task)
    vectors = torch.stack([vector_of(row) for row in whole.rows.tolist()])
    rng = np.random.default_rng(seed)
    return exemplars.select(
        vectors, whole, task.classes, classes, rng, lambda clips: clips.whole("vector")[:, 0]
    )


def vector_of(row):
    return torch.from_numpy(np.random.default_rng([row, 7]).normal(size=5))


def memory_of(exemplars):
    feats = torch.stack([vector_of(row) for row in exemplars.rows.tolist()])
    return Clips({"vector": feats[:, None]}, exemplars.labels, exemplars.rows)


def test_a_shared_budget_shrinks_to_the_first_of_each_order():
    first, indices = learn(
        Exemplars(ExemplarConfig(9, shared=True)), [4] * 8 + [2] * 8, [2, 4], range(16), 0
    )
    assert first.labels.tolist() == [2] * 4 + [4] * 4
    assert torch.equal(first.rows, torch.arange(16)[indices])
    vectors = np.stack([vector_of(row) for row in range(16)])
    assert first.rows[4:].tolist() == herd_by_loops(vectors[:8], 4)
    assert first.rows[:4].tolist() == [8 + p for p in herd_by_loops(vectors[8:], 4)]
    memory = memory_of(first)
    # The memory may come in any order: their ranks do not depend on it.
    back = torch.arange(7, -1, -1)
    memory = Clips(
        {"vector": memory.features["vector"][back]}, memory.labels[back], first.rows[back]
    )
    second, _ = learn(first, [7] * 5, [2, 4, 7], range(20, 25), 1, memory)
    assert second.labels.tolist() == [2] * 3 + [4] * 3 + [7] * 3
    assert second.rows[:3].tolist() == first.rows[:3].tolist()
    assert second.rows[3:6].tolist() == first.rows[4:7].tolist()


def test_a_repeated_class_is_chosen_anew_from_exemplars_and_new_clips():
    first, _ = learn(Exemplars(ExemplarConfig(3)), [0] * 6 + [1] * 6, [0, 1], range(12), 0)
    second, _ = learn(first, [1] * 6, [0, 1], range(12, 18), 1, memory_of(first))
    assert torch.equal(second.rows[:3], first.rows[:3])
    candidates = [*range(12, 18), *first.rows[3:].tolist()]
    vectors = np.stack([vector_of(row) for row in candidates])
    expected = [candidates[index] for index in herd_by_loops(vectors, 3)]
    assert second.rows[3:].tolist() == expected


def test_a_clip_that_is_both_new_and_kept_counts_once():
    first, _ = learn(Exemplars(ExemplarConfig(4)), [0] * 4, [0], range(4), 0)
    second, _ = learn(first, [0] * 4, [0], range(4), 1, memory_of(first))
    assert sorted(second.rows.tolist()) == [0, 1, 2, 3]


def test_a_random_choice_is_a_draw_without_replacement_from_the_generator():
    chosen_rows = [
        learn(Exemplars(ExemplarConfig(6, choice="random")), [0] * 20, [0], range(20), seed)[
            0
        ].rows.tolist()
        for seed in (0, 0, 1)
    ]
    assert chosen_rows[0] == chosen_rows[1] != chosen_rows[2]
    assert len(set(chosen_rows[2])) == 6


def test_no_budget_keeps_every_clip():
    first, _ = learn(Exemplars(None), [0] * 6 + [1] * 2, [0, 1], range(8), 0)
    assert sorted(first.rows.tolist()) == [*range(8)]


def test_nearest_is_the_cosine_to_the_renormalised_mean_of_unit_exemplars():
    exemplars, _ = learn(Exemplars(ExemplarConfig(3)), [5] * 7 + [3] * 2, [3, 5], range(9), 0)
    vectors = np.random.default_rng(1).normal(size=(4, 5))
    expected = np.zeros((4, 2))
    for column, label in enumerate([3, 5]):
        rows = exemplars.rows[exemplars.labels == label].tolist()
        mean = sum(unit(vector_of(row).numpy()) for row in rows) / len(rows)
        for b in range(4):
            expected[b, column] = unit(vectors[b]) @ unit(mean)
    cosines = exemplars.nearest(torch.from_numpy(vectors).float())
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    assert exemplars.nearest(torch.zeros(1, 5)).tolist() == [[0.0, 0.0]]


def test_unusable_budgets_and_missing_memory_are_refused():
    with pytest.raises(ValueError, match="give at least 1"):
        Exemplars(ExemplarConfig(0))
    with pytest.raises(ValueError, match="herding, random"):
        Exemplars(ExemplarConfig(5, choice="best"))
    with pytest.raises(ValueError, match="shared by 3 classes leave some without: give at least 3"):
        Exemplars(ExemplarConfig(2, shared=True)).quota(3)
    first, _ = learn(Exemplars(ExemplarConfig(2)), [0] * 4, [0], range(4), 0)
    for memory in (
        None,
        memory_of(learn(Exemplars(ExemplarConfig(2)), [0] * 4, [0], range(5, 9), 0)[0]),
    ):
        with pytest.raises(ValueError, match="give `memory` the clips of the rows in `exemplars`"):
            learn(first, [1] * 3, [0, 1], range(10, 13), 1, memory)


def test_a_state_brings_back_rows_labels_and_means():
    first, _ = learn(Exemplars(ExemplarConfig(3)), [5] * 7 + [3] * 2, [3, 5], range(9), 0)
    again = Exemplars(ExemplarConfig(3))
    state = first.state()
    again.load(state)
    for tensor in state.values():
        tensor.zero_()
    vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 5)))
    assert torch.equal(again.rows, first.rows)
    assert torch.equal(again.labels, first.labels)
    assert torch.equal(again.nearest(vectors), first.nearest(vectors))


def drawn_clips(clips, frames=8, width=4):
    rng = np.random.default_rng(0)
    feats = torch.from_numpy(rng.normal(size=(clips, frames, width)).astype(np.float32))
    return Clips({"vector": feats}, torch.arange(clips) % 2), feats


@pytest.mark.parametrize(("count", "kept"), [(1, [4] * 8), (2, [2] * 5 + [6] * 3)])
def test_exemplars_of_a_few_frames_are_replayed_and_averaged_with_those_alone(count, kept):
    config = ExemplarConfig(budget=3, exemplar_frames=count)
    clips, feats = drawn_clips(10)
    whole = Exemplars(config).rehearsal(Task(clips))
    assert torch.equal(whole.whole("vector"), feats)  # clips of a task have all frames
    exemplars, chosen = Exemplars(config).select(
        feats.mean(dim=1), whole, [0, 1], [0, 1], np.random.default_rng(0),
        lambda clips: clips.whole("vector").mean(dim=1),
    )  # fmt: skip
    replayed = feats[chosen][:, kept]
    memory = Clips({"vector": feats[chosen]}, exemplars.labels, exemplars.rows)
    new = Clips({"vector": feats[:2] + 1}, torch.tensor([5, 5]), torch.tensor([90, 91]))
    rehearsal = exemplars.rehearsal(Task(new, memory=memory))
    assert torch.equal(rehearsal.whole("vector"), torch.cat([feats[:2] + 1, replayed]))
    unit = torch.nn.functional.normalize(replayed.mean(dim=1).double(), dim=1)
    means = torch.stack([unit[exemplars.labels == label].mean(dim=0) for label in (0, 1)])
    torch.testing.assert_close(exemplars.state()["exemplars.means"], means)
    # Herding chose by all frames.
    for label in (0, 1):
        of_class = torch.nonzero(clips.labels == label)[:, 0]
        order = herd(feats[of_class].mean(dim=1), 3)
        assert torch.equal(exemplars.rows[exemplars.labels == label], of_class[order])


def test_as_many_frames_as_there_are_change_nothing():
    with pytest.raises(ValueError, match="exemplar_frames=-1"):
        ExemplarConfig(exemplar_frames=-1)
    clips, feats = drawn_clips(4)
    assert Exemplars(ExemplarConfig()).replayed(clips) is clips
    more = Exemplars(ExemplarConfig(exemplar_frames=100)).replayed(clips)
    assert torch.equal(more.whole("vector"), feats)
