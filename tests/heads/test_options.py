"""Options of heads: flat names outside, groups inside."""

from dataclasses import replace

import pytest

from varve.heads import build_head, options_of
from varve.heads.closed_form.nearest_mean import NearestMean
from varve.heads.had import HAD
from varve.heads.hf_net import HFNet
from varve.heads.joint import Joint
from varve.heads.parts.training import OptimConfig
from varve.heads.stpr import StPR
from varve.pipeline import registry
from varve.pipeline.experiments.head_source import code_digest, find_head

SLOW = OptimConfig(lr=0.001, epochs=3)


class Slow(HFNet):
    """A head with defaults of its own, and one option that replaces that of a group."""

    def __init__(self, momentum: float = 0.5, optim: OptimConfig = SLOW, **options):
        super().__init__(optim=replace(optim, momentum=momentum), **options)
        self.optim = self._optim


def test_a_group_stands_for_its_options_with_the_defaults_of_the_head():
    options = options_of(StPR)
    assert {"routing", "keep", "layers", "lr", "weight", "eps", "adapters"} <= set(options)
    assert not {"optim", "expert"} & set(options)
    assert options["clip_norm"].default == 1.0
    assert options["weight_decay"].default == 0.0
    assert options_of(HFNet)["weight_decay"].default == 5e-4
    assert options_of(HAD)["budget"].default == 100
    assert options_of(HAD)["budget"].annotation is int


def test_flat_options_reach_their_groups_and_the_others_keep_their_defaults():
    head = build_head(StPR, {"lr": 0.5, "routing": "average", "layers": 1})
    assert head.optim == OptimConfig(lr=0.5, weight_decay=0.0, clip_norm=1.0)
    assert head.routed.config.routing == "average"
    assert head.routed.config.doubt == 0.01


def test_a_head_overrides_defaults_of_a_group_and_replaces_an_option():
    assert options_of(Slow)["lr"].default == 0.001
    assert options_of(Slow)["momentum"].default == 0.5
    head = build_head(Slow, {"batch_size": 7})
    assert head.optim == replace(SLOW, momentum=0.5, batch_size=7)
    assert build_head(Slow, {"momentum": 0.1}).optim.momentum == 0.1


def test_an_unknown_option_is_refused_with_the_options_that_there_are():
    with pytest.raises(ValueError, match=r"mine has no option lrr; it has feature='vector', .*lr="):
        build_head(Joint, {"lrr": 1}, "mine")


def test_epochs_are_those_of_the_first_task_or_of_a_later_one():
    joint = options_of(Joint)
    assert (joint["first_epochs"].default, joint["epochs"].default) == (None, 60)
    optim = OptimConfig(first_epochs=None, epochs=5)
    assert (optim.epochs_of(first_task=True), optim.epochs_of(first_task=False)) == (5, 5)


@pytest.fixture
def registered():
    registry.register("heads", "my_mean")(NearestMean)
    yield "my_mean"
    registry.unregister("heads", "my_mean")


def test_a_registered_head_is_built_by_its_name_and_named_by_its_code(registered):
    source = find_head(registered)
    assert source.build_head({"unit": False}).unit is False
    assert code_digest(source) != code_digest(find_head("nearest_mean"))
