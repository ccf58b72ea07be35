"""Tensors: a feature's cells where a head trains on them.

Small features are read once and stay whole on the device, where a batch is an index. Larger ones
stream: the next batches are read, and copied to the device, while the present one is computed on.

Shapes: N clips, B clips a batch, T frames; the rest is the feature's.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from varve.stores import Feature

BUDGET_BYTES = 2 << 30
AHEAD = 2


class FeatureTensors:
    """Cells of some clips as tensors of the type they are kept in (float16, float32, bfloat16).

    Args:
        feature: Of an open store.
        rows: Of the table of clips as `Feature.read` takes them; by default every valid one.
        device: Where batches are wanted.
        budget_bytes: Up to this size the cells stay whole on the device.

    Attributes:
        bytes_read: Of the store so far.

    Raises:
        IndexError: A row is outside the table.

    Reading raises LookupError where a clip has no valid feature, and Damaged as `Feature.read`.
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
        self.stays = len(self.rows) * self.cell_bytes <= budget_bytes
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cell_bytes(self) -> int:
        return int(np.prod(self.feature.shape[1:])) * self.dtype.itemsize

    @cached_property
    def whole(self) -> Tensor:
        """All cells, [N, T, ...], read at the first use.

        Raises:
            ValueError: They are more than the budget; batches are the way then.
        """
        if not self.stays:
            raise ValueError(
                f"{len(self)} cells of {self.feature.name} are "
                f"{len(self) * self.cell_bytes / 1e9:.1f} GB, more than the budget: take "
                "`batches`, or give a larger `budget_bytes`"
            )
        return self._read(self.rows).to(self.device)

    def __getitem__(self, places: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """Cells [B, T, ...] of some of the clips, by their places in `rows` or a mask of them.

        Raises:
            IndexError: A place is outside, or no whole number.
        """
        given = torch.as_tensor(places).reshape(-1).cpu()
        if given.dtype == torch.bool and len(given) != len(self):
            raise IndexError(f"a mask of {len(given)} for {len(self)} clips")
        if len(given) and (given.is_floating_point() or given.is_complex()):
            raise IndexError(f"places are whole numbers or a mask, not {given.dtype}")
        chosen = given.nonzero()[:, 0] if given.dtype == torch.bool else given.to(torch.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(
                f"places {int(chosen.min())} to {int(chosen.max())} of {len(self)} clips"
            )
        if self.stays:
            return self.whole[chosen.to(self.device)]
        return self._read(self.rows[chosen.numpy()]).to(self.device)

    def batches(
        self, size: int, generator: np.random.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the clips: places in `rows`, int64 [B] on the CPU, and their cells.

        Args:
            size: B; the last batch may have fewer.
            generator: Draws the order; without one they come as in `rows`.
        """
        if size < 1:
            raise ValueError(f"{size=}: a batch has at least one clip")
        if generator is not None and not isinstance(generator, np.random.Generator):
            raise TypeError(f"{generator!r} draws the order; give a numpy.random.Generator")
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        if self.stays:
            for part in parts:
                yield torch.from_numpy(part), self[part]
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: deque[Future[Tensor]] = deque()
            try:
                for number, part in enumerate(parts):
                    for coming in parts[number + len(waiting) : number + 1 + AHEAD]:
                        waiting.append(reader.submit(self._read, self.rows[coming]))
                    cells = waiting.popleft().result()
                    yield torch.from_numpy(part), cells.to(self.device, non_blocking=True)
            finally:
                for future in waiting:
                    future.cancel()

    def _read(self, rows: np.ndarray) -> Tensor:
        pin = self.device.type == "cuda"
        cells = torch.empty((len(rows), *self.feature.shape[1:]), dtype=self.dtype, pin_memory=pin)
        bits = cells.view(torch.uint16) if self.dtype is torch.bfloat16 else cells
        self.feature.read(rows, out=bits.numpy())
        self.bytes_read += cells.nbytes
        return cells
