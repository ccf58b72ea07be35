"""The contract of heads/__init__.py, over whatever heads the folder holds.

`pytest tests/heads/test_every_head.py --head mine.py` asks the same of a file of one's own.
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
from varve.heads import ReplaysExemplars, Task, options_of
from varve.heads.parts.clips import Clips
from varve.pipeline.experiments.head_source import find_head
from varve.pipeline.registry import available

# Fewer numbers, or a greater rate: sigmoids that nothing sets against each other take more steps.
QUICK = {
    "RanPAC": {"projection": 64},
    "LwF": {"lr": 0.03},
    "HAD": {"width": 64, "heads": 2, "ffn": 64},
    "HCE": {"epochs": 12, "lr": 0.03},
}
FOLDER = Path(heads.__file__).parent


def pytest_generate_tests(metafunc):
    own = metafunc.config.getoption("--head")
    if "build" in metafunc.fixturenames:
        metafunc.parametrize("build", own or available("heads"), indirect=True)
    if "file" in metafunc.fixturenames:
        files = list(map(Path, own)) or sorted(FOLDER.rglob("*.py"))
        metafunc.parametrize("file", files, ids=lambda file: file.stem)


@pytest.fixture
def build(request):
    return find_head(request.param).build


@pytest.fixture
def made(build, runner):
    """A runner of the head, anew at each call, with what makes it quick on a dozen clips."""
    return lambda **options: runner(build, **QUICK.get(build.__name__, {}) | options)


def test_columns_are_appended_and_never_moved(made):
    run = made()
    run.learn([7, 3])
    assert run.head.classes == [3, 7]
    run.learn([5, 1, 7], seed=1)
    assert run.head.classes == [3, 7, 1, 5]
    run.learn([0, 3], seed=2)
    assert run.head.classes == [3, 7, 1, 5, 0]
    tokens, labels = run.tokens([0, 3], seed=3)
    scores = run.scores(tokens)
    assert scores.shape == (12, 5)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert (run.predicted(tokens) == labels).float().mean() > 0.9


def test_a_class_keeps_its_column_when_others_arrive(made):
    run = made()
    run.learn([4, 2])
    tokens, labels = run.tokens([2, 4], seed=1)
    assert torch.equal(run.predicted(tokens), labels)
    run.learn([0, 1])
    # Only the first two columns: whichever head, a new class must not swap old ones.
    old = torch.tensor(run.head.classes[:2])[run.scores(tokens)[:, :2].argmax(dim=1)]
    assert torch.equal(old, labels)


def test_score_of_a_clip_ignores_its_batch(made):
    run = made()
    run.learn([0, 1, 2])
    tokens, _ = run.tokens([0, 1, 2], seed=1)
    whole = run.scores(tokens)
    for n in (0, 7, 17):
        torch.testing.assert_close(run.scores(tokens[n : n + 1])[0], whole[n], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.scores(tokens.flip(0)).flip(0), whole, rtol=1e-4, atol=1e-5)


def test_state_in_state_out_gives_the_same_scores_and_goes_on_alike(made):
    first, second = made(), made()
    first.learn([0, 2])
    second.learn([9])
    second.head.load_state_dict(first.head.state_dict())
    second.seen, second.number = dict(first.seen), first.number
    second.next_row = first.next_row
    tokens, _ = first.tokens([0, 1, 2], seed=1)
    assert second.head.classes == first.head.classes
    assert second.head.trainable == first.head.trainable
    assert torch.equal(second.scores(tokens), first.scores(tokens))
    for run in (first, second):
        run.learn([1, 2], seed=2)
    assert torch.equal(second.scores(tokens), first.scores(tokens))


def test_a_state_fits_into_a_head_that_has_learned_nothing(made):
    first, second = made(), made()
    first.learn([0, 2])
    first.learn([1])
    state = {name: tensor.clone() for name, tensor in first.head.state_dict().items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    second.head.load_state_dict(state)
    tokens, _ = first.tokens([0, 1, 2], seed=1)
    assert torch.equal(second.scores(tokens), first.scores(tokens))


def test_a_state_shares_no_memory_with_its_head(made):
    run = made()
    run.learn([0, 1])
    tokens, _ = run.tokens([0, 1], seed=1)
    before = run.scores(tokens)
    state = run.head.state_dict()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    run.learn([1, 2], seed=2)
    assert all(torch.equal(state[name], saved[name]) for name in saved)

    again = made()
    again.head.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(again.scores(tokens), before)

    for tensor in again.head.state_dict().values():
        tensor.zero_()
    assert torch.equal(again.scores(tokens), before)


def test_equal_calls_give_equal_numbers_whatever_the_global_generators(made):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what must not matter
        run = made()
        run.learn([0, 1])
        run.learn([2])
        results.append(run.scores(run.tokens([0, 1, 2], seed=1)[0]))
    assert torch.equal(*results)


def test_learning_leaves_the_global_generators_as_they_were(made):
    run = made()
    task = run.task([0, 1])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run.head.learn(task)
    assert torch.equal(torch.rand(3), expected)


def test_a_task_of_one_class_can_be_learned(made):
    run = made()
    run.learn([5])
    assert run.head.classes == [5]
    assert run.scores(run.tokens([5])[0]).shape == (6, 1)
    run.learn([6])
    tokens, labels = run.tokens([6], seed=1)
    assert torch.equal(run.predicted(tokens), labels)


def test_a_class_that_comes_with_one_clip_is_learned(made):
    run = made()
    run.learn([0, 1])
    run.learn([2], clips=1)
    assert run.head.classes == [0, 1, 2]
    tokens, labels = run.tokens([2], seed=1)
    assert run.scores(tokens).isfinite().all()
    assert torch.equal(run.predicted(tokens), labels)


def test_learning_and_scoring_leave_their_input_as_it_was(made):
    run = made()
    tokens, labels = run.tokens([0, 1])
    batch = run.batch(tokens)
    before = {name: cells.clone() for name, cells in batch.items()}
    text = run.text([0, 1])
    text_before = text.clone()
    run.head.learn(Task(Clips(batch, labels), text=text))
    run.head.scores(batch)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert torch.equal(text, text_before)


def test_what_was_learned_outlives_the_tensors_it_came_from(made):
    run = made()
    tokens, labels = run.tokens([0, 1])
    batch, text = run.batch(tokens), run.text([0, 1])
    asked = run.batch(run.tokens([0, 1], seed=1)[0])
    run.head.learn(Task(Clips(batch, labels), text=text))
    before = run.head.scores(asked)
    for tensor in (*batch.values(), labels, text):
        tensor.fill_(3)
    assert run.head.classes == [0, 1]
    assert torch.equal(run.head.scores(asked), before)


def test_old_clips_are_read_only_where_the_head_says_that_it_keeps_them(made):
    run = made()
    run.learn([0, 1])
    old = set(run.seen)
    rehearses = isinstance(run.head, ReplaysExemplars)
    kept = set(run.head.exemplars.tolist()) if rehearses else set()
    assert kept <= old
    task = run.task([2, 3], seed=1)
    assert (task.memory is not None) == bool(kept)
    run.reads.clear()
    run.head.learn(task)
    run.scores(run.tokens([0, 1, 2, 3], seed=2)[0])
    assert set(run.reads) & old == kept
    if rehearses:
        assert set(run.head.exemplars.tolist()) <= kept | set(task.clips.rows.tolist())
        assert run.head.nearest(run.batch(run.tokens([0, 3])[0])).shape == (12, 4)


def test_exemplars_are_of_all_classes_and_within_the_budget(build, made):
    if not isinstance(made().head, ReplaysExemplars):
        assert not hasattr(made().head, "exemplars")
        return
    known = options_of(build)
    budgets = [{"budget": 2, "shared": False}, {"budget": 7, "shared": True}]
    budgets = budgets if "budget" in known else [{}]
    for options in budgets:
        run = made(**options)
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
            else:  # a head without a budget says that it keeps everything
                assert set(rows) == set(run.seen)


def test_memory_is_asked_back_row_by_row(made):
    run = made()
    if not isinstance(run.head, ReplaysExemplars):
        return
    run.learn([0, 1])
    task = run.task([2], seed=1)
    fewer = {name: cells[torch.arange(3)] for name, cells in task.memory.features.items()}
    fewer = Clips(fewer, task.memory.labels[:3], task.memory.rows[:3])
    for memory in (None, fewer):
        with pytest.raises(ValueError, match="exemplars"):
            run.head.learn(Task(task.clips, 1, task.text, memory))
    assert run.head.classes == [0, 1]


@pytest.mark.parametrize("label", [0, 1])
def test_a_known_class_that_comes_again_is_updated(made, label):
    """Clips of a kind not seen before are taught as one known class or as the other."""
    run = made()
    run.learn([0, 1], clips=4)
    cells, _ = run.tokens([7], clips=24, seed=6)
    memory = run.task([label], seed=9).memory
    clips = run.clips(cells, torch.full((24,), label))
    run.head.learn(Task(clips, 1, run.text([7]), memory))
    assert run.head.classes == [0, 1]
    asked, _ = run.tokens([7], seed=5)
    assert (run.predicted(asked) == label).all()


class Streaming:
    """Cells on disk, as it were: half precision, and not there before they are asked for."""

    stays = False

    def __init__(self, cells):
        self.cells = cells.half()

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, places):
        return self.cells[places].clone()


def test_cells_that_stream_in_half_precision_are_the_same_numbers(made):
    scores = []
    for form in (lambda cells: cells.half().float(), Streaming):
        run = made()
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


def test_progress_is_told_of_every_epoch(made):
    run = made()
    task = run.task([0, 1])
    told = []
    task = Task(task.clips, 0, task.text, None, lambda *epoch: told.append(epoch))
    run.head.learn(task)
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert all(epochs == len(told) and np.isfinite(loss) for _, epochs, loss in told)
    assert bool(told) == (run.head.trainable > 0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda cells: cells / 0, "finite"),
        (lambda cells: cells[..., :-1], "learned before|suffix|width"),
    ],
    ids=["not_finite", "another_width"],
)
def test_a_refused_task_leaves_no_trace(made, spoil, said):
    run = made()
    run.learn([0, 1])
    tokens, _ = run.tokens([0, 1], seed=1)
    before = run.scores(tokens)
    task = run.task([1, 2], seed=2)
    spoilt = {name: spoil(cells.cells) for name, cells in task.clips.features.items()}
    spoilt = Clips(spoilt, task.clips.labels, task.clips.rows)
    with pytest.raises(ValueError, match=said):
        run.head.learn(Task(spoilt, 1, task.text, task.memory))
    assert run.head.classes == [0, 1]
    assert torch.equal(run.scores(tokens), before)
    run.learn([2])
    assert run.head.classes == [0, 1, 2]


def test_a_task_that_fails_at_its_last_clip_leaves_no_trace(made):
    run = made()
    run.learn([0, 1])
    if set(run.reads) != set(run.seen):
        return  # a head that learns from something else than clips
    tokens, _ = run.tokens([0, 1], seed=1)
    before, state = run.scores(tokens), run.head.state_dict()
    task = run.task([1, 2], seed=2)
    spoilt = {name: cells.cells.clone() for name, cells in task.clips.features.items()}
    for cells in spoilt.values():
        cells[-1] = torch.nan
    spoilt = Clips(spoilt, task.clips.labels, task.clips.rows)
    with pytest.raises(ValueError, match="finite"):
        run.head.learn(Task(spoilt, 1, task.text, task.memory))
    assert run.head.classes == [0, 1]
    assert torch.equal(run.scores(tokens), before)
    after = run.head.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_scoring_before_learning_is_refused(made):
    run = made()
    with pytest.raises(ValueError, match="learn first"):
        run.scores(run.tokens([0])[0])


def test_a_head_reaches_torch_and_numpy_and_no_other_room(file):
    roots = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "faiss", "varve"}


def test_every_option_has_a_default_that_is_json_and_unknown_values_are_refused(build):
    for parameter in options_of(build).values():
        assert parameter.default is not parameter.empty, parameter.name
        default = parameter.default
        plain = json.loads(json.dumps(default))
        assert plain == (list(default) if isinstance(default, tuple) else default)
    with pytest.raises(TypeError, match="no_such_option"):
        build(no_such_option=1)
