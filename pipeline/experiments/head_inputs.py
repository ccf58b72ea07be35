"""Offering: a store's features to a head, by the names that it reads.

A head names features by their place in a network ("vector", "blocks.-1.attn:cls"; see
`heads.Head.reads`); here they become columns of one store, and columns become `Clips`.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch

from varve.heads.parts.clips import Clips
from varve.pipeline import backbones
from varve.pipeline.backbones import CLASSIFIER, Backbone
from varve.pipeline.config import BuildSpec
from varve.pipeline.experiments.feature_tensors import BUDGET_BYTES, FeatureTensors
from varve.pipeline.experiments.scenarios import Division
from varve.pipeline.extraction.update import recorded_request
from varve.stores import Feature, FeatureStore, SpecMismatch
from varve.stores.clips import row_keys
from varve.stores.digests import digest, store_name

VECTOR, SOUND = "vector", "sound"
_BLOCK = re.compile(r"(blocks\.\d+)\.(attn|mlp)|(layer\d+\.\d+)")
_FROM_THE_END = re.compile(r"blocks\.-([1-9]\d*)(?:\.(\w+))?")


def is_relative(name: str) -> bool:
    """Whether the network must be known to say which feature is meant."""
    return _FROM_THE_END.fullmatch(name.partition(":")[0]) is not None


def meaning(name: str, backbone: Backbone) -> str:
    """The stage or feature of a network that a name of `Head.reads` means.

    Raises:
        ValueError: The network has no such block or stage.
    """
    stage, colon, reduction = name.partition(":")
    if stage == VECTOR:
        stage = backbone.default_stage.name
    elif match := _FROM_THE_END.fullmatch(stage):
        blocks: dict[str, list[str]] = {}
        for one in backbone.stage_names:
            if found := _BLOCK.fullmatch(one):
                blocks.setdefault(found[1] or found[3], []).append(one)
        number, step = int(match[1]), match[2]
        if not blocks:
            raise ValueError(
                f"{name}: {backbone.name} has no stages named blocks.N.STEP or layerN.M, which "
                f"{name} counts from the end. Its stages are {', '.join(backbone.stage_names)}; "
                "name one of them"
            )
        first = backbone.stage_names.index(next(iter(blocks.values()))[0])
        if number > len(blocks) + (not step):
            raise ValueError(
                f"{name}: {backbone.name} has {len(blocks)} blocks, so that a head trains at most "
                f"blocks={len(blocks)}, all of them, and reads {backbone.stage_names[first - 1]}"
            )
        if number > len(blocks):
            stage = backbone.stage_names[first - 1]
        else:
            block = list(blocks)[-number]
            stage = f"{block}.{step}" if step else blocks[block][-1]
    backbone.stage(stage)
    return stage + colon + reduction


def backbone_of(store: FeatureStore, asked: str) -> str:
    """The name in the store of the backbone that a run is to read.

    Where none is named, one that looks at pictures comes before those that listen.

    Raises:
        ValueError: None is named and there are several, or there is none of that name.
    """
    held = sorted({backbone for backbone, _, _ in store.columns()})
    wanted = store_name(asked) if asked else ""
    found = [one for one in held if not asked or one == wanted or one.partition(":")[0] == asked]
    if not asked and len(found) > 1:
        found = sorted(set(found) - set(_listening(store))) or found
    if len(found) != 1:
        what = f"backbone {asked!r} is {len(found)} of those" if asked else "name one by --backbone"
        raise ValueError(f"{what} of {store.location}: {', '.join(held) or 'it has no feature'}")
    return found[0]


def features_of(
    store: FeatureStore, backbone: str, reads: Sequence[str], network: Backbone | None = None
) -> dict[str, Feature]:
    """The columns that a head reads, by its own names for them.

    Args:
        backbone: Its name in the store.
        network: Needed where a name `is_relative`.

    Raises:
        SpecMismatch: The store lacks one; the message has the command that adds it. Or they are
            not of the same moments of a clip.
        ValueError: Which network is meant by `sound` or NETWORK/FEATURE is not to be said.
    """
    found = {}
    for name in reads:
        whose, own = _whose(store, backbone, name, network)
        feature = _vector(store, whose) if own == VECTOR else _column(store, whose, own)
        if feature is None:
            raise SpecMismatch(
                f"{store.location} has no {own} of {whose}, which the head reads"
                f"{f' as {name}' if own != name else ''}. This adds it:\n  "
                + build_command(store, whose, own)
            )
        found[name] = feature
    lengths = {name: feature.shape[1] for name, feature in found.items()}
    if len(set(lengths.values())) > 1:
        raise SpecMismatch(
            f"the head's features have different numbers of frames ({lengths}): build them with "
            "one --frames"
        )
    moments = {
        tuple(feature.spec["frames"].get(key) for key in ("sampling", "fps", "stride", "view"))
        for feature in found.values()
    }
    if len(moments) > 1:
        raise SpecMismatch(
            f"the head's features are of different moments of a clip ({moments}): build them with "
            "one --sampling"
        )
    return found


def _listening(store: FeatureStore) -> list[str]:
    """Networks of the store that take sounds."""
    kinds = {f.backbone: f.spec["frames"].get("picture", {}) for f in store.features()}
    return sorted(name for name, picture in kinds.items() if "rate" in picture)


def _whose(
    store: FeatureStore, backbone: str, name: str, network: Backbone | None
) -> tuple[str, str]:
    """The network, and the feature of it, that a name of `Head.reads` means."""
    if name == SOUND:
        held = _listening(store)
        if not held:
            raise SpecMismatch(
                f"{store.location} has no network that listens, whose last vector the head reads "
                "as sound. This adds one (random-0 in WEIGHTS' place to try):\n  "
                + build_command(store, "mel_resnet18:WEIGHTS", VECTOR)
            )
        if len(held) > 1:
            raise ValueError(
                f"{store.location} has {len(held)} networks that listen: say which in the place of "
                f"sound, such as {held[0]}/pool or {held[1]}/pool"
            )
        return held[0], VECTOR
    whose, _, own = name.rpartition("/")
    if name.partition(":")[0] == SOUND or (whose and is_relative(own)):
        raise ValueError(
            f"{name}: of another network a stage is named as it is, such as {whose or 'NETWORK'}"
            "/layer4.1:pool; `varve info` lists them"
        )
    if whose:
        return backbone_of(store, whose), own
    return backbone, name if network is None else meaning(name, network)


def _plain(store: FeatureStore, backbone: str) -> list[Feature]:
    """Those of the network as it was published; others are what a run remembers, or an update's."""
    return [f for f in store.features() if f.backbone == backbone and not f.spec.get("grafts")]


