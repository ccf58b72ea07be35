"""The demo: from no data at all to a head's accuracy matrix, on one machine without a network."""

import shutil
from pathlib import Path

import numpy as np

from pipeline._variants import variant
from pipeline.building import build
from pipeline.progress import Watch
from pipeline.show import report_summary
from pipeline.spec import BuildSpec
from pipeline.synthetic import make_dataset
from pipeline.tasks import Matrix, learn_by_task, split_classes
from stores import Feature, FeatureStore

RANDOM = ("ViT-S-32:random-0", "resnet18:random-0")
RANDOM_KEEP = ("blocks.2.mlp:grid7", "proj", "layer2.1:grid7", "pool")


def run(
    out: Path, backbones: list[str] | None, precision: str, clips_per_class: int, watch: Watch
) -> None:
    """Make videos in `out`/videos and a store in `out`/store.zarr, learn, and print the results.

    Args:
        backbones: NAME:TAG each; None for two small random networks.
        clips_per_class: Videos of each class, a third of them for testing.
    """
    videos, store = out / "videos", out / "store.zarr"
    if not videos.exists():
        print(f"making {clips_per_class} videos of each class in {videos}")
        unfinished = out / "videos.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        make_dataset(unfinished, clips_per_class=clips_per_class)
        unfinished.rename(videos)
    names = tuple(backbones or RANDOM)
    if not backbones:
        print(
            f"networks: {' and '.join(names)}: small, with RANDOM weights, so that no download is "
            "needed.\nFor real ones: strata demo --backbone ViT-B-16:openai --backbone "
            "resnet18:IMAGENET1K_V1\n(or NAME:/path/to/weights.safetensors)"
        )
    keep = () if backbones else RANDOM_KEEP
    report = build(videos, store, BuildSpec(names, keep, precision=precision), watch=watch)
    print(f"\n{report_summary(report)}\n")
    _learn(FeatureStore.open(store))
    options = [f"--backbone {name}" for name in names] + [f"--keep {feature}" for feature in keep]
    asked = "".join(f" \\\n      {option}" for option in options)
    print(
        f"""
next:
  strata info {store}
  strata failures {store}
  strata verify {store}
  strata build {videos} --store {store}{asked}
      (again: nothing is decoded, nothing computed)
  strata plan YOUR_VIDEOS --store yours.zarr --backbone ViT-B-16:openai --keep proj"""
    )


def _learn(store: FeatureStore) -> None:
    table, classes = store.clips, store.attributes["classes"]
    numbers = table["label"].map({label: i for i, label in enumerate(classes)}).to_numpy()
    tasks = split_classes(len(classes), base=4, increment=2)
    ready = table["status"] == "ready"
    train, test = (np.flatnonzero(ready & (table["split"] == name)) for name in ("train", "test"))
    head = variant("heads", "nearest_mean")
    print(
        f"nearest class mean, {len(tasks)} tasks ({len(classes)} classes, 4 and then 2 at a time; "
        f"{len(train)} clips to learn from, {len(test)} to test on; chance {1 / len(classes):.0%})"
    )
    print("final accuracy, with the frames' features averaged / kept in order:")
    best: tuple[float, Feature, Matrix] | None = None
    for feature in store.features():
        averaged, ordered = (
            learn_by_task(head.build(time=time), feature, numbers, train, test, tasks)
            for time in ("mean", "order")
        )
        print(
            f"  {feature.backbone:24} {feature.name:20} "
            f"{averaged.final:4.0%} / {ordered.final:4.0%}"
        )
        whole_vector = ":" not in feature.name
        if whole_vector and (best is None or ordered.final > best[0]):
            best = (ordered.final, feature, ordered)
    print("Most classes are motions: an average over frames cannot tell one from its reverse.")
    assert best is not None
    _, feature, matrix = best
    print(f"\naccuracy matrix of {feature.backbone} {feature.name}, frames in order")
    print("(row: after learning task i; column: on the test clips of task j)")
    print(matrix_text(matrix))
    print(
        f"final accuracy {matrix.final:.1%}, average incremental accuracy "
        f"{matrix.average_incremental:.1%}"
    )


def matrix_text(matrix: Matrix) -> str:
    """The accuracy matrix as a table.

    >>> print(matrix_text(Matrix(np.array([[1.0, np.nan], [0.5, 0.75]]), np.array([4, 4]))))
          task 0  task 1     all
      0   100.0%          100.0%
      1    50.0%   75.0%   62.5%
    """
    tasks = len(matrix.clips)
    lines = ["    " + "".join(f"  task {j}" for j in range(tasks)) + "     all"]
    for i, row in enumerate(matrix.accuracy):
        cells = "".join("        " if np.isnan(value) else f"{value:8.1%}" for value in row)
        lines.append(f"  {i} {cells}{matrix.stage(i):8.1%}")
    return "\n".join(lines)
