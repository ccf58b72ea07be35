"""Whatever builds refuses a store on object storage before it does anything else."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from varve import BuildSpec, build, plan, update
from varve.stores import FeatureStore
from varve.stores.locations import RemotePath

URL = "s3://bucket/ucf101.zarr"
SPEC = BuildSpec(("resnet18:random-0",), ("pool",))


@pytest.mark.parametrize("store", [URL, Path(URL), "gs://bucket/a.zarr", "https://host/a.zarr"])
@pytest.mark.parametrize("command", [build, plan])
def test_a_build_to_a_url_is_refused_and_makes_no_folder(tmp_path, monkeypatch, command, store):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(io.UnsupportedOperation, match=r"read only. Build on a local disk and copy"):
        command(tmp_path, store, SPEC)
    assert not list(tmp_path.iterdir())


def test_an_update_of_a_copied_store_is_refused():
    far = FeatureStore(RemotePath("", SimpleNamespace(url=URL)), {})
    with pytest.raises(io.UnsupportedOperation, match=f"{URL} is on object storage"):
        update(far, None)