def _column(store: FeatureStore, backbone: str, name: str) -> Feature | None:
    held = [feature.name for feature in _plain(store, backbone)]
    if not {name, name.removesuffix(":tokens"), f"{name}:tokens"} & set(held):
        return None
    try:
        return store.feature(backbone, name, view=0)
    except SpecMismatch:
        # Several numbers of frames, say: the last build's is meant.
        request = recorded_request(store)
        frames = {field.name: getattr(request, field.name) for field in fields(BuildSpec)}
        like = [
            feature
            for feature in _plain(store, backbone)
            if feature.name == name
            and all(
                feature.spec["frames"][key] == frames[key]
                for key in ("frames", "sampling", "fps", "stride", "decoder")
            )
            and feature.spec["frames"]["view"] == 0
            and feature.dtype == request.dtype
            and feature.spec["stages"][0]["precision"] == request.precision
        ]
        if len(like) == 1:
            return like[0]
        raise


def _vector(store: FeatureStore, backbone: str) -> Feature | None:
    """The feature of one vector a frame that is deepest in the network; whole ones come first.

    Scores of the network's own classes are one where there is no other.
    """
    vectors = [feature for feature in _plain(store, backbone) if len(feature.shape) == 3]
    if not vectors:
        return None
    best = max(
        vectors,
        key=lambda one: (one.name != CLASSIFIER, len(one.spec["stages"]), ":" not in one.name),
    )
    return _column(store, backbone, best.name)


def build_command(store: FeatureStore, backbone: str, keep: str) -> str:
    """The command that adds a feature, with the frames and precision of the store's last build."""
    request, plain = recorded_request(store), BuildSpec(("",))
    asked = weights_of(store, backbone)
    words = ["varve", "build", str(store.attributes.get("dataset", "DATASET")), "--store",
             str(store.location), "--backbone", asked]  # fmt: skip
    words += [] if keep == VECTOR else ["--keep", keep]
    for name in ("frames", "sampling", "fps", "stride", "views", "flip", "random_crop", "decoder",
                 "precision", "dtype"):  # fmt: skip
        value = getattr(request, name)
        if value != getattr(plain, name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def numbers_of(store: FeatureStore) -> np.ndarray:
    """Class number of every row of the table: the place of its label among the store's classes."""
    place = {label: number for number, label in enumerate(store.attributes["classes"])}
    numbers: np.ndarray = store.clips["label"].map(place).fillna(-1).to_numpy(np.int64)
    return numbers


def clips_of(
    features: Mapping[str, Feature],
    rows: np.ndarray,
    numbers: np.ndarray,
    device: str = "cpu",
    budget_bytes: int = BUDGET_BYTES,
) -> Clips:
    """Some rows of the table as a head sees them.

    Raises:
        ValueError: There is no row.
    """
    cells = {
        name: FeatureTensors(feature, rows, device, budget_bytes)
        for name, feature in features.items()
    }
    return Clips(cells, torch.from_numpy(numbers[rows]), torch.from_numpy(rows))


def clips_digest(store: FeatureStore, division: Division) -> str:
    """Names the clips that a run learns from and is tested on: their bytes, in order."""
    keys = row_keys(store.clips)
    parts = {"train": division.train, "test": division.test}
    return digest({split: [keys[rows].tobytes().hex() for rows in tasks]
                   for split, tasks in parts.items()})  # fmt: skip


def weights_of(store: FeatureStore, backbone: str) -> str:
    """What `--backbone` was given for a network: NAME:TAG, or NAME:FILE."""
    asked: list[str] = store.attributes.get("backbones", {}).get(backbone, [backbone])
    return asked[-1]


def load_network(
    store: FeatureStore, backbone: str, precision: torch.dtype | None = None
) -> Backbone:
    """The network that a store's features were computed with, by default in their precision."""
    own = _plain(store, backbone)[0]
    held: torch.dtype = getattr(torch, own.spec["stages"][0]["precision"])
    return backbones.load(weights_of(store, backbone), precision or held)


def check_network(network: Backbone, features: Mapping[str, Feature]) -> None:
    """Prove that features are of this network.

    Raises:
        SpecMismatch: Another stage's code or parameters were behind one.
    """
    for feature in features.values():
        for held in feature.spec["stages"]:
            own = network.describe(network.stage(held["stage"]))
            if own != held:
                raise SpecMismatch(
                    f"{feature.name} of {feature.backbone} was computed with another "
                    f"{held['stage']} than the network loaded now has: load the weights that the "
                    "store was built with, or build it with these"
                )
