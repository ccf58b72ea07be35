"""Scripts without a guard are told so before any process runs them again."""

import subprocess
import sys

import pytest

UNGUARDED = """
from pathlib import Path
from varve import BuildSpec, Runtime, build
from varve.pipeline.datasets.synthetic import make_dataset

Path("ran").open("a").write("once ")
if not Path("set").exists():
    make_dataset(Path("set"), clips_per_class=1, classes=("grow",), broken=False)
build("set", "s.zarr", BuildSpec(("resnet18:random-0",), "stem:pool", frames=2), {how})
"""


@pytest.mark.parametrize("how", ["", "runtime=Runtime(serial=True)"], ids=["cluster", "serial"])
def test_an_unguarded_script_is_refused_and_runs_once(tmp_path, how):
    (tmp_path / "script.py").write_text(UNGUARDED.replace("{how}", how))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert (tmp_path / "ran").read_text() == "once "


def test_a_guarded_script_builds(tmp_path):
    head, _, tail = UNGUARDED.replace("{how}", "runtime=Runtime(serial=True)").partition("\nPath")
    body = ("Path" + tail).replace("\n", "\n    ")
    (tmp_path / "script.py").write_text(f"{head}\nif __name__ == '__main__':\n    {body}")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.zarr").is_dir()
