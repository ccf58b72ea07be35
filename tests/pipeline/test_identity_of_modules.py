"""A module's identity: all that decides what it computes changes it, and nothing else does."""

import copy
import enum
import functools
import importlib
import io
import json
import random
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbones import _origin, load
from pipeline.backbones._identity import identity
from stores.identity import canonical, digest

ROOT = Path(__file__).parents[2]

TEXT = '''
import dataclasses
import enum
import functools
import math
import typing
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu as squash

GAIN = 2.5
TABLE = {"gain": [1, 2]}

def deepest(x):
    return x * 3

def deeper(x):
    return deepest(x) + 1

def aside(x):
    return x * 29

def powers(by):
    """A function with a value of its own."""

    def f(x, power=2, *, offset=7):
        return x**power * by + offset

    return f

power = powers(5)

def tripled(f):
    @functools.wraps(f)
    def g(*args):
        return f(*args) * 3

    return g

def nested():
    class Nested:
        def value(self):
            return 31

    return Nested()


class Settings:
    """Told from outside."""

    level = 4

    def __init__(self, start):
        self.start = start

    def rate(self):
        return self.start * self.level

settings = Settings(6)

class Kind(enum.Enum):
    SUM = "sum"

    def join(self, x):
        return getattr(x, self.value)(0)

class Joins(typing.Protocol):
    def joined(self, x):
        return x + 19

class Joining(Joins):
    kind = Kind.SUM

@dataclasses.dataclass(frozen=True)
class Options:
    depth: int = 2
    names: list[str] = dataclasses.field(default_factory=list)

class Pair(typing.NamedTuple):
    first: int = 1
    second: int = 2

class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 23

class Inner(nn.Module):
    def forward(self, x):
        return x.abs()

class Graft(nn.Module):
    """What it does."""

    SCALE = 0.5

    def __init__(self):
        """Make it."""
        super().__init__()
        self.width = 4
        self.lift = lambda x: x + 11
        self.norm = nn.LayerNorm(4, eps=1e-5)
        self.conv = nn.Conv2d(4, 4, 3, stride=1, padding=1, padding_mode="zeros")
        self.inner = Inner()
        self.options = [Options(), Pair(), Joining(), list[Options], {Kind.SUM}]

    @property
    def half(self):
        return self.width / 2

    @staticmethod
    def still(x):
        return x.clamp(0, 9)

    @tripled
    def wrapped(self, x):
        return x - 13

    @torch.no_grad()
    def untrained(self, x):
        return x - 17

    def forward(self, x, shift=8):
        """Run it."""
        # A remark.
        y = squash(x) * 2 + self.SCALE
        try:
            for n in range(3):
                y = deeper(power(y)) if n else F.gelu(y)
        except ValueError:
            y = self.still(self.wrapped(y))
        y = Doubling.apply(y) + sum(aside(n) for n in ()) + nested().value()
        return y * GAIN + shift + settings.rate() + TABLE["gain"][0] * math.pi
'''

