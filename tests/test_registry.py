"""A user's variants are found in every process, and identified by their text."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from varve.pipeline import registry

KINDS = ("heads", "grafts", "layouts", "decoders", "samplings", "backbones", "reductions")
PLUGIN = """
from varve import register

@register("samplings")
def first(times_N, frames):
    return {result}
"""


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Leave the registry of this process as it was."""
    monkeypatch.setenv(registry.VARIABLE, "")
    monkeypatch.setattr(registry, "_LOADED", {})
    monkeypatch.setattr(
        registry, "_REGISTERED", {kind: dict(v) for kind, v in registry._REGISTERED.items()}
    )
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


@pytest.fixture
def plugin(tmp_path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace("{result}", "[0]"))
    return file


def child(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options
    )


def package(folder: Path, name: str, kind: str, entry: str) -> None:
    """Write what an installed package leaves: a module, and its entry points."""
    (folder / f"{name}.py").write_text("def first(*_, **options):\n    return [0]\n")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[varve.{kind}]\n{entry}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_variants_of_varve_are_listed_without_an_import(kind):
    code = f"""
import sys
from varve.pipeline import registry
names = registry.listed({kind!r})
assert names and not any(name.startswith("_") for name in names), names
assert "numpy" not in sys.modules and "torch" not in sys.modules
"""
    assert child(code).returncode == 0


def test_a_plugin_is_registered_and_loaded_once(plugin):
    registry.load_plugin(plugin)
    registry.load_plugin(plugin)
    assert "first" in registry.available("samplings")
    assert registry.variant("samplings", "first")(range(9), 3) == [0]


def test_an_edited_plugin_has_another_digest_and_is_loaded_again(plugin):
    registry.load_plugin(plugin)
    before = registry.source_digest("samplings", "first")
    plugin.write_text(PLUGIN.replace("{result}", "[1]").replace("first", "second"))
    registry.load_plugin(plugin)
    assert "first" not in registry.available("samplings")
    assert registry.variant("samplings", "second")(range(9), 3) == [1]
    assert registry.source_digest("samplings", "second") != before
    assert len(before) == 64


def test_variants_of_varve_have_no_digest():
    assert registry.source_digest("layouts", "class_folders") == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("from varve import register\nregister('sampling')", "no kind 'sampling'"),
        (PLUGIN.replace("{result}", "[0]") + "1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_raises_is_named_and_registers_nothing(plugin, text, message):
    plugin.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        registry.load_plugin(plugin)
    assert str(plugin) in str(error.value)
    assert "first" not in registry.available("samplings")
    assert os.environ[registry.VARIABLE] in ("", "{}")


@pytest.mark.parametrize("name", ["nothing.py", "."])
def test_a_plugin_that_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="give a Python file that exists"):
        registry.load_plugin(tmp_path / name)


def test_names_are_registered_once(plugin, tmp_path):
    registry.load_plugin(plugin)
    other = tmp_path / "other.py"
    other.write_text(plugin.read_text())
    with pytest.raises(ValueError, match="samplings has 'first' already") as error:
        registry.load_plugin(other)
    assert str(other) in str(error.value)
    for kind, name in (("decoders", "pyav"), ("reductions", "pool")):
        with pytest.raises(ValueError, match=f"{kind} has '{name}' already"):
            registry.register(kind, name)(lambda: 0)


def test_one_file_cannot_give_one_name_to_two_functions(plugin):
    plugin.write_text(
        plugin.read_text() + '@register("samplings", "first")\ndef second(*_): return [1]\n'
    )
    with pytest.raises(ValueError, match="'first' already"):
        registry.load_plugin(plugin)


def test_an_unknown_name_is_refused_with_the_near_ones():
    with pytest.raises(ValueError, match=r"did you mean pyav.*there are decord, pyav"):
        registry.variant("decoders", "pyaw")


@pytest.mark.parametrize("kind", ["samplings", "backbones"])
def test_an_entry_point_of_an_installed_package_is_a_variant(tmp_path, monkeypatch, kind):
    package(tmp_path, "fake_varve_package", kind, "first_of_package = fake_varve_package:first")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "first_of_package" in registry.available(kind)
    assert registry.variant(kind, "first_of_package")(range(9), 3) == [0]
    before = registry.source_digest(kind, "first_of_package")
    (tmp_path / "fake_varve_package.py").write_text("# edited")
    assert registry.source_digest(kind, "first_of_package") != before
    sys.modules.pop("fake_varve_package", None)


def test_entry_points_do_not_replace_a_variant(tmp_path, monkeypatch):
    package(tmp_path, "fake_varve_rival", "decoders", "pyav = fake_varve_rival")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="package fake_varve_rival has another"):
        registry.variant("decoders", "pyav")


def test_child_processes_load_the_plugins_of_their_parent(plugin):
    registry.load_plugin(plugin)
    code = """
from varve.pipeline import registry
print(registry.variant("samplings", "first")(range(9), 3))
print(registry.source_digest("samplings", "first"))
"""
    digest = registry.source_digest("samplings", "first")
    assert child(code).stdout.split() == ["[0]", digest]
    plugin.write_text(plugin.read_text() + "# edited")
    assert "was edited while it is in use" in child(code).stderr


def test_child_processes_import_a_module_that_registered(plugin, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (tmp_path / "imported_variants.py").write_text(plugin.read_text())
    __import__("imported_variants")
    assert json.loads(os.environ[registry.VARIABLE]) == {"imported_variants": ""}
    code = "from varve.pipeline import registry; print(*registry.available('samplings'))"
    assert "first" in child(code).stdout.split()
    del sys.modules["imported_variants"]


def test_a_variant_of_a_notebook_is_used_here_and_refused_where_processes_start():
    code = (
        PLUGIN.replace("{result}", "[0]")
        + """
from varve.pipeline import registry
from varve.pipeline.main_guard import require_guard
assert registry.variant("samplings", "first")(range(9), 3) == [0]
require_guard("decoders")
require_guard("samplings")
"""
    )
    done = child(
        "import linecache\n"
        f"text = {code!r}\n"
        "linecache.cache['cell'] = (len(text), None, text.splitlines(True), 'cell')\n"
        "exec(compile(text, 'cell', 'exec'))"
    )
    assert "'first' of samplings is defined in this notebook" in done.stderr
    assert "varve.load_plugin('mine.py')" in done.stderr


def test_a_class_of_a_session_whose_text_is_unknown_is_refused():
    code = "from varve import register\n@register('samplings')\nclass First: pass"
    assert "call varve.load_plugin('mine.py')" in child(code).stderr


def test_a_plugin_that_fails_is_loaded_by_no_later_request(plugin):
    registry.load_plugin(plugin)
    plugin.write_text("raise SystemExit(0)")
    with pytest.raises(ValueError, match="cannot be loaded: SystemExit"):
        registry.load_plugin(plugin)
    assert "first" not in registry.available("samplings")
    assert json.loads(os.environ[registry.VARIABLE]) == {}


def test_a_variable_that_is_no_json_is_named(monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "mine.py")
    with pytest.raises(ValueError, match=r"VARVE_PLUGINS is 'mine\.py'; it is a JSON object"):
        registry.plugins()
