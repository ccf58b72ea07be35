"""Updating: what a changed network costs a store, and from where each cell comes."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from varve import BuildSpec, Runtime, build, plan, update
from varve.heads.grafts.adapter import Adapter
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline import backbones
from varve.pipeline.backbones import _weights
from varve.pipeline.cli.format_store import plan_facts, plan_summary
from varve.pipeline.extraction import worker
from varve.pipeline.extraction.verify import verify
from varve.stores import FeatureStore, SpecMismatch, lock, staging
from varve.stores.columns import Column, ColumnSpec

SERIAL = Runtime(serial=True)
RESNET, VIT = "resnet18:random-0", "ViT-S-32:random-0"
CLASSES = ("grow", "shrink", "sway ↔")
KEEP = ("layer2.1", "layer3.1", "layer3.1:pool", "pool")

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


def spec(network=RESNET, keep=KEEP, **changes):
    return BuildSpec(**{"backbones": (network,), "keep": keep, "frames": 2, "dtype": "float32",
                        "text": False, **changes})  # fmt: skip


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(CLASSES, 2)


@pytest.fixture(scope="module")
def built(videos, built_once) -> Path:
    return built_once(videos, spec())


@pytest.fixture
def store(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "s.zarr"))


@pytest.fixture(scope="module")
def vit_store(videos, built_once) -> Path:
    return built_once(videos, spec(VIT, ("blocks.10.mlp", "blocks.11.attn:cls", "proj")))


def moved(backbone, *stages, factor=1.01):
    """The network with other numbers in some stages, as training would leave it."""
    new = backbone.unfreeze(*stages)
    with torch.no_grad():
        for name in stages:
            for parameter in new.stage(name).module.parameters():
                parameter.mul_(factor)
    return new


def read(store, report, feature, backbone=RESNET):
    column = FeatureStore.open(store).feature(
        backbone, feature, fingerprint=report.fingerprints[feature]
    )
    return column.read(np.flatnonzero(column.valid))


def column_facts(planned, store):
    return {column["feature"]: column for column in plan_facts(planned, None, store)["columns"]}


def files(root: Path) -> dict[str, bytes]:
    paths = [p for p in root.rglob("*") if p.is_file() and p.name != lock.FILE]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


@pytest.fixture
def no_videos(monkeypatch):
    monkeypatch.setattr(
        "varve.pipeline.extraction.schedule.decode",
        lambda job, block: pytest.fail("a video was decoded"),
    )


def count_calls(backbone, monkeypatch):
    """Calls of every stage's module, counted by the modules themselves."""
    calls = dict.fromkeys(backbone.stage_names, 0)
    for stage in backbone.stages:

        def counted(*args, name=stage.name, call=stage.module.forward):
            calls[name] += 1
            return call(*args)

        monkeypatch.setattr(stage.module, "forward", counted)  # fmt: skip
    return calls


@pytest.mark.parametrize(
    ("stage", "source", "runs"),
    [
        ("layer3.0", "layer2.1", ["layer3.0", "layer3.1", "layer4.0", "layer4.1", "pool"]),
        ("layer4.0", "layer3.1", ["layer4.0", "layer4.1", "pool"]),
        ("layer4.1", "layer3.1", ["layer4.0", "layer4.1", "pool"]),
    ],
)
def test_only_what_follows_the_deepest_valid_feature_is_run(
    store, resnet, stage, source, runs, no_videos
):
    new = moved(resnet, stage)
    planned, _ = plan(store, new, keep=["pool"], estimate=False)
    assert column_facts(planned, store)["pool"]["from"] == {f"{source} float32": 6}
    assert (planned.decodes, planned.clips, planned.calls(1)) == (0, 6, len(runs) * 2)
    report = update(store, new, keep=["pool"])
    batches = 2  # of four clips of two frames
    assert report.calls == {f"{RESNET} {name}": batches for name in runs}
    assert (report.decoded, report.computed, report.frames) == (0, 6, 12)
    assert report.bytes_read == 6 * 2 * 4 * int(np.prod(resnet.shapes[source]))
    assert read(store, report, "pool").shape == (6, 2, 512)