HALF = """    @property
    def half(self):
        return self.width / 2
"""
STILL = """    @staticmethod
    def still(x):
        return x.clamp(0, 9)
"""
DECIDES = {
    "an operator": ("x.abs()", "-x"),
    "a constant": ("* 2 + self", "* 3 + self"),
    "an integer that becomes a float": ("* 2 + self", "* 2.0 + self"),
    "a class constant": ("SCALE = 0.5", "SCALE = 0.25"),
    "a global constant": ("GAIN = 2.5", "GAIN = 2.25"),
    "a global container": ("[1, 2]", "(1, 2)"),
    "a function two calls deep": ("x * 3", "x * 4"),
    "a function called in a generator": ("x * 29", "x * 28"),
    "the value in a closure": ("powers(5)", "powers(6)"),
    "a default": ("power=2", "power=3"),
    "a keyword's default": ("offset=7", "offset=8"),
    "the forward's default": ("shift=8", "shift=9"),
    "an attribute": ("self.width = 4", "self.width = 5"),
    "a lambda": ("x + 11", "x + 12"),
    "a nested eps": ("eps=1e-5", "eps=1e-6"),
    "a nested stride": ("stride=1", "stride=2"),
    "a nested padding mode": ('"zeros"', '"reflect"'),
    "a nested class of the user's": ("x.abs()", "x.abs().neg()"),
    "a property": ("self.width / 2", "self.width / 3"),
    "a static method": ("clamp(0, 9)", "clamp(0, 8)"),
    "a decorator": ("f(*args) * 3", "f(*args) * 4"),
    "what is decorated": ("x - 13", "x - 14"),
    "what torch decorates": ("x - 17", "x - 18"),
    "a class of a global object": ("level = 4", "level = 5"),
    "a method of a global object": ("self.start * self", "self.start + self"),
    "what a global object holds": ("Settings(6)", "Settings(7)"),
    "which function a name means": ("import relu as squash", "import silu as squash"),
    "which module a name means": ("torch.nn.functional as F", "torch as F"),
    "what an exception catches": ("ValueError", "KeyError"),
    "a class inside a function": ("return 31", "return 37"),
    "an enum's value": ('"sum"', '"mean"'),
    "an enum's method": ("(x, self.value)(0)", "(x, self.value)(1)"),
    "a protocol's method": ("x + 19", "x + 18"),
    "a dataclass's default": ("depth: int = 2", "depth: int = 3"),
    "a named tuple": ("Pair()", "Pair(3)"),
    "a function with gradients": ("x * 23", "x * 22"),
    "a branch turned round": ("if n else F.gelu(y)", "if not n else F.gelu(y)"),
    "a base": ("class Inner(nn.Module)", "class Inner(nn.Identity)"),
    "a method more": ("    @property", "    def more(self):\n        pass\n\n    @property"),
}

DECIDES_NOTHING = {
    "a comment": ("# A remark.", "# Another one,\n        # of two lines."),
    "a class's docstring": ('"""What it does."""', ""),
    "a method's docstring": ('"""Run it."""', '"""Otherwise."""'),
    "no docstring": ('        """Run it."""\n', ""),
    "a function's docstring": ('"""A function with a value of its own."""', ""),
    "a line break": ("deepest(x) + 1", "(\n        deepest(\n            x\n        ) + 1)"),
    "a statement that does nothing": ("# A remark.", "pass"),
    "a line break in a try": ("deeper(power(y)) if", "deeper(\n  power(\n  y)\n) if"),
    "an annotation": ("def deepest(x):", "def deepest(x: float) -> float:"),
    "what nothing refers to": ("GAIN = 2.5", "GAIN = 2.5\nOTHER = 3"),
    "the place in the file": ("GAIN = 2.5", "\n" * 20 + "GAIN = 2.5"),
    "quotes": ('"zeros"', "'zeros'"),
    "the order of methods": (HALF + "\n" + STILL, STILL + "\n" + HALF),
}


def run(text, name="a_notebook", **given):
    space = {"__name__": name, "torch": torch, "nn": nn, **given}
    exec(compile(textwrap.dedent(text), f"<{name}>", "exec"), space)
    return SimpleNamespace(**space)


def key(module, known=()):
    described = identity(module, known)
    assert json.loads(canonical(described)) == described
    return digest(described)


class Holder(nn.Module):
    """Holds what it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Vouched(Holder):
    code = "vouched/1"


def doubled(x):
    return x * 2


def halved(x):
    return x / 2


def edited(edit):
    old, new = edit
    assert TEXT.count(old) >= 1
    return run(TEXT.replace(old, new)).Graft()


def test_the_same_text_gives_the_same_identity():
    assert identity(run(TEXT).Graft()) == identity(run(TEXT, "another").Graft())


@pytest.mark.parametrize("edit", DECIDES.values(), ids=list(DECIDES))
def test_what_decides_a_value_changes_the_identity(edit):
    assert key(edited(edit)) != key(run(TEXT).Graft())


FUNCTIONS = """
x: x + 1 | x: x - 1 | x: x + 1.0 | x: x + 1.5 | x: x + 2.5 | x: x + 1j | x: b"a" | x: b"b"
x: x in {"a", "b", "c"} | x: x in ("a", "b", "c") | x: f"{x}" | x: f"{x!r}" | x: (yield x)
x, y: x | y, x: x | x, *, y: x | x, /, y: x | x, *y: x | x, **y: x | *y: 1 | **y: 1
x=1: x | x=2: x | *, x=1: x | x: lambda y: x + y | x: lambda y: x - y | x: x.sum() | x: x.mean()
x: x[1:2] | x: x < 1 | x: x > 1 | x: x and 1 | x: x or 1
"""
BODIES = """
    if x:
        a()
    b()
    return 1
