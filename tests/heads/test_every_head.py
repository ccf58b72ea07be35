"""The contract of heads/__init__.py, over whatever heads the folder holds."""

import ast
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import heads
from pipeline._variants import available, variant

HEADS = available("heads")


@pytest.fixture(params=HEADS)
def build(request):
    return variant("heads", request.param).build


def blobs(labels, clips=6, seed=0, frames=4, width=16):
    """Clips around a direction of their class, in shuffled order: [N, T, D] and labels."""
    rng = np.random.default_rng([seed, 1])
    feats, numbers = [], []
    for label in labels:
        centre_TD = np.random.default_rng([label, 2]).normal(size=(frames, width))
        feats.append(centre_TD + 0.3 * rng.normal(size=(clips, frames, width)))
        numbers += [label] * clips
    order = rng.permutation(len(numbers))
    return (
        torch.from_numpy(np.concatenate(feats)[order]).float(),
        torch.tensor(numbers)[torch.from_numpy(order)],
    )


def predicted(head, feats):
    return torch.tensor(head.classes)[head.scores(feats).argmax(dim=1)]


def test_columns_are_appended_and_never_moved(build):
    head = build()
    head.learn(*blobs([7, 3]))
    assert head.classes == [3, 7]
    head.learn(*blobs([5, 1, 7], seed=1))
    assert head.classes == [3, 7, 1, 5]
    head.learn(*blobs([0, 3], seed=2))
    assert head.classes == [3, 7, 1, 5, 0]
    feats, labels = blobs([0, 1, 3, 5, 7], seed=3)
    scores = head.scores(feats)
    assert scores.shape == (30, 5)
    assert scores.dtype == torch.float32
    assert (predicted(head, feats) == labels).float().mean() > 0.9


def test_a_class_keeps_its_column_when_others_arrive(build):
    head = build()
    head.learn(*blobs([4, 2]))
    feats, labels = blobs([2, 4], seed=1)
    assert torch.equal(predicted(head, feats), labels)
    head.learn(*blobs([0, 1]))
    # Only the first two columns: whichever head, a new class must not swap old ones.
    old = torch.tensor(head.classes[:2])[head.scores(feats)[:, :2].argmax(dim=1)]
    assert torch.equal(old, labels)


def test_score_of_a_clip_ignores_its_batch(build):
    head = build()
    head.learn(*blobs([0, 1, 2]))
    feats, _ = blobs([0, 1, 2], seed=1)
    whole = head.scores(feats)
    for n in (0, 7, 17):
        torch.testing.assert_close(head.scores(feats[n : n + 1])[0], whole[n], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.scores(feats.flip(0)).flip(0), whole, rtol=1e-5, atol=1e-6)


def test_state_in_state_out_gives_the_same_scores(build):
    first, second = build(), build()
    first.learn(*blobs([0, 2]))
    second.learn(*blobs([9]))
    second.load_state_dict(first.state_dict())
    feats, _ = blobs([0, 1, 2], seed=1)
    assert second.classes == first.classes
    assert torch.equal(second.scores(feats), first.scores(feats))
    for head in (first, second):
        head.learn(*blobs([1, 2], seed=2))
    assert torch.equal(second.scores(feats), first.scores(feats))


def test_a_state_shares_no_memory_with_its_head(build):
    head = build()
    head.learn(*blobs([0, 1]))
    feats, _ = blobs([0, 1], seed=1)
    before = head.scores(feats)
    state = head.state_dict()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    head.learn(*blobs([1, 2], seed=2))
    assert all(torch.equal(state[name], saved[name]) for name in saved)

    again = build()
    again.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(again.scores(feats), before)

    given_away = again.state_dict()
    for tensor in given_away.values():
        tensor.zero_()
    assert torch.equal(again.scores(feats), before)


def test_equal_calls_give_equal_numbers_whatever_the_global_generators(build):
    feats, _ = blobs([0, 1, 2], seed=1)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what must not matter
        head = build()
        head.learn(*blobs([0, 1]))
        head.learn(*blobs([2]))
        results.append(head.scores(feats))
    assert torch.equal(*results)


def test_a_task_of_one_class_can_be_learned(build):
    head = build()
    head.learn(*blobs([5]))
    assert head.classes == [5]
    assert head.scores(blobs([5])[0]).shape == (6, 1)
    head.learn(*blobs([6]))
    feats, labels = blobs([5, 6], seed=1)
    assert torch.equal(predicted(head, feats), labels)


def test_a_class_that_comes_with_one_clip_is_learned(build):
    head = build()
    head.learn(*blobs([0, 1]))
    head.learn(*blobs([2], clips=1))
    assert head.classes == [0, 1, 2]
    feats, labels = blobs([2], seed=1)
    assert head.scores(feats).isfinite().all()
    assert torch.equal(predicted(head, feats), labels)


def test_learning_and_scoring_leave_their_input_as_it_was(build):
    head = build()
    feats, labels = blobs([0, 1])
    feats_before, labels_before = feats.clone(), labels.clone()
    head.learn(feats, labels)
    head.scores(feats)
    assert torch.equal(feats, feats_before)
    assert torch.equal(labels, labels_before)


def test_what_was_learned_outlives_the_arrays_it_came_from(build):
    head = build()
    feats, labels = blobs([0, 1])
    head.learn(feats, labels)
    asked, _ = blobs([0, 1], seed=1)
    before = head.scores(asked)
    feats.fill_(3.0)
    labels.fill_(9)
    assert head.classes == [0, 1]
    assert torch.equal(head.scores(asked), before)


def test_learning_a_known_class_again_updates_it(build):
    head = build()
    head.learn(*blobs([0, 1]))
    feats, _ = blobs([0, 1], seed=1)
    before = head.scores(feats)
    moved, _ = blobs([8], clips=30)
    head.learn(moved, torch.zeros(30, dtype=torch.int64))
    assert head.classes == [0, 1]
    assert not torch.allclose(head.scores(feats), before)
    assert (predicted(head, blobs([8], seed=1)[0]) == 0).all()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda feats, labels: (feats[:, 0], labels), "features are"),
        (lambda feats, labels: (feats, labels[:-1]), "labels"),
        (lambda feats, labels: (feats[:0], labels[:0]), "at least one clip"),
        (lambda feats, labels: (feats[..., :-1], labels), "same feature"),
        (lambda feats, labels: (feats / 0, labels), "not finite"),
    ],
    ids=["no_time_axis", "a_label_short", "no_clip", "another_width", "not_finite"],
)
def test_a_refused_task_leaves_no_trace(build, spoil, said):
    head = build()
    head.learn(*blobs([0, 1]))
    feats, _ = blobs([0, 1], seed=1)
    before = head.scores(feats)
    with pytest.raises(ValueError, match=said):
        head.learn(*spoil(*blobs([1, 2], seed=2)))
    assert head.classes == [0, 1]
    assert torch.equal(head.scores(feats), before)


def test_scoring_before_learning_is_refused(build):
    with pytest.raises(ValueError, match="learn first"):
        build().scores(blobs([0])[0])


@pytest.mark.parametrize("name", ["__init__", *HEADS])
def test_a_head_reaches_torch_and_numpy_and_no_other_room(name):
    source = Path(heads.__file__).with_name(f"{name}.py").read_text()
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "faiss", "heads"}


def test_every_option_has_a_default(build):
    missing = [
        parameter.name
        for parameter in inspect.signature(build).parameters.values()
        if parameter.default is parameter.empty
    ]
    assert missing == []
