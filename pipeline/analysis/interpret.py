"""Looking: what learned heads see in a clip, as numbers; `varve.pipeline.analysis.interpret_plots`
draws them.

Of heads that train the last blocks of a network (`varve.heads.parts.fine_tuned_head`): where a
class is seen, where
the maps have moved away from those of the network before, where gates let frames flow together.

Shapes: T frames, S pixels, N = T of one clip, L blocks, C channels, H, W places of the new map, U,
V of the old.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varve.heads import Head
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.parts.clips import Batch
from varve.heads.parts.fine_tuned_head import FineTunedHead, grid
from varve.heads.parts.hypercorrelation import correlation
from varve.heads.parts.trainable_suffix import Passed
from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.datasets.media import content_digest
from varve.pipeline.extraction.extract import extract, file_work
from varve.pipeline.extraction.passes import frames_only
from varve.stores import Feature, FeatureStore


@dataclass(frozen=True)
class Clip:
    """A clip of a store, as a head reads it and as a person sees it.

    Attributes:
        row: In the table of clips.
        label: Its class.
        batch: What the head reads, of this clip alone.
        pictures: uint8 [T, S, S, 3], the very frames that went into the network.
    """

    row: int
    label: str
    batch: Batch = field(repr=False)
    pictures: np.ndarray = field(repr=False)


def clip(
    store: FeatureStore,
    features: Mapping[str, Feature],
    row: int | str,
    dataset: str | Path | None = None,
) -> Clip:
    """Read a clip's features and decode its frames again.

    Args:
        features: Of one set of frames, by the head's names; see `routing.restored`.
        row: Its number in the table of clips, or its path there.
        dataset: Where the videos lie; by default where the last build found them.

    Raises:
        LookupError: The store has no such clip, or none of one interval.
        ValueError: It is not ready, its bytes have changed, or it cannot be decoded any more.
        FileNotFoundError: The video is not there.
    """
    table = store.clips
    found = table.index[table["path"] == row] if isinstance(row, str) else [row]
    if len(found) != 1 or found[0] not in table.index:
        raise LookupError(
            f"{store.location} has {len(found) if isinstance(row, str) else 'no'} clips {row!r}: "
            f"give a path of `store.clips`, or a row from 0 to {len(table) - 1}"
        )
    (number,) = map(int, found)
    known = table.loc[number]
    if known["status"] != "ready":
        raise ValueError(f"{known['path']} is {known['status']} ({known['reason'] or 'not built'})")
    root = Path(dataset or store.attributes["dataset"])
    path = (root.parent if root.is_file() else root) / known["path"]
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there any more: say where the videos lie, dataset=")
    if content_digest(path) != known["digest"]:
        raise ValueError(f"{path} has other bytes than the store was built from: build it again")
    sets = [FrameSet.of(feature.spec["frames"]) for feature in features.values()]
    frame_set = next(one for one in sets if isinstance(one.picture, Picture))
    decode_only = (frames_only(frame_set),)
    interval = known["start_seconds"], known["end_seconds"]
    file = file_work(path, known["digest"], decode_only, number, *interval)
    # In this process: a build has decoded these bytes before, in one that it could kill.
    (result,) = extract([file], decode_only, children=0)
    if result.failure:
        cause = f"{result.failure.reason}: {result.failure.detail}"
        raise ValueError(f"{path} cannot be decoded: {cause}")
    cells = {name: one.read([number]) for name, one in features.items()}
    batch = {name: torch.from_numpy(x.astype(np.float32)) for name, x in cells.items()}
    return Clip(number, known["label"], batch, result.frames[frame_set])


def saliency(head: Head, batch: Batch, label: int | None = None) -> dict[str, np.ndarray]:
    """Grad-CAM (Selvaraju et al., 2017): where, after each stage that trains, a class is seen.

        relu(sum_c w_tc a_tc),     w_tc: mean over places of d score / d a_tc, frame by frame

    Of a transformer the patches are the places. Behind its last attention only the class token is
    read on, so that the patches there have no gradient and come out as 0: train a block more.

    Args:
        head: One that trains blocks of the network.
        batch: Of one clip.
        label: One of `head.classes`; None for the class predicted.

    Returns:
        Float32 [T, H, W] by stage, in the network's order; of no scale but their own.

    Raises:
        TypeError: The head trains no part of the network.
        ValueError: It has not learned that class, or anything; several clips.
    """
    with torch.enable_grad():
        scores, passed = _traced(head, batch)
        if label is not None and label not in head.classes:
            raise ValueError(f"class {label} is none of those learned, {head.classes}")
        column = int(scores.argmax()) if label is None else head.classes.index(label)
        outputs = [one.given for one in passed.values()]
        slopes = torch.autograd.grad(scores[0, column], outputs)
    found = {}
    for name, given, slope in zip(passed, outputs, slopes, strict=True):
        weights = _map(slope).mean(dim=(2, 3), keepdim=True)
        found[name] = _numpy((weights * _map(given)).sum(dim=1).relu())
    return found


def hypercorrelations(
    head: Head, old: Head, batch: Batch, old_batch: Batch | None = None
) -> dict[str, np.ndarray]:
    """How a network's maps agree with another's, all places with all: Eq. 1 of HCE, by level.

    A level is the trained stages of one size; HAS of `varve.heads.hce` starts from these numbers.
    They are many: of a clip of 8 frames and two stages of 28 x 28, 39 MB; of 56 x 56, 630 MB.

    Args:
        head: Its network now.
        old: The same run's after an earlier task; see `routing.restored`. Or the same head.
        batch: Of one clip.
        old_batch: What the old network sees: of another clip, or None for the same.

    Returns:
        Float32 [T, L, H, W, U, V] in [0, 1] by level ("14 x 14"), coarse to fine.

    Raises:
        TypeError: A head trains no part of the network.
        ValueError: The two have other stages; several clips.
    """
    with torch.no_grad():
        _, new_passed = _traced(head, batch)
        _, old_passed = _traced(old, batch if old_batch is None else old_batch)
    new, before = ({name: _map(one.given).float() for name, one in passed.items()}
                   for passed in (new_passed, old_passed))  # fmt: skip
    if {n: x.shape for n, x in new.items()} != {n: x.shape for n, x in before.items()}:
        raise ValueError(
            f"maps of {', '.join(new)} and of {', '.join(before)}: compare heads that train the "
            "same blocks of one network, on as many frames"
        )
    found = {}
    for H, W in sorted({x.shape[2:] for x in new.values()}):
        here = [name for name, x in new.items() if x.shape[2:] == (H, W)]
        own, held = ([maps[name] for name in here] for maps in (new, before))
        found[f"{H} x {W}"] = _numpy(correlation(own, held))
    return found


def agreement(levels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean hypercorrelation of each new place, over blocks and old places: [T, H, W] by level."""
    return {level: c.mean(axis=(1, 4, 5)) for level, c in levels.items()}


