"""The warning about precisions that a CPU has no instructions for."""

import pytest

from varve.pipeline import precision


def test_float32_is_not_slower_than_itself():
    assert precision.precision_warning("float32") == ""


@pytest.mark.parametrize(("ratio", "message"), [(80.0, "80 times as long"), (0.3, "")])
def test_a_precision_without_instructions_gives_a_warning(monkeypatch, ratio, message):
    seconds = {"float32": 1e-3, "bfloat16": ratio * 1e-3}
    monkeypatch.setattr(precision, "_seconds", seconds.__getitem__)
    warning = precision.precision_warning("bfloat16")
    assert message in warning
    assert bool(warning) == bool(message)


def test_a_product_takes_some_time():
    assert 0 < precision._seconds("float32") < 1
