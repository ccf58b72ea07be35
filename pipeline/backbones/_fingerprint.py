"""Identity of a module that nobody described: its code, its attributes and its parts, as JSON.

A published stage declares code and options by hand. A graft is any nn.Module, perhaps written a
minute ago in a notebook, so all that decides its output is read from the objects that will run:

    library code (the standard library, torch, numpy): its qualified name
    package code (elsewhere in site-packages): its qualified name, version and source file
    user code (all the rest): its instructions and constants, and what they refer to, in turn

Code is read from code objects and not from source text: text is absent where cloudpickle brought a
class to a worker, and newer than the code where a file was edited after its import. Comments, blank
lines and the text of a docstring do not count; another layout of a statement may, and another
Python version does.

A class with `code = "adapter/1"` in its own body is named by that string: its code is not read, its
attributes are. A value without an exact name is refused with a TypeError, unless the name of the
attribute begins with an underscore and the class declares `code`.

Not seen: what lies behind a path; names made at run time (eval, globals()); compiled extensions,
which count by name; changes of a package's modules from outside; train mode.
"""

import contextlib
import enum
import hashlib
import importlib.util
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from varve.pipeline.backbones import _names as names

_MODULE_STATE = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile"}
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")


def identity(
    module: nn.Module, known: Sequence[tuple[nn.Module, Mapping[str, Any]]] = ()
) -> dict[str, Any]:
    """Return everything that decides a module's output besides parameters and buffers, as JSON.

    No code of the module is run, and nothing is changed. Device and train mode do not count.

    Args:
        module: The module as it will run.
        known: Modules that are described already, with their descriptions.

    Raises:
        TypeError: A value has no exact name; the message says where, and what to do.
        ValueError: There is a forward hook, or a module is compiled.
    """
    walk = _Walk(module, known)
    return walk.finish(walk.module(module, type(module).__name__))


@dataclass(frozen=True)
class _Ref:
    """Stands for a node inside JSON."""

    node: int
    label: tuple[str, str]


@dataclass
class _Node:
    """A function, class, object or module. Nodes may refer to each other in circles.

    `mode`: "" where every value needs an exact name; "foreign" inside a library's wrapper, where
    only the user's things need one; "private" where none does.
    """

    thing: Any  # kept alive, since nodes are found by id
    build: Callable[[], Any]
    mode: str


