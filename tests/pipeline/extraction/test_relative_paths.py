"""A store and a data set named from the working folder are those named whole."""

from pathlib import Path

import pytest

from varve import BuildSpec, Runtime, build
from varve.pipeline.datasets.synthetic import make_dataset
from varve.pipeline.extraction import worker
from varve.stores import FeatureStore

SERIAL = Runtime(serial=True)
pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")
SPEC = BuildSpec(("resnet18:random-0",), ("stem:pool",), frames=2)


class Stop(BaseException):
    """Stands for a kill."""


def bytes_of(store: Path) -> dict[str, bytes]:
    files = (p for p in store.rglob("*") if p.is_file() and "logs" not in p.parts)
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def test_a_killed_build_of_a_relative_store_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("varve.pipeline.extraction.blocks.CPU_BLOCK_PICTURES", 4)
    make_dataset(Path("set"), clips_per_class=3, classes=("grow", "shrink"), broken=False)
    build("set", tmp_path / "whole.zarr", SPEC, runtime=SERIAL)
    put, staged = worker.staging.put, []

    def stopping(*block):
        staged.append(put(*block))
        if len(staged) == 2:
            raise Stop
        return staged[-1]

    with monkeypatch.context() as patch:
        patch.setattr(worker.staging, "put", stopping)
        with pytest.raises(Stop):
            build("set", "s.zarr", SPEC, runtime=SERIAL)
    done = build("set", "s.zarr", SPEC, runtime=SERIAL)
    assert done.adopted > 0
    assert done.adopted + done.computed == 6
    assert bytes_of(Path("s.zarr")) == bytes_of(tmp_path / "whole.zarr")


def test_an_open_store_stays_where_it_was_opened(tmp_path, monkeypatch):
    FeatureStore.create(tmp_path / "s.zarr")
    monkeypatch.chdir(tmp_path)
    opened = FeatureStore.open("s.zarr")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened.path == tmp_path / "s.zarr"
    assert opened.features() == []
