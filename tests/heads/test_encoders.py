"""Encoders, and every head that has them as an option: what T frames become."""

import numpy as np
import pytest
import torch

from varve.heads import Task, options_of
from varve.heads.parts.clips import Clips
from varve.heads.parts.encoders import Encoder, EncoderConfig
from varve.pipeline.registry import available, variant

SMALL = {"layers": 1, "heads": 2, "ffn": 16}
BUILDS = {name: variant("heads", name).build for name in available("heads")}
# STSP refuses every encoder but "order": its classes are subspaces of the frames' vectors.
ENCODED = [
    name for name, build in BUILDS.items() if "encoder" in options_of(build) and name != "stsp"
]
TIMED = [name for name, build in BUILDS.items() if "time" in options_of(build)]
MOVING = {"encoder": "expert", "expert": SMALL | {"position": "learned"}}


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def test_mean_and_order_are_computed_as_defined_and_have_nothing_to_train():
    x = draw(2, 3, 4)
    mean, order = Encoder(EncoderConfig("mean"), 3, 4), Encoder(EncoderConfig("order"), 3, 4)
    torch.testing.assert_close(mean(x), (x[:, 0] + x[:, 1] + x[:, 2]) / 3)
    assert torch.equal(order(x)[1], torch.cat([x[1, 0], x[1, 1], x[1, 2]]))
    assert (mean.vector, order.vector) == (4, 12)
    assert not [*mean.parameters(), *order.parameters()]


def test_expert_is_the_unit_mean_and_the_experts_unit_output():
    x = 9 * draw(5, 3, 4)
    encoder = Encoder(EncoderConfig("expert", SMALL), 3, 4, np.random.default_rng(0))
    unit = x / x.norm(dim=2, keepdim=True)
    mean, moved = unit.mean(dim=1), encoder.expert(unit)
    expected = mean / mean.norm(dim=1, keepdim=True) + moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(encoder(x), expected)
    same, other = (
        Encoder(EncoderConfig("expert", SMALL), 3, 4, np.random.default_rng(s)) for s in (0, 1)
    )
    assert torch.equal(same(x), encoder(x))
    assert not torch.equal(other(x), encoder(x))


def test_relations_are_of_ordered_tuples_of_every_length():
    x = draw(2, 4, 3)
    encoder = Encoder(EncoderConfig("trn"), 4, 3, np.random.default_rng(0))
    chosen = {2: [(0, 1), (1, 2), (2, 3)], 3: [(0, 1, 2), (0, 2, 3), (1, 2, 3)], 4: [(0, 1, 2, 3)]}
    relation_tuples = [
        [tuple(indices) for indices in tuples.tolist()] for tuples in encoder.relation.tuples
    ]
    assert relation_tuples == [*chosen.values()]
    expected = np.zeros((2, 256))
    for (length, tuples), layer in zip(chosen.items(), encoder.relation.lengths, strict=True):
        weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        for b in range(2):
            for indices in tuples:
                frames = np.concatenate([x[b, t].double().numpy().clip(0) for t in indices])
                assert len(frames) == 3 * length
                expected[b] += (weight @ frames + bias).clip(0) / len(tuples)
    np.testing.assert_allclose(encoder(x).detach(), expected, rtol=1e-5, atol=1e-6)
    assert encoder.vector == 256
    assert not torch.allclose(encoder(x), encoder(x.flip(1)))
    with pytest.raises(ValueError, match="same feature and number of frames"):
        encoder.check(x[:, :3], "vector")
    with pytest.raises(ValueError, match="2 at least"):
        Encoder(EncoderConfig("trn"), 1, 3)
    # There are 137,846,528,820 tuples of 20 frames.
    many = Encoder(EncoderConfig("trn"), 40, 1).relation.tuples
    assert many[18][0].tolist() == [*range(20)]
    assert many[18][-1].tolist() == [*range(20, 40)]
    assert all((tuples.diff(dim=1) > 0).all() for tuples in many)


