"""Preparing: what a run is, before its first task.

Everything that can be refused is refused here, and what decides a run's numbers is written down:
head, options, scenario, features, clips, code. Its digest is the run's identity.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from varve import heads
from varve.heads import FineTunesBackbone, HasInferenceOptions, Head, UsesTeacher
from varve.heads.parts.clips import Clips
from varve.pipeline import backbones
from varve.pipeline.experiments import head_inputs, scenarios
from varve.pipeline.experiments.head_network import HeadNetwork
from varve.pipeline.experiments.head_source import Method, code_of, method_of
from varve.pipeline.experiments.scenarios import Scenario, divide
from varve.stores import Feature, FeatureStore, SpecMismatch
from varve.stores.digests import digest


@dataclass
class Prepared:
    """A run before its first task: the head, what it reads, and which clips are of which task."""

    spec: dict[str, Any]
    store: str
    method: Method
    head: Head
    network: HeadNetwork | None
    features: dict[str, Feature]
    tasks: tuple[tuple[str, ...], ...]
    division: scenarios.Division
    numbers: np.ndarray
    classes: list[str]
    text: Tensor | None  # of all classes
    device: str
    seen: list[Clips] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest(self.spec)

    @property
    def learning(self) -> str:
        """Digest of what decides the head's states: runs that share it learn the same."""
        return learning_of(self.spec, self.method)

    @property
    def name(self) -> str:
        """Of the run folder."""
        spec = self.spec
        return f"{spec['head']}-{spec['scenario']}-{spec['seed']}-{self.digest[:8]}"

    @property
    def key(self) -> str:
        """Of the columns that the head reads."""
        return digest(self.spec["features"])

    def clips(self, rows: np.ndarray, more: Mapping[str, Feature] = {}) -> Clips:
        features = {**self.features, **more}
        return head_inputs.clips_of(features, rows, self.numbers, self.device)


def prepare(
    store: str | Path | FeatureStore,
    head: str | Path | Method,
    scenario: str | Scenario,
    seed: int = 1000,
    options: Mapping[str, Any] = {},
    backbone: str = "",
    splits: tuple[str, str] = ("train", "test"),
    device: str = "cpu",
) -> Prepared:
    """Everything that can be refused, before anything is computed. Arguments as `run`."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{device=}, and torch finds no GPU here: leave it out for the CPU")
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    method = method_of(head)
    known = inspect_options(method.build)
    given = {**({"seed": seed} if "seed" in known else {}), **options}
    given = {key: _plain(value, known.get(key)) for key, value in given.items()}
    name = head_inputs.backbone_of(opened, backbone)
    made, network, features = head_of(opened, method, given, name)
    classes = list(opened.attributes["classes"])
    chosen = scenario
    if isinstance(chosen, str):
        chosen = scenarios.scenario_of(chosen, classes, seed)
    division = divide(opened.clips, chosen, *splits)
    used = np.concatenate([*division.train, *division.test])
    for feature in features.values():
        if not feature.valid[used].all():
            feature.read(used[~feature.valid[used]])  # raises, and says which and why
    try:
        text: Tensor | None = torch.from_numpy(opened.text(name, classes).values).float()
    except LookupError:
        text = None
    spec = {
        "head": method.name,
        "options": known | given,
        "scenario": chosen.name,
        "seed": seed,
        "backbone": name,
        "tasks": [list(task) for task in chosen.tasks],
        "features": {name: feature.fingerprint for name, feature in features.items()},
        "network": network.identity() if network else None,
        "text": None if text is None else hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        "clips": head_inputs.clips_digest(opened, division),
        "device": torch.device(device).type,
        "code": code_of(method),
    }
    return Prepared(spec, str(opened.location), method, made, network, features, chosen.tasks,
                    division, head_inputs.numbers_of(opened), classes, text, device)  # fmt: skip


def head_of(
    store: FeatureStore, method: Method, options: Mapping[str, Any], backbone: str
) -> tuple[Head, HeadNetwork | None, dict[str, Feature]]:
    """A head that has learned nothing, the network it changes, if any, and what it reads.

    Args:
        backbone: Its name in the store.

    Raises:
        ValueError: No such option, or what is built is no head.
        SpecMismatch: The store lacks a feature, or is of another network than is loaded.
    """
    head, build = method.name, method.build
    known = inspect_options(build)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{head} has no option {', '.join(unknown)}; it has "
            + (", ".join(f"{name}={value!r}" for name, value in known.items()) or "none")
        )
    _check_types(head, build, options)
    made = method.built(options)
    changes = isinstance(made, FineTunesBackbone) and made.fine_tunes
    network: backbones.Backbone | None = None
    if changes or any(map(head_inputs.is_relative, made.reads)):
        network = head_inputs.load_network(store, backbone)
    features = head_inputs.features_of(store, backbone, made.reads, network)
    if network is None or not (isinstance(made, FineTunesBackbone) and changes):
        return made, None, features
    head_inputs.check_network(network, features)
    if isinstance(made, UsesTeacher) and network.precision != torch.float32:
        precision = str(network.precision).removeprefix("torch.")
        raise SpecMismatch(
            f"{head} compares what it trains, in float32, with what the store keeps of it, and the "
            f"features of {backbone} in {store.location} are of {precision}: build it with "
            "--precision float32"
        )
    frames = next(iter(features.values())).shape[1]
    attached = HeadNetwork(network, frames, partial(head_inputs.load_network, store, backbone))
    made.attach(attached)
    return made, attached, features


def _check_types(head: str, build: Callable[..., Head], options: Mapping[str, Any]) -> None:
    """Refuse what an option cannot be before anything is computed with it."""
    parameters = heads.options_of(build)
    for name, value in options.items():
        hint = parameters[name].annotation
        either = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = tuple(get_origin(kind) or kind for kind in either)
        if float in kinds:
            kinds += (int,)
        is_flag = isinstance(value, bool) and bool not in kinds
        if hint is not inspect.Parameter.empty and (is_flag or not isinstance(value, kinds)):
            said = (
                hint.__name__ if type(hint) is type else str(hint).replace("collections.abc.", "")
            )
            raise ValueError(
                f"{head}'s {name}={value!r}: give {said}; its default is "
                f"{parameters[name].default!r}"
            )


def learning_of(spec: Mapping[str, Any], method: Method) -> str:
    head = method.build(**spec["options"])
    aside = head.inference_options if isinstance(head, HasInferenceOptions) else ()
    options = {name: value for name, value in spec["options"].items() if name not in aside}
    return digest(dict(spec) | {"options": options})


def inspect_options(build: Callable[..., Head]) -> dict[str, Any]:
    """Options of a head and their defaults."""
    return {name: one.default for name, one in heads.options_of(build).items()}


def _plain(value: Any, default: Any) -> Any:
    """One form for equal numbers, 10000 and 1e4: that of the default."""
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        return float(value)
    return value
