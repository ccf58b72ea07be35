"""Diagnosis of routing against the run's own figures, another routing, and loops."""

import numpy as np
import pytest
import torch

from varve import BuildSpec, Runtime, build, run
from varve.pipeline.analysis.routing_diagnosis import diagnose
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.experiments import routing
from varve.stores import FeatureStore

SPEC = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=4)
OPTIONS = {"text": "means", "layers": 1, "ffn": 64, "epochs": 5, "first_epochs": 5,
           "position": "learned", "softmax": 0.001}  # fmt: skip
SCENARIO = "2+1x2"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    root = tmp_path_factory.mktemp("diagnosis")
    classes = ("grow", "shrink", "fade in", "fade out")
    make_dataset(root / "set", clips_per_class=9, classes=classes, broken=False)
    build(root / "set", root / "s.zarr", SPEC, runtime=Runtime(serial=True))
    return FeatureStore.open(root / "s.zarr")


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    return run(store, "stpr", SCENARIO, options=OPTIONS, out=tmp_path_factory.mktemp("runs"))


def test_the_summary_is_of_the_routing_of_every_test_clip(done, store, tmp_path):
    summary = diagnose(done).summary
    last = done.predictions.query("stage == 2")
    assert summary["routed"] == pytest.approx(100 * (last["top1"] == last["label"]).mean())
    average = run(store, "stpr", SCENARIO, options=OPTIONS | {"routing": "average"}, out=tmp_path)
    equal = average.predictions.query("stage == 2")
    assert summary["average"] == pytest.approx(100 * (equal["top1"] == equal["label"]).mean())

    head, features = routing.restored(done, store)
    names, tasks = list(store.attributes["classes"]), done.spec["tasks"]
    counts = dict.fromkeys(("own expert", "own task", "own expert first"), 0)
    for row, label in zip(last["row"], last["label"], strict=True):
        (task,) = [number for number, classes in enumerate(tasks) if label in classes]
        batch = {name: torch.from_numpy(column.read([row])).float()
                 for name, column in features.items()}  # fmt: skip
        classes = [names[number] for number in head.classes]
        scores = head.scores(batch)[0].tolist()
        best = max((c for c in classes if c in tasks[task]), key=lambda c: scores[classes.index(c)])
        counts["own task"] += best == label
        counts["own expert first"] += int(head.routing(batch).experts[0, 0]) == task
        weights = torch.tensor([[float(number == task) for number in range(3)]])
        best = classes[int(head.scores_with(batch, weights)[0].argmax())]
        counts["own expert"] += best == label
    for name, count in counts.items():
        assert summary[name] == pytest.approx(100 * count / len(last)), name


def test_the_calibration_has_each_clip_in_the_bin_of_its_greatest_weight(done, store):
    diagnosis = diagnose(done, store, bins=4)
    head, features = routing.restored(done, store)
    rows = done.predictions.query("stage == 2")["row"].to_numpy()
    labels = done.predictions.query("stage == 2")["label"].tolist()
    batch = {name: torch.from_numpy(column.read(rows)).float() for name, column in features.items()}
    routes = head.routing(batch)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for n, label in enumerate(labels):
        weight, expert = float(routes.weights[n, 0]), int(routes.experts[n, 0])
        edges = [1 / 3 + i * (1 - 1 / 3) / 4 for i in (1, 2, 3)]
        number = sum(weight >= edge for edge in edges)
        bins.setdefault(number, []).append((weight, label in done.spec["tasks"][expert]))
    expected = [[*np.mean(bins[number], axis=0).tolist(), len(bins[number])]
                for number in sorted(bins)]  # fmt: skip
    assert len(bins) > 1
    columns = diagnosis.calibration[["confidence", "own", "clips"]]
    np.testing.assert_allclose(columns.to_numpy(float), expected, rtol=1e-5)
    error = sum(count * abs(confidence - share) for confidence, share, count in expected) / len(
        rows
    )
    assert diagnosis.summary["calibration error"] == pytest.approx(100 * error, rel=1e-4)


def test_runs_without_an_expert_per_task_are_refused(store, tmp_path):
    for head, options in [("nearest_mean", {}), ("stpr", OPTIONS | {"routing": "none"})]:
        done = run(store, head, SCENARIO, options=options, out=tmp_path)
        with pytest.raises(ValueError, match="without an expert for each"):
            diagnose(done)
