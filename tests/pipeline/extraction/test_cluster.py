"""Local clusters, whose workers are forks of one process."""

import subprocess
import sys

SCRIPT = """
import os
import sys

import torch

from varve.pipeline.extraction.cluster import connected


def environment():
    return dict(os.environ)


def main():
    os.environ["REMOVED"] = os.environ["CHANGED"] = "before"
    with connected("", [{"nthreads": 1}], 1, ()) as client:
        (first,) = client.run(environment).values()
    assert first["REMOVED"] == first["CHANGED"] == "before"
    del os.environ["REMOVED"]
    os.environ["CHANGED"] = "after"
    with connected("", [{"nthreads": 1, "env": {"OWN": "1"}}], 1, ()) as client:
        (second,) = client.run(environment).values()
    assert second["CHANGED"] == "after" and second["OWN"] == "1"
    extra = {"OMP_NUM_THREADS", "OWN"} | {name for name in second if name.startswith("MALLOC_")}
    assert set(second) - set(os.environ) <= extra, set(second) - set(os.environ)
    assert set(os.environ) <= set(second), set(os.environ) - set(second)


if __name__ == "__main__":
    sys.path.pop(0)  # as for an installed command: the present folder is on no path
    main()
"""


def test_workers_have_the_present_environment_and_no_modules_of_the_present_folder(tmp_path):
    (tmp_path / "fractions.py").write_text("raise RuntimeError('a script of the user')")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "scripts/script.py"], cwd=tmp_path, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
