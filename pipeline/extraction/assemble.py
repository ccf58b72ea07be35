"""Assembly: staged cells into shards. In the builder alone, so a shard has one writer."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from varve.pipeline.extraction.plan import ColumnPlan
from varve.stores import staging
from varve.stores.clips import KEY_BYTES
from varve.stores.columns import STORED


class Assembler:
    """Writes a column's shards as their cells become ready.

    A shard is written once, when no cell of it is awaited any more: its staged cells gathered, one
    file replaced, its rows marked done, the staged files removed.
    """

    def __init__(self, store: Path, plan: ColumnPlan, clips: int) -> None:
        self._store, self._clips = store, clips
        self.column = plan.column
        self._shard_clips = plan.output.spec.shard_clips
        self._awaited = set(np.flatnonzero(plan.compute).tolist()) | set(plan.copied)
        self._awaited_of = Counter(row // self._shard_clips for row in self._awaited)
        self._staged_of: dict[int, dict[int, Path]] = {}  # by shard: row, file
        self._rows_of: dict[Path, set[int]] = {}
        self._unstaged = [
            file
            for file in staging.files(store, plan.output.spec.relative_path)
            if file not in set(plan.staged.values())
        ]
        for row, file in plan.staged.items():
            self._note(file, [row])
        self._work = bool(self._awaited or plan.staged)

    def begin(self, copied: dict[int, int], keys: np.ndarray) -> None:
        """Make the column or lengthen it, and stage the cells that another row holds already.

        The copies come before anything is overwritten: the other row's own video may have been
        replaced. Staged cells that no clip has any use for are removed.
        """
        staging.drop(self._store, self._unstaged)
        if not self._work:
            return
        self.column.create(self._clips)
        rows = sorted(copied)
        for start in range(0, len(rows), self._shard_clips):
            part = rows[start : start + self._shard_clips]
            distinct, places = np.unique([copied[row] for row in part], return_inverse=True)
            cells = self.column.read_cells(distinct.astype(np.int64))[places]
            block = staging.StagedBlock(np.array(part, np.int64), keys[part], cells)
            self.staged(staging.put(self._store, self.column.spec.relative_path, block), part)

    def staged(self, file: Path, rows: Iterable[int]) -> None:
        """Take note that a staged file holds these rows' cells."""
        rows = list(rows)
        self._note(file, rows)
        self.given_up(rows)

    def given_up(self, rows: Iterable[int]) -> None:
        """Await these rows no more: they are staged, or their clips failed."""
        for row in set(rows) & self._awaited:
            self._awaited.remove(row)
            self._awaited_of[row // self._shard_clips] -= 1

    def write_ready(self) -> int:
        """Write every shard that has staged cells and awaits none. Returns the cells written."""
        ready = [shard for shard in self._staged_of if not self._awaited_of[shard]]
        return sum(self._write(shard) for shard in sorted(ready))

    def _note(self, file: Path, rows: list[int]) -> None:
        self._rows_of.setdefault(file, set()).update(rows)
        for row in rows:
            self._staged_of.setdefault(row // self._shard_clips, {})[row] = file

    def _write(self, shard: int) -> int:
        file_of = self._staged_of.pop(shard)
        rows = np.array(sorted(file_of), np.int64)
        spec = self.column.spec
        cells = np.empty((len(rows), *spec.cell), STORED[spec.dtype])
        keys = np.zeros((len(rows), KEY_BYTES), np.uint8)
        for file in sorted(set(file_of.values())):
            block = staging.get(file)
            mine = [i for i, row in enumerate(block.rows.tolist()) if file_of.get(row) == file]
            places = np.searchsorted(rows, block.rows[mine])
            cells[places], keys[places] = block.cells[mine], block.keys[mine]
        self.column.write_shard(shard, rows, cells, keys, self._clips)
        used = []
        for row, file in file_of.items():
            self._rows_of[file].discard(row)
            if not self._rows_of[file]:
                del self._rows_of[file]
                used.append(file)
        staging.drop(self._store, used)
        return len(rows)