class _Walk:
    """One reading of a module: a tree of JSON whose functions, classes and objects are nodes."""

    def __init__(self, root: nn.Module, known: Sequence[tuple[nn.Module, Mapping[str, Any]]]):
        self.known = {id(module): dict(description) for module, description in known}
        modules = list(root.named_modules())
        self.registered = {id(module): path for path, module in modules}
        for path, module in modules:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.registered[id(tensor)] = f"{path}.{name}"
        self.nodes: list[_Node] = []
        self.seen: dict[tuple[int, str, str], int] = {}
        self.open: set[int] = set()
        self.mode = ""

    @contextmanager
    def within(self, mode: str) -> Iterator[None]:
        """Ask for fewer exact names inside the block; never for more."""
        before, self.mode = self.mode, self.mode or mode
        try:
            yield
        finally:
            self.mode = before

    def node(self, kind: str, thing: Any, build: Callable[[], Any], use: str = "") -> _Ref:
        """Return the reference to a thing, which `build` describes later.

        Later, because a chain of calls may be longer than Python's stack is deep.
        """
        users = self.mode == "foreign" and names.origin_of(thing) == "user"
        key = (id(thing), use, "" if users else self.mode)
        if key not in self.seen:
            self.seen[key] = len(self.nodes)
            self.nodes.append(_Node(thing, build, key[2]))
        named = thing if kind in ("class", "function") else type(thing)
        return _Ref(self.seen[key], (kind, getattr(named, "__name__", "")))

    def module(self, m: nn.Module, at: str, loose: bool = False) -> dict[str, Any]:
        """Describe a module; with its tensors if it is `loose`, not registered below the root."""
        if id(m) in self.known:
            return self.known[id(m)]
        hooks = m._forward_hooks or m._forward_pre_hooks
        if hooks or "_torchdynamo_orig_callable" in vars(m) or vars(m).get("_compiled_call_impl"):
            reason = "has forward hooks" if hooks else "is compiled"
            raise ValueError(
                f"{at} ({type(m).__name__}) {reason}, which no key names: give the plain module, "
                "and do in its forward what a hook does"
            )
        cls, attributes = type(m), {k: v for k, v in vars(m).items() if k not in _MODULE_STATE}
        code = names.declared(cls)
        if code is not None:
            constants = {
                k: v for base in cls.__mro__[::-1] for k, v in names.constants(base).items()
            }
            attributes = constants | attributes
        described: dict[str, Any] = {
            "code": self.type(cls, at, "built") if code is None else code,
            "attributes": self.attributes(attributes, at, cls),
            # Pairs, because JSON objects have no order and children may run in theirs.
            "children": [
                [name, None if child is None else self.module(child, f"{at}.{name}", loose)]
                for name, child in m._modules.items()
            ],
        }
        if loose:
            tensors = {**m._parameters, **m._buffers}
            described["tensors"] = {k: names.plain(v, f"{at}.{k}") for k, v in tensors.items()}
        return described

    def attributes(
        self, values: Mapping[str, Any], at: str, cls: type | None = None
    ) -> dict[str, Any]:
        library = cls and issubclass(cls, nn.Module) and names.origin_of(cls) == "library"
        mode = "private" if cls and (library or names.declared(cls) is not None) else ""
        described = {}
        for name in sorted(values):
            with self.within(mode if name[:1] == "_" else ""):
                described[name] = self.value(values[name], f"{at}.{name}")
        return described

    def value(self, v: Any, at: str) -> Any:
        """Describe any value."""
        try:
            return self.exact(v, at)
        except TypeError:
            if not self.mode:
                raise
            return {"unnamed": type(v).__qualname__}

    def exact(self, v: Any, at: str) -> Any:
        if isinstance(v, (torch.Tensor, nn.Module)) and id(v) in self.registered:
            return {"registered": self.registered[id(v)]}
        if (plain := names.plain(v, at)) is not names.OTHER:
            return plain
        if isinstance(v, nn.Module):
            return self.node("module", v, lambda: self.module(v, at, loose=True))
        if isinstance(v, type):
            return self.type(v, at)
        if isinstance(v, types.FunctionType):
            return self.function(v, at)
        if isinstance(v, types.CodeType):
            instructions, constants = names.code(v)
            return {"code": [instructions, self.items(constants, at)]}
        if isinstance(v, types.ModuleType):
            if names.origin(v.__name__) != "user":
                return {"module": v.__name__, **names.release(v.__name__, v)}
            inside = {k: x for k, x in vars(v).items() if k[:2] != "__" or k == "__getattr__"}
            return self.node("module", v, lambda: self.attributes(inside, at))
        if isinstance(v, enum.Enum):
            return {"enum": [self.value(type(v), at), v._name_, self.value(v._value_, at)]}
        if (parts := names.parts(v)) is not None:
            return {type(v).__name__: [self.value(part, at) for part in parts]}
        if type(v) in (*names.CONTAINERS, OrderedDict, torch.Size):
            if id(v) in self.open:
                return self.node(type(v).__name__, v, lambda: self.items(v, at))
            self.open.add(id(v))
            try:
                return self.items(v, at)
            finally:
                self.open.discard(id(v))
        return self.instance(v, at)

    def items(self, v: Any, at: str) -> Any:
        # By the plain types' own methods: a subclass may answer otherwise.
        if isinstance(v, dict):
            pairs = OrderedDict.items(v) if isinstance(v, OrderedDict) else dict.items(v)
            inner = []
            for k, x in pairs:
                where = f"{at}[{k if type(k) is str else '...'}]"
                inner.append([self.value(k, where), self.value(x, where)])
            return {type(v).__name__: inner}
        if isinstance(v, (set, frozenset)):
            described = (self.value(x, at) for x in frozenset(v))
            return {type(v).__name__: sorted(described, key=lambda x: _flat(x)[0])}
        members: Any = list.__iter__(v) if isinstance(v, list) else tuple.__iter__(v)
        listed = [self.value(x, f"{at}[{n}]") for n, x in enumerate(members)]
        return listed if type(v) is list else {type(v).__name__: listed}

    def instance(self, v: Any, at: str) -> Any:
        """Describe an object of a Python class: the class, and all that the object keeps."""
        cls, contents = type(v), names.contents(v)
        if contents is None:
            if names.origin(cls.__module__) != "user" and (name := names.importable(v)):
                return names.named(name, v.__module__)
            raise names.unnamed(at, f"a {cls.__module__}.{cls.__qualname__}")

        def build() -> Any:
            plain, attributes = contents
            content = None
            if plain is not object:
                content = self.items(v, at) if plain in names.CONTAINERS else plain.__repr__(v)
            return [self.type(cls, at, "built"), self.attributes(attributes, at, cls), content]

        return self.node("object", v, build)

    def type(self, cls: Any, at: str, use: str = "") -> Any:
        """Describe a class. `use` is "built" for that of an object that exists."""
        if names.origin_of(cls) != "user" and not any(names.patches(c) for c in cls.__mro__):
            return names.named(str(names.importable(cls)), cls.__module__)

        def build() -> Any:
            chain = [self.own(base, f"{at}: {base.__name__}", use) for base in cls.__mro__[:-1]]
            return [chain, self.value(type(cls), at)]

        return self.node("class", cls, build, use)

    def own(self, cls: Any, at: str, use: str) -> Any:
        """Describe what one class of an inheritance chain adds."""
        code = names.declared(cls)
        if code is not None:
            return [code, self.attributes(names.constants(cls), at, cls)]
        if names.origin_of(cls) != "user":
            title = names.named(str(names.importable(cls)), cls.__module__)
            return [title, self.attributes(names.patches(cls), at)]
        described: dict[str, Any] = {}
        for name, v in names.entries(cls).items():
            if use and name in _CONSTRUCTORS and isinstance(v, types.FunctionType):
                # What it called is past: the object's attributes show what it did.
                described[name] = self.value(v.__code__, at)
            else:
                described[name] = self.value(v, f"{at}.{name}")
        return [cls.__name__, described]

    def function(self, f: types.FunctionType, at: str) -> Any:
        where = names.origin_of(f)
        if where == "library" and "_torchdynamo_orig_callable" in vars(f):
            return {"compiled": self.value(vars(f)["_torchdynamo_orig_callable"], at)}
        if where != "user" and (name := names.importable(f)):
            return names.named(name, f.__module__)

        def build() -> Any:
            arguments = f.__code__.co_varnames[: f.__code__.co_argcount][::-1]
            defaults = zip(arguments, (f.__defaults__ or ())[::-1], strict=False)
            values = {f"default {k}": v for k, v in (*defaults, *(f.__kwdefaults__ or {}).items())}
            values |= {f"attribute {k}": v for k, v in vars(f).items()}
            for k, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # empty as yet
                    values[f"closure {k}"] = cell.cell_contents
            cls = values.pop("closure __class__", None)
            # A decorator's wrapper holds the user's function beside things of its own.
            with self.within("" if where == "user" else "foreign"):
                inner = {k: self.value(v, f"{at}: {k}") for k, v in sorted(values.items())}
            if where != "user":
                home = str(f.__globals__["__name__"])
                return [names.named(f"{home}.{f.__qualname__}", home), inner]
            used = {"__class__": cls and self.type(cls, at, "built")}
            for name, attributes, imported in names.uses(f.__code__):
                read = self.imported if imported else self.used
                used |= read(name, attributes, f.__globals__, at)
            return [self.value(f.__code__, at), inner, used]

        return self.node("function", f, build)

    def used(
        self, name: str, attributes: tuple[str, ...], space: Mapping[str, Any], at: str
    ) -> dict[str, Any]:
        """Describe what a name in code stands for now. A library's module is named only."""
        if name not in space or name == "__name__":  # a class inside a function reads it
            return {}
        described: dict[str, Any] = {}
        v, path, within = space[name], name, "user"
        for attribute in attributes:
            if not isinstance(v, types.ModuleType):
                break
            within, owner = names.origin(v.__name__), v
            if within != "user":
                described[path] = self.value(v, at)
            v, path = names.member(owner, attribute), f"{path}.{attribute}"
            if v is owner:
                break
        if within == "user" or isinstance(v, (type, types.FunctionType, types.ModuleType)):
            described[path] = self.value(v, f"{at}: {path}")
        return described

    def imported(
        self, name: str, attributes: tuple[str, ...], space: Mapping[str, Any], at: str
    ) -> dict[str, Any]:
        parent = space.get("__package__") or str(space.get("__name__", "")).rpartition(".")[0]
        name = importlib.util.resolve_name(name, parent)
        key, where = f"import {name}", names.origin(name, look=True)
        if where != "user":
            return {key: [where, names.version(name, look=True)]}
        if name not in sys.modules:
            raise TypeError(f"{at} imports {name} as it runs, unknown till then: load it first")
        module, at = sys.modules[name], f"{at}: {name}"
        if not attributes:
            return {key: self.value(module, at)}
        return {f"{key}.{k}": self.value(names.member(module, k), at) for k in attributes}

    def finish(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Describe all nodes, and put their digests into the tree.

        A node's digest is that of its infinite unfolding: its own text, and so on for all that it
        refers to. So equal things have one digest, whether they are one object or two, which
        differs between a notebook and a worker that unpickled.
        """
        flat: list[tuple[str, list[_Ref]]] = []
        for node in self.nodes:  # grows on the way
            self.mode = node.mode
            try:
                content = node.build()
            except TypeError:
                if not node.mode:
                    raise
                content = None
            flat.append(_flat(content))
        # Each round digests a node's text and the last digests of what it refers to. A round can
        # only distinguish more nodes; once a round distinguishes no more, no later one does.
        before, digests, count = [""] * len(flat), [_sha(text) for text, _ in flat], 0
        while len(set(digests)) > count:
            before, count = digests, len(set(digests))
            digests = [_sha(text, *(before[ref.node] for ref in refs)) for text, refs in flat]

        # A node's digest describes it so many rounds deep. The table of all digests before and
        # after the last round describes the rest.
        pairs = {first + second for first, second in zip(before, digests, strict=True)}
        table = {"references": _sha(*sorted(pairs))} if pairs else {}
        text = json.dumps(tree, default=lambda ref: dict([ref.label], digest=digests[ref.node]))
        described: dict[str, Any] = json.loads(text)
        return described | table


def _flat(content: Any) -> tuple[str, list[_Ref]]:
    """Return JSON as text with labels in the place of references, and the references in order."""
    refs: list[_Ref] = []

    def label(ref: _Ref) -> Any:
        refs.append(ref)
        return {"ref": ref.label}

    return json.dumps(content, default=label), refs


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
