"""Interpretation: numbers equal loops, float64 and the closed forms of the papers."""

import copy
import math
import shutil

import av
import numpy as np
import pytest
import torch

from varve import BuildSpec, Runtime, build, run
from varve.heads import Task
from varve.heads.class_regularization import Regularized
from varve.heads.closed_form.nearest_mean import NearestMean
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.parts.classifiers import LENGTH
from varve.heads.parts.fine_tuned_head import FineTunedHead
from varve.heads.parts.trainable_suffix import Passed
from varve.pipeline import backbones
from varve.pipeline.analysis import interpret
from varve.pipeline.decoders._crop import apply_crop, choose_crop
from varve.pipeline.experiments import head_inputs, run_spec
from varve.pipeline.experiments.head_source import find_head
from varve.pipeline.experiments.routing import restored
from varve.pipeline.experiments.run_folder import Run
from varve.stores import FeatureStore

CLASSES = ("grow", "shrink", "fade in", "fade out")
NAME = "resnet18:random-0"
STAGES = ["layer3.0", "layer3.1", "layer4.0", "layer4.1"]
READS = "blocks.-5"


@pytest.fixture(scope="module")
def store(dataset, built_once, tmp_path_factory) -> FeatureStore:
    spec = BuildSpec((NAME,), keep=("layer2.1", "layer4.0", "pool"), frames=2)
    path = tmp_path_factory.mktemp("looking") / "s.zarr"
    shutil.copytree(built_once(dataset(CLASSES, 3), spec), path)  # runs add teacher features
    return FeatureStore.open(path)


