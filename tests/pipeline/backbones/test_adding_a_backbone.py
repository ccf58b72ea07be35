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


def varve(folder, line):
    """Run a command of the page, on a store of its own and without worker processes."""
    program, *words = shlex.split(line.replace("tiny.zarr", "command.zarr"))
    assert program == "varve"
    run(folder, "-m", "varve", *words, "--serial")


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


def test_a_users_reduction_is_computed_from_a_cached_map(folder):
    lines = blocks("python")[1].replace('("layer1.0", "pool")', '("layer1.0", "layer1.0:max")')
    lines = lines.replace(
        'load_plugin("tiny.py")', 'load_plugin("tiny.py")\nload_plugin("mine.py")'
    )
    (folder / "second.py").write_text(script(lines.replace("tiny.zarr", "second.zarr")))
    run(folder, "second.py")
    built = {name: feature for (name, _), feature in columns(folder, "second.zarr").items()}
    rows = np.flatnonzero(built["layer1.0"].valid)
    maps, maxima = (built[name].read(rows) for name in ("layer1.0", "layer1.0:max"))
    np.testing.assert_array_equal(maps.max(axis=(3, 4)), maxima)


@pytest.mark.parametrize("number", [0, 2], ids=["a backbone", "a reduction"])
def test_the_contract_suites_of_the_page_pass(folder, number):
    command = [line[2:] for text in blocks("console") for line in text.strip().splitlines()][number]
    program, *arguments = shlex.split(command)
    assert program == "python"
    assert "passed" in run(folder, *arguments, "-q", "-p", "no:cacheprovider")


def test_the_commands_of_the_page_build_and_an_edited_file_gives_other_keys(folder):
    lines = [line[2:] for text in blocks("console") for line in text.strip().splitlines()]
    varve(folder, lines[1])
    varve(folder, lines[3])
    first = columns(folder, "command.zarr")
    assert sorted(name for name, _ in first) == ["layer1.0", "layer1.0:max", "pool"]
    assert {name: f.shape[2:] for (name, _), f in first.items()}["layer1.0:max"] == (32,)

    varve(folder, lines[3])
    assert columns(folder, "command.zarr").keys() == first.keys()
    for file, old, new in (
        ("mine.py", "amax", "amin"),
        ("tiny.py", "stride=8", "stride=(8, 8)"),
    ):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(old, new))
        varve(folder, lines[3])
        (folder / file).write_text(text)
    names = sorted(name for name, _ in columns(folder, "command.zarr"))
    assert names == ["layer1.0", *["layer1.0:max"] * 3, "pool"]
