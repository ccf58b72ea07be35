"""Parts of an identity as JSON: origins of modules, code objects and plain values.

`_fingerprint.py` defines an identity. A plain string, number, boolean or None stands for itself.
Any other value is an object with one key that names its kind, so that values of different kinds
differ.
"""

import contextlib
import dis
import functools
import hashlib
import importlib.util
import itertools
import logging
import math
import os
import re
import sys
import types
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

_STDLIB = Path(os.__file__).parent
_RANK = {"library": 0, "package": 1, "user": 2}
# Entries that Python, copyreg, dataclasses and autograd write into a class.
_LANGUAGE = re.compile(
    "__(module|qualname|doc|dict|weakref|firstlineno|static_attributes|annotat.*|orig_bases|"
    "parameters|type_params|abstractmethods|slotnames|match_args|dataclass_(fields|params))__|"
    "_abc_impl|_backward_cls"
)
_SLOTS = (types.MemberDescriptorType, type(vars(namedtuple("_", "x"))["x"]))
CONTAINERS = (dict, list, tuple, set, frozenset)
_PRINTED = {  # by their repr, which is exact
    *(float, complex, bytes, bytearray, range, type(...), type(NotImplemented)),
    *(torch.dtype, torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
}
_COMPILED = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.MethodWrapperType, types.ClassMethodDescriptorType, types.GetSetDescriptorType),
)
_PARTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {  # of what wrappers are made
    types.MethodType: lambda v: (v.__func__, v.__self__),
    types.BuiltinMethodType: lambda v: (v.__name__, v.__self__),
    types.MethodWrapperType: lambda v: (v.__name__, v.__self__),
    staticmethod: lambda v: (v.__func__,),
    classmethod: lambda v: (v.__func__,),
    property: lambda v: (v.fget, v.fset, v.fdel),
    functools.partial: lambda v: (v.func, v.args, v.keywords, vars(v)),
    functools._lru_cache_wrapper: lambda v: (v.__wrapped__,),
    weakref.ref: lambda v: (v(),),
    types.MappingProxyType: lambda v: (dict(v),),
    slice: lambda v: (v.start, v.stop, v.step),
    re.Pattern: lambda v: (v.pattern, v.flags),
    types.GenericAlias: lambda v: (v.__origin__, v.__args__),
    types.UnionType: lambda v: (v.__args__,),
}
# Flags of arguments and generators; the others depend on where a function was written.
_FLAGS = 0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a class statement made
_MODULE = {*vars(nn.Module())}
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)


def origin(module: str, look: bool = False) -> str:
    """Return where a module comes from: `library`, `package` or `user`.

    With `look`, a module that is not loaded is searched for; it is `absent` if it is nowhere.
    """
    root = module.partition(".")[0]
    if root in ("torch", "numpy"):
        return "library"
    if root in ("", "__main__", "__mp_main__"):
        return "user"
    loaded = sys.modules.get(module) or (sys.modules.get(root) if look else None)
    if loaded is not None:
        space = getattr(loaded, "__dict__", {})
        files = [space.get("__file__"), *(space.get("__path__") or ())]
    elif look and (spec := importlib.util.find_spec(root)):
        folders = spec.submodule_search_locations or ()
        files = [spec.origin if spec.has_location else None, *folders]
    else:
        return "absent" if look else "user"
    file = next(filter(None, files), None)
    if file is not None and {"site-packages", "dist-packages"} & set(Path(file).parts):
        return "package"
    standard = root in sys.stdlib_module_names
    return "library" if standard and (not file or Path(file).is_relative_to(_STDLIB)) else "user"


def version(module: str, look: bool = False) -> str | None:
    """Return the version of a package, without the suffix of a build (+cu130)."""
    if origin(module, look) != "package":
        return None
    root = module.partition(".")[0]
    try:
        number = metadata.version(root)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(root)
        number = metadata.version(names[0]) if names else ""
    return number.partition("+")[0] or None


