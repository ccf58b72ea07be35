"""A module's identity by its code: what decides a value changes it, nothing else."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from varve.pipeline.backbones._fingerprint import identity
from varve.stores.digests import canonical, digest

ROOT = Path(__file__).parents[3]

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
    "a function's docstring": ('"""A function with a value of its own."""', ""),
    "a line break": ("deepest(x) + 1", "(\n        deepest(\n            x\n        ) + 1)"),
    "a line break in a try": ("deeper(power(y)) if", "deeper(\n  power(\n  y)\n) if"),
    "an annotation": ("def deepest(x):", "def deepest(x: float) -> float:"),
    "what nothing refers to": ("GAIN = 2.5", "GAIN = 2.5\nOTHER = 3"),
    "the place in the file": ("GAIN = 2.5", "\n" * 20 + "GAIN = 2.5"),
    "quotes": ('"zeros"', "'zeros'"),
    "the order of methods": (HALF + "\n" + STILL, STILL + "\n" + HALF),
}


def run(text, name="a_notebook", **variables):
    space = {"__name__": name, "torch": torch, "nn": nn, **variables}
    exec(compile(textwrap.dedent(text), f"<{name}>", "exec"), space)
    return SimpleNamespace(**space)


def edited(edit):
    old, new = edit
    assert TEXT.count(old) >= 1
    return run(TEXT.replace(old, new)).Graft()


def key(module, known=()):
    described = identity(module, known)
    assert json.loads(canonical(described)) == described
    return digest(described)


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


def doubled(x):
    return x * 2


def halved(x):
    return x / 2


def test_the_same_text_gives_the_same_identity():
    assert identity(run(TEXT).Graft()) == identity(run(TEXT, "another").Graft())


@pytest.mark.parametrize("edit", DECIDES.values(), ids=list(DECIDES))
def test_what_decides_a_value_changes_the_identity(edit):
    assert key(edited(edit)) != key(run(TEXT).Graft())


@pytest.mark.parametrize("edit", DECIDES_NOTHING.values(), ids=list(DECIDES_NOTHING))
def test_what_decides_no_value_changes_nothing(edit):
    assert identity(edited(edit)) == identity(run(TEXT).Graft())


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


def test_attributes_of_a_function_count():
    first, second = (run("def f(x): return x").f for _ in range(2))
    first.scale, second.scale = 1, 2
    assert key(Holder(value=first)) != key(Holder(value=second))


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
        keys = {key(run(text.format(part, value)).Graft()) for value in ("1", "2")}
        assert (len(keys) == 2) == follows


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
            from varve.pipeline.backbones._fingerprint import identity
            from varve.stores.digests import digest
            import a_file
            with open(sys.argv[1], "rb") as file:
                pickled = pickle.load(file)
            first = digest(identity(pickled))
            copied = pickle.loads(cloudpickle.dumps(a_file.Graft()))
            pickled(torch.zeros(1, 4))
            print(*(digest(identity(m)) for m in (Graft(), a_file.Graft(), copied, pickled)), first)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    out = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "pickled"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(out.stdout.split()) == {key(notebook.Graft())}


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
    notebook = run(text)
    rewritten = run(
        text.replace("helper(x) * 2", "helper(x) + x").replace("return x\n", "return -x\n")
    )
    assert identity(notebook.Graft())["code"] == "graft/1"
    assert identity(notebook.Graft()) == identity(rewritten.Graft())
    for edit in ("graft/1", "graft/2"), ("SCALE = 2", "SCALE = 3"):
        assert key(run(text.replace(*edit)).Graft()) != key(notebook.Graft())
        assert key(run(text.replace(*edit)).Heir()) != key(notebook.Heir())
    assert key(notebook.Heir()) == key(rewritten.Heir())
    assert key(run(text.replace("x * 3", "x * 4")).Heir()) != key(notebook.Heir())


def test_a_function_put_into_an_instance_counts():
    plain, other, again, bound = (run(TEXT).Graft() for _ in range(4))
    other.forward = doubled
    again.forward = halved
    bound.forward = bound.wrapped
    keys = {key(module) for module in (plain, other, again, bound)}
    assert len(keys) == 4


def test_a_function_put_into_a_module_of_torch_counts(monkeypatch):
    graft = run(TEXT).Graft()
    before = key(graft)
    monkeypatch.setattr(nn.functional, "gelu", doubled)
    assert key(graft) != before


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


def test_a_chain_of_calls_may_be_longer_than_pythons_stack():
    lines = [f"def f{n}(x): return f{n + 1}(x)" for n in range(3000)]
    lines += ["def f3000(x): return {}", "class Graft(nn.Module):", "    forward = f0"]
    text = "\n".join(lines)
    assert key(run(text.format("x")).Graft()) != key(run(text.format("-x")).Graft())


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
