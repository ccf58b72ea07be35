"""Options of a build are declared once; plugins are loaded before the commands."""

from dataclasses import dataclass, fields

import pytest
import typer
from typer.testing import CliRunner

from varve.pipeline import config, registry
from varve.pipeline.cli.options import takes
from varve.pipeline.config import BuildSpec, Runtime, option
from varve.pipeline.experiments.sweep_spec import Sweep

PLUGIN = """
from varve import register

@register("samplings")
def {name}(times_N, frames):
    return [0] * frames
"""


@dataclass(frozen=True)
class Longer(BuildSpec):
    """A build with one more option."""

    grayscale: bool = option(False, help="Drop the colours.")
    border: int = option(3, choices=(), help="Pixels around a picture.")
    order: str = option("asc", choices=("asc", "desc"), help="Order of the clips.")


def run(command, *arguments: str) -> str:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_a_new_field_is_an_option_of_a_command():
    @takes(spec=Longer, runtime=Runtime)
    def build(spec: Longer, runtime: Runtime) -> None:
        print(spec.backbones, spec.grayscale, spec.border, spec.order, runtime.workers)

    words = ("--backbone", "a:b", "--grayscale", "--border", "7", "--order", "desc")
    assert run(build, *words, "--workers", "2").split() == ["('a:b',)", "True", "7", "desc", "2"]
    assert run(build, "--backbone", "a:b").split() == ["('a:b',)", "False", "3", "asc", "0"]
    with pytest.raises(ValueError, match="no order 'x'; choose from asc, desc"):
        run(build, "--backbone", "a:b", "--order", "x")
    help_text = " ".join(run(build, "--help").split())
    assert "Drop the colours." in help_text
    assert "Order of the clips. [asc, desc]" in help_text


def test_a_new_field_changes_a_recorded_request():
    @takes(partial=True, changes=Longer)
    def diff(changes: dict) -> None:
        recorded = Longer(("a:b",), border=5, order="desc")
        new = recorded.changed(**changes)
        print(new.backbones, new.grayscale, new.border, new.order)

    assert run(diff).split() == ["('a:b',)", "False", "5", "desc"]
    words = ("--grayscale", "--border", "9", "--backbone", "c:d")
    assert run(diff, *words).split() == ["('c:d',)", "True", "9", "desc"]
    assert run(diff, "--no-grayscale").split() == ["('a:b',)", "False", "5", "desc"]
    assert "--text" not in run(diff, "--help")  # decides no column's key


def test_a_change_resets_what_depends_on_it():
    dense = BuildSpec("a:b", sampling="dense", stride=2, views=2, flip=True)
    assert dense.changed(sampling="tsn").stride == 0
    assert dense.changed(frames=4).stride == 2
    plain = dense.changed(views=1)
    assert (plain.flip, plain.stride) == (False, 2)
    with pytest.raises(ValueError, match="fps"):
        dense.changed(sampling="uniform_fps")


@pytest.mark.parametrize("declared", [BuildSpec, Runtime])
def test_every_field_is_declared(declared):
    assert list(config.options_of(declared)) == [f.name for f in fields(declared)]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "")
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace("{name}", "first_of_cli"))
    yield file
    registry._forget(str(file))


@pytest.mark.parametrize("after", [False, True])
def test_a_plugin_is_loaded_before_or_after_the_command(varve, plugin, tmp_path, after):
    words = ["build", tmp_path, "--store", tmp_path / "s", "--sampling", "first_of_cli"]
    loading = [f"--plugin={plugin}"] if after else ["--plugin", plugin]
    done = varve(*words, *loading) if after else varve(*loading, *words)
    assert "no backbone asked for" in done.stderr  # the rule was found
    assert registry.variant("samplings", "first_of_cli")(range(9), 2) == [0, 0]


def test_a_plugin_that_is_missing_or_broken_is_a_sentence(varve, plugin, tmp_path):
    done = varve("info", tmp_path, "--plugin", tmp_path / "nothing.py")
    assert (done.returncode, "give a Python file that exists" in done.stderr) == (2, True)
    plugin.write_text("1 / 0")
    done = varve("info", tmp_path, "--plugin", plugin)
    assert (done.returncode, "cannot be loaded: ZeroDivisionError" in done.stderr) == (2, True)
    done = varve("info", tmp_path, "--plugin")
    assert done.returncode == 2


def test_a_sweep_loads_its_plugins_relative_to_its_file(plugin):
    sweep = plugin.with_name("sweep.toml")
    sweep.write_text('heads = ["slda"]\nscenario = "demo"\nplugins = ["mine.py"]\n')
    assert Sweep.read(sweep).heads == ["slda"]
    assert "first_of_cli" in registry.available("samplings")
    sweep.write_text('heads = ["slda"]\nscenario = "demo"\nplugins = ["nothing.py"]\n')
    with pytest.raises(ValueError, match=r"nothing.py: give a Python file that exists"):
        Sweep.read(sweep)
