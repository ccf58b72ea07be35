"""The anchor pool against loops in float64: routing, search, ties, growth, keys."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from varve.heads.parts.anchor_pool import AnchorPool


def cosine(a, b):
    """Return the float32 cosine, by which ties are decided; 0 with zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return np.float32((a * b).sum() / norms) if norms else np.float32(0)


class Routed(NamedTuple):
    """Experts by descending similarity."""

    experts: torch.Tensor
    similarities: torch.Tensor
    nearest: torch.Tensor


def route(pool, residuals_BKD, top_k=None, key=""):
    """Order what `compare` returns; of equal experts the first comes first."""
    similarities_BK, nearest_BK = pool.compare(residuals_BKD, key)
    order_BK = similarities_BK.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return Routed(order_BK, *(x.gather(1, order_BK) for x in (similarities_BK, nearest_BK)))


def routed(blocks, residuals_BKD, top_k):
    """Return expected results of `route`: (-similarity, expert, index of the class), best first."""
    out = []
    for row in residuals_BKD:
        ranked = []
        for k, residual in enumerate(row):
            best, index = None, None
            for c, anchor in enumerate(blocks[k]):
                similarity = cosine(residual, anchor)
                if best is None or similarity > best:
                    best, index = similarity, c
            ranked.append((-best, k, index))
        out.append(sorted(ranked)[:top_k])
    return out


def grown(blocks, classes=None, key="", pool=None, **options):
    pool = pool or AnchorPool(blocks[0].shape[1], **options)
    for k, block in enumerate(blocks):
        labels = [100 * k + c for c in range(len(block))] if classes is None else classes[k]
        pool.add(k, labels, torch.from_numpy(block), key)
    return pool


def drawn(seed, sizes, width):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, width)).astype(np.float32) for size in sizes]


def same_routing(pool, blocks, residuals_BKD, top_k):
    routing = route(pool, torch.from_numpy(residuals_BKD), top_k)
    expected = routed(blocks, residuals_BKD, top_k)
    assert routing.experts.tolist() == [[k for _, k, _ in row] for row in expected]
    assert routing.nearest.tolist() == [[100 * k + c for _, k, c in row] for row in expected]
    similarities = np.array([[-s for s, _, _ in row] for row in expected])
    np.testing.assert_allclose(routing.similarities, similarities, rtol=0, atol=2e-7)
    return routing


@pytest.mark.parametrize(("sizes", "width"), [((1,), 3), ((3, 1, 40), 16), ((2,) * 100, 64)])
def test_routing_is_brute_force(sizes, width):
    blocks = drawn(0, sizes, width)
    pool = grown(blocks)
    residuals = np.random.default_rng(1).normal(size=(7, len(sizes), width)).astype(np.float32)
    routing = same_routing(pool, blocks, residuals, min(3, len(sizes)))
    assert [x.dtype for x in routing] == [torch.int64, torch.float32, torch.int64]
    # One clip is routed as it is among others, to the bit.
    alone = route(pool, torch.from_numpy(residuals[2:3]), min(3, len(sizes)))
    assert all(torch.equal(a[0], b[2]) for a, b in zip(alone, routing, strict=True))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_routing_and_search_are_brute_force_whatever_the_ties(data):
    # Small whole numbers: equal, opposite, parallel and zero vectors, and equal cosines between
    # different ones, in most pools.
    width = data.draw(st.integers(1, 5))
    numbers = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    blocks = [np.array([data.draw(numbers) for _ in range(n)], np.float32) for n in sizes]
    rows = data.draw(st.integers(1, 4))
    residuals = np.array([[data.draw(numbers) for _ in sizes] for _ in range(rows)], np.float32)
    pool = grown(blocks)
    top_k = data.draw(st.integers(1, len(sizes)))
    same_routing(pool, blocks, residuals, top_k)

    every = np.concatenate(blocks)
    labels = [(k, 100 * k + c) for k, n in enumerate(sizes) for c in range(n)]
    top_k = data.draw(st.integers(1, len(every) + 2))
    near = pool.nearest(torch.from_numpy(residuals[:, 0]), top_k)
    for b, row in enumerate(residuals[:, 0]):
        order = sorted(range(len(every)), key=lambda n: (-cosine(row, every[n]), n))[:top_k]
        experts_and_classes = zip(near.experts[b].tolist(), near.classes[b].tolist(), strict=True)
        assert list(experts_and_classes) == [labels[n] for n in order]


