"""Guard: child processes run the main script again, up to its `if __name__ == "__main__":`."""

import re
import sys
from pathlib import Path

_GUARD = re.compile(r"""__name__\s*==\s*['"]__main__['"]|['"]__main__['"]\s*==\s*__name__""")


def require_guard() -> None:
    """Refuse to start processes from a script that each of them would run from the top.

    Raises:
        RuntimeError: The script has no guard. Nothing was started.
    """
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
