"""Diagnosis of routing: what the experts of a finished run know, and what its router loses.

Shapes: N test clips, K experts, C classes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from varve.heads import Routes
from varve.pipeline.experiments import head_inputs, routing
from varve.pipeline.experiments.run_folder import CNN, Run
from varve.stores import FeatureStore

BATCH = 256


@dataclass(frozen=True)
class Diagnosis:
    """Routing of a run's test clips after its last task.

    Attributes:
        summary: In percent of the clips. "routed": right as the run predicts. "average": right with
            equal weights for all experts. "own expert": right with the weight of the expert of the
            clip's task at 1 and the others at 0. "own task": right among the classes of the clip's
            task, routed as in the run. "own expert first": the expert of the clip's task has the
            greatest weight. "calibration error": the mean over clips of the distance between
            confidence and share in `calibration`.
        calibration: A row for each bin of the greatest weight that has clips: "confidence", the
            mean of the greatest weight; "own", the share of clips whose greatest weight is that of
            the expert of their task; "clips", their number.
    """

    summary: dict[str, float]
    calibration: pd.DataFrame


def diagnose(run: Run, store: FeatureStore | None = None, bins: int = 10) -> Diagnosis:
    """Compare a run's predictions with those of routers that know more, or nothing.

    Args:
        run: A finished run of a head with experts, one per task, with its last checkpoint.
        store: The store that it was made on; by default where it was then.
        bins: Number of bins of equal width from 1 / K to 1.

    Raises:
        ValueError: The head has no experts, a class was learned in several tasks, or the checkpoint
            is gone.
        SpecMismatch: The store is not what the run was made on.
    """
    opened = store or FeatureStore.open(run.spec["store"])
    head, features = routing.restored(run, opened)
    tasks = [list(task) for task in run.spec["tasks"]]
    if not isinstance(head, Routes) or head.experts != len(tasks):
        raise ValueError(
            f"{run.folder} is a run of {run.spec['head']} on {len(tasks)} tasks, without an expert "
            "for each: diagnose a run of a head that routes"
        )
    names = list(opened.attributes["classes"])
    task_of = {name: number for number, task in enumerate(tasks) for name in task}
    if len(task_of) < sum(map(len, tasks)):
        raise ValueError(f"{run.folder} learned a class in several tasks, which have two experts")
    last = run.predictions[lambda p: (p["stage"] == p["stage"].max()) & (p["classifier"] == CNN)]
    rows = last["row"].to_numpy(copy=True)
    labels = np.full(len(opened.clips), -1)
    labels[rows] = [names.index(label) for label in last["label"]]
    clips = head_inputs.make_clips(features, rows, labels)
    columns_N = torch.tensor([head.classes.index(label) for label in labels[rows].tolist()])
    task_of_column_C = torch.tensor([task_of[names[label]] for label in head.classes])
    own_N = task_of_column_C[columns_N]

    parts: dict[str, list[Tensor]] = {}
    for indices, batch in clips.batches(BATCH):
        own_B, K = own_N[indices], head.experts
        routed = head.routing(batch)
        scores = {
            "routed": head.scores(batch),
            "average": head.scores_with(batch, torch.full((len(indices), K), 1 / K)),
            "own expert": head.scores_with(batch, one_hot(own_B, K).float()),
        }
        others_BC = own_B[:, None] != task_of_column_C
        scores["own task"] = scores["routed"].cpu().masked_fill(others_BC, -torch.inf)
        for name, scores_BC in scores.items():
            right_B = scores_BC.argmax(dim=1).cpu() == columns_N[indices]
            parts.setdefault(name, []).append(right_B)
        parts.setdefault("own expert first", []).append(routed.experts[:, 0].cpu() == own_B)
        parts.setdefault("confidence", []).append(routed.weights[:, 0].cpu())
    columns = {name: torch.cat(part).double().numpy() for name, part in parts.items()}
    confidence_N = columns.pop("confidence")
    calibration = _calibration(confidence_N, columns["own expert first"], head.experts, bins)
    gaps = (calibration["confidence"] - calibration["own"]).abs() * calibration["clips"]
    summary = {name: 100 * float(column.mean()) for name, column in columns.items()}
    summary["calibration error"] = 100 * float(gaps.sum() / len(confidence_N))
    return Diagnosis(summary, calibration)


def _calibration(
    confidence_N: np.ndarray, own_N: np.ndarray, experts: int, bins: int
) -> pd.DataFrame:
    edges = np.linspace(1 / experts, 1, bins + 1)
    bin_N = np.clip(np.digitize(confidence_N, edges) - 1, 0, bins - 1)
    clips = pd.DataFrame({"confidence": confidence_N, "own": own_N, "bin": bin_N})
    grouped = clips.groupby("bin")
    return grouped[["confidence", "own"]].mean().assign(clips=grouped.size()).reset_index(drop=True)
