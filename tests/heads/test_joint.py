"""Joint training: everything is rehearsed, and what was learned when makes no difference."""

import torch

from varve.heads import Task
from varve.heads.joint import Joint


def test_it_keeps_every_row_and_reads_every_row_again(runner):
    run = runner(Joint)
    run.learn([0, 1])
    run.learn([2], seed=1)
    assert sorted(run.head.exemplars.tolist()) == [*range(18)]
    task = run.task([3], seed=2)
    assert len(task.memory) == 18
    run.reads.clear()
    run.head.learn(task)
    assert set(run.reads) == {*range(24)}


def test_all_classes_are_known_after_tasks_that_fine_tuning_would_forget(runner):
    run = runner(Joint)
    for number in range(4):
        run.learn([2 * number, 2 * number + 1], clips=12, seed=number)
    tokens, labels = run.tokens(range(8), seed=99)
    assert (run.predicted(tokens) == labels).float().mean() > 0.95
    nearest = run.head.nearest(run.batch(tokens)).argmax(dim=1)
    assert (torch.tensor(run.head.classes)[nearest] == labels).float().mean() > 0.9


def test_tasks_one_after_the_other_end_where_all_at_once_does(runner):
    # With decay the problem has one solution, and 200 epochs are enough to reach it.
    parts, once = (runner(Joint, epochs=200, weight_decay=0.05) for _ in range(2))
    parts.learn([0, 1])
    parts.learn([2], seed=1)
    cells, labels = zip(*(parts.seen[row] for row in range(18)), strict=True)
    once.head.learn(Task(once.clips(torch.stack(cells), torch.tensor(labels))))
    tokens, _ = parts.tokens([0, 1, 2], seed=5)
    torch.testing.assert_close(parts.scores(tokens), once.scores(tokens), atol=0.01, rtol=0.01)
