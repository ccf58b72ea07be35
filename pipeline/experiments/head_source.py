"""Methods: the head of a run, a file of heads/ by its name or one of one's own by its path.

A file of one's own is read once, with the modules beside it that it imports, in turn. The bytes
that are digested are those that run, here and in every worker, whatever becomes of the files
meanwhile; two texts of one file are two modules, so that a notebook never has an old one. It is
known by its stem: where it lies, and what else lies there, is nothing at all.

A run folder keeps a copy of these files in `method/`. A path in its place would be shorter, but may
be gone, or hold another text, when the run is asked again
(`varve.pipeline.experiments.routing.restored`) or is to be
gone on with. The copy is a method like any other: given as `head` it finds the same run.

Out of sight: what is installed (a package counts by its name), what an importing function finds by
a name made at run time, and files that the code opens.
"""

import ast
import builtins
import hashlib
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from varve import heads
from varve.heads import Head
from varve.pipeline.backbones import origin
from varve.pipeline.registry import available, variant
from varve.stores import atomic

FOLDER = "method"
_ONE_IMPORT = threading.RLock()
HEADS = Path(heads.__file__).parent
MEMBERS = [n for n in (*Head.__annotations__, *vars(Head)) if not n.startswith("_")]


@dataclass(frozen=True)
class Method:
    """What builds a head, to be sent to other processes too.

    Attributes:
        name: Of the file, without its ending.
        files: Of one's own: by name in one folder, the method's and those that it imports. Empty
            for a head of heads/.
        place: The folder where they were read; for messages alone.
    """

    name: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    place: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def file(self) -> str:
        return str(Path(self.place) / f"{self.name}.py")

    @property
    def build(self) -> Callable[..., Head]:
        """Makes a head of options.

        Raises:
            ValueError: The file raises when it is imported, or has no `build` that could be one.
        """
        if not self.files:
            known: Callable[..., Head] = variant("heads", self.name).build
            return known
        try:
            module = self._module(self.name)
        except (Exception, SystemExit) as error:
            steps = traceback.extract_tb(error.__traceback__)
            own = [step for step in steps if Path(step.filename).name in self.files]
            at = f" (line {own[-1].lineno} of {own[-1].filename})" if own else ""
            raise ValueError(
                f"{self.file} raises {type(error).__name__} when it is imported: {error}{at}. Mend "
                f"it until `python {self.file}` runs"
            ) from error
        build: Callable[..., Head] | None = getattr(module, "build", None)
        if not callable(build):
            classes = [n for n, v in vars(module).items() if isinstance(v, type)
                       and v.__module__ == module.__name__]  # fmt: skip
            raise ValueError(
                f"{self.file} has no `build` to be called; its classes are "
                f"{', '.join(classes) or 'none'}: end it with build = {(classes or ['...'])[-1]}"
            )
        for name, option in heads.options_of(build).items():
            if not _is_json(option.default):
                raise ValueError(
                    f"{self.file}: option {name} of its build has "
                    + ("no default" if option.default is option.empty else f"{option.default!r}")
                    + ": give it a default that is a JSON value, so that a run can be named by it"
                )
        return build

    def built(self, options: Mapping[str, Any]) -> Head:
        """A head that has learned nothing.

        Raises:
            ValueError: What a file of one's own builds is no head.
        """
        head = self.build(**options)
        if lacking := [name for name in MEMBERS if not hasattr(head, name)]:
            raise ValueError(
                f"{self.file}: its build gives {type(head).__name__!r} without "
                f"{', '.join(lacking)}: a head has what heads/__init__.py says of `Head`"
            )
        return head

    def _module(self, stem: str) -> ModuleType:
        """Of one of the files: as its bytes are, and under a name that no other text has."""
        name = f"{stem}_{text_of(self)[:16]}"
        with _ONE_IMPORT:  # else another thread would see a module half made
            return sys.modules.get(name) or self._made(stem, name)

    def _made(self, stem: str, name: str) -> ModuleType:
        def imported(name: str, *rest: Any, **more: Any) -> ModuleType:
            if f"{name}.py" in self.files:
                return self._module(name)
            return builtins.__import__(name, *rest, **more)

        module = ModuleType(name)
        path = module.__file__ = str(Path(self.place) / f"{stem}.py")
        module.__package__ = ""
        # Python asks the module's own builtins for the function behind `import`.
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": imported}
        sys.modules[name] = module
        try:
            exec(compile(self.files[f"{stem}.py"], path, "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
        return module


def method_of(head: str | Path | Method) -> Method:
    """What a run's `head` means.

    Args:
        head: A file name in heads/, or the path of a file of one's own, which ends in ".py".

    Raises:
        ValueError: There is no such head, the file cannot be read as Python, is named as a head of
            heads/ is, or imports code that no run is named by.
        FileNotFoundError: No such file.
    """
    if isinstance(head, Method):
        return head
    path, known = Path(head), available("heads")
    if path.suffix != ".py":
        if str(head) in known:
            return Method(str(head))
        raise ValueError(
            f"no {str(head)!r} in heads/; found {', '.join(known)}. A method of your own is given "
            "by the path of its file, such as methods/mine.py"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file: {path} (looked for in {Path.cwd()}). A head is a file name in heads/, "
            "without an ending, or the path of a Python file of your own"
        )
    if path.stem in known:
        raise ValueError(
            f"{path} has the name of heads/{path.stem}.py, and results would not tell them apart: "
            f"rename the file, or give {path.stem!r} for the head of heads/"
        )
    return _read(path)


def keep(method: Method, folder: Path) -> None:
    """Put a copy of a file of one's own, and of what it imports, into a run folder."""
    for name, text in method.files.items():
        atomic.write(folder, folder / FOLDER / name, text)


def text_of(method: Method) -> str:
    """Digest of the files of one's own; "" for a head of heads/."""
    text = b"\0".join(part for n in sorted(method.files) for part in (n.encode(), method.files[n]))
    return hashlib.sha256(text).hexdigest() if method.files else ""


def kept(folder: Path, name: str, text: str) -> Method:
    """The method of a run folder.

    Args:
        text: `text_of` it, as the run was begun with.

    Raises:
        ValueError: The copy is gone, or is another text: it is not run.
    """
    if not text:
        return method_of(name)
    own = folder / FOLDER / f"{Path(name).name}.py"
    method = _read(own) if own.is_file() else None
    if method is None or text_of(method) != text:
        raise ValueError(
            f"{own} is {'gone' if method is None else 'not what the run was begun with'}: put back "
            "the files that the run had, or run it again"
        )
    return method


def code_of(method: Method) -> str:
    """Digest of a method's code and of what heads share: edited code is another run.

    Of a file of one's own also the modules beside it and the heads of heads/ that it imports.
    """
    shared = sorted([*(HEADS / "parts").glob("*.py"), *(HEADS / "grafts").glob("*.py")])
    own = [(HEADS / f"{method.name}.py").read_bytes()] if not method.files else []
    for name, text in sorted(method.files.items()):
        own += [name.encode(), text]
    own += [file.read_bytes() for file in sorted(_of_heads(method))]
    texts = [(HEADS / "__init__.py").read_bytes(), *own, *(file.read_bytes() for file in shared)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _of_heads(method: Method) -> set[Path]:
    """The heads of heads/ that a file of one's own imports."""
    found: set[Path] = set()
    waiting = list(method.files.values())
    while waiting:
        for name in _imports(waiting.pop()):
            file = HEADS / f"{name.removeprefix('varve.heads.')}.py"
            if name.startswith("varve.heads.") and file.is_file() and file not in found:
                found.add(file)
                waiting.append(file.read_bytes())
    return found


def _read(path: Path) -> Method:
    files: dict[str, bytes] = {}
    waiting = [path.stem]
    while waiting:
        file = path.parent / f"{waiting.pop()}.py"
        if file.name in files:
            continue
        files[file.name] = file.read_bytes()
        try:
            names = list(_imports(files[file.name]))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{file} is no Python: {error}. Mend it, or give another") from error
        for name in names:
            root = name.partition(".")[0]
            if (path.parent / f"{root}.py").is_file():
                waiting.append(root)
            elif root == "varve":
                if name != root and name.split(".")[1] not in ("heads", "__version__"):
                    raise ValueError(
                        f"{file} imports {name}: a head sees tensors alone, and imports nothing of "
                        "varve but varve.heads"
                    )
            elif origin(root, look=True) == "user":
                raise ValueError(
                    f"{file} imports {root}, which is neither installed nor a module beside it, so "
                    "that a run would not be named by its code: put what you need of it into a "
                    f"file in {path.parent}, and see heads/__init__.py for what a head may import"
                )
    return Method(path.stem, files, str(path.parent))


def _imports(text: bytes) -> Iterator[str]:
    """Names of modules that a file imports, and of what may be one; not those for types alone."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
            "heads",
            "varve.heads",
        ):
            yield f"varve.heads.{node.attr}"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
