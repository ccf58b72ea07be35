"""The notebooks run from top to bottom, are kept without outputs, and use public calls only."""

import ast
import base64
import os
import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from varve import BuildSpec, Runtime, build
from varve.pipeline.datasets.synthetic import make_dataset

FOLDER = Path(__file__).parents[1] / "notebooks"
BUILD, ABLATE, ROUTE = ("01_build_a_store", "02_ablate_stpr", "03_route_with_anchors")
LOOK = "04_look_inside"
ALL = [BUILD, ABLATE, ROUTE, LOOK]
OURS = {
    "varve",
    "varve.pipeline.analysis.interpret_plots",
    "varve.pipeline.analysis.interpret",
    "varve.pipeline.analysis.plots",
    "varve.pipeline.progress",
    "varve.pipeline.experiments.results",
    "varve.pipeline.experiments.routing",
    "varve.pipeline.experiments.scenarios",
    "varve.pipeline.cli.format_store",
    "varve.pipeline.cli.format_runs",
    "varve.pipeline.datasets.synthetic",
    "varve.stores",
}
OTHERS = {"pandas", "pathlib", "shlex", "sys"}
LINES = 10


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(name: str) -> dict[str, str]:
    return {cell.id: cell.source for cell in read(name).cells if cell.cell_type == "code"}


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own, with other settings; gives its outputs by cell."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    folder = tmp_path / "notebooks"
    folder.mkdir()

    def run(name: str, **settings: str) -> dict[str, list[NotebookNode]]:
        notebook = read(name)
        settings_cell = [cell.metadata.get("tags") for cell in notebook.cells].index(["parameters"])
        has = set(assigned(notebook.cells[settings_cell].source))
        assert set(settings) <= has, f"{name} has no setting {set(settings) - has}"
        lines = [f"{key} = {value}" for key, value in settings.items()]
        notebook.cells.insert(settings_cell + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        where = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
        return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}

    return run


def assigned(source: str) -> list[str]:
    """Names that a cell gives values to."""
    names = ast.walk(ast.parse(source))
    return [x.id for x in names if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]


def printed(outputs: list[NotebookNode]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(outputs: list[NotebookNode]) -> str:
    (last,) = (output.data["text/plain"] for output in outputs if "data" in output)
    return last


def pictures(outputs: dict[str, list[NotebookNode]]) -> list[str]:
    """Cells that show one, each once."""
    images = [(cell, output.data["image/png"]) for cell, all_of_it in outputs.items()
              for output in all_of_it if "image/png" in output.get("data", {})]  # fmt: skip
    for _, image in images:
        assert base64.b64decode(image).startswith(b"\x89PNG")
    return [cell for cell, _ in images]


def complaints(outputs: dict[str, list[NotebookNode]]) -> list[str]:
    """Return the text on stderr, where Python's warnings go."""
    return [output.text for all_of_it in outputs.values() for output in all_of_it
            if output.get("name") == "stderr"]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, str]:
    """Settings of a store of four classes, three clips each, and of little to learn."""
    videos, store = (tmp_path_factory.mktemp("small") / name for name in ("videos", "s.zarr"))
    make_dataset(videos, 3, broken=False, classes=("grow", "shrink", "fade in", "fade out"))
    build(videos, store, BuildSpec("ViT-S-32:random-0"), runtime=Runtime(serial=True))
    return {
        "dataset": f"Path({str(videos)!r})",
        "store": f"Path({str(store)!r})",
        "scenario": "'2+2x1'",
        "epochs": "2",
        "runtime": "Runtime(serial=True)",
    }


def test_there_are_four():
    assert [file.stem for file in sorted(FOLDER.glob("*.ipynb"))] == ALL


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_is_kept_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("name", ALL)
def test_cells_are_short_and_begin_with_the_settings(name):
    cells = code_of(name)
    assert next(iter(cells)) == "settings"
    long = {cell: source.count("\n") + 1 for cell, source in cells.items()}
    assert max(long.values()) <= LINES, long


@pytest.mark.parametrize("name", ALL)
def test_only_public_calls_are_used(name):
    for source in code_of(name).values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= OURS | OTHERS
            elif isinstance(node, ast.ImportFrom):
                wholes = {f"{node.module}.{alias.name}" for alias in node.names}
                assert node.module in OURS | OTHERS or wholes <= OURS
                assert not [alias.name for alias in node.names if alias.name.startswith("_")]
            elif isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")


