"""Canonical JSON and digests: equal values, and only equal values, have equal digests."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varve.stores.digests import canonical, digest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip


@given(JSON)
def test_canonical_json_reads_back_as_the_value(value):
    assert json.loads(canonical(value)) == value


@given(st.dictionaries(st.text(), JSON))
def test_the_order_of_keys_does_not_count(value):
    reversed_value = dict(reversed(value.items()))
    assert digest(reversed_value) == digest(value)


def test_one_and_one_point_zero_and_true_are_three_values():
    assert len({digest(1), digest(1.0), digest(True), digest("1")}) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32(1), {1: 2}, {1, 2}, b"x"])
def test_a_value_without_an_exact_form_is_refused_and_named(value):
    with pytest.raises(TypeError, match=r"\$\.a\[1\]"):
        digest({"a": [0, value]})


def test_the_digest_of_a_specification_does_not_change():
    """A changed digest is another key for every cell, and must be a decision."""
    spec = {"frames": 8, "sampling": "tsn", "fps": 0.0, "crop": None, "label": "grün"}
    assert digest(spec) == "865c8c02ddaef09c18c8f00ce952e2bc01323c38c2b2deadcf41db9781ac8464"
