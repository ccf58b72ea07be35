"""Names to implementations: a variant's name is its file name.

A kind of variant (layout, decoder, backbone, head) is a folder; a new variant
is a new file in it. There is no table to edit; a leading underscore hides a helper.
"""

import importlib
import pkgutil
from types import ModuleType


def available(package: str) -> list[str]:
    """Names of the variants in `package`, sorted.

    >>> "class_folders" in available("pipeline.layouts")
    True
    """
    path = importlib.import_module(package).__path__
    return sorted(
        m.name for m in pkgutil.iter_modules(path) if not (m.ispkg or m.name.startswith("_"))
    )


def variant(package: str, name: str) -> ModuleType:
    """Import one variant's module.

    Raises:
        ValueError: The folder holds no such file; the message lists what it holds.
    """
    if name not in available(package):
        raise ValueError(
            f"no {name!r} in {package.replace('.', '/')}/; found {', '.join(available(package))}"
        )
    return importlib.import_module(f"{package}.{name}")