def test_an_update_equals_a_build_of_the_changed_network_bit_for_bit(store, resnet, videos):
    new = moved(resnet, "layer4.0")
    vectors = read(store, update(store, new, keep=["layer4.0", "pool"]), "pool")
    everything = moved(resnet, "layer4.0")
    # The same from the videos: no feature of the store is the new network's.
    shutil.rmtree(store / "features")
    report = update(store, everything, keep=["layer4.0", "pool"])
    assert report.decoded == 6
    assert report.calls[f"{RESNET} stem"] == 2
    np.testing.assert_array_equal(read(store, report, "pool"), vectors)


def test_a_second_update_computes_nothing(store, resnet):
    new = moved(resnet, "layer4.0")
    update(store, new, keep=["pool"])
    before = files(store / "features")
    report = update(store, new, keep=["pool"])
    assert (report.computed, report.calls, report.bytes_read) == (0, {}, 0)
    assert files(store / "features") == before


def test_the_previous_columns_stay_and_stay_the_default_for_their_name(store, resnet):
    before = files(store / "features")
    report = update(store, moved(resnet, "layer4.0"), keep=["pool"])
    after = files(store / "features")
    assert {name: after[name] for name in before} == before
    opened = FeatureStore.open(store)
    published = opened.feature("resnet18", "pool")
    assert published.spec.get("grafts") is None
    new = opened.feature("resnet18", "pool", fingerprint=report.fingerprints["pool"])
    assert new.spec["grafts"] == ["layer4.0"]
    assert not np.array_equal(published.read(), new.read())


def test_what_has_not_changed_is_not_computed_under_another_name(store, resnet):
    report = update(store, resnet.unfreeze("layer4.0"), keep=["pool"])
    assert report.computed == 0
    assert len(list(FeatureStore.open(store).columns())) == len(KEEP)


def test_requested_rows_are_computed_and_no_others(store, resnet):
    new = moved(resnet, "layer4.0")
    report = update(store, new, keep=["pool"], rows=[4, 1])
    feature = FeatureStore.open(store).feature(
        RESNET, "pool", fingerprint=report.fingerprints["pool"]
    )
    assert np.flatnonzero(feature.valid).tolist() == [1, 4]
    mask = np.zeros(6, bool)
    mask[[1, 5]] = True
    assert update(store, new, keep=["pool"], rows=mask).computed == 1
    assert update(store, new, keep=["pool"], rows=slice(2)).computed == 1
    assert update(store, new, keep=["pool"]).computed == 2
    by_parts = read(store, report, "pool")
    shutil.rmtree(feature.path)
    shutil.rmtree(f"{feature.path}.done")
    assert update(store, new, keep=["pool"]).computed == 6
    np.testing.assert_array_equal(read(store, report, "pool"), by_parts)
    for rows in ([6], [-1], [0.5], np.zeros(5, bool)):
        with pytest.raises(IndexError, match=r"rows|a mask of 5"):
            update(store, new, keep=["pool"], rows=rows)


def test_each_row_comes_from_its_deepest_valid_feature(store, resnet, videos):
    feature = FeatureStore.open(store).feature("resnet18", "layer3.1")
    column = Column(
        store, ColumnSpec(RESNET, "layer3.1", feature.fingerprint, feature.shape[1:], "float32", {})
    )
    marks = column.done(6)
    marks[[0, 3]] = 0
    column._write_done(marks)
    planned, _ = plan(store, moved(resnet, "layer4.0"), keep=["pool"], estimate=False)
    assert column_facts(planned, store)["pool"]["from"] == {
        "layer3.1 float32": 4, "layer2.1 float32": 2,
    }  # fmt: skip
    report = update(store, moved(resnet, "layer4.0"), keep=["pool"])
    assert report.calls[f"{RESNET} layer3.0"] == 1
    assert report.calls[f"{RESNET} layer4.0"] == 2
    assert f"{RESNET} layer2.1" not in report.calls


def test_a_pooled_map_feeds_no_block(videos, tmp_path, resnet):
    store = tmp_path / "s.zarr"
    build(videos, store, spec(keep=("layer3.1:pool", "layer3.1:grid7")), runtime=SERIAL)
    planned, _ = plan(store, moved(resnet, "layer4.0"), keep=["pool"], estimate=False)
    assert column_facts(planned, store)["pool"]["from"] == {"the video": 6}


