"""Digests of things that may refer to each other in circles: functions, classes, objects.

A thing's digest is that of its infinite unfolding: its own text, and so on for all it refers to. So
it depends neither on where the reading began nor on whether equal things are one object or two,
which differs between a notebook and a worker that unpickled.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ref:
    """Stands for a node inside JSON.

    `weak`: passed over if the node turns out nameless; `foreign`: if it is so by nothing of the
    user's; `private`: in any case.
    """

    node: int
    weak: str


@dataclass
class _Node:
    label: tuple[str, str]
    thing: Any  # held, since nodes are found by id
    build: Callable[[], Any]
    users: bool
    text: str = ""
    refs: tuple[Ref, ...] = ()
    error: TypeError | None = None  # why it has no name
    grave: bool = False  # something of the user's has none


class Nodes:
    """All things met in one reading."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._seen: dict[tuple[int, str], int] = {}

    def add(
        self, kind: str, thing: Any, build: Callable[[], Any], use: str, weak: str, users: bool
    ) -> Ref:
        """The reference to a thing, which `build` describes later.

        Later, because a chain of calls may be longer than Python's stack is deep.
        """
        key = (id(thing), use)
        if key not in self._seen:
            self._seen[key] = len(self._nodes)
            name = getattr(thing if kind in ("class", "function") else type(thing), "__name__", "")
            self._nodes.append(_Node((kind, name), thing, build, users))
        return Ref(self._seen[key], weak)

    def finish(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Describe all nodes, and put their digests into the tree.

        Raises:
            TypeError: What `build` raised for a node that the tree cannot do without.
        """
        for node in self._nodes:  # grows on the way
            try:
                node.text, node.refs = flat(node.build())
            except TypeError as error:
                node.error, node.grave = error, node.users
        spreading = True
        while spreading:
            spreading = False
            for node in reversed(self._nodes):  # causes mostly came later
                for cause in filter(None, map(self._missing, node.refs)):
                    grave = node.users or cause.grave
                    if node.error is None or (grave and not node.grave):
                        node.error, node.grave, spreading = cause.error, grave, True
        digests: dict[int, str] = {}

        def put(part: Any) -> Any:
            if isinstance(part, dict):
                return {key: put(inner) for key, inner in part.items()}
            if isinstance(part, (list, tuple)):
                return [put(inner) for inner in part]
            if not isinstance(part, Ref):
                return part
            node = self._nodes[part.node]
            if self._missing(part) and node.error is not None:
                raise node.error
            if node.error is not None:
                return {"nameless": None}
            if part.node not in digests:
                digests[part.node] = self._digest(part.node)
            return dict([node.label], digest=digests[part.node])

        return {key: put(part) for key, part in tree.items()}

    def _missing(self, ref: Ref) -> _Node | None:
        """The node of a reference that cannot do without its name, if it has none."""
        node = self._nodes[ref.node]
        passed_over = ref.weak == "private" or (ref.weak == "foreign" and not node.grave)
        return None if node.error is None or passed_over else node

    def _digest(self, root: int) -> str:
        reached = {root: self._nodes[root]}
        todo = [root]
        for n in todo:
            for ref in self._nodes[n].refs:
                if ref.node not in reached and self._nodes[ref.node].error is None:
                    reached[ref.node] = self._nodes[ref.node]
                    todo.append(ref.node)
        # Each round names a node anew by its text and the last names of what it refers to. Rounds
        # only ever tell more nodes apart, and once one tells none, no later one will.
        before, names, count = {}, {n: _sha(node.text) for n, node in reached.items()}, 0
        while len(set(names.values())) > count:
            before, count = names, len(set(names.values()))
            names = {
                n: _sha(node.text, *(before.get(ref.node, "") for ref in node.refs))
                for n, node in reached.items()
            }
        # The root's name alone would say no more than that many rounds deep; with the table of
        # all names before and after it says everything.
        return _sha(names[root], *sorted({before[n] + names[n] for n in reached}))


def text_of(content: Any) -> str:
    """JSON as text with the places of references."""
    return flat(content)[0]


def flat(content: Any) -> tuple[str, tuple[Ref, ...]]:
    """JSON as text with the places of references, and the references in order."""
    refs: list[Ref] = []

    def place(ref: object) -> Any:
        if not isinstance(ref, Ref):
            raise TypeError(f"{ref!r} ({type(ref).__name__}) in a description is no JSON")
        refs.append(ref)
        return {"ref": None}

    return json.dumps(content, default=place), tuple(refs)


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
