"""Varve: a layered feature store for video, and the incremental heads that learn on it.

The public calls, loaded on first use: a child process that decodes a video imports neither torch
nor dask.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varve.pipeline.config import BuildSpec, Runtime
    from varve.pipeline.experiments.cost_table import cost
    from varve.pipeline.experiments.feature_tensors import FeatureTensors
    from varve.pipeline.experiments.routing import route
    from varve.pipeline.experiments.run import run
    from varve.pipeline.experiments.sweep import ablate
    from varve.pipeline.extraction.build import build, plan
    from varve.pipeline.extraction.update import update
    from varve.pipeline.registry import load_plugin, register
    from varve.stores import Feature, FeatureStore

_PUBLIC = {
    "BuildSpec": "varve.pipeline.config",
    "Feature": "varve.stores",
    "FeatureStore": "varve.stores",
    "FeatureTensors": "varve.pipeline.experiments.feature_tensors",
    "Runtime": "varve.pipeline.config",
    "ablate": "varve.pipeline.experiments.sweep",
    "build": "varve.pipeline.extraction.build",
    "cost": "varve.pipeline.experiments.cost_table",
    "load_plugin": "varve.pipeline.registry",
    "plan": "varve.pipeline.extraction.build",
    "register": "varve.pipeline.registry",
    "route": "varve.pipeline.experiments.routing",
    "run": "varve.pipeline.experiments.run",
    "update": "varve.pipeline.extraction.update",
}

__all__ = [
    "BuildSpec",
    "Feature",
    "FeatureStore",
    "FeatureTensors",
    "Runtime",
    "ablate",
    "build",
    "cost",
    "load_plugin",
    "plan",
    "register",
    "route",
    "run",
    "update",
]


if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'varve' has no attribute {name!r}")
        return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
