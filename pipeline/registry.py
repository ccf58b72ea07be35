"""Registry of variants: a kind (head, layout, decoder, backbone...) and a name give one variant.

A variant comes from one of three sources:

- **A file in the kind's folder**, or in one of its `SUBFOLDERS`. The file name is the variant's
  name; a leading underscore hides a helper. There is no list to edit.
- **A function or class with the decorator `register`**, in a file of the user. `load_plugin(path)`
  loads the file, on the command line `--plugin FILE`. Worker processes load it as well.
- **An entry point** of an installed package, in the group `varve.KIND`.

`source_digest` identifies a user's code by its text. It enters the cache keys of what the code
computes, so an edited function is a new column and never a stale one.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

KINDS = {
    "heads": "varve.heads",
    "grafts": "varve.heads.grafts",
    "layouts": "varve.pipeline.datasets.layouts",
    "decoders": "varve.pipeline.decoders",
    "samplings": "varve.pipeline.decoders.sampling",
    "backbones": "varve.pipeline.backbones",
    "reductions": "varve.pipeline.backbones._reductions",
    "scenarios": "varve.pipeline.experiments.scenarios",
    "metrics": "varve.pipeline.experiments.metrics",
}
# Folders in a kind's folder with more variants of the kind.
SUBFOLDERS = {"heads": ("closed_form",), "backbones": ("video",)}
# What worker processes load too: JSON, a plugin file or the name of a module -> the digest of its
# text, "" for any. Set it by hand for the workers of a cluster that Varve does not start.
VARIABLE = "VARVE_PLUGINS"

Variant = TypeVar("Variant")


@dataclass(frozen=True)
class _Registered:
    variant: Any
    source: str  # the file that defines it; "" in a notebook
    shipped: bool  # by Varve itself
    digest: str  # of the file's text, of the function's in a notebook; "" where shipped
    definition: str  # its qualified name


_REGISTERED: dict[str, dict[str, _Registered]] = {kind: {} for kind in KINDS}
_LOADED: dict[str, str] = {}  # plugin files, with the digest of their text


def register(kind: str, name: str = "") -> Callable[[Variant], Variant]:
    """Decorate a function or class to make it a variant of a kind.

    Args:
        kind: A key of `KINDS`, such as "samplings".
        name: The variant's name; by default the name of the function or class.

    Raises:
        ValueError: There is no such kind, another variant has the name, or the text of a class
            in a notebook cannot be read.

    >>> @register("samplings", "first")
    ... def first_frames(times_N, frames): ...
    >>> variant("samplings", "first") is first_frames
    True
    >>> unregister("samplings", "first")
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")

    def add(thing: Variant) -> Variant:
        module_name = str(getattr(thing, "__module__", ""))
        source = str(getattr(sys.modules.get(module_name), "__file__", None) or "")
        shipped = module_name.startswith("varve.")
        label = name or str(getattr(thing, "__name__", ""))
        digest = "" if shipped else _LOADED.get(source) or _digest_of(thing, source)
        definition = str(getattr(thing, "__qualname__", ""))
        before = _REGISTERED[kind].get(label)
        if (before and (before.source, before.definition) != (source, definition)) or (
            label in {*_shipped(kind), *_declared(kind)} and not shipped
        ):
            users = before.source if before and shipped else source
            other = f", of {before.source}" if before and not shipped and before.source else ""
            raise ValueError(
                f"{kind} has {label!r} already{other}; give the one in {users or 'the notebook'} "
                "another name"
            )
        _REGISTERED[kind][label] = _Registered(thing, source, shipped, digest, definition)
        if source and not shipped and source not in _LOADED and module_name != "__main__":
            _announce(module_name, "")
        return thing

    return add


def unregister(kind: str, name: str) -> None:
    """Remove a variant that `register` added."""
    del _REGISTERED[kind][name]


def available(kind: str) -> list[str]:
    """Return the names of a kind's variants, sorted.

    >>> "class_folders" in available("layouts")
    True
    """
    _load_announced()
    if not _path(kind).is_dir():  # one module registers all
        importlib.import_module(KINDS[kind])
    return listed(kind)


def listed(kind: str) -> list[str]:
    """Return the names that are known without an import: for option help, which must be quick."""
    return sorted({*_shipped(kind), *_declared(kind), *_REGISTERED[kind], *_entry_points(kind)})


def variant(kind: str, name: str) -> Any:
    """Return a variant: a module for a file of the kind's folder, else the registered object.

    Raises:
        ValueError: No variant has the name; the message lists those that exist.
    """
    names = available(kind)
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name].variant
    if name in _shipped(kind):
        return importlib.import_module(_shipped(kind)[name])
    if name in (points := _entry_points(kind)):
        return points[name].load()
    near = difflib.get_close_matches(name, names, n=3)
    raise ValueError(
        f"no {name!r} in {kind}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
        + f"; there are {', '.join(names)}"
    )


