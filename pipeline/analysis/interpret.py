"""Interpretation of trained heads on one clip, as numbers: saliency, correlations, gates.

For heads that train the last blocks of a network (`varve.heads.parts.fine_tuned_head`): where a
class is seen, how feature maps agree with those of the teacher, and how gates mix frames.
`varve.pipeline.analysis.interpret_plots` draws the numbers.

Shapes: T frames, S pixels, N = T of one clip, L blocks, C channels, H, W rows and columns of the
new map, U, V of the teacher's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
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
from varve.pipeline.decoders import Decoded, Failure, Request, Stretch, decode
from varve.pipeline.extraction.extract import extract, file_work
from varve.pipeline.extraction.passes import frames_only
from varve.stores import Feature, FeatureStore, SampledFeature


@dataclass(frozen=True)
class Clip:
    """A clip of a store, with the features that a head reads and the frames that a person sees.

    Attributes:
        row: Row in the table of clips.
        label: Class name.
        batch: Features that the head reads, of this clip only.
        pictures: uint8 [T, S, S, 3], the frames that went into the network.
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
        store: A store of features.
        features: Feature columns of one set of frames, by the head's names; see
            `routing.restored`.
        row: Row in the table of clips, or path in it.
        dataset: Folder of the videos; by default that of the last build.

    Raises:
        LookupError: The store has no such clip, or several of one path.
        ValueError: It is not ready, its bytes have changed, or it cannot be decoded any more.
        FileNotFoundError: The video is missing.
    """
    table = store.clips
    rows = table.index[table["path"] == row] if isinstance(row, str) else [row]
    if len(rows) != 1 or rows[0] not in table.index:
        raise LookupError(
            f"{store.location} has {len(rows) if isinstance(row, str) else 'no'} clips {row!r}: "
            f"give a path of `store.clips`, or a row from 0 to {len(table) - 1}"
        )
    (number,) = map(int, rows)
    known = table.loc[number]
    if not all(feature.ready[number] for feature in features.values()):
        raise ValueError(f"{known['path']} is {known['status']} ({known['reason'] or 'not built'})")
    root = Path(dataset or store.attributes["dataset"])
    path = (root.parent if root.is_file() else root) / known["path"]
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there any more: say where the videos lie, dataset=")
    if content_digest(path) != known["digest"]:
        raise ValueError(f"{path} has other bytes than the store was built from: build it again")
    cells = {name: feature.read([number]) for name, feature in features.items()}
    batch = {name: torch.from_numpy(x.astype(np.float32)) for name, x in cells.items()}
    return Clip(number, known["label"], batch, _pictures(path, known, features))


def _pictures(path: Path, clip: pd.Series, features: Mapping[str, Feature]) -> np.ndarray:
    """Decode the frames of a clip that its features are of.

    In this process: a build has decoded these bytes before, in one that it could kill.

    Raises:
        ValueError: The file cannot be decoded any more.
    """
    sets = {FrameSet.of(feature.spec["frames"]): feature for feature in features.values()}
    frame_set = next(frames for frames in sets if isinstance(frames.picture, Picture))
    feature = sets[frame_set]
    if isinstance(feature, SampledFeature):
        # The rule chose among the frames that the store keeps, which may not be all.
        if "windows" in feature.spec:
            raise ValueError(
                f"{feature.name} has windows of whole videos, whose frames have no feature of "
                "their own: explain a run on a store of T frames (--sampling tsn)"
            )
        pages = feature.source.pages
        first_page, count = pages.files.loc[clip["digest"], ["first_page", "frames"]]
        kept = pages.indices[first_page:].reshape(-1)[:count]
        at = np.searchsorted(kept, feature.indices(int(clip.name)))
        stretches = tuple(Stretch(part=(position, 1)) for position in at.tolist())
        frame_set = FrameSet.of(feature.spec["whole"])
        results = decode(Request(str(path), stretches, (frame_set,)))
        failures = [result for result in results if isinstance(result, Failure)]
        pictures = [result.frames[0] for result in results if isinstance(result, Decoded)]
    else:
        decode_only = (frames_only(frame_set),)
        interval = clip["start_seconds"], clip["end_seconds"]
        file = file_work(path, clip["digest"], decode_only, 0, *interval)
        (result,) = extract([file], decode_only, children=0)
        failures = [result.failure] if result.failure else []
        pictures = [] if failures else [result.frames[frame_set]]
    if failures:
        cause = f"{failures[0].reason}: {failures[0].detail}"
        raise ValueError(f"{path} cannot be decoded: {cause}")
    return np.concatenate(pictures)


def saliency(head: Head, batch: Batch, label: int | None = None) -> dict[str, np.ndarray]:
    """Compute Grad-CAM (Selvaraju et al., 2017) after each stage that trains.

        relu(sum_c w_tc a_tc),     w_tc: mean over positions of d score / d a_tc, frame by frame

    The positions of a transformer are its patches. After its last attention only the class token
    is read, so that the patches there have no gradient and their saliency is 0: train one more
    block.

    Args:
        head: A head that trains blocks of the network.
        batch: Features of one clip.
        label: One of `head.classes`; None for the predicted class.

    Returns:
        float32 [T, H, W] by stage, in the order of the network; each of its own scale.

    Raises:
        TypeError: The head trains no part of the network.
        ValueError: It has not learned that class, or anything; or there are several clips.
    """
    with torch.enable_grad():
        scores, passed = _traced(head, batch)
        if label is not None and label not in head.classes:
            raise ValueError(f"class {label} is none of those learned, {head.classes}")
        column = int(scores.argmax()) if label is None else head.classes.index(label)
        outputs = [stage.outputs for stage in passed.values()]
        gradients = torch.autograd.grad(scores[0, column], outputs)
    maps = {}
    for name, output, gradient in zip(passed, outputs, gradients, strict=True):
        weights = _map(gradient).mean(dim=(2, 3), keepdim=True)
        maps[name] = _numpy((weights * _map(output)).sum(dim=1).relu())
    return maps


def hypercorrelations(
    head: Head, teacher: Head, batch: Batch, teacher_batch: Batch | None = None
) -> dict[str, np.ndarray]:
    """Correlate all positions of feature maps with all of a teacher's: Eq. 1 of HCE, by level.

    A level is the trained stages of one map size; HAS of `varve.heads.hce` starts from these
    numbers. A clip of 8 frames has 39 MB of them at two stages of 28 x 28, and 630 MB at 56 x 56.

    Args:
        head: The head whose network is examined.
        teacher: The head of the same run after an earlier task (see `routing.restored`), or `head`.
        batch: Features of one clip.
        teacher_batch: Features of the clip that the teacher sees; None for the same.

    Returns:
        float32 [T, L, H, W, U, V] in [0, 1] by level ("14 x 14"), coarse to fine.

    Raises:
        TypeError: A head trains no part of the network.
        ValueError: The two train different stages; or there are several clips.
    """
    with torch.no_grad():
        _, student_passed = _traced(head, batch)
        _, teacher_passed = _traced(teacher, batch if teacher_batch is None else teacher_batch)
    student_maps, teacher_maps = (
        {name: _map(stage.outputs).float() for name, stage in passed.items()}
        for passed in (student_passed, teacher_passed)
    )
    shapes = [{n: x.shape for n, x in maps.items()} for maps in (student_maps, teacher_maps)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"maps of {', '.join(shapes[0])} and of {', '.join(shapes[1])}: compare heads that "
            "train the same blocks of one network, on as many frames"
        )
    levels = {}
    for H, W in sorted({x.shape[2:] for x in student_maps.values()}):
        stages = [name for name, x in student_maps.items() if x.shape[2:] == (H, W)]
        new, old = ([maps[name] for name in stages] for maps in (student_maps, teacher_maps))
        levels[f"{H} x {W}"] = _numpy(correlation(new, old))
    return levels


def agreement(levels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Average hypercorrelations over blocks and positions of the teacher: [T, H, W] by level."""
    return {level: c.mean(axis=(1, 4, 5)) for level, c in levels.items()}


