"""Full and read-only disks: the message, and that nothing is lost."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.extraction.build import build
from varve.stores import FeatureStore

SERIAL = Runtime(serial=True)
SPEC = BuildSpec(("resnet18:random-0",), ("stem:grid7",), frames=8)

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(("grow", "shrink"), 4)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 512 kB. Making one takes root on Linux."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_was_finished(videos, small_disk, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr("shutil.disk_usage", lambda path: real(path)._replace(free=1 << 40))
    store = small_disk / "s.zarr"
    with pytest.raises(OSError, match=r"full\. Everything finished is kept: make room") as caught:
        build(videos, store, SPEC, runtime=SERIAL)
    assert caught.value.errno == errno.ENOSPC
    FeatureStore.open(store)
    shutil.copytree(store, tmp_path / "larger.zarr")
    build(videos, tmp_path / "larger.zarr", SPEC, runtime=SERIAL)
    build(videos, tmp_path / "other.zarr", SPEC, runtime=SERIAL)
    (got,) = FeatureStore.open(tmp_path / "larger.zarr").features()
    (expected,) = FeatureStore.open(tmp_path / "other.zarr").features()
    assert (got.read() == expected.read()).all()


def test_a_store_that_may_only_be_read_is_read_and_not_built(videos, small_disk, monkeypatch):
    spec = BuildSpec(SPEC.backbones, ("layer1.0:pool",), frames=1)
    store = small_disk / "s.zarr"
    build(videos, store, spec, runtime=SERIAL)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (feature,) = FeatureStore.open(store).features()
    assert feature.read().shape == (8, 1, 64)
    with pytest.raises(OSError, match="may not be written") as caught:
        build(videos, store, SPEC, runtime=SERIAL)
    assert caught.value.errno in (errno.EROFS, errno.EACCES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_clear_error(videos, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        build(videos, tmp_path / "shut" / "s.zarr", SPEC, runtime=SERIAL)
