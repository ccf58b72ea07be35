"""Feature columns: a Zarr array of features, and the row keys with which its cells were computed.

`features/<backbone>/<stage>[:<reduction>]/<short fingerprint>` has shape (clips, T, ...), one chunk
per clip, and shards of whole clips. In a column of whole videos a page stands for the clip; see
`pages`. `<short fingerprint>.done` has shape (clips, 16): row r is the
row key with which cell r was computed (its mark), or zeros. A cell is valid while its mark equals
the clip's row key.

zarr-python encodes the bytes into memory, and `atomic.write` writes whole files. Because of the
order of writes a cell is never valid under another key than its own: the marks of the rows to be
overwritten are removed, then the shard is replaced, then the new marks are written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from varve.stores import atomic
from varve.stores.clips import KEY_BYTES
from varve.stores.locations import Location, Unreachable, open_array, repair_hint

FEATURES = "features"
SHARD_BYTES = 64 << 20
MAX_SHARD_CLIPS = 16384
DONE_ROWS = 4096
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
# bfloat16 is no Zarr type: its bits are stored as uint16, and an attribute names the type.
STORED = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}
MISSING = {"float16": np.nan, "float32": np.nan, "bfloat16": 0x7FC0}


# An array, and the files that it encodes into, by key.
InMemory = tuple["zarr.Array[Any]", dict[str, Any]]


@dataclass(frozen=True)
class ColumnSpec:
    """Specification of a column: its path, the form of its cells, and what decides their values.

    Attributes:
        backbone: Name of the backbone in the store, such as "ViT-B-16:openai".
        feature: Stage, or stage:reduction.
        fingerprint: 64 hexadecimal digits; the first 16 name the array.
        cell: Shape of one clip's feature, with T first.
        dtype: float16, float32 or bfloat16.
        attributes: JSON stored with the array: the whole specification.
    """

    backbone: str
    feature: str
    fingerprint: str
    cell: tuple[int, ...]
    dtype: str
    attributes: Mapping[str, Any]

    @property
    def short(self) -> str:
        """First 16 digits of the fingerprint."""
        return self.fingerprint[:16]

    @property
    def relative_path(self) -> str:
        """Path of the array below `features/`. It identifies the column in the store."""
        return f"{node_name(self.backbone)}/{node_name(self.feature)}/{self.short}"

    @property
    def cell_bytes(self) -> int:
        """Size of a cell."""
        return int(np.prod(self.cell)) * np.dtype(STORED[self.dtype]).itemsize

    @property
    def row_axis(self) -> str:
        """Name of the first axis: `clip`, or `page` for a column of whole videos."""
        return "page" if "pages" in self.attributes else "clip"

    @property
    def shard_clips(self) -> int:
        """Number of clips per shard: the power of two that fills 64 MB of cells."""
        clips = 1
        # The index has 16 bytes per clip; without a limit it would be larger than small cells.
        while clips * self.cell_bytes < SHARD_BYTES and clips < MAX_SHARD_CLIPS:
            clips *= 2
        return clips

    def group(self, store: Path) -> Path:
        """Return the folder of the feature's columns."""
        return store / FEATURES / node_name(self.backbone) / node_name(self.feature)

    def file_bytes(self, present: np.ndarray) -> int:
        """Return the size of the column's files if the cells `present` (bool [clips]) exist."""
        clips = len(present)
        shards = [present[a : a + self.shard_clips] for a in range(0, clips, self.shard_clips)]
        index = INDEX_ENTRY_BYTES * self.shard_clips + CRC_BYTES
        values = sum(index for s in shards if s.any())
        values += int(present.sum()) * (self.cell_bytes + CRC_BYTES)
        blocks = -(-clips // DONE_ROWS)
        done = blocks * (DONE_ROWS * KEY_BYTES + CRC_BYTES)
        return (
            values + done + len(metadata_of(_values(self, clips))) + len(metadata_of(_done(clips)))
        )


class Damaged(ValueError):
    """A file of the store is missing, truncated or changed."""


# Errors that Zarr's codecs and metadata parsers raise on damaged bytes.
CODEC_ERRORS = (ValueError, RuntimeError, IndexError, KeyError, TypeError, EOFError)


class Column:
    """One column of a store on local disk, for writing. `Feature` reads it."""

    def __init__(self, store: Path, spec: ColumnSpec) -> None:
        self.store, self.spec = store, spec
        self.path = spec.group(store) / spec.short
        self.done_path = spec.group(store) / f"{spec.short}.done"

    def create(self, clips: int) -> None:
        """Create the column, or extend it to `clips` rows. Only metadata changes, and no cell."""
        make_groups(self.store, self.path)
        values_json = metadata_of(_values(self.spec, clips))
        atomic.update(self.store, self.done_path / "zarr.json", metadata_of(_done(clips)))
        atomic.update(self.store, self.path / "zarr.json", values_json)
        self.__dict__.pop("_values", None)

    def done(self, clips: int) -> np.ndarray:
        """Return the marks: the row keys of the cells, uint8 [clips, 16], zeros without a cell.

        A mark without its shard's file is ignored, so that removing a damaged shard and building
        again repairs it.
        """
        keys = np.zeros((clips, KEY_BYTES), np.uint8)
        if (self.done_path / "zarr.json").exists() and (self.path / "zarr.json").exists():
            marks = read_all(self.done_path)
            keys[: min(clips, len(marks))] = marks[:clips]
        size = self.spec.shard_clips
        for first in range(0, clips, size):
            marked = keys[first : first + size]
            if marked.any() and not self.shard_file(first // size).exists():
                marked[:] = 0
        return keys

    def read_cells(self, rows: np.ndarray) -> np.ndarray:
        """Read the stored bits [n, *cell] of `rows` (increasing int64 [n]), checksums verified."""
        out = np.empty((len(rows), *self.spec.cell), STORED[self.spec.dtype])
        for a, b in runs(rows):
            first, last = int(rows[a]), int(rows[b - 1])
            try:
                out[a:b] = self._values[first : last + 1]
            except CODEC_ERRORS as error:
                shards = range(first // self.spec.shard_clips, last // self.spec.shard_clips + 1)
                names = " or ".join(str(self.shard_file(shard)) for shard in shards)
                raise Damaged(
                    f"{names} is damaged ({error}). Remove it and build again: its cells are "
                    "computed again"
                ) from error
        return out

    def shard_file(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.path.joinpath("c", str(shard), *["0"] * len(self.spec.cell))

    def write_shard(self, shard: int, rows: np.ndarray, cells: np.ndarray, keys: np.ndarray,
                    clips: int) -> None:  # fmt: skip
        """Replace cells of one shard and write their marks. The other cells of the shard stay.

        Args:
            shard: Number of the shard; it covers rows [shard * shard_clips,
                (shard + 1) * shard_clips).
            rows: Rows of the cells, increasing int64 [n], all within the shard.
            cells: Stored bits [n, *cell].
            keys: Row keys, uint8 [n, 16].
            clips: Number of rows of the column (see `create`).
        """
        first = shard * self.spec.shard_clips
        done = self.done(clips)
        replaced = done[rows].any(axis=1) & (done[rows] != keys).any(axis=1)
        if replaced.any():
            done[rows[replaced]] = 0
            self._write_done(done)
        marked = np.flatnonzero(done[first : first + self.spec.shard_clips].any(axis=1)) + first
        kept = np.setdiff1d(marked, rows)
        all_rows = np.concatenate([kept, rows])
        block = np.full(
            (int(all_rows.max()) - first + 1, *self.spec.cell),
            MISSING[self.spec.dtype],
            STORED[self.spec.dtype],
        )
        if len(kept):
            block[kept - first] = self.read_cells(kept)
        block[rows - first] = cells
        data = encoded(_values(self.spec, self.spec.shard_clips), block)
        atomic.write(self.store, self.shard_file(shard), data)
        done[rows] = keys
        self._write_done(done)

    def disk_bytes(self) -> int:
        """Return the present size of the column's files."""
        folders = (self.path, self.done_path)
        return sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())

    def _write_done(self, done: np.ndarray) -> None:
        for start in range(0, len(done), DONE_ROWS):
            block = np.zeros((DONE_ROWS, KEY_BYTES), np.uint8)
            part = done[start : start + DONE_ROWS]
            block[: len(part)] = part
            file = self.done_path / "c" / str(start // DONE_ROWS) / "0"
            atomic.update(self.store, file, encoded(_done(DONE_ROWS), block))

    @cached_property
    def _values(self) -> zarr.Array[Any]:
        return open_array(self.path)


def node_name(name: str) -> str:
    """Return a name as one Zarr node: without a slash and a leading dot or underscore.

    >>> node_name("ViT-B-16:openai"), node_name("hf-hub:a/b")
    ('ViT-B-16:openai', 'hf-hub:a%2Fb')
    """
    quoted = name.replace("%", "%25").replace("/", "%2F")
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if quoted[:1] in (".", "_") else quoted


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """Return the `zarr.json` of a group."""
    text = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    return json.dumps(text, indent=2, ensure_ascii=False).encode()


def make_groups(store: Path, array: Path) -> None:
    """Make the groups between a store and the folder of an array, where they do not exist."""
    for parent in reversed(array.relative_to(store).parents[:-1]):
        file = store / parent / "zarr.json"
        if not file.exists():
            atomic.write(store, file, group_json({}))


def runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Return the slices [a, b) of increasing `rows` that are runs of consecutive numbers.

    >>> runs(np.array([3, 4, 7]))
    [(0, 2), (2, 3)]
    """
    if not len(rows):
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return list(pairwise(edges))


def read_all(path: Location) -> np.ndarray:
    """Read a whole small array.

    Raises:
        Damaged: The array cannot be read.
    """
    try:
        return np.asarray(open_array(path)[:])
    except Unreachable:
        raise
    except (*CODEC_ERRORS, OSError) as error:
        again = "Remove the folder and build again: the cells that it marks are computed again"
        raise Damaged(f"{path} is damaged ({error}). {repair_hint(path, again)}") from error


def in_memory(**options: Any) -> InMemory:
    """Create an array in memory, whose chunks have checksums, from options of `create_array`."""
    files: dict[str, Any] = {}
    options = {"compressors": [Crc32cCodec()], **options}
    return zarr.create_array(MemoryStore(files), filters=None, **options), files


def _values(spec: ColumnSpec, clips: int) -> InMemory:
    axes = [spec.row_axis, "frame", *(f"{spec.feature}.{i}" for i in range(len(spec.cell) - 1))]
    return in_memory(
        shape=(clips, *spec.cell),
        dtype=STORED[spec.dtype],
        chunks=(1, *spec.cell),
        shards=(spec.shard_clips, *spec.cell),
        fill_value=MISSING[spec.dtype],
        attributes={"dtype": spec.dtype, "fingerprint": spec.fingerprint, **spec.attributes},
        dimension_names=axes,
        # A clip without a feature has no chunk, and reads as not-a-number. The build refuses cells
        # with not-a-number, so no stored cell is taken for a missing one.
        config={"write_empty_chunks": False},
    )


def _done(clips: int) -> InMemory:
    return in_memory(
        shape=(clips, KEY_BYTES),
        dtype="uint8",
        chunks=(DONE_ROWS, KEY_BYTES),
        fill_value=0,
        dimension_names=["clip", "key_byte"],
        config={"write_empty_chunks": True},
    )


def metadata_of(created: InMemory) -> bytes:
    """Return the `zarr.json` of an array."""
    _, files = created
    return bytes(files["zarr.json"].to_bytes())


def encoded(created: InMemory, rows: np.ndarray) -> bytes:
    """Encode the first rows of an array of a single shard or chunk, and return its file."""
    array, files = created
    array[: len(rows)] = rows
    (data,) = (value for key, value in files.items() if key.startswith("c/"))
    return bytes(data.to_bytes())
