"""Tests of every sampling rule, on clips of any length."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from varve.contracts.options import names
from varve.pipeline.config import FrameSet, rule_options
from varve.pipeline.decoders.sampling import indices
from varve.pipeline.registry import variant

STEPS = st.lists(st.floats(1e-3, 10), min_size=0, max_size=100)


def pytest_generate_tests(metafunc):
    metafunc.parametrize("rule", names(metafunc.config, "samplings"))


def frame_sets(data, rule):
    """Draw a frame set of the rule, with the options that it takes."""
    options = {"fps": st.floats(0.01, 200), "stride": st.integers(1, 50)}
    taken = {name: data.draw(options[name], name) for name in rule_options(rule) if name in options}
    frames, view = data.draw(st.integers(1, 64), "T"), data.draw(st.integers(0, 3), "view")
    return FrameSet(frames=frames, sampling=rule, view=view, **taken)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), steps=STEPS, start=st.floats(0, 1000), seed=st.text(max_size=8))
def test_indices_lie_in_the_clip_and_follow_the_seed_alone(rule, data, steps, start, seed):
    frame_set = frame_sets(data, rule)
    times_N = start + np.cumsum([0.0, *steps])
    before_N = times_N.copy()
    indices_T = indices(frame_set, times_N, seed)
    np.testing.assert_array_equal(times_N, before_N, "the rule changed the times")
    assert (indices_T.dtype, indices_T.shape) == (np.int64, (frame_set.frames,))
    assert indices_T.min() >= 0
    assert indices_T.max() < len(times_N)
    if getattr(variant("samplings", rule), "ORDERED", True):
        assert (np.diff(indices_T) >= 0).all()
    indices(frame_set, times_N, seed + "another")
    np.testing.assert_array_equal(indices(frame_set, times_N, seed), indices_T)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), steps=STEPS)
def test_a_rule_without_draws_ignores_the_seed(rule, data, steps):
    frame_set = frame_sets(data, rule)
    times_N = np.cumsum([0.0, *steps])
    if "random" not in rule_options(rule):
        first, second = (indices(frame_set, times_N, seed) for seed in "ab")
        np.testing.assert_array_equal(first, second)


def test_a_rule_with_draws_varies_with_the_seed_in_views_above_0(rule):
    options = {name: 1 for name in ("fps", "stride") if name in rule_options(rule)}
    frame_set = FrameSet(frames=4, sampling=rule, view=1, **options)
    chosen = {tuple(indices(frame_set, np.arange(1000) / 25, str(seed))) for seed in range(9)}
    assert (len(chosen) > 1) == ("random" in rule_options(rule))
