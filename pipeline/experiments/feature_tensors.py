"""Feature cells as tensors: the one cache of cells in memory, for heads that train on them.

A feature that fits the budget is read once and kept whole on the device, where a batch is an index
into it. A larger one is streamed: the next batches are read and copied to the device while the
present one is used. `Feature.read` itself keeps nothing.

Shapes: N clips, B clips per batch, T frames; the other axes are the feature's.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from varve.heads.parts.clips import ahead
from varve.stores import Feature
from varve.stores.clips import row_ids

BUDGET_BYTES = 2 << 30


class FeatureTensors:
    """The cells of some clips as tensors of the stored type (float16, float32, bfloat16).

    The cells are those of the first read: a store that changes later does not change them.
    Reading raises LookupError if a clip has no valid feature, and Damaged, as `Feature.read` does.

    Args:
        feature: A feature of an open store.
        rows: Rows of the table of clips, as in `Feature.read`; by default all valid rows.
        device: Device of the returned tensors.
        budget_bytes: Maximum size of the cells that are kept on the device.

    Attributes:
        in_memory: Whether the cells fit the budget, and are kept from the first use on.
        bytes_read: Number of bytes read from the store so far.

    Raises:
        IndexError: A row is outside the table.
    """

    def __init__(
        self,
        feature: Feature,
        rows: Sequence[int] | np.ndarray | slice | None = None,
        device: str | torch.device = "cpu",
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        self.feature, self.device = feature, torch.device(device)
        self.rows = np.flatnonzero(feature.valid) if rows is None else feature.rows(rows)
        self.dtype: torch.dtype = getattr(torch, feature.dtype)
        self.in_memory = len(self.rows) * self.cell_bytes <= budget_bytes
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cell_bytes(self) -> int:
        """Size of one clip's cell."""
        return int(np.prod(self.feature.shape[1:])) * self.dtype.itemsize

    @cached_property
    def whole(self) -> Tensor:
        """All cells, [N, T, ...] on the device, read at the first use.

        Raises:
            ValueError: They do not fit the budget; use `batches`.
        """
        if not self.in_memory:
            raise ValueError(
                f"{len(self)} cells of {self.feature.name} are "
                f"{len(self) * self.cell_bytes / 1e9:.1f} GB, more than the budget: use "
                "`batches`, or give a larger `budget_bytes`"
            )
        return self._read(self.rows).to(self.device)

    def __getitem__(self, indices: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """Return the cells [B, T, ...] of some clips.

        Args:
            indices: Positions in `rows`, from 0 to N - 1 in any order; or a mask of `rows`.

        Raises:
            IndexError: An index is outside `rows`, or is no integer.
        """
        array = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        try:
            positions = row_ids(array, len(self))
        except IndexError as error:
            raise IndexError(f"indices of {len(self)} clips: {error}") from None
        if self.in_memory:
            return self.whole.index_select(0, torch.from_numpy(positions).to(self.device))
        return self._read(self.rows[positions]).to(self.device)

    def batches(
        self, size: int, generator: np.random.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate once over the clips, as pairs of indices and cells.

        Args:
            size: B, the number of clips per batch; the last batch may have fewer.
            generator: Generator that draws the order; by default the order of `rows`.

        Yields:
            Positions in `rows`, int64 [B] on the CPU, and their cells [B, T, ...] on the device.
        """
        if size < 1:
            raise ValueError(f"{size=}: a batch has at least one clip")
        if generator is not None and not isinstance(generator, np.random.Generator):
            raise TypeError(f"{generator!r} is no numpy.random.Generator, which draws the order")
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        if self.in_memory:
            cells: Iterator[Tensor] = map(self.__getitem__, parts)
        else:
            read = ahead(self._read, [self.rows[part] for part in parts])
            cells = (part.to(self.device, non_blocking=True) for part in read)
        yield from zip(map(torch.from_numpy, parts), cells, strict=True)

    def _read(self, rows: np.ndarray) -> Tensor:
        pin = self.device.type == "cuda"
        cells = torch.empty((len(rows), *self.feature.shape[1:]), dtype=self.dtype, pin_memory=pin)
        bits = cells.view(torch.uint16) if self.dtype is torch.bfloat16 else cells
        self.feature.read(rows, out=bits.numpy())
        self.bytes_read += cells.nbytes
        return cells
