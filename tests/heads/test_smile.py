"""SMILE's loss and vCLIMB's consistency, against small computations in numpy."""

import numpy as np
import pytest
import torch

from varve.heads import Task, build_head
from varve.heads.bic import BiC
from varve.heads.icarl import ICaRL
from varve.heads.parts import models
from varve.heads.parts.clips import Clips, kept_frames
from varve.heads.smile import SMILE, still

T, D, B = 8, 6, 10


def draw(seed=0):
    rng = np.random.default_rng(seed)
    feats = rng.normal(size=(B, T, D)).astype(np.float32)
    return torch.from_numpy(feats), torch.arange(B) % 2


def logits(model, feats):
    """Outputs of the linear classifier on the mean of the frames, in float64."""
    x = feats.double().mean(dim=1).numpy()
    x = 16 * x / np.linalg.norm(x, axis=1, keepdims=True)
    classifier = model.classifier
    return x @ classifier.weight.detach().double().numpy().T + classifier.bias.detach().numpy()


def mean_cross_entropy(outputs, labels):
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean()


def training_of(head, feats, labels):
    """The training of a head after it has learned, with a trained classifier."""
    clips = Clips({"vector": feats}, labels)
    head.learn(Task(clips))
    return models.Training(Task(clips), [0, 1], clips, head._model, np.random.default_rng(7))


def test_the_loss_is_that_of_clips_and_of_their_single_frames():
    feats, labels = draw()
    head = build_head(SMILE, {"still": 0.3})
    training = training_of(head, feats, labels)
    loss = float(head.loss(training, {"vector": feats}, labels).detach())
    chosen = (np.random.default_rng(7).random(B) * T).astype(int)
    single = feats[torch.arange(B), chosen][:, None]
    parts = [mean_cross_entropy(logits(training.model, x), labels.numpy()) for x in (feats, single)]
    np.testing.assert_allclose(loss, 0.7 * parts[0] + 0.3 * parts[1], rtol=1e-5)
    assert len(set(chosen.tolist())) > 3


def test_a_still_clip_repeats_one_frame_of_each_clip():
    feats, _ = draw()
    drawn = torch.linspace(0, 0.999, B)
    stills = still({"vector": feats}, drawn)["vector"]
    for n in range(B):
        assert torch.equal(stills[n], feats[n, int(drawn[n] * T)].expand(T, D))


def test_the_default_memory_has_the_frames_of_five_clips_of_eight():
    feats, labels = draw()
    config = SMILE()._exemplars.config
    assert config.budget * config.exemplar_frames == 5 * 8
    head = build_head(SMILE, {"epochs": 2, "first_epochs": 2})
    head.learn(Task(Clips({"vector": feats}, labels)))
    assert len(head.exemplars) == B
    kept = feats[head.exemplars][:, [4] * T].mean(dim=1).double()
    kept /= kept.norm(dim=1, keepdim=True)
    mean = kept[:5].mean(dim=0)
    np.testing.assert_allclose(
        float(head.nearest({"vector": feats[:1]})[0, 0]),
        float(
            mean @ feats[0].double().mean(dim=0) / mean.norm() / feats[0].double().mean(0).norm()
        ),
        rtol=1e-5,
    )


@pytest.mark.parametrize("build", [ICaRL, BiC])
def test_consistency_is_the_mean_of_both_losses_and_the_distance_of_the_outputs(build):
    feats, labels = draw()
    predict = {"predict": "classifier"} if build is ICaRL else {}
    options = {"consistency": 2.0, "exemplar_frames": 3, "first_epochs": 2} | predict
    head, plain = build_head(build, options), build_head(build, {"first_epochs": 2} | predict)
    training = training_of(head, feats, labels)
    plain._model = head._model
    head.classes = plain.classes = [0, 1]
    thin = feats[:, kept_frames(T, 3)]
    each = [float(plain.loss(training, {"vector": x}, labels).detach()) for x in (feats, thin)]
    distance = ((logits(training.model, feats) - logits(training.model, thin)) ** 2).mean()
    loss = float(head.loss(training, {"vector": feats}, labels).detach())
    np.testing.assert_allclose(loss, sum(each) / 2 + 2.0 * distance, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (ICaRL, {"consistency": 1.0, "predict": "classifier"}),
        (ICaRL, {"consistency": 1.0, "exemplar_frames": 2}),
        (BiC, {"consistency": -1.0, "exemplar_frames": 2}),
        (SMILE, {"still": 2.0}),
    ],
)
def test_what_cannot_be_consistent_is_refused(build, options):
    with pytest.raises(ValueError, match=r"consistency=|still="):
        build_head(build, options)
