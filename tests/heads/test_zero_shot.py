"""Zero-shot against the same computation by hand."""

import numpy as np
import pytest
import torch

from varve.heads import Task
from varve.heads.closed_form.zero_shot import ZeroShot
from varve.heads.parts.clips import Clips


def draw(*shape, seed=0):
    return np.random.default_rng([seed, len(shape)]).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def learn(head, labels, text, width=5):
    feats = torch.from_numpy(draw(len(labels), 3, width))
    head.learn(Task(Clips({"vector": feats}, torch.tensor(labels)), text=torch.from_numpy(text)))


def test_scores_are_cosines_of_the_mean_unit_frame_to_the_text():
    head, text, clips = ZeroShot(), 3 * draw(4, 5), 20 * draw(6, 3, 5, seed=1)
    learn(head, [7, 2], text[:2])
    learn(head, [9, 5, 9], text[2:])
    assert head.classes == [2, 7, 5, 9]
    expected = np.zeros((6, 4))
    for b in range(6):
        mean = sum(unit(frame.astype(np.float64)) for frame in clips[b]) / 3
        for c in range(4):
            expected[b, c] = unit(mean) @ unit(text[c].astype(np.float64))
    scores = head.scores({"vector": torch.from_numpy(clips)})
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    reversed_clips = head.scores({"vector": torch.from_numpy(clips).flip(1)})
    torch.testing.assert_close(reversed_clips, scores)


def test_a_class_that_comes_again_takes_its_new_text():
    head, text = ZeroShot(), draw(3, 5)
    learn(head, [0, 1], text[:2])
    learn(head, [1], text[2:])
    clip = torch.from_numpy(text[2]).expand(1, 3, 5)
    torch.testing.assert_close(head.scores({"vector": clip})[0, 1], torch.tensor(1.0))


def test_without_text_the_next_move_is_named():
    clips = Clips({"vector": torch.ones(2, 3, 5)}, torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"no text tower: use one that has .* or a head that learns"
    ):
        ZeroShot().learn(Task(clips))


def test_text_of_another_space_is_refused():
    with pytest.raises(ValueError, match="both from the joint space"):
        learn(ZeroShot(), [0, 1], draw(2, 4))
