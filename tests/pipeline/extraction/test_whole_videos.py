"""Whole videos: every frame once, in pages; any sampling of them afterwards."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr

from varve import BuildSpec, FeatureStore, Runtime, ablate, build, plan, run
from varve.pipeline.backbones import load
from varve.pipeline.config import PAGE_FRAMES, FrameSet, Picture
from varve.pipeline.datasets.media import size_and_mtime
from varve.pipeline.decoders import Request, Stretch, decode
from varve.pipeline.decoders.sampling import kept
from varve.pipeline.extraction import blocks, estimate, extract
from varve.pipeline.extraction.update import update
from varve.pipeline.extraction.verify import verify
from varve.stores import Damaged, SpecMismatch, VideoFeature, atomic, pages

SERIAL = Runtime(serial=True)
SPEC = BuildSpec("resnet18:random-0", ("stem:pool", "layer1.0:pool"), sampling="all",
                 dtype="float32")  # fmt: skip
FRAMES = {"long.mp4": 150, "short.mp4": 20}
X264 = {"g": "12", "bf": "2", "preset": "veryfast"}

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


class Killed(BaseException):
    """Stands for a kill: nothing catches it on the way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encode) -> Path:
    """A long and a short video of two classes, and a file that is no video."""
    root = tmp_path_factory.mktemp("whole") / "set"
    for (name, frames), label in zip(FRAMES.items(), ("ant", "bee"), strict=True):
        (root / "train" / label).mkdir(parents=True)
        encode(root / "train" / label / name, "libx264", frames=frames, **X264)
        (root / "test" / label).mkdir(parents=True)
        encode(root / "test" / label / name, "libx264", frames=frames - 10, **X264)
    (root / "test" / "bee" / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def built(folder, built_once) -> Path:
    return built_once(folder, SPEC)


@pytest.fixture
def store(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "s.zarr"))


def bytes_of(store: Path) -> dict[str, bytes]:
    files = (p for p in store.rglob("*") if p.is_file() and "logs" not in p.parts)
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def row_of(store: Path, path: str) -> int:
    table = FeatureStore.open(store).clips
    return int(table.index[table["path"] == path][0])


def direct(folder: Path, store: Path, spec: BuildSpec) -> dict[str, np.ndarray]:
    """Cells of a build of its own, by feature."""
    build(folder, store, spec, runtime=SERIAL)
    features = FeatureStore.open(store).features()
    return {feature.name: feature.read(np.flatnonzero(feature.valid)) for feature in features}


def assert_same(cells: np.ndarray, expected: np.ndarray, frames: int) -> None:
    """Check bits where a direct build has batches of 8 frames too; else the rounding of batches."""
    if 8 % frames == 0:
        np.testing.assert_array_equal(cells, expected)
    else:
        np.testing.assert_allclose(cells, expected, rtol=1e-5, atol=1e-6)


def test_the_constant_of_pages_is_one():
    assert pages.PAGE_FRAMES == PAGE_FRAMES


def test_every_frame_of_every_clip_is_kept_with_its_time_and_index(built):
    opened = FeatureStore.open(built)
    table = opened.clips
    assert table["status"].value_counts().to_dict() == {"ready": 4, "quarantined": 1}
    assert table.loc[row_of(built, "test/bee/broken.mp4"), "reason"] == "not_video"
    for feature in opened.features():
        assert isinstance(feature, VideoFeature)
        assert feature.shape[:2] == (3 + 3 + 1 + 1, PAGE_FRAMES)
        for row in np.flatnonzero(feature.valid):
            frames = int(table.at[row, "num_frames"])
            assert feature.clip(row).shape == (frames, *feature.shape[2:])
            assert feature.frames(row).tolist() == list(range(frames))
            np.testing.assert_allclose(feature.times(row), np.arange(frames) / 25, atol=1e-3)
    with pytest.raises(LookupError, match="not_video"):
        feature.clip(row_of(built, "test/bee/broken.mp4"))
    with pytest.raises(TypeError, match=r"sampled\(frames=8\)"):
        feature.read()


