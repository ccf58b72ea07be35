"""Where a function or class comes from, which says how far it is followed, and what a class says.

library   the standard library, torch, numpy
package   elsewhere in site-packages (timm, torchvision)
user      all the rest: scripts, notebooks, checkouts installed in place
"""

import functools
import importlib.util
import os
import re
import sys
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any

_STDLIB = Path(os.__file__).parent
_SITES = {"site-packages", "dist-packages"}
# What Python, copyreg, dataclasses and autograd write into a class.
_LANGUAGE = re.compile(
    "__(module|qualname|doc|dict|weakref|firstlineno|static_attributes|annotat.*|orig_bases|"
    "parameters|type_params|abstractmethods|slotnames|match_args|dataclass_(fields|params))__|"
    "_abc_impl|_backward_cls"
)
_TUPLE_FIELD = type(vars(namedtuple("_", "x"))["x"])  # holds its position, which _fields tells


def origin(module: str, look: bool = False) -> str:
    """`library`, `package` or `user`.

    `look`: of a module that may not be loaded, by looking for it; `absent` if it is nowhere.
    """
    root = module.partition(".")[0]
    if root in ("torch", "numpy"):
        return "library"
    if root in ("", "__main__", "__mp_main__"):
        return "user"
    found = sys.modules.get(module) or (sys.modules.get(root) if look else None)
    facts = getattr(found, "__dict__", {})
    folders, file = list(facts.get("__path__") or ()), facts.get("__file__")
    if found is None:
        spec = importlib.util.find_spec(root) if look else None
        if spec is None:
            return "absent" if look else "user"
        folders = list(spec.submodule_search_locations or ())
        file = spec.origin if spec.has_location else None
    file = file or (folders[0] if folders else None)
    if file is not None and _SITES & set(Path(file).parts):
        return "package"
    standard = root in sys.stdlib_module_names
    if standard and (file is None or Path(file).is_relative_to(_STDLIB)):
        return "library"
    return "user"


def version(module: str, look: bool = False) -> str | None:
    """Of the package that holds the module, without a build's suffix (+cu130); else None."""
    return _number(module.partition(".")[0]) if origin(module, look) == "package" else None


def release(module: str) -> dict[str, str]:
    """The version as an entry of a description, if there is one."""
    number = version(module)
    return {} if number is None else {"version": number}


@functools.cache
def _number(root: str) -> str | None:
    try:
        found = metadata.version(root)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(root)
        found = metadata.version(names[0]) if names else ""
    return found.partition("+")[0] or None


def importable(thing: Any) -> str | None:
    """The dotted name under which a library or package has the class or function; else None."""
    module, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str) or origin(module) == "user":
        return None
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"{module}.{path}" if found is thing else None


def class_origin(cls: type) -> str:
    """`origin` of a class that is found under its name; any other is the user's."""
    return origin(cls.__module__) if importable(cls) else "user"


def origin_of(thing: Any) -> str:
    """Of a function by its globals (functools.wraps lends it a `__module__`), else of the class."""
    if isinstance(thing, FunctionType):
        home = str(thing.__globals__.get("__name__", ""))
        return "user" if home == "builtins" else origin(home)  # exec's default; nothing else is
    if isinstance(thing, ModuleType):
        return origin(thing.__name__)
    return class_origin(thing if isinstance(thing, type) else type(thing))


def declared(cls: type) -> str | None:
    """The `code` that the class itself declares."""
    code = vars(cls).get("code")
    return code if isinstance(code, str) else None


def entries(cls: type) -> Iterator[tuple[str, Any]]:
    """What stands in the class's own body, by name."""
    for name, v in sorted(vars(cls).items()):
        slot = isinstance(v, (MemberDescriptorType, _TUPLE_FIELD))
        if not slot and not _LANGUAGE.fullmatch(name):
            yield name, v


def constants(cls: type) -> Iterator[tuple[str, Any]]:
    """Entries of a user's class that are no code."""
    if class_origin(cls) == "user":
        for name, v in entries(cls):
            if not hasattr(type(v), "__get__") and (name != "code" or declared(cls) is None):
                yield name, v


def patches(cls: type) -> dict[str, FunctionType]:
    """Functions that somebody else put into a library's class."""
    functions = {name: f for name, f in vars(cls).items() if isinstance(f, FunctionType)}
    return {name: f for name, f in functions.items() if origin_of(f) != "library"}


def member(module: ModuleType, name: str) -> Any:
    """A module's attribute or loaded submodule, without asking its `__getattr__`.

    The module itself where it has none: then its own code decides what the name gives.
    """
    return vars(module).get(name, sys.modules.get(f"{module.__name__}.{name}", module))
