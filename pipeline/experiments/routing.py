"""Routing: send new videos through the experts of a finished run.

A video is decoded and goes through the run's network exactly as the clips of its store did: the
features' fingerprints are compared. The run's head then scores it and weights its experts.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from varve.heads import Head, Routes
from varve.pipeline.backbones import Backbone
from varve.pipeline.config import BuildSpec, FrameSet, Runtime
from varve.pipeline.datasets.media import content_digest
from varve.pipeline.experiments import checkpoints, head_inputs, head_source, run_spec
from varve.pipeline.experiments.run_folder import Run
from varve.pipeline.extraction.clip_status import overflow_text
from varve.pipeline.extraction.commit import device_of
from varve.pipeline.extraction.extract import ClipResult, FileWork, extract, file_work
from varve.pipeline.extraction.passes import Output, Pass, passes
from varve.pipeline.progress import Progress
from varve.stores import Feature, FeatureStore, SampledFeature, SpecMismatch


@dataclass(frozen=True)
class Expert:
    """One expert's part in the prediction for a clip.

    Attributes:
        number: Number of its task, from 0.
        weight: Weight in the prediction.
        nearest: Class whose anchor is nearest to the expert's residual.
        similarity: Cosine similarity to that anchor.
    """

    number: int
    weight: float
    nearest: str
    similarity: float


@dataclass(frozen=True)
class Routed:
    """A run's prediction for a video.

    Attributes:
        video: The path as given.
        classes: Classes with their scores, the highest first.
        experts: Experts by descending weight.
        reason: Why the video has no prediction, such as "corrupt: ..."; "" where it has one.
    """

    video: str
    classes: tuple[tuple[str, float], ...] = ()
    experts: tuple[Expert, ...] = ()
    reason: str = ""


def route(
    run: str | Path | Run,
    videos: Sequence[str | Path],
    top_k: int = 3,
    *,
    store: str | Path | FeatureStore | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> list[Routed]:
    """Predict the classes of videos that need not be in any store, with a run's experts.

    Args:
        run: A finished run, or its folder, with its checkpoints.
        videos: Files, or folders of frames.
        top_k: Number of classes and experts to return.
        store: Where the run's store is now, if it was moved.
        runtime: Device and deadline. Everything runs in this process, without a cluster.
        progress: Receives the progress; silent by default.

    Returns:
        One prediction per video, in order.

    Raises:
        ValueError: The run's head has no experts, its checkpoints are gone, or `top_k` is below 1.
        FileNotFoundError: There is no such video.
        SpecMismatch: The store or its network is not that of the run any more.
    """
    done = run if isinstance(run, Run) else Run.read(run)
    if top_k < 1 or not videos:
        raise ValueError(f"{top_k=} of {len(videos)} videos: ask for at least one of each")
    for video in videos:
        if not Path(video).exists():
            raise FileNotFoundError(f"no such video: {video}")
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(
        store or done.spec["store"]
    )  # fmt: skip
    head, kept = restored(done, opened)
    if not isinstance(head, Routes) or not head.experts:
        raise ValueError(f"{done.folder} is a run of {done.spec['head']}, which has no experts")
    runtime, progress = runtime or Runtime(), progress or Progress()
    requested, outputs, networks = _passes_of(opened, kept, device_of(runtime))
    names = list(opened.attributes["classes"])
    answers: dict[int, Routed] = {}
    files: list[FileWork] = []
    for number, video in enumerate(videos):
        path = Path(video).resolve()
        try:
            files.append(file_work(path, content_digest(path), requested, number))
        except OSError as error:
            reason = f"unreadable: {error.strerror or error}"
            answers[number] = Routed(str(video), reason=reason)
    children = min(len(videos), os.cpu_count() or 1)
    with progress.bars(None, route=(len(files), "videos")):
        for clip in extract(files, requested, networks, children=children,
                            deadline_seconds=runtime.deadline_seconds):  # fmt: skip
            (number,) = clip.work.rows
            answers[number] = _routed(head, kept, outputs, clip, str(videos[number]), names, top_k)
            progress.advance("route", 1)
    return [answers[number] for number in range(len(videos))]


def _passes_of(
    store: FeatureStore, features: Mapping[str, Feature], device: str
) -> tuple[tuple[Pass, ...], dict[str, Output], dict[str, Backbone]]:
    """Return the passes that give a head's features, their outputs by the head's names, networks.

    Raises:
        SpecMismatch: A feature would have another fingerprint than in the store.
    """
    first = next(iter(features.values()))
    networks = {
        head_inputs.weights_of(store, name): head_inputs.load_network(store, name)
        for name in dict.fromkeys(feature.backbone for feature in features.values())
    }
    spec = BuildSpec(
        tuple(networks),
        tuple(dict.fromkeys(feature.name for feature in features.values())),
        **FrameSet.of(first.spec["frames"]).request(),
        precision=first.spec["stages"][0]["precision"],
        dtype=first.dtype,
        text=False,
    )
    every = passes(spec, networks, store, device)
    named = every
    if isinstance(first, SampledFeature):
        whole = _every_frame(first, store).request()
        named = passes(replace(spec, **whole), networks, store, device)
    by_key = {
        known.spec.fingerprint: output
        for theirs, ours in zip(named, every, strict=True)
        for known, output in zip(theirs.outputs, ours.outputs, strict=True)
    }
    keys = {
        name: feature.source.fingerprint
        if isinstance(feature, SampledFeature)
        else feature.fingerprint
        for name, feature in features.items()
    }
    for name, feature in features.items():
        if keys[name] not in by_key:
            raise SpecMismatch(
                f"{feature.name} of {feature.backbone} comes out under another key than in "
                f"{store.location}: its weights or this version's code are not what they were"
            )
    outputs = {name: by_key[key] for name, key in keys.items()}
    needed = outputs.values()
    requested = [
        replace(pass_, outputs=tuple(o for o in pass_.outputs if o in needed)) for pass_ in every
    ]
    return tuple(pass_ for pass_ in requested if pass_.outputs), outputs, networks


def _every_frame(feature: SampledFeature, store: FeatureStore) -> FrameSet:
    """Return the frame set of the whole videos that a run's frames were chosen from.

    Raises:
        SpecMismatch: It lacks frames, or the run's frames are of a varied view: the frames of a new
            video are the plain view, chosen among all.
    """
    whole = FrameSet.of(feature.spec["whole"])
    if whole.window_step:
        raise SpecMismatch(
            f"the run read windows of {whole.frames} frames in {store.location}, and a new video "
            "is read as frames chosen among all of it. Run it on a store of T frames (--sampling "
            f"tsn --frames {whole.frames})"
        )
    if whole.grid != "stride-1" or feature.frame_set.view:
        raise SpecMismatch(
            f"the run chose its frames as view {feature.frame_set.view} of {whole.grid} in "
            f"{store.location}, and a new video is read as view 0 of all its frames. Run it on "
            "whole videos of every frame (--sampling all), or on a store of T frames"
        )
    return whole


def _routed(
    head: Head,
    features: Mapping[str, Feature],
    outputs: Mapping[str, Output],
    clip: ClipResult,
    video: str,
    names: list[str],
    top_k: int,
) -> Routed:
    """Return the prediction for an extracted clip, or the reason why there is none."""
    assert isinstance(head, Routes)
    if clip.failure:
        return Routed(video, reason=f"{clip.failure.reason}: {clip.failure.detail}")
    if lost := [o.spec for o in outputs.values() if o.spec.short in clip.overflowed]:
        return Routed(video, reason=f"not_finite: {overflow_text(lost[0])}")
    batch = {
        name: torch.from_numpy(
            features[name].values(clip.cells[output.spec.relative_path][None]).astype(np.float32)
        )
        for name, output in outputs.items()
    }
    scores = head.scores(batch)[0]
    best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    routing = [x[0].tolist()[:top_k] for x in head.routing(batch)]
    return Routed(
        video,
        tuple((names[head.classes[column]], float(scores[column])) for column in best),
        tuple(
            Expert(number, weight, names[nearest], similarity)
            for number, weight, nearest, similarity in zip(*routing, strict=True)
        ),
    )


def restored(
    run: Run, store: FeatureStore, task: int | None = None
) -> tuple[Head, dict[str, Feature]]:
    """Return a finished run's head as it was after a task, and the columns that it reads.

    Args:
        run: The run, with its checkpoints.
        store: The store that it was made on.
        task: Number of the task, from 0; None for the last.

    Raises:
        ValueError: There is no such task, or the checkpoints are gone or damaged.
        SpecMismatch: The store is not what the run was made on.
    """
    spec = run.spec
    store = store.sampled(**spec["sampled"]) if spec.get("sampled") else store
    source = head_source.restore_source(run.folder, spec["head"], spec["head_source"])
    head, network, features = run_spec.build_head(store, source, spec["options"], spec["backbone"])
    keys = spec["features"]
    if moved := [name for name, column in features.items() if column.fingerprint != keys[name]]:
        raise SpecMismatch(
            f"{store.location} has another {', '.join(moved)} of {spec['backbone']} than "
            f"{run.folder} was made on"
        )
    if network is not None and network.identity() != spec["network"]:
        raise SpecMismatch(
            f"the network of {store.location}, or the source of a graft, is another than "
            f"{run.folder} was made with: load that source, or run it again"
        )
    last = len(spec["tasks"]) - 1
    number = last if task is None else task
    if not 0 <= number <= last:
        raise ValueError(f"{task=} of {run.folder}, whose tasks are 0 to {last}")
    saved, state, _ = checkpoints.read(run.folder, number)
    if saved != number:
        raise ValueError(
            f"{run.folder} has no checkpoint of task {number}, since `ablate` removes those that "
            "it has made: give it --keep-checkpoints, or remove this folder and `varve run` it"
        )
    head.load_state_dict(state)
    return head, features
