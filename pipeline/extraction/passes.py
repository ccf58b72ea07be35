"""Passes: which runs of a backbone over a frame set give the requested features.

A pass is one backbone run over one frame set; it fills one or more columns. Its `Execution` fixes
how the forward runs, since on a CPU the last bits of a result depend on the shape of the batch,
the number of threads and the memory format. A column keeps the execution of its first cells.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from varve.pipeline.backbones import Backbone, Stage, canonical_reduction, reduction_identity
from varve.pipeline.config import WHOLE, BuildSpec, FrameSet, Picture
from varve.stores import FeatureStore
from varve.stores.columns import ColumnSpec, Damaged
from varve.stores.digests import digest
from varve.stores.locations import Location

# Version of the pixels and samples: changed when the decoders give other values.
PIXELS = "rgb24, libswscale bicubic, 1"
SAMPLES = "mono float32, libswresample, 3"
CPU_BATCH_FRAMES = 8
# Frames of a whole video that run as one clip does.
GROUP_FRAMES = 8
GPU_BATCH_FRAMES = 256
MAX_THREADS = 4
# Factor on the clips per batch where only class tokens run (ViT-B-16's last MLP: 0.47 ms per clip
# against 0.87).
CLASS_TOKENS = 32


@dataclass(frozen=True)
class Execution:
    """Execution settings of a pass. Recorded with its columns; not part of their key.

    Attributes:
        device: cpu or cuda.
        batch_clips: Clips per batch; a shorter batch is padded to it.
        threads: Threads of the forward on a CPU; 0 on a GPU.
    """

    device: str
    batch_clips: int
    threads: int


@dataclass(frozen=True)
class Output:
    """One column of a pass: a stage's output, reduced, in the number format on disk."""

    spec: ColumnSpec
    stage: str
    reduction: str


@dataclass(frozen=True)
class Source:
    """A column of the store that a computation starts from.

    Attributes:
        stage, reduction: The stage whose output it has, and the reduction of that output.
        dtype: Number format on disk.
        backbone, feature, fingerprint: Names of the column, as `FeatureStore.feature` takes them.
        cell_bytes: Bytes of one clip.
        tokens: Tokens of the stage's output that it has: `all`, `class` or `patches`.
        grid: Of a column of whole videos, from whose pages frames are taken; "" for other columns.
    """

    stage: str
    reduction: str
    dtype: str
    backbone: str
    feature: str
    fingerprint: str
    cell_bytes: int
    tokens: str = "all"
    grid: str = ""


@dataclass(frozen=True)
class Pass:
    """A run of one backbone over one frame set, from the frames or from one stored feature.

    Attributes:
        backbone: The requested name, which `backbones.load` takes.
        precision: Precision of the network's parameters and activations.
        outputs: The columns it fills. A pass without outputs only has its frames decoded.
        stage_keys: Fingerprint by stage, so that a worker can prove that it runs the same network.
        source: The feature it starts from; None for the frames.
    """

    backbone: str
    precision: str
    frame_set: FrameSet
    execution: Execution
    outputs: tuple[Output, ...]
    stage_keys: Mapping[str, str]
    source: Source | None = None

    @property
    def batch_clips(self) -> int:
        """Clips per batch. Class tokens alone are little work, so such batches are larger."""
        alone = self.source is not None and self.source.tokens == "class"
        return self.execution.batch_clips * (CLASS_TOKENS if alone else 1)

    def run_stages(self, outputs: Iterable[int]) -> list[str]:
        """Return the stages that run for some of the outputs."""
        names = list(self.stage_keys)
        first = names.index(self.source.stage) + 1 if self.source else 0
        return names[first : max(names.index(self.outputs[c].stage) for c in outputs) + 1]


def frames_only(frame_set: FrameSet) -> Pass:
    """Return a pass that decodes a frame set and runs no network."""
    return Pass("", "float32", frame_set, Execution("cpu", 1, 0), (), {})