---
    if x:
        a()
        b()
    return 1
---
    a()
    try:
        b()
    except ValueError:
        return 1
---
    try:
        a()
        b()
    except ValueError:
        return 1
---
    try:
        b()
        a()
    except ValueError:
        return 1
"""


def test_functions_that_differ_in_one_thing_have_other_identities():
    bodies = [f"def f(x):\n{body}" for body in BODIES.split("---\n")]
    lambdas = FUNCTIONS.strip().replace("\n", "|").split("|")
    texts = [f"f = lambda {text.strip()}" for text in lambdas] + bodies
    keys = [key(Holder(value=run(text).f)) for text in texts]
    assert keys == [key(Holder(value=run(text).f)) for text in texts]
    assert len(set(keys)) == len(keys)


def test_where_a_function_was_written_decides_nothing():
    inside = run("def made():\n    return lambda x: x + 1\n\nf = made()").f
    assert key(Holder(value=inside)) == key(Holder(value=run("f = lambda x: x + 1").f))

    def nowhere(text):
        space = {"nn": nn}
        exec(text, space)
        assert space["Graft"].__module__ == "builtins"
        return space["Graft"]()

    text = "class Graft(nn.Module):\n    def forward(self, x): return x + 1"
    assert key(nowhere(text)) == key(run(text).Graft())
    assert key(nowhere(text.replace("+", "-"))) != key(nowhere(text))
    text = textwrap.dedent("""
        import dataclasses

        @dataclasses.dataclass
        class Options:
            depth: int = dataclasses.field(default=1, compare=True)

        class Graft(nn.Module):
            def forward(self, x):
                return Options(2) == Options(x)
    """)
    assert key(nowhere(text.replace("True", "False"))) != key(nowhere(text))


def test_what_hangs_on_a_function_counts():
    one, two = (run("def f(x): return x").f for _ in range(2))
    one.scale, two.scale = 1, 2
    assert key(Holder(value=one)) != key(Holder(value=two))


def test_a_name_of_a_library_says_which_library():
    text = """
        class Graft(nn.Module):
            def forward(self, x):
                return xp.exp(x)
    """
    keys = {key(run(text, xp=xp).Graft()) for xp in (torch, np, importlib.import_module("math"))}
    assert len(keys) == 3


def test_what_is_torchs_is_told_by_its_name():
    described = identity(Holder(act=nn.GELU("tanh"), up=nn.functional.interpolate, kind=nn.ReLU))
    assert described["children"][0][1]["code"] == {"name": "torch.nn.modules.activation.GELU"}
    assert described["attributes"] == {
        "kind": {"name": "torch.nn.modules.activation.ReLU"},
        "up": {"name": "torch.nn.functional.interpolate"},
    }


def test_what_a_constructor_calls_is_past_unless_the_code_will_call_it():
    text = """
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                drawn()

        class Graft(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Part()

            def forward(self, x):
                return {}(x)

        def drawn():
            return {}
    """
    for part, follows in ("self.part", False), ("Part()", True):
        keys = {key(run(text.format(part, one)).Graft()) for one in ("1", "2")}
        assert (len(keys) == 2) == follows


def test_options_and_the_order_of_torchs_layers_count():
    made = [
        *(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-6), nn.LayerNorm((4,), eps=1)),
        *(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1)),
        *(nn.Conv2d(4, 4, 3, padding_mode="reflect"), nn.Conv2d(4, 4, 3, dilation=2)),
        *(nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), nn.Dropout(0.1)),
        *(nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 4), nn.Upsample(scale_factor=2)),
        *(nn.Sequential(nn.ReLU(), nn.GELU()), nn.Sequential(nn.GELU(), nn.ReLU())),
        *(Holder(a=nn.ReLU(), b=nn.ReLU()), Holder(b=nn.ReLU(), a=nn.ReLU())),
    ]
    keys = [key(nn.Sequential(module)) for module in made]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("edit", DECIDES_NOTHING.values(), ids=list(DECIDES_NOTHING))
def test_what_decides_no_value_changes_nothing(edit):
    assert identity(edited(edit)) == identity(run(TEXT).Graft())


def test_files_scripts_and_pickled_classes_have_the_notebooks_identity(tmp_path, monkeypatch):
    cloudpickle = pytest.importorskip("cloudpickle")
    notebook = run(TEXT, "__main__")
    (tmp_path / "a_file.py").write_text(TEXT)
    (tmp_path / "pickled").write_bytes(cloudpickle.dumps(notebook.Graft()))
    (tmp_path / "script.py").write_text(
        TEXT
        + textwrap.dedent("""
        if __name__ == "__main__":
            import cloudpickle, pickle, sys
            from pipeline.backbones._identity import identity
            from stores.identity import digest
            import a_file
            with open(sys.argv[1], "rb") as file:
                pickled = pickle.load(file)
            first = digest(identity(pickled))
            copied = pickle.loads(cloudpickle.dumps(a_file.Graft()))
            pickled(torch.zeros(1, 4))
            print(*(digest(identity(m)) for m in (Graft(), a_file.Graft(), copied, pickled)), first)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "pickled"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(out.stdout.split()) == {key(notebook.Graft())}


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
        _origin._number.cache_clear()

    yield write
    write("")


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
def test_of_the_users_own_modules_what_is_used_counts(write, forward, whole):
    def made(helpers):
        graft = f"""
            import my_helpers
            from torch import nn

            class Graft(nn.Module):
                def forward(self, x):
                    {forward}
        """
        write("files", my_helpers=helpers, my_graft=graft)
        return key(importlib.import_module("my_graft").Graft())

    before = made(MY_HELPERS)
    assert made(MY_HELPERS) == before
    assert (made(MY_HELPERS.replace("return x\n", "return -x\n")) != before) == whole
    if "made_up" in forward:
        assert made(MY_HELPERS.replace("x + 3", "x + 4")) != before
    else:
        assert made(MY_HELPERS.replace("x + 1", "x + 2")) != before


def test_an_installed_package_counts_by_its_version_and_by_what_is_used_of_it(write, tmp_path):
    def made(number="1.0", times=2):
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

    before = made()
    assert made() == before
    assert all(one != two for one, two in zip(before, made("1.1"), strict=True))
    assert all(one != two for one, two in zip(before[:3], made(times=3)[:3], strict=True))
    assert made("1.0+cu130") == before


def test_an_import_as_the_code_runs_must_be_there_before(write):
    write("files", my_helpers=MY_HELPERS)
    made = run("""
        class Graft(nn.Module):
            def forward(self, x):
                from my_helpers import f
                return f(x)
    """)
    with pytest.raises(TypeError, match=r"Graft.*forward imports my_helpers .*load it first"):
        identity(made.Graft())
    for name in ("math", "timm", "a_package_that_is_nowhere"):
        library = run(f"""
            class Graft(nn.Module):
                def forward(self, x):
                    import {name}
                    return x
        """)
        assert key(library.Graft())


ATTRIBUTES = [
    *(None, True, 1, 1.0, "a", 2.5, float("inf"), float("nan"), -0.0, 0.0, b"a", 1j, ...),
    *([1, 2], (1, 2), {1, 2}, {"a": 1}, {"a": (1,)}, {1: "a"}, {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    *([], (), {}, set(), [[]], OrderedDict(a=1, b=2), {"tuple": [1, 2]}, "{'a': 1}"),
    *(torch.float32, torch.float16, torch.Size([3]), torch.channels_last, np.dtype("f4")),
    *(np.float32(1), np.float64(1), np.arange(3), np.arange(3.0), np.arange(3)[::-1]),
    *(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), np.zeros((2, 1), "f4")),
    *(torch.arange(3), torch.arange(3.0), torch.arange(4).reshape(2, 2), torch.tensor(1)),
    *(Path("a"), Path("b"), slice(1), slice(2), range(3), enum.Enum("E", "A B").A),
    *(enum.Enum("E", "A B").B, functools.partial(doubled), functools.partial(doubled, x=1)),
    *(nn.GELU, nn.ReLU, torch.relu, torch.sigmoid, nn.functional.gelu, nn.functional.max_pool2d),
    *(nn.functional.interpolate, np.mean, np.sin, torch.Tensor.relu, "x".join, "y".join, len),
    *(doubled, halved, nn.Linear.forward, torch.compile(doubled), functools.cache(doubled)),
    *(int | str, int | None, list[int], list[str], Literal["a"], Literal["b"], Any, TypeVar("T")),
    *(SimpleNamespace(a=1), SimpleNamespace(a=2), namedtuple("Pair", "a b")(1, 2), textwrap.dedent),
    *(namedtuple("Pair", "b a")(1, 2), object(), [nn.GELU()], [nn.GELU("tanh")], [doubled]),
]


def test_no_two_values_of_an_attribute_look_alike():
    keys = [key(Holder(value=value)) for value in ATTRIBUTES]
    again = [key(Holder(value=copy.copy(value))) for value in ATTRIBUTES]
    assert keys == again
    assert len(set(keys)) == len(keys)


def test_sets_and_attributes_have_no_order():
    one, two = {0, 8}, {8, 0}
    assert list(one) != list(two)
    assert key(Holder(a=one, b=1)) == key(Holder(b=1, a=two))
    assert key(Holder(a=SimpleNamespace(b=1, c=2))) == key(Holder(a=SimpleNamespace(c=2, b=1)))


def partial(text):
    made = run(f"""
        import functools

        class Partial(functools.partial):
            def __call__(self, x):
                return {text}
    """)
    return made.Partial(doubled)


class Row(list):
    """A list of its own kind."""


class Name(str):
    """A string of its own kind."""


def test_what_extends_a_plain_type_counts_with_what_it_holds():
    values = [Row([1]), Row([2]), [1], Name("a"), Name("b"), "a", Row([Name("a")])]
    values += [partial("x"), partial("-x"), functools.partial(doubled)]
    assert len({key(Holder(value=value)) for value in values}) == len(values)


def test_a_container_may_hold_itself():
    def made(value):
        values = [value]
        values.append({"again": values})
        return key(Holder(values=values))

    assert made(1) == made(1) != made(2)


class Marked(torch.Tensor):
    """A tensor with a mind of its own."""


NAMELESS = {
    "an open file": (io.StringIO, "_io.StringIO"),
    "numpy's generator": (np.random.default_rng, "numpy.random._generator.Generator"),
    "torch's generator": (torch.Generator, "torch._C.Generator"),
    "python's generator": (random.Random, "random.Random"),
    "an iterator": (lambda: iter([1]), "builtins.list_iterator"),
    "a lock": (threading.Lock, "_thread.lock"),
    "objects in an array": (lambda: np.array([object()]), "ndarray of object"),
    "another kind of array": (lambda: np.ma.array([1]), "MaskedArray"),
    "another kind of tensor": (lambda: torch.ones(2).as_subclass(Marked), "Marked"),
    "no data": (lambda: torch.ones(2, device="meta"), "meta"),
}


def test_what_torchs_decorators_were_told_counts():
    def made(dtype):
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

    assert made("bfloat16") == made("bfloat16") != made("float16")


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


@pytest.mark.parametrize(("make", "found"), NAMELESS.values(), ids=list(NAMELESS))
def test_what_has_no_name_is_refused_with_its_place(make, found):
    inside = nn.Sequential(nn.ReLU(), Holder(setting=[{"deep": make()}]))
    with pytest.raises(TypeError, match=r"Sequential\.1\.setting\[0\]\[deep\] is .*which no key"):
        identity(inside)
    with pytest.raises(TypeError, match=found):
        identity(Holder(setting=SimpleNamespace(kept=make())))


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


def test_a_decorator_of_a_library_may_hold_what_has_no_name():
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


def test_an_underscore_lets_a_class_with_code_keep_what_has_no_name():
    assert key(Vouched(_rng=np.random.default_rng(0)))
    assert key(Vouched(_rng=SimpleNamespace(kept=[np.random.default_rng(0)])))
    with pytest.raises(TypeError, match=r"Vouched\.rng"):
        identity(Vouched(rng=np.random.default_rng(0)))
    with pytest.raises(TypeError, match=r"Holder\._rng"):
        identity(Holder(_rng=np.random.default_rng(0)))
    assert key(Vouched(_width=1)) != key(Vouched(_width=2))


def test_code_is_taken_from_the_class_itself_and_never_from_a_base():
    text = """
        class Graft(nn.Module):
            code = "graft/1"
            SCALE = 2

            def forward(self, x):
                return helper(x) * 2

        class Heir(Graft):
            def forward(self, x):
                return x * 3

        def helper(x):
            return x
    """
    made = run(text)
    rewritten = run(
        text.replace("helper(x) * 2", "helper(x) + x").replace("return x\n", "return -x\n")
    )
    assert identity(made.Graft())["code"] == "graft/1"
    assert identity(made.Graft()) == identity(rewritten.Graft())
    for edit in ("graft/1", "graft/2"), ("SCALE = 2", "SCALE = 3"):
        assert key(run(text.replace(*edit)).Graft()) != key(made.Graft())
        assert key(run(text.replace(*edit)).Heir()) != key(made.Heir())
    assert key(made.Heir()) == key(rewritten.Heir())
    assert key(run(text.replace("x * 3", "x * 4")).Heir()) != key(made.Heir())


def test_a_function_put_into_an_instance_counts():
    plain, other, again, bound = (run(TEXT).Graft() for _ in range(4))
    other.forward = doubled
    again.forward = halved
    bound.forward = bound.wrapped
    keys = {key(module) for module in (plain, other, again, bound)}
    assert len(keys) == 4


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


def test_a_function_put_into_a_module_of_torch_counts(monkeypatch):
    graft = run(TEXT).Graft()
    before = key(graft)
    monkeypatch.setattr(nn.functional, "gelu", doubled)
    assert key(graft) != before


def test_parameters_and_buffers_do_not_count_nor_do_devices_and_modes():
    made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2), Holder(at="x"))
    made.append(Holder(device=torch.device("cpu"), same=made[0].weight))
    before = key(made)
    with torch.no_grad():
        made[0].weight.add_(1)
        made[1].running_mean.add_(1)
        made[2].weight_ih_l0.add_(1)
    assert key(made) == before
    made[-1].device = torch.device("meta")
    assert key(made.eval()) == before
    assert key(copy.deepcopy(made)) == before
    if torch.cuda.is_available():
        assert key(made.cuda()) == before


