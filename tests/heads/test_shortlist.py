"""The shortlist against loops in float64: residuals kept and assumed, experts run, weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import normalize

from varve.heads.parts.anchor_pool import AnchorPool
from varve.heads.parts.shortlist import Shortlist, common_error, run, weights

T, D = 3, 6


def unit(x):
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True))


class Experts:
    """A linear map of a clip's frames each; counts the clips that each ran on."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        self.maps = [rng.normal(size=(T * D, D)) for _ in range(count)]
        self.ran = dict.fromkeys(range(count), 0)

    def by_hand(self, k, clip_TD):
        return unit(np.asarray(clip_TD, np.float64).reshape(-1) @ self.maps[k])

    def __call__(self, k, clips_BTD):
        self.ran[k] += len(clips_BTD)
        return normalize(clips_BTD.flatten(1) @ torch.from_numpy(self.maps[k]).float(), dim=1)


def drawn(seed, sizes, clips=5):
    """Return unit frames [N, T, D], labels and classes of each task."""
    rng = np.random.default_rng(seed)
    out, label = [], 0
    for size in sizes:
        classes = list(range(label, label + size))
        label += size
        labels = torch.tensor(rng.permutation(np.repeat(classes, clips)))
        centres = np.random.default_rng(9).normal(size=(99, T, D))
        cells = unit(centres[labels] + 0.5 * rng.normal(size=(len(labels), T, D)))
        out.append((torch.from_numpy(cells.astype(np.float32)), labels, classes))
    return out


def learned(tasks, experts, shortlist=None):
    shortlist = shortlist or Shortlist()
    for task in tasks:
        shortlist.add(*task, experts)
    return shortlist


def pooled(tasks, experts):
    """Anchors as StPR has them: the mean residual of each class's clips."""
    pool = AnchorPool(D)
    for k, (clips, labels, classes) in enumerate(tasks):
        residuals = experts(k, clips) - clips.mean(dim=1)
        pool.add(k, classes, torch.stack([residuals[labels == c].mean(dim=0) for c in classes]))
    return pool


def mean_clips(tasks):
    """Return the mean clips of all classes, in the order in which they were learned."""
    return [
        sum(np.float64(x) for x in clips[labels == c].numpy()) / int((labels == c).sum())
        for clips, labels, classes in tasks
        for c in classes
    ]


@pytest.mark.parametrize("sizes", [(1,), (2, 3, 1, 2)])
def test_every_expert_runs_once_on_every_mean_clip(sizes):
    tasks, experts = drawn(0, sizes), Experts(len(sizes))
    shortlist = learned(tasks, experts)
    assert len(shortlist) == len(sizes)
    residuals = shortlist.residuals_CKD
    assert residuals.shape == (sum(sizes), len(sizes), D)
    for c, clip in enumerate(mean_clips(tasks)):
        for k in range(len(sizes)):
            expected = experts.by_hand(k, clip) - clip.mean(axis=0)
            np.testing.assert_allclose(residuals[c, k], expected, atol=1e-6)
    # Each once, and none of them anew when a task is added.
    assert experts.ran == dict.fromkeys(range(len(sizes)), sum(sizes))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_few_experts_run_and_the_others_are_assumed(size):
    sizes = (2, 3, 1, 2, 2)
    tasks, experts = drawn(0, sizes), Experts(5)
    shortlist, pool = learned(tasks, experts), pooled(tasks, experts)
    queries = torch.cat([clips for clips, _, _ in drawn(1, sizes, clips=2)])
    experts.ran = dict.fromkeys(range(5), 0)

    def similar(encoded_BKD):
        return pool.compare(encoded_BKD - queries.mean(dim=1, keepdim=True))[0]

    encoded, ran = shortlist.encoded(queries, size, experts, similar)
    assert encoded.shape == (len(queries), 5, D)
    assert ran.shape == (len(queries), min(size, 5))
    assert sum(experts.ran.values()) == ran.numel()

    means = mean_clips(tasks)
    rows = [unit(clip.reshape(-1)) for clip in means]
    for b, clip in enumerate(np.float64(queries.numpy())):
        near = max(range(len(rows)), key=lambda c: unit(clip.reshape(-1)) @ rows[c])
        tem = [experts.by_hand(k, means[near]) - means[near].mean(axis=0) for k in range(5)]
        loud = []
        for k in range(5):
            anchors = unit(np.float64(pool.anchors(k).numpy()))
            loud.append((-(anchors @ unit(tem[k])).max(), k))
        expected = [k for _, k in sorted(loud)[:size]]
        assert ran[b].tolist() == expected
        assumed = [clip.mean(axis=0) + tem[k] for k in range(5)]
        errors = [experts.by_hand(k, clip) - assumed[k] for k in expected]
        mean = sum(errors) / len(errors)
        scatter = sum(((e - mean) ** 2).sum() for e in errors) / len(errors)
        scatter = scatter / (len(errors) - 1) if len(errors) > 1 else np.inf
        common = max(0, 1 - scatter / (mean**2).sum()) * mean
        for k in range(5):
            expected_encoding = experts.by_hand(k, clip) if k in expected else assumed[k] + common
            np.testing.assert_allclose(encoded[b, k], expected_encoding, atol=2e-6)


def test_with_all_experts_on_the_shortlist_nothing_is_assumed():
    tasks, experts = drawn(0, (2, 2, 2)), Experts(3)
    shortlist = learned(tasks, experts)
    queries = drawn(1, (6,))[0][0]
    encoded, ran = shortlist.encoded(queries, 3, experts, lambda e: e[..., 0])
    everyone = torch.stack([experts(k, queries) for k in range(3)], dim=1)
    assert torch.equal(encoded, everyone)
    assert ran.sort().values.tolist() == [[0, 1, 2]] * len(queries)


