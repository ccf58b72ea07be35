"""TSM-ResNets in a store: clips of eight frames, and heads that train their last blocks."""

import shutil

import pytest
import torch

from varve import BuildSpec, Runtime, build, run
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline import backbones
from varve.pipeline.backbones import resnet, tsm_resnet
from varve.pipeline.experiments.run_spec import prepare_run
from varve.stores import FeatureStore

NAME = "tsm_resnet18:random-0"
CLASSES = ("grow", "shrink", "fade in")


@pytest.fixture(scope="module")
def store(dataset, built_once, tmp_path_factory):
    spec = BuildSpec((NAME,), keep=("layer4.0", "pool"), frames=8)
    path = tmp_path_factory.mktemp("tsm") / "s.zarr"
    shutil.copytree(built_once(dataset(CLASSES, 3), spec), path)  # a run adds teacher maps
    return FeatureStore.open(path)


def test_blocks_of_a_tsm_network_are_shifted_once(store):
    plan = prepare_run(store, "hce", "2+1x1", options={"blocks": 1})
    block = plan.network.module("layer4.1")
    assert isinstance(block, TemporalShift)
    assert plan.head.grafts(plan.network, None) == {}


def test_hce_learns_on_it_from_the_last_cached_feature(store, tmp_path):
    options = {"blocks": 1, "first_epochs": 1, "epochs": 1, "batch_size": 4}
    done = run(store, "hce", "2+1x1", options=options, out=tmp_path)
    assert done.cost["stages_recomputed"][1].keys() == {"layer4.1", "pool"}
    assert 0 <= done.matrix.metric("final") <= 1


def test_another_number_of_frames_is_refused(dataset, tmp_path):
    spec = BuildSpec((NAME,), frames=4)
    with pytest.raises(ValueError, match="temporal module over 8 frames"):
        build(dataset(CLASSES, 3), tmp_path / "s.zarr", spec, runtime=Runtime(serial=True))


def test_files_by_the_names_of_its_authors_are_read(tmp_path):
    plain = resnet.construct("resnet18", "random-0", None, "resnet18")
    state = {}
    for name, tensor in plain.state_dict().items():
        block = name.startswith("layer") and ".conv1." in name
        renamed = name.replace(".conv1.", ".conv1.net.") if block else name
        state[renamed.replace("fc.", "new_fc.") if "fc" in name else f"base_model.{renamed}"] = (
            tensor
        )
    file = tmp_path / "tsm.pt"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
    network, same = backbones.load(f"tsm_resnet18:{file}"), backbones.load(NAME)
    assert network.keys("") == same.keys("")
    assert tsm_resnet.renamed(state).keys() == plain.state_dict().keys()
