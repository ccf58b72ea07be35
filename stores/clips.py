"""The table of clips: one row per clip, with a row id that is stable for the life of the store.

Columns: see COLUMNS. `digest` identifies the bytes (of the file, or of a folder's frames in
order); with the interval it gives the row key. `reason` is empty unless the row is quarantined.
State that a program needs has a column of its own:

- `warning`: what was unusual about the video, and `audio`: about its audio track; "" for nothing.
- `overflowed`: short fingerprints of the feature columns whose number format cannot represent
  the clip's value. It is a property of those cells; the clip's other cells are valid.
- `duplicate_of`: the first row with the same bytes and interval; -1 where there is none.

`detail` repeats this, and the cause of a failure, as text for people. No code reads it.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from varve.stores import atomic
from varve.stores.digests import digest
from varve.stores.locations import Location, Unreachable, repair_hint

FILE = "clips.parquet"
KEY_BYTES = 16
# Version of the clock of intervals: changed when an interval has other frames. Until version 2 the
# first frame of a file had the time 0, even where the sound started before it.
CLOCK = 2

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
    "warning": "str",
    "audio": "str",
    "overflowed": "object",  # a tuple of strings
    "duplicate_of": "int64",
    "status": "str",
    "reason": "str",
    "detail": "str",
}
_ARROW = {
    "str": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "object": pa.list_(pa.string()),
}
STATUSES = ("ready", "pending", "quarantined")
# Reason of a clip with an overflow in a requested column. Its other cells are valid.
OVERFLOW = "not_finite"


def empty() -> pd.DataFrame:
    """Return a table without rows, with every column of its type."""
    frame = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})
    return frame.rename_axis(index="row")


def blank(path: str, label: str, split: str) -> dict[str, object]:
    """Return the row of a new clip: pending, with nothing known of its video."""
    row: dict[str, object] = {name: "" if kind == "str" else 0 for name, kind in COLUMNS.items()}
    unknown = {name: np.nan for name in ("start_seconds", "end_seconds", "fps")}
    state = {"status": "pending", "overflowed": (), "duplicate_of": -1}
    return row | unknown | state | {"path": path, "label": label, "split": split}


def read(store: Location) -> pd.DataFrame:
    """Read the store's table, indexed by `row`.

    Raises:
        ValueError: The file is damaged; the message says how to repair it.
    """
    file = store / FILE
    try:
        table = pq.read_table(io.BytesIO(file.read_bytes())).to_pandas().set_index("row")
        table["overflowed"] = pd.Series(map(tuple, table["overflowed"]), table.index, dtype=object)
        return table.astype(COLUMNS)
    except FileNotFoundError:
        return empty()
    except Unreachable:
        raise
    except (pa.ArrowException, OSError, KeyError) as error:
        again = (
            "Move it away and build again: the clips are listed again, and their features found by "
            "their keys without computing"
        )
        raise ValueError(f"{file} is damaged ({error}). {repair_hint(file, again)}") from error


def encode(table: pd.DataFrame) -> bytes:
    """Return the table as Parquet. Equal tables give equal bytes."""
    buffer = io.BytesIO()
    fields = [("row", pa.int64()), *((name, _ARROW[kind]) for name, kind in COLUMNS.items())]
    frame = table.astype(COLUMNS).reset_index()
    arrow = pa.Table.from_pandas(frame, schema=pa.schema(fields), preserve_index=False)
    # The metadata of pandas names library versions; the types of the columns are sufficient.
    pq.write_table(arrow.replace_schema_metadata(None), buffer, compression="zstd")
    return buffer.getvalue()


def write(store: Path, table: pd.DataFrame) -> None:
    """Write the table atomically, if it differs from the one on disk."""
    atomic.update(store, store / FILE, encode(table))


def row_key(content: str, start_seconds: float, end_seconds: float) -> bytes:
    """Return the row key of a clip: 16 bytes that identify its content and interval.

    The key is never all zero, except for unknown content. That of an interval has the version of
    the clock that its times are of.

    Args:
        content: Digest of the bytes; "" (unknown, the file is missing) gives zeros.
        start_seconds: Start of the interval; NaN for the beginning of the file.
        end_seconds: End of the interval; NaN for the end of the file.
    """
    if not content:
        return bytes(KEY_BYTES)
    interval = [None if np.isnan(t) else float(t) for t in (start_seconds, end_seconds)]
    clock = {"clock": CLOCK} if any(time is not None for time in interval) else {}
    return bytes.fromhex(digest({"content": content, "interval": interval} | clock))[:KEY_BYTES]


def row_keys(table: pd.DataFrame) -> np.ndarray:
    """Return the row keys of all clips: uint8 [clips, 16]; zeros where the content is unknown."""
    keys = map(row_key, table["digest"], table["start_seconds"], table["end_seconds"])
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(table), KEY_BYTES)


def shared_between_splits(table: pd.DataFrame) -> dict[str, int]:
    """Count the clips that are, byte for byte, clips of another split too.

    Args:
        table: Rows of the table of clips, settled by a build.

    Returns:
        Number of clips by "SPLIT and SPLIT", names sorted. A clip that repeats one of its own split
        alone is not counted.
    """
    groups: dict[int, list[str]] = {}
    for row, first, split in zip(table.index, table["duplicate_of"], table["split"], strict=True):
        groups.setdefault(int(first) if first >= 0 else int(row), []).append(str(split))
    counts: dict[str, int] = {}
    for splits in groups.values():
        if len(set(splits)) > 1:
            pair = " and ".join(split or "no split" for split in sorted(set(splits)))
            counts[pair] = counts.get(pair, 0) + len(splits)
    return dict(sorted(counts.items()))


def shared_text(shared: Mapping[str, int]) -> str:
    """Return a warning of clips that are in two splits by their bytes; "" without any."""
    counts = ", ".join(f"{count} clips in {pair}" for pair, count in shared.items())
    return f"SAME BYTES in different splits: {counts}" if counts else ""


def row_ids(rows: Sequence[int] | np.ndarray | slice, clips: int) -> np.ndarray:
    """Return row ids as int64, from row ids in any order, a slice, or a mask.

    Args:
        rows: Row ids, a slice of them, or a mask of the whole table.
        clips: Number of rows of the table.

    Raises:
        IndexError: A row is outside the table or no integer, or the mask has another length.

    >>> row_ids(slice(2), 5).tolist(), row_ids([True, False, True], 3).tolist()
    ([0, 1], [0, 2])
    """
    if isinstance(rows, slice):
        return np.arange(clips)[rows]
    array = np.asarray(rows).reshape(-1)
    if array.dtype == bool:
        if len(array) != clips:
            raise IndexError(f"a mask of {len(array)} for a table of {clips} clips")
        return np.flatnonzero(array)
    if len(array) and array.dtype.kind not in "iu":
        raise IndexError(f"rows are whole numbers or a mask, not {array.dtype}")
    ids = array.astype(np.int64, copy=False)
    # Read as unsigned, a negative number is larger than any row.
    if len(ids) and ids.view(np.uint64).max() >= clips:
        raise IndexError(f"rows {ids.min()} to {ids.max()} are not all in a table of {clips} clips")
    return ids