def gates(head: Head, batch: Batch) -> dict[str, np.ndarray]:
    """G- of HF-Net's gates: how much of frame t + 1 each place of frame t takes.

        out_t = G-_t a_{t+1} + (1 - G-_{t-1}) a_t

    Above 0 a place is averaged with the next frame's, below 0 the difference is taken. The last
    frame has no next: what its gate says moves nothing.

    Args:
        batch: Of one clip.

    Returns:
        Float32 [T, H, W] in (-1, 1) by gated stage.

    Raises:
        TypeError: The head trains no part of the network.
        ValueError: It has no gates, or has learned nothing; several clips.
    """
    with torch.no_grad():
        _, passed = _traced(head, batch)
    found = {name: _numpy(one.module.gates(one.taken)) for name, one in passed.items()
             if isinstance(one.module, HFGate)}  # fmt: skip
    if not found:
        raise ValueError(f"{type(head).__name__} has no gates: give hf_net with gates above 0")
    return found


def _traced(head: Head, batch: Batch) -> tuple[Tensor, dict[str, Passed]]:
    if not isinstance(head, FineTunedHead):
        raise TypeError(
            f"{type(head).__name__} trains no part of the network, so there are no maps to look "
            "into: give hce, hf_net or class_regularization"
        )
    scores, passed = head.traced(batch)
    if len(scores) != 1:
        raise ValueError(f"a batch of {len(scores)} clips: look into one at a time")
    return scores, passed


def _map(x: Tensor) -> Tensor:
    """Of frames' maps or tokens, [N, C, H, W]."""
    if x.ndim == 4:
        return x
    _, prefix = grid(x.shape[1:])
    side = math.isqrt(x.shape[1] - prefix)
    return x[:, prefix:].mT.reshape(len(x), -1, side, side)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