def test_tensors_and_modules_outside_the_state_count_by_their_bytes():
    keys = set()
    for value in (1.0, 2.0):
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, value)
        keys |= {key(Holder(hidden=[linear])), key(Holder(hidden=[linear.weight]))}
    assert len(keys) == 4


def test_a_module_may_refer_to_its_parent():
    child = Holder(scale=1)
    parent = Holder(child=child)
    child.parent = [parent]
    before = key(parent)
    parent.other = 2
    assert key(parent) != before


def test_hooks_are_refused():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        made = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
        handle = getattr(made[1], register)(lambda *given: None)
        with pytest.raises(ValueError, match=r"Sequential\.1 \(Linear\) has forward hooks"):
            identity(made)
        handle.remove()
        assert key(made)


def test_compiled_modules_are_refused_and_leave_no_trace():
    plain = nn.Linear(2, 2)
    before = key(plain)
    with pytest.raises(ValueError, match=r"Sequential\.0 .*is compiled"):
        identity(nn.Sequential(torch.compile(plain)))
    assert key(plain) == before
    plain.compile()
    with pytest.raises(ValueError, match="is compiled"):
        identity(plain)


def test_a_parametrization_counts():
    def made(function):
        linear = nn.Linear(3, 3)
        part = run(f"class Part(nn.Module):\n    def forward(self, x): return {function}").Part()
        return key(nn.utils.parametrize.register_parametrization(linear, "weight", part))

    assert made("x.triu()") == made("x.triu()")
    assert len({made("x.triu()"), made("x.tril()"), key(nn.Linear(3, 3))}) == 3