@pytest.mark.parametrize(
    "sampling",
    [
        {"frames": 8},
        {"frames": 4},
        {"frames": 3, "sampling": "uniform_fps", "fps": 2.0},
        {"frames": 4, "sampling": "dense", "stride": 3},
        {"frames": 5, "sampling": "tsn_random"},
    ],
    ids=str,
)
def test_any_sampling_is_that_of_a_direct_build_and_decodes_nothing(
    folder, store, tmp_path, sampling
):
    spec = BuildSpec("resnet18:random-0", SPEC.keep, dtype="float32", **sampling)
    expected = direct(folder, tmp_path / "direct.zarr", spec)
    opened = FeatureStore.open(store)
    for name, cells in expected.items():
        sampled = opened.feature("resnet18", name).sampled(**sampling)
        rows = np.flatnonzero(sampled.valid)
        assert_same(sampled.read(rows), cells, spec.frames)
        assert sampled.shape == (5, spec.frames, *cells.shape[2:])
        np.testing.assert_array_equal(sampled.to_dask()[rows].compute(), sampled.read(rows))
        items = sampled.dataset()
        np.testing.assert_array_equal(items[0][0], sampled.read(rows[:1])[0])
    report = build(folder, store, spec, runtime=SERIAL)
    assert (report.decoded, report.computed, report.calls) == (0, 4, {})
    columns = [f for f in FeatureStore.open(store).features() if not isinstance(f, VideoFeature)]
    for column in columns:
        cells = column.read(np.flatnonzero(column.valid))
        assert_same(cells, expected[column.name], spec.frames)


def test_eight_frames_have_the_bits_of_a_direct_build(folder, store, tmp_path):
    spec = BuildSpec("resnet18:random-0", SPEC.keep, dtype="float32", frames=8)
    opened = FeatureStore.open(store)
    for name, cells in direct(folder, tmp_path / "direct.zarr", spec).items():
        sampled = opened.feature("resnet18", name).sampled(frames=8)
        np.testing.assert_array_equal(sampled.read(np.flatnonzero(sampled.valid)), cells)


def test_later_stages_come_from_the_pages_and_stages_over_time_are_refused(folder, store):
    report = build(folder, store, replace(SPEC, keep=("layer1.1:pool",)), runtime=SERIAL)
    assert report.decoded == 4  # a pooled map has no inverse
    with pytest.raises(ValueError, match="whole videos have any number"):
        plan(folder, store, replace(SPEC, backbones=("tsm_resnet18:random-0",), keep=()),
             runtime=SERIAL)  # fmt: skip


@pytest.mark.parametrize("rate", [{"stride": 2}, {"stride": 4}, {"fps": 5.0}], ids=str)
def test_fewer_frames_come_from_more_without_decoding(folder, store, tmp_path, rate):
    spec = replace(SPEC, **rate)
    report = build(folder, store, spec, runtime=SERIAL)
    assert (report.decoded, report.calls) == (0, {})
    build(folder, tmp_path / "direct.zarr", spec, runtime=SERIAL)
    grid = FrameSet(sampling="all", **rate).grid
    opened, alone = FeatureStore.open(store), FeatureStore.open(tmp_path / "direct.zarr")
    for feature in alone.features():
        (same,) = [f for f in opened.features() if f.fingerprint == feature.fingerprint]
        assert same.spec["pages"] == grid
        for row in np.flatnonzero(feature.valid):
            np.testing.assert_array_equal(same.frames(row), feature.frames(row))
            np.testing.assert_array_equal(same.clip(row), feature.clip(row))


