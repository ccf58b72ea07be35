"""Windows of whole videos, for networks with temporal modules."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorstore
import torch
import zarr

from varve import BuildSpec, FeatureStore, Runtime, build, plan, run
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline.backbones import load
from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders import Request, Stretch, _whole, decode
from varve.pipeline.extraction import blocks
from varve.pipeline.extraction.update import update
from varve.pipeline.extraction.verify import verify
from varve.pipeline.extraction.whole_videos import part_table
from varve.stores import Damaged, SpecMismatch, WindowFeature, atomic, windows

SERIAL = Runtime(serial=True)
FRAMES, STEP = 8, 5  # of a window, and from each to the next
NAME, RESNET = "videomae_tiny:random-0", "resnet18:random-0"
KEEP = ("blocks.1.mlp:mean", "pool")  # of 4 time steps, and of 1
SPEC = BuildSpec(NAME, KEEP, FRAMES, "all", window_step=STEP, dtype="float32")
LENGTHS = {"long.mp4": 150, "short.mp4": 5}
X264 = {"g": "12", "bf": "2", "preset": "veryfast"}

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encode) -> Path:
    """A long and a short video of two classes, and a file that is no video."""
    root = tmp_path_factory.mktemp("windows") / "set"
    for (name, frames), label in zip(LENGTHS.items(), ("ant", "bee"), strict=True):
        for split, fewer in (("train", 0), ("test", 1)):
            (root / split / label).mkdir(parents=True)
            encode(root / split / label / name, "libx264", frames=frames - fewer, **X264)
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


def starts(frames: int, step: int = STEP, length: int = FRAMES) -> list[int]:
    """Return the first frames of the whole windows of a clip; of a shorter one, its first."""
    return list(range(0, max(frames - length, 0) + 1, step))


def list_of(folder: Path, file: Path, clips: list[tuple[str, float, float]]) -> Path:
    """Write a list of clips of the data set's files: path, start and end in seconds."""
    (file.parent / "train").symlink_to(folder / "train")
    lines = [f"{path},a,{start},{end}" for path, start, end in clips]
    file.write_text("\n".join(["path,label,start,end", *lines]))
    return file


def test_a_clip_has_a_cell_every_few_frames_with_their_times_and_indices(built):
    opened = FeatureStore.open(built)
    assert opened.clips["status"].value_counts().to_dict() == {"ready": 4, "quarantined": 1}
    assert {feature.name: feature.shape[1:] for feature in opened.features()} == {
        "blocks.1.mlp:mean": (4, 192),
        "pool": (1, 192),
    }
    for feature in opened.features():
        assert isinstance(feature, WindowFeature)
        assert feature.shape[0] == len(feature.parts) == 29 + 29 + 1 + 1
        for row in np.flatnonzero(feature.valid):
            frames = int(opened.clips.at[row, "num_frames"])
            first = starts(frames)
            expected = [[min(a + i, frames - 1) for i in range(FRAMES)] for a in first]
            assert feature.frames(row).tolist() == expected
            np.testing.assert_allclose(feature.times(row), np.array(first) / 25, atol=1e-3)
            assert feature.clip(row).shape == (len(first), *feature.shape[1:])
    with pytest.raises(LookupError, match="not_video"):
        feature.clip(row_of(built, "test/bee/broken.mp4"))
    with pytest.raises(TypeError, match=r"sampled\(frames=8\)"):
        feature.read()


def test_a_window_has_the_bits_of_a_clip_of_its_frames(folder, built, tmp_path):
    """Of an own build, whose clips are exactly the frames of the windows."""
    half = 0.5 / 25
    of_windows = [
        ("train/ant/long.mp4", max(0, start / 25 - half), (start + FRAMES) / 25 - half)
        for start in starts(LENGTHS["long.mp4"])
    ]
    clips = [*of_windows, ("train/bee/short.mp4", 0.0, 1.0)]
    listed = list_of(folder, tmp_path / "list.csv", clips)
    spec = BuildSpec(NAME, KEEP, FRAMES, "dense", stride=1, dtype="float32")
    build(listed, tmp_path / "direct.zarr", spec, runtime=SERIAL)
    for feature in FeatureStore.open(tmp_path / "direct.zarr").features():
        ours = FeatureStore.open(built).feature(NAME, feature.name)
        expected = feature.read()
        of_long = ours.clip(row_of(built, "train/ant/long.mp4"))
        np.testing.assert_array_equal(of_long, expected[:-1])
        of_short = ours.clip(row_of(built, "train/bee/short.mp4"))
        np.testing.assert_array_equal(of_short, expected[-1:])