def test_known_modules_stand_by_their_description():
    stage = Holder(rng=np.random.default_rng(0))
    stage.register_forward_hook(lambda *given: None)
    made = Holder(inner=stage, also=[stage], scale=1)
    keys = {key(made, [(stage, {"code": code, "options": {"a": (1, 2)}})]) for code in "ab"}
    assert len(keys) == 2
    assert identity(made, [(stage, {"code": "a"})])["children"] == [["inner", {"code": "a"}]]
    assert key(stage, [(stage, {"code": "a"})]) == digest({"code": "a"})
    with pytest.raises(ValueError, match="hooks"):
        identity(made, [(copy.deepcopy(stage), {"code": "a"})])


CIRCLE = """
    def even(x, n): return odd(x, n - 1) if n else x
    def odd(x, n): return even(x, n - 1) if n else {last}

    class Graft(nn.Module):
        def forward(self, x):
            return {first}(x, 3) if x.ndim else Graft()(x)
"""


def test_functions_that_call_each_other_have_an_end_and_differ_by_where_they_differ():
    texts = [
        CIRCLE.format(last=last, first=first) for last in ("-x", "x") for first in ("even", "odd")
    ]
    keys = [key(run(text).Graft()) for text in texts]
    assert keys == [key(run(text).Graft()) for text in texts]
    assert len(set(keys)) == 4


