"""Find docstrings that are fragments, private words, and variables without a meaning.

    python tests/words.py [PATH ...]      (default: the folders of the project)

Each finding is a line `file:line: what is wrong; what to write instead`. Of tests and benchmarks
docstrings, comments and variables are judged, and of pages their text.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("stores", "heads", "pipeline", "src/varve", "tests", "benchmarks", "docs", "notebooks")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")
# Not judged: they quote the words.
QUOTING = {ROOT / "tests" / "words.py", ROOT / "tests" / "test_words.py"}

# A docstring's first sentence begins with a verb or a noun phrase, so not with one of these.
FRAGMENTS = frozenset(
    (
        *("As", "By", "Has", "Heard", "Held", "How", "If", "Like", "Made", "Named", "Of", "Said"),
        *("That", "To", "Told", "What", "When", "Where", "Whether", "Which", "Who", "Whose"),
        *("With", "Without"),
    )
)

# Standard uses, taken out of a line before the words below are looked for.
STANDARD = {
    r"held[- ]out": "a standard term: held-out data",
    r"(?:hold|holds|held|holding) (?:the|a|its|this|that|no|another|by) (?:\w+ )?lock": "locks",
    r"lock (?:is|was|are|were) held": "locks",
    r"in(?: the| its| their)? places? of": "instead of",
    r"in[- ]place": "in place, as in `add_`",
    r"(?:take|takes|taking|took) (?:the )?places?\b": "to happen; to stand in for",
    r"decimal places?": "digits",
    r"place(?:d|s|)holders?": "a standard term",
}

# Pattern of a private word: what to write instead.
PRIVATE = {
    r"teach(?:es|ing)?|taught": "train, fine-tune or learn",
    r"(?:go|goes|going|gone|went) on(?: (?:with|from))?": "resume or continue",
    r"(?:carry|carries|carrying|carried) (?:\w+ )?out": "execute or run",
    r"remember(?:s|ed|ing)?": "exemplar replay, teacher, or store",
    r"said": "outputs, reports, or the message itself",
    r"told": "given, informed, or distinguished by",
    r"tells|telling": "reports, shows, or distinguishes",
    r"what (?:\w+ ){1,3}says?": "outputs, states or reports",
    r"listen(?:s|ed|ing)?": "audio backbone, or reads audio",
    r"hear(?:s|d|ing)?": "audio",
    r"sound[- ]network": "audio backbone",
    r"places?": "index, row, position, slot or folder",
    r"looks? across": "temporal module",
    r"held": "stored, valid, referenced, locked or frozen, whichever is meant",
    r"(?:still holds?|holds? no more)": "valid; stale",
    r"name of a computation": "cache key or fingerprint",
    r"nameless": "without a fingerprint",
    r"of one'?s own|one of one": "custom or user-defined",
    r"old (?:maps?|networks?|model)": "teacher maps; teacher (previous-task) model",
    r"what came out|came out here": "reproduced results",
    r"louder": "channel re-weighting by the predicted class",
    r"was not there": "held-out, or missing",
    r"breakages?": "corruption",
    r"gone on": "resumed",
}
NAMES = {
    **dict.fromkeys(("found", "one", "made", "mine", "own", "given"), "what it contains"),
    **dict.fromkeys(("place", "places"), "index, row, position or folder"),
    **dict.fromkeys(("held", "told", "said", "asked"), "what it contains"),
}

_STANDARD = re.compile("|".join(rf"\b{words}\b" for words in STANDARD), re.IGNORECASE)
_PRIVATE = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): say for word, say in PRIVATE.items()}
_MESSAGE = "message: "
_INLINE_CODE = re.compile(r"`[^`\n]*`")


@dataclass(frozen=True, order=True)
class Finding:
    """A line to be written anew.

    Attributes:
        path: The file, relative to the root of the project.
        line: Line number, from 1; of a notebook, the number of the cell.
        problem: What is wrong, and what to write instead.
    """

    path: Path
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.problem}"


def check(paths: list[Path]) -> list[Finding]:
    """Return the findings in files, and in the files below folders, in order."""
    files = set()
    for path in paths:
        files |= {path} if path.is_file() else {f for f in path.rglob("*") if f.is_file()}
    findings: set[Finding] = set()
    for file in {file.resolve() for file in files} - QUOTING:
        path = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        if checker := _CHECKERS.get(file.suffix or file.name):
            for line, problem in checker(file.read_text("utf-8")):
                if path.parts[0] not in ("tests", "benchmarks") or not problem.startswith(_MESSAGE):
                    findings.add(Finding(path, line, problem))
    return sorted(findings)


def fragment(docstring: str) -> str:
    """Return why the first sentence of a docstring is none, or "".

    >>> fragment("Of one clip.")
    "the docstring begins with 'Of': begin with a verb or a noun phrase"
    >>> fragment("Return the shape of a clip.")
    ''
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    first = re.split(r"(?<=[.!?])\s", paragraph)[0]
    words = first.split()
    if not words:
        return "the docstring is empty"
    if words[0] in FRAGMENTS:
        return f"the docstring begins with {words[0]!r}: begin with a verb or a noun phrase"
    if first[0].islower():
        return f"the docstring begins in lower case: {' '.join(words[:4])!r}"
    if not paragraph.endswith((".", ":", "!", "?", ".)", '."')):
        return f"the docstring's first sentence has no full stop: {' '.join(words[-4:])!r}"
    if len(words) < 3:
        return f"the docstring's first sentence is a fragment: {first!r}"
    return ""


def private_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the private words of a text: (line counted from 0, problem)."""
    for number, line in enumerate(text.split("\n")):
        plain = _STANDARD.sub(" ", _INLINE_CODE.sub("`", line))
        for word, say in _PRIVATE.items():
            if match := word.search(plain):
                yield number, f"{match[0]!r}: write {say}"


def _check_python(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            for _, problem in private_words(token.string):
                yield token.start[0], problem
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.body or (docstring := ast.get_docstring(node)) is None:
                continue
            expression = node.body[0]
            assert isinstance(expression, ast.Expr)
            docstrings.add(id(expression.value))
            name = getattr(node, "name", "")
            if not name.startswith(("_", "test_")) and (problem := fragment(docstring)):
                yield node.body[0].lineno, problem
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            prose = id(node) in docstrings or " " in node.value.strip()
            kind = "" if id(node) in docstrings else _MESSAGE
            for offset, problem in private_words(node.value) if prose else ():
                line = node.lineno + (offset if node.end_lineno != node.lineno else 0)
                yield line, kind + problem
        name = ""
        if isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name in NAMES:
            assert isinstance(node, ast.arg | ast.Name)
            yield node.lineno, f"variable {name!r}: name it for {NAMES[name]}"


def _check_text(text: str) -> Iterator[tuple[int, str]]:
    for number, problem in private_words(text):
        yield number + 1, problem


def _check_notebook(text: str) -> Iterator[tuple[int, str]]:
    for number, cell in enumerate(json.loads(text)["cells"], 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = re.sub(r"^[%!]", "# ", source, flags=re.MULTILINE)
        checker = _check_python if cell["cell_type"] == "code" else _check_text
        for _, problem in checker(source):
            yield number, problem


_CHECKERS = {
    ".py": _check_python,
    ".md": _check_text,
    "Makefile": _check_text,
    ".ipynb": _check_notebook,
}


if __name__ == "__main__":
    findings = check([Path(p) for p in sys.argv[1:] or [str(ROOT / f) for f in (*FOLDERS, *PAGES)]])
    print("\n".join(map(str, findings)) or "nothing to be written anew")
    sys.exit(bool(findings))