def pixels(frame_set: FrameSet) -> str:
    """Return the version of a frame set's pixels, or of its audio samples."""
    return PIXELS if isinstance(frame_set.picture, Picture) else SAMPLES


def frames_key(frame_set: FrameSet) -> str:
    """Return the fingerprint of a clip's frames: its pictures or audio windows."""
    return digest({"frames": frame_set.identity(), "pixels": pixels(frame_set)})


def column_key(stage_key: str, reduction: str, dtype: str) -> str:
    """Return the fingerprint of a column: a stage's output, reduced, in a number format on disk."""
    return digest({"input": stage_key, "reduction": reduction_identity(reduction), "dtype": dtype})


def passes(
    spec: BuildSpec, backbones: Mapping[str, Backbone], store: FeatureStore | None, device: str
) -> tuple[Pass, ...]:
    """Return all passes that a request needs.

    Args:
        spec: The request.
        backbones: The networks, by the requested name.
        store: The store whose columns keep their execution; None for a new one.
        device: cpu or cuda.

    Raises:
        ValueError: No backbone has a feature to keep, or nothing is kept of a backbone.
    """
    kept = keep_of_each(spec.keep, backbones)
    result = []
    for name, backbone in backbones.items():
        _check_frames(backbone, spec)
        for frame_set in spec.frame_sets(backbone.picture):
            keys = backbone.keys(frames_key(frame_set))
            by_execution: dict[Execution, list[Output]] = {}
            for stage, reduction in kept[name]:
                output, execution = _output(
                    spec, backbone, frame_set, stage, reduction, keys[stage.name], store, device
                )
                by_execution.setdefault(execution, []).append(output)
            result += [
                Pass(name, spec.precision, frame_set, execution, tuple(outputs), keys)
                for execution, outputs in by_execution.items()
            ]
    return tuple(result)


def _check_frames(backbone: Backbone, spec: BuildSpec) -> None:
    """Check that each temporal module is given as many frames, or time steps, as it mixes."""
    steps = spec.frames
    for stage in backbone.stages:
        if not stage.frames:
            continue
        title = f"{backbone.name}: {stage.name} is a temporal module over {stage.frames} frames"
        if spec.sampling == WHOLE and not spec.window_step:
            frames = backbone.clip_frames
            raise ValueError(
                f"{title}, and whole videos have any number. Build with `--sampling tsn --frames "
                f"{frames}`, or windows of whole videos with `--sampling all --frames {frames} "
                f"--window-step {frames}`"
            )
        if stage.frames != steps:
            raise ValueError(
                f"{title}, and the clips have {steps}"
                + (f". Build with `--frames {stage.frames}`" if steps == spec.frames else " there")
            )
        steps = backbone.time_steps(stage.name, spec.frames)
    if spec.window_step and not any(stage.frames for stage in backbone.stages):
        raise ValueError(
            f"{backbone.name} computes each frame alone, so that windows would compute a frame "
            "several times. Build it without --window-step, in a build of its own: "
            "`feature.windows(row, seconds)` then gives any window of its frames"
        )


def keep_of_each(
    keep: Sequence[str], backbones: Mapping[str, Backbone]
) -> dict[str, list[tuple[Stage, str]]]:
    """Return the stages and canonical reductions to keep of each backbone, in chain order."""
    # By backbone: the index of the stage, and the reduction.
    chosen: dict[str, set[tuple[int, str]]] = {name: set() for name in backbones}
    for feature in keep:
        stage_name, _, reduction = feature.partition(":")
        matching = {n: b for n, b in backbones.items() if stage_name in b.stage_names}
        if not matching:
            lists = "\n".join(f"  {n}: {', '.join(b.stage_names)}" for n, b in backbones.items())
            raise ValueError(
                f"--keep {feature}: no backbone has a stage {stage_name!r}; stages are\n{lists}"
            )
        for name, backbone in matching.items():
            index = backbone.stage_names.index(stage_name)
            chosen[name].add((index, canonical_reduction(backbone.stages[index], reduction)))
    for name, backbone in backbones.items():
        if keep and not chosen[name]:
            raise ValueError(
                f"nothing to keep of {name}: none of {', '.join(keep)} is a stage of it. Its "
                f"stages are {', '.join(backbone.stage_names)}"
            )
        if not keep:
            chosen[name].add((backbone.stage_names.index(backbone.default_stage.name), ""))
    return {
        name: [(backbones[name].stages[index], reduction) for index, reduction in sorted(picks)]
        for name, picks in chosen.items()
    }