def test_it_is_the_same_whether_equal_functions_are_one_or_two():
    text = """
        def made():
            def f(x): return x + 1
            return f
        one, two = made(), made()
        class Graft(nn.Module):
            def __init__(self, same):
                super().__init__()
                self.functions = [one, one] if same else [one, two]
            def forward(self, x):
                return one(x)
    """
    space = run(text)
    assert key(space.Graft(True)) == key(space.Graft(False))


def test_circles_of_two_and_of_three_that_look_alike_nearby_are_told_apart():
    def ring(*values):
        nodes = [SimpleNamespace(value=value) for value in values]
        for node, following in zip(nodes, nodes[1:] + nodes[:1], strict=True):
            node.next = following
        return key(Holder(ring=nodes[0]))

    assert ring(1) == ring(1, 1) == ring(1, 1, 1)
    assert len({ring(1, 1, 2), ring(1, 1, 1, 2), ring(1, 1, 1, 1, 2)}) == 3
    assert len({ring(1), ring(1, 2), ring(1, 1, 2), ring(1, 2, 2), ring(2, 1), ring(2)}) == 6
    lasso = SimpleNamespace(value=1)
    lasso.next = SimpleNamespace(value=2)
    lasso.next.next = lasso.next
    assert key(Holder(ring=lasso)) not in {ring(1, 2), ring(1), ring(2)}


