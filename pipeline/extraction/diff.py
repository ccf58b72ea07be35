"""Differing: what in the key of each column of a store is not as the present request would have it.

A key is a chain: frames, pictures, each stage in turn, then reduction and number format. Told are
the frames' own entries and the first stage that is another one, since from there on all is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from varve.pipeline import backbones as networks
from varve.pipeline.backbones import Backbone, reduction_identity, snapshot
from varve.pipeline.config import BuildSpec
from varve.pipeline.extraction.build import weights_in_full
from varve.pipeline.extraction.passes import Output, Pass, Source, passes, pixels
from varve.pipeline.extraction.sources import refusal
from varve.pipeline.extraction.update import recorded_request
from varve.stores import Feature, FeatureStore
from varve.stores.digests import canonical

CURRENT, NOT_ASKED, DIFFERS = "current", "not asked for", "differs"
# What an option that one side has not is said to be.
ABSENT = "absent"
SHOWN = 4
_DIGEST = re.compile("[0-9a-f]{64}")

Element = tuple[str, Any, Any]


@dataclass(frozen=True)
class Difference:
    """A column of the store against the request.

    Attributes:
        verdict: `current` (its key is one that was asked for), `not asked for` (the request's own
            computation, or a network that it does not name), or `differs`.
        elements: What differs, in the order of the chain: name, the column's, the request's.
        why: Why the column cannot serve for what was asked, or what it can serve for.
    """

    backbone: str
    feature: str
    fingerprint: str
    view: int
    verdict: str
    elements: list[Element]
    why: str


@dataclass(frozen=True)
class _Asked:
    """A network of the request: its chain, described, and what is asked of it."""

    backbone: Backbone
    stages: list[dict[str, Any]]
    passes: list[Pass]

    @property
    def outputs(self) -> list[tuple[Pass, Output]]:
        return [(one, output) for one in self.passes for output in one.outputs]


def diff(
    store: str | Path | FeatureStore,
    spec: BuildSpec | None = None,
    backbone: Backbone | None = None,
) -> list[Difference]:
    """Compare every column of a store with a request. Reads no feature, changes nothing.

    Args:
        spec: The request; by default what the store's last build was asked for.
        backbone: A network as it is now, perhaps changed by a method: the request is then for
            this network alone. Without a `spec` it is for every feature that the store has of it.

    Raises:
        ValueError: The request cannot be met by its networks.
        SpecMismatch: No `spec`, and the store does not say what it was asked for.
        OSError: The weights of a network cannot be had.
    """
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    request, features = spec or recorded_request(opened), opened.features()
    if backbone is None:
        names = dict.fromkeys(weights_in_full(name) for name in request.backbones)
        precision = getattr(torch, request.precision)
        chosen = {name: networks.load(name, precision) for name in names}
    else:
        own = {f.name for f in features if f.backbone == backbone.name}
        held = sorted(name for name in own if name.partition(":")[0] in backbone.stage_names)
        request = replace(
            request,
            backbones=(backbone.name,),
            keep=request.keep if spec else tuple(held),
            precision=str(backbone.precision).removeprefix("torch."),
        )
        chosen = {backbone.name: snapshot(backbone)}
    found = passes(request, chosen, opened, "cpu")
    asked = [
        _Asked(network, [network.describe(stage) for stage in network.stages],
               [one for one in found if one.backbone == name])
        for name, network in chosen.items()
    ]  # fmt: skip
    return [_compare(feature, asked, request) for feature in features]


def request_of(store: str | Path | FeatureStore, **given: Any) -> BuildSpec:
    """What the store's last build was asked for, with some of it replaced; None replaces nothing.

    Raises:
        ValueError: The parts do not go together.
        SpecMismatch: The store does not say what it was asked for.
    """
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    recorded = recorded_request(opened)
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= {name: tuple(changes[name]) for name in ("backbones", "keep") if name in changes}
    # What another sampling, or a single view, has no use for.
    if changes.get("sampling", recorded.sampling) != recorded.sampling:
        changes = {"fps": 0.0, "stride": 0} | changes
    if changes.get("views") == 1:
        changes = {"flip": False, "random_crop": False} | changes
    return replace(recorded, **changes)


def facts(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """For a program, as JSON."""
    names = ("element", "old", "asked")
    return [
        asdict(one) | {"elements": [dict(zip(names, e, strict=True)) for e in one.elements]}
        for one in differences
    ]


def lines(differences: Sequence[Difference]) -> Iterator[str]:
    """For a person: a line a column, and why where it is not current."""
    for one in differences:
        view = f" view {one.view}" if one.view else ""
        told = [f"{name} {old}, asked {asked}" for name, old, asked in one.elements]
        more = len(told) - SHOWN
        told = [*told[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        yield (
            f"{one.verdict:13}  {one.backbone}  {one.feature}{view}  {one.fingerprint[:16]}"
            + "".join(f"  [{text}]" for text in told)
        )
        if one.verdict != CURRENT:
            yield f"{'':13}  {one.why}"


def _compare(feature: Feature, asked: list[_Asked], request: BuildSpec) -> Difference:
    held = feature.spec
    view, key = int(held["frames"]["view"]), feature.fingerprint

    def verdict(said: str, elements: list[Element], why: str) -> Difference:
        return Difference(feature.backbone, feature.name, key, view, said, elements, why)

    if any(output.spec.fingerprint == key for one in asked for _, output in one.outputs):
        return verdict(CURRENT, [], "it is what was asked for")
    network = held["backbone"]["network"]
    named = [one for one in asked if one.backbone.name == feature.backbone]
    named = named or [one for one in asked if one.backbone.network == network]
    if not named:
        others = ", ".join(one.backbone.name for one in asked)
        why = f"the request has no {network}, and no other network gives its features"
        return verdict(NOT_ASKED, [("backbone", feature.backbone, others)], why)
    best = max(named, key=lambda one: _common(held["stages"], one.stages))
    frame_sets = request.frame_sets(best.backbone.picture)
    wanted = frame_sets[view if view < len(frame_sets) else 0]
    frames = _flat_differences("frames.", held["frames"], wanted.identity())
    if held["pixels"] != pixels(wanted):
        frames.append(("pixels", held["pixels"], pixels(wanted)))
    stages = _stage_differences(held["stages"], best.stages)

    stage, reduction = held["stages"][-1]["stage"], held["reduction"]
    outputs = [(one, output) for one, output in best.outputs if one.frame_set == wanted]
    reductions = {output.reduction for _, output in outputs if output.stage == stage}
    code = held.get("reduction_code", reduction)
    edited = code != reduction_identity(reduction) if reduction in reductions else False
    kept = reduction in reductions and not edited
    ends: list[Element] = []
    if reductions and not kept:
        others = ", ".join(sorted(name or "whole" for name in reductions))
        ends.append(("reduction", reduction or "whole", others if not edited else "edited since"))
    if feature.dtype != request.dtype:
        ends.append(("dtype", feature.dtype, request.dtype))
    if frames or stages:
        why = _why(frames, stages, held, best, len(frame_sets))
        if best.backbone.name != feature.backbone:
            why = f"{best.backbone.name} is asked for in its place: {why}"
        why += "" if kept else "; nor does the request keep such a feature"
        return verdict(DIFFERS, [*frames, *stages, *ends], why)
    source = Source(stage, reduction, feature.dtype, feature.backbone, feature.name, key, 0)
    refusals = {o.spec.feature: refusal(source, o, one, best.backbone) for one, o in outputs}
    if kept:
        rounded = (
            "and they are too coarse for it"
            if refusals[feature.name]
            else "and can be made from them"
        )
        why = f"the same numbers kept in {feature.dtype}; {request.dtype} was asked for, {rounded}"
        return verdict(DIFFERS, ends, why)
    return verdict(NOT_ASKED, ends, _use(refusals))


def _use(refusals: Mapping[str, str]) -> str:
    """What a column that the request does not keep is good for."""
    served = [feature for feature, reason in refusals.items() if not reason]
    if served:
        return f"the request keeps no such feature; {', '.join(served)} can be computed from it"
    reasons = "; ".join(dict.fromkeys(refusals.values()))
    return f"the request keeps no such feature, and none of its own can come from it: {reasons}"


def _common(held: list[dict[str, Any]], asked: list[dict[str, Any]]) -> int:
    """How many stages two chains begin with that are the same."""
    count = 0
    for old, new in zip(held, asked, strict=False):
        if canonical(old) != canonical(new):
            break
        count += 1
    return count


def _stage_differences(held: list[dict[str, Any]], asked: list[dict[str, Any]]) -> list[Element]:
    """The first stage of a column's chain that is not the request's; empty where all are."""
    number = _common(held, asked)
    if number == len(held):
        return []
    old, new = held[number], asked[number] if number < len(asked) else None
    if new is None or old["stage"] not in {stage["stage"] for stage in asked}:
        return [(old["stage"], "present", ABSENT)]
    if old["stage"] != new["stage"]:
        return [(new["stage"], ABSENT, "present")]
    name, found = old["stage"], list[Element]()
    if old["code"] != new["code"]:
        # Their options are then words of two languages.
        found.append((f"{name} code", old["code"], new["code"]))
    else:
        found += _flat_differences(f"{name} options.", old["options"], new["options"])
    if old["precision"] != new["precision"]:
        # Parameters in another precision are other bytes, which says nothing of the weights.
        return [*found, ("precision", old["precision"], new["precision"])]
    if old["parameters"] != new["parameters"]:
        found.append((f"{name} parameters", old["parameters"][:16], new["parameters"][:16]))
    return found


def _why(
    frames: list[Element], stages: list[Element], held: dict[str, Any], asked: _Asked, views: int
) -> str:
    """Why a column of another chain cannot serve."""
    first = _why_frames([name for name, _, _ in frames], int(held["frames"]["view"]), views)
    if not stages:
        return f"{first}, so every stage after them is another computation"
    number = _common(held["stages"], asked.stages)
    name = stages[0][0].partition(" ")[0]
    parts = [element.removeprefix(f"{name} ").split(".") for element, _, _ in stages]
    kinds = {"code" if "code" in part else part[0] for part in parts}
    precision = {element: (old, new) for element, old, new in stages}.get("precision")
    if precision:
        second = f"it ran in {precision[0]} and every stage rounds otherwise in {precision[1]}"
        return f"{first}; besides, {second}" if first else second
    if stages[0][0] == name:
        where = "request's network has no" if stages[0][2] == ABSENT else "column's network had no"
        second = f"the {where} {name}"
    elif name in held.get("grafts", []) and name not in asked.backbone.changed:
        second = f"a method had changed {name}"
    elif name in asked.backbone.changed and name not in held.get("grafts", []):
        second = f"a method has changed {name} since"
    else:
        second = f"{name} has other {' and '.join(sorted(kinds))}"
    if first:
        return f"{first}, so every stage after them is another computation; besides, {second}"
    if not number:
        return f"{second}, and every stage after it is another computation"
    return f"{second}: what comes before it still holds, this column does not"


def _why_frames(names: list[str], view: int, views: int) -> str:
    if not names:
        return ""
    if "frames.view" in names:
        shown = f"{views} view{'s' * (views > 1)}"
        return f"the request shows {shown} of a clip and this is view {view}: other frames"
    if names == ["pixels"]:
        return "other pictures of the same frames"
    if all(name.startswith("frames.picture") for name in names):
        return "the same frames as other pictures"
    if names == ["frames.decoder"]:
        return "another decoder's frames"
    return "other frames"


def _flat_differences(place: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Element]:
    ours, theirs = dict(_flat(old)), dict(_flat(new))
    return [
        (place + key, _short(ours.get(key, ABSENT)), _short(theirs.get(key, ABSENT)))
        for key in dict.fromkeys([*ours, *theirs])
        if key not in ours or key not in theirs or canonical(ours[key]) != canonical(theirs[key])
    ]


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of nested JSON by their place; a list of pairs goes by the pairs' names."""
    dot = f"{place}." if place else ""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{dot}{key}")
    elif isinstance(value, list | tuple) and any(
        isinstance(i, Mapping | list | tuple) for i in value
    ):
        for i, inner in enumerate(value):
            pair = isinstance(inner, list | tuple) and len(inner) == 2 and isinstance(inner[0], str)
            yield from _flat(inner[1], f"{dot}{inner[0]}") if pair else _flat(inner, f"{dot}{i}")
    else:
        yield place, value


def _short(value: Any) -> Any:
    return value[:16] if isinstance(value, str) and _DIGEST.fullmatch(value) else value
