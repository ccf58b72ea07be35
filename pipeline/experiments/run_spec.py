"""The specification of a run: whatever decides its numbers, checked and named before it starts.

`prepare_run` refuses what can be refused before anything is computed. The specification holds head,
options, scenario, features, clips and code; its digest is the identity of the run.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from varve import heads
from varve.heads import FineTunesBackbone, HasInferenceOptions, Head, LimitsClasses, UsesTeacher
from varve.heads.parts.clips import Clips
from varve.pipeline import backbones
from varve.pipeline.experiments import head_inputs, scenarios
from varve.pipeline.experiments.head_network import HeadNetwork
from varve.pipeline.experiments.head_source import HeadSource, code_digest, find_head
from varve.pipeline.experiments.run_folder import FORMAT
from varve.pipeline.experiments.scenarios import ClassList, Scenario, divide
from varve.stores import Feature, FeatureStore, SampledFeature, SpecMismatch
from varve.stores.digests import digest


@dataclass
class PreparedRun:
    """A run before its first task.

    Attributes:
        spec: What decides the numbers; see `prepare_run`.
        store: Folder of the store.
        source: What the head is built from.
        head: A new head, attached to `network` where it trains a part of it.
        network: The network that the head trains a part of; None for others.
        features: Feature columns that the head reads, by its names for them.
        tasks: Class names of each task.
        division: Rows of the training and test clips of each task.
        labels: int64, the class number of every row of the table of clips.
        classes: Class names of the store, by number.
        class_text: float32 [classes, width], text features; None without a text tower.
        device: Where the head works.
        views: Columns of each further view to train on, like `features`.
        corners: Columns of the corners of the picture, to test on.
    """

    spec: dict[str, Any]
    store: str
    source: HeadSource
    head: Head
    network: HeadNetwork | None
    features: dict[str, Feature]
    tasks: tuple[tuple[str, ...], ...]
    division: scenarios.Division
    labels: np.ndarray
    classes: list[str]
    class_text: Tensor | None
    device: str
    views: list[dict[str, Feature]]
    corners: list[dict[str, Feature]]

    @property
    def digest(self) -> str:
        """Identity of the run."""
        return digest(self.spec)

    @property
    def training_digest(self) -> str:
        """Digest of what decides the states of the head; see `training_digest`."""
        return training_digest(self.spec, self.source)

    @property
    def name(self) -> str:
        """Name of the run folder."""
        spec = self.spec
        return f"{spec['head']}-{spec['scenario']}-{spec['seed']}-{self.digest[:8]}"

    def training_clips(self, rows: np.ndarray, teacher: Sequence[Mapping[str, Feature]]) -> Clips:
        """Return some rows of the table of clips, in every view to train on.

        Args:
            rows: Row ids.
            teacher: Further columns of each view, the plain one first; none for no further ones.
        """
        views = [self.features, *self.views]
        teacher = teacher or [{}] * len(views)
        plain, *views = ({**view, **more} for view, more in zip(views, teacher, strict=True))
        return head_inputs.make_clips(plain, rows, self.labels, self.device, views=views)

    def test_clips(self, rows: np.ndarray) -> Clips:
        """Return some rows of the table of clips, with the corners to test on as views."""
        return head_inputs.make_clips(
            self.features, rows, self.labels, self.device, views=self.corners
        )


def prepare_run(
    store: str | Path | FeatureStore,
    head: str | Path | HeadSource,
    scenario: str | Scenario,
    seed: int = 1000,
    options: Mapping[str, Any] = {},
    backbone: str = "",
    splits: tuple[str, str] = ("train", "test"),
    device: str = "cpu",
    sampled: Mapping[str, Any] | None = None,
    order: ClassList | None = None,
    only: ClassList | None = None,
    validation: float = 0.0,
) -> PreparedRun:
    """Check a run and write its specification, before anything is computed.

    Args and Raises: as `varve.run`.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{device=}, and torch finds no GPU here: leave it out for the CPU")
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    opened = opened.sampled(**sampled) if sampled else opened
    source = find_head(head)
    defaults = option_defaults(source.build)
    chosen = {**({"seed": seed} if "seed" in defaults else {}), **options}
    chosen = {name: _normalised(value, defaults.get(name)) for name, value in chosen.items()}
    name = head_inputs.choose_backbone(opened, backbone)
    built, network, features = build_head(opened, source, chosen, name)
    classes = list(opened.attributes["classes"])
    if isinstance(scenario, str):
        scenario = scenarios.make_scenario(scenario, classes, seed, order=order, only=only)
    elif order is not None or only is not None:
        raise ValueError(f"{scenario.name} has its classes: leave out `order`, `only`")
    if isinstance(built, LimitsClasses):
        built.check_classes(len(scenario.classes))
    views, corners = _other_views(opened, features, defaults | chosen, sampled or {})
    every = {f"{n} {name}": feature for n, view in enumerate([features, *views, *corners])
             for name, feature in view.items()}  # fmt: skip
    table = head_inputs.with_status(opened.clips, every)
    division = divide(table, scenario, *splits, validation)
    rows = np.concatenate([*division.train, *division.test])
    for feature in every.values():
        if not feature.valid[rows].all():
            feature.read(rows[~feature.valid[rows]])  # raises, and names clips and reason
    try:
        text: Tensor | None = torch.from_numpy(opened.text(name, classes).values).float()
    except LookupError:
        text = None
    spec: dict[str, Any] = {
        "format": FORMAT,
        "head": source.name,
        "options": defaults | chosen,
        "scenario": scenario.name,
        "scenario_source": scenario.source_digest,
        "seed": seed,
        "backbone": name,
        "tasks": [list(task) for task in scenario.tasks],
        "features": {name: feature.fingerprint for name, feature in features.items()},
        "network": network.identity() if network else None,
        "text": None if text is None else hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        "clips": head_inputs.clips_digest(opened, division),
        "device": torch.device(device).type,
        "code": code_digest(source),
        **({"sampled": dict(sampled)} if sampled else {}),
        **({"validation": validation} if validation else {}),
    }
    for kind, columns in (("views", views), ("corners", corners)):
        if columns:
            names = [{n: f.fingerprint for n, f in view.items()} for view in columns]
            spec |= {kind: names}
    return PreparedRun(spec, str(opened.location), source, built, network, features, scenario.tasks,
                       division, head_inputs.class_numbers(opened), classes, text,
                       device, views, corners)  # fmt: skip