def test_windows_of_intervals_start_with_them(folder, tmp_path):
    clips = [("train/ant/long.mp4", 1.0, 2.0), ("train/ant/long.mp4", 0.4, 1.2)]
    store = tmp_path / "s.zarr"
    build(list_of(folder, tmp_path / "list.csv", clips), store, SPEC, runtime=SERIAL)
    feature = FeatureStore.open(store).feature(NAME, "pool")
    assert feature.frames(0)[:, 0].tolist() == [25, 30, 35, 40]
    assert feature.frames(1)[:, 0].tolist() == [10, 15, 20]
    assert feature.frames(1)[-1].tolist() == list(range(20, 28))
    np.testing.assert_allclose(feature.times(1), [0.4, 0.6, 0.8], atol=1e-3)


def test_other_kept_frames_give_windows_of_these(folder, tmp_path):
    store = tmp_path / "s.zarr"
    build(folder, store, replace(SPEC, stride=3, window_step=FRAMES), runtime=SERIAL)
    feature = FeatureStore.open(store).feature(NAME, "pool")
    row = row_of(store, "train/ant/long.mp4")
    assert feature.frames(row).tolist() == np.arange(144).reshape(-1, 24)[:, ::3].tolist()
    assert (store / "windows.stride-3.8.8.parquet").exists()


@pytest.mark.parametrize("step", [1, 3, 8, 20, 90])
def test_a_decoder_reads_a_file_once_whatever_the_step(folder, monkeypatch, step):
    """Pictures of overlapping windows are copied; few frames between them are read over."""
    numbers: list[int] = []
    real = _whole.pictures

    def counted(decoder, path, index, wanted_N):
        for number, image in real(decoder, path, index, wanted_N):
            numbers.append(number)
            yield number, image

    monkeypatch.setattr(_whole, "pictures", counted)
    _whole.forget()
    path = folder / "train/ant/long.mp4"
    frame_set = FrameSet(FRAMES, "all", window_step=step, picture=Picture(64, 64))
    whole = FrameSet(sampling="all", picture=Picture(64, 64))
    first = starts(LENGTHS["long.mp4"], step)
    stretches = tuple(Stretch(part=(a, FRAMES)) for a in first)
    results = decode(Request(str(path), stretches, (frame_set,)))
    # The first picture is read once more, which shows the size.
    most = 150 if step < _whole.READ_OVER else len(first) * FRAMES
    assert len(numbers) <= most + 1
    (every,) = decode(Request(str(path), (Stretch(part=(0, 150)),), (whole,)))
    for start, result in zip(first, results, strict=True):
        np.testing.assert_array_equal(result.frames[0], every.frames[0][start : start + FRAMES])


def test_a_killed_build_continues_and_another_build_computes_nothing(
    folder, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "CPU_BLOCK_PICTURES", 2 * FRAMES)
    store, real, count = tmp_path / "s.zarr", atomic.write, 0

    def dying(where, target, *pieces):
        nonlocal count
        count += target.suffix == ".npz"
        if count > 7:
            raise KeyboardInterrupt
        real(where, target, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            build(folder, store, SPEC, runtime=SERIAL)
    report = build(folder, store, SPEC, runtime=SERIAL)
    assert report.adopted == 7 * 2  # windows in a staged file
    assert bytes_of(store) == bytes_of(built)
    report = build(folder, store, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed, report.unit) == (0, 0, "windows")


def test_new_videos_add_windows_and_one_file_at_two_paths_shares_them(folder, tmp_path):
    root, store = Path(shutil.copytree(folder, tmp_path / "set")), tmp_path / "s.zarr"
    build(root, store, SPEC, runtime=SERIAL)
    before = FeatureStore.open(store).feature(NAME, "pool").clip(0)
    shutil.copy(root / "train/ant/long.mp4", root / "train/bee/again.mp4")
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed) == (0, 0)
    (root / "train/ant/first.mp4").write_bytes((root / "test/ant/long.mp4").read_bytes() + b"more")
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed) == (1, 29)
    feature = FeatureStore.open(store).feature(NAME, "pool")
    assert feature.shape[0] == 60 + 29
    np.testing.assert_array_equal(feature.clip(0), before)
    again = feature.clip(row_of(store, "train/bee/again.mp4"))
    np.testing.assert_array_equal(again, feature.clip(row_of(store, "train/ant/long.mp4")))


def test_a_deeper_stage_starts_from_the_windows_of_a_shallower_one(folder, built, tmp_path):
    store = tmp_path / "s.zarr"
    build(folder, store, replace(SPEC, keep=("blocks.0.mlp",)), runtime=SERIAL)
    planned, seconds = plan(folder, store, SPEC, runtime=SERIAL)
    assert (planned.decodes, planned.unit) == (0, "windows")
    assert planned.clips == 60
    assert seconds.forward_seconds > 0
    report = build(folder, store, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed) == (0, 60)
    assert {name.split()[-1] for name in report.calls} == {"blocks.1.attn", "blocks.1.mlp", "pool"}
    for feature in FeatureStore.open(built).features():
        ours = FeatureStore.open(store).feature(NAME, feature.name)
        np.testing.assert_array_equal(ours.clip(0), feature.clip(0))