def test_uneven_times_are_kept_by_their_presentation(videos, tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    shutil.copy(videos["uneven.mp4"].path, tmp_path / "set" / "a" / "uneven.mp4")
    spec = replace(SPEC, keep=("stem:pool",), fps=4.0)
    build(tmp_path / "set", tmp_path / "s.zarr", spec, runtime=SERIAL)
    (feature,) = FeatureStore.open(tmp_path / "s.zarr").features()
    ticks = np.array([n * 40 + 17 * (n % 3) + 300 * (n // 20) for n in range(60)]) / 1000
    moments = np.arange(0, ticks[-1] + 1e-6, 0.25)
    shown = np.unique(np.searchsorted(ticks, moments + 1e-6, side="right") - 1)
    assert feature.frames(0).tolist() == shown.tolist()
    np.testing.assert_allclose(feature.times(0), ticks[shown], atol=1e-3)


def test_stretches_of_one_file_share_its_pages(folder, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    shutil.copy(folder / "train" / "ant" / "long.mp4", root / "film.mp4")
    lines = ["path,label,start,end", "film.mp4,a,0,1", "film.mp4,b,0.5,1.5", "film.mp4,a,5.2,"]
    (root / "clips.csv").write_text("\n".join(lines))
    spec = replace(SPEC, keep=("stem:pool",))
    report = build(root, tmp_path / "s.zarr", spec, runtime=SERIAL)
    assert report.clips == {"ready": 3}
    assert report.frames == 64 + 22  # the second of three pages has no frame of a clip
    (feature,) = FeatureStore.open(tmp_path / "s.zarr").features()
    assert feature.valid_cells.tolist() == [True, False, True]
    assert [feature.frames(row)[[0, -1]].tolist() for row in range(3)] == [
        [0, 24], [13, 37], [130, 149],
    ]  # fmt: skip
    np.testing.assert_array_equal(feature.clip(0)[13:], feature.clip(1)[:12])


def test_windows_slide_over_a_clip(built):
    feature = FeatureStore.open(built).feature("resnet18", "stem:pool")
    row = row_of(built, "train/bee/short.mp4")  # 0.8 s
    windows = list(feature.windows(row, seconds=0.4, step=0.2))
    np.testing.assert_allclose([start for start, _ in windows], [0, 0.2, 0.4, 0.6])
    assert [len(values) for _, values in windows] == [10, 10, 10, 5]
    np.testing.assert_array_equal(windows[1][1], feature.clip(row)[5:15])
    with pytest.raises(ValueError, match="above 0"):
        next(feature.windows(row, seconds=0.0))


def test_other_libraries_read_the_pages_and_their_times(built):
    feature = FeatureStore.open(built).feature("resnet18", "stem:pool")
    row = row_of(built, "train/ant/long.mp4")
    page = int(feature.spans[row, 1] - 1) // PAGE_FRAMES
    last = feature.clip(row)[2 * PAGE_FRAMES :]
    array = zarr.open_array(feature.path, mode="r")
    assert array.metadata.dimension_names[:2] == ("page", "frame")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(feature.path)}}
    other = tensorstore.open(spec).result()
    for values in (array[page], other[page].read().result()):
        np.testing.assert_array_equal(values[: len(last)], last)
        assert np.isnan(values[len(last) :]).all()
    grid = xarray.open_zarr(built / "frames" / "stride-1", consolidated=False)
    assert grid["times"].dims == ("page", "frame")
    np.testing.assert_array_equal(grid["indices"][page, : len(last)], np.arange(128, 150))
    np.testing.assert_allclose(grid["times"][page, : len(last)], np.arange(128, 150) / 25)


def test_verification_reads_every_page_and_names_the_file_of_a_damaged_one(store):
    whole = verify(store, sample=2)
    assert (whole.chunks, whole.whole, whole.findings) == (2 * 8, 2, [])
    feature = FeatureStore.open(store).feature("resnet18", "stem:pool")
    page = int(feature.spans[0, 0]) // PAGE_FRAMES
    shard = store / feature.shard_of(page)
    data = bytearray(shard.read_bytes())
    data[page * (PAGE_FRAMES * 64 * 4 + 4)] ^= 1
    shard.write_bytes(data)
    (finding,) = verify(store, sample=0).findings
    assert finding.clip == feature.path_of(page)
    assert "does not match its checksum" in finding.problem
    with pytest.raises(Damaged, match="does not match its checksum"):
        FeatureStore.open(store).feature("resnet18", "stem:pool").clip(0)


def test_a_kill_in_the_middle_of_a_film_costs_the_pages_in_flight(
    folder, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "CPU_BLOCK_PICTURES", PAGE_FRAMES)
    store, real, count = tmp_path / "s.zarr", atomic.write, 0

    def dying(where, target, *pieces):
        nonlocal count
        count += target.suffix == ".npz"
        if count > 3:
            raise Killed
        real(where, target, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", dying)
        with pytest.raises(Killed):
            build(folder, store, SPEC, runtime=SERIAL)
    report = build(folder, store, SPEC, runtime=SERIAL)
    assert report.adopted == 3
    assert report.frames < sum(FRAMES.values()) * 2 - 20
    assert bytes_of(store) == bytes_of(built)


def test_a_page_that_fails_is_a_failure_of_its_clips_alone(folder, tmp_path, monkeypatch):
    real = extract.decode_files

    def failing(files, passes, children, deadline):
        results = real(files, passes, children, deadline)
        return [
            replace(r, frames={}, failure=extract.Failure("corrupt", "a bad part"))
            if r.work.part and r.work.part[0] == PAGE_FRAMES and "train" in files[0].path else r
            for r in results
        ]  # fmt: skip

    monkeypatch.setattr("varve.pipeline.extraction.worker.decode_files", failing)
    report = build(folder, tmp_path / "s.zarr", replace(SPEC, keep=("stem:pool",)), runtime=SERIAL)
    assert report.clips == {"ready": 3, "quarantined": 2}
    table = FeatureStore.open(tmp_path / "s.zarr").clips
    clip = table.loc[row_of(tmp_path / "s.zarr", "train/ant/long.mp4")]
    assert clip["reason"] == "corrupt"
    assert clip["detail"].startswith("frames 64 to 127, from 2.56 s on: a bad part")


@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_a_lost_table_of_pages_is_reported_and_costs_no_computation(
    folder, built, store, varve, damage
):
    table = store / "frames.stride-1.parquet"
    table.write_bytes(b"no table") if damage == "damaged" else table.unlink()
    word = "is damaged" if damage == "damaged" else "is missing"
    for command in (("info", store), ("verify", store, "--sample", 0)):
        done = varve(*command)
        assert done.returncode in (1, 2)
        text = " ".join((done.stdout + done.stderr).split())
        assert word in text
        assert "build again: the times of all videos are read again" in text.replace(
            "Build", "build"
        )
    (finding, *_) = verify(store, sample=0).findings
    assert "frames.stride-1.parquet" in finding.problem
    options = ["--backbone", "resnet18:random-0", "--keep", "stem:pool", "--keep", "layer1.0:pool",
               "--sampling", "all", "--dtype", "float32", "--serial"]  # fmt: skip
    if damage == "damaged":
        assert (
            "Remove it and build again" in varve("build", folder, "--store", store, *options).stderr
        )
        table.unlink()
    done = varve("build", folder, "--store", store, *options)
    assert "is missing" in done.stderr
    assert done.returncode == 1  # one clip is broken
    assert bytes_of(store) == bytes_of(built)
    report = build(folder, store, SPEC, runtime=SERIAL)
    assert report.computed == 0


def test_a_data_set_without_one_video_that_can_be_read_is_quarantined(tmp_path):
    (tmp_path / "set" / "ant").mkdir(parents=True)
    (tmp_path / "set" / "ant" / "broken.mp4").write_bytes(b"no video")
    for _ in range(2):
        report = build(tmp_path / "set", tmp_path / "s.zarr", SPEC, runtime=SERIAL)
        assert report.clips == {"quarantined": 1}
    assert report.quarantined["reason"].tolist() == ["not_video"]


def test_pages_are_decoded_one_after_the_other_from_anywhere(folder):
    path = str(folder / "train" / "ant" / "long.mp4")
    frame_set = FrameSet(sampling="all", picture=Picture(96, 96))
    (timeline,) = decode(Request(path, (), (frame_set,)))
    assert timeline.kept_K.tolist() == kept(frame_set, timeline.times_N).tolist()
    whole = FrameSet(frames=150, sampling="tsn", picture=Picture(96, 96))
    (expected,) = decode(Request(path, (Stretch(),), (whole,)))
    for page in ((0, 64), (64, 64), (128, 22), (100, 3), (0, 2)):
        (part,) = decode(Request(path, (Stretch(part=page),), (frame_set,)))
        first, count = page
        np.testing.assert_array_equal(part.frames[0], expected.frames[0][first : first + count])


def test_children_share_the_parts_of_a_film(folder, monkeypatch):
    path, picture = folder / "train" / "ant" / "long.mp4", Picture(96, 96)
    frame_set = FrameSet(sampling="all", picture=picture)
    pass_ = SimpleNamespace(frame_set=frame_set)
    monkeypatch.setattr(extract, "PART_PAGES", 1)
    size, mtime = size_and_mtime(path)
    pages = [(0, 64), (64, 64), (128, 22)]
    works = [
        extract.FileWork(str(path), size, mtime,
                         (extract.ClipWork((i,), b"key", None, None, {0: ()}, part=page),))
        for i, page in enumerate(pages)
    ]  # fmt: skip
    decode = partial(extract.decode_files, works, (pass_,), deadline_seconds=60)
    real, used = extract._decode_pool, []
    monkeypatch.setattr(extract, "_decode_pool", lambda *key: used.append(key) or real(*key))
    for alone, shared in zip(decode(children=0), decode(children=2), strict=True):
        np.testing.assert_array_equal(alone.frames[frame_set], shared.frames[frame_set])
        assert len(alone.frames[frame_set]) == alone.work.part[1]
    assert used[0] == used[2] != used[1]
    assert {number for _, _, number in used} == {0, 1}


def test_replaced_added_and_equal_bytes_are_computed_once(folder, store, tmp_path):
    videos = Path(shutil.copytree(folder, tmp_path / "set"))
    ant, bee = videos / "train" / "ant" / "long.mp4", videos / "train" / "bee" / "short.mp4"
    film = (videos / "test" / "ant" / "long.mp4").read_bytes()
    spec = replace(SPEC, keep=("stem:pool",))
    bee.write_bytes(film)  # the bytes of another clip
    report = build(videos, store, spec, runtime=SERIAL)
    assert (report.changed, report.computed, report.decoded) == (1, 0, 0)
    assert report.clips == {"ready": 4, "quarantined": 1}
    # No clip has the pages of `short.mp4` any more, and other files are still recognised.
    shutil.copy(folder / "train" / "bee" / "short.mp4", ant)
    shutil.copy(folder / "train" / "ant" / "long.mp4", ant.with_name("added.mp4"))
    report = build(videos, store, spec, runtime=SERIAL)
    assert (report.changed, report.new, report.computed) == (1, 1, 0)
    assert report.clips == {"ready": 5, "quarantined": 1}
    with open(ant.with_name("added.mp4"), "ab") as file:
        file.write(b"\0\0\0\x08free")  # other bytes of the same frames
    report = build(videos, store, spec, runtime=SERIAL)
    assert (report.changed, report.computed, report.decoded) == (1, 3, 1)
    assert report.clips == {"ready": 5, "quarantined": 1}
    feature = FeatureStore.open(store).feature("resnet18", "stem:pool")
    lengths = {row: len(feature.clip(row)) for row in np.flatnonzero(feature.valid).tolist()}
    names = {path: lengths[row_of(store, path)] for path in ("train/ant/long.mp4",
             "train/ant/added.mp4", "train/bee/short.mp4")}  # fmt: skip
    assert names == {"train/ant/long.mp4": 20, "train/ant/added.mp4": 150,
                     "train/bee/short.mp4": 140}  # fmt: skip
    with pytest.raises(LookupError, match=r"broken\.mp4"):
        feature.times(row_of(store, "test/bee/broken.mp4"))


def test_a_sweep_over_the_number_of_frames_computes_nothing(store, tmp_path):
    table = ablate(store, "nearest_mean", "1+1x1", {"frames": [2, 4, 8]}, 1,
                   options={"nearest_mean": {"feature": "layer1.0:pool"}}, out=tmp_path,
                   runtime=SERIAL)  # fmt: skip
    assert table["sampled.frames"].tolist() == [2, 4, 8]
    assert not table.attrs["errors"]
    single = run(store, "nearest_mean", "1+1x1", options={"feature": "layer1.0:pool"},
              sampled={"frames": 4}, out=tmp_path)  # fmt: skip
    assert str(single.folder) in {record["run"] for record in table.attrs["runs"]}
    with pytest.raises(SpecMismatch, match="--frames 8 --sampling tsn"):
        run(store, "nearest_mean", "1+1x1", options={"feature": "layer1.0:pool"}, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 2, "fps": 2.0}, "not both"),
        ({"fps": float("inf")}, "finite"),
        ({"views": 2, "flip": True}, "one view"),
    ],
)
def test_whole_videos_have_one_rate_and_one_view(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **options)


PAGES = replace(SPEC, keep=("layer1.1:pool",))
FOUR = BuildSpec("resnet18:random-0", ("layer1.1:pool",), frames=4, dtype="float32")


@pytest.mark.parametrize(
    ("keep", "spec"), [("stem:pool", PAGES), ("layer1.0", PAGES), ("layer1.0", FOUR)]
)
def test_a_plan_counts_the_batches_that_a_build_runs(tmp_path, monkeypatch, encode, keep, spec):
    monkeypatch.setattr(estimate, "FORWARD_SECONDS", 0.01)
    root, store = tmp_path / "set", tmp_path / "s.zarr"
    (root / "train" / "ant").mkdir(parents=True)
    encode(root / "train" / "ant" / "a.mp4", "libx264", frames=70, **X264)
    build(root, store, replace(SPEC, keep=(keep,)), runtime=SERIAL)
    # Another column extends the grid: the source has fewer pages than that.
    encode(root / "train" / "ant" / "b.mp4", "libx264", frames=20, **X264)
    build(root, store, replace(SPEC, keep=("stem",)), runtime=SERIAL)
    first = FeatureStore.open(store).feature("resnet18", keep)
    assert first.valid.tolist() == first.sampled(frames=4).valid.tolist() == [True, False]
    with pytest.raises(LookupError, match=r"b\.mp4"):
        first.clip(1)
    planned, seconds = plan(root, store, spec, runtime=SERIAL)
    assert seconds.forward_seconds > 0
    report = build(root, store, spec, runtime=SERIAL)
    assert sum(report.calls.values()) == sum(map(planned.calls, range(len(planned.passes))))
    assert planned.decodes == report.decoded


@pytest.mark.parametrize("rows", [None, [0]])
def test_an_update_computes_the_pages_of_a_changed_network(tmp_path, encode, rows):
    for name, frames in (("a", 70), ("b", 20)):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        encode(tmp_path / "set" / "train" / name / "v.mp4", "libx264", frames=frames, **X264)
    build(tmp_path / "set", tmp_path / "s.zarr", replace(SPEC, keep=("layer1.0",)), runtime=SERIAL)
    network = load("resnet18:random-0", torch.float32)
    stage = network.stages[network.stage_names.index("layer1.1")]
    with torch.no_grad():
        stage.module.conv2.weight.mul_(1.5)
    report = update(tmp_path / "s.zarr", network, "layer1.1:pool", rows)
    opened = FeatureStore.open(tmp_path / "s.zarr")
    feature = opened.feature("resnet18", "layer1.1:pool",
                             fingerprint=report.fingerprints["layer1.1:pool"])  # fmt: skip
    wanted = (
        np.flatnonzero((opened.clips["status"] == "ready").to_numpy()) if rows is None else rows
    )
    assert np.flatnonzero(feature.valid).tolist() == [*wanted]
    assert (report.decoded, len(report.failed)) == (0, 0)
    assert {name.split()[-1] for name in report.calls} == {"layer1.1"}
    before = opened.feature("resnet18", "layer1.0").clip(wanted[0])
    with torch.no_grad():
        expected = stage.module(torch.from_numpy(before)).mean(dim=(2, 3))
    np.testing.assert_allclose(feature.clip(wanted[0]), expected, rtol=1e-4, atol=1e-5)
    assert update(tmp_path / "s.zarr", network, "layer1.1:pool", rows).computed == 0


def test_an_update_of_frames_that_are_not_known_is_refused(store):
    network = load("resnet18:random-0", torch.float32)
    with pytest.raises(ValueError, match=r"4 clips in stride-3 .*build them with --sampling all"):
        update(store, network, "layer1.1:pool", spec=replace(SPEC, stride=3))