def _other_views(
    store: FeatureStore,
    features: Mapping[str, Feature],
    options: Mapping[str, Any],
    sampled: Mapping[str, Any],
) -> tuple[list[dict[str, Feature]], list[dict[str, Feature]]]:
    """Return the columns of the further views to train on, and of the corners to test on."""
    views, crops = options[heads.VIEWS.name], options[heads.CROPS.name]
    numbers, corners = range(1, views), range(-1, -crops, -1)
    if sampled and (numbers or corners):
        raise SpecMismatch(
            f"{views=}, {crops=} of frames chosen from whole videos, which have the plain view "
            "alone: build the views with --frames, or leave both out"
        )
    training, testing = (
        head_inputs.find_views(store, features, each) for each in (numbers, corners)
    )
    return training, testing


def build_head(
    store: FeatureStore, source: HeadSource, options: Mapping[str, Any], backbone: str
) -> tuple[Head, HeadNetwork | None, dict[str, Feature]]:
    """Build an untrained head for a backbone of a store.

    Returns:
        The head; the network that it trains a part of, or None; the feature columns that it reads.

    Raises:
        ValueError: No such option, or what is built is no head.
        SpecMismatch: The store lacks a feature, or was built with another network than is loaded.
    """
    heads.check_options(source.build, options, source.name)
    _check_types(source, options)
    head = source.build_head(options)
    fine_tunes = isinstance(head, FineTunesBackbone) and head.fine_tunes
    network: backbones.Backbone | None = None
    read = [f for f in store.features() if f.backbone == backbone and isinstance(f, SampledFeature)]
    of_windows = [feature for feature in read if "windows" in feature.spec]
    if fine_tunes and of_windows:
        raise SpecMismatch(
            f"{source.name} trains a part of {backbone} on clips, and {store.location} has windows "
            "of whole videos: build a store with --sampling tsn "
            f"--frames {of_windows[0].spec['windows']['frames']}"
        )
    if fine_tunes or any(map(head_inputs.is_relative, head.reads)):
        network = head_inputs.load_network(store, backbone)
    features = head_inputs.find_features(store, backbone, head.reads, network)
    if network is None or not (isinstance(head, FineTunesBackbone) and fine_tunes):
        return head, None, features
    head_inputs.check_network(network, features)
    if isinstance(head, UsesTeacher) and network.precision != torch.float32:
        precision = str(network.precision).removeprefix("torch.")
        raise SpecMismatch(
            f"{source.name} compares what it trains, in float32, with features of the store, and "
            f"those of {backbone} in {store.location} are of {precision}: build it with "
            "--precision float32"
        )
    frames = next(iter(features.values())).spec["frames"]["frames"]
    attached = HeadNetwork(network, frames, partial(head_inputs.load_network, store, backbone))
    head.attach(attached)
    return head, attached, features


def _check_types(source: HeadSource, options: Mapping[str, Any]) -> None:
    """Refuse a value of another type than its option, before anything is computed with it."""
    parameters = heads.options_of(source.build)
    for name, value in options.items():
        hint = parameters[name].annotation
        either = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = tuple(get_origin(kind) or kind for kind in either)
        if float in kinds:
            kinds += (int,)
        is_flag = isinstance(value, bool) and bool not in kinds
        if hint is not inspect.Parameter.empty and (is_flag or not isinstance(value, kinds)):
            wanted = (
                hint.__name__ if type(hint) is type else str(hint).replace("collections.abc.", "")
            )
            raise ValueError(
                f"{source.name}'s {name}={value!r}: give {wanted}; its default is "
                f"{parameters[name].default!r}"
            )


def training_digest(spec: Mapping[str, Any], source: HeadSource) -> str:
    """Digest of a specification without inference-only options: runs that share it train alike."""
    head = source.build_head(spec["options"])
    inference = head.inference_options if isinstance(head, HasInferenceOptions) else ()
    left_out = {*inference, heads.CROPS.name}
    options = {name: value for name, value in spec["options"].items() if name not in left_out}
    return digest({n: x for n, x in spec.items() if n != "corners"} | {"options": options})


def option_defaults(build: Callable[..., Head]) -> dict[str, Any]:
    """Options of a head by name, with their defaults."""
    return {name: option.default for name, option in heads.options_of(build).items()}


def _normalised(value: Any, default: Any) -> Any:
    """Return equal numbers (10000 and 1e4) in one form, that of the default."""
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        return float(value)
    return value
