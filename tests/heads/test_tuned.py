"""Networks tuned with their grafts: what trains, what is the identity, what a class does."""

import pytest
import torch
from torch.nn.functional import normalize

from varve.heads import Task, build_head, options_of
from varve.heads.class_regularization import Regularized
from varve.heads.grafts.class_regularization import ClassRegularization
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.had import HAD
from varve.heads.hce import HCE
from varve.heads.hf_net import HFNet
from varve.heads.parts.fine_tuned_head import FineTunedHead, grid
from varve.heads.podnet import PODNet
from varve.pipeline.experiments.cost import multiply_adds

FLAT = {"strengths": [0.1, 0.2, 0.3]}


def trained(runner, build, tasks=2, **options):
    run = runner(build, batch_size=8, seed=3, **options)
    for number, labels in enumerate(([4, 2], [7, 1])[:tasks]):
        run.learn(labels, seed=number)
    return run


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_gate_stands_after_each_requested_block(runner, blocks):
    run = trained(runner, HFNet, blocks=blocks, epochs=2, first_epochs=2)
    gates = [m for m in run.head._suffix.modules() if isinstance(m, HFGate)]
    assert len(gates) == blocks
    assert all(gate.frames == run.network.frames and gate.prefix == 1 for gate in gates)
    # Behind the last block only the class token is read on, which has no gate.
    assert [bool(gate.weight.any()) for gate in gates] == [True] * (blocks - 1) + [False]
    none = trained(runner, HFNet, blocks=blocks, gates=0, epochs=2, first_epochs=2)
    gate_parameters = run.head.trainable - none.head.trainable
    assert gate_parameters == blocks * (18 * 16 + 1)


def test_a_gate_that_has_learned_nothing_changes_nothing(runner):
    with_gates, without = (
        runner(HFNet, gates=gates, epochs=0, first_epochs=0) for gates in (None, 0)
    )
    for run in (with_gates, without):
        run.learn([4, 2])
    tokens, _ = with_gates.tokens([4, 2], seed=9)
    vectors = [run.head.frame_vectors(run.batch(tokens))["vector"] for run in (with_gates, without)]
    assert torch.equal(*vectors)


def test_classes_raise_the_channels_of_their_weights(runner):
    run = trained(runner, Regularized, blocks=2, **FLAT)
    blocks = [m for m in run.head._suffix.modules() if isinstance(m, ClassRegularization)]
    excitations = run.head.excitations()
    assert len(excitations) == len(blocks) > 0
    assert all(x.shape == (4, 16) for x in excitations.values())
    assert all(((x >= 0) & (x <= 1)).all() for x in excitations.values())
    assert run.head._model.classifier.weight.shape[0] == 4
    assert all(block.classifier is run.head._model.classifier for block in blocks)


@pytest.mark.parametrize("build", [HFNet, Regularized, FineTunedHead])
def test_options_of_the_common_part_are_named_by_the_error_of_another(build):
    assert "blocks" in options_of(build)
    with pytest.raises((TypeError, ValueError)):
        build_head(build, {"nosuch": 1})


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 7, 7), (8, 0)), ((50, 16), (16, 1)), ((5, 3), (3, 1))]
)
def test_a_grid_is_recognized_by_its_shape(shape, expected):
    assert grid(shape) == expected


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (HFNet, {"gates": 3}, "give 0 to 2"),
        (FineTunedHead, {"blocks": 0}, "train a block at least"),
        (FineTunedHead, {"drop": 1.0}, "drop less than all"),
        (FineTunedHead, {"classifier": "svm"}, "choose from lsc, linear"),
        (FineTunedHead, {"proxies": 0}, "give a proxy at least"),
        (PODNet, {"classifier": "linear"}, "one of cosines"),
        (HFNet, {"budget": -1}, "give at least 0"),
        (Regularized, {"start": "random"}, "choose from drawn, fitted"),
        (Regularized, {"at": "ends"}, "choose from stages, blocks"),
        (HCE, {"budget": 0, "parts": "hc+crm"}, "crm compares exemplars with new clips"),
        (HAD, {"budget": 0, "parts": "high"}, "exemplars are what low and high augment"),
    ],
)
def test_options_that_cannot_be_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build_head(build, options)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (FineTunedHead, {}),
        (PODNet, {}),
        (HCE, {}),
        (HAD, {"parts": "", "width": 16, "heads": 2, "ffn": 8}),
    ],
    ids=["tuned", "podnet", "hce", "had"],
)
def test_fine_tuning_keeps_no_exemplars(runner, build, options):
    run = trained(runner, build, budget=0, epochs=1, first_epochs=1, **options)
    assert run.head.classes == [2, 4, 1, 7]
    assert len(run.head.exemplars) == 0
    batch = run.batch(run.tokens([4, 1], seed=9)[0])
    with pytest.raises(ValueError, match="no exemplars are kept that could be near"):
        run.head.nearest(batch)
    other = trained(runner, build, tasks=0, budget=0, epochs=1, first_epochs=1, **options)
    other.head.load_state_dict(run.head.state_dict())
    assert torch.equal(other.head.scores(batch), run.head.scores(batch))


