"""A user's own layout, decoder or sampling rule is one file, used without an edit elsewhere."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from varve import BuildSpec, FeatureStore, Runtime, build, plan
from varve.pipeline import registry
from varve.pipeline.config import FrameSet
from varve.pipeline.decoders import DecodePool, Request, Stretch, decode
from varve.pipeline.decoders.sampling import SamplingError, indices

SPEC = BuildSpec(("resnet18:random-0",), ("stem:pool",), frames=4)
SERIAL = Runtime(serial=True)

SAMPLING = """
from varve import register

@register("samplings", "middles")
def middles(times_N, frames):
    return [(2 * i + 1) * len(times_N) // (2 * frames) for i in range(frames)]
"""
DECODER = """
from varve import register
from varve.pipeline.decoders import pyav

@register("decoders", "wrapped")
def pictures(path, index, wanted_N):
    yield from pyav.pictures(path, index, wanted_N)
"""
LAYOUT = """
from varve import register
from varve.pipeline.datasets.layouts import ListedClip, Listing, clips_below

@register("layouts", "flat")
class Flat:
    SPECIFIC = 0
    NEEDS = "videos named CLASS_NUMBER.mp4"

    def recognise(self, root):
        return "flat names" if root.is_dir() and any(root.glob("*_*.mp4")) else None

    def read(self, root, split=None):
        if split is not None:
            raise ValueError(f"flat names have no split {split!r}")
        paths = sorted(path for path in clips_below(root) if "/" not in path and "_" in path)
        clips = tuple(ListedClip(path, path.rpartition("_")[0]) for path in paths)
        classes = tuple(sorted({clip.label for clip in clips}))
        return Listing(clips, classes, "flat", f"{len(clips)} flat names", root)

    def example(self, root):
        root.mkdir()
        for label in ("a b", "ç"):
            for number in (1, 2):
                (root / f"{label}_{number}.mp4").write_bytes(b"")
        return ["a b", "ç"]
"""
SUITE = "layout", "decoder", "sampling"


@pytest.fixture(scope="module")
def clips(dataset):
    return dataset(("grow", "fade in"), 2)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write the one file of a user, load it, and forget it after the test."""
    monkeypatch.setenv(registry.VARIABLE, "")
    path = tmp_path / "mine.py"

    def forget():
        registry._LOADED.pop(str(path), None)
        for variants in registry._REGISTERED.values():
            for name in [name for name, r in variants.items() if r.source == str(path)]:
                del variants[name]

    def load(text):
        forget()
        path.write_text(text)
        registry.load_plugin(path)
        return path

    yield load
    forget()


def cells(store):
    (feature,) = FeatureStore.open(store).features()
    return feature.read(list(range(len(feature.valid))))


def test_a_sampling_rule_of_a_user_is_one_file(clips, plugin, tmp_path, varve):
    build(clips, tmp_path / "reference.zarr", SPEC, runtime=SERIAL)
    path = plugin(SAMPLING)
    spec, store = replace(SPEC, sampling="middles"), tmp_path / "s.zarr"
    assert build(clips, store, spec, runtime=SERIAL).computed == 4
    np.testing.assert_array_equal(cells(store), cells(tmp_path / "reference.zarr"))
    # From the command line, which loads it from the environment alone: all is there.
    command = varve("plan", clips, "--store", store, "--backbone", "resnet18:random-0", "--keep",
                 "stem:pool", "--frames", 4, "--sampling", "middles")  # fmt: skip
    assert command.returncode == 0
    assert set(json.loads(os.environ[registry.VARIABLE])) == {str(path)}
    planned, _ = plan(clips, store, spec, runtime=SERIAL, estimate=False)
    assert planned.decodes == 0
    # An edited rule is another feature, even where it chooses the same frames.
    plugin(SAMPLING + "# edited\n")
    planned, _ = plan(clips, store, spec, runtime=SERIAL, estimate=False)
    assert planned.decodes == 4
    # Worker processes and their decoding children load the file too.
    report = build(clips, store, spec, runtime=Runtime(workers=1))
    assert report.computed == 4
    assert len(FeatureStore.open(store).features()) == 2


def test_a_decoder_of_a_user_is_one_file(clips, plugin, tmp_path):
    build(clips, tmp_path / "reference.zarr", SPEC, runtime=SERIAL)
    plugin(DECODER)
    store = tmp_path / "s.zarr"
    build(clips, store, replace(SPEC, decoder="wrapped"), runtime=SERIAL)
    assert set(FeatureStore.open(store).clips["decoder"]) == {"wrapped"}
    np.testing.assert_array_equal(cells(store), cells(tmp_path / "reference.zarr"))
    before = FrameSet(decoder="wrapped").identity()
    plugin(DECODER + "# edited\n")
    after = FrameSet(decoder="wrapped").identity()
    assert {name for name in before if before[name] != after[name]} == {"code"}


def test_a_layout_of_a_user_is_one_file(clips, plugin, tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    for path in sorted(clips.glob("*/*/*.mp4")):
        (root / f"{path.parent.name}_{path.stem[-1]}.mp4").write_bytes(path.read_bytes())
    plugin(LAYOUT)
    for layout in ("auto", "flat"):
        store = tmp_path / f"{layout}.zarr"
        build(root, store, SPEC, layout=layout, runtime=SERIAL)
        table = FeatureStore.open(store).clips
        assert set(table["label"]) == {"grow", "fade in"}
        assert set(table["status"]) == {"ready"}


def test_a_function_that_reads_a_directory_is_a_layout_that_auto_does_not_choose(
    clips, plugin, tmp_path
):
    from varve.pipeline.datasets.layouts import read

    plugin("""
from varve import register
from varve.pipeline.datasets.layouts import ListedClip, Listing

@register("layouts", "first")
def read(root, split=None):
    return Listing((ListedClip("a.mp4", "a"),), ("a",), "first", "one clip", root)
""")
    assert read(clips, "first").clips[0].label == "a"
    assert read(clips).layout == "class_folders"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0] * (frames - 1)", "returned .*: not 4 whole numbers from 0 to 9"),
        ("return [len(times_N)] * frames", "returned .*: not 4 whole numbers from 0 to 9"),
        ("return [0.5] * frames", "returned .*: not 4 whole numbers from 0 to 9"),
        ("return [1 // 0] * frames", "ZeroDivisionError"),
    ],
)
def test_a_rule_that_fails_is_no_fault_of_the_clip(plugin, videos, body, message):
    plugin(SAMPLING.partition("    return")[0] + f"    {body}\n")
    frame_set = FrameSet(frames=4, sampling="middles")
    with pytest.raises(SamplingError, match=message):
        indices(frame_set, np.arange(10) / 25)
    with pytest.raises(SamplingError, match="sampling 'middles'"):
        decode(Request(str(videos["h264.mp4"].path), (Stretch(),), (frame_set,)))