def _output(
    spec: BuildSpec,
    backbone: Backbone,
    frame_set: FrameSet,
    stage: Stage,
    reduction: str,
    stage_key: str,
    store: FeatureStore | None,
    device: str,
) -> tuple[Output, Execution]:
    fingerprint = column_key(stage_key, reduction, spec.dtype)
    name = f"{stage.name}:{reduction}" if reduction else stage.name
    upto = backbone.stage_names.index(stage.name) + 1
    attributes: dict[str, Any] = {
        "backbone": {"name": backbone.name, "network": backbone.network},
        "frames": frame_set.identity(),
        "pixels": pixels(frame_set),
        "stages": [backbone.describe(stage) for stage in backbone.stages[:upto]],
        "reduction": reduction,
    }
    if frame_set.in_pages:
        attributes["pages"] = frame_set.grid
    elif frame_set.whole:
        windows = {"frames": frame_set.frames, "step": frame_set.window_step}
        attributes["windows"] = {"grid": frame_set.grid, **windows}
    if (identity := reduction_identity(reduction)) != reduction:
        attributes["reduction_code"] = identity
    if grafts := [name for name in backbone.changed if name in backbone.stage_names[:upto]]:
        attributes["grafts"] = grafts
        attributes["modules"] = [type(backbone.stage(name).module).__name__ for name in grafts]
    draft = ColumnSpec(backbone.name, name, fingerprint, (1,), spec.dtype, attributes)
    metadata = draft.group(store.path) / draft.short / "zarr.json" if store else None
    execution = recorded = new_execution(frame_set, device)
    if metadata is not None and metadata.exists():
        with column_metadata(metadata) as array:
            cell, stored = tuple(array["shape"][1:]), array["attributes"]
            recorded = Execution(**stored["execution"])
            if resumed := list(stored.get("resumed", [])):
                attributes["resumed"] = resumed
        # A column of another device keeps its execution where that device is present.
        execution = recorded if recorded.device == device else execution
    else:
        steps = backbone.time_steps(stage.name, frame_set.frames)
        cell = (steps, *backbone.feature_shape(stage, reduction))
    attributes["execution"] = asdict(recorded)
    column = replace(draft, cell=cell, attributes=attributes)
    return Output(column, stage.name, reduction), execution


def new_execution(frame_set: FrameSet, device: str) -> Execution:
    """Return how a new column's forward runs.

    On a CPU, batches of 8 frames are as fast as batches of 32 (ViT-B-16 bfloat16: 19.1 against
    16.4 frames/s on 2 cores), so a batch is one clip where a clip has 8 frames.
    """
    frames = GPU_BATCH_FRAMES if device == "cuda" else CPU_BATCH_FRAMES
    threads = 0 if device == "cuda" else min(MAX_THREADS, os.cpu_count() or 1)
    clip_frames = GROUP_FRAMES if frame_set.in_pages else frame_set.frames
    return Execution(device, max(1, frames // clip_frames), threads)


@contextmanager
def column_metadata(metadata: Location) -> Iterator[dict[str, Any]]:
    """Give the metadata of a column's array to a block that reads its entries.

    Raises:
        Damaged: It is no JSON, or the block misses an entry.
    """
    try:
        yield json.loads(metadata.read_bytes())
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{metadata} is damaged ({error}). Remove it and build again: it is made anew, and "
            "the cells stay"
        ) from error
