"""Other libraries open the arrays and see the same numbers."""

import numpy as np
import pytest


@pytest.fixture
def feature(store):
    return store.feature("net:tag", "blocks.0:cls", fingerprint="ab")


def stored(feature):
    """Return the values as a reader without bfloat16 sees them."""
    return feature.bits(np.arange(2))


def test_zarr_python_reads_the_array(feature):
    import zarr

    array = zarr.open_array(str(feature.path), mode="r")
    np.testing.assert_array_equal(array[:2], stored(feature))
    assert array.attrs["fingerprint"] == feature.fingerprint


def test_zarr_python_walks_the_groups_from_the_root(store, feature):
    import zarr

    root = zarr.open_group(str(store.path), mode="r")
    array = root["features/net:tag/blocks.0:cls"][feature.path.name]
    np.testing.assert_array_equal(array[:2], stored(feature))


def test_tensorstore_reads_the_array(feature):
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(feature.path)}}
    array = tensorstore.open(spec, open=True, read=True).result()
    np.testing.assert_array_equal(array[:2].read().result(), stored(feature))


def test_xarray_reads_the_group(feature):
    import xarray

    group = xarray.open_zarr(str(feature.path.parent), consolidated=False, mask_and_scale=False)
    array = group[feature.path.name]
    assert array.dims == ("clip", "frame", "blocks.0:cls.0")
    np.testing.assert_array_equal(array[:2].values, stored(feature))
    assert group[f"{feature.path.name}.done"].dims == ("clip", "key_byte")