def gates(head: Head, batch: Batch) -> dict[str, np.ndarray]:
    """Compute the gates G- of HF-Net: the share of frame t + 1 that a position of frame t takes.

        out_t = G-_t a_{t+1} + (1 - G-_{t-1}) a_t

    Above 0 a position is averaged with that of the next frame, below 0 the difference is taken. The
    gate of the last frame, which has no next one, has no effect.

    Args:
        head: A head of hf_net with gates.
        batch: Features of one clip.

    Returns:
        float32 [T, H, W] in (-1, 1) by gated stage.

    Raises:
        TypeError: The head trains no part of the network.
        ValueError: It has no gates, or has learned nothing; or there are several clips.
    """
    with torch.no_grad():
        _, passed = _traced(head, batch)
    maps = {name: _numpy(stage.module.gates(stage.inputs)) for name, stage in passed.items()
            if isinstance(stage.module, HFGate)}  # fmt: skip
    if not maps:
        raise ValueError(f"{type(head).__name__} has no gates: give hf_net with gates above 0")
    return maps


def _traced(head: Head, batch: Batch) -> tuple[Tensor, dict[str, Passed]]:
    if not isinstance(head, FineTunedHead):
        raise TypeError(
            f"{type(head).__name__} trains no part of the network, so it has no feature maps of "
            "its own: give hce, hf_net or class_regularization"
        )
    scores, passed = head.traced(batch)
    if len(scores) != 1:
        raise ValueError(f"a batch of {len(scores)} clips: give one at a time")
    return scores, passed


def _map(x: Tensor) -> Tensor:
    """Return maps [N, C, H, W] of maps, or of tokens [N, tokens, C] without the class token."""
    if x.ndim == 4:
        return x
    _, prefix = grid(x.shape[1:])
    side = math.isqrt(x.shape[1] - prefix)
    return x[:, prefix:].mT.reshape(len(x), -1, side, side)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