def test_a_chain_of_calls_may_be_longer_than_pythons_stack():
    lines = [f"def f{n}(x): return f{n + 1}(x)" for n in range(3000)]
    lines += ["def f3000(x): return {}", "class Graft(nn.Module):", "    forward = f0"]
    text = "\n".join(lines)
    assert key(run(text.format("x")).Graft()) != key(run(text.format("-x")).Graft())


@dataclass(frozen=True, slots=True)
class Options:
    depth: int = 2
    names: tuple[str, ...] = ()


class First(nn.Module):
    def forward(self, x):
        return x + 1


class Second(nn.Module):
    def forward(self, x):
        return x + 2


def heir(base):
    class Heir(base):
        def forward(self, x):
            return super().forward(x)

    return Heir.forward


def test_a_method_of_another_class_brings_that_classs_bases():
    assert key(Holder(value=heir(First))) != key(Holder(value=heir(Second)))


class Kind(enum.Enum):
    SUM = "sum"
    MEAN = "mean"

    def join(self, x):
        return getattr(x, self.value)(0)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_plain_objects_enums_and_functions_with_gradients_have_names():
    values = [
        *(Options(), Options(3), Options(names=("a",)), Options, Kind.SUM, Kind.MEAN, Kind),
        *(Doubling, Doubling.apply, Kind.SUM.join, Kind.MEAN.join),
    ]
    keys = [key(Holder(value=value)) for value in values]
    assert keys == [key(Holder(value=copy.deepcopy(value))) for value in values]
    assert len(set(keys)) == len(keys)


