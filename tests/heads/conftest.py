"""Fixtures of the tests of heads."""

import pytest

from varve.contracts._head_runner import Runner


@pytest.fixture(scope="session")
def runner():
    """Return the class whose `Runner(build, **options)` runs the head that `build` builds."""
    return Runner