def test_the_first_of_equal_classes_and_of_equal_experts_wins():
    same = np.ones((1, 512), np.float32) / 3
    other = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
    # 40 copies: more than the first candidates, and enough rows for FAISS to use BLAS.
    blocks = [np.concatenate([other, same.repeat(40, 0)]) for _ in range(3)]
    pool = grown(blocks)
    for batch in (1, 50):
        queries = torch.from_numpy(same).expand(batch, 512)
        routing = route(pool, queries[:, None].expand(-1, 3, -1))
        assert routing.experts.tolist() == [[0, 1, 2]] * batch
        assert routing.nearest.tolist() == [[40, 140, 240]] * batch
        near = pool.nearest(queries, 45)
        first = [*range(40, 80), *range(140, 145)]
        assert near.classes.tolist() == [first] * batch
        assert near.similarities.unique().tolist() == [1.0]


def test_similarities_that_float32_sums_cannot_order_are_in_the_right_order():
    # Anchors a few ULPs apart: sums of 512 products in float32 are further off.
    rng = np.random.default_rng(0)
    start = rng.normal(size=512).astype(np.float32)
    steps = 1 + 3e-6 * rng.normal(size=(64, 512))
    block = (start * steps).astype(np.float32)
    residuals = (start * (1 + 0.3 * rng.normal(size=(30, 1, 512)))).astype(np.float32)
    pool = grown([block])
    same_routing(pool, [block], residuals, 1)
    near = pool.nearest(torch.from_numpy(residuals[:, 0]), 5)
    for b in range(len(residuals)):
        order = sorted(range(64), key=lambda n: (-cosine(residuals[b, 0], block[n]), n))[:5]
        assert near.classes[b].tolist() == order


def test_a_pool_that_grew_equals_a_pool_built_at_once():
    sizes = [1 + k % 3 for k in range(40)]
    blocks = drawn(0, sizes, 12)
    residuals = drawn(1, [9], len(sizes) * 12)[0].reshape(9, len(sizes), 12)
    once = grown(blocks)
    slow = AnchorPool(12)
    for k, block in enumerate(blocks):
        slow.add(k, [100 * k + c for c in range(len(block))], torch.from_numpy(block))
        # Queries in between, so that whatever is made for the first one has to grow.
        slow.nearest(torch.ones(1, 12), 3)
        route(slow, torch.ones(1, k + 1, 12))
    for a, b in (
        (route(once, torch.from_numpy(residuals)), route(slow, torch.from_numpy(residuals))),
        (once.nearest(torch.ones(30, 12), 9), slow.nearest(torch.ones(30, 12), 9)),
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    same_routing(slow, blocks, residuals, 5)
    assert torch.equal(slow.anchors(7), torch.from_numpy(blocks[7]))


def test_a_state_is_a_copy_of_the_tensors_and_survives_safetensors():
    blocks = drawn(0, (2, 5), 6)
    pool = AnchorPool(6)
    for k, key in enumerate(("", "ViT-B-16 · é")):
        classes = [7 + k, *range(10 * k, 10 * k + len(blocks[k]) - 1)]
        pool.add(k, classes, torch.from_numpy(blocks[k]), key)
    state = pool.state_dict()
    again = AnchorPool(6)
    again.load_state_dict(load(save(state)))
    assert again.classes == pool.classes == [[7, 0], [8, 10, 11, 12, 13]]
    assert again.keys == ["", "ViT-B-16 · é"]
    second = again.state_dict()
    assert second.keys() == state.keys()
    assert all(torch.equal(second[name], state[name]) for name in state)
    assert torch.equal(state["expert.1.anchors"], torch.from_numpy(blocks[1]))
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(pool.state_dict()[name], second[name]) for name in second)
    # It resumes where the first pool would have.
    for anchor_pool in (pool, again):
        anchor_pool.add(2, [50], torch.ones(1, 6), "ViT-B-16 · é")
    residuals = torch.from_numpy(drawn(1, (12,), 6)[0]).reshape(4, 3, 6)
    for anchor_pool in (pool, again):
        anchor_pool.lineage = True  # the keys of the experts differ
    routings = [route(anchor_pool, residuals, key="ViT-B-16 · é") for anchor_pool in (pool, again)]
    assert all(torch.equal(*parts) for parts in zip(*routings, strict=True))


