"""The page ADDING_A_BACKBONE.md, run as it stands in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from varve.pipeline import registry
from varve.pipeline.datasets.synthetic import make_dataset
from varve.stores import FeatureStore

PAGE = Path(__file__).parents[3] / "docs" / "ADDING_A_BACKBONE.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    make_dataset(folder / "demo" / "videos", clips_per_class=1, classes=("grow", "shrink"),
                 broken=False)  # fmt: skip
    family, _, reduction = blocks("python")
    (folder / "tiny.py").write_text(family)
    (folder / "mine.py").write_text(reduction)
    return folder


def run(folder, *arguments):
    """Run Python in the folder: a plugin stays registered in the process that loads it."""
    environment = {**os.environ, "VARVE_PLUGINS": ""}
    out = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


@pytest.fixture
def command(folder, varve, monkeypatch):
    """A command of the page, on a store of its own, in this process; it is left without plugins."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv(registry.VARIABLE, "")
    monkeypatch.setattr(registry, "_LOADED", {})
    registered = {kind: dict(variants) for kind, variants in registry._REGISTERED.items()}
    monkeypatch.setattr(registry, "_REGISTERED", registered)

    def execute(line):
        program, *words = shlex.split(line.replace("tiny.zarr", "command.zarr"))
        assert program == "varve"
        done = varve(*words, "--serial")
        assert done.returncode == 0, done.stderr

    return execute


def script(body):
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return f"def main():\n{lines}\n\nif __name__ == '__main__':\n    main()\n"


def columns(folder, store):
    features = FeatureStore.open(folder / store).features()
    return {(feature.name, feature.fingerprint): feature for feature in features}


def test_the_python_of_the_page_builds(folder):
    (folder / "example.py").write_text(script(blocks("python")[1]))
    run(folder, "example.py")
    built = {name: feature for (name, _), feature in columns(folder, "tiny.zarr").items()}
    assert set(built) == {"layer1.0", "pool"}
    assert built["pool"].shape[2:] == (32,)
    for stage in built["pool"].spec["stages"]:
        assert stage["options"]["source"] == sha256((folder / "tiny.py").read_bytes()).hexdigest()


@pytest.mark.parametrize("number", [0, 2], ids=["a backbone", "a reduction"])
def test_the_contract_suites_of_the_page_pass(folder, number):
    command = [line[2:] for text in blocks("console") for line in text.strip().splitlines()][number]
    program, *arguments = shlex.split(command)
    assert program == "python"
    assert "passed" in run(folder, *arguments, "-q", "-p", "no:cacheprovider")


def test_the_commands_of_the_page_build_and_an_edited_file_gives_other_keys(folder, command):
    lines = [line[2:] for text in blocks("console") for line in text.strip().splitlines()]
    command(lines[1])
    command(lines[3])
    first = columns(folder, "command.zarr")
    assert sorted(name for name, _ in first) == ["layer1.0", "layer1.0:max", "pool"]
    built = {name: feature for (name, _), feature in first.items()}
    assert built["layer1.0:max"].shape[2:] == (32,)
    rows = np.flatnonzero(built["layer1.0"].valid)
    maps, maxima = (built[name].read(rows) for name in ("layer1.0", "layer1.0:max"))
    np.testing.assert_array_equal(maps.max(axis=(3, 4)), maxima)

    command(lines[3])
    assert columns(folder, "command.zarr").keys() == first.keys()
    for file, before, after in (
        ("mine.py", "amax", "amin"),
        ("tiny.py", "stride=8", "stride=(8, 8)"),
    ):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(before, after))
        command(lines[3])
        (folder / file).write_text(text)
    names = sorted(name for name, _ in columns(folder, "command.zarr"))
    assert names == ["layer1.0", *["layer1.0:max"] * 3, "pool"]