def test_the_loss_is_cross_entropy_of_eta_times_the_cosines(runner):
    """New classes start from their clips."""
    reports, heads = [], []
    for epochs in (0, 1):
        run = runner(
            HFNet, proxies=1, batch_size=99, epochs=epochs, first_epochs=epochs, momentum=0
        )
        task = run.task([4, 2])
        run.head.learn(Task(task.clips, on_epoch_end=lambda *epoch: reports.append(epoch)))
        heads.append(run.head)
    classifier = heads[0]._model.classifier
    batch = {name: task.clips.whole(name) for name in run.head.reads}
    vectors = normalize(heads[0]._model.vectors(heads[0].frame_vectors(batch)), dim=1)
    of = torch.tensor([[2, 4].index(label) for label in task.clips.labels.tolist()])
    means = normalize(torch.stack([vectors[of == column].mean(0) for column in (0, 1)]), dim=1)
    torch.testing.assert_close(classifier.weight[:, 0].detach(), means)
    loss = torch.nn.functional.cross_entropy(20 * vectors @ means.T, of)
    assert reports == [(1, 1, pytest.approx(float(loss), rel=1e-4))]
    assert not torch.equal(heads[1]._model.classifier.weight, classifier.weight)


def test_a_cosine_classifier_does_not_decay(runner):
    run = runner(HFNet, first_epochs=5, weight_decay=2.0, proxies=1)
    run.learn([4, 2])
    state = run.head.state_dict()
    assert state["classifier.scale"] == pytest.approx(20, abs=0.2)
    assert state["classifier.weight"].norm(dim=2).min() > 0.99


@pytest.mark.parametrize("options", [{"classifier": "linear"}, {"proxies": 3}], ids=str)
def test_balanced_tuning_moves_the_classifier_alone_after_the_first_task(runner, options):
    options = {"budget": 2, "epochs": 2, "first_epochs": 2, **options}
    plain, tuned = (trained(runner, HFNet, tune_epochs=n, **options) for n in (0, 3))
    states = [run.head.state_dict() for run in (plain, tuned)]
    moved = {name for name, x in states[0].items() if not torch.equal(x, states[1][name])}
    classifier_parameters = {"classifier.weight", "classifier.bias"}
    assert moved == (classifier_parameters if "classifier" in options else {"classifier.weight"})
    first = [trained(runner, HFNet, tasks=1, tune_epochs=n, **options) for n in (0, 3)]
    states = [run.head.state_dict() for run in first]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_training_in_bfloat16_is_near_and_scores_are_float32(runner):
    plain, low = (trained(runner, HFNet, precision=p, first_epochs=4, epochs=4)
                  for p in ("float32", "bfloat16"))  # fmt: skip
    tokens, _ = plain.tokens([4, 2, 7, 1], seed=9)
    whole, low_scores = plain.scores(tokens), low.scores(tokens)
    assert low_scores.dtype == torch.float32
    assert not torch.equal(low_scores, whole)
    torch.testing.assert_close(low_scores, whole, atol=0.1, rtol=0.05)
    with pytest.raises(ValueError, match="precision"):
        build_head(HFNet, dict(precision="float8"))


