"""A custom graft is one file: used from Python, in a run, and judged by the contract suite."""

import subprocess
import sys

import pytest

from varve import BuildSpec, run
from varve.pipeline import backbones
from varve.pipeline.experiments import routing
from varve.pipeline.registry import load_plugin, unregister, variant
from varve.stores import FeatureStore, SpecMismatch

NAME = "resnet18:random-0"
CLASSES = ("grow", "shrink", "fade in", "fade out")
QUICK = {"blocks": 1, "gates": 0, "budget": 0, "first_epochs": 2, "epochs": 1}
GRAFT = '''
import torch
from torch import nn
from varve.pipeline.registry import register


@register("grafts", "scaled")
class Scaled(nn.Module):
    """Scale the channels of a stage by trainable factors."""

    def __init__(self, inner, channels, prefix=0, start=1.0):
        super().__init__()
        self.inner, self.channels, self.prefix, self.start = inner, channels, prefix, start
        self.factors = nn.Parameter(torch.full((channels,), start))

    def forward(self, x):
        out = self.inner(x)
        factors = self.factors[:, None, None] if out.ndim == 4 else self.factors
        return (out.to(factors.dtype) * factors).to(out.dtype)

    def train(self, mode=True):
        self.training = mode
        self.inner.train(mode and any(p.requires_grad for p in self.inner.parameters()))
        return self
'''
BROKEN = GRAFT.replace("scaled", "leaking").replace("(x)", "(x + x.mean(0))").replace("Sc", "K")


@pytest.fixture(scope="module")
def path(dataset, built_once):
    spec = BuildSpec((NAME,), keep=("layer4.0", "pool"), frames=2, precision="bfloat16")
    return built_once(dataset(CLASSES, 3), spec)


@pytest.fixture(scope="module")
def store(path) -> FeatureStore:
    return FeatureStore.open(path)


@pytest.fixture
def register_text(tmp_path, monkeypatch):
    """Return a function that loads a text as a plugin file, instead of the one before."""
    monkeypatch.setenv("VARVE_PLUGINS", "")
    loaded = []

    def load(text):
        if loaded:
            unregister("grafts", "scaled")
        file = tmp_path / f"grafts_{len(loaded)}.py"
        file.write_text(text)
        load_plugin(file)
        loaded.append(file)

    yield load
    if loaded:
        unregister("grafts", "scaled")


def test_a_registered_graft_trains_behind_each_block_of_a_run(
    path, store, register_text, tmp_path, varve
):
    register_text(GRAFT)
    options = {**QUICK, "graft": "scaled", "graft_options": {"start": 0.5}}
    done = run(store, "hf_net", "2+1x2", options=options, out=tmp_path / "runs")
    head, _ = routing.restored(done, store)
    (factors,) = [t for name, t in head.state_dict().items() if name.endswith("factors")]
    assert factors.shape == (512,)
    assert (factors != 0.5).any()

    words = [f"{name}={value}" for name, value in QUICK.items()]
    words += ["graft=scaled", 'graft_options={"start": 0.5}']
    printed = varve(
        "run", path, "--head", "hf_net", "--scenario", "2+1x2", "--out", tmp_path / "runs",
        *(part for word in words for part in ("--set", word)),
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [done.folder.name]

    # Other source text under the same name is another run, and no part of this one.
    register_text(GRAFT.replace("* factors)", "* factors.abs())"))
    other = run(store, "hf_net", "2+1x2", options=options, out=tmp_path / "runs")
    assert other.folder != done.folder
    with pytest.raises(SpecMismatch, match="graft"):
        routing.restored(done, store)
    wrong = {**options, "graft_options": {"rank": 4}}
    with pytest.raises(ValueError, match=r"there is no rank.*give those of start"):
        run(store, "hf_net", "2+1x2", options=wrong, out=tmp_path / "refused")


def test_an_unknown_graft_is_refused_before_anything_is_computed(store, tmp_path):
    with pytest.raises(ValueError, match=r"no 'unheard_of' in grafts.*adapter"):
        run(store, "hf_net", "2+1x2", options={**QUICK, "graft": "unheard_of"}, out=tmp_path)
    with pytest.raises(ValueError, match="without a graft"):
        run(store, "hf_net", "2+1x2", options={"graft_options": {"start": 1.0}}, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_registered_graft_replaces_a_stage_from_python(register_text):
    register_text(GRAFT)
    backbone = backbones.load(NAME)
    keys = [backbone.keys("")["pool"]]
    for text in (GRAFT, GRAFT.replace("* factors)", "* factors.abs())")):
        register_text(text)
        module = variant("grafts", "scaled")(backbone.stage("layer3.1").module, 256)
        keys.append(backbone.graft("layer3.1", module).keys("")["pool"])
    assert len(set(keys)) == 3


def test_the_contract_suite_judges_the_grafts_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(GRAFT + BROKEN)
    command = [sys.executable, "-m", "varve.contracts", "--graft", "mine.py", "-q", "-rf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert any("beside_it[leaking-" in line for line in failed)
    assert not any("scaled" in line for line in failed)
    assert " passed" in done.stdout
