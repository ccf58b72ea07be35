"""Remembering: what the network of the task before makes of clips, as columns of the store.

An `update` with the network as a head has left it: from the deepest feature that still holds, under
keys of its own, once a task. A run that is gone on with finds them there. The run folder holds them
until it has ended.
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
    from varve.pipeline.experiments.run_spec import Prepared

PAUSE = 0.2


def features(
    plan: "Prepared", head: UsesTeacher, rows: Sequence[int], folder: Path, progress: Progress
) -> dict[str, Feature]:
    """Of these clips, by "old STAGE".

    Raises:
        ValueError: The store is of another precision than what trains.
    """
    if not head.teacher_stages:
        return {}
    network = plan.network
    assert network is not None
    backbone = network.behind(head.suffix)
    # As the features that are read, whatever the store's last build was.
    read = next(iter(plan.features.values()))
    frames = FrameSet.of(read.spec["frames"])
    spec = BuildSpec((backbone.name,), **frames.request(), dtype=read.dtype)
    found = {name: network.find(name) for name in head.teacher_stages}
    told = False
    while True:
        try:
            report = update(plan.store, backbone, [*found.values()], rows, spec=spec, holder=folder)
            break
        except StoreLocked as error:
            # Mostly another run of an ablation that writes its own.
            if not told:
                progress.message(f"waiting to write old maps: {error}")
            told = True
            time.sleep(PAUSE)
    for stage, count in report.calls.items():
        network.calls[stage.rpartition(" ")[2]] += count
    progress.message(f"old maps of {len(rows)} clips: {report.computed} computed")
    store = FeatureStore.open(plan.store)
    return {
        f"old {name}": store.feature(backbone.name, stage, fingerprint=report.fingerprints[stage])
        for name, stage in found.items()
    }


def forget(store: str, folder: Path) -> None:
    """The run has ended: its columns may be freed."""
    FeatureStore.open(store).remove_reference(folder)
