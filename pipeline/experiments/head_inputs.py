"""The inputs of a head: the feature columns of a store under the names that a head reads.

A head names features by their position in a network ("vector", "blocks.-1.attn:cls"; see
`heads.Head.reads`). Here these names become columns of one store, and rows of columns `Clips`.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import takewhile

import numpy as np
import pandas as pd
import torch

from varve.heads.parts.clips import Clips
from varve.pipeline import backbones
from varve.pipeline.backbones import CLASSIFIER, Backbone
from varve.pipeline.config import FRAME_OPTIONS, BuildSpec
from varve.pipeline.experiments.feature_tensors import BUDGET_BYTES, FeatureTensors
from varve.pipeline.experiments.scenarios import Division
from varve.pipeline.extraction.update import recorded_request
from varve.stores import Feature, FeatureStore, SpecMismatch, VideoFeature
from varve.stores.clips import OVERFLOW, row_keys
from varve.stores.digests import digest, store_name

VECTOR, SOUND = "vector", "sound"
VARIED = ("view", "flip", "random_crop")  # what differs between the views of one request
_BLOCK = re.compile(r"(blocks\.\d+)\.(attn|mlp)|(layer\d+\.\d+)")
_FROM_THE_END = re.compile(r"blocks\.-([1-9]\d*)(?:\.(\w+))?")


def is_relative(name: str) -> bool:
    """Return whether a name of `Head.reads` counts blocks from the end of the network."""
    return _FROM_THE_END.fullmatch(name.partition(":")[0]) is not None


def resolve_name(name: str, backbone: Backbone) -> str:
    """Return the stage or feature of a network that a name of `Head.reads` means.

    Raises:
        ValueError: The network has no such block or stage, or no blocks to count.
    """
    stage, colon, reduction = name.partition(":")
    if stage == VECTOR:
        stage = backbone.default_stage.name
    elif match := _FROM_THE_END.fullmatch(stage):
        stage = _block_from_the_end(backbone, name, int(match[1]), match[2] or "")
    backbone.stage(stage)
    return stage + colon + reduction


def _block_from_the_end(backbone: Backbone, name: str, number: int, step: str) -> str:
    """Return the stage of "blocks.-NUMBER.STEP"; with one more than all blocks, the one before."""
    stages_of: dict[str, list[str]] = {}
    for stage in backbone.stage_names:
        if match := _BLOCK.fullmatch(stage):
            stages_of.setdefault(match[1] or match[3], []).append(stage)
    if not stages_of:
        raise ValueError(
            f"{name}: {backbone.name} has no stages named blocks.N.STEP or layerN.M, which {name} "
            f"counts from the end. Its stages are {', '.join(backbone.stage_names)}; name one of "
            "them, or choose a head that trains no blocks"
        )
    count = len(stages_of)
    before = [*takewhile(lambda stage: not _BLOCK.fullmatch(stage), backbone.stage_names)][-1:]
    if number > count + bool(before and not step):
        most = (
            f"blocks={count}, all of them, and reads {before[0]}"
            if before
            else (f"blocks={count - 1}, since no stage comes before the first of them")
        )
        raise ValueError(
            f"{name}: {backbone.name} has {count} blocks, so that a head trains at most {most}"
        )
    if number > count:
        return before[0]
    block = list(stages_of)[-number]
    return f"{block}.{step}" if step else stages_of[block][-1]


def choose_backbone(store: FeatureStore, name: str) -> str:
    """Return the name in the store of the backbone that a run reads.

    Where no name is given, an image backbone is preferred to audio backbones.

    Raises:
        ValueError: No name is given and there are several, or there is none of that name.
    """
    known = sorted({backbone for backbone, _, _ in store.columns()})
    wanted = store_name(name) if name else ""
    matching = [b for b in known if not name or b == wanted or b.partition(":")[0] == name]
    if not name and len(matching) > 1:
        matching = sorted(set(matching) - set(_audio_backbones(store))) or matching
    if len(matching) != 1:
        what = (
            f"backbone {name!r} is {len(matching)} of those" if name else "name one by --backbone"
        )
        raise ValueError(f"{what} of {store.location}: {', '.join(known) or 'it has no feature'}")
    return matching[0]


def find_features(
    store: FeatureStore, backbone: str, reads: Sequence[str], network: Backbone | None = None
) -> dict[str, Feature]:
    """Find the columns that a head reads, by the head's names for them.

    Args:
        store: A store of features.
        backbone: Name of the backbone in the store.
        reads: Names of `Head.reads`.
        network: The backbone itself; needed where a name `is_relative`.

    Raises:
        SpecMismatch: The store lacks one; the message has the command that adds it. Or they are
            of different frames of a clip.
        ValueError: The backbone that `sound` or NETWORK/FEATURE means is ambiguous.
    """
    features = {}
    for name in reads:
        owner, own_name = _owner_of(store, backbone, name, network)
        if own_name == VECTOR:
            feature = _last_vector(store, owner)
        else:
            feature = _find_column(store, owner, own_name)
        if feature is None:
            raise SpecMismatch(
                f"{store.location} has no {own_name} of {owner}, which the head reads"
                f"{f' as {name}' if own_name != name else ''}. This adds it:\n  "
                + build_command(store, owner, own_name)
            )
        if isinstance(feature, VideoFeature):
            raise SpecMismatch(
                f"{own_name} of {owner} has every frame of whole videos: give the frames of a clip "
                "that the head reads, such as --frames 8 --sampling tsn, or sampled={'frames': 8}"
            )
        features[name] = feature
    lengths = {name: feature.spec["frames"]["frames"] for name, feature in features.items()}
    if len(set(lengths.values())) > 1:
        raise SpecMismatch(
            f"the head's features have different numbers of frames ({lengths}): build them with "
            "one --frames"
        )
    moments = {
        (
            *(feature.spec["frames"].get(key) for key in ("sampling", "fps", "stride", "view")),
            *feature.spec.get("windows", {}).values(),
        )
        for feature in features.values()
    }
    if len(moments) > 1:
        raise SpecMismatch(
            f"the head's features are of different moments of a clip ({moments}): build them with "
            "one --sampling"
        )
    return features


def _audio_backbones(store: FeatureStore) -> list[str]:
    """Names of the backbones of the store that take audio."""
    inputs = {f.backbone: f.spec["frames"].get("picture", {}) for f in store.features()}
    return sorted(name for name, picture in inputs.items() if "rate" in picture)


def _owner_of(
    store: FeatureStore, backbone: str, name: str, network: Backbone | None
) -> tuple[str, str]:
    """Return the backbone, and the feature of it, that a name of `Head.reads` means."""
    if name == SOUND:
        audio = _audio_backbones(store)
        if not audio:
            raise SpecMismatch(
                f"{store.location} has no audio backbone, whose last vector the head reads as "
                "sound. This adds one (random-0 in the place of WEIGHTS to try):\n  "
                + build_command(store, "mel_resnet18:WEIGHTS", VECTOR)
            )
        if len(audio) > 1:
            raise ValueError(
                f"{store.location} has {len(audio)} audio backbones: name one instead of sound, "
                f"such as {audio[0]}/pool or {audio[1]}/pool"
            )
        return audio[0], VECTOR
    owner, _, own_name = name.rpartition("/")
    if name.partition(":")[0] == SOUND or (owner and is_relative(own_name)):
        raise ValueError(
            f"{name}: name a stage of another backbone in full, such as {owner or 'NETWORK'}"
            "/layer4.1:pool; `varve info` lists them"
        )
    if owner:
        return choose_backbone(store, owner), own_name
    return backbone, name if network is None else resolve_name(name, network)


def _published(store: FeatureStore, backbone: str) -> list[Feature]:
    """Features of the backbone without grafts: neither teacher features nor those of an update."""
    return [f for f in store.features() if f.backbone == backbone and not f.spec.get("grafts")]


def _find_column(store: FeatureStore, backbone: str, name: str) -> Feature | None:
    known = [feature.name for feature in _published(store, backbone)]
    if not {name, name.removesuffix(":tokens"), f"{name}:tokens"} & set(known):
        return None
    try:
        return store.feature(backbone, name, view=0)
    except SpecMismatch:
        # Ambiguous, such as by several numbers of frames: the last build's is meant.
        request = recorded_request(store)
        matching = [
            feature
            for feature in _published(store, backbone)
            if feature.name == name
            and all(feature.spec["frames"].get(k, 0) == getattr(request, k) for k in FRAME_OPTIONS)
            and feature.spec["frames"]["view"] == 0
            and feature.dtype == request.dtype
            and feature.spec["stages"][0]["precision"] == request.precision
        ]
        if len(matching) == 1:
            return matching[0]
        raise


def _last_vector(store: FeatureStore, backbone: str) -> Feature | None:
    """Return the deepest feature of one vector for each frame; unreduced ones are preferred.

    Scores of the network's own classes are taken only where there is no other.
    """
    vectors = [feature for feature in _published(store, backbone) if len(feature.shape) == 3]
    if not vectors:
        return None
    best = max(
        vectors, key=lambda f: (f.name != CLASSIFIER, len(f.spec["stages"]), ":" not in f.name)
    )
    return _find_column(store, backbone, best.name)


def build_command(store: FeatureStore, backbone: str, keep: str) -> str:
    """Return the command that adds a feature, with the settings of the last build of the store."""
    request, default = recorded_request(store), BuildSpec("any")
    words = ["varve", "build", str(store.attributes.get("dataset", "DATASET")), "--store",
             str(store.location), "--backbone", weights_of(store, backbone)]  # fmt: skip
    words += [] if keep == VECTOR else ["--keep", keep]
    for name in (option.name for option in fields(BuildSpec)):
        value = getattr(request, name)
        if name not in ("backbones", "keep", "text") and value != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def class_numbers(store: FeatureStore) -> np.ndarray:
    """Return the class number of every row of the table of clips, int64; -1 for no class."""
    number_of = {label: number for number, label in enumerate(store.attributes["classes"])}
    numbers: np.ndarray = store.clips["label"].map(number_of).fillna(-1).to_numpy(np.int64)
    return numbers


def make_clips(
    features: Mapping[str, Feature],
    rows: np.ndarray,
    labels: np.ndarray,
    device: str = "cpu",
    budget_bytes: int = BUDGET_BYTES,
    views: Sequence[Mapping[str, Feature]] = (),
) -> Clips:
    """Return some rows of the table of clips as a head sees them.

    Args:
        features: Columns, by the head's names for them.
        rows: Row ids.
        labels: Class number of every row of the table.
        device: Where batches are wanted.
        budget_bytes: Largest size of a feature's cells that stay in memory.
        views: Columns of further views of the clips, by the same names.

    Raises:
        ValueError: There is no row.
    """
    cells, *others = (
        {
            name: FeatureTensors(feature, rows, device, budget_bytes)
            for name, feature in columns.items()
        }
        for columns in (features, *views)
    )
    return Clips(cells, torch.from_numpy(labels[rows]), torch.from_numpy(rows), others)


def find_views(
    store: FeatureStore, features: Mapping[str, Feature], numbers: Sequence[int]
) -> list[dict[str, Feature]]:
    """Find the columns of other views of the clips, by the head's names for them.

    Args:
        store: The store.
        features: The columns of the plain view that a head reads.
        numbers: Views, such as 1, 2, 3, or the corners -1 to -4; see `FrameSet.view`.

    Raises:
        SpecMismatch: The store lacks one; the message has the command that adds it. Or several
            columns could be meant.
    """
    return [
        {name: _view_of(store, feature, number) for name, feature in features.items()}
        for number in numbers
    ]


def _view_of(store: FeatureStore, feature: Feature, number: int) -> Feature:
    kept = {n: x for n, x in feature.spec["frames"].items() if n not in VARIED}
    matching = [
        other
        for other in _published(store, feature.backbone)
        if other.name == feature.name
        and other.dtype == feature.dtype
        and other.spec["stages"] == feature.spec["stages"]
        and other.spec["frames"]["view"] == number
        and {n: x for n, x in other.spec["frames"].items() if n not in VARIED} == kept
    ]
    if len(matching) > 1:
        request = recorded_request(store)
        matching = [
            other
            for other in matching
            if all(other.spec["frames"][n] == getattr(request, n) for n in ("flip", "random_crop"))
        ]
    if len(matching) == 1:
        return matching[0]
    what = f"view {number}" if number > 0 else "the corners"
    more = f"--views {number + 1} --flip --random-crop" if number > 0 else "--five-crop"
    raise SpecMismatch(
        f"{store.location} has {'several of them' if matching else 'none'}: {what} of "
        f"{feature.name} of {feature.backbone}, which the head reads in training or testing. This "
        f"adds it:\n  {build_command(store, feature.backbone, feature.name)} {more}"
    )


def with_status(table: pd.DataFrame, features: Mapping[str, Feature]) -> pd.DataFrame:
    """Return the table of clips with each one's status in the columns that a head reads.

    A value that only another column cannot represent takes no clip from a run.
    """
    lost_N = np.any([feature.overflowed for feature in features.values()], axis=0)
    valid_N = np.all([feature.valid for feature in features.values()], axis=0)
    overflow_N = (table["reason"] == OVERFLOW).to_numpy()
    status = np.select(
        [lost_N, overflow_N & valid_N, overflow_N],
        ["quarantined", "ready", "pending"],
        table["status"].to_numpy(object),
    )
    return table.assign(status=status)


def clips_digest(store: FeatureStore, division: Division) -> str:
    """Digest of the training and test clips of a run: their bytes, in order."""
    keys = row_keys(store.clips)
    parts = {"train": division.train, "test": division.test}
    return digest({split: [keys[rows].tobytes().hex() for rows in tasks]
                   for split, tasks in parts.items()})  # fmt: skip


def weights_of(store: FeatureStore, backbone: str) -> str:
    """Return what `--backbone` was given for a backbone of the store: NAME:TAG or NAME:FILE."""
    requested: list[str] = store.attributes.get("backbones", {}).get(backbone, [backbone])
    return requested[-1]


def load_network(
    store: FeatureStore, backbone: str, precision: torch.dtype | None = None
) -> Backbone:
    """Load the network that computed a store's features, by default in the same precision."""
    first = _published(store, backbone)[0]
    stored: torch.dtype = getattr(torch, first.spec["stages"][0]["precision"])
    return backbones.load(weights_of(store, backbone), precision or stored)


def check_network(network: Backbone, features: Mapping[str, Feature]) -> None:
    """Check that features were computed with this network.

    Raises:
        SpecMismatch: A stage before one of them has other code or parameters.
    """
    for feature in features.values():
        for recorded in feature.spec["stages"]:
            if network.describe(network.stage(recorded["stage"])) != recorded:
                raise SpecMismatch(
                    f"{feature.name} of {feature.backbone} was computed with another "
                    f"{recorded['stage']} than the network loaded now has: load the weights that "
                    "the store was built with, or build it with these"
                )