def test_a_class_token_stands_in_after_the_last_attention_alone(
    vit_store, vit, tmp_path, no_videos
):
    store = Path(shutil.copytree(vit_store, tmp_path / "s.zarr"))
    last = vit.graft("blocks.11.mlp", Adapter(vit.stage("blocks.11.mlp").module, width=384))
    report = update(store, last, keep=["proj", "blocks.11.mlp:cls"])
    assert report.calls == {f"{VIT} blocks.11.mlp": 1, f"{VIT} proj": 1}
    assert report.bytes_read == 6 * 2 * 384 * 4
    published = FeatureStore.open(store).feature(VIT, "proj").read()
    np.testing.assert_allclose(read(store, report, "proj", VIT), published, rtol=1e-5, atol=1e-5)
    # All its tokens, or a change before the attention: the class token is not enough.
    planned, _ = plan(store, last, keep=["blocks.11.mlp"], estimate=False)
    assert column_facts(planned, store)["blocks.11.mlp"]["from"] == {"blocks.10.mlp float32": 6}
    planned, _ = plan(store, moved(vit, "blocks.11.attn"), keep=["proj"], estimate=False)
    assert column_facts(planned, store)["proj"]["from"] == {"blocks.10.mlp float32": 6}


class Mixing(nn.Module):
    """A user's module, that says nothing of itself, in the place of a token-wise stage."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.mean(dim=1, keepdim=True))


def test_a_module_that_does_not_declare_it_is_not_taken_to_be_token_wise(vit_store, vit, no_videos):
    new = vit.graft("blocks.11.mlp", Mixing(vit.stage("blocks.11.mlp").module))
    planned, _ = plan(vit_store, new, keep=["proj"], estimate=False)
    assert column_facts(planned, vit_store)["proj"]["from"] == {"blocks.10.mlp float32": 6}


def test_no_feature_claims_more_precision_than_it_was_computed_from(videos, tmp_path, resnet):
    store = tmp_path / "s.zarr"
    build(videos, store, spec(keep=("layer3.1",), dtype="bfloat16"), runtime=SERIAL)
    for dtype, source in [
        ("bfloat16", "layer3.1 bfloat16"), ("float16", "the video"), ("float32", "the video"),
    ]:  # fmt: skip
        planned, _ = plan(store, resnet, keep=["pool"], spec=spec(dtype=dtype), estimate=False)
        assert column_facts(planned, store)["pool"]["from"] == {source: 6}, dtype
    assert update(store, resnet, keep=["pool"], spec=spec(dtype="bfloat16")).decoded == 0
    column = FeatureStore.open(store).feature("resnet18", "pool")
    assert column.spec["resumed"] == ["bfloat16"]
    verified = verify(store, sample=3)
    assert (verified.findings, verified.equal + verified.close) == ([], 6)


def test_a_build_that_adds_a_feature_decodes_nothing(store, videos, no_videos):
    report = build(videos, store, spec(keep=(*KEEP, "layer4.0")), runtime=SERIAL)
    assert (report.decoded, report.computed) == (0, 6)
    assert report.calls == {f"{RESNET} layer4.0": 2}


def test_another_number_format_of_the_same_feature_calls_nothing(store, videos, no_videos):
    report = build(videos, store, spec(dtype="float16"), runtime=SERIAL)
    assert (report.decoded, report.calls) == (0, {})
    opened = FeatureStore.open(store)
    halves = [f for f in opened.features() if f.dtype == "float16"]
    assert len(halves) == len(KEEP)
    for half in halves:
        (whole,) = [f for f in opened.features() if (f.name, f.dtype) == (half.name, "float32")]
        np.testing.assert_array_equal(half.read(), whole.read().astype(np.float16))
        assert half.spec.get("resumed") is None


def test_the_same_weights_under_another_name_call_nothing(videos, tmp_path, no_videos, built):
    with _weights.seeded(0):
        network = torchvision.models.resnet18()
    save_file(network.state_dict(), tmp_path / "other.safetensors")
    store = Path(shutil.copytree(built, tmp_path / "s.zarr"))
    name = f"resnet18:{tmp_path / 'other.safetensors'}"
    report = build(videos, store, spec(name), runtime=SERIAL)
    assert (report.decoded, report.calls) == (0, {})
    opened = FeatureStore.open(store)
    np.testing.assert_array_equal(
        opened.feature(name, "pool").read(), opened.feature(RESNET, "pool").read()
    )


def test_workers_give_the_same_bytes_as_this_process(store, resnet, tmp_path):
    """A module of this file, too: workers are given the network, and need not find it by name."""
    other = Path(shutil.copytree(store, tmp_path / "other.zarr"))
    new = moved(resnet, "layer4.1").graft("layer4.0", Tinted(resnet.stage("layer4.0").module))
    here = update(store, new, keep=["layer4.0:pool", "pool"])
    there = update(other, new, keep=["layer4.0:pool", "pool"], runtime=Runtime(workers=2))
    assert here.calls == there.calls
    assert files(store / "features") == files(other / "features")


class Tinted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.tint = nn.Parameter(torch.linspace(0.5, 1.5, 512))

    def forward(self, x):
        return self.inner(x) * self.tint[:, None, None]


def test_an_update_that_was_killed_resumes_to_the_same_bytes(store, resnet, tmp_path, monkeypatch):
    other = Path(shutil.copytree(store, tmp_path / "other.zarr"))
    new = moved(resnet, "layer4.0")
    update(other, new, keep=["pool"])
    monkeypatch.setattr("varve.pipeline.extraction.blocks.MAX_CACHED_CLIPS", 2)
    put, count = staging.put, []

    def dies(*args):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(put(*args))
        return count[-1]

    with monkeypatch.context() as patch:
        patch.setattr("varve.stores.staging.put", dies)
        with pytest.raises(KeyboardInterrupt):
            update(store, new, keep=["pool"])
    report = update(store, new, keep=["pool"])
    assert (report.adopted, report.computed) == (4, 2)
    assert files(store / "features") == files(other / "features")
    assert not (store / ".staging").exists()


def test_the_callers_threads_modules_and_table_are_not_changed(store, resnet):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    new = moved(resnet, "layer4.0")
    new.stage("layer4.0").module.train()
    table = (store / "clips.parquet").read_bytes()
    update(store, new, keep=["pool"])
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    assert new.stage("layer4.0").module.training
    assert new.stage("layer4.0").module.conv1.weight.requires_grad
    assert (store / "clips.parquet").read_bytes() == table


def test_a_number_that_the_dtype_cannot_store_is_reported_and_nothing_is_quarantined(store, resnet):
    new = moved(resnet, "layer4.1", factor=30.0)
    half = spec(dtype="float16")
    report = update(store, new, keep=["layer4.1:pool"], spec=half)
    if not len(report.failed):
        new = moved(resnet, "layer4.1", factor=3000.0)
        report = update(store, new, keep=["layer4.1:pool"], spec=half)
    assert set(report.failed["reason"]) == {"not_finite"}
    assert "keep it with --dtype float32 or bfloat16" in report.failed["detail"].iloc[0]
    assert set(FeatureStore.open(store).clips["status"]) == {"ready"}
    assert build(FeatureStore.open(store).attributes["dataset"], store, spec(),
                 runtime=SERIAL).computed == 0  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b, ["layer9"]), "no backbone has a stage 'layer9'; stages are"),
        (lambda b: (b, ["layer3.1:cls"]), "layer3.1:cls: the stage gives a map"),
        (lambda b: (backbones.load(RESNET, torch.bfloat16), ["pool"]),
         "has resnet18:random-0 in float32, and this backbone runs in bfloat16"),
        (lambda b: (b.graft("layer4.0", TemporalShift(b.stage("layer4.0").module, frames=4)),
                    ["pool"]), "layer4.0 is a temporal module over 4 frames, and the clips have 2"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_refused_before_anything_runs(
    store, resnet, change, message
):
    before = files(store)
    backbone, keep = change(resnet)
    for call in (update, plan):
        with pytest.raises(ValueError, match=message):
            call(store, backbone, keep=keep)
    assert files(store) == before


def test_a_store_without_its_build_options_is_refused(store, resnet):
    opened = FeatureStore.open(store)
    del opened.attributes["request"]
    opened.set_attributes({})
    with pytest.raises(SpecMismatch, match="build it once more with this version"):
        update(store, resnet, keep=["pool"])
    assert update(store, resnet, keep=["pool"], spec=spec()).computed == 0


def test_two_writers_of_one_store_are_kept_apart(store, resnet):
    with lock.locked(store), pytest.raises(lock.StoreLocked):
        update(store, resnet, keep=["pool"])


def test_every_view_of_the_clips_is_brought_up_to_date(videos, tmp_path, resnet, no_videos):
    store = tmp_path / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varve.pipeline.extraction.schedule.decode", worker.decode)
        build(videos, store, spec(keep=("layer3.1", "pool"), views=2, flip=True), runtime=SERIAL)
    report = update(store, moved(resnet, "layer4.0"), keep=["pool"])
    assert report.computed == 6
    assert report.fingerprints["pool", 0] != report.fingerprints["pool", 1]
    assert report.frames == 24


def test_a_plan_reports_where_each_column_comes_from_and_what_is_called(store, resnet):
    planned, seconds = plan(store, moved(resnet, "layer4.0"), keep=["pool"])
    text = plan_summary(planned, seconds, store)
    assert "pool  (2, 512) float32: 0 valid, 0 stale, 6 missing (6 from layer3.1 float32)" in text
    assert ("from layer3.1 float32: 6 clips in 2 batches through layer4.0 to pool "
            "(3 of 11 stages), 6 block calls") in text  # fmt: skip
    assert "0 files to decode, 6 clips to compute, 6 block calls" in text
    assert seconds.decode_seconds == 0 < seconds.forward_seconds


def test_the_reported_calls_are_the_actual_calls(store, resnet, monkeypatch):
    new = moved(resnet, "layer4.0")
    taken = {}
    snapshot = backbones.snapshot

    def counting(backbone):
        frozen = snapshot(backbone)
        frozen.keys("")  # a patched forward is another key; these are taken before
        for stage in frozen.stages:
            stage._digests.setdefault("identity", stage.identity())
        taken.update(calls=count_calls(frozen, monkeypatch))
        return frozen

    monkeypatch.setattr("varve.pipeline.extraction.update.snapshot", counting)
    report = update(store, new, keep=["pool"])
    calls = {f"{RESNET} {name}": n for name, n in taken["calls"].items() if n}
    assert calls == report.calls


def test_what_is_around_a_call_decides_no_value(store, resnet, tmp_path):
    other = Path(shutil.copytree(store, tmp_path / "other.zarr"))
    new = moved(resnet, "layer4.0")
    update(store, new, keep=["pool"])
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        update(other, new, keep=["pool"])
    assert files(store / "features") == files(other / "features")


def test_two_stores_are_updated_by_one_network_at_once(store, resnet, tmp_path):
    stores = [Path(shutil.copytree(store, tmp_path / f"{i}.zarr")) for i in range(3)]
    new = moved(resnet, "layer4.0")
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda path: update(path, new, keep=["pool"]), stores))
    assert [report.computed for report in reports] == [6, 6, 6]
    contents = [files(path / "features") for path in stores]
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("puts", [5, 6, 7])
def test_builds_stopped_twice_end_in_the_bytes_of_an_undisturbed_one(
    videos, built_once, tmp_path, monkeypatch, puts
):
    """A rounded feature of the same request must not stand in for the video it came from."""
    monkeypatch.setattr("varve.pipeline.extraction.blocks.CPU_BLOCK_PICTURES", 8)
    requested = spec(keep=("layer4.0", "layer4.0:grid7", "layer4.0:pool", "pool"), dtype="float16")
    whole, store = built_once(videos, requested), tmp_path / "s.zarr"
    real, left = {"put": staging.put, "write": Column.write_shard}, {}

    def dying(name):
        def call(*arguments):
            if not left[name]:
                raise KeyboardInterrupt
            left[name] -= 1
            return real[name](*arguments)

        return call

    for name, count in (("put", puts), ("write", 1)):
        left = {"put": 99, "write": 99, name: count}
        with monkeypatch.context() as patch:
            patch.setattr("varve.stores.staging.put", dying("put"))
            patch.setattr(Column, "write_shard", dying("write"))
            with pytest.raises(KeyboardInterrupt):
                build(videos, store, requested, runtime=SERIAL)
    build(videos, store, requested, runtime=SERIAL)
    assert files(store / "features") == files(whole / "features")
