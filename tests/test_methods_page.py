"""The page METHODS.md: its files pass the contract suite of heads, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import varve
from varve import BuildSpec, Runtime, build
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.experiments.head_source import find_head

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "METHODS.md").read_text()
FILES = dict(re.findall(r"In `(methods/\w+\.py)`:\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL))
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
          if b not in FILES.values()]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the two files of the page."""
    monkeypatch.chdir(tmp_path)
    Path("methods").mkdir()
    for name, text in FILES.items():
        Path(name).write_text(text)
    return tmp_path


def test_the_examples_are_short_and_lines_fit(folder):
    assert [Path(name).stem for name in FILES] == ["gated", "gated_experts"]
    for name, text in FILES.items():
        assert len(text.splitlines()) < 60
        assert max(map(len, text.splitlines())) <= 100
        assert find_head(name).build_head({}).classes == []


@pytest.mark.slow
def test_the_examples_pass_the_checks_of_every_head(folder):
    """As the page describes, outside the repository."""
    arguments = [word for name in FILES for word in ("--head", name)]
    done = subprocess.run(
        [sys.executable, "-m", "varve.contracts", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "48 passed" in done.stdout


def test_the_page_runs(folder, monkeypatch, capsys):
    """On two motions, with fewer epochs and without worker processes."""
    make_dataset(folder / "videos", clips_per_class=3, classes=("grow", "shrink"), broken=False)
    stores = (("maps", "resnet18", "layer3.1", "pool"),
              ("tokens", "ViT-S-32", "blocks.10.attn", "proj"))  # fmt: skip
    for store_name, network, *keep in stores:
        assert f"--store {store_name}.zarr --backbone {network}:random-0" in TEXT
        assert " ".join(f"--keep {name}" for name in keep) in TEXT
        spec = BuildSpec((f"{network}:random-0",), tuple(keep), frames=2)
        build("videos", f"{store_name}.zarr", spec, runtime=Runtime(serial=True))
    run, ablate = varve.run, varve.ablate
    quick = {"first_epochs": 1, "epochs": 1}

    def quick_run(store, head, scenario, options):
        assert scenario == "demo"
        return run(store, head, "1+1x1", options=options | quick)

    def quick_ablate(store, heads, scenario, grid, seeds, options):
        assert scenario == "demo"
        options = {name: quick for name in options}
        return ablate(store, heads, "1+1x1", grid, seeds, options=options,
                      runtime=Runtime(serial=True))  # fmt: skip

    monkeypatch.setattr(varve, "run", quick_run, raising=False)
    monkeypatch.setattr(varve, "ablate", quick_ablate, raising=False)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "METHODS.md", "exec"), names)
    assert names["table"].attrs["errors"] == []
    printed = capsys.readouterr().out
    shown = TEXT.split("```text\n")[1].split("```")[0]
    assert shown.split("\n")[0].split() == printed.split("\n")[0].split()
    first = [line.split()[0] for line in printed.splitlines()[1:]]
    assert first == ["lucir", "hf_net", "gated", "gated"]
    gated, experts = names["done"], names["experts"]
    assert gated.nme is not None
    assert set(gated.cost["stages_recomputed"][1]) <= {"layer4.0", "layer4.1", "pool", "fc"}
    ran = {"blocks.10.mlp", "blocks.11.attn", "blocks.11.mlp", "proj"}
    assert set(experts.cost["stages_recomputed"][1]) == ran
    assert (experts.folder / "head_source" / "gated_experts.py").exists()
    assert np.isfinite(experts.matrix.metric("final"))