def test_what_errors_share_is_their_mean_as_far_as_they_agree():
    rng = np.random.default_rng(0)
    shared = torch.from_numpy(rng.normal(size=(4, 1, 50)))
    noise = torch.from_numpy(rng.normal(size=(4, 8, 50)))
    torch.testing.assert_close(common_error(shared.expand(-1, 8, -1)), shared)
    assert torch.equal(common_error(noise[:, :1]), torch.zeros(4, 1, 50, dtype=torch.float64))
    assert torch.equal(common_error(torch.zeros(4, 8, 50)), torch.zeros(4, 1, 50))
    # Scattered errors share less than their mean, and nearer to what they share in truth.
    common, plain = common_error(shared + 5 * noise), (shared + 5 * noise).mean(dim=1, keepdim=True)
    assert ((common - shared).norm(dim=2) < (plain - shared).norm(dim=2)).all()


def test_a_shortlist_resumes_from_its_state():
    tasks, experts = drawn(0, (2, 3, 1, 2)), Experts(4)
    whole, first = learned(tasks, experts), learned(tasks[:3], experts)
    saved = first.state_dict()
    again = Shortlist()
    again.load_state_dict(load(save(saved)))
    before = {name: tensor.clone() for name, tensor in saved.items()}
    for tensor in saved.values():
        tensor.zero_()
    for shortlist in (first, again):
        learned(tasks[3:], experts, shortlist)
        state = shortlist.state_dict()
        assert state.keys() == whole.state_dict().keys()
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in state.items())
        # What was learned before stays as it was: a checkpoint has it already.
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    queries = drawn(1, (6,))[0][0]
    results = [
        shortlist.encoded(queries, 2, experts, lambda e: e[..., 0]) for shortlist in (again, whole)
    ]
    assert all(torch.equal(*parts) for parts in zip(*results, strict=True))
    again.load_state_dict({})
    assert len(again) == 0


def test_what_was_learned_outlives_the_tensors_it_came_from():
    tasks, experts = drawn(0, (2, 2)), Experts(2)
    shortlist = learned(tasks, experts)
    queries = drawn(1, (4,))[0][0]
    before, _ = shortlist.encoded(queries, 1, experts, lambda e: e[..., 0])
    for clips, labels, _ in tasks:
        clips.zero_()
        labels.zero_()
    assert torch.equal(shortlist.encoded(queries, 1, experts, lambda e: e[..., 0])[0], before)


def test_an_expert_runs_once_and_only_where_it_is_requested():
    spatial = torch.randn(5, T, D, generator=torch.Generator().manual_seed(0))
    experts = torch.tensor([[0, 7], [7, 3], [3, 0], [0, 3], [7, 0]])
    calls = []

    def encode(k, clips):
        calls.append((k, len(clips)))
        return clips.sum(dim=1) * (k + 1)

    encoded = run(encode, spatial, experts)
    assert sorted(calls) == [(0, 4), (3, 3), (7, 3)]
    for b in range(5):
        for s in range(2):
            k = int(experts[b, s])
            assert torch.equal(encoded[b, s], encode(k, spatial[b : b + 1])[0])
    assert run(encode, spatial[:0], experts[:0]).shape == (0, 2, D)


@pytest.mark.parametrize("softmax", [None, 0.1])
@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_weights_are_of_the_kept(softmax, keep):
    similarities = torch.tensor([[0.5, -0.2, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1], [-1, -0.5, 0, -0.2]])
    outputs = weights(similarities, softmax, keep)
    for row, out in zip(similarities.double().tolist(), outputs, strict=True):
        order = sorted(range(4), key=lambda s: (-row[s], s))[: keep or 4]
        powers = [np.exp(row[s] / softmax) if softmax else row[s] for s in range(4)]
        whole = sum(powers[s] for s in order) if softmax else 1
        expected = [powers[s] / whole if s in order else 0 for s in range(4)]
        np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    tasks, experts = drawn(0, (2, 2)), Experts(3)
    shortlist = learned(tasks, experts)
    before = shortlist.state_dict()
    with pytest.raises(ValueError, match=r"of 0 experts.*one run at least"):
        Shortlist().encoded(torch.ones(1, T, D), 1, experts, lambda e: e[..., 0])
    with pytest.raises(ValueError, match="one run at least"):
        shortlist.encoded(torch.ones(1, T, D), 0, experts, lambda e: e[..., 0])
    with pytest.raises(ValueError, match="number of frames"):
        shortlist.encoded(torch.ones(1, T + 1, D), 1, experts, lambda e: e[..., 0])
    with pytest.raises(ValueError, match="not finite"):
        shortlist.encoded(torch.ones(1, T, D) / 0, 1, experts, lambda e: e[..., 0])
    longer, none = torch.ones(1, T + 1, D), torch.ones(1, T, D) / 0
    for clips, message in ((longer, "number of frames"), (none, "not finite")):
        with pytest.raises(ValueError, match=message):
            shortlist.add(clips, torch.tensor([9]), [9], experts)
    assert len(shortlist) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in shortlist.state_dict().items())
    for options in ({"keep": -1}, {"softmax": 0.0}):
        with pytest.raises(ValueError, match="temperature above 0"):
            weights(torch.ones(1, 2), **options)
