"""Heads that train a part of a real network, from a real store of its features."""

from functools import partial

import pytest
import torch

from varve import BuildSpec, run
from varve.pipeline.experiments import head_inputs
from varve.pipeline.experiments.head_network import HeadNetwork
from varve.stores import FeatureStore

NAME = "resnet18:random-0"
CLASSES = ("grow", "shrink", "fade in", "fade out")
QUICK = {"blocks": 1, "first_epochs": 2, "epochs": 2, "tune_epochs": 1}


@pytest.fixture(scope="module")
def store(dataset, built_once) -> FeatureStore:
    spec = BuildSpec((NAME,), keep=("layer4.0", "pool"), frames=2, precision="bfloat16")
    return FeatureStore.open(built_once(dataset(CLASSES, 3), spec))


@pytest.fixture
def network(store):
    plain = head_inputs.load_network(store, NAME)
    return HeadNetwork(plain, 2, partial(head_inputs.load_network, store, NAME))


def test_what_trains_is_float32_whatever_the_features_were_computed_in(network):
    suffix = network.suffix({}, "layer4.0", unfreeze=["layer4.1"])
    trained = [p for p in suffix.parameters() if p.requires_grad]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}
    # As they were published, not as bfloat16 had left them.
    assert any((p != p.bfloat16().float()).any() for p in trained)
    frozen = network.suffix({}, "layer4.0")
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    x = torch.randn(1, 2, 512, 7, 7)
    off = (suffix(x).float() - frozen(x).float()).abs().max() / suffix(x).abs().max()
    assert 0 < off < 0.03


def test_a_network_may_train_whole_from_the_input_of_its_first_block(network):
    assert network.find("blocks.-8") == "layer1.0"
    assert network.find("blocks.-9") == "stem"
    assert network.find("vector") == "pool"
    with pytest.raises(ValueError, match="at most blocks=8"):
        network.find("blocks.-10")


def test_the_last_block_trains_in_a_run_and_nothing_before_it_is_computed(store, tmp_path):
    done = run(store, "podnet", "2+1x2", options=QUICK, out=tmp_path)
    for calls in done.cost["stages_recomputed"]:
        assert set(calls) == {"layer4.1", "pool"}
    first, *later = [calls["layer4.1"] for calls in done.cost["stages_recomputed"]]
    assert 0 < first < min(later)  # the teacher runs too, and the exemplars with a task's clips
    assert done.nme is not None
    again = run(store, "podnet", "2+1x2", options=QUICK, out=tmp_path / "again")
    assert done.matrix.to_json() == again.matrix.to_json()


def test_a_run_without_exemplars_has_no_nearest_means(store, tmp_path):
    done = run(store, "hf_net", "2+1x2", options={**QUICK, "budget": 0}, out=tmp_path)
    assert done.nme is None
    assert done.metrics["nme"] is None
    assert done.cost["exemplars"] == 0
    assert set(done.predictions["classifier"]) == {"cnn"}
