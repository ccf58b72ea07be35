"""The tree and its imports: folders import one way, without circles, and keep their helpers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = sys.stdlib_module_names
MAY_IMPORT = {
    "stores": {"numpy", "zarr", "pandas", "pyarrow", "dask", "google_crc32c", "obstore"},
    "heads": {"torch", "numpy", "faiss"},
}
# What stands on one line may be imported by what stands on the lines below it.
FLOORS = [
    {"varve.stores", "varve.heads"},
    {
        "varve.pipeline.config",
        "varve.pipeline.registry",
        "varve.pipeline.progress",
        "varve.pipeline.units",
        "varve.pipeline.main_guard",
        "varve.pipeline.precision",
    },
    {"varve.pipeline.datasets", "varve.pipeline.decoders", "varve.pipeline.backbones"},
    {"varve.pipeline.extraction"},
    {"varve.pipeline.experiments"},
    {"varve.pipeline.analysis"},
    {"varve.pipeline.cli"},
]
MOST_MODULES = 20
FILES = [file for room in ("stores", "heads", "pipeline") for file in (ROOT / room).rglob("*.py")]


def module_of(file: Path) -> str:
    """The dotted name of a file of ours."""
    parts = ["varve", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; of ours, the module and not the name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def floor_of(module: str) -> int | None:
    """The line of `FLOORS` that a module stands on."""
    for number, rooms in enumerate(FLOORS):
        if any(f"{module}.".startswith(f"{room}.") for room in rooms):
            return number
    return None


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            ours = f"{name}.".startswith(f"varve.{room}.")
            root = name.split(".")[0]
            assert ours or root in STDLIB or root in MAY_IMPORT[room], (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_every_module_stands_on_a_floor():
    lost = {m for m in MODULES if floor_of(m) is None} - {"varve.pipeline"}
    assert not lost


def test_imports_never_point_up_a_floor():
    wrong = [
        f"{module} imports {name}"
        for module, file in MODULES.items()
        for name in imports(file)
        if (there := floor_of(name)) is not None
        and (here := floor_of(module)) is not None
        and there > here
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_rooms_of_one_floor_are_in_no_circle():
    """Folder by folder: nothing that a folder imports, however indirectly, imports the folder."""
    room_of = {
        m: next((r for rooms in FLOORS for r in rooms if f"{m}.".startswith(f"{r}.")), m)
        for m in MODULES
    }
    arrows: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        for name in imports(file):
            if name in MODULES and room_of[name] != room_of[module]:
                arrows.setdefault(room_of[module], set()).add(room_of[name])
    for start in arrows:
        seen, waiting = set(), [start]
        while waiting:
            for after in arrows.get(waiting.pop(), ()):
                assert after != start, f"{start} imports itself by way of others"
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)


def test_modules_are_in_no_circle():
    """Counted at the top of files: an import inside a function waits until everything is there."""
    graph = {}
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text())
        top = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        names = set()
        for node in top.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            else:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names.add(whole if whole in MODULES else node.module)
        graph[module] = names & set(MODULES) - {module}
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*path, module))
        if module not in state:
            state[module] = 1
            for name in graph[module]:
                visit(name, (*path, module))
            state[module] = 2

    for module in graph:
        visit(module, ())


def test_a_leading_underscore_is_not_imported_from_outside_its_folder():
    wrong = []
    for module, file in MODULES.items():
        home = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("varve"):
                continue
            for whole in (f"{node.module}.{alias.name}" for alias in node.names):
                parts = whole.split(".")
                for n, part in enumerate(parts):
                    if part.startswith("_") and not part.startswith("__"):
                        folder = ".".join(parts[:n])
                        if f"{home}." != f"{folder}." and not home.startswith(f"{folder}."):
                            wrong.append(f"{module} imports {whole}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_folder_has_more_than_twenty_modules():
    folders = {file.parent for file in FILES}
    full = {f.relative_to(ROOT): len(list(f.glob("*.py"))) - 1 for f in folders}
    assert not {f: n for f, n in full.items() if n > MOST_MODULES}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("varve", ["torch", "numpy", "dask", "varve.pipeline"]),
        ("varve.stores", ["torch", "av", "varve.pipeline", "varve.heads", "dask", "obstore"]),
        (
            "varve.heads.closed_form.nearest_mean",
            ["av", "zarr", "varve.stores", "varve.pipeline", "dask"],
        ),
        ("varve.pipeline.decoders", ["torch", "dask", "zarr", "pandas"]),
        ("varve.pipeline.cli.format_store", ["torch", "av", "dask"]),
        ("varve.pipeline.cli.app", ["torch", "dask", "zarr", "av", "pandas", "numpy"]),
    ],
)
def test_importing_a_module_does_not_load_what_it_has_no_use_for(module, absent):
    code = f"import {module}, sys; print(sorted(set({absent}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
