"""What decides the output of a module that nobody described: its code, attributes and children.

A frozen stage declares code and options by hand. A graft may be anybody's nn.Module, written a
minute ago in a notebook; were its author to count its versions, the first slip would serve stale
features. So everything is read from the objects that will run:

    library code (_origin.py)   by its qualified name
    a package's code            by its name, the package's version, and its own instructions
    the user's code             by its instructions and all that they refer to, in turn

A class with `code = "adapter/1"` of its own (not inherited) is named by that string and its code is
not read; its attributes are. An attribute without an exact name raises, unless it begins with an
underscore and the class declares `code`: then it is left out. What constructors call is not
followed where the instance exists: its attributes tell what they did.

Out of sight: what lies behind a path; names made at run time (eval, globals()); what is compiled
(extensions, operators registered with torch), which counts by its name; what is put into a
package's modules from outside; and train mode.
"""

import contextlib
import enum
import importlib.util
import sys
import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from varve.pipeline.backbones._code import Use, describe_code, uses
from varve.pipeline.backbones._nodes import Nodes, text_of
from varve.pipeline.backbones._origin import (
    class_origin,
    constants,
    declared,
    entries,
    importable,
    member,
    origin,
    origin_of,
    patches,
    release,
    version,
)
from varve.pipeline.backbones._values import CONTAINERS, OTHER, exact, kept_by, nameless, parts_of

_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile"}
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")


def identity(
    module: nn.Module, known: Sequence[tuple[nn.Module, Mapping[str, Any]]] = ()
) -> dict[str, Any]:
    """Everything that decides what `module` computes besides parameters and buffers, as JSON.

    Runs none of the module's code and changes nothing. Device and train mode do not count.

    Args:
        module: As it will run.
        known: Modules described by other means, and the description to use in their place.

    Raises:
        TypeError: Something has no exact name; the message says where, and what to do.
        ValueError: There is a forward hook, or a module is compiled.
    """
    walk = _Walk(module, known)
    return walk.nodes.finish(walk.module(module, type(module).__name__))


