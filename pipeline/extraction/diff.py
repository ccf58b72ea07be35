"""Diff: how the key of each column of a store differs from that of a request.

A key is a chain: frames, pixels, each stage in turn, then reduction and number format. The result
lists the entries of the frames and the first stage that differ; all later stages differ with it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from varve.pipeline.backbones import Backbone, reduction_identity, snapshot
from varve.pipeline.config import BuildSpec
from varve.pipeline.extraction.build import requested_networks
from varve.pipeline.extraction.passes import Output, Pass, Source, passes, pixels
from varve.pipeline.extraction.sources import refusal
from varve.pipeline.extraction.update import open_store, recorded_request
from varve.stores import Feature, FeatureStore
from varve.stores.digests import canonical

CURRENT, NOT_ASKED, DIFFERS = "current", "not asked for", "differs"
# Shown for an option that only one side has.
ABSENT = "absent"
SHOWN = 4
_DIGEST = re.compile("[0-9a-f]{64}")

Element = tuple[str, Any, Any]


@dataclass(frozen=True)
class Difference:
    """A column of the store against the request.

    Attributes:
        verdict: `current` (its key is a requested one), `not asked for` (a feature that the
            request does not keep, or a network that it does not name), or `differs`.
        elements: Name, the column's value and the request's value of each difference, in the
            order of the chain.
        why: Why the column cannot serve for the request, or what it can serve for.
    """

    backbone: str
    feature: str
    fingerprint: str
    view: int
    verdict: str
    elements: list[Element]
    why: str


@dataclass(frozen=True)
class _Requested:
    """A network of the request: the descriptions of its stages, and its passes' outputs."""

    backbone: Backbone
    stages: list[dict[str, Any]]
    outputs: list[tuple[Pass, Output]]


def diff(
    store: str | Path | FeatureStore,
    spec: BuildSpec | None = None,
    backbone: Backbone | None = None,
) -> list[Difference]:
    """Compare every column of a store with a request. Reads no feature, changes nothing.

    Args:
        spec: The request; by default that of the store's last build.
        backbone: A network as it is now, perhaps changed by a method: the request is then for
            this network alone. Without a `spec` it is for every feature that the store has of it.

    Raises:
        ValueError: The request cannot be met by its networks.
        SpecMismatch: There is no `spec`, and the store does not record its last request.
        OSError: The weights of a network cannot be had.
    """
    opened = open_store(store)
    request, features = spec or recorded_request(opened), opened.features()
    if backbone is None:
        backbones = requested_networks(request)
    else:
        names_kept = {f.name for f in features if f.backbone == backbone.name}
        kept = sorted(n for n in names_kept if n.partition(":")[0] in backbone.stage_names)
        keep = request.keep if spec else tuple(kept)
        precision = str(backbone.precision).removeprefix("torch.")
        request = replace(request, backbones=(backbone.name,), keep=keep, precision=precision)
        backbones = {backbone.name: snapshot(backbone)}
    requested = [(p, o) for p in passes(request, backbones, opened, "cpu") for o in p.outputs]
    chains = [
        _Requested(network, [network.describe(stage) for stage in network.stages],
                   [(pass_, output) for pass_, output in requested if pass_.backbone == name])
        for name, network in backbones.items()
    ]  # fmt: skip
    return [_compare(feature, chains, request) for feature in features]


def request_of(store: str | Path | FeatureStore, **changes: Any) -> BuildSpec:
    """Return the request of a store's last build, changed as by `BuildSpec.changed`.

    Raises:
        ValueError: The options contradict each other.
        SpecMismatch: The store does not say what it was asked for.
    """
    return recorded_request(open_store(store)).changed(**changes)


