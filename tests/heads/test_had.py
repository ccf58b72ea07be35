"""HAD: its attention against float64, its losses by their parts, and where gradients end."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from varve.heads import build_head
from varve.heads.had import HAD, HAM, HDM
from varve.heads.parts.hybrid_attention import Hybrid

SMALL = {"width": 8, "heads": 2, "ffn": 12, "batch_size": 64}


def learned(runner, tasks=2, **options):
    run = runner(HAD, **SMALL | {"epochs": 2, "first_epochs": 3, "budget": 6} | options)
    for number, labels in enumerate(([4, 2], [7, 9])[:tasks]):
        run.learn(labels, seed=number)
    return run


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def normed(x, weight=1.0, bias=0.0):
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def attended(state, name, x_SW, other_SW, heads=2):
    """Multi-head attention of one clip, head by head."""
    W = x_SW.shape[1]
    weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
    q, k, v = (
        inputs @ weight[a : a + W].T + bias[a : a + W]
        for inputs, a in ((x_SW, 0), (other_SW, W), (other_SW, 2 * W))
    )
    size = W // heads
    parts = []
    for h in range(heads):
        of = slice(h * size, (h + 1) * size)
        parts.append(softmax(q[:, of] @ k[:, of].T / size**0.5) @ v[:, of])
    out = np.concatenate(parts, axis=1)
    return out @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def test_the_attention_is_its_equations():
    model = Hybrid([5, 3], 4, width=8, heads=2, ffn=12, position="learned", seed=1).double()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases, too, are to matter
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    rng = np.random.default_rng(0)
    features = [3 + 2 * rng.normal(size=(2, 4, width)) for width in (5, 3)]
    model.standardize([torch.from_numpy(x) for x in features])
    with torch.no_grad():
        outputs = model([torch.from_numpy(x) for x in features]).numpy()
    for b in range(2):
        z = []
        for m, x in enumerate(features):
            flat = x.reshape(-1, x.shape[2])
            deviation = np.sqrt(flat.var(axis=0) + 0.01 * flat.var(axis=0).mean())
            projected = (x[b] - flat.mean(axis=0)) / deviation @ state[f"project.{m}.weight"].T
            projected = projected + state[f"project.{m}.bias"]
            z.append(projected + state["position"])
        means = []
        for m in (0, 1):
            name = f"attend.{m}"
            self_attention = attended(state, f"{name}.own", z[m], z[m])
            cross = attended(state, f"{name}.cross", z[m], z[1 - m])
            norm, last_norm = (
                (state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"])
                for layer in ("norm", "last_norm")
            )
            h = normed(z[m] + self_attention + cross, *norm)
            inner = h @ state[f"{name}.ffn.0.weight"].T + state[f"{name}.ffn.0.bias"]
            inner = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy()
            out = inner @ state[f"{name}.ffn.2.weight"].T + state[f"{name}.ffn.2.bias"]
            means.append(normed(h + out, *last_norm).mean(axis=0))
        expected = np.concatenate(means) @ state["fuse.weight"].T + state["fuse.bias"]
        np.testing.assert_allclose(outputs[b], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("position", [None, "learned"])
def test_without_positions_a_clip_is_the_set_of_its_segments(runner, position):
    run = learned(runner, position=position)
    tokens, _ = run.tokens([2, 9], seed=5)
    scores, reversed_ = run.scores(tokens), run.scores(tokens.flip(1))
    assert torch.allclose(scores, reversed_, atol=1e-5) == (position is None)


@pytest.mark.parametrize("position", [None, "learned"])
def test_what_is_drawn_is_the_seeds(position):
    states = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        states.append(Hybrid((6, 4), 3, 8, 2, 8, position, seed=5).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert ("position" in states[0]) == (position is not None)
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_both_modalities_change_the_scores(runner):
    run = learned(runner)
    batch = run.batch(run.tokens([2, 9], seed=5)[0])
    whole = run.head.scores(batch)
    for name in ("vector", "sound"):
        assert not torch.allclose(run.head.scores({**batch, name: batch[name].flip(0)}), whole)


def test_a_first_task_has_nothing_to_distill_and_nothing_to_augment(runner):
    plain, whole = (learned(runner, 1, parts=parts) for parts in ("", "+".join((*HAM, *HDM))))
    states = [run.head.state_dict() for run in (plain, whole)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


@pytest.mark.parametrize("part", [*HAM, *HDM])
def test_each_part_moves_the_second_task(runner, part):
    plain, other = (learned(runner, parts=parts) for parts in ("", part))
    tokens, _ = plain.tokens([2, 9], seed=5)
    assert not torch.equal(plain.scores(tokens), other.scores(tokens))


@pytest.mark.parametrize("part", HAM)
def test_noise_is_seen_by_the_part_behind_its_level_alone(runner, part):
    head = (run := learned(runner)).head
    head.parts = {part}
    features = head._features(run.batch(run.tokens([2, 9], seed=5)[0]))
    segments = head._model.hybrid.segments(features)
    fused = head._model.hybrid(features)
    columns = torch.zeros(len(fused), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    loss = head._augmented(head._model, segments, fused, columns, generator)
    names, parameters = zip(*head._model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    moved = {name for name, slope in zip(names, slopes, strict=True) if slope is not None}
    behind = {name for name in names if name.startswith(("hybrid.attend", "hybrid.fuse"))}
    assert moved == (behind if part == "low" else {"classifier.weight", "classifier.scale"})


def test_noise_of_no_size_gives_the_loss_of_the_clips(runner):
    head = (run := learned(runner, alpha=0.0)).head
    features = head._features(run.batch(run.tokens([2, 9], seed=5)[0]))
    model, columns = head._model, torch.arange(len(features[0])) % 4
    with torch.no_grad():
        segments, fused = model.hybrid.segments(features), model.hybrid(features)
        loss = head._augmented(model, segments, fused, columns, torch.Generator())
        expected = 2 * cross_entropy(model(features), columns)
    torch.testing.assert_close(loss, expected)


def test_noise_is_as_large_as_a_dimension_deviates(runner):
    head = learned(runner, 1, alpha=0.5).head
    z = torch.randn(3000, 4, 8, generator=torch.Generator().manual_seed(3))
    z = z * torch.arange(8) + 5
    moved = head._noisy(z, torch.Generator().manual_seed(4)) - z
    torch.testing.assert_close(moved.std(dim=(0, 1)), 0.5 * torch.arange(8.0), rtol=0.04, atol=0)


def test_tuning_trains_the_classifier_alone_on_as_many_exemplars_a_class(runner):
    """A step of SGD from the classifier that training left, in float64."""
    plain = learned(runner, budget=3, shared=False)
    tuned = learned(runner, budget=3, shared=False, tune_epochs=1, tune_lr=0.1)
    before, after = (run.head.state_dict() for run in (plain, tuned))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name != "model.classifier.weight"), name
    head, rows = plain.head, plain.head.exemplars
    assert torch.equal(rows, tuned.head.exemplars)
    assert len(rows) == 3 * len(head.classes)
    tokens = torch.stack([plain.seen[row][0] for row in rows.tolist()])
    x_MW = head._model.hybrid(head._features(plain.batch(tokens))).detach().double()
    columns_M = torch.tensor([head.classes.index(plain.seen[row][1]) for row in rows.tolist()])
    weight = before["model.classifier.weight"].double().requires_grad_()
    unit_CW, unit_MW = (x / x.norm(dim=1, keepdim=True) for x in (weight[:, 0], x_MW))
    scores_MC = before["model.classifier.scale"].double() * unit_MW @ unit_CW.T
    loss = (scores_MC.logsumexp(dim=1) - scores_MC[range(len(rows)), columns_M]).mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = (weight - 0.1 * gradient).detach().float()
    torch.testing.assert_close(after["model.classifier.weight"], expected, rtol=1e-4, atol=1e-6)


def test_a_first_task_and_one_without_exemplars_are_not_tuned(runner):
    for tasks, options in [(1, {}), (2, {"budget": 0, "parts": ""})]:
        plain, tuned = (
            learned(runner, tasks, tune_epochs=n, **options).head.state_dict() for n in (0, 3)
        )
        assert all(torch.equal(plain[name], tuned[name]) for name in plain)


def test_gaussians_are_of_the_task_that_brought_the_class(runner):
    run = learned(runner, 1)
    before = run.head.state_dict()
    tokens, labels = run.tokens([4, 2], seed=0)
    vectors = run.head._vectors(run.head._model, run.clips(tokens, labels)).double()
    for column, label in enumerate(run.head.classes):
        of = vectors[labels == label]
        torch.testing.assert_close(before["means"][column].double(), of.mean(0), atol=1e-5, rtol=0)
        deviations = before["deviations"][column].double()
        torch.testing.assert_close(deviations, of.std(0, correction=0), atol=1e-5, rtol=0)
    run.learn([7, 9], seed=1)
    after = run.head.state_dict()
    assert after["means"].shape == (4, 8)
    assert torch.equal(after["means"][:2], before["means"])
    assert torch.equal(after["deviations"][:2], before["deviations"])


@pytest.mark.parametrize(
    "options",
    [{"parts": "low+middle"}, {"alpha": -1.0}, {"temperature": 0.0}, {"width": 10, "heads": 4},
     {"position": "sine"}, {"heads": 0}, {"logical": float("nan")}],
)  # fmt: skip
def test_options_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build_head(HAD, options)


def test_another_number_of_segments_is_refused(runner):
    run = learned(runner, 1)
    batch = run.batch(run.tokens([2], seed=5)[0])
    with pytest.raises(ValueError, match="learned before were"):
        run.head.scores({name: x[:, :2] for name, x in batch.items()})