class _Walk:
    """One reading of a module: a tree of JSON in which functions, classes and objects are nodes."""

    def __init__(self, root: nn.Module, known: Sequence[tuple[nn.Module, Mapping[str, Any]]]):
        self.known = {id(module): dict(description) for module, description in known}
        tree = list(root.named_modules())
        self.registered = {id(module): path for path, module in tree}
        for path, module in tree:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.registered[id(tensor)] = f"{path}.{name}"
        self.nodes = Nodes()
        self.open: set[int] = set()
        self.weak = ""

    def module(self, m: nn.Module, place: str, loose: bool = False) -> dict[str, Any]:
        """`loose`: not registered below the root, so that its tensors count here."""
        if id(m) in self.known:
            return self.known[id(m)]
        hooks = m._forward_hooks or m._forward_pre_hooks
        if hooks or "_torchdynamo_orig_callable" in vars(m) or vars(m).get("_compiled_call_impl"):
            done = "has forward hooks" if hooks else "is compiled"
            raise ValueError(
                f"{place} ({type(m).__name__}) {done}, which no key names: give the plain module, "
                "and do in its forward what a hook does"
            )
        cls, found = type(m), {k: v for k, v in vars(m).items() if k not in _INTERNAL}
        code = declared(cls)
        if code is not None:
            found = {k: v for base in cls.__mro__[::-1] for k, v in constants(base)} | found
        described: dict[str, Any] = {
            "code": self.value(cls, place, "built") if code is None else code,
            "attributes": self.attributes(found, place, cls),
            # Pairs, because JSON objects have no order and children may run in theirs.
            "children": [
                [name, None if child is None else self.module(child, f"{place}.{name}", loose)]
                for name, child in m._modules.items()
            ],
        }
        if loose:
            tensors = {**m._parameters, **m._buffers}
            described["tensors"] = {k: exact(v, f"{place}.{k}") for k, v in tensors.items()}
        return described

    def attributes(
        self, found: Mapping[str, Any], place: str, cls: type | None = None
    ) -> dict[str, Any]:
        torchs = cls and issubclass(cls, nn.Module) and class_origin(cls) == "library"
        weak = "private" if cls and (torchs or declared(cls) is not None) else ""
        return {
            name: self.lenient(found[name], f"{place}.{name}", weak if name[:1] == "_" else "")
            for name in sorted(found)
        }

    def lenient(self, v: Any, place: str, weak: str) -> Any:
        """The value, or where `weak` allows it (see Ref) a word that it has no name."""
        if not weak:
            return self.value(v, place)
        before, self.weak = self.weak, weak
        try:
            return self.value(v, place)
        except TypeError:
            return {"nameless": None}
        finally:
            self.weak = before

    def value(self, v: Any, place: str, use: str = "") -> Any:
        """JSON in which every object is ours: the user's own come as {"dict": pairs}.

        `use` is "built" for the class of what exists already.
        """
        if isinstance(v, (torch.Tensor, nn.Module)) and id(v) in self.registered:
            return {"registered": self.registered[id(v)]}
        if (plain := exact(v, place)) is not OTHER:
            return plain
        if isinstance(v, nn.Module):
            return self.node("module", v, lambda: self.module(v, place, loose=True))
        if isinstance(v, type):
            return self.type(v, place, use)
        if isinstance(v, types.FunctionType):
            return self.function(v, place)
        if isinstance(v, types.ModuleType):
            if origin(v.__name__) != "user":
                return {"module": v.__name__, **release(v.__name__)}
            inside = {k: x for k, x in vars(v).items() if k[:2] != "__" or k == "__getattr__"}
            return self.node("module", v, lambda: self.attributes(inside, place))
        if isinstance(v, enum.Enum):
            return {"enum": [self.value(type(v), place), v._name_, self.value(v._value_, place)]}
        if (parts := parts_of(v)) is not None:
            return {type(v).__name__: [self.value(part, place) for part in parts]}
        if type(v) in (*CONTAINERS, OrderedDict, torch.Size):
            if id(v) in self.open:
                return self.node(type(v).__name__, v, lambda: self.items(v, place))
            self.open.add(id(v))
            try:
                return self.items(v, place)
            finally:
                self.open.discard(id(v))
        return self.instance(v, place)

    def items(self, v: Any, place: str) -> Any:
        # By the plain types' own methods: a subclass may answer otherwise.
        if isinstance(v, dict):
            pairs = OrderedDict.items(v) if isinstance(v, OrderedDict) else dict.items(v)
            inner = []
            for k, x in pairs:
                at = f"{place}[{k if type(k) is str else '...'}]"
                inner.append([self.value(k, at), self.value(x, at)])
            return {type(v).__name__: inner}
        if isinstance(v, (set, frozenset)):
            members: Any = frozenset.copy(v) if isinstance(v, frozenset) else set.copy(v)
            return {type(v).__name__: sorted((self.value(x, place) for x in members), key=text_of)}
        members = list.__iter__(v) if isinstance(v, list) else tuple.__iter__(v)
        listed = [self.value(x, f"{place}[{n}]") for n, x in enumerate(members)]
        return listed if type(v) is list else {type(v).__name__: listed}

    def instance(self, v: Any, place: str) -> Any:
        """An object of a Python class: the class, and all that the object keeps."""
        cls = type(v)
        if (kept := kept_by(v)) is None:
            if origin(cls.__module__) != "user" and (name := importable(v)):
                return {"name": name, **release(v.__module__)}
            raise nameless(place, f"a {cls.__module__}.{cls.__qualname__}")

        def build() -> Any:
            plain, found = kept
            content = None
            if plain is not object:
                content = self.items(v, place) if plain in CONTAINERS else plain.__repr__(v)
            return [self.value(cls, place, "built"), self.attributes(found, place, cls), content]

        return self.node("object", v, build)

    def type(self, cls: Any, place: str, use: str) -> Any:
        if class_origin(cls) == "library" and not any(patches(base) for base in cls.__mro__):
            return {"name": importable(cls)}

        def build() -> Any:
            chain = [self.own(base, f"{place}: {base.__name__}", use) for base in cls.__mro__[:-1]]
            return [chain, self.value(type(cls), place)]

        return self.node("class", cls, build, use)

    def own(self, cls: Any, place: str, use: str) -> Any:
        """What one class of an inheritance chain brings."""
        code, where = declared(cls), class_origin(cls)
        if code is not None:
            return [code, self.attributes(dict(constants(cls)), place, cls)]
        if where == "library":
            return [importable(cls), self.attributes(patches(cls), place)]
        described: dict[str, Any] = {}
        weak = "" if where == "user" else "foreign"
        for name, v in entries(cls):
            if use and name in _CONSTRUCTORS and isinstance(v, types.FunctionType):
                described[name] = describe_code(v.__code__)
            else:
                described[name] = self.lenient(v, f"{place}.{name}", weak)
        return [cls.__name__, version(cls.__module__), described]

    def function(self, f: types.FunctionType, place: str) -> Any:
        where = origin_of(f)
        if where == "library" and "_torchdynamo_orig_callable" in vars(f):
            return {"compiled": self.value(vars(f)["_torchdynamo_orig_callable"], place)}
        if where == "library" and (name := importable(f)) and origin(f.__module__) == "library":
            return {"name": name}

        def build() -> Any:
            arguments = f.__code__.co_varnames[: f.__code__.co_argcount][::-1]
            defaults = zip(arguments, (f.__defaults__ or ())[::-1], strict=False)
            held = {f"default {k}": v for k, v in (*defaults, *(f.__kwdefaults__ or {}).items())}
            held |= {f"attribute {k}": v for k, v in vars(f).items()}
            for k, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # empty as yet
                    held[f"closure {k}"] = cell.cell_contents
            # A decorator's wrapper holds the user's function beside things of its own.
            weak = "" if where == "user" else "foreign"
            cls = held.pop("closure __class__", None)
            inner = {k: self.lenient(v, f"{place}: {k}", weak) for k, v in sorted(held.items())}
            if where == "user":
                used = {"__class__": self.value(cls, place, "built")}
                for use in uses(f.__code__):
                    used |= self.used(use, f.__globals__, place)
                return [describe_code(f.__code__), inner, used]
            home = f.__globals__["__name__"]
            code = describe_code(f.__code__) if where == "package" else None
            return [f"{home}.{f.__qualname__}", version(home), code, inner]

        return self.node("function", f, build)

    def used(self, use: Use, space: Mapping[str, Any], place: str) -> dict[str, Any]:
        """What a name in code stands for now. In a library's module, the name says enough."""
        if use.imported:
            return self.imported(use, space, place)
        if use.name not in space or use.name == "__name__":  # a class inside a function reads it
            return {}
        found: dict[str, Any] = {}
        v, path, within = space[use.name], use.name, "user"
        for attribute in use.attributes:
            if not isinstance(v, types.ModuleType):
                break
            within, owner = origin(v.__name__), v
            if within != "user":
                found[path] = self.value(v, place)
            v, path = member(owner, attribute), f"{path}.{attribute}"
            if v is owner:
                break
        if within == "user" or isinstance(v, (type, types.FunctionType, types.ModuleType)):
            found[path] = self.value(v, f"{place}: {path}")
        return found

    def imported(self, use: Use, space: Mapping[str, Any], place: str) -> dict[str, Any]:
        parent = space.get("__package__") or str(space.get("__name__", "")).rpartition(".")[0]
        name = importlib.util.resolve_name(use.name, parent)
        key, where = f"import {name}", origin(name, look=True)
        if where != "user":
            return {key: [where, version(name, look=True)]}
        if name not in sys.modules:
            raise TypeError(f"{place} imports {name} as it runs, unknown till then: load it first")
        module, place = sys.modules[name], f"{place}: {name}"
        if not use.attributes:
            return {key: self.value(module, place)}
        return {f"{key}.{k}": self.value(member(module, k), place) for k in use.attributes}

    def node(self, kind: str, thing: Any, build: Any, use: str = "") -> Any:
        return self.nodes.add(kind, thing, build, use, self.weak, origin_of(thing) == "user")
