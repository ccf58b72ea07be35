"""The shortlist against loops: descriptors, the experts asked, what runs, the weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from heads.parts.shortlist import FORMS, Shortlist, descriptor, run, weights


def described(clip_TD, form):
    frames = [np.array(frame, np.float64) for frame in clip_TD]
    if form == "motion":
        frames = [frame - sum(frames) / len(frames) for frame in frames]
    row = np.concatenate(frames)
    length = np.sqrt((row * row).sum())
    return row / length if length else row


def cosine(a, b):
    norms = np.sqrt((a * a).sum() * (b * b).sum())
    return np.float32((a * b).sum() / norms) if norms else np.float32(0)


def drawn(seed, sizes, frames=3, width=4, clips=5):
    """Of each expert: clips [N, T, D], their labels, its classes."""
    rng = np.random.default_rng(seed)
    out, label = [], 0
    for size in sizes:
        classes = list(range(label, label + size))
        label += size
        labels = torch.tensor(rng.permutation(np.repeat(classes, clips)))
        centres = rng.normal(size=(label, frames, width))
        cells = centres[labels] + 0.5 * rng.normal(size=(len(labels), frames, width))
        out.append((torch.from_numpy(cells.astype(np.float32)), labels, classes))
    return out


def learned(tasks, form="order"):
    shortlist = Shortlist(form)
    for task in tasks:
        shortlist.add(*task)
    return shortlist


@pytest.mark.parametrize("form", FORMS)
def test_descriptors_are_frames_in_order(form):
    clips = drawn(0, [2])[0][0]
    for clip, row in zip(clips, descriptor(clips, form), strict=True):
        np.testing.assert_allclose(row, described(clip.numpy(), form), atol=1e-6)
    same, turned = descriptor(clips, form), descriptor(clips.flip(1), form)
    assert (same * turned).sum(dim=1).max() < 0.99


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(1,), (2, 2, 2, 2), (9, 1, 1, 3, 1)])
def test_the_experts_of_the_nearest_class_means_are_asked(form, sizes):
    tasks = drawn(0, sizes)
    shortlist = learned(tasks, form)
    asked = torch.cat([clips for clips, _, _ in drawn(1, sizes)])
    for size in (1, 2, len(sizes), 100):
        expected = []
        for clip in asked.numpy():
            best = []
            for k, (clips, labels, classes) in enumerate(tasks):
                near = []
                for c in classes:
                    own = [described(x, form) for x in clips[labels == c].numpy()]
                    near.append(cosine(described(clip, form), sum(own) / len(own)))
                best.append((-max(near), k))
            expected.append([k for _, k in sorted(best)[:size]])
        found = shortlist.ask(asked, size)
        assert found.tolist() == expected
        assert found.dtype == torch.int64


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_shortlist_has_as_many_different_experts_as_asked(data):
    # One expert with all the nearest classes must not crowd out the others.
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    shortlist = learned(drawn(data.draw(st.integers(0, 99)), sizes, clips=1))
    size = data.draw(st.integers(1, 9))
    found = shortlist.ask(torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 4))), size)
    assert found.shape == (4, min(size, len(sizes)))
    assert all(len(set(row)) == len(row) for row in found.tolist())


def test_a_shortlist_goes_on_from_its_state():
    tasks = drawn(0, (2, 3, 1, 2))
    whole, first = learned(tasks), learned(tasks[:2])
    state = load(save(first.state_dict()))
    again = Shortlist()
    again.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    for task in tasks[2:]:
        again.add(*task)
    asked = drawn(1, (6,))[0][0]
    assert torch.equal(again.ask(asked, 3), whole.ask(asked, 3))
    assert all(torch.equal(again.state_dict()[n], t) for n, t in whole.state_dict().items())
    # Of nothing: it forgets.
    again.load_state_dict(Shortlist().state_dict())
    assert len(again) == 0


def test_only_the_experts_asked_run_and_only_on_the_clips_that_ask():
    spatial = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    asked = torch.tensor([[0, 7], [7, 3], [3, 0], [0, 3], [7, 0]])
    ran = {}

    def encode(k, clips):
        ran[k] = len(clips)
        return clips.sum(dim=1) * (k + 1)

    encoded = run(encode, spatial, asked)
    assert ran == {0: 4, 3: 3, 7: 3}
    for b in range(5):
        for s in range(2):
            k = int(asked[b, s])
            assert torch.equal(encoded[b, s], encode(k, spatial[b : b + 1])[0])
    assert run(encode, spatial[:0], asked[:0]).shape == (0, 2, 4)


@pytest.mark.parametrize("softmax", [None, 0.1])
@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_weights_are_of_the_kept(softmax, keep):
    similarities = torch.tensor([[0.5, -0.2, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1], [-1, -0.5, 0, -0.2]])
    found = weights(similarities, softmax, keep)
    for row, out in zip(similarities.double().tolist(), found, strict=True):
        order = sorted(range(4), key=lambda s: (-row[s], s))[: keep or 4]
        powers = [np.exp(row[s] / softmax) if softmax else row[s] for s in range(4)]
        whole = sum(powers[s] for s in order) if softmax else 1
        expected = [powers[s] / whole if s in order else 0 for s in range(4)]
        np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="choose from order, motion"):
        Shortlist("mean")
    with pytest.raises(ValueError, match="choose from order, motion"):
        descriptor(torch.ones(1, 2, 3), "mean")
    with pytest.raises(ValueError, match="of 0 experts"):
        Shortlist().ask(torch.ones(1, 3, 4), 1)
    shortlist = learned(drawn(0, (2, 2)))
    with pytest.raises(ValueError, match="one at least"):
        shortlist.ask(torch.ones(1, 3, 4), 0)
    with pytest.raises(ValueError, match="number of frames"):
        shortlist.ask(torch.ones(1, 5, 4), 1)
    with pytest.raises(ValueError, match="number of frames"):
        shortlist.add(torch.ones(1, 5, 4), torch.tensor([9]), [9])
    with pytest.raises(ValueError, match="not finite"):
        shortlist.add(torch.ones(1, 3, 4) / 0, torch.tensor([9]), [9])
    assert len(shortlist) == 2
    for options in ({"keep": -1}, {"softmax": 0.0}):
        with pytest.raises(ValueError, match="temperature above 0"):
            weights(torch.ones(1, 2), **options)
