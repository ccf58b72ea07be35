"""StPR's losses against their equations by loops in float64."""

import numpy as np
import pytest
import torch

from varve.heads.parts import losses


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensor(x):
    return torch.from_numpy(np.asarray(x))


def contrastive_by_hand(clips, text, labels, tau, eps):
    clips, text = unit(clips), unit(text)
    B = len(labels)
    S = np.array([[clips[i] @ text[j] for j in range(B)] for i in range(B)])

    def one_way(S):
        total = 0.0
        for i in range(B):
            logits = S[i] / tau
            log_sum = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            same = [j for j in range(B) if labels[j] == labels[i]]
            total -= sum(logits[j] - log_sum for j in same) / (len(same) + eps)
        return total / B

    return (one_way(S) + one_way(S.T)) / 2


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [0, 1, 0, 1, 1], [7, 7, 7, 7, 7], [2]])
@pytest.mark.parametrize(("tau", "eps"), [(0.01, 1e-8), (0.5, 0.3)])
def test_the_contrast_is_that_of_equation_six(labels, tau, eps):
    B = len(labels)
    clips, text = draw(B, 6), draw(10, 6, seed=1)[labels]
    loss = losses.contrastive(tensor(clips), tensor(text), torch.tensor(labels), tau, eps)
    expected = contrastive_by_hand(clips, text, labels, tau, eps)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-10)


def test_the_mask_counts_each_clip_of_the_class_as_a_positive():
    text = unit(draw(2, 6, seed=1))
    labels = torch.tensor([0, 0, 1, 1])
    right = losses.contrastive(tensor(text[[0, 0, 1, 1]]), tensor(text[labels]), labels)
    # The best that can be: each half of the batch shares its row evenly.
    np.testing.assert_allclose(float(right), np.log(2), atol=1e-6)
    wrong = losses.contrastive(tensor(text[[1, 1, 0, 0]]), tensor(text[labels]), labels)
    assert wrong > 10 * right


def importance_by_hand(frames, labels, classes, text, eps):
    N, T, D = frames.shape
    out = np.zeros((len(classes), D))
    for row, label in enumerate(classes):
        for j in range(D):
            values = [frames[n, t, j] for n in range(N) if labels[n] == label for t in range(T)]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            out[row, j] = text[row, j] * mean / (variance + eps)
    return out


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_importance_is_text_times_mean_over_variance(eps):
    frames, labels = unit(draw(7, 3, 5)), np.array([4, 2, 2, 4, 9, 2, 4])
    classes, text = [2, 4, 9], unit(draw(3, 5, seed=1))
    importances = losses.importance(tensor(frames), tensor(labels), classes, tensor(text), eps)
    expected = importance_by_hand(frames, labels, classes, text, eps)
    np.testing.assert_allclose(importances.numpy(), expected, rtol=1e-9)


def test_importance_of_a_channel_that_hardly_varies_is_exact_in_float32():
    frames = np.float32(1) + np.float32(1e-3) * unit(draw(40, 3, 5)).astype(np.float32)
    labels, text = np.zeros(40, int), unit(draw(1, 5, seed=1))
    importances = losses.importance(tensor(frames), tensor(labels), [0], tensor(text).float())
    expected = importance_by_hand(frames.astype(np.float64), labels, [0], text, 1e-6)
    assert importances.dtype == torch.float32
    np.testing.assert_allclose(importances.numpy(), expected, rtol=1e-5)


def test_weights_are_clamped_for_each_class_and_then_averaged():
    I = np.array([[1.0, -3.0, 0.5], [-2.0, -1.0, 4.0]])  # noqa: E741
    expected = [sum(max(I[c, j], 0) for c in range(2)) / 2 for j in range(3)]
    assert expected == [0.5, 0.0, 2.25]
    np.testing.assert_allclose(losses.weights(tensor(I)).numpy(), expected)


def test_uniform_weights_have_the_mean_of_the_others_and_none_is_zero():
    I = tensor(draw(4, 9))  # noqa: E741
    fssd, uniform, none = (losses.weights(I, name) for name in ("fssd", "uniform", "none"))
    assert len(set(uniform.tolist())) == 1
    np.testing.assert_allclose(float(uniform.mean()), float(fssd.mean()), rtol=1e-12)
    assert (fssd >= 0).all()
    assert not none.any()
    with pytest.raises(ValueError, match="choose from fssd, uniform, none"):
        losses.weights(I, "channel")


def test_fssd_is_the_weighted_mean_of_squares_over_clips_and_channels():
    old, new, w = draw(4, 5), draw(4, 5, seed=1), np.abs(draw(5, seed=2))
    total = sum(w[j] * (old[b, j] - new[b, j]) ** 2 for b in range(4) for j in range(5))
    loss = losses.fssd(tensor(old), tensor(new), tensor(w))
    np.testing.assert_allclose(float(loss), total / 20, rtol=1e-12)
    assert losses.fssd(tensor(old), tensor(old), tensor(w)) == 0
