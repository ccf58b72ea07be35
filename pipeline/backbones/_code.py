"""What a code object says, as JSON. Nothing is run or imported.

Code is taken from code objects (instructions, constants, names; no lines, no docstrings), not from
source text, which may be absent (exec, a REPL, a class that cloudpickle brought) or newer than what
was imported. The price: another Python version gives another description.
"""

import dis
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

# Those on arguments and generators; the others say where a function was written.
_FLAGS = 0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200
# The compiler leaves a NOP for a line of its own, and a wide index takes an EXTENDED_ARG.
_SILENT = ("NOP", "EXTENDED_ARG", "CACHE")
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_BY_VALUE = {*dis.hasconst, *dis.hasname, *dis.haslocal, *dis.hasfree}


def describe_code(code: CodeType) -> Any:
    """JSON; equal for the same text however it is laid out, commented and documented."""
    steps = list(_steps(code))
    table: Any = dis.Bytecode(code)  # its exception_entries are missing from the type stubs
    offsets = [offset for offset, _, _ in steps]

    def place(offset: int) -> int:
        return bisect_left(offsets, offset)

    counts = (code.co_argcount, code.co_kwonlyargcount)
    stars = bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    return {
        "flags": code.co_flags & _FLAGS,
        "arguments": [*counts, code.co_posonlyargcount, *code.co_varnames[: sum(counts) + stars]],
        "steps": [
            [name, {"to": place(arg.offset)} if isinstance(arg, _Jump) else _constant(arg)]
            for _, name, arg in steps
        ],
        "handlers": [
            [place(entry.start), place(entry.end), place(entry.target), entry.depth, entry.lasti]
            for entry in table.exception_entries
        ],
    }


@dataclass(frozen=True)
class Use:
    """A global name and the attributes taken of it at once, or an import inside a function."""

    name: str
    attributes: tuple[str, ...] = ()
    imported: bool = False


def uses(code: CodeType) -> Iterator[Use]:
    """What `code` and the code inside it take from their module, in order.

    An import's attributes are the names taken from the module; its name starts with a dot for
    each level of a relative one.
    """
    steps = [(name, arg) for _, name, arg in _steps(code)]
    for n, (opcode, arg) in enumerate(steps):
        if opcode == "IMPORT_NAME":
            level, names = steps[n - 2][1], steps[n - 1][1]
            yield Use("." * level + arg, names or (), imported=True)
        elif opcode in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            chain = []
            for after, attribute in steps[n + 1 :]:
                if after not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                chain.append(attribute)
            yield Use(arg, tuple(chain))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from uses(constant)


@dataclass(frozen=True)
class _Jump:
    offset: int


def _steps(code: CodeType) -> Iterator[tuple[int, str, Any]]:
    """(offset, opcode, argument): the value where an argument stands for one, else the number."""
    for step in dis.get_instructions(code):
        if step.opname in _SILENT:
            continue
        if step.opcode in _JUMPS:
            yield step.offset, step.opname, _Jump(step.argval)
        elif step.opcode in dis.haslocal and isinstance(step.argval, tuple):
            # Python 3.13 joins two of these where they stand on one line of the source.
            halves = re.findall(r"(?:LOAD|STORE)_FAST(?:_BORROW)?", step.opname)
            for half, name in zip(halves, step.argval, strict=True):
                yield step.offset, half, name
        else:
            yield step.offset, step.opname, step.argval if step.opcode in _BY_VALUE else step.arg


def _constant(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, CodeType):
        return {"code": describe_code(value)}
    if isinstance(value, tuple):
        return {"tuple": [_constant(inner) for inner in value]}
    if isinstance(value, frozenset):
        return {"set": sorted((_constant(inner) for inner in value), key=repr)}
    return {type(value).__name__: repr(value)}  # float, complex, bytes, ...
