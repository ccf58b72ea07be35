"""Reading a feature: rows in, numpy out; a cell that is not valid is refused, never made up."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import zarr

from varve.stores.clips import row_ids, row_keys
from varve.stores.columns import CODEC_ERRORS, MISSING, Damaged, read_all
from varve.stores.reader import KEEP_BYTES, Reader, ShardReader, Unreadable, plain_shards
from varve.stores.remote import REQUESTS, Objects, Place, local_folder, mending, open_array
from varve.stores.zarr_reader import ZarrReader

if TYPE_CHECKING:
    import dask.array


class Feature:
    """One column of a store: the feature of every clip at one stage of one backbone.

    Attributes:
        backbone: "ViT-B-16:openai".
        name: Stage, or stage:reduction.
        place: Where the Zarr array lies, on local disk or on object storage.
        keep_bytes: A column of small cells that is read at random again and again is kept in this
            process's memory up to that size (an eighth of it in a process that another one
            started, such as a loader's worker); 0 for never. To be set before the first read.
    """

    keep_bytes = KEEP_BYTES

    def __init__(self, place: Place, backbone: str, name: str, clips: pd.DataFrame) -> None:
        self.place, self.backbone, self.name = place, backbone, name
        self._clips = clips
        try:
            self._array: zarr.Array[Any] = open_array(place)
        except CODEC_ERRORS as error:
            again = "Remove it and build again: it is made anew, and the cells stay"
            raise Damaged(
                f"{place}/zarr.json is damaged ({error}). {mending(place, again)}"
            ) from error

    def __repr__(self) -> str:
        return f"<Feature {self.backbone} {self.name} {self.shape} {self.dtype} {self.place.name}>"

    @property
    def path(self) -> Path:
        """Of the Zarr array, on local disk.

        Raises:
            io.UnsupportedOperation: It lies on object storage; see `place`.
        """
        return local_folder(self.place)

    @property
    def shape(self) -> tuple[int, ...]:
        """(clips, T, ...)."""
        return self._array.shape

    @property
    def dtype(self) -> str:
        """Of the values on disk: float16, float32 or bfloat16 (which `read` widens to float32)."""
        return str(self._array.attrs["dtype"])

    @property
    def fingerprint(self) -> str:
        """The column key, 64 hexadecimal digits."""
        return str(self._array.attrs["fingerprint"])

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Everything that decides the values: frames, stages, reduction, precision."""
        return dict(self._array.attrs.asdict())

    @cached_property
    def valid(self) -> np.ndarray:
        """bool [clips]: whether the cell was made from the clip's present bytes."""
        done = read_all(self.place.with_name(f"{self.place.name}.done"))
        keys = row_keys(self._clips)
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
        """Features of some clips.

        Args:
            rows: Row ids of the table of clips, in any order; a slice of them; or a mask of all.
            out: Where to put them, in place of a new array: C-contiguous (len(rows), T, ...) of
                the type returned, such as `pinned_tensor.numpy()`. One of uint16 takes
                bfloat16's own bits (`torch.uint16`, then `.view(torch.bfloat16)`).
            verify: Check the chunks' checksums.

        Returns:
            (len(rows), T, ...) of `dtype`; bfloat16 comes as float32, exactly. `out` if given.

        Raises:
            IndexError: A row is outside the table.
            LookupError: A row has no valid feature; the message says why.
            Damaged: A shard's file is missing, cut off or changed.
            ValueError: `out` does not fit; the message says what would.
        """
        wanted = self.rows(rows)
        valid = self.valid[wanted]
        if not valid.all():
            raise LookupError(self._absence(wanted[~valid]))
        out = self._room(len(wanted), out)
        widened = out.dtype != self._stored
        bits = np.empty(out.shape, self._stored) if widened else out
        lost = self._bits(wanted, bits, verify)
        if lost:
            row = int(wanted[lost].min())
            raise Damaged(self._damage(row, "it has no chunk for a row marked done"))
        if widened:
            np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
        return out

    def _room(self, count: int, out: np.ndarray | None) -> np.ndarray:
        """`out`, or a new array where there is none.

        Raises:
            ValueError: It is not such an array.
        """
        shape, stored = (count, *self.shape[1:]), self._stored
        numbers = np.dtype(np.float32) if self.dtype == "bfloat16" else stored
        if out is None:
            return np.empty(shape, numbers)
        fits = isinstance(out, np.ndarray) and out.shape == shape and out.dtype in (numbers, stored)
        if fits and out.flags.c_contiguous and out.flags.writeable:
            return out
        types = " or ".join(dict.fromkeys(str(dtype) for dtype in (numbers, stored)))
        found = f"{type(out).__name__} {getattr(out, 'shape', '')} {getattr(out, 'dtype', '')}"
        raise ValueError(
            f"out is a {found}{' in another layout or read-only' if fits else ''}; these "
            f"rows take a writeable, C-contiguous numpy array {shape} of {types}"
        )

    def rows(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """Row ids as int64, whichever way they were given; see `varve.stores.clips.row_ids`."""
        return row_ids(rows, len(self._clips))

    def bits(self, rows: np.ndarray) -> np.ndarray:
        """Cells as stored (bfloat16 as uint16), valid or not; the fill value where none is."""
        out = np.empty((len(rows), *self.shape[1:]), self._stored)
        out[self._bits(rows, out, verify=True)] = MISSING[self.dtype]
        return out

    def _bits(self, rows: np.ndarray, out: np.ndarray, verify: bool) -> list[int]:
        """Fill `out` with stored bits. Returns the places in `rows` that have no chunk."""
        try:
            return self._reader.read(rows, out, verify)
        except Unreadable as error:
            raise Damaged(self._damage(error.row, str(error))) from error

    @cached_property
    def _stored(self) -> np.dtype[Any]:
        """The array's own type: uint16 for bfloat16."""
        return np.dtype(self._array.dtype)

    @cached_property
    def _reader(self) -> Reader:
        folder = plain_shards(self._array)
        if not isinstance(self.place, Path):
            return ZarrReader(self._array, self.is_fill, self._replaced, REQUESTS)
        if folder is None:
            return ZarrReader(self._array, self.is_fill, self._state)
        reader = ShardReader(folder, self._array)
        reader.keep_bytes = self.keep_bytes
        return reader

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: no descriptors, no cells kept in memory."""
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def is_fill(self, bits: np.ndarray) -> np.ndarray:
        """bool [rows]: which cells are the fill value, as where there is no chunk.

        A cell that was kept is finite throughout, so its first number tells.
        """
        first = bits.reshape(len(bits), int(np.prod(bits.shape[1:])))[:, 0]
        fill: np.ndarray = (first == 0x7FC0) if self.dtype == "bfloat16" else np.isnan(first)
        return fill

    def _damage(self, row: int, why: str) -> str:
        again = (
            "`varve verify` says what else is; remove the file and build again, and its cells are "
            "computed anew"
        )
        return (
            f"{self.shard_of(row)} is damaged near row {row} "
            f"({self._clips.at[row, 'path']}): {why}. {mending(self.place, again)}"
        )

    def _state(self, first: int, last: int) -> list[tuple[int, int] | None]:
        """Identity of the shard files that hold these rows, as they are now."""
        store = self.path.parents[3]
        files = [store / self.shard_of(row) for row in range(first, last + 1, self._shard_clips)]
        files.append(store / self.shard_of(last))
        stats = [file.stat() if file.exists() else None for file in files]
        return [stat and (stat.st_ino, stat.st_mtime_ns) for stat in stats]

    def _replaced(self, first: int, last: int) -> int:
        """As `_state`, on object storage: how often a shard was found to be replaced."""
        objects = self._array.store
        return objects.replaced if isinstance(objects, Objects) else 0

    def values(self, bits: np.ndarray) -> np.ndarray:
        """Stored bits as numbers."""
        return _widen(bits) if self.dtype == "bfloat16" else bits

    def shard_of(self, row: int) -> str:
        """The file that holds a row's cell, relative to the store."""
        parts = [str(row // self._shard_clips), *["0"] * (len(self.shape) - 1)]
        return "/".join([*self.place.parts[-4:], "c", *parts])

    @property
    def _shard_clips(self) -> int:
        return (self._array.shards or self._array.chunks)[0]

    def to_dask(self) -> "dask.array.Array":
        """The whole column as a dask array, a chunk a shard. Cells that are missing are NaN."""
        import dask.array

        array = dask.array.from_zarr(self._array, chunks=self._array.shards or self._array.chunks)
        return array.map_blocks(_widen, dtype=np.float32) if self.dtype == "bfloat16" else array

    def dataset(self, rows: Sequence[int] | np.ndarray | None = None) -> "FeatureDataset":
        """A map-style data set (for `torch.utils.data.DataLoader`) of (feature, label) pairs.

        Args:
            rows: Row ids; by default every clip that is ready and valid (one that has left the
                data set keeps its feature, and is not learnt from).
        """
        ready = self.valid & (self._clips["status"] == "ready").to_numpy()
        chosen = np.flatnonzero(ready) if rows is None else self.rows(rows)
        labels = sorted(self._clips["label"].unique())
        numbers = self._clips["label"].map({label: i for i, label in enumerate(labels)})
        return FeatureDataset(self, chosen, numbers.to_numpy()[chosen], labels)

    def _absence(self, rows: np.ndarray) -> str:
        row = int(rows[0])
        clip = self._clips.loc[row]
        why = f"{clip['status']}: {clip['reason'] or 'not computed yet'} {clip['detail']}".strip()
        return (
            f"{len(rows)} of the rows have no valid {self.name} of {self.backbone}; the first is "
            f"row {row} ({clip['path']}; {why}). Ask for valid rows "
            "(`np.flatnonzero(feature.valid)`), or build the store again."
        )


class FeatureDataset:
    """Map-style: item i is (feature [T, ...], class number). `labels[number]` is its name."""

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
    """bfloat16 bits (uint16) as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
