"""The table of clips: a row per clip, its id stable for the life of the store.

Columns: see COLUMNS. `digest` names the bytes (of the file, or of a folder's frames in order);
with the interval it gives the row key. `reason` is empty unless the row is quarantined;
`detail` is a sentence for a person: why a clip failed, or what was odd about one that did not.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from varve.stores import atomic
from varve.stores.identity import digest
from varve.stores.remote import Place, Unreachable, mending

FILE = "clips.parquet"
KEY_BYTES = 16

COLUMNS: dict[str, str] = {
    "path": "str",
    "start_seconds": "float64",
    "end_seconds": "float64",
    "label": "str",
    "split": "str",
    "digest": "str",
    "size_bytes": "int64",
    "mtime_ns": "int64",
    "num_frames": "int64",
    "num_frames_claimed": "int64",
    "fps": "float64",
    "width": "int64",
    "height": "int64",
    "decoder": "str",
    "status": "str",
    "reason": "str",
    "detail": "str",
}
STATUSES = ("ready", "pending", "quarantined")


def empty() -> pd.DataFrame:
    """A table without rows, every column of its type."""
    frame = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})
    return frame.rename_axis(index="row")


def blank(path: str, label: str, split: str) -> dict[str, object]:
    """A new clip's row: pending, nothing known of its video."""
    row: dict[str, object] = {name: "" if kind == "str" else 0 for name, kind in COLUMNS.items()}
    whole = {"start_seconds": np.nan, "end_seconds": np.nan, "fps": np.nan}
    return row | whole | {"path": path, "label": label, "split": split, "status": "pending"}


def read(store: Place) -> pd.DataFrame:
    """The store's table, indexed by `row`.

    Raises:
        ValueError: The file is damaged; the message says how to go on.
    """
    file = store / FILE
    try:
        table = pq.read_table(io.BytesIO(file.read_bytes()))
        return table.to_pandas().set_index("row").astype(COLUMNS)
    except FileNotFoundError:
        return empty()
    except Unreachable:
        raise
    except (pa.ArrowException, OSError, KeyError) as error:
        again = (
            "Move it away and build again: the clips are listed anew, and their features found by "
            "their keys without computing"
        )
        raise ValueError(f"{file} is damaged ({error}). {mending(file, again)}") from error


def encode(table: pd.DataFrame) -> bytes:
    """The table as Parquet. Equal tables give equal bytes."""
    buffer = io.BytesIO()
    arrow = pa.Table.from_pandas(table.astype(COLUMNS).reset_index(), preserve_index=False)
    # pandas' own metadata names library versions; the columns' types say all that matters.
    pq.write_table(arrow.replace_schema_metadata(None), buffer, compression="zstd")
    return buffer.getvalue()


def write(store: Path, table: pd.DataFrame) -> None:
    """Put the table on disk, atomically, if it differs from what is there."""
    data = encode(table)
    file = store / FILE
    if not (file.exists() and file.read_bytes() == data):
        atomic.write(store, file, data)


def row_key(content: str, start_seconds: float, end_seconds: float) -> bytes:
    """The row key: which bytes, and which stretch of them. 16 bytes, never all zero.

    Args:
        content: Digest of the bytes; "" (unknown, the file is missing) has no key.
        start_seconds: NaN for the beginning.
        end_seconds: NaN for the end.
    """
    if not content:
        return bytes(KEY_BYTES)
    interval = [None if np.isnan(t) else float(t) for t in (start_seconds, end_seconds)]
    return bytes.fromhex(digest({"content": content, "interval": interval}))[:KEY_BYTES]


def row_keys(table: pd.DataFrame) -> np.ndarray:
    """Row keys of every clip: uint8 [clips, 16]; zeros where the content is unknown."""
    keys = [
        row_key(content, start, end)
        for content, start, end in zip(
            table["digest"], table["start_seconds"], table["end_seconds"], strict=True
        )
    ]
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(table), KEY_BYTES)


def row_ids(rows: Sequence[int] | np.ndarray | slice, clips: int) -> np.ndarray:
    """Rows of a table of `clips` clips as int64: given as ids in any order, a slice or a mask.

    Raises:
        IndexError: A row is outside the table or no whole number, or a mask of another length.

    >>> row_ids(slice(2), 5).tolist(), row_ids([True, False, True], 3).tolist()
    ([0, 1], [0, 2])
    """
    if isinstance(rows, slice):
        return np.arange(clips)[rows]
    given = np.asarray(rows).reshape(-1)
    if given.dtype == bool:
        if len(given) != clips:
            raise IndexError(f"a mask of {len(given)} for a table of {clips} clips")
        return np.flatnonzero(given)
    if len(given) and given.dtype.kind not in "iu":
        raise IndexError(f"rows are whole numbers or a mask, not {given.dtype}")
    wanted = given.astype(np.int64, copy=False)
    # Without its sign a negative number is larger than any row.
    if len(wanted) and wanted.view(np.uint64).max() >= clips:
        raise IndexError(f"rows {wanted.min()} to {wanted.max()} asked of a table of {clips} clips")
    return wanted
