"""The command line: commands of stores, commands of runs, and what they print.

Light to import: each command loads what it needs.

Exit codes: 0 done, 1 done with quarantined clips or a failed check, 2 not done (the request or its
surroundings were wrong; the message says what and what to do), 130 interrupted.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import typer

from varve.pipeline import registry

REFUSED, INTERRUPTED = 2, 130


def run_and_exit() -> None:
    """Run the command line, and end the process at once: the teardown of torch takes seconds."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    try:
        if sys.stdout is not None:  # a service may have closed it
            sys.stdout.flush()
    except BrokenPipeError:
        pass  # whoever read the output has what it wanted
    except OSError as error:
        _complain(error)
        code = REFUSED
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run the command line; an error is one sentence, with --debug a traceback.

    Raises:
        SystemExit: Always, with the exit code.
    """
    debug = "--debug" in sys.argv[1:]
    try:
        with _noted_interrupts() as interrupts:
            arguments = _load_plugins(sys.argv[1:])
            from varve.pipeline.cli.app import app  # its help lists what plugins register

            code = app(args=arguments, standalone_mode=False, prog_name="varve") or 0
        if code == INTERRUPTED or interrupts:  # the option parser turns Ctrl-C into this
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _print_error("interrupted; what was finished is kept, the same command resumes")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        _complain(error)
        sys.exit(REFUSED)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Raise at Ctrl-C as usual, and note it: within a callback the exception would be lost."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    # Another thread may set no handler, and a handler that is not Python's is the caller's.
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _complain(error: Exception) -> None:
    show = getattr(error, "show", None)
    if show is not None:  # an error of the option parser, with the usage
        with contextlib.suppress(OSError):
            show()
        return
    expected = isinstance(error, ValueError | OSError | LookupError | RuntimeError)
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    if isinstance(error, OSError) and error.filename:
        text += f": {error.filename}"
    kind = "error" if expected else f"unexpected {type(error).__name__} (--debug shows where)"
    _print_error(f"varve: {kind}: {text}")


def _print_error(text: str) -> None:
    """Print to the standard error, if there is one that takes it."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(text, file=sys.stderr)


def _load_plugins(words: list[str]) -> list[str]:
    """Load the plugins, and return the words without the options that every command takes."""
    remaining, rest = iter(words), []
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == "--plugin":
            registry.load_plugin(value if equals else next(remaining, "FILE"))
        elif word != "--debug":
            rest.append(word)
    return rest
