"""Extraction: the results of clips, whoever asks for them, and the plugins that workers need."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from varve.pipeline import backbones, registry
from varve.pipeline.config import BuildSpec
from varve.pipeline.datasets.media import content_digest
from varve.pipeline.datasets.synthetic import broken_files
from varve.pipeline.extraction.extract import extract, file_work
from varve.pipeline.extraction.forward import NetworkDiffers
from varve.pipeline.extraction.passes import frames_only, passes
from varve.pipeline.extraction.worker import PluginMissing, load_plugins
from varve.stores import FeatureStore

NETWORK = "resnet18:random-0"
SPEC = BuildSpec((NETWORK,), ("stem:pool", "layer1.0:pool"), frames=2)
PLUGIN = """
from varve.pipeline.registry import register

@register("samplings", "every_other")
def every_other(num_frames, frames_per_clip, **options):
    return [0] * frames_per_clip
"""

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(("grow", "shrink"), 2, broken=True)


@pytest.fixture(scope="module")
def store(videos, built_once) -> FeatureStore:
    return FeatureStore.open(built_once(videos, SPEC))


@pytest.fixture(scope="module")
def requested(store):
    return passes(SPEC, {NETWORK: backbones.load(NETWORK)}, store, "cpu")


def test_cells_are_those_of_a_build_to_the_bit_and_failures_have_its_reasons(
    store, videos, requested
):
    table = store.clips
    files = [file_work(videos / clip["path"], content_digest(videos / clip["path"]), requested, row)
             for row, clip in table[table["digest"] != ""].iloc[::-1].iterrows()]  # fmt: skip
    results = list(extract(files, requested))
    assert [clip.work.rows[0] for clip in results] == [file.clips[0].rows[0] for file in files]
    (requested_pass,) = requested
    features = {output.spec.relative_path: store.feature(NETWORK, output.spec.feature)
                for output in requested_pass.outputs}  # fmt: skip
    for clip in results:
        (row,) = clip.work.rows
        assert (clip.failure.reason if clip.failure else "") == table.at[row, "reason"]
        assert (clip.facts is None) == (clip.failure is not None)
        if clip.failure:
            assert not clip.cells
            continue
        assert clip.facts.num_frames == table.at[row, "num_frames"]
        assert clip.cells.keys() == features.keys()
        for relative_path, feature in features.items():
            np.testing.assert_array_equal(
                clip.cells[relative_path], feature.bits(np.array([row]))[0]
            )
    assert {clip.failure.reason for clip in results if clip.failure} == {
        reason for path, reason in broken_files(videos) if reason
    }


def test_a_pass_without_outputs_gives_the_same_frames_in_this_process_and_runs_no_network(
    videos, requested, monkeypatch
):
    path = next(videos.rglob("clip_000.mp4"))
    frame_set = requested[0].frame_set
    (computed,) = extract([file_work(path, content_digest(path), requested)], requested)
    monkeypatch.setattr(
        "varve.pipeline.extraction.forward.network_of",
        lambda requested_pass: pytest.fail("a network ran"),
    )
    only = (frames_only(frame_set),)
    (decoded,) = extract([file_work(path, content_digest(path), only)], only, children=0)
    assert not decoded.cells
    np.testing.assert_array_equal(decoded.frames[frame_set], computed.frames[frame_set])


def test_another_network_under_the_same_name_is_refused(videos, requested):
    path = next(videos.rglob("clip_000.mp4"))
    files = [file_work(path, content_digest(path), requested)]
    other = {NETWORK: backbones.load("resnet18:random-1")}
    with pytest.raises(NetworkDiffers, match="from stage stem on"):
        list(extract(files, requested, other))


def test_workers_load_the_plugins_of_a_job_and_name_the_file_that_they_lack(tmp_path, monkeypatch):
    """As a scheduler's worker that was running before the build."""
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    monkeypatch.setenv(registry.VARIABLE, "")
    monkeypatch.setattr(registry, "_LOADED", {})
    with multiprocessing.get_context("spawn").Pool(1) as worker:
        assert "every_other" not in worker.apply(registry.available, ("samplings",))
        registry.load_plugin(file)
        try:
            files = registry.plugins()
        finally:
            registry.unregister("samplings", "every_other")
        worker.apply(load_plugins, (files,))
        assert "every_other" in worker.apply(registry.available, ("samplings",))
        with pytest.raises(PluginMissing, match=r"mine\.py.*Copy the builder's file"):
            worker.apply(load_plugins, (dict.fromkeys(files, "0" * 64),))
        with pytest.raises(PluginMissing, match=r"other\.py.*to the same path"):
            worker.apply(load_plugins, ({str(tmp_path / "other.py"): "0" * 64},))
