"""Docstrings are sentences, in the standard words of the field."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders and files that are still to be written anew.
NOT_YET: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def words():
    spec = importlib.util.spec_from_file_location("words", ROOT / "tests" / "words.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_docstrings_are_sentences_in_standard_words(words):
    findings = words.check([ROOT / name for name in (*words.FOLDERS, *words.PAGES)])
    allowed = tuple(f"{name}/" for name in NOT_YET)
    new = [f for f in findings if not f"{f.path.as_posix()}/".startswith(allowed)]
    assert not new, "\n".join(map(str, new))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ('def f():\n    """Of one clip."""', "begins with 'Of'"),
        ('class A:\n    """What a build gives."""', "begins with 'What'"),
        ('"""shape of a clip."""', "lower case"),
        ('"""Return the shape"""', "no full stop"),
        ('"""The shape."""', "is a fragment"),
        ('""""""', "is empty"),
        ("x = 1  # held by the store", "'held'"),
        ('raise ValueError("no head was told")', "'told'"),
        ("for place in range(3): pass", "variable 'place'"),
        ("def f(found): pass", "variable 'found'"),
    ],
)
def test_what_is_not_to_be_written_is_found(words, tmp_path, code, problem):
    (tmp_path / "a.py").write_text(code)
    (finding,) = words.check([tmp_path])
    assert problem in str(finding)


@pytest.mark.parametrize(
    "code",
    [
        'def f():\n    """Return the shape of a clip."""',
        'def _f():\n    """Of one clip."""',
        "x = 1  # added in place, while the lock is held, instead of a held-out set",
        'x = "held"',
    ],
)
def test_standard_uses_are_not_found(words, tmp_path, code):
    (tmp_path / "a.py").write_text(code)
    assert not words.check([tmp_path])


def test_pages_and_notebooks_are_read_too(words, tmp_path):
    (tmp_path / "a.md").write_text("A head is\ntaught by `found`.")
    cell = '{"cell_type": "%s", "source": ["%s"]}'
    cells = ", ".join([cell % ("markdown", "It remembers."), cell % ("code", "found = 1")])
    (tmp_path / "b.ipynb").write_text(f'{{"cells": [{cells}]}}')
    lines = [f"{f.path.name}:{f.line}" for f in words.check([tmp_path])]
    assert lines == ["a.md:2", "b.ipynb:1", "b.ipynb:2"]
