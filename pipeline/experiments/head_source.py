"""The source of a head: a file of heads/ by its name, or a user's file by its path.

A user's file is read once, with the modules beside it that it imports, and those that they import.
The bytes that are digested are the bytes that run, here and in every worker process, whatever
happens to the files meanwhile. Two texts of one file are two modules, so that a notebook never runs
an old one. A file is known by its stem: where it lies has no effect, and neither have other files.

A run folder keeps a copy of these files in `head_source/`, since a file may be gone or edited when
the run is read again (`varve.pipeline.experiments.routing.restored`) or resumed. The copy is a file
like any other: given as `head` it finds the same run.

Not part of the source: installed packages (a package counts by its name), modules that are imported
by a name made at run time, and files that the code opens.
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
from varve.pipeline.registry import SUBFOLDERS, available, source_digest, variant
from varve.stores import atomic

FOLDER = "head_source"
NAMES_OF_HEADS = ("heads", "varve.heads")  # in a user's file
HEADS = Path(heads.__file__).parent
MEMBERS = [n for n in (*Head.__annotations__, *vars(Head)) if not n.startswith("_")]
_IMPORT_LOCK = threading.RLock()


@dataclass(frozen=True)
class HeadSource:
    """The code that a head is built from; it can be sent to other processes.

    Attributes:
        name: Name of the file, without its ending.
        files: Contents by file name: a user's file and those beside it that it imports. Empty for
            a head of heads/.
        folder: Folder where they were read; for messages only.
    """

    name: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    folder: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        """Path of the user's file, for messages."""
        return str(Path(self.folder) / f"{self.name}.py")

    @property
    def parts(self) -> list[bytes]:
        """Names and contents of a user's files, in the order in which they are digested."""
        return [part for n in sorted(self.files) for part in (n.encode(), self.files[n])]

    @property
    def digest(self) -> str:
        """SHA-256 of the names and contents of a user's files; "" for a head of heads/."""
        return hashlib.sha256(b"\0".join(self.parts)).hexdigest() if self.files else ""

    @property
    def build(self) -> Callable[..., Head]:
        """The function that builds a head from options.

        Raises:
            ValueError: The file raises when it is imported, has no `build` to call, or has an
                option whose default is no JSON value.
        """
        if not self.files:
            shipped = variant("heads", self.name)
            known: Callable[..., Head] = getattr(shipped, "build", shipped)
            return known
        try:
            module = self._module(self.name)
        except (Exception, SystemExit) as error:
            steps = traceback.extract_tb(error.__traceback__)
            inside = [step for step in steps if Path(step.filename).name in self.files]
            at = f" (line {inside[-1].lineno} of {inside[-1].filename})" if inside else ""
            raise ValueError(
                f"{self.path} raises {type(error).__name__} when it is imported: {error}{at}. "
                f"Correct it until `python {self.path}` runs"
            ) from error
        build: Callable[..., Head] | None = getattr(module, "build", None)
        if not callable(build):
            classes = [n for n, v in vars(module).items() if isinstance(v, type)
                       and v.__module__ == module.__name__]  # fmt: skip
            raise ValueError(
                f"{self.path} has no `build` to be called; its classes are "
                f"{', '.join(classes) or 'none'}: end it with build = {(classes or ['...'])[-1]}"
            )
        for name, option in heads.options_of(build).items():
            if not _is_json(option.default):
                raise ValueError(
                    f"{self.path}: option {name} of its build has "
                    + ("no default" if option.default is option.empty else f"{option.default!r}")
                    + ": give it a default that is a JSON value, so that a run can be named by it"
                )
        return build

    def build_head(self, options: Mapping[str, Any]) -> Head:
        """Build an untrained head.

        Raises:
            ValueError: What a user's file builds is no head.
        """
        head = heads.build_head(self.build, options, self.name)
        if lacking := [name for name in MEMBERS if not hasattr(head, name)]:
            raise ValueError(
                f"{self.path}: its build gives {type(head).__name__!r} without "
                f"{', '.join(lacking)}: a head has what heads/__init__.py says of `Head`"
            )
        return head

    def _module(self, stem: str) -> ModuleType:
        """Return the module of one of the files, under a name that no other text has."""
        name = f"{stem}_{self.digest[:16]}"
        with _IMPORT_LOCK:  # else another thread would see a module before it is complete
            return sys.modules.get(name) or self._execute(stem, name)

    def _execute(self, stem: str, name: str) -> ModuleType:
        def import_beside(name: str, *rest: Any, **more: Any) -> ModuleType:
            if f"{name}.py" in self.files:
                return self._module(name)
            return builtins.__import__(name, *rest, **more)

        module = ModuleType(name)
        path = module.__file__ = str(Path(self.folder) / f"{stem}.py")
        module.__package__ = ""
        # Python asks the module's own builtins for the function behind `import`.
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": import_beside}
        sys.modules[name] = module
        try:
            exec(compile(self.files[f"{stem}.py"], path, "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
        return module


def find_head(head: str | Path | HeadSource) -> HeadSource:
    """Find the source of a head.

    Args:
        head: A file name in heads/, or the path of a user's file, which ends in ".py".

    Raises:
        ValueError: There is no such head; or the file is no Python, has the name of a head of
            heads/, or imports code that the run could not be named by.
        FileNotFoundError: There is no such file.
    """
    if isinstance(head, HeadSource):
        return head
    path, known = Path(head), available("heads")
    if path.suffix != ".py":
        if str(head) in known:
            return HeadSource(str(head))
        raise ValueError(
            f"no {str(head)!r} in heads/; found {', '.join(known)}. Give a head of your own by the "
            "path of its file, such as methods/mine.py"
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


def save_source(source: HeadSource, folder: Path) -> None:
    """Copy a user's files into a run folder."""
    for name, text in source.files.items():
        atomic.write(folder, folder / FOLDER / name, text)


def restore_source(folder: Path, name: str, digest: str) -> HeadSource:
    """Return the source of the head of a run folder, which the run was started with.

    Raises:
        ValueError: The copy is gone, or is another text: it is not run.
    """
    if not digest:
        return find_head(name)
    copy = folder / FOLDER / f"{Path(name).name}.py"
    source = _read(copy) if copy.is_file() else None
    if source is None or source.digest != digest:
        raise ValueError(
            f"{copy} is {'gone' if source is None else 'not what the run was started with'}: put "
            "back the files that the run had, or run it again"
        )
    return source


def code_digest(source: HeadSource) -> str:
    """Digest of a head's code and of what heads share, so that edited code is another run.

    For a user's file it covers the modules beside it and the heads of heads/ that it imports.
    """
    shared = sorted([*(HEADS / "parts").glob("*.py"), *(HEADS / "grafts").glob("*.py")])
    file, texts = _shipped_file(source.name), source.parts
    if not source.files and file is None:
        texts = [source_digest("heads", source.name).encode()]
    head_files = [] if texts or file is None else [file]
    imported = _imported_heads([*source.files.values(), *(f.read_bytes() for f in head_files)])
    contract = [HEADS / "__init__.py", HEADS / "_whitening.py"]
    files = [*head_files, *sorted(imported), *shared, *contract]
    texts = [*texts, *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def imported_heads(source: HeadSource) -> set[Path]:
    """Return the files of heads/ that a user's files import, directly or through one another."""
    return _imported_heads([*source.files.values()])


def _imported_heads(waiting: list[bytes]) -> set[Path]:
    """Return the files of heads/ that texts import, directly or through one another."""
    files: set[Path] = set()
    while waiting:
        for name in _imports(waiting.pop()):
            file = HEADS.joinpath(*name.removeprefix("varve.heads.").split(".")).with_suffix(".py")
            is_head = name.startswith("varve.heads.") and file == _shipped_file(file.stem)
            if is_head and file not in files:
                files.add(file)
                waiting.append(file.read_bytes())
    return files


def _shipped_file(name: str) -> Path | None:
    """Return the file of a head of heads/; None where it is none."""
    folders = [HEADS, *(HEADS / folder for folder in SUBFOLDERS["heads"])]
    return next((f for f in (folder / f"{name}.py" for folder in folders) if f.is_file()), None)


def _read(path: Path) -> HeadSource:
    """Read a user's file, and the modules beside it that it imports."""
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
            raise ValueError(
                f"{file} is no Python: {error}. Correct it, or give another"
            ) from error
        for name in names:
            root = name.partition(".")[0]
            if (path.parent / f"{root}.py").is_file():
                waiting.append(root)
            elif root == "varve":
                if name != root and name.split(".")[1] not in ("heads", "__version__"):
                    raise ValueError(
                        f"{file} imports {name}: a head sees only tensors, and imports nothing of "
                        "varve but varve.heads"
                    )
            elif origin(root, look=True) == "user":
                raise ValueError(
                    f"{file} imports {root}, which is neither installed nor a module beside it, so "
                    "that a run would not be named by its code: put what you need of it into a "
                    f"file in {path.parent}, and see heads/__init__.py for what a head may import"
                )
    return HeadSource(path.stem, files, str(path.parent))


def _imports(text: bytes) -> Iterator[str]:
    """Names of the modules that a file may import, but for those under TYPE_CHECKING."""
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
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in NAMES_OF_HEADS:
            yield f"varve.heads.{node.attr}"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