def torchvision_blocks():
    from torchvision.models.resnet import BasicBlock, Bottleneck

    yield BasicBlock(8, 8)
    yield BasicBlock(8, 8, stride=2, downsample=nn.Conv2d(8, 8, 1, 2))
    yield BasicBlock(8, 8, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3))
    yield Bottleneck(8, 2)
    yield Bottleneck(8, 2, dilation=2)


def timm_blocks():
    from timm.models.vision_transformer import Block

    yield Block(8, 2)
    yield Block(8, 4)
    yield Block(8, 2, init_values=1e-5)
    yield Block(8, 2, norm_layer=functools.partial(nn.LayerNorm, eps=1e-3))


def clip_blocks():
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    yield ResidualAttentionBlock(8, 2)
    yield ResidualAttentionBlock(8, 4)
    yield ResidualAttentionBlock(8, 2, act_layer=QuickGELU)
    yield ResidualAttentionBlock(8, 2, ls_init_value=1e-5)


@pytest.mark.parametrize("blocks", [torchvision_blocks, timm_blocks, clip_blocks])
def test_blocks_of_published_networks_differ_by_their_options(blocks):
    keys = [key(block) for block in blocks()]
    assert keys == [key(block) for block in blocks()]
    assert len(set(keys)) == len(keys)
    subclass = type("Mine", (type(next(blocks())),), {"forward": doubled})
    block = next(blocks())
    block.__class__ = subclass
    assert key(block) not in keys


@pytest.mark.parametrize("name", ["ViT-B-32", "resnet18", "vit_small_patch14_dinov2"])
def test_a_networks_own_stages_have_an_identity_that_running_them_leaves(name):
    backbone = load(f"{name}:random-0")
    stages = [stage.module for stage in backbone.stages[:3]]
    before = [key(stage) for stage in stages]
    size = backbone.picture.size
    x = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
    assert [key(stage) for stage in stages] == before


def test_none_of_the_modules_code_is_run(monkeypatch):
    class Alarmed(Holder):
        @property
        def trap(self):
            raise AssertionError("a property was evaluated")

        def __getattr__(self, name):
            if name in ("__qualname__", "code", "trap"):
                raise AssertionError(f"{name} was asked for")
            return super().__getattr__(name)

        def __repr__(self):
            raise AssertionError("it was printed")

    class Loud:
        def __repr__(self):
            raise AssertionError("it was printed")

        def __eq__(self, other):
            raise AssertionError("it was compared")

        __str__ = __bool__ = __len__ = __hash__ = __repr__

        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    def alarm(name):
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "my_own", ModuleType("my_own"))
    sys.modules["my_own"].__getattr__ = alarm
    gone = run("class Gone: pass", "my_own").Gone
    made = Alarmed(loud=Loud(), keyed={1: Loud()}, gone=[gone, gone()])
    state = torch.get_rng_state()
    assert key(made)
    assert torch.equal(torch.get_rng_state(), state)
