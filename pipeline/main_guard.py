"""Checks before worker processes start: each runs the main script up to its `__main__` guard."""

import re
import sys
from pathlib import Path

from varve.pipeline import registry

_GUARD = re.compile(r"""__name__\s*==\s*['"]__main__['"]|['"]__main__['"]\s*==\s*__name__""")


def require_guard(*kinds: str) -> None:
    """Refuse to start processes that would run the user's whole script again.

    Args:
        kinds: Kinds of variants that the processes use.

    Raises:
        RuntimeError: The script has no guard, or a variant of these kinds is defined in a notebook,
            where other processes cannot find it. No process was started.
    """
    registry.require_files(*kinds)
    file = getattr(sys.modules["__main__"], "__file__", None)
    try:
        text = Path(file).read_text("utf-8", "replace") if file else ""
    except OSError:
        return
    if text and not _GUARD.search(text):
        raise RuntimeError(
            f"{file} starts other processes, and each of them would run it again from the top. Put "
            'what it does into a function, and call that under `if __name__ == "__main__":`'
        )
