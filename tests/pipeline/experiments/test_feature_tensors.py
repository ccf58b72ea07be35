"""Cells as tensors have the stored numbers, kept whole or streamed in batches."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch

from varve.pipeline.experiments.feature_tensors import FeatureTensors
from varve.stores import FeatureStore, clips
from varve.stores.columns import Column, ColumnSpec

CLIPS, CELL = 23, (3, 5)


@pytest.fixture(params=["float16", "float32", "bfloat16"])
def feature(request, tmp_path):
    opened = FeatureStore.create(tmp_path / "s.zarr")
    rows = [clips.blank(f"a/{i}.mp4", "wave", "train") | {"digest": f"{i:064d}", "status": "ready"}
            for i in range(CLIPS)]  # fmt: skip
    table = pd.DataFrame(rows).astype(clips.COLUMNS).rename_axis(index="row")
    clips.write(opened.path, table)
    spec = ColumnSpec("net:tag", "pool", "ab" * 32, CELL, request.param, {"frames": {"view": 0}})
    values = torch.randn(CLIPS, *CELL, generator=torch.Generator().manual_seed(0))
    stored = values.to(getattr(torch, request.param))
    bits = stored.view(torch.uint16) if request.param == "bfloat16" else stored
    column = Column(opened.path, spec)
    column.create(CLIPS)
    column.write_shard(0, np.arange(CLIPS - 1), bits.numpy()[:-1], clips.row_keys(table)[:-1],
                       CLIPS)  # fmt: skip
    return FeatureStore.open(opened.path).feature("net:tag", "pool"), stored[:-1]


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_batches_are_the_cells_in_the_drawn_order_each_once(feature, budget):
    stored_feature, stored = feature
    tensors = FeatureTensors(stored_feature, budget_bytes=budget)
    assert (len(tensors), tensors.in_memory) == (CLIPS - 1, budget > 0)
    for generator in (None, np.random.default_rng(3)):
        seen = []
        for indices, cells in tensors.batches(4, generator):
            assert cells.dtype == stored.dtype
            assert torch.equal(cells, stored[indices])
            seen += indices.tolist()
        assert sorted(seen) == list(range(CLIPS - 1))
        assert (seen == sorted(seen)) == (generator is None)
    assert torch.equal(tensors[[5, 0, 5]], stored[[5, 0, 5]])


def test_rows_may_be_chosen_and_repeat(feature):
    stored_feature, stored = feature
    for budget in (1 << 30, 0):
        tensors = FeatureTensors(stored_feature, [7, 2, 7], budget_bytes=budget)
        assert torch.equal(tensors[torch.tensor([0, 1, 2])], stored[[7, 2, 7]])


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_a_mask_selects_clips_and_a_wrong_index_is_refused(feature, budget):
    stored_feature, stored = feature
    mask = np.zeros(CLIPS, bool)
    mask[[3, 5]] = True
    tensors = FeatureTensors(stored_feature, mask, budget_bytes=budget)
    assert tensors.rows.tolist() == [3, 5]
    assert torch.equal(tensors[torch.tensor([False, True])], stored[[5]])
    for indices in ([2], [-1], [0.5], [True]):
        with pytest.raises(IndexError, match=r"^indices of 2 clips: "):
            tensors[indices]
    with pytest.raises(IndexError, match="rows are whole numbers"):
        FeatureTensors(stored_feature, np.array([0.5]))


def test_cells_that_fit_are_read_once_and_others_batch_by_batch(feature, monkeypatch):
    stored_feature, stored = feature
    reads = []
    real = type(stored_feature).read
    monkeypatch.setattr(
        type(stored_feature), "read",
        lambda self, rows, **kw: (reads.append(len(rows)), real(self, rows, **kw))[1],
    )  # fmt: skip
    kept = FeatureTensors(stored_feature)
    for _ in range(2):
        list(kept.batches(4))
    assert reads == [CLIPS - 1]
    assert torch.equal(kept.whole, stored)
    reads.clear()
    streamed = FeatureTensors(stored_feature, budget_bytes=0)
    list(streamed.batches(5))
    assert reads == [5, 5, 5, 5, 2]
    with pytest.raises(ValueError, match="more than the budget: use `batches`"):
        _ = streamed.whole


def test_only_the_next_batches_are_read_ahead(feature, monkeypatch):
    stored_feature, _ = feature
    reads = []
    real = type(stored_feature).read
    third = threading.Event()

    def read(self, rows, **kw):
        reads.append(threading.get_ident())
        if len(reads) == 3:
            third.set()
        return real(self, rows, **kw)

    monkeypatch.setattr(type(stored_feature), "read", read)
    batches = FeatureTensors(stored_feature, budget_bytes=0).batches(3)
    next(batches)
    assert third.wait(10)
    assert len(reads) == 3
    assert threading.get_ident() not in reads
    batches.close()


def test_a_clip_without_the_feature_is_reported_and_not_invented(feature):
    stored_feature, _ = feature
    for budget in (1 << 30, 0):
        tensors = FeatureTensors(stored_feature, [0, CLIPS - 1], budget_bytes=budget)
        with pytest.raises(LookupError, match=f"row {CLIPS - 1}"):
            list(tensors.batches(2))
    with pytest.raises(IndexError, match=f"rows 0 to {CLIPS} are not all in"):
        FeatureTensors(stored_feature, [0, CLIPS])
    with pytest.raises(ValueError, match="at least one clip"):
        list(FeatureTensors(stored_feature).batches(0))


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_from_pinned_memory(feature):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stored_feature, stored = feature
    for budget in (1 << 30, 0):
        for indices, cells in FeatureTensors(
            stored_feature, device="cuda", budget_bytes=budget
        ).batches(4):
            assert cells.device.type == "cuda"
            assert torch.equal(cells.cpu(), stored[indices])
