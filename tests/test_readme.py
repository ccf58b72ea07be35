"""The Python of the README runs as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_python_blocks_compile_and_their_imports_give_what_they_name():
    code = []
    for block in BLOCKS:
        compile(block, "README.md", "exec")
        imports = [line for line in block.splitlines() if re.match(r"(from|import) ", line)]
        names = re.findall(r"import (.+)", "\n".join(imports))
        called = [name.strip() for line in names for name in line.split(",")]
        there = f"all(callable(f) or hasattr(f, '__path__') for f in [{', '.join(called)}])"
        code += [*imports, f"assert {there}, {imports}"]
    assert len(code) > len(BLOCKS)
    # In a process of its own: here much is imported already, and its names are there without it.
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "line",
    ["from varve import BuildSpec, build, plan", "from varve import plan, build, BuildSpec"],
)
def test_public_calls_are_calls_in_whatever_order_they_are_imported(line):
    code = f"{line}\nassert callable(build) and callable(plan)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