@functools.lru_cache(maxsize=4096)
def release(module: str, loaded: types.ModuleType | None) -> dict[str, str | None]:
    """Return version and digest of the source file of a package's module; of others, nothing."""
    if origin(module) != "package":
        return {}
    path = Path(str(getattr(loaded, "__file__", None)))
    text = path.read_bytes() if path.suffix == ".py" and path.is_file() else b""
    return {"version": version(module), "file": hashlib.sha256(text).hexdigest()}


def named(name: str, module: str) -> dict[str, Any]:
    """Return the description of a thing by its name alone, with the release of its package."""
    return {"name": name, **release(module, sys.modules.get(module))}


def importable(thing: Any) -> str | None:
    """Return the dotted name of a library's or package's class or function; None for others."""
    module, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str) or origin(module) == "user":
        return None
    value: Any = sys.modules.get(module)
    for part in path.split("."):
        value = getattr(value, part, None)
    return f"{module}.{path}" if value is thing else None


def origin_of(thing: Any) -> str:
    """Return the origin of a function by its globals, of a class by its name, or of an object."""
    if isinstance(thing, types.FunctionType):
        home = str(thing.__globals__.get("__name__", ""))
        return "user" if home == "builtins" else origin(home)  # exec's default; nothing else is
    if isinstance(thing, types.ModuleType):
        return origin(thing.__name__)
    cls = thing if isinstance(thing, type) else type(thing)
    return origin(cls.__module__) if importable(cls) else "user"


def declared(cls: type) -> str | None:
    """Return the `code` that the body of a class declares."""
    code = vars(cls).get("code")
    return code if isinstance(code, str) else None


def entries(cls: type) -> dict[str, Any]:
    """Return what the body of a class holds, by name."""
    return {
        name: v
        for name, v in sorted(vars(cls).items())
        if not isinstance(v, _SLOTS) and not _LANGUAGE.fullmatch(name)
    }


def constants(cls: type) -> dict[str, Any]:
    """Return the entries of a user's class that are no code."""
    skip = "code" if declared(cls) is not None else ""
    body = entries(cls) if origin_of(cls) == "user" else {}
    return {k: v for k, v in body.items() if not hasattr(type(v), "__get__") and k != skip}


def patches(cls: type) -> dict[str, Any]:
    """Return functions that somebody else put into a library's or package's class."""
    rank = _RANK[origin_of(cls)]
    functions = {k: f for k, f in vars(cls).items() if isinstance(f, types.FunctionType)}
    return {k: f for k, f in functions.items() if _RANK[origin_of(f)] > rank}