def test_new_classes_start_where_their_clips_are_behind_blocks_that_read_the_classifier(runner):
    """The blocks do not look at columns that mean nothing yet."""
    run = runner(Regularized, proxies=1, first_epochs=0, strengths=[0.9] * 3)
    task = run.task([4, 2])
    run.head.learn(task)
    classifier = run.head._model.classifier
    columns = torch.tensor([[2, 4].index(label) for label in task.clips.labels.tolist()])
    weight, classifier.weight = classifier.weight, torch.nn.Parameter(classifier.weight[:0])
    batch = {name: task.clips.whole(name) for name in run.head.reads}
    vectors = normalize(run.head._model.vectors(run.head.frame_vectors(batch)), dim=1)
    means = torch.stack([vectors[columns == c].mean(dim=0) for c in (0, 1)])
    torch.testing.assert_close(normalize(weight[:, 0], dim=1).detach(), normalize(means, dim=1))


def test_blocks_predict_the_classifiers_class_from_the_start(runner):
    """Those whose projections are drawn do not; a later task leaves what was learned."""
    agree = {}
    for start in ("fitted", "drawn"):
        run = runner(Regularized, start=start, first_epochs=0, epochs=0, strengths=[1e-6] * 3)
        task = run.task([4, 2, 7, 1])
        run.head.learn(task)
        batch = {name: task.clips.whole(name) for name in run.head.reads}
        scores, passed = run.head.traced(batch)
        predictions = [stage.module.predict(stage.inputs) for stage in passed.values()
                       if isinstance(stage.module, ClassRegularization)]  # fmt: skip
        agree[start] = [(c == scores.argmax(dim=1)).float().mean().item() for c in predictions]
        before = [m.projection.clone() for m in run.head._suffix.modules()
                  if isinstance(m, ClassRegularization)]  # fmt: skip
        run.learn([5, 6], seed=1)
        after = [m.projection for m in run.head._suffix.modules()
                 if isinstance(m, ClassRegularization)]  # fmt: skip
        assert all(map(torch.equal, before, after))
    assert min(agree["fitted"]) > max(agree["drawn"]) > 0
    assert min(agree["fitted"]) > 0.9


class Upended(Regularized):
    def _tune(self, training, *rest):
        with torch.no_grad():
            training.classifier.weight.neg_()


def test_means_are_those_of_blocks_that_read_the_tuned_classifier(runner):
    stored_means = []
    for build in (Upended, Regularized):
        run = trained(runner, build, budget=2, epochs=2, first_epochs=2, **FLAT)
        kept = [run.seen[row][0] for row in run.head.exemplars.tolist()]
        batch = run.batch(torch.stack(kept))
        vectors = normalize(run.head._model.vectors(run.head.frame_vectors(batch)).double(), dim=1)
        means = torch.stack([vectors[n : n + 2].mean(dim=0) for n in range(0, 8, 2)])
        stored_means.append(run.head.state_dict()["exemplars.means"])
        torch.testing.assert_close(stored_means[-1], means, rtol=1e-5, atol=1e-6)
    assert (stored_means[0] - stored_means[1]).abs().max() > 1e-3


def test_blocks_of_class_regularization_that_are_off_cost_nothing(runner):
    counts = {}
    for strengths in ([0.0] * 3, [0.3] * 3):
        run = trained(runner, Regularized, blocks=2, strengths=strengths, epochs=1, first_epochs=1)
        tokens, _ = run.tokens([4, 2], seed=9)
        clips = run.clips(tokens, torch.tensor([4] * len(tokens)))
        counts[strengths[0]] = multiply_adds(run.head, clips)
    plain = trained(runner, FineTunedHead, blocks=2, epochs=1, first_epochs=1)
    clips = plain.clips(tokens, torch.tensor([4] * len(tokens)))
    assert counts[0.0] == multiply_adds(plain.head, clips) < counts[0.3]
