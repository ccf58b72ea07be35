"""A folder of a user's own may hold modules named `pipeline`, `heads` and `stores`.

A script and a notebook kernel that stand in such a folder build with worker processes, run and
ablate. Varve's own modules are used, and only the user's script imports the user's.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from varve.pipeline.datasets.synthetic import make_dataset

MODULES = ("pipeline.py", "heads/__init__.py", "stores.py")

# The user's modules note the process that loads them, and hold what only the user's script wants.
MODULE = """
import os
from pathlib import Path

with open(Path(__file__).parents[LEVELS] / "loaded", "a") as file:
    print(__name__, os.getpid(), file=file)
OWNER = "the user"
"""

PREPARE = """
import os
import heads, pipeline, stores
import varve.heads
"""

WORK = """
assert [module.OWNER for module in (heads, pipeline, stores)] == ["the user"] * 3
assert varve.heads is not heads
spec = varve.BuildSpec("resnet18:random-0", keep="pool", frames=2)
report = varve.build("videos", "s.zarr", spec, runtime=varve.Runtime(workers=1, device="cpu"))
assert report.clips == {"ready": 8}, report
run = varve.run("s.zarr", "nearest_mean", "1+1x1", seed=7)
assert (run.folder / "metrics.json").exists()
table = varve.ablate("s.zarr", "nearest_mean", "1+1x1", {"time": ["mean", "order"]}, 1,
                     runtime=varve.Runtime(workers=2))
assert len(table) == 2 and not table.attrs["errors"], table.attrs
assert [module.OWNER for module in (heads, pipeline, stores)] == ["the user"] * 3
print("finished in", os.getpid())
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the user's modules and a small data set."""
    for name in MODULES:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(MODULE.replace("LEVELS", str(name.count("/"))))
    make_dataset(tmp_path / "videos", 4, broken=False, classes=("grow", "shrink"))
    return tmp_path


def loads(folder: Path) -> list[list[str]]:
    """The name of each module that was loaded from the folder, and the process that loaded it."""
    return sorted(line.split() for line in (folder / "loaded").read_text().splitlines())


def test_a_script_beside_modules_of_the_same_names(folder):
    body = textwrap.indent(PREPARE + WORK, "    ")
    (folder / "script.py").write_text(f'if __name__ == "__main__":\n{body}')
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    process = done.stdout.split("finished in ")[1].strip()
    assert loads(folder) == [[name, process] for name in ("heads", "pipeline", "stores")]


def test_a_notebook_beside_modules_of_the_same_names(folder, tmp_path_factory, monkeypatch):
    settings = tmp_path_factory.mktemp("jupyter")
    monkeypatch.setenv("IPYTHONDIR", str(settings / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(settings / "runtime"))
    cells = [nbformat.v4.new_code_cell(source) for source in (PREPARE, WORK)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "".join(out.text for out in cells[1].outputs if out.get("name") == "stdout")
    process = printed.split("finished in ")[1].strip()
    assert loads(folder) == [[name, process] for name in ("heads", "pipeline", "stores")]
