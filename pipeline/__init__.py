"""Pipeline: joins videos, networks, stores and heads.

Public calls are loaded on first use, so that a decoder's child process, which
imports `pipeline.decoders`, never pays for torch or dask.
"""

import importlib
from typing import Any

_PUBLIC = {"build": "pipeline.build", "plan": "pipeline.build", "BuildSpec": "pipeline.spec"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