def code(code: types.CodeType) -> tuple[list[Any], list[Any]]:
    """Return a code object's instructions and arguments, and the constants that it loads.

    A docstring is a constant that is not loaded. What depends on where code is written is left out.
    """
    loaded = {step.arg for step in dis.get_instructions(code) if step.opcode in dis.hasconst}
    instructions = [
        *(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        *(code.co_flags & _FLAGS, code.co_code.hex(), code.co_exceptiontable.hex()),
        *map(list, (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)),
    ]
    return instructions, [x if n in loaded else None for n, x in enumerate(code.co_consts)]


def uses(code: types.CodeType) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Yield what `code` and the code inside it read from their module, in order.

    Either a global name, the attributes read from it at once, and False; or a module that is
    imported inside a function, the names imported from it, and True.
    """
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for n, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level, names = steps[n - 2].argval, steps[n - 1].argval
            yield "." * level + step.argval, names or (), True
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            chain = itertools.takewhile(lambda step: step.opname == "LOAD_ATTR", steps[n + 1 :])
            yield step.argval, tuple(following.argval for following in chain), False
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from uses(constant)


def member(module: types.ModuleType, name: str) -> Any:
    """Return a module's attribute or loaded submodule, without calling its `__getattr__`.

    The module itself where it has none: its own code decides then what the name gives.
    """
    return vars(module).get(name, sys.modules.get(f"{module.__name__}.{name}", module))


def unnamed(at: str, kind: str) -> TypeError:
    return TypeError(
        f"{at} is {kind}, which no key can name exactly. Make it a plain value or a buffer; or "
        'declare `code = "name/1"` on the class, and begin the name with _ if it decides no value'
    )


OTHER = object()


def plain(v: Any, at: str) -> Any:
    """Return a value as JSON; `OTHER` where it is a container, code or an object."""
    kind = type(v)
    if v is None or kind in (bool, int, str) or (kind is float and math.isfinite(v)):
        return v
    if kind in _PRINTED:
        return {kind.__name__: repr(v)}
    if isinstance(v, (PurePath, np.dtype)):
        return {"path" if isinstance(v, PurePath) else "dtype": str(v)}
    if isinstance(v, (torch.device, logging.Logger, logging.LoggerAdapter)):
        return {kind.__name__: None}  # they decide no value
    if isinstance(v, torch.Tensor):
        if v.layout != torch.strided or v.is_meta or v.is_quantized or origin_of(kind) == "user":
            raise unnamed(at, f"a {kind.__name__} of layout {v.layout} on {v.device}")
        plain = v.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy()
        return {"tensor": [str(v.dtype), list(v.shape), hashlib.sha256(data).hexdigest()]}
    if isinstance(v, (np.ndarray, np.generic)):
        if v.dtype.hasobject or not (kind in (np.ndarray, np.memmap) or isinstance(v, np.generic)):
            raise unnamed(at, f"a {kind.__name__} of {v.dtype}")
        return {"array": [str(v.dtype), list(v.shape), hashlib.sha256(v.tobytes()).hexdigest()]}
    if isinstance(v, _COMPILED):
        owner = getattr(v, "__self__", getattr(v, "__objclass__", None))
        module = getattr(v, "__module__", None)
        if module is not None or isinstance(owner, (type(None), type, types.ModuleType)):
            module = str(module or getattr(owner, "__module__", ""))
            return named(f"{module}.{v.__qualname__}", module)
    return OTHER


def parts(v: Any) -> tuple[Any, ...] | None:
    """Return what a wrapper is made of, its class first if that is the user's; None of others."""
    parts = next((read(v) for kind, read in _PARTS.items() if isinstance(v, kind)), None)
    if parts is None and type(v).__module__ == "typing":
        names = ("_name", "__name__", "__origin__", "__args__")
        parts = tuple(getattr(v, name, None) for name in names)
    users = type(v).__flags__ & _HEAP and origin_of(type(v)) == "user"
    return (type(v), *parts) if users and parts is not None else parts


def contents(v: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return the plain type that an object extends, and its attributes; None if C code keeps more.

    `__dict__` and slots are read, so that no code of the object runs.
    """
    cls = type(v)
    plain: Any = next((t for t in (*CONTAINERS, str, int, float) if isinstance(v, t)), object)
    slots = {
        name: slot
        for base in cls.__mro__
        for name, slot in vars(base).items()
        if "__slots__" in vars(base) and isinstance(slot, types.MemberDescriptorType)
    }
    pointers = len(slots) + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    # Weak dicts change by themselves: decorators keep their caches in them.
    if cls.__module__ == "weakref" or cls.__basicsize__ > plain.__basicsize__ + 8 * pointers:
        return None
    attributes = dict(object.__getattribute__(v, "__dict__")) if cls.__dictoffset__ else {}
    for name, slot in slots.items():
        with contextlib.suppress(AttributeError):  # never set
            attributes[name] = slot.__get__(v)
    if cls.__module__.startswith("torch."):  # its contexts store the state before them there
        attributes = {name: x for name, x in attributes.items() if not name.startswith("prev")}
    return plain, {k: x for k, x in attributes.items() if k not in ("__doc__", "__module__")}


def structure_of(module: nn.Module) -> list[Any]:
    """Return a module's parts, their plain attributes, and whether they have hooks.

    Cheap. It is compared within one process, to see whether a module is still as it was loaded.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(inner) for inner in value)
        return value if isinstance(value, _SIMPLE) else type(value).__qualname__

    return [
        (
            path,
            type(part).__qualname__,
            {name: plain(v) for name, v in sorted(vars(part).items()) if name not in _MODULE},
            bool(part._forward_hooks or part._forward_pre_hooks),
        )
        for path, part in module.named_modules()
    ]
