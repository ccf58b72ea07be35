"""StPR against its equations by loops in float64, and what its parts make of a run.

Shapes: B clips, T frames, L tokens, D width, K experts, C classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from varve.heads import FineTunesBackbone, Routes, Task, build_head
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.parts import losses
from varve.heads.parts.class_text import Codes, code
from varve.heads.parts.clips import Clips
from varve.heads.stpr import StPR, build

SMALL = {"layers": 2, "ffn": 32}
ROUTINGS = ["td", "average", "clip", "adapter"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosine(a, b):
    return float(unit(a) @ unit(b))


def numpy(x):
    return x.detach().double().numpy()


@pytest.fixture
def learned(runner):
    """A run of three tasks, one of which brings a known class again, and what was learned from."""

    def make(labels=((3, 7), (1, 5), (0, 3)), **options):
        run = runner(build, **SMALL | options)
        run.tasks = []
        for number, each in enumerate(labels):
            run.tasks.append(run.task(list(each), seed=number))
            run.head.learn(run.tasks[-1])
            run.number += 1
        return run

    return make


# V^s


def spatial_by_hand(run, tokens, count):
    """V^s of the tiny network with adapters in its last `count` blocks, by numpy, [B, T, D]."""
    modules = run.network.modules
    state = {name: numpy(p) for name, p in run.head.state_dict().items()}
    x = numpy(tokens)
    for i in range(3):
        x = x + 0.1 * np.tanh(
            x.mean(axis=-2, keepdims=True) @ numpy(modules[f"blocks.{i}.attn"].mix)
        )
        out = x + 0.1 * np.maximum(x @ numpy(modules[f"blocks.{i}.mlp"].weight), 0)
        if 3 - i <= count:
            down, up = (state[f"adapter.{3 - i}.{name}"] for name in ("down", "up"))
            out = out + 0.1 * np.maximum(x @ down, 0) @ up
        x = out
    cls = x[:, :, 0]
    centred = cls - cls.mean(axis=-1, keepdims=True)
    return unit(centred / np.sqrt(cls.var(axis=-1, keepdims=True) + 1e-5))


@pytest.mark.parametrize(("adapters", "count"), [(0, 0), (1, 1), (2, 2), (3, 3), ("all", 3)])
def test_frames_are_those_of_the_network_with_its_adapters(learned, adapters, count):
    run = learned(adapters=adapters, bottleneck=4)
    rng = np.random.default_rng(0)
    with torch.no_grad():  # on this network training has little to do for them
        for p in run.head._spatial.parameters():
            p.add_(torch.from_numpy(rng.normal(size=p.shape)))
    tokens, _ = run.tokens([0, 3], seed=9)
    frames = numpy(run.head._spatial(run.batch(tokens)))
    np.testing.assert_allclose(frames, spatial_by_hand(run, tokens, count), atol=1e-5)
    if count:
        assert np.abs(frames - spatial_by_hand(run, tokens, count - 1)).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, ("vector",)),
        ({"feature": "pool"}, ("pool",)),
        ({"adapters": 1}, ("blocks.-1.attn:cls",)),
        ({"adapters": 2}, ("blocks.-2.attn",)),
        ({"adapters": "all"}, ("blocks.0.attn",)),
        ({"routing": "clip"}, ("vector",)),
        ({"adapters": 2, "routing": "clip"}, ("blocks.-2.attn", "vector")),
    ],
)
def test_what_is_read_is_what_comes_before_the_first_adapter(options, reads):
    head = build_head(build, options)
    assert tuple(head.reads) == reads
    assert head.fine_tunes is bool(options.get("adapters"))
    assert isinstance(head, FineTunesBackbone)
    assert isinstance(head, Routes)


# The forward


def by_hand(run, tokens, routing, softmax, count, keep=0):
    """Residuals [B, K, D], similarities, weights and nearest [B, K], scores [B, C]."""
    head = run.head
    spatial = spatial_by_hand(run, tokens, count)
    frozen = spatial_by_hand(run, tokens, 0)
    B, T, _ = spatial.shape
    K, texts = len(run.tasks), numpy(head.state_dict()["text"])
    residuals, similarities, chosen, weights = (
        np.zeros((B, K, *more)) for more in ((16,), (), (), ())
    )
    scores = np.zeros((B, len(head.classes)))
    for b in range(B):
        mean = sum(spatial[b, t] for t in range(T)) / T
        video = mean.copy()
        encoded = []
        for k in range(K):
            with torch.no_grad():
                expert_output = head.routed.experts[k](
                    torch.from_numpy(spatial[b : b + 1]).float()
                )[0]
            encoded.append(unit(numpy(expert_output)))
            if routing in ("td", "average"):
                residuals[b, k] = encoded[k] - mean
            else:
                residuals[b, k] = frozen[b].mean(axis=0) if routing == "clip" else mean
            cosines = [cosine(residuals[b, k], anchor) for anchor in numpy(head.pool.anchors(k))]
            similarities[b, k] = max(cosines)
            chosen[b, k] = head.pool.classes[k][int(np.argmax(cosines))]
        for k in range(K):
            weights[b, k] = similarities[b, k]
            if routing == "average":
                weights[b, k] = 1 / K
            greater = sum(similarities[b, other] > similarities[b, k] for other in range(K))
            kept = [
                o for o in range(K) if not keep or sum(similarities[b] > similarities[b, o]) < keep
            ]
            if keep and greater >= keep:
                weights[b, k] = 0
            elif softmax is not None:
                exps = [np.exp(similarities[b, other] / softmax) for other in kept]
                weights[b, k] = np.exp(similarities[b, k] / softmax) / sum(exps)
            video = video + weights[b, k] * encoded[k]
        scores[b] = [cosine(video, text) for text in texts]
    return residuals, similarities, weights, chosen, scores


@pytest.mark.parametrize(
    ("routing", "softmax", "adapters", "keep"),
    [(name, None, 0, 0) for name in ROUTINGS]
    + [(name, None, 1, 0) for name in ROUTINGS]
    + [("td", 0.2, 0, 0), ("clip", 0.5, 2, 0), ("td", None, 0, 1), ("td", 0.2, 1, 2)],
)
def test_routing_and_scores_are_those_of_the_equations(learned, routing, softmax, adapters, keep):
    # A hasty training keeps the experts apart, so that no two variants agree by chance.
    run = learned(
        routing=routing, softmax=softmax, adapters=adapters, keep=keep, start="random", epochs=5
    )
    tokens, _ = run.tokens([0, 3, 5], clips=2, seed=9)
    batch = run.batch(tokens)
    residuals, similarities, weights, chosen, scores = by_hand(
        run, tokens, routing, softmax, adapters, keep
    )
    np.testing.assert_allclose(run.head.residuals(batch).numpy(), residuals, atol=1e-5)
    np.testing.assert_allclose(run.scores(tokens).numpy(), scores, atol=1e-5)
    again = run.head.scores_with(batch, torch.from_numpy(weights).float())
    np.testing.assert_allclose(again.numpy(), scores, atol=1e-5)

    routes = run.head.routing(batch)
    assert (routes.weights.diff(dim=1) <= 0).all()
    assert torch.equal(routes.experts.sort(dim=1).values, torch.arange(3).expand(6, 3))
    for b in range(6):
        for rank, k in enumerate(routes.experts[b].tolist()):
            np.testing.assert_allclose(routes.weights[b, rank], weights[b, k], atol=1e-5)
            np.testing.assert_allclose(routes.similarities[b, rank], similarities[b, k], atol=1e-5)
            assert routes.nearest[b, rank] == chosen[b, k]


@pytest.mark.parametrize("adapters", [0, 1])
def test_without_experts_the_mean_frame_alone_is_compared_with_text(learned, adapters):
    run = learned(routing="none", adapters=adapters)
    tokens, _ = run.tokens([0, 3, 5], clips=2, seed=9)
    means = spatial_by_hand(run, tokens, adapters).mean(axis=1)
    texts = numpy(run.head.state_dict()["text"])
    expected = [[cosine(mean, text) for text in texts] for mean in means]
    np.testing.assert_allclose(run.scores(tokens).numpy(), expected, atol=1e-5)
    assert run.head.trainable == adapters * 2 * 16 * 64
    with pytest.raises(ValueError, match="no experts"):
        run.head.routing(run.batch(tokens))
    with pytest.raises(ValueError, match="no experts"):
        run.head.scores_with(run.batch(tokens), torch.ones(6, 3))


@pytest.mark.parametrize("adapters", [0, 1])
def test_what_decides_scores_alone_changes_nothing_of_what_is_learned(learned, adapters):
    ways = [{}, {"routing": "average"}, {"routing": "adapter"}, {"softmax": 0.1}, {"keep": 1}]
    runs = [learned(adapters=adapters, **way) for way in ways]
    states = [run.head.state_dict() for run in runs]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    for way, run in zip(ways, runs, strict=True):
        assert set(way) <= set(run.head.inference_options)
    assert "routing" not in build_head(build, dict(adapters=1, routing="clip")).inference_options
    assert "routing" not in build_head(build, dict(routing="none")).inference_options
    assert "weight" in build_head(build).inference_options
    assert "weight" not in build_head(build, dict(adapters=1)).inference_options


def test_with_a_shortlist_of_all_experts_all_run(learned):
    every, listed = learned(), learned(shortlist=3)
    tokens, _ = every.tokens([0, 3, 5], clips=2, seed=9)
    assert torch.equal(every.scores(tokens), listed.scores(tokens))


def test_with_a_shortlist_few_experts_run_and_the_rest_is_assumed(learned):
    run = learned(shortlist=1, doubt=0, start="random", epochs=5)
    tokens, _ = run.tokens([0, 3, 5], clips=2, seed=9)
    batch, head = run.batch(tokens), run.head
    ran = []
    for k, expert in enumerate(head.routed.experts):
        expert.register_forward_hook(lambda module, inputs, out, k=k: ran.append((k, len(out))))
    scores = head.scores(batch)
    assert sum(count for _, count in ran) == len(tokens)
    spatial = head._spatial(batch)
    similar = lambda encoded: head.pool.compare(encoded - spatial.mean(1)[:, None])[0]  # noqa: E731
    encoded, _ = head.routed.shortlist.encoded(spatial, 1, head.routed.encode, similar)
    weights = similar(encoded)
    video = spatial.mean(dim=1) + (weights[..., None] * encoded).sum(dim=1)
    texts = head.state_dict()["text"]
    expected = torch.nn.functional.normalize(video, dim=1) @ texts.T
    torch.testing.assert_close(scores, expected)


def test_where_two_classes_are_near_all_experts_run_after_all(learned):
    few, every = (learned(shortlist=s, start="random", epochs=5, doubt=0) for s in (1, 0))
    tokens, _ = few.tokens([0, 3, 5, 7], clips=4, seed=9)
    short, full = few.scores(tokens), every.scores(tokens)
    assert not torch.allclose(short, full)
    best = short.topk(2, dim=1).values
    gaps = best[:, 0] - best[:, 1]
    few.head.routed.config = replace(few.head.routed.config, doubt=float(gaps.median()))
    doubted = gaps < gaps.median()
    assert 0 < doubted.sum() < len(tokens)
    scores = few.scores(tokens)
    torch.testing.assert_close(scores[doubted], full[doubted])
    torch.testing.assert_close(scores[~doubted], short[~doubted])


@pytest.mark.parametrize("options", [{"shortlist": 1, "routing": "clip"}, {"keep": -1}])
def test_a_shortlist_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="give 0 or more"):
        build_head(build, options)


def test_residuals_may_be_requested_of_some_experts(learned):
    run = learned()
    batch = run.batch(run.tokens([0, 3], seed=9)[0])
    every = run.head.residuals(batch)
    torch.testing.assert_close(run.head.residuals(batch, [2, 0]), every[:, [2, 0]])


@pytest.mark.parametrize(("routing", "adapters"), [(name, 1) for name in ROUTINGS] + [("td", 0)])
def test_an_anchor_is_the_mean_of_what_is_compared_with_it(learned, routing, adapters):
    run = learned(routing=routing, adapters=adapters)
    clips = run.tasks[-1].clips
    residuals = numpy(run.head.residuals(clips[torch.arange(len(clips))]))
    assert run.head.pool.classes == [[3, 7], [1, 5], [0, 3]]
    for row, label in enumerate([0, 3]):
        class_residuals = [residuals[n, 2] for n in range(len(clips)) if clips.labels[n] == label]
        anchor = run.head.pool.anchors(2)[row]
        np.testing.assert_allclose(anchor, sum(class_residuals) / len(class_residuals), atol=1e-6)


# Learning


@pytest.mark.parametrize("adapters", [0, 1, 2, "all"])
def test_tasks_are_learned_one_after_the_other(learned, adapters):
    run = learned(adapters=adapters, labels=((3, 7), (1, 5), (0, 2)))
    tokens, labels = run.tokens([3, 7, 1, 5, 0, 2], seed=9)
    assert (run.predicted(tokens) == labels).float().mean() > 0.9
    routes = run.head.routing(run.batch(tokens))
    assert routes.experts.shape == (36, 3)


@pytest.mark.parametrize("adapters", [0, 1, 2, "all"])
def test_training_resumes_from_a_state_as_it_would_have_continued(learned, adapters):
    first = learned(adapters=adapters, labels=((3, 7), (1, 5)))
    second = learned(adapters=adapters, labels=((9,),))
    second.head.load_state_dict(first.head.state_dict())
    task = first.task([0, 3], seed=2)
    for run in (first, second):
        run.head.learn(task)
    state, resumed = first.head.state_dict(), second.head.state_dict()
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[name], resumed[name]) for name in state)
    assert first.head.trainable == second.head.trainable


def test_experts_that_have_learned_and_their_anchors_do_not_move(learned):
    run = learned(adapters=1, labels=((3, 7),))
    before = run.head.state_dict()
    run.learn([1, 3], seed=1)
    after = run.head.state_dict()
    kept = [name for name in before if name.startswith(("expert.", "anchors."))]
    assert len([name for name in kept if ".expert.0." in name]) == 2 * 3
    assert "expert.0.layers.0.qkv.weight" in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(before["adapter.1.up"], after["adapter.1.up"])


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, 0),
        ({"position": "learned"}, 3 * 4 * 16),
        ({"adapters": 2, "bottleneck": 8}, 2 * 2 * 16 * 8),
        ({"text": "codes"}, 16 * 16),
    ],
    ids=["plain", "position", "adapters", "codes"],
)
def test_trainable_counts_every_number_once(learned, options, more):
    layer = 4 * 16 * 16 + 4 * 16 + 2 * 16 * 32 + 32 + 16 + 4 * 16
    run = learned(**options)
    assert run.head.trainable == 3 * (2 * layer + 16 + 2 * 16) + more
    names = [n for n in run.head.state_dict() if n.startswith(("expert", "adapter", "text.w"))]
    assert run.head.trainable == sum(run.head.state_dict()[name].numel() for name in names)
    assert build_head(build, SMALL).trainable == 0


def test_the_loss_is_two_contrasts_at_the_start(learned):
    # A rate of nothing leaves the start, so that the loss is that of what was "learned".
    run = learned(labels=(), lr=0.0, batch_size=12)
    task, epoch_losses = run.task([3, 7]), []
    run.head.learn(
        Task(task.clips, 0, task.text, None, lambda done, epochs, loss: epoch_losses.append(loss))
    )
    clips = task.clips
    spatial = run.head._spatial.whole(clips)
    encoded = run.head.routed.experts[0](spatial)
    text = task.text[(clips.labels == 7).long()]
    expected = sum(
        losses.contrastive(side, text, clips.labels) for side in (encoded, spatial.mean(dim=1))
    )
    np.testing.assert_allclose(epoch_losses, float(expected), rtol=1e-5)


def test_epochs_of_the_first_task_and_of_later_ones(runner):
    run = runner(build, **SMALL, first_epochs=4, epochs=3)
    counts = []
    for labels in ([0, 1], [2]):
        epochs = []
        task = run.task(labels)
        on_epoch_end = lambda *epoch, epochs=epochs: epochs.append(epoch)  # noqa: E731
        run.head.learn(Task(task.clips, run.number, task.text, None, on_epoch_end))
        run.number += 1
        counts.append(len(epochs))
    assert counts == [4, 3]


# FSSD


def test_importance_is_kept_for_every_class_newest_last(learned):
    run = learned(adapters=1, eps=0.01)
    clips, text = run.tasks[-1].clips, run.tasks[-1].text
    spatial = run.head._spatial.whole(clips)
    expected = losses.importance(spatial, clips.labels, [0, 3], text, 0.01)
    assert run.head.classes == [3, 7, 1, 5, 0]
    importances = run.head.importance_CD[[4, 0]]
    np.testing.assert_allclose(importances, expected, rtol=1e-3, atol=1e-4)


def test_distillation_compares_with_the_model_before_the_task(learned, monkeypatch):
    run = learned(adapters=1, labels=((3, 7),), batch_size=5)
    task = run.task([1, 5], seed=1)
    before = run.head._spatial.whole(task.clips).mean(dim=1)
    weights = losses.weights(run.head.importance_CD)
    calls, indices, really = [], [], losses.fssd
    monkeypatch.setattr(
        losses,
        "fssd",
        lambda *arguments: calls.append([x.detach() for x in arguments]) or really(*arguments),
    )
    batches = Clips.batches
    monkeypatch.setattr(Clips, "batches", lambda self, size, rng=None: (
        (indices.append(where) if rng is not None else None) or (where, batch)
        for where, batch in batches(self, size, rng)
    ))  # fmt: skip
    run.head.learn(task)
    assert len(calls) == len(indices) == 25 * 3
    for (old, new, w), where in zip(calls, indices, strict=True):
        torch.testing.assert_close(old, before[where])
        torch.testing.assert_close(w, weights)
        assert new.shape == old.shape
    assert torch.equal(calls[0][0], calls[0][1])
    assert not torch.equal(calls[-1][0], calls[-1][1])


def drift(run, task):
    before = run.head._spatial.whole(task.clips).mean(dim=1)
    run.head.learn(task)
    return (run.head._spatial.whole(task.clips).mean(dim=1) - before).square()


def test_what_matters_to_previous_classes_drifts_less_with_distillation(learned):
    moved = {}
    for name in ("none", "uniform", "fssd"):
        run = learned(adapters="all", labels=((3, 7, 2),), distillation=name, weight=1e3)
        w = losses.weights(run.head.importance_CD)
        moved[name] = (w * drift(run, run.task([1, 5], seed=1))).mean()
    assert moved["fssd"] < moved["uniform"] < moved["none"] / 2


@pytest.mark.parametrize("options", [{}, {"adapters": 2, "scale": 0.0}])
def test_distillation_is_zero_where_the_network_does_not_move(learned, options):
    tasks = {"labels": ((3, 7), (1, 5))}
    states = [learned(weight=weight, **tasks, **options).head.state_dict() for weight in (0, 1e4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# Order


def motions(seed, clips=20):
    """Two classes that are each other backwards, as cached vectors."""
    rng = np.random.default_rng(seed)
    ends = np.random.default_rng(1).normal(size=(2, 16))
    path = np.linspace(0, 1, 4)[:, None]
    there = (1 - path) * ends[0] + path * ends[1] + 0.2 * rng.normal(size=(clips, 4, 16))
    both = torch.from_numpy(np.concatenate([there, there[:, ::-1]]).copy()).float()
    return both, torch.arange(2).repeat_interleave(clips)


@pytest.mark.parametrize(("position", "apart"), [(None, False), ("learned", True)])
def test_a_motion_and_its_reverse_are_distinguished_only_with_positions(position, apart):
    head = build_head(build, dict(**SMALL, position=position, text="codes"))
    feats, labels = motions(0)
    head.learn(Task(Clips({"vector": feats}, labels)))
    feats, labels = motions(1)
    scores = head.scores({"vector": feats})
    if apart:
        assert (scores.argmax(dim=1) == labels).float().mean() > 0.95
    else:
        torch.testing.assert_close(scores[:20], scores[20:], rtol=0, atol=1e-5)


# Text


def test_codes_depend_on_class_and_seed_alone():
    torch.testing.assert_close(code(3, 64).norm(), torch.tensor(1.0))
    assert torch.equal(code(3, 64), code(3, 64))
    assert not torch.equal(code(3, 64), code(4, 64))
    assert not torch.equal(code(3, 64), code(3, 64, seed=1))
    like = torch.zeros(1, 1, 64)
    codes, other = Codes().grown([3, 5], None, like), Codes().grown([5, 3], None, like)
    assert torch.equal(codes.rows([3, 5]), other.rows([5, 3]).flip(0))
    for first in (0, 64):
        rows = codes.rows(range(first, first + 64)).detach()
        torch.testing.assert_close(rows @ rows.T, torch.eye(64), rtol=0, atol=1e-6)
    # More classes than channels: no two alike.
    between = codes.rows(range(128)).detach() @ codes.rows(range(128)).T.detach() - torch.eye(128)
    assert float(between.abs().max()) < 0.7


def test_what_the_projection_learns_of_a_class_does_not_move_the_others():
    codes = Codes(trained="always").grown([2], None, torch.zeros(1, 1, 16))
    before = codes.rows(range(16)).detach()
    torch.manual_seed(0)
    (codes.rows([2]) @ torch.randn(16)).sum().backward()
    with torch.no_grad():
        codes.weight -= codes.weight.grad
    moved = (codes.rows(range(16)) - before).detach().abs().amax(dim=1)
    assert moved[2] > 0.1
    assert moved[torch.arange(16) != 2].max() < 1e-6


@pytest.mark.parametrize(("codes", "moves"), [("first", False), ("always", True)])
def test_the_projection_of_codes_trains_with_the_first_task_or_always(learned, codes, moves):
    run = learned(text="codes", codes=codes, labels=((3, 7),), tau=0.3, lr=0.05)
    first = run.head.state_dict()["text.weight"]
    assert not torch.equal(first, torch.eye(16))
    tokens, labels = run.tokens([3, 7], seed=9)
    assert (run.predicted(tokens) == labels).float().mean() > 0.9
    run.learn([1, 5], seed=1)
    assert torch.equal(first, run.head.state_dict()["text.weight"]) is not moves
    if moves:
        tokens, labels = run.tokens([3, 7, 1, 5], seed=9)
        assert (run.predicted(tokens) == labels).float().mean() > 0.9


def test_codes_need_no_text_and_given_text_is_required(runner):
    run = runner(build, **SMALL, text="codes")
    task = run.task([3, 7])
    run.head.learn(Task(task.clips))
    assert run.head.classes == [3, 7]
    head = build_head(build, SMALL)
    with pytest.raises(ValueError, match=r"no text features.*text='codes'"):
        head.learn(Task(task.clips))
    for text in (task.text[:, :-1], task.text[:1], task.text / 0):
        with pytest.raises(ValueError, match=r"text features .* 2 classes .* width 16"):
            head.learn(Task(task.clips, text=text))
    assert head.classes == []


def test_text_of_any_length_is_normalized(learned, runner):
    run = runner(build, **SMALL)
    task = run.task([3, 7])
    other = build_head(build, dict(**SMALL, first_epochs=25))
    run.head.learn(task)
    other.learn(Task(task.clips, text=task.text * 40))
    batch = run.batch(run.tokens([3, 7], seed=1)[0])
    torch.testing.assert_close(run.head.scores(batch), other.scores(batch), rtol=1e-3, atol=1e-4)


# Options and refusals


def test_training_in_bfloat16_learns_and_scores_in_float32(learned):
    run, plain = (learned(precision=name) for name in ("bfloat16", "float32"))
    tokens, labels = run.tokens([3, 7, 1, 5, 0], seed=9)
    assert (run.predicted(tokens) == labels).float().mean() > 0.9
    assert run.scores(tokens).dtype == torch.float32
    assert not torch.equal(run.scores(tokens), plain.scores(tokens))
    assert {tensor.dtype for tensor in run.head.state_dict().values()} == {
        torch.float32,
        torch.int64,
        torch.uint8,
    }


@pytest.mark.parametrize("lr", [1e30, float("inf")])
def test_a_training_that_diverges_changes_no_adapter_and_no_expert(learned, lr):
    run = learned(adapters=2, labels=((3, 7),))
    before = run.head.state_dict()
    run.head.optim = replace(run.head.optim, lr=lr, clip_norm=None)
    with pytest.raises(ValueError, match=r"diverged|finite"):
        run.head.learn(run.task([1, 5], seed=1))
    after = run.head.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "option",
    [
        {"position": "sine"}, {"routing": "top"}, {"distillation": "kd"}, {"text": "words"},
        {"codes": "last"}, {"schedule": "linear"}, {"precision": "float16"}, {"start": "zero"},
        {"adapters": "some"}, {"adapters": -1}, {"adapters": 1, "feature": "pool"},
    ],
    ids=str,
)  # fmt: skip
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=r"choose from|give a number|leave feature"):
        build_head(StPR, option)


def test_adapters_need_a_network_that_has_as_many_blocks(runner):
    head = build_head(build, dict(adapters=1))
    with pytest.raises(ValueError, match="attach"):
        head.learn(Task(Clips({"blocks.-1.attn:cls": torch.ones(2, 4, 16)}, torch.arange(2))))
    with pytest.raises(ValueError, match="network of 3 blocks"):
        runner(build, adapters=4)

    class Convolutions:
        stages = ("stem", "layer1.0", "pool")

    with pytest.raises(ValueError, match="network of 0 blocks"):
        build_head(build, dict(adapters="all")).attach(Convolutions())
    build_head(build).attach(Convolutions())


def test_another_number_of_frames_is_refused_where_positions_were_learned(runner):
    feats, labels = motions(0)
    for position in (None, "learned"):
        head = build_head(
            build, dict(**SMALL, position=position, text="codes", first_epochs=1, epochs=1)
        )
        head.learn(Task(Clips({"vector": feats}, labels)))
        shorter = Task(Clips({"vector": feats[:, :3]}, labels + 2), 1)
        if position is None:
            head.learn(shorter)
            assert head.scores({"vector": feats}).shape == (40, 4)
        else:
            with pytest.raises(ValueError, match="clips of 3 frames"):
                head.learn(shorter)
            assert head.classes == [0, 1]


def test_whole_tokens_where_a_class_token_is_requested_are_refused(learned):
    run = learned(adapters=1, labels=((3, 7),))
    with pytest.raises(ValueError, match="suffix of the network takes"):
        run.head.scores({"blocks.-1.attn:cls": torch.ones(2, 4, 5, 16)})


class Gated(StPR):
    def grafted(self, network, stage, adapter):
        if stage == network.find("blocks.-1.mlp"):
            return adapter
        return HFGate(adapter, 16, network.frames, prefix=1)


def test_modules_around_an_adapter_train_and_are_kept_with_it(runner):
    options = {"adapters": 2, "epochs": 3, "first_epochs": 3, "layers": 1, "ffn": 16, "lr": 0.1}
    run, plain = runner(Gated, **options), runner(StPR, **options)
    for learner in (run, plain):
        learner.learn([0, 1])
        learner.learn([2, 3], seed=1)
    assert run.head.trainable - plain.head.trainable == 18 * 16 + 1
    state = run.head.state_dict()
    assert state["adapter.2.weight"].any()
    assert state["adapter.2.inner.up"].any()
    again = runner(Gated, **options)
    again.head.load_state_dict(state)
    tokens, _ = run.tokens([0, 1, 2, 3], seed=5)
    assert torch.equal(again.scores(tokens), run.scores(tokens))
    ungated = dict(state, **{"adapter.2.weight": torch.zeros_like(state["adapter.2.weight"])})
    again.head.load_state_dict(ungated)
    assert not torch.equal(again.scores(tokens), run.scores(tokens))


def test_class_means_take_the_place_of_text(learned, runner):
    run = learned(text="means")
    head = run.head
    mean_ND = torch.nn.functional.normalize(run.tasks[0].clips.whole("vector"), dim=2).mean(dim=1)
    labels_N = run.tasks[0].clips.labels
    state, rows = head.state_dict(), dict(zip(head.classes, range(9), strict=False))
    expected = unit(numpy(mean_ND[labels_N == 7]).mean(axis=0))
    np.testing.assert_allclose(numpy(state["text"])[rows[7]], expected, atol=1e-6)
    last = run.tasks[2].clips  # class 3 came again, with other clips
    mean_ND = torch.nn.functional.normalize(last.whole("vector"), dim=2).mean(dim=1)
    expected = unit(numpy(mean_ND[last.labels == 3]).mean(axis=0))
    np.testing.assert_allclose(numpy(state["text"])[rows[3]], expected, atol=1e-6)


@pytest.mark.parametrize("routing", ["td", "adapter", "clip"])
@pytest.mark.parametrize("softmax", [None, 0.5])
def test_calibrated_weights_are_standardised_by_the_experts_own_clips(learned, routing, softmax):
    run = learned(routing=routing, softmax=softmax, calibrate=True)
    head = run.head
    batch = run.tasks[1].clips[torch.arange(4)]
    routed = head.routed
    plain = head._learned_spatial(batch)
    similarities_BK, _ = routed.similarities(batch, plain, routed.encode_all(plain))
    z = np.empty(similarities_BK.shape)
    for k, task in enumerate(run.tasks):
        clips = task.clips[torch.arange(len(task.clips))]
        spatial = head._learned_spatial(clips)
        compared = numpy(routed.compared(routing, clips, spatial, routed.encode_all(spatial)))[:, k]
        labels = task.clips.labels.numpy()
        anchors = [compared[labels == c].mean(axis=0) for c in task.classes]
        r = [max(cosine(x, anchor) for anchor in anchors) for x in compared]
        z[:, k] = (numpy(similarities_BK)[:, k] - np.mean(r)) / np.std(r)
    e = np.exp(z / (softmax or 1.0))
    weights = e / e.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(numpy(routed.weights(similarities_BK)), weights, atol=1e-4)
    again = build_head(build, SMALL | dict(routing=routing, softmax=softmax, calibrate=True))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.scores(batch), head.scores(batch))