def test_what_was_added_outlives_the_tensor_that_it_came_from():
    anchors = torch.eye(3)
    pool = AnchorPool(3)
    pool.add(0, [0, 1, 2], anchors)
    anchors.zero_()
    assert pool.nearest(torch.eye(3), 1).classes.tolist() == [[0], [1], [2]]
    assert route(pool, torch.eye(3)[:, None]).nearest.tolist() == [[0], [1], [2]]
    assert torch.equal(pool.anchors(0), torch.eye(3))


def test_anchors_of_another_column_refuse_the_query():
    pool = AnchorPool(4)
    pool.add(0, [0], torch.ones(1, 4), "frozen")
    pool.add(1, [1], torch.ones(1, 4), "moved")
    ones = torch.ones(2, 2, 4)
    for key in ("frozen", "moved", "", "foreign"):
        with pytest.raises(ValueError, match=f"from column '{key}'.*were made from"):
            route(pool, ones, key=key)
        with pytest.raises(ValueError, match="were made from"):
            pool.nearest(ones[:, 0], 1, key)
    with pytest.raises(ValueError, match=r"experts \[0\] were made from 'frozen'"):
        pool.compare(ones, key="moved")


def test_in_the_lineage_of_a_run_the_newest_column_may_query_older_anchors():
    pool = AnchorPool(4, lineage=True)
    pool.add(0, [0], torch.ones(1, 4), "frozen")
    ones = torch.ones(2, 2, 4)
    assert route(pool, ones[:, :1], key="frozen").experts.tolist() == [[0], [0]]
    pool.add(1, [1], torch.ones(1, 4), "moved")
    assert route(pool, ones, key="moved").experts.tolist() == [[0, 1], [0, 1]]
    assert pool.nearest(ones[:, 0], 2, "moved").experts.tolist() == [[0, 1], [0, 1]]
    # The state before the move did not make the newer anchors; another run's made none.
    for key in ("frozen", "foreign", ""):
        with pytest.raises(ValueError, match="'moved'"):
            route(pool, ones, key=key)


@pytest.mark.parametrize("top_k", [3, 4, 1000])
def test_asking_for_more_than_there_are_gives_all(top_k):
    blocks = drawn(0, (1, 1, 1), 4)
    pool = grown(blocks)
    assert route(pool, torch.ones(2, 3, 4), top_k).experts.shape == (2, 3)
    assert pool.nearest(torch.ones(2, 4), top_k).classes.shape == (2, 3)
    assert route(pool, torch.ones(2, 3, 4)).experts.shape == (2, 3)


def test_no_clip_is_routed_to_nothing():
    pool = grown(drawn(0, (2, 2), 4))
    assert [x.shape for x in route(pool, torch.ones(0, 2, 4), 1)] == [(0, 1)] * 3
    assert [x.shape for x in pool.nearest(torch.ones(0, 4), 3)] == [(0, 3)] * 3


def test_zeros_are_at_nothing_from_everything_and_the_first_wins():
    pool = grown([np.eye(4, dtype=np.float32)[1:3], np.zeros((2, 4), np.float32)])
    routing = route(pool, torch.zeros(1, 2, 4))
    assert routing.similarities.tolist() == [[0.0, 0.0]]
    assert routing.experts.tolist() == [[0, 1]]
    assert routing.nearest.tolist() == [[0, 100]]
    assert pool.nearest(torch.zeros(1, 4), 3).classes.tolist() == [[0, 1, 100]]
    # An anchor of zeros is nearer than an opposite one.
    near = pool.nearest(-torch.eye(4)[1:2], 4)
    assert near.classes.tolist() == [[1, 100, 101, 0]]
    assert near.similarities.tolist() == [[0.0, 0.0, 0.0, -1.0]]


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_the_length_of_a_vector_does_not_matter(scale):
    blocks = [np.sign(block) for block in drawn(0, (3, 3), 8)]
    residuals = np.sign(drawn(1, (4,), 16)[0]).reshape(4, 2, 8)
    scaled = grown([block * np.float32(scale) for block in blocks])
    for scaled_residuals in (residuals, residuals * np.float32(scale)):
        for pool in (grown(blocks), scaled):
            same_routing(pool, blocks, scaled_residuals, 2)


