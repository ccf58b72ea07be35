"""Cached features of one column: rows in, numpy arrays out. An invalid cell raises an error."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import zarr

from varve.stores.clips import OVERFLOW, row_ids, row_keys
from varve.stores.columns import CODEC_ERRORS, MISSING, Damaged, read_all
from varve.stores.locations import (
    REQUESTS,
    Location,
    Objects,
    local_folder,
    open_array,
    repair_hint,
)
from varve.stores.shard_reader import Reader, ShardReader, Unreadable, plain_shards
from varve.stores.zarr_reader import ZarrReader

if TYPE_CHECKING:
    import dask.array


class Feature:
    """One feature column of a store: the features of all clips at one stage of one backbone.

    A feature reads cells from files and keeps none in memory; `varve.FeatureTensors` keeps them.
    It may be pickled, and read from threads, forked processes and data loader workers.

    Attributes:
        backbone: Name of the backbone, such as "ViT-B-16:openai".
        name: Stage, or stage:reduction.
        location: Folder or object-storage prefix of the Zarr array.
    """

    def __init__(self, location: Location, backbone: str, name: str, clips: pd.DataFrame) -> None:
        self.location, self.backbone, self.name = location, backbone, name
        self._clips = clips
        try:
            self._array: zarr.Array[Any] = open_array(location)
        except CODEC_ERRORS as error:
            again = "Remove it and build again: it is written again, and the cells stay"
            raise Damaged(
                f"{location}/zarr.json is damaged ({error}). {repair_hint(location, again)}"
            ) from error

    def __repr__(self) -> str:
        return (
            f"<Feature {self.backbone} {self.name} {self.shape} {self.dtype} {self.location.name}>"
        )

    @property
    def path(self) -> Path:
        """Return the folder of the Zarr array.

        Raises:
            io.UnsupportedOperation: The store is on object storage; see `location`.
        """
        return local_folder(self.location)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array: (clips, T, ...)."""
        return self._array.shape

    @property
    def dtype(self) -> str:
        """Type on disk: float16, float32 or bfloat16 (which `read` widens to float32)."""
        return str(self._array.attrs["dtype"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the column: its cache key, 64 hexadecimal digits."""
        return str(self._array.attrs["fingerprint"])

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Specification of everything that decides the values: frames, stages, precision..."""
        return dict(self._array.attrs.asdict())

    @cached_property
    def valid(self) -> np.ndarray:
        """Mask of valid cells, bool [clips]: those computed from the clip's present bytes."""
        return self._marked(row_keys(self._clips))

    @property
    def overflowed(self) -> np.ndarray:
        """Mask of clips whose value this column cannot represent, bool [clips]."""
        short = self.fingerprint[:16]
        return np.array([short in shorts for shorts in self._clips["overflowed"]], bool)

    @property
    def ready(self) -> np.ndarray:
        """Mask of clips that are ready and valid, bool [clips].

        A clip that another column cannot represent is ready in this one.
        """
        clips = self._clips
        usable = (clips["status"] == "ready") | (clips["reason"] == OVERFLOW)
        ready: np.ndarray = self.valid & usable.to_numpy()
        return ready

    @property
    def valid_cells(self) -> np.ndarray:
        """Mask of valid cells, bool [rows of the array]; that of a whole video has a row a page."""
        return self.valid

    def _marked(self, keys: np.ndarray) -> np.ndarray:
        """Return which cells were computed under these row keys."""
        done = read_all(self.location.with_name(f"{self.location.name}.done"))
        valid = np.zeros(len(keys), bool)
        length = min(len(keys), len(done))
        valid[:length] = (done[:length] == keys[:length]).all(axis=1)
        return valid & keys.any(axis=1)

    def read(
        self,
        rows: Sequence[int] | np.ndarray | slice = slice(None),
        out: np.ndarray | None = None,
        verify: bool = True,
    ) -> np.ndarray:
        """Read the features of some clips.

        Args:
            rows: Row ids of the table of clips, in any order; a slice of them; or a mask of all.
            out: Array to write into, C-contiguous, of the shape and type that is returned, such
                as `pinned_tensor.numpy()`. By default a new array. For a bfloat16 column a uint16
                array receives the stored bits (`torch.uint16`, then `.view(torch.bfloat16)`).
            verify: Whether to check the chunks' checksums.

        Returns:
            Features (len(rows), T, ...) of type `dtype`, in the order of `rows`. bfloat16 is
            widened to float32 without loss. It is `out` if that was passed.

        Raises:
            IndexError: A row is outside the table.
            LookupError: A row has no valid feature; the message gives the reason.
            Damaged: A shard's file is missing, truncated or changed.
            ValueError: `out` has another shape or type; the message gives the expected ones.
        """
        ids = self.rows(rows)
        valid = self.valid[ids]
        if not valid.all():
            raise LookupError(self._invalid_message(ids[~valid]))
        out = self._output(len(ids), out)
        widened = out.dtype != self._stored
        bits = np.empty(out.shape, self._stored) if widened else out
        absent = self._bits(ids, bits, verify)
        if absent:
            row = int(ids[absent].min())
            raise Damaged(self._damage_message(row, "it has no chunk for a row marked done"))
        if widened:
            np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
        return out

    def _output(self, count: int, out: np.ndarray | None) -> np.ndarray:
        """Return `out` if its shape and type are right, or a new array if it is None.

        Raises:
            ValueError: `out` has another shape, type or layout.
        """
        shape, stored = (count, *self.shape[1:]), self._stored
        numbers = np.dtype(np.float32) if self.dtype == "bfloat16" else stored
        if out is None:
            return np.empty(shape, numbers)
        fits = isinstance(out, np.ndarray) and out.shape == shape and out.dtype in (numbers, stored)
        if fits and out.flags.c_contiguous and out.flags.writeable:
            return out
        types = " or ".join(dict.fromkeys(str(dtype) for dtype in (numbers, stored)))
        actual = f"{type(out).__name__} {getattr(out, 'shape', '')} {getattr(out, 'dtype', '')}"
        raise ValueError(
            f"out is a {actual}{' in another layout or read-only' if fits else ''}; these "
            f"rows take a writeable, C-contiguous numpy array {shape} of {types}"
        )

    def rows(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """Return row ids as int64; see `varve.stores.clips.row_ids`."""
        return row_ids(rows, len(self._clips))

    def bits(self, rows: np.ndarray) -> np.ndarray:
        """Read stored bits (bfloat16 as uint16), valid or not. A missing cell is the fill value."""
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        out[self._bits(rows, out, verify=True)] = MISSING[self.dtype]
        return out

    def _bits(self, rows: np.ndarray, out: np.ndarray, verify: bool) -> list[int]:
        """Copy stored bits into `out`, and return the indices of `rows` that have no chunk."""
        try:
            return self._reader.read(rows, out, verify)
        except Unreadable as error:
            raise Damaged(self._damage_message(error.row, str(error))) from error

    @cached_property
    def _stored(self) -> np.dtype[Any]:
        """Type of the Zarr array: uint16 for bfloat16."""
        return np.dtype(self._array.dtype)

    @cached_property
    def _reader(self) -> Reader:
        folder = plain_shards(self._array)
        if not isinstance(self.location, Path):
            return ZarrReader(self._array, self.is_fill, self._replaced, REQUESTS)
        if folder is None:
            return ZarrReader(self._array, self.is_fill, self._state)
        return ShardReader(folder, self._array)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the reader, whose descriptors belong to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def is_fill(self, bits: np.ndarray) -> np.ndarray:
        """Return bool [rows]: which cells are the fill value, which stands for a missing chunk.

        Every number of a stored cell is finite, so the first number decides.
        """
        first = bits.reshape(len(bits), int(np.prod(bits.shape[1:])))[:, 0]
        fill: np.ndarray = (first == 0x7FC0) if self.dtype == "bfloat16" else np.isnan(first)
        return fill

    def path_of(self, row: int) -> str:
        """Return the path of the clip, or of the page's file, that a row of the array is of."""
        return str(self._clips.at[row, "path"])

    def _damage_message(self, row: int, why: str) -> str:
        again = (
            "`varve verify` lists all damage; remove the file and build again, and its cells are "
            "computed again"
        )
        return (
            f"{self.shard_of(row)} is damaged near row {row} "
            f"({self.path_of(row)}): {why}. {repair_hint(self.location, again)}"
        )

    def _state(self, first: int, last: int) -> list[tuple[int, int] | None]:
        """Return the present versions of the shard files of rows [first, last]."""
        store = self.path.parents[3]
        files = [store / self.shard_of(row) for row in range(first, last + 1, self._shard_clips)]
        files.append(store / self.shard_of(last))
        stats = [file.stat() if file.exists() else None for file in files]
        return [stat and (stat.st_ino, stat.st_mtime_ns) for stat in stats]

    def _replaced(self, first: int, last: int) -> int:
        """Return how many replaced shards were detected on object storage."""
        objects = self._array.store
        return objects.replaced if isinstance(objects, Objects) else 0

    def values(self, bits: np.ndarray) -> np.ndarray:
        """Return stored bits as numbers."""
        return _widen(bits) if self.dtype == "bfloat16" else bits

    def shard_of(self, row: int) -> str:
        """Return the path, relative to the store, of the shard file of a row."""
        parts = [str(row // self._shard_clips), *["0"] * (len(self.shape) - 1)]
        return "/".join([*self.location.parts[-4:], "c", *parts])

    @property
    def _shard_clips(self) -> int:
        return (self._array.shards or self._array.chunks)[0]

    def to_dask(self) -> "dask.array.Array":
        """Return the column as a dask array with one chunk per shard. A missing cell is NaN."""
        import dask.array

        array = dask.array.from_zarr(self._array, chunks=self._array.shards or self._array.chunks)
        return array.map_blocks(_widen, dtype=np.float32) if self.dtype == "bfloat16" else array

    def dataset(self, rows: Sequence[int] | np.ndarray | None = None) -> "FeatureDataset":
        """Return a map-style data set of (feature, label) for `torch.utils.data.DataLoader`.

        Args:
            rows: Row ids; by default those of `ready`. A clip that was removed from the data set
                keeps its feature, but is not ready.
        """
        ids = np.flatnonzero(self.ready) if rows is None else self.rows(rows)
        labels = sorted(self._clips["label"].unique())
        numbers = self._clips["label"].map({label: i for i, label in enumerate(labels)})
        return FeatureDataset(self, ids, numbers.to_numpy()[ids], labels)

    def _invalid_message(self, rows: np.ndarray) -> str:
        row = int(rows[0])
        clip = self._clips.loc[row]
        why = f"{clip['status']}: {clip['reason'] or 'not computed yet'} {clip['detail']}".strip()
        if self.overflowed[row]:
            why = f"its value leaves the range of {self.dtype}"
        return (
            f"{len(rows)} of the rows have no valid {self.name} of {self.backbone}; the first is "
            f"row {row} ({clip['path']}; {why}). Ask for valid rows "
            "(`np.flatnonzero(feature.valid)`), or build the store again."
        )


class FeatureDataset:
    """Map-style data set: item i is (feature [T, ...], class number).

    Attributes:
        labels: Class names by number.
    """

    def __init__(
        self, feature: Feature, rows: np.ndarray, numbers: np.ndarray, labels: list[str]
    ) -> None:
        self.feature, self.rows, self.numbers, self.labels = feature, rows, numbers, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[np.ndarray, int]:
        return self.feature.read([self.rows[item]])[0], int(self.numbers[item])

    def __getitems__(self, items: list[int]) -> list[tuple[np.ndarray, int]]:
        cells = self.feature.read(self.rows[items])
        return list(zip(cells, self.numbers[items].tolist(), strict=True))


def _widen(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) as float32, without loss."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
