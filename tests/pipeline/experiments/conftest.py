"""A Dask client that tests of experiments share: starting worker processes takes seconds."""

import pytest

from varve.pipeline.extraction.cluster import connected


@pytest.fixture(scope="session")
def client():
    """A client of one worker process."""
    with connected("", [{"nthreads": 1}], threads=1, kinds=()) as opened:
        yield opened