@pytest.mark.parametrize("step", [STEP, 3])
def test_an_update_computes_the_windows_of_a_changed_network(folder, tmp_path, step):
    """Also windows that the store has not: of another step, from the videos."""
    store = tmp_path / "s.zarr"
    build(folder, store, replace(SPEC, keep=("blocks.1.attn",)), runtime=SERIAL)
    network = load(NAME, torch.float32)
    with torch.no_grad():
        stage = network.stages[network.stage_names.index("blocks.1.mlp")]
        next(p for p in stage.module.parameters() if p.ndim > 1).mul_(1.5)
    spec = replace(SPEC, window_step=step)
    report = update(store, network, "blocks.1.mlp", spec=spec)
    feature = FeatureStore.open(store).feature(
        NAME, "blocks.1.mlp", fingerprint=report.fingerprints["blocks.1.mlp"]
    )
    assert report.computed == len(feature.parts) == 2 * len(starts(150, step)) + 2
    assert report.decoded == (0 if step == STEP else 4)
    row = row_of(store, "train/ant/long.mp4")
    assert feature.frames(row)[1].tolist() == list(range(step, step + FRAMES))
    if step == STEP:
        before = FeatureStore.open(store).feature(NAME, "blocks.1.attn").clip(row)[:2]
        with torch.no_grad():
            expected = stage.module(torch.from_numpy(before).flatten(0, 1)).unflatten(0, (2, 4))
        np.testing.assert_allclose(feature.clip(row)[:2], expected, rtol=1e-4, atol=1e-5)
    assert update(store, network, "blocks.1.mlp", spec=spec).computed == 0


def test_a_lost_table_of_windows_is_reported_and_costs_no_computation(folder, built, store, varve):
    windows.table_file(store, "stride-1", FRAMES, STEP).unlink()
    with pytest.raises(Damaged, match=r"windows.stride-1.8.5.parquet is missing.*Build again"):
        FeatureStore.open(store).feature(NAME, "pool").clip(0)
    assert "is missing" in verify(store, sample=0).findings[0].problem
    options = ["--backbone", NAME, "--keep", KEEP[0], "--keep", KEEP[1], "--sampling", "all",
               "--window-step", STEP, "--dtype", "float32", "--serial"]  # fmt: skip
    done = varve("build", folder, "--store", store, *options)
    assert "it is unknown which clip each window of 8 frames is of" in " ".join(done.stderr.split())
    assert "nothing to" in done.stdout
    assert bytes_of(store) == bytes_of(built)
    windows.table_file(store, "stride-1", FRAMES, STEP).write_bytes(b"no table")
    with pytest.raises(Damaged, match="Remove it and build again"):
        build(folder, store, SPEC, runtime=SERIAL)
    with pytest.raises(Damaged, match="is damaged"):
        FeatureStore.open(store).feature(NAME, "pool").clip(0)


def test_other_libraries_read_a_column_and_its_table(built):
    feature = FeatureStore.open(built).feature(NAME, "pool")
    row = row_of(built, "test/ant/long.mp4")
    table = pd.read_parquet(built / "windows.stride-1.8.5.parquet").set_index("key")
    digest = FeatureStore.open(built).clips.at[row, "digest"]
    (clip,) = table[table["digest"] == digest].itertuples()
    assert (clip.first_frame, clip.frames) == (0, 149)
    part = slice(clip.first_window, clip.first_window + 29)
    expected = feature.clip(row)
    np.testing.assert_array_equal(zarr.open_array(feature.path, mode="r")[part], expected)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(feature.path)}}
    np.testing.assert_array_equal(tensorstore.open(spec).result()[part].read().result(), expected)


def test_chosen_windows_are_a_feature_that_heads_read(built, folder, tmp_path):
    opened = FeatureStore.open(built)
    feature = opened.feature(NAME, KEEP[0])
    sampled = feature.sampled(frames=3)
    assert sampled.shape == (5, 3 * 4, 192)
    row, short = row_of(built, "train/ant/long.mp4"), row_of(built, "train/bee/short.mp4")
    chosen = [4, 14, 24]  # the middles of three parts of 29 windows
    np.testing.assert_array_equal(
        sampled.read([row])[0], feature.clip(row)[chosen].reshape(12, 192)
    )
    assert sampled.indices(row).tolist() == feature.frames(row)[chosen].tolist()
    np.testing.assert_array_equal(
        sampled.read([short])[0], np.concatenate([feature.clip(short)[0]] * 3)
    )
    assert sampled.to_dask().shape == sampled.shape
    done = run(built, "nearest_mean", "1+1x1", out=tmp_path, sampled={"frames": 3})
    assert done.matrix.accuracy.shape == (2, 2)
    last = opened.feature(NAME, "pool").sampled(frames=3)
    assert list(done.spec["features"].values()) == [last.fingerprint]
    options = {"feature": KEEP[0], "exemplar_frames": 2, "epochs": 1}
    done = run(built, "icarl", "1+1x1", out=tmp_path, options=options, sampled={"frames": 3})
    # Of an exemplar, 2 of its 12 time steps are kept.
    assert done.cost["exemplar_bytes"] == done.cost["exemplars"] * 2 * 192 * 4 > 0
    with pytest.raises(SpecMismatch, match="has every frame of whole videos: give the frames"):
        run(built, "nearest_mean", "1+1x1", out=tmp_path)


