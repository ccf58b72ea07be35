"""The wheel in a fresh environment: its contents, a build, the command, and its types in mypy."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src", "stores", "heads", "pipeline")

TYPED = """
from varve import BuildSpec, FeatureStore, FeatureTensors, Runtime, ablate, build, plan, route, run
import varve

report = build("videos", "s.zarr", BuildSpec(("resnet18:random-0",), keep=("pool",)))
reveal_type(report)
reveal_type(varve.plan)
store = FeatureStore.open("s.zarr")
reveal_type(store)
reveal_type(store.feature("resnet18", "pool"))
reveal_type(varve.run(store, "nearest_mean", "0+2x1"))
reveal_type(Runtime().workers)
"""
REVEALED = [
    r"varve\.pipeline\.extraction\.build\.BuildReport",
    r".*\(dataset: .*varve\.pipeline\.config\.BuildSpec.*",
    r"varve\.stores\.FeatureStore",
    r"varve\.stores\.feature\.Feature",
    r"varve\.pipeline\.experiments\.run_folder\.Run",
    r"(builtins\.)?int",
]

WRONG = """
import varve

varve.build("videos", "s.zarr", "resnet18:random-0")
varve.FeatureStore.open(7)
varve.no_such_call()
"""

SMOKE = """
from pathlib import Path

import varve
from varve.pipeline.datasets.synthetic import make_dataset

if __name__ == "__main__":
    make_dataset(Path("videos"), 2, broken=False, classes=("grow",))
    spec = varve.BuildSpec("resnet18:random-0", keep="pool", frames=2)
    report = varve.build("videos", "s.zarr", spec, runtime=varve.Runtime(serial=True))
    assert report.clips == {"ready": 2}, report
    assert varve.FeatureStore.open("s.zarr").feature("resnet18", "pool").read().shape == (2, 2, 512)
    print(varve.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources by the build backend itself."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources / name)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = run([sys.executable, "-c", code], sources)
    assert done.returncode == 0, done.stderr
    return sources / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel alone, without anything that it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = run([folder / "bin" / "python", "-m", "pip", "install", *options, wheel], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def complete_environment(environment, tmp_path_factory) -> Path:
    """The environment with the requirements, which are read where these tests have them."""
    folder = tmp_path_factory.mktemp("complete") / "environment"
    shutil.copytree(environment, folder, symlinks=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    # The folder is appended, so that the wheel's package comes first. No `.pth` in it is followed.
    (site_packages / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(command: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without a way to the sources."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_types(environment: Path, source: str, folder: Path) -> list[str]:
    """The lines that strict mypy reports of a user's file."""
    (folder / "user.py").write_text(source)
    options = ["--strict", "--no-error-summary", "--no-incremental"]
    python = ["--python-executable", environment / "bin" / "python"]
    return run(
        [sys.executable, "-m", "mypy", *options, *python, "user.py"], folder
    ).stdout.splitlines()


def test_the_wheel_contains_varve_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name.split("/")[0] for name in names} - {"varve"}
    assert metadata == {f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"}
    assert "varve/py.typed" in names
    shipped = {
        f"varve/{file.relative_to(ROOT)}"
        for folder in ("stores", "heads", "pipeline")
        for file in (ROOT / folder).rglob("*.py")
    }
    contracts = {
        str(file.relative_to(ROOT / "src")) for file in (ROOT / "src/varve/contracts").glob("*.py")
    }
    assert shipped | contracts <= names
    packaged = {name for name in names if name.startswith("varve/")}
    assert packaged - shipped - contracts == {
        "varve/__init__.py",
        "varve/__main__.py",
        "varve/py.typed",
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_a_build_runs_from_the_wheel(complete_environment, tmp_path):
    (tmp_path / "smoke.py").write_text(SMOKE)
    done = run([complete_environment / "bin" / "python", "smoke.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(complete_environment)


def test_the_command_runs_from_the_wheel(environment, complete_environment, tmp_path):
    command = (environment / "bin" / "varve").read_text()
    # A copied environment's scripts name the interpreter of the first.
    python = complete_environment / "bin" / "python"
    (tmp_path / "varve_command.py").write_text(command)
    done = run([python, "varve_command.py", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("build", "plan", "run", "route"):
        assert re.search(rf"\b{name}\b", done.stdout)


def test_mypy_sees_the_types_of_the_public_calls(environment, tmp_path):
    lines = check_types(environment, TYPED, tmp_path)
    revealed = [match[1] for line in lines if (match := re.search(r'type is "(.*)"', line))]
    assert len(revealed) == len(lines) == len(REVEALED), lines
    for pattern, line in zip(REVEALED, revealed, strict=True):
        assert re.fullmatch(pattern, line)


def test_mypy_finds_a_wrong_call(environment, tmp_path):
    lines = check_types(environment, WRONG, tmp_path)
    codes = [re.search(r"error: .*\[(.*)\]", line)[1] for line in lines]
    assert codes == ["arg-type", "arg-type", "attr-defined"], lines
