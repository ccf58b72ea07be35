"""The rooms look one way: stores and heads know nothing of each other or of the pipeline."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = sys.stdlib_module_names
MAY_IMPORT = {
    "stores": {"stores", "numpy", "zarr", "pandas", "pyarrow", "dask", "google_crc32c", "obstore"},
    "heads": {"heads", "torch", "numpy", "faiss"},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module]
            strange = {name.split(".")[0] for name in names} - MAY_IMPORT[room] - STDLIB
            assert not strange, f"{file.relative_to(ROOT)} imports {strange}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("stores", ["torch", "av", "pipeline", "heads", "dask", "obstore"]),
        ("heads.nearest_mean", ["av", "zarr", "stores", "pipeline", "dask"]),
        ("pipeline.decoders._child", ["torch", "dask", "zarr", "pandas"]),
        ("pipeline.show", ["torch", "av", "dask"]),
        ("pipeline.cli", ["torch", "dask", "zarr", "av", "pandas", "numpy"]),
    ],
)
def test_importing_a_module_does_not_load_what_it_has_no_use_for(module, absent):
    code = f"import {module}, sys; print(sorted(set({absent}) & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"
