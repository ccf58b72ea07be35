"""A module's identity by what its code takes from elsewhere: files, packages, libraries, torch."""

import importlib
import json
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from varve.pipeline.backbones._fingerprint import identity
from varve.stores.digests import canonical, digest


def run(text, name="a_notebook", **variables):
    space = {"__name__": name, "torch": torch, "nn": nn, **variables}
    exec(compile(textwrap.dedent(text), f"<{name}>", "exec"), space)
    return SimpleNamespace(**space)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes files and forgets what was imported of their names."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(folder, **files):
        monkeypatch.syspath_prepend(tmp_path / folder)
        for name, text in files.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.py").write_text(textwrap.dedent(text))
        for name in set(sys.modules) - before:
            if name.startswith("my_"):
                del sys.modules[name]
        importlib.invalidate_caches()

    yield write
    write("")


def key(module, known=()):
    described = identity(module, known)
    assert json.loads(canonical(described)) == described
    return digest(described)


MY_HELPERS = """
    def f(x):
        return g(x)

    def g(x):
        return x + 1

    def h(x):
        return x

    def __getattr__(name):
        return lambda x: x + 3
"""


@pytest.mark.parametrize(
    ("forward", "whole"),
    [
        ("return my_helpers.f(x)", False),
        ("from my_helpers import f; return f(x)", False),
        ("import my_helpers as m; return m.f(x)", True),
        ("return getattr(my_helpers, 'f')(x)", True),
        ("return my_helpers.made_up(x)", True),
        ("return my_helpers.made_up.g(x)", True),
    ],
)
def test_of_the_users_modules_what_is_used_counts(write, forward, whole):
    def key_with(helpers):
        graft = f"""
            import my_helpers
            from torch import nn

            class Graft(nn.Module):
                def forward(self, x):
                    {forward}
        """
        write("files", my_helpers=helpers, my_graft=graft)
        return key(importlib.import_module("my_graft").Graft())

    before = key_with(MY_HELPERS)
    assert key_with(MY_HELPERS) == before
    assert (key_with(MY_HELPERS.replace("return x\n", "return -x\n")) != before) == whole
    if "made_up" in forward:
        assert key_with(MY_HELPERS.replace("x + 3", "x + 4")) != before
    else:
        assert key_with(MY_HELPERS.replace("x + 1", "x + 2")) != before


def test_an_installed_package_counts_by_its_version_and_by_what_is_used_of_it(write, tmp_path):
    def keys_with(number="1.0", times=2):
        package = f"""
            import torch
            from types import SimpleNamespace
            REGISTRY = {{"rng": torch.Generator()}}

            class Part(torch.nn.Module):
                seen = SimpleNamespace(kept=[iter(())])

                def forward(self, x):
                    return x * {times}

            def f(x):
                return REGISTRY["f"](x) * {times}
        """
        write("site-packages", my_package=package)
        info = tmp_path / "site-packages" / "my_package.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Name: my_package\nVersion: {number}\n")
        module = importlib.import_module("my_package")
        called = "class Graft(nn.Module):\n    def forward(self, x): return {}(x)"
        inside = run(called.format("my_package.f"), my_package=module).Graft()
        alone = run(called.format("f"), f=module.f).Graft()
        other = run(called.format("my_package.REGISTRY.get"), my_package=module).Graft()
        return [key(graft) for graft in (inside, alone, module.Part(), other)]

    before = keys_with()
    assert keys_with() == before
    assert all(first != second for first, second in zip(before, keys_with("1.1"), strict=True))
    assert all(
        first != second for first, second in zip(before[:3], keys_with(times=3)[:3], strict=True)
    )
    assert keys_with("1.0+cu130") == before


def test_an_import_as_the_code_runs_must_be_there_before(write):
    write("files", my_helpers=MY_HELPERS)
    notebook = run("""
        class Graft(nn.Module):
            def forward(self, x):
                from my_helpers import f
                return f(x)
    """)
    with pytest.raises(TypeError, match=r"Graft.*forward imports my_helpers .*load it first"):
        identity(notebook.Graft())
    for name in ("math", "timm", "a_package_that_is_nowhere"):
        library = run(f"""
            class Graft(nn.Module):
                def forward(self, x):
                    import {name}
                    return x
        """)
        assert key(library.Graft())


def test_the_library_of_a_name_counts():
    text = """
        class Graft(nn.Module):
            def forward(self, x):
                return xp.exp(x)
    """
    keys = {key(run(text, xp=xp).Graft()) for xp in (torch, np, importlib.import_module("math"))}
    assert len(keys) == 3


def test_arguments_of_torchs_decorators_count():
    def key_with(dtype):
        text = f"""
            class Graft(nn.Module):
                @torch.autocast("cpu", dtype=torch.{dtype})
                def forward(self, x):
                    return x
        """
        graft = run(text).Graft()
        before = key(graft)
        graft(torch.ones(1))
        assert key(graft) == before
        return before

    assert key_with("bfloat16") == key_with("bfloat16") != key_with("float16")


def test_a_compiled_function_counts_as_what_was_compiled():
    text = """
        @torch.compile(backend="eager")
        def doubled(x):
            return x * 2

        class Graft(nn.Module):
            def forward(self, x):
                return doubled(x)
    """
    assert key(run(text).Graft()) == key(run(text).Graft())
    assert key(run(text.replace("x * 2", "x * 3")).Graft()) != key(run(text).Graft())


def test_what_has_no_name_is_refused_in_code_too_even_under_torchs_decorators():
    text = """
        @torch.no_grad()
        def noisy(x):
            return x + RNG.normal()

        class Graft(nn.Module):
            def forward(self, x):
                return noisy(x)
    """
    twice = ("@torch", "@torch.inference_mode()\n        @torch")
    for edit in ("", ""), ("@torch.no_grad()", ""), twice:
        with pytest.raises(TypeError, match=r"Graft\.forward: noisy.*: RNG is a numpy\.random"):
            identity(run(text.replace(*edit), RNG=np.random.default_rng(0)).Graft())


def test_a_decorator_of_a_library_may_contain_what_has_no_fingerprint():
    text = """
        import functools

        @functools.singledispatch
        def shifted(x):
            return x

        @shifted.register
        def _(x: int):
            return x + 5

        class Graft(nn.Module):
            def forward(self, x):
                return shifted(x)
    """
    graft = run(text).Graft()
    before = key(graft)
    assert graft(1) == 6
    assert key(graft) == key(run(text).Graft()) == before
    assert key(run(text.replace("x + 5", "x + 6")).Graft()) != before


def test_a_function_put_into_a_class_of_torch_counts(monkeypatch):
    before = key(nn.Sequential(nn.GELU()))
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x)
    assert key(nn.Sequential(nn.GELU())) != before
    heir = type("Heir", (nn.GELU,), {})
    first = key(heir())
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: -x)
    assert key(heir()) != first
    monkeypatch.undo()
    assert key(nn.Sequential(nn.GELU())) == before
