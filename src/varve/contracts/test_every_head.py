"""Tests that every head must pass; `varve/heads/__init__.py` is the contract.

`python -m varve.contracts --head mine.py` tests a file of the user's own. Heads train on a dozen
clips of a tiny network: for 25 epochs, where they have such options, and with the options `QUICK`
of their module, if it has any. Trained states are shared between tests, as copies.
"""

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from varve import heads
from varve.contracts._head_runner import Runner, TrainedRuns, epochs_of
from varve.contracts.options import names
from varve.heads import ReplaysExemplars, Task, build_head, options_of
from varve.heads.parts.clips import Clips
from varve.pipeline.experiments.cost import BACKBONE, module_costs, modules_of, multiply_adds
from varve.pipeline.experiments.head_source import find_head

# Tasks: labels, clips per class, seed.
FIRST, NEW = ((7, 3), 6, 0), ((0, 1), 6, 0)
AGAIN, LAST = ((5, 1, 7), 6, 1), ((0, 3), 6, 2)
SINGLE, OTHER = ((5,), 6, 0), ((6,), 6, 0)


def pytest_generate_tests(metafunc):
    if "build" in metafunc.fixturenames:
        chosen = names(metafunc.config, "heads")
        metafunc.parametrize("build", chosen, indirect=True, scope="module")
    if "file" in metafunc.fixturenames:
        chosen = [name for name in metafunc.config.getoption("--head") if name.endswith(".py")]
        files = [*map(Path, chosen)] or sorted(Path(heads.__file__).parent.rglob("*.py"))
        metafunc.parametrize("file", files, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def build(request):
    return find_head(request.param).build


@pytest.fixture(scope="module")
def quick(build):
    """Options with which the head learns a dozen clips in seconds."""
    return getattr(sys.modules.get(build.__module__), "QUICK", {})


@pytest.fixture(scope="module")
def short(build, quick):
    """Options for tests in which it does not matter how well the head learns."""
    return quick | epochs_of(build, 2)


@pytest.fixture(scope="module")
def trained(build, quick):
    """`trained(*tasks)` returns a copy of a runner that has learned these tasks."""
    return TrainedRuns(build, quick)


@pytest.fixture(scope="module")
def begun(build, short):
    """`begun(*tasks)` is like `trained`, with the options `short`."""
    return TrainedRuns(build, short)


def test_columns_are_appended_and_never_moved(trained):
    assert trained(FIRST).head.classes == [3, 7]
    assert trained(FIRST, AGAIN).head.classes == [3, 7, 1, 5]
    run = trained(FIRST, AGAIN, LAST)
    assert run.head.classes == [3, 7, 1, 5, 0]
    tokens, labels = run.tokens([0, 3], seed=3)
    scores = run.scores(tokens)
    assert scores.shape == (12, 5)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert (run.predicted(tokens) == labels).float().mean() > 0.9


def test_a_class_keeps_its_column_when_others_are_learned(trained):
    run = trained(FIRST)
    tokens, labels = run.tokens([3, 7], seed=1)
    assert torch.equal(run.predicted(tokens), labels)
    run = trained(FIRST, NEW)
    # Only the first two columns: for no head may a new class swap old ones.
    columns = run.scores(tokens)[:, :2].argmax(dim=1)
    assert torch.equal(torch.tensor(run.head.classes[:2])[columns], labels)


def test_the_score_of_a_clip_ignores_its_batch(trained):
    run = trained(FIRST, NEW)
    tokens, _ = run.tokens([0, 3, 7], seed=1)
    whole = run.scores(tokens)
    for n in (0, 7, 17):
        torch.testing.assert_close(run.scores(tokens[n : n + 1])[0], whole[n], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.scores(tokens.flip(0)).flip(0), whole, rtol=1e-4, atol=1e-5)


def test_a_loaded_state_gives_the_same_scores_and_trains_on_to_the_same_numbers(begun):
    first, second = begun(FIRST), begun(SINGLE)
    second.head.load_state_dict(first.head.state_dict())
    second.seen, second.number = dict(first.seen), first.number
    second.next_row = first.next_row
    tokens, _ = first.tokens([1, 3, 7], seed=1)
    assert second.head.classes == first.head.classes
    assert second.head.trainable == first.head.trainable
    assert torch.equal(second.scores(tokens), first.scores(tokens))
    second.learn([5, 1, 7], seed=1)
    assert torch.equal(second.scores(tokens), begun(FIRST, AGAIN).scores(tokens))


def test_a_state_can_be_loaded_by_a_head_that_has_learned_nothing(begun):
    first, second = begun(FIRST, AGAIN), begun()
    state = {name: tensor.clone() for name, tensor in first.head.state_dict().items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    second.head.load_state_dict(state)
    tokens, _ = first.tokens([1, 3, 7], seed=1)
    assert torch.equal(second.scores(tokens), first.scores(tokens))


def test_a_state_shares_no_memory_with_its_head(begun):
    run = begun(FIRST)
    tokens, _ = run.tokens([3, 7], seed=1)
    before = run.scores(tokens)
    state = run.head.state_dict()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    run.learn([1, 7], seed=2)
    assert all(torch.equal(state[name], saved[name]) for name in saved)

    loaded = begun()
    loaded.head.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(loaded.scores(tokens), before)

    for tensor in loaded.head.state_dict().values():
        tensor.zero_()
    assert torch.equal(loaded.scores(tokens), before)


def test_training_neither_reads_nor_moves_the_global_random_generators(begun):
    run = begun()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is what must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    run.learn([7, 3])
    run.learn([5, 1, 7], seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    tokens, _ = run.tokens([1, 3, 7], seed=1)
    # The other runner was trained with other seeds of the global generators.
    assert torch.equal(run.scores(tokens), begun(FIRST, AGAIN).scores(tokens))


def test_a_task_of_one_class_can_be_learned(trained):
    run = trained(SINGLE)
    assert run.head.classes == [5]
    assert run.scores(run.tokens([5])[0]).shape == (6, 1)
    run = trained(SINGLE, OTHER)
    tokens, labels = run.tokens([6], seed=1)
    assert torch.equal(run.predicted(tokens), labels)


def test_a_class_with_a_single_clip_is_learned(trained):
    run = trained(FIRST)
    run.learn([2], clips=1)
    assert run.head.classes == [3, 7, 2]
    tokens, labels = run.tokens([2], seed=1)
    assert run.scores(tokens).isfinite().all()
    assert torch.equal(run.predicted(tokens), labels)


def test_inputs_are_not_modified_and_not_needed_any_more_after_training(begun):
    run = begun()
    tokens, labels = run.tokens([0, 1])
    batch, text = run.batch(tokens), run.text([0, 1])
    before = {name: cells.clone() for name, cells in batch.items()}
    text_before = text.clone()
    run.head.learn(Task(Clips(batch, labels), text=text))
    run.head.scores(batch)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert torch.equal(text, text_before)

    queries = run.batch(run.tokens([0, 1], seed=1)[0])
    scores = run.head.scores(queries)
    for tensor in (*batch.values(), labels, text):
        tensor.fill_(3)
    assert run.head.classes == [0, 1]
    assert torch.equal(run.head.scores(queries), scores)


def test_old_clips_are_read_only_if_the_head_keeps_them_as_exemplars(begun):
    run = begun(FIRST)
    old = set(run.seen)
    replays = isinstance(run.head, ReplaysExemplars)
    kept = set(run.head.exemplars.tolist()) if replays else set()
    assert kept <= old
    task = run.task([1, 2], seed=1)
    assert (task.memory is not None) == bool(kept)
    run.reads.clear()
    run.head.learn(task)
    run.scores(run.tokens([1, 2, 3, 7], seed=2)[0])
    assert set(run.reads) & old == kept
    if kept:  # a head whose default is to keep none has no NME
        assert set(run.head.exemplars.tolist()) <= kept | set(task.clips.rows.tolist())
        assert run.head.nearest(run.batch(run.tokens([1, 3])[0])).shape == (12, 4)


def test_exemplars_are_of_all_classes_and_within_the_budget(build, short, begun):
    if not isinstance(begun().head, ReplaysExemplars):
        assert not hasattr(begun().head, "exemplars")
        return
    budgets = [{"budget": 2, "shared": False}, {"budget": 7, "shared": True}]
    for options in budgets if "budget" in options_of(build) else [{}]:
        run = Runner(build, **short | options)
        for number, labels in enumerate(([3, 1], [2], [1, 4])):
            run.learn(labels, seed=number)
            rows = run.head.exemplars.tolist()
            kept = Counter(run.seen[row][1] for row in rows)
            assert len(rows) == len(set(rows))
            assert set(kept) == set(run.head.classes)
            if options.get("shared") is True:
                assert set(kept.values()) == {7 // len(kept)}
            elif options:
                assert set(kept.values()) == {2}
            else:  # a head without a budget keeps every clip
                assert set(rows) == set(run.seen)


def test_a_memory_of_other_clips_than_the_exemplars_is_refused(begun):
    run = begun(FIRST)
    if not isinstance(run.head, ReplaysExemplars) or not len(run.head.exemplars):
        return
    task = run.task([2], seed=1)
    fewer = {name: cells[torch.arange(3)] for name, cells in task.memory.features.items()}
    fewer = Clips(fewer, task.memory.labels[:3], task.memory.rows[:3])
    for memory in (None, fewer):
        with pytest.raises(ValueError, match="exemplars"):
            run.head.learn(Task(task.clips, 1, task.text, memory))
    assert run.head.classes == [3, 7]


@pytest.mark.parametrize("label", [3, 7])
def test_a_known_class_that_is_learned_again_is_updated(trained, label):
    """Clips of another kind are learned as one known class or as the other."""
    run = trained(((3, 7), 4, 0))
    cells, _ = run.tokens([9], clips=24, seed=6)
    memory = run.task([label], seed=9).memory
    clips = run.clips(cells, torch.full((24,), label))
    run.head.learn(Task(clips, 1, run.text([9]), memory))
    assert run.head.classes == [3, 7]
    tokens, _ = run.tokens([9], seed=5)
    assert (run.predicted(tokens) == label).all()


class Streaming:
    """Cells in half precision that are read on demand, as from disk."""

    in_memory = False

    def __init__(self, cells):
        self.cells = cells.half()

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, indices):
        return self.cells[indices].clone()


def test_streamed_cells_in_half_precision_give_the_same_numbers(begun):
    scores = []
    for form in (lambda cells: cells.half().float(), Streaming):
        run = begun()
        for labels, seed in (([0, 1], 0), ([2, 1], 1)):
            task = run.task(labels, seed=seed)

            def formed(clips, form=form):
                if clips is None:
                    return None
                features = {name: form(cells.cells) for name, cells in clips.features.items()}
                return Clips(features, clips.labels, clips.rows)

            run.head.learn(Task(formed(task.clips), task.number, task.text, formed(task.memory)))
            run.number += 1
        scores.append(run.scores(run.tokens([0, 1, 2], seed=5)[0]))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_the_callback_runs_after_every_epoch(begun):
    run = begun()
    task, epochs = run.task([0, 1]), []
    task = Task(task.clips, 0, task.text, None, lambda *epoch: epochs.append(epoch))
    run.head.learn(task)
    assert [done for done, _, _ in epochs] == list(range(1, len(epochs) + 1))
    assert all(count == len(epochs) and np.isfinite(loss) for _, count, loss in epochs)
    assert bool(epochs) == (run.head.trainable > 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cells: cells / 0, "finite"),
        (lambda cells: cells[..., :-1], "learned before|suffix|width"),
    ],
    ids=["not_finite", "another_width"],
)
def test_a_refused_task_leaves_no_trace(begun, spoil, message):
    run = begun(FIRST)
    tokens, _ = run.tokens([3, 7], seed=1)
    before = run.scores(tokens)
    task = run.task([1, 7], seed=2)
    spoilt = {name: spoil(cells.cells) for name, cells in task.clips.features.items()}
    spoilt = Clips(spoilt, task.clips.labels, task.clips.rows)
    with pytest.raises(ValueError, match=message):
        run.head.learn(Task(spoilt, 1, task.text, task.memory))
    assert run.head.classes == [3, 7]
    assert torch.equal(run.scores(tokens), before)
    run.learn([2])
    assert run.head.classes == [3, 7, 2]


def test_a_task_that_fails_at_its_last_clip_leaves_no_trace(begun):
    run = begun(FIRST)
    if set(run.reads) != set(run.seen):
        return  # a head that does not learn from clips
    tokens, _ = run.tokens([3, 7], seed=1)
    before, state = run.scores(tokens), run.head.state_dict()
    task = run.task([1, 7], seed=2)
    spoilt = {name: cells.cells.clone() for name, cells in task.clips.features.items()}
    for cells in spoilt.values():
        cells[-1] = torch.nan
    spoilt = Clips(spoilt, task.clips.labels, task.clips.rows)
    with pytest.raises(ValueError, match="finite"):
        run.head.learn(Task(spoilt, 1, task.text, task.memory))
    assert run.head.classes == [3, 7]
    assert torch.equal(run.scores(tokens), before)
    after = run.head.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_costs_of_a_head_s_modules_add_up(begun):
    assert not modules_of(begun().head)
    run = begun(FIRST, NEW)
    clips = run.clips(*run.tokens([0, 3, 7], seed=1))
    costs = module_costs(run.head, clips)
    parts = [cost["part"] for cost in costs]
    assert len(parts) == len(set(parts))
    # A part is the mean over clips, rounded down.
    counted = sum(cost["multiply_adds"] for cost in costs)
    assert 0 <= multiply_adds(run.head, clips) - counted < len(parts)
    # Beside the frozen stages, what gradient descent trains is in some part.
    assert sum(c["parameters"] for c in costs if c["part"] != BACKBONE) >= run.head.trainable


def test_scoring_before_learning_is_refused(begun):
    run = begun()
    with pytest.raises(ValueError, match="learn first"):
        run.scores(run.tokens([0])[0])


def test_a_head_imports_torch_numpy_and_heads_alone(file):
    roots = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "faiss", "varve"}


def test_every_option_has_a_default_that_is_json_and_unknown_options_are_refused(build):
    for parameter in options_of(build).values():
        assert parameter.default is not parameter.empty, parameter.name
        default = parameter.default
        plain = json.loads(json.dumps(default))
        assert plain == (list(default) if isinstance(default, tuple) else default)
    with pytest.raises(ValueError, match="no option no_such_option"):
        build_head(build, {"no_such_option": 1})