@pytest.fixture(scope="module")
def finished_run(store, loaded_once, tmp_path_factory) -> Run:
    options = {"blocks": 4, "first_epochs": 1, "epochs": 1, "parts": "", "lr": 0.1,
               "classifier": "linear", "tune_epochs": 0}  # fmt: skip
    return run(store, "hce", "2+2x1", options=options, out=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def heads_and_clips(finished_run, store):
    """After both tasks, after the first one, and two clips."""
    new, features = restored(finished_run, store)
    old, _ = restored(finished_run, store, task=0)
    return new, old, interpret.clip(store, features, 4), interpret.clip(store, features, 5)


@pytest.fixture(scope="module")
def gated(store, loaded_once):
    """HF-Net that has seen clips for no epoch, and what it reads."""
    options = {"blocks": 4, "first_epochs": 0}
    head, _, features = run_spec.build_head(store, find_head("hf_net"), options, NAME)
    head.learn(
        Task(head_inputs.make_clips(features, np.arange(2), head_inputs.class_numbers(store)))
    )
    return head, features


class Known(FineTunedHead):
    """Scores that are a formula of one stage's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = [7, 3]

    def traced(self, batch):
        outputs = batch["x"].flatten(0, 1).requires_grad_()
        scores = torch.stack([formula(outputs), -formula(outputs)])[None]
        return scores, {"stage": Passed(torch.nn.Identity(), outputs, outputs)}


def formula(x):
    """A score to which all numbers contribute together."""
    return (x.sin() * x.flip(0) * (1 + x.mean())).sum()


@pytest.mark.parametrize(("label", "sign"), [(7, 1), (3, -1), (None, None)])
@pytest.mark.parametrize("tokens", [False, True])
def test_heat_is_that_of_finite_differences(label, sign, tokens):
    shape = (1, 3, 5, 4) if tokens else (1, 3, 4, 2, 2)  # one token stands before four patches
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    heat_maps = interpret.saliency(Known(), {"x": x}, label)["stage"]
    flat = x.flatten(0, 1)
    sign = sign or (1 if formula(flat) > 0 else -1)
    slopes = torch.zeros_like(flat)
    for index in np.ndindex(*flat.shape):
        step = torch.zeros_like(flat)
        step[index] = 1e-5
        slopes[index] = sign * (formula(flat + step) - formula(flat - step)) / 2e-5
    for t in range(3):
        for i in range(2):
            for j in range(2):
                heat = 0.0
                for c in range(4):
                    if tokens:
                        slope = sum(float(slopes[t, 1 + q, c]) for q in range(4)) / 4
                        heat += slope * float(flat[t, 1 + 2 * i + j, c])
                    else:
                        slope = sum(float(slopes[t, c, q // 2, q % 2]) for q in range(4)) / 4
                        heat += slope * float(flat[t, c, i, j])
                assert heat_maps[t, i, j] == pytest.approx(max(0.0, heat), rel=1e-5, abs=1e-6)
    assert (heat_maps > 0).any()


def test_heat_of_a_run_is_that_of_float64_from_each_stage_on(heads_and_clips):
    head, _, clip, _ = heads_and_clips
    heat_maps = interpret.saliency(head, clip.batch, head.classes[1])
    assert list(heat_maps) == STAGES
    _, passed = head.traced(clip.batch)
    modules = [copy.deepcopy(stage).double() for stage in head.suffix.stages]
    weight = head._model.classifier.weight.double()
    for number, name in enumerate(STAGES):
        output = passed[name].outputs.detach().double().requires_grad_()
        x = output
        for module in modules[number + 1 :]:
            x = module(x)
        mean = x.mean(0)
        (slope,) = torch.autograd.grad(LENGTH * mean / mean.norm() @ weight[1], output)
        if name == "layer4.1":
            # Behind it there are but means, and the length, which takes from the class's vector
            # what lies along the clip's.
            unit = mean / mean.norm()
            across = LENGTH * (weight[1] - unit * (unit @ weight[1])) / mean.norm()
            closed = across.expand(2, -1) / (2 * 7 * 7)
            torch.testing.assert_close(slope.mean((2, 3)), closed)
        maps = np.stack([[(slope[t, c].mean() * output[t, c]).detach().numpy()
                          for c in range(output.shape[1])] for t in range(2)])  # fmt: skip
        expected = np.maximum(maps.sum(axis=1), 0)
        np.testing.assert_allclose(heat_maps[name], expected, atol=1e-3 * expected.max())
    assert head.traced(clip.batch)[0].shape == (1, 4)  # nothing is left behind


def test_the_class_is_the_predicted_one_by_default(heads_and_clips):
    head, _, clip, _ = heads_and_clips
    predicted = head.classes[int(head.scores(clip.batch).argmax())]
    for name, heat in interpret.saliency(head, clip.batch).items():
        assert np.array_equal(heat, interpret.saliency(head, clip.batch, predicted)[name])


def test_gates_that_learned_nothing_are_zero(gated, store):
    head, features = gated
    gate_maps = interpret.gates(head, interpret.clip(store, features, 0).batch)
    assert {name: x.shape for name, x in gate_maps.items()} == {
        name: (2, *(2 * [14 if name < "layer4" else 7])) for name in STAGES
    }
    assert not any(x.any() for x in gate_maps.values())


def test_a_gate_of_a_known_kernel_equals_a_loop(gated, store):
    head, features = copy.deepcopy(gated[0]), gated[1]
    batch = interpret.clip(store, features, 0).batch
    (gate,) = (m for m in head.traced(batch)[1]["layer4.0"].module.modules()
               if isinstance(m, HFGate))  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        gate.weight.copy_(0.01 * torch.randn(gate.weight.shape, generator=generator))
        gate.bias.fill_(-0.1)
    _, passed = head.traced(batch)
    a_TCHW = gate.inner(passed["layer4.0"].inputs).detach().double().numpy()
    padded = np.pad(a_TCHW, ((0, 1), (0, 0), (1, 1), (1, 1)))  # the last frame's next is zeros
    kernel = gate.weight[0].detach().double().numpy()  # C, 2, 3, 3
    gate_map = interpret.gates(head, batch)["layer4.0"]
    assert not gate_map[1].any()
    for t, i, j in np.ndindex(1, 7, 7):
        total = -0.1
        for step in range(2):
            total += (padded[t + step, :, i : i + 3, j : j + 3] * kernel[:, step]).sum()
        assert gate_map[t, i, j] == pytest.approx(math.tanh(total), abs=1e-4)
    assert np.abs(gate_map).max() > 0.01


def eq1(new_C, old_C) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(new_C, old_C, strict=True))
    lengths = [math.sqrt(sum(float(x) ** 2 for x in v)) + 1e-5 for v in (new_C, old_C)]
    return max(0.0, dot / lengths[0] / lengths[1])


@pytest.mark.parametrize("another", [False, True])
def test_hypercorrelations_are_those_of_equation_1(heads_and_clips, another):
    new, old, first_clip, second_clip = heads_and_clips
    other = second_clip.batch if another else None
    levels = interpret.hypercorrelations(new, old, first_clip.batch, other)
    assert {name: c.shape for name, c in levels.items()} == {
        "7 x 7": (2, 2, 7, 7, 7, 7), "14 x 14": (2, 2, 14, 14, 14, 14),
    }  # fmt: skip
    with torch.no_grad():
        _, now = new.traced(first_clip.batch)
        _, before = old.traced(second_clip.batch if another else first_clip.batch)
    rng = np.random.default_rng(3)
    for level, c in levels.items():
        names = [n for n in STAGES if now[n].outputs.shape[2] == c.shape[2]]
        for _ in range(10):
            t, block, i, j, u, v = index = tuple(int(rng.integers(n)) for n in c.shape)
            name = names[block]
            expected = eq1(now[name].outputs[t, :, i, j], before[name].outputs[t, :, u, v])
            assert c[index] == pytest.approx(expected, abs=1e-5), (level, index)
    mean = interpret.agreement(levels)["7 x 7"]
    c = levels["7 x 7"]
    total = sum(float(c[1, b, 2, 3, u, v]) for b, u, v in np.ndindex(2, 7, 7))
    assert mean[1, 2, 3] == pytest.approx(total / 98, rel=1e-5)
    assert mean.shape == (2, 7, 7)


def test_a_head_is_restored_as_it_was_after_a_task(heads_and_clips, finished_run, store, tmp_path):
    new, old, clip, _ = heads_and_clips
    assert (len(new.classes), len(old.classes)) == (4, 2)
    assert new.classes[:2] == old.classes
    same = interpret.hypercorrelations(old, old, clip.batch)["7 x 7"]
    for i, j in np.ndindex(7, 7):
        np.testing.assert_allclose(same[:, :, i, j, i, j], 1, atol=1e-4)
    moved = interpret.hypercorrelations(new, old, clip.batch)["7 x 7"]
    assert np.abs(moved - same).max() > 1e-3
    with pytest.raises(ValueError, match=r"task=2 of .*, whose tasks are 0 to 1"):
        restored(finished_run, store, 2)
    copied = shutil.copytree(finished_run.folder, tmp_path / "run")
    (copied / "checkpoints" / "task-00.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint of task 0"):
        restored(Run.read(copied), store, 0)


def test_the_pictures_are_those_that_the_network_saw(heads_and_clips, store):
    clip = heads_and_clips[2]
    assert clip.pictures.shape == (2, 224, 224, 3)
    assert clip.pictures.dtype == np.uint8
    network = backbones.load(NAME)
    with torch.no_grad():
        maps = network.run(torch.from_numpy(clip.pictures), ["layer2.1"])["layer2.1"]
    cached = clip.batch[READS][0]
    torch.testing.assert_close(maps, cached, rtol=1e-2, atol=1e-3 * float(cached.abs().max()))
    assert clip.label == store.clips.at[4, "label"]


def test_a_clip_is_found_by_its_path(heads_and_clips, gated, store):
    again = interpret.clip(store, gated[1], str(store.clips.at[4, "path"]))
    assert again.row == 4
    assert np.array_equal(again.pictures, heads_and_clips[2].pictures)


def test_clips_that_cannot_be_looked_at_are_refused(gated, store, tmp_path):
    features = gated[1]
    path = store.clips.at[0, "path"]
    for row in (999, -1):
        with pytest.raises(LookupError, match=f"no clips {row}: .* row from 0 to 11"):
            interpret.clip(store, features, row)
    with pytest.raises(LookupError, match=r"0 clips 'nothing.mp4'"):
        interpret.clip(store, features, "nothing.mp4")
    with pytest.raises(FileNotFoundError, match="dataset="):
        interpret.clip(store, features, 0, tmp_path)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"another video")
    with pytest.raises(ValueError, match="other bytes"):
        interpret.clip(store, features, path, tmp_path)


def test_heads_that_have_no_such_thing_are_refused(heads_and_clips):
    head, _, clip, _ = heads_and_clips
    both = {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in clip.batch.items()}
    for look in (interpret.saliency, interpret.gates):
        with pytest.raises(TypeError, match="NearestMean trains no part of the network"):
            look(NearestMean(), clip.batch)
        with pytest.raises(ValueError, match="a batch of 2 clips"):
            look(head, both)
        with pytest.raises(ValueError, match="nothing was learned yet"):
            look(Regularized(), clip.batch)
    with pytest.raises(ValueError, match="class 9 is none of those learned"):
        interpret.saliency(head, clip.batch, 9)
    with pytest.raises(ValueError, match="HCE has no gates"):
        interpret.gates(head, clip.batch)
    known = {READS: clip.batch[READS], "x": torch.ones(1, 3, 4, 2, 2)}
    with pytest.raises(ValueError, match=r"maps of layer3.0, .* and of stage"):
        interpret.hypercorrelations(head, Known(), known)


@pytest.mark.parametrize("rate", [{"stride": 1}, {"stride": 3}, {"fps": 4.0}], ids=str)
def test_pictures_of_whole_videos_are_the_frames_that_were_chosen_of_them(dataset, tmp_path, rate):
    folder = dataset(CLASSES, 3)
    spec = BuildSpec(NAME, "stem:pool", sampling="all", **rate)
    build(folder, tmp_path / "s.zarr", spec, runtime=Runtime(serial=True))
    store = FeatureStore.open(tmp_path / "s.zarr").sampled(frames=4)
    (feature,) = store.features()
    with av.open(str(folder / store.clips.at[5, "path"])) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    crop = choose_crop(feature.frame_set, *frames[0].size, "")
    expected = [apply_crop(frames[index], crop) for index in feature.indices(5).tolist()]
    pictures = interpret.clip(store, {"x": feature}, 5).pictures
    # Within the rounding of another conversion to RGB.
    assert np.abs(pictures.astype(int) - np.stack(expected)).mean() < 1
