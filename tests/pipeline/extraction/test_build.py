"""Building: what is computed, what is not, and that the same request gives the same bytes."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from varve.pipeline import backbones
from varve.pipeline.backbones import _prompts
from varve.pipeline.cli.format_store import report_summary, store_facts, store_summary
from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.datasets.synthetic import broken_files, make_dataset
from varve.pipeline.extraction.build import build, keep_text, plan
from varve.pipeline.extraction.disk_space import DiskTooSmall
from varve.pipeline.extraction.scan import OtherDataset
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore, SpecMismatch, lock

SERIAL = Runtime(serial=True)
SPEC = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=2)
CLASSES = ("grow", "shrink", "sway ↔")

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(CLASSES, 3)


@pytest.fixture(scope="module")
def broken_videos(dataset) -> Path:
    return dataset(CLASSES, 2, broken=True)


@pytest.fixture(scope="module")
def built(videos, built_once) -> Path:
    return built_once(videos, SPEC)


@pytest.fixture
def dataset_and_store(videos, built, tmp_path) -> tuple[Path, Path]:
    """A data set and its store, to be changed."""
    shutil.copytree(videos, tmp_path / "set")
    shutil.copytree(built, tmp_path / "s.zarr")
    return tmp_path / "set", tmp_path / "s.zarr"


def features(store: Path) -> dict[str, bytes]:
    root = store / "features"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def only_feature(store: Path):
    (feature,) = FeatureStore.open(store).features()
    return feature


def test_a_build_makes_every_clip_ready_and_leaves_no_scaffolding(videos, built):
    table = FeatureStore.open(built).clips
    assert (len(table), set(table["status"])) == (9, {"ready"})
    assert table["num_frames"].min() > 8
    assert set(table["decoder"]) == {"pyav"}
    assert only_feature(built).read().shape == (9, 2, 64)
    names = {p.name for p in built.iterdir()}
    assert names == {".lock", "clips.parquet", "features", "logs", "zarr.json"}


def test_features_equal_the_network_called_directly(videos, built):
    """The whole way again with other code: av, PIL and torchvision alone."""
    import av
    import torch
    import torchvision
    from PIL import Image

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.resnet18().eval()
    table, feature = FeatureStore.open(built).clips, only_feature(built)
    for row in (0, 4):
        with av.open(str(videos / table.at[row, "path"])) as container:
            images = [frame.to_image() for frame in container.decode(video=0)]
        count = len(images)
        assert count == table.at[row, "num_frames"]
        pictures = []
        for i in (count // 4, 3 * count // 4):
            image = torchvision.transforms.functional.resize(
                images[i], 256, torchvision.transforms.InterpolationMode.BILINEAR
            )
            image = torchvision.transforms.functional.center_crop(image, 224)
            assert isinstance(image, Image.Image)
            scaled = torchvision.transforms.functional.to_tensor(image)
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            pictures.append(torchvision.transforms.functional.normalize(scaled, mean, std))
        with torch.inference_mode():
            x = network.maxpool(network.relu(network.bn1(network.conv1(torch.stack(pictures)))))
            expected = network.layer1[0](x).mean(dim=(2, 3)).numpy()
        error = np.abs(feature.read([row])[0].astype(np.float64) - expected).max()
        assert error < 2e-2 * np.abs(expected).max()


def test_a_second_build_decodes_nothing_and_changes_no_byte(videos, built, monkeypatch):
    before = {p: p.read_bytes() for p in built.rglob("*") if p.is_file()}
    monkeypatch.setattr(
        "varve.pipeline.extraction.commit.run_blocks", lambda *args: pytest.fail("work was begun")
    )
    monkeypatch.setattr(
        "varve.pipeline.extraction.scan.content_digest", lambda path: pytest.fail("read")
    )
    report = build(videos, built, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed, report.hashed, report.new) == (0, 0, 0, 0)
    assert {p: p.read_bytes() for p in built.rglob("*") if p.is_file()} == before


def _same_times(root: Path, store: Path) -> None:
    """Set the files' times to what the store's table says."""
    for _, clip in FeatureStore.open(store).clips.iterrows():
        os.utime(root / clip["path"], ns=(clip["mtime_ns"], clip["mtime_ns"]))


def test_touching_every_file_recomputes_nothing(dataset_and_store):
    root, store = dataset_and_store
    before = features(store)
    for file in root.rglob("*.*"):
        os.utime(file, ns=(1, 1))
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.hashed, report.decoded, report.changed) == (9, 0, 0)
    assert features(store) == before


def test_five_added_videos_are_five_computed(dataset_and_store, videos, tmp_path):
    root, store = dataset_and_store
    make_dataset(tmp_path / "more", clips_per_class=5, seed=5, classes=("grow",), broken=False)
    for i, file in enumerate(sorted((tmp_path / "more").rglob("*.*"))):
        shutil.copy(file, root / "train" / "shrink" / f"added {i}{file.suffix}")
    old = only_feature(store).read()
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.new, report.decoded, report.computed) == (5, 5, 5)
    new = only_feature(store)
    assert new.shape[0] == 14
    np.testing.assert_array_equal(new.read(range(9)), old)
    assert FeatureStore.open(store).clips.index.tolist() == list(range(14))


def test_a_replaced_video_is_recomputed_in_every_column_and_nothing_else(
    dataset_and_store, tmp_path
):
    root, store = dataset_and_store
    both = BuildSpec(SPEC.backbones, (*SPEC.keep, "stem:pool"), frames=2)
    build(root, store, both, runtime=SERIAL)
    table = FeatureStore.open(store).clips
    victim, donor = root / table.at[3, "path"], root / table.at[7, "path"]
    old = {f.name: f.read() for f in FeatureStore.open(store).features()}
    replacement = donor.read_bytes() + b"\0" * 64  # other bytes, the same pictures
    victim.write_bytes(replacement)
    report = build(root, store, both, runtime=SERIAL)
    assert (report.changed, report.decoded, report.computed) == (1, 1, 1)
    for feature in FeatureStore.open(store).features():
        assert feature.valid.all()
        rest = np.delete(np.arange(9), 3)
        np.testing.assert_array_equal(feature.read(rest), old[feature.name][rest])
        np.testing.assert_array_equal(feature.read([3])[0], old[feature.name][7])


def test_equal_bytes_are_computed_once_and_noted(dataset_and_store):
    root, store = dataset_and_store
    table = FeatureStore.open(store).clips
    shutil.copy(root / table.at[2, "path"], root / "train" / "grow" / "copy of an old one.mp4")
    fresh = (root / table.at[0, "path"]).read_bytes() + b"\0"
    for name in ("one.mp4", "two.mp4"):
        (root / "train" / "grow" / name).write_bytes(fresh)
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.new, report.decoded, report.computed, report.copied) == (3, 1, 1, 1)
    table = FeatureStore.open(store).clips.set_index("path")
    copied = table.loc["train/grow/copy of an old one.mp4"]
    assert copied["detail"].startswith("same bytes as row 2, ")
    assert copied["duplicate_of"] == 2
    assert copied["num_frames"] == table.iloc[2]["num_frames"]
    assert table.loc["train/grow/two.mp4", "detail"].endswith("train/grow/one.mp4")
    assert only_feature(store).valid.all()


def test_two_clips_that_trade_their_bytes_keep_their_features_without_decoding(dataset_and_store):
    root, store = dataset_and_store
    table = FeatureStore.open(store).clips
    a, b = (root / table.at[row, "path"] for row in (1, 5))
    old = only_feature(store).read()
    bytes_a = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(bytes_a)
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.changed, report.decoded, report.copied) == (2, 0, 2)
    new = only_feature(store).read()
    np.testing.assert_array_equal(new[[1, 5]], old[[5, 1]])
    after = FeatureStore.open(store).clips
    assert after.at[1, "num_frames"] == table.at[5, "num_frames"]


def test_a_removed_video_keeps_its_row_and_a_returned_one_costs_nothing(dataset_and_store):
    root, store = dataset_and_store
    path = root / FeatureStore.open(store).clips.at[4, "path"]
    data = path.read_bytes()
    path.unlink()
    report = build(root, store, SPEC, runtime=SERIAL)
    row = FeatureStore.open(store).clips.loc[4]
    assert (report.gone, row["status"], row["reason"]) == (1, "quarantined", "missing")
    path.write_bytes(data)
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.decoded, FeatureStore.open(store).clips.at[4, "status"]) == (0, "ready")


def test_moved_files_keep_their_rows_and_cost_nothing(dataset_and_store):
    root, store = dataset_and_store
    before = FeatureStore.open(store).clips
    old = only_feature(store).read()
    (root / "train" / "grow").rename(root / "train" / "becoming large")
    report = build(root, store, SPEC, runtime=SERIAL)
    moved = int(before["path"].str.startswith("train/grow/").sum())
    assert moved > 0
    assert (report.moved, report.new, report.gone, report.changed) == (moved, 0, 0, 0)
    assert (report.decoded, report.computed, report.copied) == (0, 0, 0)
    after = FeatureStore.open(store).clips
    assert len(after) == len(before)
    renamed = before["path"].str.replace("train/grow/", "train/becoming large/")
    assert after["path"].tolist() == renamed.tolist()
    assert after["digest"].tolist() == before["digest"].tolist()
    assert set(after["status"]) == {"ready"}
    np.testing.assert_array_equal(only_feature(store).read(), old)
    assert build(root, store, SPEC, runtime=SERIAL).moved == 0


def test_a_data_set_of_which_every_path_changed_is_recognised_by_its_bytes(dataset_and_store):
    root, store = dataset_and_store
    for path in FeatureStore.open(store).clips["path"].map(root.joinpath):
        path.rename(path.with_name(f"x{path.name}"))
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.moved, report.new, report.gone, report.computed) == (9, 0, 0, 0)


def test_a_file_that_left_and_came_back_elsewhere_takes_its_row(dataset_and_store):
    root, store = dataset_and_store
    path = root / FeatureStore.open(store).clips.at[4, "path"]
    data = path.read_bytes()
    path.unlink()
    assert build(root, store, SPEC, runtime=SERIAL).gone == 1
    path.with_name("again.mp4").write_bytes(data)
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.moved, report.gone, report.decoded) == (1, 0, 0)
    row = FeatureStore.open(store).clips.loc[4]
    assert (row["status"], row["reason"], row["path"].endswith("again.mp4")) == ("ready", "", True)


def test_bytes_that_now_are_at_two_new_paths_are_copied_and_not_moved(dataset_and_store):
    root, store = dataset_and_store
    path = root / FeatureStore.open(store).clips.at[4, "path"]
    shutil.copy(path, path.with_name("b.mp4"))
    path.rename(path.with_name("a.mp4"))
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.moved, report.new, report.gone) == (0, 2, 1)
    assert (report.decoded, report.copied) == (0, 2)


def listed(root: Path, table: pd.DataFrame) -> Path:
    table[["path", "label", "split"]].to_csv(root / "clips.csv", index=False)
    return root / "clips.csv"


def test_a_class_renamed_or_removed_in_the_list_computes_and_harms_nothing(dataset_and_store):
    root, store = dataset_and_store
    table = FeatureStore.open(store).clips
    renamed = table.replace({"label": {"grow": "become large"}})
    report = build(listed(root, renamed), store, SPEC, runtime=SERIAL)
    assert (report.new, report.moved, report.gone, report.computed) == (0, 0, 0, 0)
    after = FeatureStore.open(store).clips
    assert after["label"].tolist() == renamed["label"].tolist()
    assert after["path"].tolist() == table["path"].tolist()
    rest = renamed[renamed["label"] != "shrink"]
    report = build(listed(root, rest), store, SPEC, runtime=SERIAL)
    assert (report.gone, report.computed, report.decoded) == (3, 0, 0)
    assert len(report.quarantined) == 0
    after = FeatureStore.open(store).clips
    assert set(after.loc[rest.index, "status"]) == {"ready"}
    assert set(after.drop(rest.index)["reason"]) == {"missing"}


def test_the_same_bytes_in_two_splits_are_counted(dataset_and_store):
    root, store = dataset_and_store
    table = FeatureStore.open(store).clips
    path = root / table.index[table["split"] == "train"].map(table["path"])[0]
    (root / "test" / "grow").mkdir(parents=True, exist_ok=True)
    shutil.copy(path, root / "test" / "grow" / "leak.mp4")
    report = build(root, store, SPEC, runtime=SERIAL)
    assert report.duplicates == {"test and train": 2}
    assert "SAME BYTES in different splits: 2 clips in test and train" in report_summary(report)
    opened = FeatureStore.open(store)
    assert store_facts(opened)["duplicates"] == {"test and train": 2}
    assert "SAME BYTES in different splits" in store_summary(opened)


def test_broken_files_are_quarantined_with_their_reason_and_the_rest_is_built(
    broken_videos, tmp_path
):
    store = tmp_path / "s.zarr"
    report = build(broken_videos, store, SPEC, runtime=SERIAL)
    table = FeatureStore.open(store).clips.set_index("path")
    for path, reason in broken_files(broken_videos):
        row = table.loc[path.relative_to(broken_videos).as_posix()]
        assert row["reason"] == reason, path
        assert row["status"] == ("quarantined" if reason else "ready")
        assert row["detail"]
    good = table[table["status"] == "ready"]
    assert len(good) == 6 + sum(not reason for _, reason in broken_files(broken_videos))
    feature = only_feature(store)
    assert feature.valid.sum() == len(good)
    again = build(broken_videos, store, SPEC, runtime=SERIAL)
    assert (again.decoded, len(again.quarantined)) == (0, len(report.quarantined))
    retried = build(broken_videos, store, SPEC, runtime=Runtime(serial=True, retry=True))
    assert retried.decoded == len(report.quarantined)
    pd.testing.assert_frame_equal(retried.quarantined, report.quarantined)


def test_a_quarantined_clip_whose_bytes_were_mended_is_tried_again(broken_videos, tmp_path):
    root, store = tmp_path / "set", tmp_path / "s.zarr"
    shutil.copytree(broken_videos, root)
    build(root, store, SPEC, runtime=SERIAL)
    broken = next(path for path, reason in broken_files(root) if reason == "not_video")
    whole = next((root / "train").rglob("clip_001.*")).read_bytes()
    broken.write_bytes(whole + b"\0")
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed) == (1, 1)
    table = FeatureStore.open(store).clips.set_index("path")
    mended = table.loc[broken.relative_to(root).as_posix()]
    assert (mended["status"], mended["reason"], mended["detail"]) == ("ready", "", "")


def test_clips_of_one_file_are_decoded_in_one_pass(videos, tmp_path):
    file = next(videos.rglob("clip_000.mp4")).relative_to(videos).as_posix()
    lines = ["path,label,start,end", f"{file},a,,", f"{file},b,0.2,0.6", f"{file},c,0.6,",
             f"{file},d,500,600"]  # fmt: skip
    root = tmp_path / "set"
    shutil.copytree(videos, root)
    (root / "list.csv").write_text("\n".join(lines))
    report = build(root, tmp_path / "s.zarr", SPEC, layout="table", runtime=SERIAL)
    assert (report.decoded, report.computed, len(report.quarantined)) == (1, 4, 1)
    table = FeatureStore.open(tmp_path / "s.zarr").clips
    assert table["reason"].tolist() == ["", "", "", "too_short"]
    assert table.at[1, "num_frames"] + table.at[2, "num_frames"] < table.at[0, "num_frames"]
    cells = only_feature(tmp_path / "s.zarr").read([0, 1, 2])
    assert len({cell.tobytes() for cell in cells}) == 3


def test_several_backbones_stages_and_views_come_out_of_one_pass(videos, tmp_path):
    spec = BuildSpec(
        ("resnet18:random-0", "resnet18:random-1"),
        ("stem:grid7", "layer1.0:pool"),
        frames=2,
        sampling="tsn_random",
        views=2,
        flip=True,
        dtype="bfloat16",
    )
    report = build(videos, tmp_path / "s.zarr", spec, runtime=SERIAL)
    assert report.decoded == 9
    columns = FeatureStore.open(tmp_path / "s.zarr").features()
    assert len(columns) == 8
    assert len({feature.read([0]).tobytes() for feature in columns}) == 8
    store = FeatureStore.open(tmp_path / "s.zarr")
    with pytest.raises(SpecMismatch, match=r"(?s)(?=.*frames\.view=0).*frames\.view=1"):
        store.feature("resnet18:random-1", "stem:grid7")
    drawn = store.feature("resnet18:random-1", "stem:grid7", view=1)
    assert drawn.spec["frames"]["flip"]


def test_a_removed_shard_is_computed_anew_and_a_removed_table_costs_no_computing(
    dataset_and_store, built
):
    root, store = dataset_and_store
    _same_times(root, store)
    (feature,) = FeatureStore.open(store).features()
    (store / feature.shard_of(0)).unlink()
    assert build(root, store, SPEC, runtime=SERIAL).computed == 9
    assert features(store) == features(built)
    (store / "clips.parquet").unlink()
    report = build(root, store, SPEC, runtime=SERIAL)
    assert (report.decoded, report.computed, report.new) == (9, 0, 9)
    assert features(store) == features(built)
    pd.testing.assert_frame_equal(FeatureStore.open(store).clips, FeatureStore.open(built).clips)


def test_what_decides_no_value_misses_nothing(dataset_and_store, tmp_path, monkeypatch):
    """Paths, times, workers: the plan finds every cell valid."""
    root, store = dataset_and_store
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    monkeypatch.chdir(tmp_path)
    for runtime in (SERIAL, Runtime(workers=3), Runtime(deadline_seconds=5.0)):
        planned, _ = plan("elsewhere", store, SPEC, runtime=runtime)
        assert planned.decodes == 0


CHANGES = {
    "frames": {"frames": 3},
    "sampling": {"sampling": "dense", "stride": 1},
    "rate": {"sampling": "uniform_fps", "fps": 2.0},
    "precision": {"precision": "bfloat16"},
    "dtype": {"dtype": "float32"},
    "decoder": {"decoder": "decord"},
    "weights": {"backbones": ("resnet18:random-1",)},
    "stage": {"keep": ("layer1.1:pool",)},
    "reduction": {"keep": ("layer1.0:grid7",)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_value_is_another_column(videos, built, change):
    from dataclasses import replace

    planned, _ = plan(
        videos, built, replace(SPEC, **CHANGES[change]), runtime=SERIAL, estimate=False
    )
    assert (planned.decodes, planned.all_columns[0].valid.sum()) == (9, 0)


def test_the_plan_reports_what_is_then_written(videos, tmp_path):
    store = tmp_path / "s.zarr"
    spec = BuildSpec(SPEC.backbones, ("stem:grid7", "layer1.0:pool"), frames=4, dtype="float32")
    planned, seconds = plan(videos, store, spec, runtime=SERIAL)
    assert not store.exists()
    assert (planned.decodes, planned.clips) == (9, 9)
    assert seconds is not None
    assert seconds.seconds > 0
    build(videos, store, spec, runtime=SERIAL)
    written = sum(len(data) for data in features(store).values())
    assert abs(planned.file_bytes - written) < 0.02 * written
    again, nothing = plan(videos, store, spec, runtime=SERIAL)
    assert (again.decodes, nothing) == (0, None)


def test_values_beyond_the_format_are_quarantined_and_not_kept(videos, tmp_path):
    import safetensors.torch
    import torchvision

    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.bn2.weight"].fill_(1e7)
    safetensors.torch.save_file(state, tmp_path / "loud.safetensors")
    spec = BuildSpec((f"resnet18:{tmp_path}/loud.safetensors",), ("layer1.0:pool",), frames=2)
    report = build(videos, tmp_path / "s.zarr", spec, runtime=SERIAL)
    assert set(report.quarantined["reason"]) == {"not_finite"}
    assert "--dtype float32" in report.quarantined["detail"].iloc[0]
    assert build(videos, tmp_path / "s.zarr", spec, runtime=SERIAL).decoded == 0
    wider = BuildSpec(spec.backbones, spec.keep, frames=2, dtype="float32")
    report = build(videos, tmp_path / "s.zarr", wider, runtime=SERIAL)
    assert (len(report.quarantined), report.computed) == (0, 9)


def test_text_features_are_kept_beside_for_a_clip_network(videos, tmp_path):
    store = tmp_path / "s.zarr"
    spec = BuildSpec(("ViT-S-32:random-0",), ("stem:cls",), frames=1)
    build(videos, store, spec, runtime=SERIAL)
    text_features = FeatureStore.open(store).text("ViT-S-32:random-0")
    assert text_features.values.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(text_features.values, axis=1), 1, atol=1e-5)
    turned = FeatureStore.open(store).text("ViT-S-32:random-0", text_features.classes[::-1])
    np.testing.assert_array_equal(turned.values, text_features.values[::-1])
    with pytest.raises(LookupError, match="no text features"):
        FeatureStore.open(store).text("ViT-S-32:random-0", ["juggling"])


def test_text_features_of_earlier_prompts_are_replaced(tmp_path, monkeypatch):
    backbone, classes = backbones.load("ViT-S-32:random-0"), ["brush_hair", "YoYo"]
    store = FeatureStore.create(tmp_path / "s.zarr")
    keep = partial(keep_text, store.path, backbone, progress=Progress())
    keep(classes)
    (array,) = (store.path / "text").glob("*/*/zarr.json")
    new = array.read_bytes(), store.text(backbone.name, classes).values
    array.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(_prompts, "CODE", "prompts/1")
        patch.setattr(_prompts, "words", str)
        keep(classes)
    assert (store.text(backbone.name, classes).values != new[1]).any()
    keep(classes)
    (array,) = (store.path / "text").glob("*/*/zarr.json")
    assert array.read_bytes() == new[0]
    np.testing.assert_array_equal(store.text(backbone.name, classes).values, new[1])


def test_classes_that_share_a_text_feature_are_reported(dataset, tmp_path, varve):
    root = tmp_path / "videos"
    shutil.copytree(dataset(("grow",), 1), root)
    for label in ("brush_hair", "BrushHair"):
        for split in root.iterdir():
            shutil.copytree(split / "grow", split / label)
    options = [root, "--store", tmp_path / "s.zarr", "--backbone", "ViT-S-32:random-0",
               "--keep", "stem:cls", "--frames", 1]  # fmt: skip
    planned = varve("plan", *options, "--no-estimate").stdout
    assert "text: prompts of 3 classes, 2 of them in other words than the label" in planned
    assert '  BrushHair: "brush hair"' in planned
    assert "ONE TEXT FEATURE for BrushHair and brush_hair" in planned
    facts = json.loads(varve("plan", *options, "--no-estimate", "--json").stdout)
    assert facts["prompts"]["brush_hair"] == "brush hair"
    assert facts["same_prompts"] == [["BrushHair", "brush_hair"]]
    without = varve("plan", *options, "--no-estimate", "--no-text").stdout
    assert "text:" not in without
    assert "ONE TEXT FEATURE for BrushHair and brush_hair" in varve("build", *options).stdout


def test_labels_too_long_for_the_text_tower_are_refused_before_anything_is_made(dataset, tmp_path):
    root = tmp_path / "videos"
    shutil.copytree(dataset(("grow",), 1), root)
    for split in root.iterdir():
        (split / "grow").rename(split / ("a b c d " * 20).strip())
    spec = BuildSpec(("ViT-S-32:random-0",), ("stem:cls",), frames=1)
    with pytest.raises(ValueError, match="the prompts of 1 of 1 classes have more than the 77"):
        build(root, tmp_path / "s.zarr", spec, runtime=SERIAL)
    assert not (tmp_path / "s.zarr").exists()
    without = replace(spec, text=False)
    assert build(root, tmp_path / "s.zarr", without, runtime=SERIAL).clips["ready"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"keep": ("blocks.3.mlp",)},
            r"no backbone has a stage 'blocks.3.mlp'; stages are\n.*layer4.1",
        ),
        ({"keep": ("layer1.0:cls",)}, "layer1.0:cls.*grid7, map, pool"),
        ({"backbones": ("resnet19:random-0",)}, "resnet18"),
        ({"backbones": ("resnet18",)}, "names no weights"),
        ({"backbones": ("resnet18:/no/file.safetensors",)}, "/no/file.safetensors"),
    ],
)
def test_a_request_that_cannot_be_met_writes_nothing(videos, tmp_path, request_, message):
    from dataclasses import replace

    with pytest.raises((ValueError, OSError), match=message):
        build(videos, tmp_path / "s.zarr", replace(SPEC, **request_), runtime=SERIAL)
    assert not (tmp_path / "s.zarr").exists()


def test_another_data_set_is_not_mixed_into_a_store(built, broken_videos, tmp_path):
    shutil.copytree(built, tmp_path / "s.zarr")
    make_dataset(tmp_path / "other", clips_per_class=1, classes=("fade in",), broken=False)
    with pytest.raises(OtherDataset, match="none of those"):
        build(tmp_path / "other", tmp_path / "s.zarr", SPEC, runtime=SERIAL)
    assert features(tmp_path / "s.zarr") == features(built)


def test_a_disk_without_room_is_refused_before_anything_is_written(videos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskTooSmall, match=r"1 kB are free.*--keep layer1\.0:pool") as caught:
        build(videos, tmp_path / "s.zarr", SPEC, runtime=SERIAL)
    assert caught.value.errno == 28
    assert not (tmp_path / "s.zarr").exists()


def test_a_store_in_use_is_refused(dataset_and_store):
    root, store = dataset_and_store
    with lock.locked(store), pytest.raises(lock.StoreLocked, match=f"process {os.getpid()}"):
        build(root, store, SPEC, runtime=SERIAL)


def test_every_array_records_how_to_compute_it_again(built, resnet):
    spec = only_feature(built).spec
    assert spec["frames"] == SPEC.frame_sets(resnet.picture)[0].identity()
    assert [stage["stage"] for stage in spec["stages"]] == ["stem", "layer1.0"]
    assert all(len(stage["parameters"]) == 64 for stage in spec["stages"])
    assert spec["execution"] == {
        "device": "cpu",
        "batch_clips": 4,
        "threads": min(4, os.cpu_count()),
    }
    text = json.dumps(spec)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text