def test_verify_reads_windows_and_info_names_them(store, varve):
    result = verify(store)
    assert (result.whole, result.findings) == (2, [])
    assert "windows of whole videos (8 frames of stride-1, every 5)" in varve("info", store).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_step": 0}, "stem is a temporal module over 8 frames, and whole videos have "
         "any number.*--sampling all --frames 8 --window-step 8"),
        ({"frames": 16}, "stem is a temporal module over 8 frames, and the clips have 16"),
        ({"sampling": "tsn"}, "windows slide over whole videos, sampling='all'"),
        ({"window_step": -1}, "window_step=-1"),
        ({"backbones": ("resnet18:random-0",), "keep": ()}, "computes each frame alone.*in a build "
         "of its own"),
        ({"backbones": (NAME, "resnet18:random-0"), "keep": ()}, "computes each frame alone"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met_are_refused(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, tmp_path / "s.zarr", replace(SPEC, **options), runtime=SERIAL)
    assert not (tmp_path / "s.zarr").exists()


def test_what_reads_the_frames_of_clips_refuses_windows(built, folder, tmp_path):
    with pytest.raises(SpecMismatch, match="windows of whole videos: build a store with"):
        run(built, "hf_net", "1+1x1", out=tmp_path, sampled={"frames": 3})


def test_windows_behind_a_temporal_module_start_from_pages(folder, tmp_path):
    """Of a network that computes each frame alone up to the module."""
    store = tmp_path / "s.zarr"
    pages = BuildSpec(RESNET, ("layer4.0",), sampling="all", dtype="float32")
    build(folder / "train", store, pages, runtime=SERIAL)
    network = load(RESNET, torch.float32)
    shift = TemporalShift(network.stage("layer4.1").module, frames=FRAMES)
    grafted = network.graft("layer4.1", shift)
    with pytest.raises(ValueError, match="--sampling all --frames 8 --window-step 8"):
        update(store, grafted, "layer4.1:pool")
    spec = replace(pages, frames=FRAMES, window_step=STEP)
    report = update(store, grafted, "layer4.1:pool", spec=spec)
    assert (report.decoded, report.computed) == (0, 30)
    assert {name.split()[-1] for name in report.calls} == {"layer4.1"}
    opened = FeatureStore.open(store)
    row, short = row_of(store, "ant/long.mp4"), row_of(store, "bee/short.mp4")
    key = report.fingerprints["layer4.1:pool"]
    feature = opened.feature("resnet18", "layer4.1:pool", fingerprint=key)
    every = torch.from_numpy(opened.feature("resnet18", "layer4.0").clip(row))
    with torch.inference_mode():
        expected = [shift(every[a : a + FRAMES]).mean(dim=(2, 3)) for a in starts(len(every))]
        last = torch.from_numpy(opened.feature("resnet18", "layer4.0").clip(short))
        repeated = shift(torch.cat([last, last[-1:].expand(3, *last.shape[1:])])).mean(dim=(2, 3))
    np.testing.assert_allclose(feature.clip(row), torch.stack(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(feature.clip(short)[0], repeated, rtol=1e-4, atol=1e-5)


def test_an_overflow_in_one_stretch_of_a_file_costs_the_windows_of_another_nothing(
    folder, tmp_path
):
    clips = [("train/ant/long.mp4", 0.0, 2.0), ("train/ant/long.mp4", 3.0, 5.0)]
    store = tmp_path / "s.zarr"
    build(list_of(folder, tmp_path / "list.csv", clips), store, SPEC, runtime=SERIAL)
    opened = FeatureStore.open(store)
    table = opened.clips.copy()
    table.at[0, "overflowed"] = ("0123456789abcdef",)
    for name in ("pool", KEEP[0]):
        parts = opened.feature(NAME, name).parts
        result, rows = part_table(table, np.arange(2), parts)
        (a, b), (c, d) = parts.rows_of(table).tolist()
        assert rows.tolist() == [*range(a, b), *range(c, d)]
        assert set(result["overflowed"][a:b]) == {("0123456789abcdef",)}
        assert set(result["overflowed"][c:d]) == {()}