def test_videos_are_drawn_once_and_are_whole_or_not_there(tmp_path):
    cell = code_of(BUILD)["make-videos"]
    drawing = cell[cell.index("    drawn =") :]
    assert all(drawing in code_of(name)["make-store"] for name in (ABLATE, ROUTE, LOOK))
    videos = tmp_path / "demo" / "videos"
    for _ in range(2):
        exec(cell, {"dataset": videos, "clips_per_class": 1})
        assert len(list(videos.glob("*/*/clip_*"))) == 12
        assert os.listdir(videos.parent) == ["videos"]


def test_a_store_is_built_and_valid_cells_are_not_built_again(execute, tmp_path):
    videos = tmp_path / "videos"
    make_dataset(videos, 1, classes=("grow", "shrink"))
    outputs = execute(BUILD, dataset=f"Path({str(videos)!r})", runtime="Runtime(serial=True)")
    assert complaints(outputs) == []
    assert "9 clips; columns" in printed(outputs["plan-it"])  # seven of them odd
    assert "about" in printed(outputs["plan-it"])
    assert "5 clips ready, 4 clips quarantined" in printed(outputs["build-it"])
    assert "not_video" in shown(outputs["failures"])
    assert re.search(r"\(\d, 8, 384\)\nfloat16", printed(outputs["read-it"]))
    assert "nothing to decode, nothing to compute" in printed(outputs["build-again"])
    more = printed(outputs["one-more"])
    assert re.search(r"blocks.11.attn:cls .* 0 valid", more)
    assert re.search(r"proj .* 5 valid", more)


def test_an_ablation_ends_in_a_table_and_pictures(execute, small, tmp_path):
    outputs = execute(ABLATE, **small, seeds="2")
    assert complaints(outputs) == []
    rows = printed(outputs["table-it"]).splitlines()[1:]
    known = ("stpr", "learned", "td", "average")
    assert [[word for word in row.split() if word in known] for row in rows] == [
        ["stpr", "td"], ["stpr", "average"],
        ["stpr", "learned", "td"], ["stpr", "learned", "average"],
    ]  # fmt: skip
    assert pictures(outputs) == ["bands-it", "forgetting-it"]
    latex = printed(outputs["paper-it"])
    assert latex.startswith(r"\begin{tabular}")
    assert latex.count(r"\\") == 5
    runs = tmp_path / "demo" / "ablation"
    assert len(list(runs.glob("stpr-2+2x1-*/metrics.json"))) == 8


def test_clips_and_videos_are_routed(execute, small, tmp_path):
    outputs = execute(ROUTE, **small)
    assert complaints(outputs) == []
    assert pictures(outputs) == ["routing-it", "residuals-it"]
    answers = printed(outputs["route-it"])
    assert answers.count("nearest class") == 3
    varve, route, run, *videos = shlex.split(printed(outputs["shell-it"]))
    assert (varve, route, len(videos)) == ("varve", "route", 3)
    assert (tmp_path / "notebooks" / run / "checkpoints").is_dir()
    for video in videos:
        assert Path(video).is_file()
        assert f"{video}: " in answers


def test_heads_are_looked_into(execute, small, tmp_path):
    settings = {name: small[name] for name in ("dataset", "scenario", "runtime")}
    outputs = execute(LOOK, **settings, keep="'layer4.0'", blocks="1", frames="2", epochs="1")
    assert complaints(outputs) == []
    assert pictures(outputs) == [
        "saliency-it", "correlations-it", "agreement-it", "gates-it", "excitations-it",
    ]  # fmt: skip
    assert re.search(r"Clip\(row=\d+, label='\w+", printed(outputs["restore-them"]))
    runs = tmp_path / "demo" / "runs"
    assert (runs / "saliency.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(runs.glob("*/metrics.json"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "runs"), [(BUILD, 0), (ABLATE, 12), (ROUTE, 1), (LOOK, 3)])
def test_a_notebook_runs_as_it_stands_from_nothing(execute, tmp_path, name, runs):
    outputs = execute(name)
    assert complaints(outputs) == []
    demo = tmp_path / "demo"
    stores = {"maps.zarr" if name == LOOK else "notebooks.zarr", "videos"}
    assert stores <= set(os.listdir(demo)) <= {*stores, "runs", "ablation"}
    assert len(list(demo.glob("*/*/metrics.json"))) == runs
