"""Routing: new videos through a finished run's experts.

A video is decoded, goes through the run's network exactly as the clips of its store did (the
features' keys are compared), and is weighed by the run's head.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from varve.heads import Head, Routes
from varve.heads.parts.clips import Batch
from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.experiments import checkpoints, head_inputs, head_source, run_spec
from varve.pipeline.experiments.run import Run
from varve.pipeline.extraction.build import build
from varve.pipeline.progress import Progress
from varve.stores import Feature, FeatureStore, SpecMismatch


@dataclass(frozen=True)
class Expert:
    """One expert's say about a clip.

    Attributes:
        number: Of its task, from 0.
        weight: Its share in the prediction.
        nearest: The class whose anchor is nearest to its residual.
        similarity: The cosine to that anchor.
    """

    number: int
    weight: float
    nearest: str
    similarity: float


@dataclass(frozen=True)
class Routed:
    """What a run makes of a video.

    Attributes:
        video: As it was named.
        classes: The likeliest first, with their scores.
        experts: By descending weight.
        reason: Why the video could not be decoded; then there is nothing else. "" where it could.
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
    """Ask a run's experts about videos that need not be in any store.

    Args:
        run: A finished run, or its folder, with its checkpoints.
        top_k: How many classes and experts to tell.
        store: Where the run's store is now, if it was moved.
        runtime: By default this process, without a cluster.

    Returns:
        One for each video, in order.

    Raises:
        ValueError: The run's head has no experts, its checkpoints are gone, or `top_k` is none.
        FileNotFoundError: No such video.
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
    backbone = done.spec["backbone"]
    one = next(iter(kept.values()))
    frames = {name: one.spec["frames"][name]
              for name in ("frames", "sampling", "fps", "stride", "decoder")}  # fmt: skip
    spec = BuildSpec(
        (head_inputs.weights_of(opened, backbone),),
        tuple(dict.fromkeys(feature.name for feature in kept.values())),
        **frames,
        precision=one.spec["stages"][0]["precision"],
        dtype=one.dtype,
        text=False,
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "videos"
        root.mkdir()
        paths = []
        for number, video in enumerate(videos):
            paths.append(f"{number:06}{Path(video).suffix}")
            os.symlink(Path(video).resolve(), root / paths[-1], Path(video).is_dir())
        table = pd.DataFrame({"path": paths, "label": "asked"})
        table.to_csv(root / "list.csv", index=False)
        place = Path(scratch) / "s.zarr"
        runtime = runtime or Runtime(serial=True)
        build(root / "list.csv", place, spec, layout="table", runtime=runtime, progress=progress)
        found = FeatureStore.open(place)
        features = {name: found.feature(backbone, one.name) for name, one in kept.items()}
        for name, feature in features.items():
            if feature.fingerprint != kept[name].fingerprint:
                raise SpecMismatch(
                    f"{feature.name} of {backbone} comes out under another key than in "
                    f"{opened.location}: its weights or this version's code are not what they were"
                )
        names = list(opened.attributes["classes"])
        table = found.clips.set_index("path")
        answers = []
        for path, video in zip(paths, videos, strict=True):
            if table.at[path, "status"] != "ready":
                reason = f"{table.at[path, 'reason']}: {table.at[path, 'detail']}"
                answers.append(Routed(str(video), reason=reason))
                continue
            row = int(found.clips.index[found.clips["path"] == path][0])
            clip = head_inputs.clips_of(features, np.array([row]), np.zeros(len(table), np.int64))
            answers.append(_answer(head, clip[torch.tensor([0])], str(video), names, top_k))
        return answers


def _answer(head: Head, batch: Batch, video: str, names: list[str], top_k: int) -> Routed:
    assert isinstance(head, Routes)
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
    """A finished run's head, as it was after a task, and the columns that it reads.

    Args:
        task: From 0; None for the last.

    Raises:
        ValueError: There is no such task, or the checkpoints are gone or damaged.
        SpecMismatch: The store is not what the run was made on.
    """
    spec = run.spec
    method = head_source.kept(run.folder, spec["head"], spec.get("method", ""))
    head, network, features = run_spec.head_of(store, method, spec["options"], spec["backbone"])
    moved = [name for name, one in features.items() if one.fingerprint != spec["features"][name]]
    if moved:
        raise SpecMismatch(
            f"{store.location} has another {', '.join(moved)} of {spec['backbone']} than "
            f"{run.folder} was made on"
        )
    if network is not None and network.identity() != spec["network"]:
        raise SpecMismatch(
            f"the network of {store.place}, or the source of a graft, is another than "
            f"{run.folder} was made with: load that source, or run it again"
        )
    last = len(spec["tasks"]) - 1
    asked = last if task is None else task
    if not 0 <= asked <= last:
        raise ValueError(f"{task=} of {run.folder}, whose tasks are 0 to {last}")
    found, state, _ = checkpoints.read(run.folder, asked)
    if found != asked:
        raise ValueError(
            f"{run.folder} has no checkpoint of task {asked}, since `ablate` removes those that "
            "it has made: give it --keep-checkpoints, or remove this folder and `varve run` it"
        )
    head.load_state_dict(state)
    return head, features
