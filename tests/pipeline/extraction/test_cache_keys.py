"""No stale hit: whatever decides a value gives a miss from the right stage on; nothing else does.

Each mutation changes one thing against a store that holds every stage. What must miss is missing,
all of it; what stands before it is valid still; and the missing cells come from the last that is.
"""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from torch import nn

from varve import BuildSpec, Runtime, build, plan, update
from varve.heads.grafts.adapter import Adapter
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline.backbones import _weights, clip_vit
from varve.pipeline.backbones import resnet as resnet_family
from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.extraction.passes import frames_key
from varve.stores import FeatureStore

SERIAL = Runtime(serial=True)
RESNET, VIT = "resnet18:random-0", "ViT-S-32:random-0"
RESNET_STAGES = ("stem", *(f"layer{i}.{j}" for i in range(1, 5) for j in (0, 1)), "pool", "fc")
VIT_KEEP = ("stem", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.11.mlp", "proj")
CLIPS = 4
SPEC = BuildSpec((RESNET,), RESNET_STAGES, frames=2, dtype="float32", text=False)

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(("grow", "shrink"), 2)


@pytest.fixture(scope="module")
def store(videos, built_once) -> Path:
    """Every stage of a ResNet, and some of a ViT."""
    return built_once(videos, replace(SPEC, backbones=(VIT,), keep=VIT_KEEP), SPEC)


def files_of(root):
    return sorted(p for p in root.rglob("*") if p.is_file())


def states(planned):
    """Count the valid and the missing cells of each feature, and the sources of the missing."""
    counts = {}
    for column in planned.all_columns:
        origins = {source.feature for source, _ in column.sources}
        origins |= {"the video"} if column.from_video.any() else set()
        counts[column.output.spec.feature] = (int(column.valid.sum()), column.missing, origins)
    return counts


def assert_misses_from(planned, first, stages=RESNET_STAGES):
    """All cells from stage `first` on miss and come from the stage before it; the rest hit."""
    counts = states(planned)
    number = stages.index(first) if first else len(stages)
    before = stages[number - 1] if number else "the video"
    for stage in stages[:number]:
        assert counts[stage] == (CLIPS, 0, set()), stage
    for stage in stages[number:]:
        assert counts[stage] == (0, CLIPS, {before}), stage
    assert planned.decodes == (CLIPS if not number else 0)


def test_nothing_changed_misses_nothing(videos, store):
    planned, _ = plan(videos, store, SPEC, estimate=False)
    assert_misses_from(planned, None)
    assert not planned.blocks


FRAMES = {
    "frames": {"frames": 4},
    "sampling": {"sampling": "tsn_random"},
    "rate": {"sampling": "uniform_fps", "fps": 2.0},
    "stride": {"sampling": "dense", "stride": 2},
    "decoder policy": {"decoder": "decord"},
    "precision": {"precision": "bfloat16"},
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_decides_the_frames_or_the_precision_misses_everything(name, videos, store):
    planned, _ = plan(videos, store, replace(SPEC, **FRAMES[name]), estimate=False)
    assert_misses_from(planned, "stem")


def test_each_view_is_another_column_and_the_plain_one_still_hits(videos, store):
    requested = replace(SPEC, views=3, flip=True)
    planned, _ = plan(videos, store, requested, estimate=False)
    valid = [(p.output.spec.feature, int(p.valid.sum())) for p in planned.all_columns]
    assert valid == [(s, CLIPS) for s in RESNET_STAGES] + [(s, 0) for s in RESNET_STAGES] * 2
    assert len({p.output.spec.fingerprint for p in planned.all_columns}) == 3 * len(RESNET_STAGES)
    assert not any(p.sources for p in planned.all_columns)


def test_every_field_of_a_frame_set_is_part_of_its_key():
    base = FrameSet()
    others = [
        FrameSet(frames=9),
        FrameSet(sampling="tsn_random"),
        *(FrameSet(sampling="uniform_fps", fps=fps) for fps in (2.0, 2.5)),
        *(FrameSet(sampling="dense", stride=stride) for stride in (2, 3)),
        *(FrameSet(view=view) for view in (1, 2)),
        FrameSet(view=1, flip=True),
        FrameSet(view=1, random_crop=True),
        FrameSet(decoder="decord"),
        *(
            FrameSet(picture=picture)
            for picture in (
                Picture(size=192),
                Picture(resize=256),
                Picture(interpolation="bilinear"),
                Picture(resize_mode="squash"),
            )
        ),
    ]
    keys = [frames_key(frame_set) for frame_set in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert frames_key(FrameSet(decoder="pyav")) == frames_key(base), "one decoder has two keys"
    changed = {
        name
        for frame_set in others
        for name, value in frame_set.identity().items()
        if value != base.identity()[name]
    }
    assert changed == set(base.identity()), "a field without a mutation"
    pictures = {n for frame_set in others for n, v in frame_set.picture.__dict__.items()
                if v != getattr(Picture(), n)}  # fmt: skip
    assert pictures == set(Picture().__dict__), "a field of the picture without a mutation"


PICTURES = {
    "size": {"size": 192},
    "resize": {"resize": 240},
    "interpolation": {"interpolation": "bicubic"},
    "squashing": {"resize_mode": "squash"},
}


@pytest.mark.parametrize("name", PICTURES)
def test_another_picture_misses_everything(name, store, resnet):
    changed = replace(resnet.picture, **PICTURES[name])
    assert changed != resnet.picture
    planned, _ = plan(store, replace(resnet, picture=changed), keep=RESNET_STAGES, estimate=False)
    assert_misses_from(planned, "stem")


def rebuilt(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    with _weights.seeded(0):
        whole = torchvision.models.resnet18()
    return resnet_family.stages(whole, list(mean), list(std), torch.float32)


def test_the_mean_and_the_deviation_of_colours_decide_from_the_first_stage_on(store, resnet):
    same = replace(resnet, stages=rebuilt())
    planned, _ = plan(store, same, keep=RESNET_STAGES, estimate=False)
    assert_misses_from(planned, None)
    for changed in ({"mean": (0.485, 0.456, 0.407)}, {"std": (0.229, 0.2241, 0.225)}):
        other = replace(resnet, stages=rebuilt(**changed))
        planned, _ = plan(store, other, keep=RESNET_STAGES, estimate=False)
        assert_misses_from(planned, "stem")


@pytest.mark.parametrize("stage", [s for s in RESNET_STAGES if s != "pool"])
def test_one_parameter_by_one_ulp_misses_from_its_stage_on(stage, store, resnet):
    module = copy.deepcopy(resnet.stage(stage).module)
    last = list(module.state_dict().values())[-1].view(-1)[-1:]
    last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))
    planned, _ = plan(store, swapped(resnet, stage, module=module), keep=RESNET_STAGES,
                      estimate=False)  # fmt: skip
    assert_misses_from(planned, stage)


def test_a_running_statistic_by_one_ulp_misses_from_its_stage_on(store, resnet):
    module = copy.deepcopy(resnet.stage("layer3.0").module)
    mean = module.bn2.running_mean[:1]
    mean.copy_(torch.nextafter(mean, torch.full_like(mean, torch.inf)))
    planned, _ = plan(store, swapped(resnet, "layer3.0", module=module), keep=RESNET_STAGES,
                      estimate=False)  # fmt: skip
    assert_misses_from(planned, "layer3.0")


def swapped(backbone, name, **changes):
    stages = [replace(s, **changes) if s.name == name else s for s in backbone.stages]
    return replace(backbone, stages=tuple(stages))


@pytest.mark.parametrize(
    "changes", [{"code": "resnet_block/2"}, {"options": {"block": "BasicBlock", "eps": 1e-4}}]
)
def test_the_code_and_the_options_of_a_stage_decide_from_it_on(changes, store, resnet):
    other = swapped(resnet, "layer2.1", **changes)
    planned, _ = plan(store, other, keep=RESNET_STAGES, estimate=False)
    assert_misses_from(planned, "layer2.1")


def test_quick_gelu_decides_from_the_first_mlp_on(store, vit):
    config = open_clip.get_model_config("ViT-S-32")
    chains = []
    for quick in (False, True):
        with _weights.seeded(0):
            visual = clip_vit._visual(config | {"quick_gelu": quick})
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        chains.append(clip_vit.stages(visual, mean, std, torch.float32))
    planned, _ = plan(store, replace(vit, stages=chains[0]), keep=VIT_KEEP, estimate=False)
    assert_misses_from(planned, None, VIT_KEEP)
    planned, _ = plan(store, replace(vit, stages=chains[1]), keep=VIT_KEEP, estimate=False)
    assert_misses_from(planned, "blocks.0.mlp", VIT_KEEP)


class Custom(nn.Module):
    def __init__(self, inner, power=1, table=None):
        super().__init__()
        self.inner, self.power = inner, power
        self.table = table or {"a": [1, 2]}

    def forward(self, x):
        return self.inner(x) ** self.power


GRAFTS = {
    "an adapter's scale": lambda inner: Adapter(inner, width=384, scale=0.2),
    "an adapter's width": lambda inner: Adapter(inner, width=384, bottleneck=32),
    "an adapter's form": lambda inner: Adapter(inner, width=384, form="sequential"),
    "an adapter's seed": lambda inner: Adapter(inner, width=384, seed=1),
    "another module": lambda inner: Custom(inner),
    "its attribute": lambda inner: Custom(inner, power=2),
    "what its attribute holds": lambda inner: Custom(inner, table={"a": [1, 3]}),
}


@pytest.fixture(scope="module")
def grafted_store(store, vit, tmp_path_factory):
    """A copy of the store with the columns of a network that has an adapter."""
    path = Path(shutil.copytree(store, tmp_path_factory.mktemp("grafted") / "s.zarr"))
    grafted = vit.graft("blocks.1.attn", Custom(vit.stage("blocks.1.attn").module))
    base = grafted.graft("blocks.11.mlp", Adapter(vit.stage("blocks.11.mlp").module, width=384))
    update(path, base, keep=VIT_KEEP)
    return path, grafted


@pytest.mark.parametrize("name", GRAFTS)
def test_the_options_of_a_graft_decide_from_its_stage_on(name, grafted_store, vit):
    path, grafted = grafted_store
    inner = vit.stage("blocks.11.mlp").module
    same = grafted.graft("blocks.11.mlp", Adapter(inner, width=384))
    planned, _ = plan(path, same, keep=VIT_KEEP, estimate=False)
    assert_misses_from(planned, None, VIT_KEEP)
    other = grafted.graft("blocks.11.mlp", GRAFTS[name](inner))
    planned, _ = plan(path, other, keep=VIT_KEEP, estimate=False)
    assert_misses_from(planned, "blocks.11.mlp", VIT_KEEP)
    below = vit.graft("blocks.1.attn", Custom(vit.stage("blocks.1.attn").module, power=3))
    planned, _ = plan(path, below, keep=VIT_KEEP, estimate=False)
    assert_misses_from(planned, "blocks.1.attn", VIT_KEEP)


def test_the_share_of_channels_that_a_shift_moves_decides_from_its_stage_on(store, resnet):
    def shifted(fold):
        inner = resnet.stage("layer3.1").module
        return resnet.graft("layer3.1", TemporalShift(inner, frames=2, fold=fold))

    planned, _ = plan(store, shifted(8), keep=RESNET_STAGES, estimate=False)
    assert_misses_from(planned, "layer3.1")
    assert shifted(8).keys("") != shifted(4).keys("")


@pytest.fixture
def dataset_and_store(videos, store, tmp_path):
    return (
        Path(shutil.copytree(videos, tmp_path / "set")),
        Path(shutil.copytree(store, tmp_path / "s.zarr")),
    )


def test_another_video_instead_of_a_clip_misses_that_clip_in_every_column(dataset_and_store):
    root, path = dataset_and_store
    first, other = files_of(root)[:2]
    data = bytearray(other.read_bytes())
    first.write_bytes(bytes(data))
    os.utime(first, ns=(1, 1))
    planned, _ = plan(root, path, SPEC, estimate=False)
    row = int(planned.table.index[planned.table["path"] == str(first.relative_to(root))][0])
    for column in planned.all_columns:
        # Its bytes are another clip's now, whose cells are there.
        assert list(column.copied) == [row]
        assert not column.compute.any()
    data[-1] ^= 1
    first.write_bytes(bytes(data))
    planned, _ = plan(root, path, SPEC, estimate=False)
    for column in planned.all_columns:
        assert np.flatnonzero(column.compute).tolist() == [row]
        assert column.from_video[row]
        assert int(column.valid.sum()) == CLIPS - 1
    assert planned.decodes == 1


def test_another_interval_of_the_same_file_misses_that_clip(videos, tmp_path):
    names = [str(p.relative_to(videos)) for p in files_of(videos)]
    root = Path(shutil.copytree(videos, tmp_path / "set"))
    listed, path = root / "list.csv", tmp_path / "s.zarr"

    def write(last_end):
        ends = [1.0] * (CLIPS - 1) + [last_end]
        lines = [
            f"{n},x,{0.1 * i},{end}" for i, (n, end) in enumerate(zip(names, ends, strict=True))
        ]
        listed.write_text("path,label,start_seconds,end_seconds\n" + "\n".join(lines))

    keep = ("layer2.1", "pool")
    write(1.0)
    build(listed, path, replace(SPEC, keep=keep), runtime=SERIAL)
    planned, _ = plan(listed, path, replace(SPEC, keep=keep), estimate=False)
    assert_misses_from(planned, None, keep)
    write(1.1)
    planned, _ = plan(listed, path, replace(SPEC, keep=keep), estimate=False)
    for column in planned.all_columns:  # another clip: a row of its own, the old one's cells stay
        assert np.flatnonzero(column.compute).tolist() == [CLIPS]
        assert column.from_video[CLIPS]
        assert int(column.valid.sum()) == CLIPS


def test_paths_times_order_and_workers_miss_nothing(dataset_and_store, tmp_path):
    root, path = dataset_and_store
    moved = root.rename(tmp_path / "elsewhere")
    for file in files_of(moved):
        os.utime(file, ns=(7, 7))
    runtime = Runtime(serial=True, workers=3, deadline_seconds=7.0, retry=True)
    planned, _ = plan(moved, path, SPEC, runtime=runtime, estimate=False)
    assert_misses_from(planned, None)
    # Some files under other names, which sort otherwise: their rows and cells stay.
    for i, file in enumerate(reversed(files_of(moved)[1:])):
        file.rename(file.with_name(f"renamed_{i}{file.suffix}"))
    planned, _ = plan(moved, path, SPEC, estimate=False)
    assert_misses_from(planned, None)
    # Copies of them: as no build has seen the new names, whose row is which is open. Cells by copy.
    for i, file in enumerate(files_of(moved)[1:]):
        shutil.copy(file, file.with_name(f"copy_{i}{file.suffix}"))
    planned, _ = plan(moved, path, SPEC, estimate=False)
    assert not planned.blocks
    copies = 2 * (CLIPS - 1)
    assert all(len(p.copied) == copies and not p.compute.any() for p in planned.all_columns)


def test_features_requested_in_another_order_or_beside_others_are_the_same(videos, store):
    backwards = replace(SPEC, keep=tuple(reversed(RESNET_STAGES)))
    planned, _ = plan(videos, store, backwards, estimate=False)
    assert_misses_from(planned, None)
    both = BuildSpec(("resnet18:random-0", "resnet18:random-1"), ("pool",), frames=2,
                     dtype="float32", text=False)  # fmt: skip
    planned, _ = plan(videos, store, both, estimate=False)
    assert [int(p.valid.sum()) for p in planned.all_columns] == [CLIPS, 0]
    assert FeatureStore.open(store).feature(RESNET, "pool").valid.all()