def test_a_rule_with_an_option_that_no_frame_set_has_is_refused(plugin):
    plugin(SAMPLING.replace("times_N, frames)", "times_N, frames, *, pace)"))
    with pytest.raises(ValueError, match="takes pace; the options of a rule are fps, stride"):
        FrameSet(sampling="middles")


def test_a_process_with_another_rule_refuses_to_decode_by_it(plugin, videos, monkeypatch):
    path = plugin(SAMPLING)
    frame_set = FrameSet(frames=4, sampling="middles")
    identity = frame_set.identity()
    assert FrameSet.of(identity) == frame_set
    request = Request(str(videos["h264.mp4"].path), (Stretch(),), (frame_set,))
    with DecodePool(1, 60) as pool:
        path.write_text(SAMPLING + "# edited while the build runs\n")
        with pytest.raises(RuntimeError, match="was edited while it is in use"):
            pool.submit(request).result()
    plugin(SAMPLING + "# edited\n")
    with pytest.raises(RuntimeError, match="their code has changed"):
        FrameSet.of(identity)
    registry.unregister("samplings", "middles")
    monkeypatch.setenv(registry.VARIABLE, "")
    with pytest.raises(RuntimeError, match="no 'middles' in samplings"):
        decode(request)


def run_suite(folder, text):
    (folder / "mine.py").write_text(text)
    options = [word for kind in SUITE for word in (f"--{kind}", "mine.py")]
    command = [sys.executable, "-m", "varve.contracts", *options, "-q", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != registry.VARIABLE}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_contract_suites_judge_a_file_of_a_user(tmp_path):
    whole = LAYOUT + DECODER + SAMPLING
    good = run_suite(tmp_path, whole)
    assert good.returncode == 0, good.stdout
    assert " passed" in good.stdout
    assert "failed" not in good.stdout
    faults = {
        '"flat", f"': '"flot", f"',
        "(path, index, wanted_N)\n": "(path, index, [wanted_N[0], *wanted_N[:-1]])\n",
        "(2 * frames)": "(2 * frames) - i % 2",
    }
    for right, wrong in faults.items():
        assert right in whole
        whole = whole.replace(right, wrong)
    bad = run_suite(tmp_path, whole)
    assert bad.returncode == 1
    for kind in SUITE:
        assert f"test_every_{kind}.py" in bad.stdout.partition("short test summary")[2], kind


def test_an_error_in_a_users_decoder_ends_the_build_and_blames_no_clip(clips, plugin, tmp_path):
    store = tmp_path / "s.zarr"
    build(clips, store, SPEC, runtime=SERIAL)
    plugin(DECODER.replace("yield from", "misspelt; yield from"))
    spec = replace(SPEC, decoder="wrapped")
    with pytest.raises(RuntimeError, match="decoder 'wrapped': NameError: name 'misspelt'"):
        build(clips, store, spec, runtime=SERIAL)
    assert set(FeatureStore.open(store).clips["status"]) == {"ready"}


def test_another_decoder_tries_again_what_one_could_not_read(clips, plugin, tmp_path):
    store = tmp_path / "s.zarr"
    error = "from varve.pipeline.decoders import Undecodable; raise Undecodable('corrupt', 'no')"
    refusing = DECODER.replace("yield from", f"{error}; yield from")
    plugin(refusing)
    spec = replace(SPEC, decoder="wrapped")
    assert build(clips, store, spec, runtime=SERIAL).clips == {"quarantined": 4}
    assert build(clips, store, spec, runtime=SERIAL).decoded == 0  # nothing has changed
    plugin(DECODER)
    assert build(clips, store, spec, runtime=SERIAL).clips == {"ready": 4}
    plugin(refusing)
    build(clips, store, spec, runtime=SERIAL)
    assert build(clips, store, SPEC, runtime=SERIAL).clips == {"ready": 4}