@pytest.mark.parametrize("position", [None, "learned"])
def test_only_positions_give_an_expert_the_order(position):
    x = draw(5, 3, 4)
    encoder = Encoder(EncoderConfig("expert", SMALL | {"position": position}), 3, 4)
    assert torch.allclose(encoder(x), encoder(x.flip(1)), atol=1e-5) == (position is None)


def test_an_encoder_that_is_none_is_refused():
    with pytest.raises(ValueError, match="choose from mean, order, trn, expert"):
        Encoder(EncoderConfig("max"), 3, 4)
    with pytest.raises(ValueError, match="which has none: give 'expert'"):
        Encoder(EncoderConfig("mean", SMALL), 3, 4)
    with pytest.raises(ValueError, match="its options are layers, heads, ffn, position"):
        EncoderConfig("expert", {"depth": 2})
    with pytest.raises(ValueError, match="position is 'learned' or None"):
        EncoderConfig("expert", {"position": "sine"})


@pytest.mark.parametrize("name", ENCODED)
def test_a_head_with_a_trained_encoder_keeps_the_contract(name, runner):
    """The parts of the generated suite that a moving representation could break."""
    first, second = (
        runner(BUILDS[name], epochs=8, encoder="expert", expert=SMALL) for _ in range(2)
    )
    first.learn([0, 2])
    plain = runner(BUILDS[name], epochs=8)
    plain.learn([0, 2])
    assert first.head.trainable > plain.head.trainable
    second.head.load_state_dict(first.head.state_dict())
    second.seen, second.number, second.next_row = dict(first.seen), 1, first.next_row
    for run in (first, second):
        run.learn([1, 2], seed=2)
    tokens, _ = first.tokens([0, 1, 2], seed=1)
    before = first.scores(tokens)
    assert torch.equal(second.scores(tokens), before)
    torch.testing.assert_close(first.scores(tokens[3:4])[0], before[3], rtol=1e-4, atol=1e-4)
    task = first.task([5], seed=3)
    spoilt = {key: cells.cells / 0 for key, cells in task.clips.features.items()}
    task = Task(Clips(spoilt, task.clips.labels, task.clips.rows), 2, None, task.memory)
    with pytest.raises(ValueError, match="finite"):
        first.head.learn(task)
    assert torch.equal(first.scores(tokens), before)


@pytest.mark.parametrize("name", ENCODED)
def test_a_motion_and_its_reverse_are_two_classes_only_where_order_counts(name, runner):
    correct = {}
    for label, options in {"mean": {}, "order": {"encoder": "order"}, "expert": MOVING}.items():
        epochs = "epochs" if name == "joint" else "first_epochs"
        run = runner(BUILDS[name], **{epochs: 60}, **options)
        both = []
        for seed in (0, 1):
            tokens, _ = run.tokens([3], clips=24, seed=seed)
            cells = torch.cat([tokens, tokens.flip(1)])
            both.append((cells, torch.arange(2).repeat_interleave(24)))
        run.head.learn(Task(run.clips(*both[0])))
        cells, labels = both[1]
        correct[label] = float((run.predicted(cells) == labels).float().mean())
    assert abs(correct["mean"] - 0.5) < 0.1
    assert correct["order"] > 0.95
    assert correct["expert"] > 0.95


@pytest.mark.parametrize("name", TIMED)
def test_closed_forms_distinguish_a_motion_from_its_reverse_by_order(name, runner):
    for time in ("mean", "order"):
        small = {"projection": 64} if name == "ranpac" else {}
        run = runner(BUILDS[name], time=time, **small)
        tokens, _ = run.tokens([3], clips=24)
        cells = torch.cat([tokens, tokens.flip(1)])
        run.head.learn(Task(run.clips(cells, torch.arange(2).repeat_interleave(24))))
        columns = run.scores(cells).T
        assert torch.allclose(*columns, atol=1e-4 * float(columns.abs().max())) == (time == "mean")
