"""Pipeline: joins videos, networks, stores and heads.

Public calls are loaded on first use, so that a decoder's child process, which
imports `pipeline.decoders`, never pays for torch or dask. No module may have the name of one:
importing it would put the module in the call's place.
"""

import importlib
from typing import Any

_PUBLIC = {
    "build": "pipeline.building",
    "plan": "pipeline.building",
    "update": "pipeline.updating",
    "run": "pipeline.experiment",
    "ablate": "pipeline.ablation",
    "route": "pipeline.routing",
    "FeatureTensors": "pipeline.tensors",
    "BuildSpec": "pipeline.spec",
    "Runtime": "pipeline.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