def source_digest(kind: str, name: str) -> str:
    """Return the SHA-256 of the text of the file that defines a user's variant.

    It is "" for a variant of Varve, whose code carries a version instead. For a variant of an
    installed package it is the digest of the module's file.

    Raises:
        ValueError: No variant has the name.
    """
    thing = variant(kind, name)
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name].digest
    if name in _shipped(kind):
        return ""
    module = thing if inspect.ismodule(thing) else sys.modules[thing.__module__]
    return _digest_of(thing, str(module.__file__))


def load_plugin(path: str | Path, expected: str = "") -> None:
    """Load a file of variants, in this process and in every worker process started later.

    A file that was edited since is loaded again, and its earlier variants are removed.

    Args:
        path: A Python file.
        expected: SHA-256 that its text must have; "" for any.

    Raises:
        ValueError: There is no such file, it has another digest, or it raises an error.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"no plugin {path}: give a Python file that exists, such as mine.py")
    source, text = str(file), file.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if expected and digest != expected:
        raise ValueError(f"{source} was edited while it is in use: run the command again")
    if _LOADED.get(source) == digest:
        return
    name = f"varve_plugin_{file.stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    _forget(source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up
    _LOADED[source] = digest
    try:
        exec(compile(text, source, "exec"), module.__dict__)  # these bytes are the digest's
    except BaseException as error:
        del sys.modules[name]
        _forget(source)
        # Worker processes must not load it either; loaded again, it is announced again.
        os.environ[VARIABLE] = json.dumps({k: v for k, v in _announced().items() if k != source})
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    _announce(source, digest)


def names_in(path: str | Path, kind: str) -> list[str]:
    """Return the names of the variants of a kind that a loaded plugin file registered, sorted."""
    source = str(Path(path).resolve())
    return sorted(name for name, known in _REGISTERED[kind].items() if known.source == source)


def plugins() -> dict[str, str]:
    """Return the plugin files of this process, each with the SHA-256 of its text as loaded."""
    _load_announced()
    return dict(_LOADED)


def require_files(*kinds: str) -> None:
    """Refuse to start worker processes that cannot find a variant of these kinds.

    Raises:
        RuntimeError: A variant was registered in a notebook or an interactive session.
    """
    for kind in kinds:
        for name, registered in _REGISTERED[kind].items():
            if not registered.source:
                raise RuntimeError(
                    f"{name!r} of {kind} is defined in this notebook or session, where worker "
                    "processes cannot find it. Put it into a file, such as mine.py, and call "
                    "varve.load_plugin('mine.py')"
                )


def _digest_of(thing: Any, source: str) -> str:
    try:
        text = Path(source).read_bytes() if source else inspect.getsource(thing).encode()
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the text of {thing!r} cannot be read, and cache keys need it: put it into a file, "
            "such as mine.py, and call varve.load_plugin('mine.py')"
        ) from error
    return hashlib.sha256(text).hexdigest()


def _forget(source: str) -> None:
    _LOADED.pop(source, None)
    for variants in _REGISTERED.values():
        for name in [name for name, known in variants.items() if known.source == source]:
            del variants[name]


def _announced() -> dict[str, str]:
    text = os.environ.get(VARIABLE) or "{}"
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the environment variable {VARIABLE} is {text!r}; it is a JSON object, such as "
            '{"/path/mine.py": ""}'
        ) from error


def _announce(source: str, digest: str) -> None:
    os.environ[VARIABLE] = json.dumps(_announced() | {source: digest})


def _load_announced() -> None:
    """Load what the process that started this one had loaded."""
    for source, digest in _announced().items():
        if not source.endswith(".py"):
            importlib.import_module(source)
        elif source not in _LOADED or digest not in ("", _LOADED[source]):
            load_plugin(source, digest)


@cache
def _shipped(kind: str) -> dict[str, str]:
    """Return the modules of a kind's folder by name; none where the kind is one module."""
    modules: dict[str, str] = {}
    for folder in ("", *SUBFOLDERS.get(kind, ())):
        package = ".".join(filter(None, (KINDS[kind], folder)))
        stems = [file.stem for file in (_path(kind) / folder).glob("*.py")]
        modules |= {stem: f"{package}.{stem}" for stem in stems if not stem.startswith("_")}
    return modules


@cache
def _declared(kind: str) -> frozenset[str]:
    """Return the names that a kind's one module registers, from its text."""
    file = _path(kind).with_suffix(".py")
    text = file.read_text("utf-8") if file.is_file() else ""
    return frozenset(re.findall(rf'^@register\("{kind}", "([^"]+)"\)', text, re.MULTILINE))


def _path(kind: str) -> Path:
    """Return the folder of a kind, or its module without the ending. Nothing is imported."""
    return Path(__file__).parents[1].joinpath(*KINDS[kind].split(".")[1:])


@cache
def _entry_points(kind: str) -> dict[str, metadata.EntryPoint]:
    points: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=f"varve.{kind}"):
        if point.name in points or point.name in _shipped(kind):
            raise ValueError(
                f"{kind} has {point.name!r} already; the installed package "
                f"{point.dist.name if point.dist else point.value} has another of that name"
            )
        points[point.name] = point
    return points
