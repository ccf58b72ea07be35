"""Values that have an exact name by themselves, as JSON.

A plain string, number, boolean or None stands for itself. All else comes as an object with one key
that says what it is, so that no two values of different kinds look alike.
"""

import contextlib
import functools
import hashlib
import logging
import math
import re
import types
import weakref
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from varve.pipeline.backbones._origin import class_origin, release

OTHER = object()
CONTAINERS = (dict, list, tuple, set, frozenset)

_PRINTED = {  # by their repr, which is exact
    *(float, complex, bytes, bytearray, range, type(...), type(NotImplemented)),
    *(torch.dtype, torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
}
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or as if
_COMPILED = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.MethodWrapperType, types.ClassMethodDescriptorType, types.GetSetDescriptorType),
)


def exact(v: Any, place: str) -> Any:
    """The value as JSON; OTHER where it is a container, code or an object.

    Raises:
        TypeError: An array or tensor of another kind than plain values.
    """
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
        if v.layout != torch.strided or v.is_meta or v.is_quantized or class_origin(kind) == "user":
            raise nameless(place, f"a {kind.__name__} of layout {v.layout} on {v.device}")
        plain = v.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy()
        return {"tensor": [str(v.dtype), list(v.shape), hashlib.sha256(data).hexdigest()]}
    if isinstance(v, (np.ndarray, np.generic)):
        if v.dtype.hasobject or not (kind in (np.ndarray, np.memmap) or isinstance(v, np.generic)):
            raise nameless(place, f"a {kind.__name__} of {v.dtype}")
        return {"array": [str(v.dtype), list(v.shape), hashlib.sha256(v.tobytes()).hexdigest()]}
    if isinstance(v, _COMPILED):
        owner = getattr(v, "__self__", getattr(v, "__objclass__", None))
        module = getattr(v, "__module__", None)
        if module is not None or isinstance(owner, (type(None), type, types.ModuleType)):
            module = module or getattr(owner, "__module__", "")
            return {"name": f"{module}.{v.__qualname__}", **release(str(module))}
    return OTHER


def parts_of(v: Any) -> tuple[Any, ...] | None:
    """What a wrapper is made of, its class first if that is the user's; None for anything else."""
    parts = _parts_of(v)
    users = type(v).__flags__ & _HEAP and class_origin(type(v)) == "user"
    return (type(v), *parts) if users and parts is not None else parts


def _parts_of(v: Any) -> tuple[Any, ...] | None:
    match v:
        case types.MethodType():
            return v.__func__, v.__self__
        case types.BuiltinMethodType() | types.MethodWrapperType():
            return v.__name__, v.__self__
        case staticmethod() | classmethod():
            return (v.__func__,)
        case property():
            return v.fget, v.fset, v.fdel
        case functools.partial():
            return v.func, v.args, v.keywords, vars(v)
        case functools._lru_cache_wrapper():
            return (v.__wrapped__,)
        case weakref.ref():
            return (v(),)
        case types.MappingProxyType():
            return (dict(v),)
        case slice():
            return v.start, v.stop, v.step
        case re.Pattern():
            return v.pattern, v.flags
        case types.GenericAlias() | types.UnionType():
            return getattr(v, "__origin__", None), v.__args__
    if type(v).__module__ == "typing":
        names = ("_name", "__name__", "__origin__", "__args__")
        return tuple(getattr(v, name, None) for name in names)
    return None


def kept_by(v: Any) -> tuple[Any, dict[str, Any]] | None:
    """The plain type that an object extends, and its attributes; None if C code keeps more in it.

    Reads `__dict__` and slots, and so runs nothing of the object's.
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
    # Weak dicts come and go by themselves: decorators keep their caches in them.
    if cls.__module__ == "weakref" or cls.__basicsize__ > plain.__basicsize__ + 8 * pointers:
        return None
    found = dict(object.__getattribute__(v, "__dict__")) if cls.__dictoffset__ else {}
    for name, slot in slots.items():
        with contextlib.suppress(AttributeError):  # never set
            found[name] = slot.__get__(v)
    if cls.__module__.startswith("torch."):  # its contexts keep what they found there
        found = {name: x for name, x in found.items() if not name.startswith("prev")}
    return plain, {name: x for name, x in found.items() if name not in ("__doc__", "__module__")}


def nameless(place: str, found: str) -> TypeError:
    return TypeError(
        f"{place} is {found}, which no key can name exactly. Make it a plain value or a buffer; or "
        'declare `code = "name/1"` on the class, and begin the name with _ if it decides no value'
    )
