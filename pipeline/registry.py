"""One registry of variants: a kind (head, layout, decoder, backbone...) and a name give a variant.

A variant is found in one of three places:

- **A file of the kind's folder.** The file name is the variant's name; a leading underscore hides
  a helper. There is no list to edit.
- **A function or class with the decorator `register`**, in a file of the user's own. The file is
  loaded with `load_plugin(path)`, on the command line with `--plugin FILE`, and in every process
  that Varve starts.
- **An entry point** of an installed package, in the group `varve.KIND`.

What a user wrote is named by its code too: `source_digest` of a variant enters the cache keys of
what it computes, so that an edited function is another column and never a stale one.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
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
# Plugin files of this process and of those that it starts, separated as in PATH.
VARIABLE = "VARVE_PLUGINS"

Variant = TypeVar("Variant")


@dataclass(frozen=True)
class _Registered:
    variant: Any
    source: str  # the file that holds it; "" in a notebook, and for Varve's own
    digest: str  # of that file's text, or of the function's in a notebook; "" for Varve's own


_REGISTERED: dict[str, dict[str, _Registered]] = {kind: {} for kind in KINDS}
_LOADED: dict[str, str] = {}  # plugin files, with the digest of their text


def register(kind: str, name: str = "") -> Callable[[Variant], Variant]:
    """Decorate a function or class to make it a variant of a kind.

    Args:
        kind: A key of `KINDS`, such as "samplings".
        name: What it is called by; by default the function's own name.

    Raises:
        ValueError: There is no such kind, or another variant has the name.

    >>> @register("samplings", "first")
    ... def first_frames(times_N, frames): ...
    >>> variant("samplings", "first") is first_frames
    True
    >>> unregister("samplings", "first")
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")

    def add(thing: Variant) -> Variant:
        own = name or str(getattr(thing, "__name__", ""))
        module = sys.modules.get(str(getattr(thing, "__module__", "")))
        source = str(getattr(module, "__file__", None) or "")
        shipped = str(getattr(thing, "__module__", "")).startswith("varve.")
        known = _REGISTERED[kind].get(own)
        if (own in _shipped(kind) and not shipped) or (known and known.source != source):
            raise ValueError(f"{kind} has {own!r} already; give yours another name")
        digest = "" if shipped else _LOADED.get(source) or _digest_of(thing, source)
        _REGISTERED[kind][own] = _Registered(thing, "" if shipped else source, digest)
        return thing

    return add


def unregister(kind: str, name: str) -> None:
    """Remove a variant that `register` added."""
    del _REGISTERED[kind][name]


def available(kind: str) -> list[str]:
    """Names of the variants of a kind, sorted.

    >>> "class_folders" in available("layouts")
    True
    """
    _load_all(kind)
    return sorted({*_shipped(kind), *_REGISTERED[kind], *_entry_points(kind)})


def variant(kind: str, name: str) -> Any:
    """The variant of a kind: a module for a file of the folder, else what was registered.

    Raises:
        ValueError: There is none of that name; the message lists those there are.
    """
    names = available(kind)
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name].variant
    if name in _shipped(kind):
        return importlib.import_module(f"{KINDS[kind]}.{name}")
    if name in (points := _entry_points(kind)):
        return points[name].load()
    near = difflib.get_close_matches(name, names, n=3)
    raise ValueError(
        f"no {name!r} in {kind}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
        + f"; there are {', '.join(names)}"
    )


def source_digest(kind: str, name: str) -> str:
    """SHA-256 of the text of the user's file that holds a variant; "" for one of Varve's own.

    Varve's own variants are named by versions in their code instead. For one of an installed
    package it is the digest of the module's file.
    """
    found = variant(kind, name)
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name].digest
    if name in _shipped(kind):
        return ""
    module = found if hasattr(found, "__file__") else sys.modules[found.__module__]
    return _digest_of(found, str(module.__file__))


def load_plugin(path: str | Path) -> None:
    """Load a file of variants here, and in every process that is started from here on.

    Raises:
        ValueError: There is no such file, or it is no Python.
    """
    file = Path(path).resolve()
    if str(file) in _LOADED:
        return
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"--plugin {path}: no such Python file")
    text = file.read_bytes()
    name = f"varve_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up
    _LOADED[str(file)] = hashlib.sha256(text).hexdigest()
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name], _LOADED[str(file)]
        for registered in _REGISTERED.values():
            for own in [n for n, one in registered.items() if one.source == str(file)]:
                del registered[own]
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    files = [one for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one]
    if str(file) not in files:
        os.environ[VARIABLE] = os.pathsep.join([*files, str(file)])


def names_in(path: str | Path, kind: str) -> list[str]:
    """Return the names of the variants of a kind that a loaded plugin file registered, sorted."""
    source = str(Path(path).resolve())
    return sorted(name for name, r in _REGISTERED[kind].items() if r.source == source)


def plugins() -> dict[str, str]:
    """Return the plugin files of this process, each with the SHA-256 of its text as loaded."""
    _load_environment()
    return dict(_LOADED)


def _digest_of(thing: Any, source: str) -> str:
    text = Path(source).read_bytes() if source else inspect.getsource(thing).encode()
    return hashlib.sha256(text).hexdigest()


def _load_environment() -> None:
    for file in os.environ.get(VARIABLE, "").split(os.pathsep):
        if file:
            load_plugin(file)


def _load_all(kind: str) -> None:
    """Load what may register variants of a kind: plugin files, and the kind's own module."""
    _load_environment()
    if not _folder(kind).is_dir():
        importlib.import_module(KINDS[kind])


def _folder(kind: str) -> Path:
    """The folder of a kind. Nothing is imported, so that names cost no time."""
    return Path(__file__).parents[1].joinpath(*KINDS[kind].split(".")[1:])


@cache
def _shipped(kind: str) -> frozenset[str]:
    """Files of the kind's folder."""
    return frozenset(
        module.name
        for module in pkgutil.iter_modules([str(_folder(kind))])
        if not (module.ispkg or module.name.startswith("_"))
    )


@cache
def _entry_points(kind: str) -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=f"varve.{kind}")}
