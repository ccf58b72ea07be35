"""The demo: from no data to the accuracy matrix of a head, without a download."""

import shutil
from pathlib import Path

from varve.pipeline.backbones.mel_resnet import PREFIX
from varve.pipeline.cli.format_runs import run_summary
from varve.pipeline.cli.format_store import report_summary
from varve.pipeline.config import BuildSpec
from varve.pipeline.datasets.synthetic import AUDIO_CLASSES, make_dataset
from varve.pipeline.experiments.run import run as run_experiment
from varve.pipeline.experiments.run_folder import Run
from varve.pipeline.extraction.build import build
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore

RANDOM = ("ViT-S-32:random-0", "resnet18:random-0")
AUDIO = "mel_resnet18:random-0"
HAD_OPTIONS = {"width": 128, "ffn": 256, "batch_size": 32, "position": "learned"}
RANDOM_KEEP = ("blocks.2.mlp:grid7", "proj", "layer2.1:grid7", "pool")


def run(
    out: Path,
    backbones: list[str] | None,
    precision: str,
    clips_per_class: int,
    sound: bool,
    progress: Progress,
) -> None:
    """Make videos in `out`/videos and a store in `out`/store.zarr, train heads, and print results.

    Args:
        backbones: NAME:TAG each; None for two small random networks.
        clips_per_class: Videos of each class, a third of them for testing.
        sound: Whether the videos have audio, for an audio backbone and HAD.
    """
    videos, store = out / "videos", out / "store.zarr"
    if not videos.exists():
        print(f"making {clips_per_class} videos of each class in {videos}")
        unfinished = out / "videos.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        make_dataset(unfinished, clips_per_class=clips_per_class, sound=sound)
        unfinished.rename(videos)
    elif sound and not any(videos.glob(f"train/{AUDIO_CLASSES[0]}")):
        raise ValueError(f"{videos} was made without sound: give another --out, or remove it")
    names = tuple(backbones or RANDOM)
    if sound and not any(name.startswith(PREFIX) for name in names):
        names += (AUDIO,)
    if not backbones:
        print(
            f"networks: {' and '.join(names)}: small, with RANDOM weights, so that no download is "
            "needed.\nFor real ones: varve demo --backbone ViT-B-16:openai --backbone "
            "resnet18:IMAGENET1K_V1\n(or NAME:/path/to/weights.safetensors)"
        )
    keep = () if backbones else RANDOM_KEEP
    report = build(videos, store, BuildSpec(names, keep, precision=precision), progress=progress)
    print(f"\n{report_summary(report)}\n")
    best = _train(FeatureStore.open(store), out / "runs", progress)
    scenario, settings = best.spec["scenario"], ["position=learned"]
    head, visual = "stpr", names[0].partition(":")[0]
    if best.spec["head"] == "had":
        head, visual = "had", best.spec["backbone"]
        settings = ["parts=low+high", *(f"{name}={value}" for name, value in HAD_OPTIONS.items())]
    sets = "".join(f" \\\n      --set {setting}" for setting in settings)
    options = [f"--backbone {name}" for name in names] + [f"--keep {feature}" for feature in keep]
    request = "".join(f" \\\n      {option}" for option in options)
    maps = out / "maps.zarr"
    print(
        f"""
next:
  varve info {store}
  varve failures {store}
  varve verify {store}
  varve build {videos} --store {store}{request}
      (again: nothing is decoded, nothing computed)
  varve run {store} --head {head} --backbone {visual} --scenario {scenario}{sets}
  varve build {videos} --store {maps} --frames 4 --backbone {RANDOM[1]} \\
      --keep layer3.1 --keep pool
  varve run {maps} --head hf_net --scenario {scenario} \\
      --set first_epochs=15 --set epochs=8
      (trains the last two blocks of a network)
  varve plan YOUR_VIDEOS --store yours.zarr --backbone ViT-B-16:openai --keep proj"""
    )


def _train(store: FeatureStore, runs: Path, progress: Progress) -> Run:
    """Train quick heads, print their accuracies, and return the best run, or HAD's with audio."""
    classes = store.attributes["classes"]
    audible = sorted(set(classes) & set(AUDIO_CLASSES))
    scenario = "4+4x3" if audible else "demo"
    ready = store.clips[store.clips["status"] == "ready"]
    clips = ready["split"].value_counts()
    count, step = len(classes), 4 if audible else 2
    print(
        f"nearest class mean, scenario {scenario} ({count} classes, 4 and then {step} at a time; "
        f"{clips['train']} clips to train on, {clips['test']} to test on; chance {1 / count:.0%})"
    )
    print("final accuracy, with the frames' features averaged / kept in order:")
    candidates = []
    for feature in store.features():
        averaged, ordered = (
            run_experiment(store, "nearest_mean", scenario, backbone=feature.backbone, out=runs,
                           options={"feature": feature.name, "time": time})
            for time in ("mean", "order")
        )  # fmt: skip
        print(
            f"  {feature.backbone:24} {feature.name:20} "
            f"{averaged.matrix.metric('final'):4.0%} / {ordered.matrix.metric('final'):4.0%}"
        )
        if ":" not in feature.name and not feature.backbone.startswith(PREFIX):
            candidates.append(ordered)
    best = max(candidates, key=lambda done: done.matrix.metric("final"))
    print("Most classes are motions: an average over frames cannot tell one from its reverse.")
    if audible:
        visual = best.spec["backbone"]
        audio = next(f.backbone for f in store.features() if f.backbone.startswith(PREFIX))
        print(f"Only the audio shows: {'; '.join(audible)}.\nHAD, on {visual} and {audio}:")
        best = run_experiment(store, "had", scenario, options=HAD_OPTIONS, backbone=visual,
                              out=runs, progress=progress)  # fmt: skip
    print(f"\n{run_summary(best)}")
    return best
