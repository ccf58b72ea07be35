"""Small stores, written without a pipeline.

`store` has two columns of three clips, the last one missing; `write_rows` fills a column with as
many as a test asks for.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from varve.stores import FeatureStore, clips
from varve.stores.columns import Column, ColumnSpec

T, D = 4, 3


def values_of(row: int, dtype: str = "float16") -> np.ndarray:
    """The cell of a row: numbers that float16 and bfloat16 both hold exactly."""
    return np.arange(T * D, dtype=np.float32).reshape(T, D) + 16 * row


def bits_of(row: int, dtype: str) -> np.ndarray:
    values = values_of(row)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


@pytest.fixture(params=["float16", "float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def store(tmp_path, dtype) -> FeatureStore:
    opened = FeatureStore.create(tmp_path / "s.zarr")
    rows = [clips.blank(f"a/{name}.mp4", label, "train") for name, label in
            [("x", "wave"), ("y", "clap"), ("z", "wave")]]  # fmt: skip
    for i, row in enumerate(rows[:2]):
        row |= {"digest": f"{i}" * 64, "status": "ready"}
    rows[2] |= {"status": "quarantined", "reason": "corrupt", "detail": "no frame decodes"}
    table = pd.DataFrame(rows).astype(clips.COLUMNS).rename_axis(index="row")
    clips.write(opened.path, table)
    keys = clips.row_keys(table)
    for backbone, fingerprint, frames in [("net:tag", "ab" * 32, 4), ("net:tag", "cd" * 32, 5)]:
        attributes = {"frames": {"frames": frames, "view": 0}}
        spec = ColumnSpec(backbone, "blocks.0:cls", fingerprint, (T, D), dtype, attributes)
        column = Column(opened.path, spec)
        column.create(3)
        cells = np.stack([bits_of(row, dtype) for row in range(2)])
        column.write_shard(0, np.arange(2), cells, keys[:2], 3)
    return FeatureStore.open(opened.path)


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., None]:
    """Writes clips and some rows of a column, a shard after the other, as a build writes them."""

    def write(store: Path, column: Column, rows: np.ndarray, count: int, cells_of: Callable):
        """The table gets `count` ready clips; `cells_of` gives the stored bits of some rows."""
        table = pd.DataFrame(
            clips.blank(f"{i}.mp4", "wave", "train") | {"digest": f"{i:064d}", "status": "ready"}
            for i in range(count)
        )
        table = table.astype(clips.COLUMNS).rename_axis(index="row")
        clips.write(store, table)
        column.create(count)
        keys = clips.row_keys(table)
        for shard in np.unique(rows // column.spec.shard_clips):
            mine = rows[rows // column.spec.shard_clips == shard]
            column.write_shard(int(shard), mine, cells_of(mine), keys[mine], count)

    return write
