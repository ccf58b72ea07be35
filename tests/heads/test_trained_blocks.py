"""Methods of cached vectors that train the last blocks of the network too, with `blocks`."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from varve.heads import build_head
from varve.heads.icarl import ICaRL
from varve.heads.joint import Joint
from varve.heads.linear import Linear
from varve.heads.lucir import LUCIR
from varve.heads.lwf import LwF
from varve.heads.parts.classifiers import LENGTH

HEADS = [Linear, LwF, ICaRL, LUCIR, Joint]
SHORT = {"epochs": 2, "batch_size": 8, "seed": 3}


def trained(runner, build, *tasks, **options):
    run = runner(build, **SHORT | options)
    for number, labels in enumerate(tasks):
        run.learn(labels, seed=number)
    return run


@pytest.mark.parametrize("build", HEADS)
def test_blocks_train_with_the_classifier_and_the_network_stays(runner, build):
    run = trained(runner, build, [4, 2], blocks=1, epochs=25)
    network = run.head._model.network
    assert run.head.reads == ("blocks.-2",)
    published = dict(run.network.modules["blocks.2.mlp"].named_parameters())
    after = {name: p for name, p in network.own().items() if name.endswith("weight")}
    assert len(network.own()) == 2
    assert all(not torch.equal(p, published["weight"]) for p in after.values())
    tokens, labels = run.tokens([4, 2], seed=9)
    assert (run.predicted(tokens) == labels).float().mean() > 0.9
    blocks = sum(p.numel() for p in network.own().values())
    plain = trained(runner, build, [4, 2], encoder="mean")
    trains = plain.head.trainable or 2 * 17  # without anything to train iCaRL trains nothing
    assert run.head.trainable == trains + blocks


@pytest.mark.parametrize("build", HEADS)
def test_blocks_that_have_learned_nothing_give_the_vectors_of_the_network(runner, build):
    options = {"epochs": 0, "first_epochs": 0}
    if build is Joint:
        options.pop("first_epochs")
    run, plain = (trained(runner, build, [4, 2], **options, blocks=n) for n in (2, 0))
    assert run.head.classes == plain.head.classes
    tokens, _ = run.tokens([4, 2], seed=9)
    torch.testing.assert_close(run.scores(tokens), plain.scores(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", HEADS)
def test_training_resumes_from_a_state(runner, build):
    first = trained(runner, build, [4, 2], blocks=1)
    second = runner(build, **SHORT, blocks=1)
    state = first.head.state_dict()
    assert {name for name in state if name.startswith("network.")}
    second.head.load_state_dict(state)
    second.seen, second.number, second.next_row = dict(first.seen), 1, first.next_row
    tokens, _ = first.tokens([4, 2], seed=9)
    assert torch.equal(first.scores(tokens), second.scores(tokens))
    for run in (first, second):
        run.learn([7, 1], seed=1)
    assert torch.equal(first.scores(tokens), second.scores(tokens))
    assert first.head.trainable == second.head.trainable


def test_a_step_descends_the_gradient_of_the_loss_in_float64(runner):
    """One step of LwF in its second task, from labels and from the outputs of the model before."""
    options = {"epochs": 1, "first_epochs": 4, "batch_size": 12, "lr": 0.05, "momentum": 0.0,
               "weight_decay": 0.0, "schedule": "constant", "blocks": 1}  # fmt: skip
    run = trained(runner, LwF, [4, 2], **options)
    before = {n: p.double() for n, p in run.head.state_dict().items() if n != "classes"}
    modules = [copy.deepcopy(run.network.modules[f"blocks.2.{part}"]).double()
               for part in ("attn", "mlp")]  # fmt: skip
    learning = [p.requires_grad_() for module in modules for p in module.parameters()]
    saved = [p for n, p in before.items() if n.startswith("network.")]
    with torch.no_grad():
        for parameter, value in zip(learning, saved, strict=True):
            parameter.copy_(value)
    task = run.task([7, 2], seed=1)  # 2 comes again, and learns from labels
    tokens = task.clips[torch.arange(len(task.clips))]["blocks.-2"].double()
    weight = torch.cat([before["classifier.weight"], torch.zeros(1, 16).double()])
    weight.requires_grad_()

    def logits(weight):
        x = tokens.flatten(0, 1)
        for module in modules:
            x = module(x)
        x = torch.nn.functional.layer_norm(x[:, 0], (16,)).unflatten(0, tokens.shape[:2])
        bias = torch.cat([before["classifier.bias"], torch.zeros(len(weight) - 2).double()])
        return LENGTH * normalize(x.mean(dim=1), dim=1) @ weight.T + bias

    with torch.no_grad():
        teacher = logits(before["classifier.weight"]).sigmoid()
    labels = task.clips.labels[:, None]
    targets = torch.cat([labels == 2, teacher[:, 1:], labels == 7], dim=1)
    g = logits(weight).sigmoid()
    loss = -(targets * g.log() + (1 - targets) * (1 - g).log()).sum(dim=1).mean()
    gradients = torch.autograd.grad(loss, [*learning, weight])
    run.head.learn(task)
    after = run.head.state_dict()
    moved = [p for n, p in after.items() if n.startswith("network.")]
    for start, gradient, end in zip(saved, gradients[:-1], moved, strict=True):
        torch.testing.assert_close(end.double(), start - 0.05 * gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-3
    expected = weight.detach() - 0.05 * gradients[-1]
    torch.testing.assert_close(after["classifier.weight"].double(), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_train_is_refused(runner):
    for options in ({"blocks": -1}, {"blocks": 1, "batch_norm": "off"}):
        with pytest.raises(ValueError, match="at least 0 blocks"):
            build_head(LwF, options)
    with pytest.raises(ValueError, match="Leave one of them out"):
        build_head(LwF, {"blocks": 1, "feature": "pool"})
    run = runner(LwF, **SHORT, blocks=1)
    head = build_head(LwF, {"blocks": 1})
    with pytest.raises(ValueError, match="no network was attached"):
        head.learn(run.task([4, 2]))