def facts(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return differences as JSON."""
    names = ("element", "old", "asked")
    return [
        asdict(difference)
        | {"elements": [dict(zip(names, e, strict=True)) for e in difference.elements]}
        for difference in differences
    ]


def lines(differences: Sequence[Difference]) -> Iterator[str]:
    """Yield differences as text: a line per column, and the reason where it is not current."""
    for difference in differences:
        view = f" view {difference.view}" if difference.view else ""
        parts = [f"{name} {old}, asked {new}" for name, old, new in difference.elements]
        more = len(parts) - SHOWN
        parts = [*parts[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        yield (
            f"{difference.verdict:13}  {difference.backbone}  {difference.feature}{view}  "
            f"{difference.fingerprint[:16]}" + "".join(f"  [{text}]" for text in parts)
        )
        if difference.verdict != CURRENT:
            yield f"{'':13}  {difference.why}"


def _compare(feature: Feature, chains: list[_Requested], request: BuildSpec) -> Difference:
    stored = feature.spec
    view, key = int(stored["frames"]["view"]), feature.fingerprint

    def verdict(kind: str, elements: list[Element], why: str) -> Difference:
        return Difference(feature.backbone, feature.name, key, view, kind, elements, why)

    if any(output.spec.fingerprint == key for chain in chains for _, output in chain.outputs):
        return verdict(CURRENT, [], "it is what was asked for")
    network = stored["backbone"]["network"]
    named = [chain for chain in chains if chain.backbone.name == feature.backbone]
    named = named or [chain for chain in chains if chain.backbone.network == network]
    if not named:
        others = ", ".join(chain.backbone.name for chain in chains)
        why = f"the request has no {network}, and no other network gives its features"
        return verdict(NOT_ASKED, [("backbone", feature.backbone, others)], why)
    best = max(named, key=lambda chain: _common(stored["stages"], chain.stages))
    frame_sets = request.frame_sets(best.backbone.picture)
    wanted = next((each for each in frame_sets if each.view == view), frame_sets[0])
    frames = _flat_differences("frames.", stored["frames"], wanted.identity())
    if stored["pixels"] != pixels(wanted):
        frames.append(("pixels", stored["pixels"], pixels(wanted)))
    stages = _stage_differences(stored["stages"], best.stages)

    stage, reduction = stored["stages"][-1]["stage"], stored["reduction"]
    outputs = [(pass_, output) for pass_, output in best.outputs if pass_.frame_set == wanted]
    reductions = {output.reduction for _, output in outputs if output.stage == stage}
    code = stored.get("reduction_code", reduction)
    edited = code != reduction_identity(reduction) if reduction in reductions else False
    kept = reduction in reductions and not edited
    ends: list[Element] = []
    if reductions and not kept:
        others = ", ".join(sorted(name or "whole" for name in reductions))
        ends.append(("reduction", reduction or "whole", others if not edited else "edited since"))
    if feature.dtype != request.dtype:
        ends.append(("dtype", feature.dtype, request.dtype))
    if frames or stages:
        why = _why(frames, stages, stored, best, len(frame_sets))
        if best.backbone.name != feature.backbone:
            why = f"{best.backbone.name} is asked for instead: {why}"
        why += "" if kept else "; nor does the request keep such a feature"
        return verdict(DIFFERS, [*frames, *stages, *ends], why)
    source = Source(stage, reduction, feature.dtype, feature.backbone, feature.name, key, 0)
    refusals = {o.spec.feature: refusal(source, o, pass_, best.backbone) for pass_, o in outputs}
    if kept:
        coarse = refusals[feature.name]
        rounded = "and they are too coarse for it" if coarse else "and can be made from them"
        why = f"the same numbers kept in {feature.dtype}; {request.dtype} was asked for, {rounded}"
        return verdict(DIFFERS, ends, why)
    return verdict(NOT_ASKED, ends, _use(refusals))


def _use(refusals: Mapping[str, str]) -> str:
    """Return the use of a column that the request does not keep."""
    served = [feature for feature, reason in refusals.items() if not reason]
    if served:
        return f"the request keeps no such feature; {', '.join(served)} can be computed from it"
    reasons = "; ".join(dict.fromkeys(refusals.values()))
    return f"the request keeps no such feature, and none of its own can come from it: {reasons}"


def _common(stored: list[dict[str, Any]], requested: list[dict[str, Any]]) -> int:
    """Return the number of equal stages at the start of two chains."""
    equal = (canonical(old) == canonical(new) for old, new in zip(stored, requested, strict=False))
    return sum(takewhile(bool, equal))


def _stage_differences(
    stored: list[dict[str, Any]], requested: list[dict[str, Any]]
) -> list[Element]:
    """Return the differences of the first stage that differs; empty where none does."""
    number = _common(stored, requested)
    if number == len(stored):
        return []
    old, new = stored[number], requested[number] if number < len(requested) else None
    if new is None or old["stage"] not in {stage["stage"] for stage in requested}:
        return [(old["stage"], "present", ABSENT)]
    if old["stage"] != new["stage"]:
        return [(new["stage"], ABSENT, "present")]
    name, elements = old["stage"], list[Element]()
    if old["code"] != new["code"]:
        # Options of two codes cannot be compared.
        elements.append((f"{name} code", old["code"], new["code"]))
    else:
        elements += _flat_differences(f"{name} options.", old["options"], new["options"])
        # Only a module that was changed in place is described part by part.
        present = [{"altered": "present"} if "altered" in s else {} for s in (old, new)]
        elements += _flat_differences(f"{name} ", *present)
        if all(present):
            elements += _flat_differences(f"{name} altered.", old["altered"], new["altered"])
    if old["precision"] != new["precision"]:
        # Parameters in another precision have other bytes, whatever the weights.
        return [*elements, ("precision", old["precision"], new["precision"])]
    if old["parameters"] != new["parameters"]:
        elements.append((f"{name} parameters", old["parameters"][:16], new["parameters"][:16]))
    return elements


def _why(
    frames: list[Element],
    stages: list[Element],
    stored: dict[str, Any],
    chain: _Requested,
    views: int,
) -> str:
    """Return why a column of another chain cannot serve."""
    first = _why_frames([name for name, _, _ in frames], int(stored["frames"]["view"]), views)
    if not stages:
        return f"{first}, so every stage after them is another computation"
    number = _common(stored["stages"], chain.stages)
    name = stages[0][0].partition(" ")[0]
    parts = [element.removeprefix(f"{name} ").split(".") for element, _, _ in stages]
    kinds = {"code" if "code" in part else part[0] for part in parts}
    kinds = {"parts or attributes" if kind == "altered" else kind for kind in kinds}
    element, old, new = stages[-1]
    if element == "precision":
        second = f"it ran in {old} and every stage rounds otherwise in {new}"
        return f"{first}; besides, {second}" if first else second
    if stages[0][0] == name:
        where = "request's network has no" if stages[0][2] == ABSENT else "column's network had no"
        second = f"the {where} {name}"
    elif name in stored.get("grafts", []) and name not in chain.backbone.changed:
        second = f"a method had changed {name}"
    elif name in chain.backbone.changed and name not in stored.get("grafts", []):
        second = f"a method has changed {name} since"
    else:
        second = f"{name} has other {' and '.join(sorted(kinds))}"
    if first:
        return f"{first}, so every stage after them is another computation; besides, {second}"
    if not number:
        return f"{second}, and every stage after it is another computation"
    return f"{second}: columns before it are still valid, this one is not"


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


def _flat_differences(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Element]:
    ours, theirs = dict(_flat(old)), dict(_flat(new))
    return [
        (path + key, _short(ours.get(key, ABSENT)), _short(theirs.get(key, ABSENT)))
        for key in dict.fromkeys([*ours, *theirs])
        if key not in ours or key not in theirs or canonical(ours[key]) != canonical(theirs[key])
    ]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield entries of nested JSON by their path; a list of pairs goes by the pairs' names."""
    dot = f"{path}." if path else ""
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
        yield path, value


def _short(value: Any) -> Any:
    return value[:16] if isinstance(value, str) and _DIGEST.fullmatch(value) else value
