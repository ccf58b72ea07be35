"""Routing: a new video through a finished run's experts gives what its features in a store give."""

import json
from pathlib import Path

import pytest
import torch

from varve import BuildSpec, Runtime, build, route, run
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.experiments import routing
from varve.pipeline.experiments.run_folder import Run
from varve.stores import FeatureStore, SpecMismatch

SPEC = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=4)
OPTIONS = {"text": "codes", "layers": 1, "ffn": 64, "epochs": 2, "first_epochs": 2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("routing") / "set"
    make_dataset(root, clips_per_class=3, classes=("grow", "shrink", "bob ↕"), broken=False)
    return root


@pytest.fixture(scope="module")
def done(videos, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("routing")
    build(videos, folder / "s.zarr", SPEC, runtime=Runtime(serial=True))
    return run(folder / "s.zarr", "stpr", "1+1x2", options=OPTIONS, out=folder / "runs")


def test_a_video_of_the_store_is_routed_as_its_cached_features_are(done, videos):
    store = FeatureStore.open(done.spec["store"])
    table = store.clips
    rows = table.index[table["split"] == "test"][:2]
    answers = route(done.folder, [videos / table.at[row, "path"] for row in rows], top_k=2)
    head, features = routing.restored(done, store)
    (name,) = features
    batch = {name: torch.from_numpy(features[name].read(rows)).float()}
    scores, expected = head.scores(batch), head.routing(batch)
    names = store.attributes["classes"]
    for i, answer in enumerate(answers):
        order = scores[i].argsort(descending=True)[:2].tolist()
        assert [label for label, _ in answer.classes] == [names[head.classes[j]] for j in order]
        assert answer.classes[0][1] == pytest.approx(scores[i].max().item(), rel=1e-5)
        assert [e.number for e in answer.experts] == expected.experts[i, :2].tolist()
        assert [e.similarity for e in answer.experts] == pytest.approx(
            expected.similarities[i, :2].tolist(), rel=1e-5
        )
        assert [e.nearest for e in answer.experts] == [
            names[label] for label in expected.nearest[i, :2].tolist()
        ]


def test_scores_are_those_of_the_run(done):
    head, features = routing.restored(done, FeatureStore.open(done.spec["store"]))
    predictions = done.predictions.query("stage == 2")
    (name,) = features
    batch = {name: torch.from_numpy(features[name].read(predictions["row"].to_numpy())).float()}
    names = FeatureStore.open(done.spec["store"]).attributes["classes"]
    best = head.scores(batch).argmax(dim=1).tolist()
    assert [names[head.classes[j]] for j in best] == predictions["top1"].tolist()


def test_a_broken_video_has_its_reason_and_the_rest_is_routed(done, videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    good = next(videos.rglob("*.mp4"))
    broken, fine = route(done.folder, [tmp_path / "broken.mp4", good])
    assert broken.reason.startswith("not_video: ")
    assert not broken.experts
    assert fine.reason == ""
    assert len(fine.experts) == 3


def test_the_command_prints_experts_and_returns_1_for_a_broken_video(done, videos, tmp_path, varve):
    good = next(videos.rglob("*.mp4"))
    output = varve("route", done.folder, good, "--top-k", 2)
    assert output.returncode == 0
    assert "expert  weight  similarity  nearest class" in output.stdout
    (tmp_path / "broken.mp4").write_bytes(b"")
    output = varve("route", done.folder, tmp_path / "broken.mp4", good, "--json")
    assert output.returncode == 1
    broken, fine = json.loads(output.stdout)
    assert broken["reason"].startswith("empty: ")
    assert len(fine["experts"]) == 3
    assert set(fine["experts"][0]) == {"number", "weight", "nearest", "similarity"}


def test_what_cannot_be_routed_is_refused(done, tmp_path, videos):
    good = next(videos.rglob("*.mp4"))
    with pytest.raises(FileNotFoundError, match=r"no such video: .*nothing.mp4"):
        route(done.folder, [good, "nothing.mp4"])
    with pytest.raises(ValueError, match="no finished run"):
        route(tmp_path, [good])
    with pytest.raises(ValueError, match="at least one of each"):
        route(done.folder, [])
    other = run(done.spec["store"], "nearest_mean", "1+1x2", out=tmp_path)
    with pytest.raises(ValueError, match="a run of nearest_mean, which has no experts"):
        route(other, [good])
    bare = run(done.spec["store"], "stpr", "1+1x2", options=OPTIONS, out=tmp_path,
               keep_checkpoints=False)  # fmt: skip
    with pytest.raises(ValueError, match="--keep-checkpoints, or remove this folder"):
        route(bare, [good])


def test_another_store_under_the_same_name_is_refused(done, videos, tmp_path):
    build(videos, tmp_path / "s.zarr", BuildSpec(("resnet18:random-1",), SPEC.keep, frames=4),
          runtime=Runtime(serial=True))  # fmt: skip
    with pytest.raises((SpecMismatch, ValueError)):
        route(done, [next(videos.rglob("*.mp4"))], store=tmp_path / "s.zarr")


@pytest.mark.parametrize("stride", [1, 2])
def test_a_run_on_whole_videos_routes_as_its_frames_were_chosen_or_is_refused(
    done, videos, tmp_path, stride
):
    whole = BuildSpec(SPEC.backbones, SPEC.keep, sampling="all", stride=stride)
    build(videos, tmp_path / "s.zarr", whole, runtime=Runtime(serial=True))
    of_whole = run(tmp_path / "s.zarr", "stpr", "1+1x2", options=OPTIONS,
                   sampled={"frames": 4}, out=tmp_path)  # fmt: skip
    clips = [videos / path for path in FeatureStore.open(tmp_path / "s.zarr").clips["path"][:2]]
    if stride > 1:
        with pytest.raises(SpecMismatch, match=r"view 0 of stride-2 in .*--sampling all"):
            route(of_whole.folder, clips)
        return
    for answer, expected in zip(
        route(of_whole.folder, clips), route(done.folder, clips), strict=True
    ):
        assert [label for label, _ in answer.classes] == [label for label, _ in expected.classes]
        assert [score for _, score in answer.classes] == pytest.approx(
            [score for _, score in expected.classes], rel=1e-2
        )
