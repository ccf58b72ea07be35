"""Teacher features: outputs of the network as it was after the previous task, as store columns.

An `update` with the network of the head, once a task: it starts from the deepest valid feature and
writes columns under keys of their own. A resumed run finds them in the store. The run folder
references them until the run has finished.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from varve.heads import UsesTeacher
from varve.pipeline.config import BuildSpec, FrameSet
from varve.pipeline.extraction.update import update
from varve.pipeline.progress import Progress
from varve.stores import Feature, FeatureStore
from varve.stores.lock import StoreLocked

if TYPE_CHECKING:
    from varve.pipeline.experiments.run_spec import PreparedRun

PREFIX = "teacher "
PAUSE_SECONDS = 0.2


def compute_teacher_features(
    plan: "PreparedRun", head: UsesTeacher, rows: Sequence[int], folder: Path, progress: Progress
) -> list[dict[str, Feature]]:
    """Compute and store the teacher's outputs for some rows of the table of clips.

    The teacher is the head's network, as the previous task left it. The run folder references the
    columns.

    Returns:
        For each view to train on, the plain one first, columns by the names that the head reads:
        "teacher " and the stage. None where the head reads none.

    Raises:
        ValueError: The store is of another precision than what trains.
    """
    if not head.teacher_stages:
        return []
    network = plan.network
    assert network is not None
    backbone = network.backbone_of(head.suffix)
    # The frames of the features that the head reads, whatever the last build of the store was.
    read = next(iter(plan.features.values()))
    frames = FrameSet.of(read.spec["frames"])
    varied = next(iter(plan.views[0].values())).spec["frames"] if plan.views else {}
    spec = BuildSpec((backbone.name,), **frames.request(), dtype=read.dtype,
                     views=1 + len(plan.views), flip=varied.get("flip", False),
                     random_crop=varied.get("random_crop", False))  # fmt: skip
    stages = {name: network.find(name) for name in head.teacher_stages}
    waiting = False
    while True:
        try:
            report = update(
                plan.store, backbone, [*stages.values()], rows, spec=spec, holder=folder
            )
            break
        except StoreLocked as error:
            # Mostly another run of an ablation that writes its own.
            if not waiting:
                progress.message(f"waiting to write teacher features: {error}")
            waiting = True
            time.sleep(PAUSE_SECONDS)
    for stage, count in report.calls.items():
        network.calls[stage.rpartition(" ")[2]] += count
    progress.message(f"teacher features of {len(rows)} clips: {report.computed} computed")
    store = FeatureStore.open(plan.store)
    return [
        {
            PREFIX + name: store.feature(
                backbone.name, stage, fingerprint=report.fingerprints[stage, view]
            )
            for name, stage in stages.items()
        }
        for view in range(1 + len(plan.views))
    ]