def test_queries_are_not_changed():
    pool = grown(drawn(0, (2, 2), 4))
    residuals = torch.tensor([[[1e30, 1, 2, 3], [1e-30, 0, 0, 0]], [[0, 0, 0, 0], [1, 2, 3, 4]]])
    before = residuals.clone()
    route(pool, residuals)
    pool.nearest(residuals[:, 0], 2)
    assert torch.equal(residuals, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(value):
    pool = grown(drawn(0, (2, 2), 4))
    before = pool.state_dict()
    spoilt = torch.ones(3, 2, 4)
    spoilt[1, 1, 2] = value
    with pytest.raises(ValueError, match="residuals are not finite"):
        route(pool, spoilt)
    with pytest.raises(ValueError, match="queries are not finite"):
        pool.nearest(spoilt[:, 1], 1)
    with pytest.raises(ValueError, match="anchors of expert 2 are not finite"):
        pool.add(2, [0, 1, 2], spoilt[:, 1])
    assert len(pool) == 2
    assert all(torch.equal(pool.state_dict()[name], before[name]) for name in before)


def test_shapes_that_do_not_fit_are_refused_and_named():
    pool = AnchorPool(4)
    with pytest.raises(ValueError, match=r"no anchors yet.*learn first"):
        route(pool, torch.ones(1, 0, 4))
    with pytest.raises(ValueError, match=r"no anchors yet.*learn first"):
        pool.nearest(torch.ones(1, 4), 1)
    assert pool.state_dict() == {}
    pool.add(0, [3, 5], torch.eye(4)[:2])
    for residuals, message in (
        (torch.ones(1, 1, 5), r"\[1, 1, 5\], where the pool has vectors of 4"),
        (torch.ones(1, 2, 4), r"\[1, 2, 4\] for 1 experts"),
        (torch.ones(1, 4), r"\[1, 4\] for 1 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            route(pool, residuals)
    with pytest.raises(ValueError, match="ask for one anchor at least"):
        pool.nearest(torch.ones(1, 4), 0)
    with pytest.raises(ValueError, match="vectors of 4"):
        pool.nearest(torch.ones(1, 3), 1)
    for expert, classes, anchors, message in (
        (0, [1], torch.ones(1, 4), "0 for a pool of 1.*1 is next"),
        (2, [1], torch.ones(1, 4), "2 for a pool of 1.*1 is next"),
        (1, [], torch.ones(0, 4), "at least one"),
        (1, [1, 1], torch.ones(2, 4), "each class once"),
        (1, [1, 2], torch.ones(1, 4), "for 2 classes"),
        (1, [1], torch.ones(1, 5), "vectors of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.add(expert, classes, anchors)
    assert pool.classes == [[3, 5]]
    # A state of another width leaves the pool as it is.
    with pytest.raises(ValueError, match="vectors of 4"):
        pool.load_state_dict(grown(drawn(0, (2,), 6)).state_dict())
    assert pool.classes == [[3, 5]]
    with pytest.raises(ValueError, match="at least 1"):
        AnchorPool(0)


def test_half_precision_and_views_are_taken_as_they_are():
    blocks = drawn(0, (3, 3), 8)
    pool = grown(blocks)
    residuals = torch.from_numpy(drawn(1, (10,), 16)[0]).reshape(5, 2, 2, 8)[:, :, 1].half()
    routing = route(pool, residuals)
    expected = routed(blocks, residuals.float().numpy(), 2)
    assert routing.experts.tolist() == [[k for _, k, _ in row] for row in expected]
    assert routing.similarities.dtype == torch.float32


@pytest.mark.gpu
def test_a_gpu_finds_the_same_anchors():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 64)).astype(np.float32)
    vectors[5000:5100] = vectors[:100]
    queries = torch.from_numpy(vectors[::7]).cuda()
    results = {}
    for gpu_above in (None, 1):
        pool = AnchorPool(64, gpu_above=gpu_above)
        pool.add(0, range(12_000), torch.from_numpy(vectors[:12_000]))
        pool.nearest(queries, 4)
        pool.add(1, range(12_000, 20_000), torch.from_numpy(vectors[12_000:]))
        results[gpu_above] = pool.nearest(queries, 4)
        assert (pool._on_gpu is None) == (gpu_above is None)
        assert results[gpu_above].classes.device == queries.device
    for on_cpu, on_gpu in zip(results[None], results[1], strict=True):
        assert torch.equal(on_cpu, on_gpu)
    pool = grown([vectors[:50], vectors[50:90]])
    routing = route(pool, queries[:8, None].expand(-1, 2, -1))
    assert routing.experts.device == queries.device
