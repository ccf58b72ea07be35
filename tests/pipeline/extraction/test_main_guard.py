"""Scripts without a guard are refused before any process runs them again."""

import subprocess
import sys

SCRIPT = """
from pathlib import Path
from varve import BuildSpec, Runtime, build
from varve.pipeline.datasets.synthetic import make_dataset

Path("ran").open("a").write("once ")
if not Path("set").exists():
    make_dataset(Path("set"), clips_per_class=1, classes=("grow",), broken=False)
spec = BuildSpec(("resnet18:random-0",), "stem:pool", frames=2)
"""
BUILDS = """
try:
    build("set", "s.zarr", spec)
except RuntimeError as error:
    Path("cluster").write_text(str(error))
build("set", "s.zarr", spec, runtime=Runtime(serial=True))
"""


def run(folder, script: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_an_unguarded_script_is_refused_and_runs_once_with_a_cluster_and_without(tmp_path):
    done = run(tmp_path, SCRIPT + BUILDS)
    assert done.returncode == 1
    guard = 'if __name__ == "__main__":'
    assert guard in (tmp_path / "cluster").read_text()
    assert guard in done.stderr.splitlines()[-1]
    assert (tmp_path / "ran").read_text() == "once "


def test_a_guarded_script_builds(tmp_path):
    body = SCRIPT + 'build("set", "s.zarr", spec, runtime=Runtime(serial=True))'
    head, _, tail = body.partition("\nPath")
    indented = ("Path" + tail).replace("\n", "\n    ")
    done = run(tmp_path, f"{head}\nif __name__ == '__main__':\n    {indented}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.zarr").is_dir()
