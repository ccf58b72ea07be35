"""Garbage collection: remove the columns of changed networks that no run folder needs.

A column of an unchanged network was requested by a build, and is removed only if it is named. A
column of a network that a method has changed (its attributes have `grafts`) is kept while a run
folder references it.

A process that is killed here leaves whole columns, empty columns, or a shell: metadata without
marks and cells, which readers ignore. The marks are removed first, then the cells, then the two
arrays, each by a rename into `.tmp/`.
"""

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from varve.stores import atomic, lock, references, staging
from varve.stores.columns import FEATURES
from varve.stores.locations import Location
from varve.stores.references import Reference

MIN_DIGITS = 6


@dataclass(frozen=True)
class ColumnDecision:
    """The decision to remove or to keep a column, and its reason.

    Attributes:
        fingerprint: 64 digits, or 16 if the column's metadata cannot be read.
        size_bytes: Size of the column's files, staged blocks included.
        holders: Run folders that need the column.
    """

    backbone: str
    feature: str
    fingerprint: str
    size_bytes: int
    why: str
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class GarbageReport:
    """Report of the columns that a garbage collection removed, or would remove in a dry run.

    Attributes:
        freed: Removed columns.
        kept: Columns of changed networks that were kept.
        missing_holders: Run folders that no longer exist, whose references were removed.
    """

    store: Path
    dry_run: bool
    freed: tuple[ColumnDecision, ...]
    kept: tuple[ColumnDecision, ...]
    missing_holders: tuple[str, ...]

    @property
    def freed_bytes(self) -> int:
        """Size of the removed columns."""
        return sum(column.size_bytes for column in self.freed)


def collect(store: Path, dry_run: bool = False, drop: Sequence[str] = ()) -> GarbageReport:
    """Remove the garbage of a store; see `FeatureStore.gc`."""
    if dry_run:
        return _plan(store, drop)[0]
    with lock.locked(store):
        atomic.clear_temporary(store)
        # Locked until the last column is removed: a reference added after that keeps its columns.
        with references.locked(store):
            report, freed, expired = _plan(store, drop)
            for column in freed:
                _remove(store, column)
            for reference in expired:
                reference.file.unlink()
        _remove_empty_groups(store)
        atomic.clear_temporary(store)
    return replace(report, dry_run=False)


def is_shell(path: Location) -> bool:
    """Return whether a column has neither marks nor cells: an interrupted removal left it."""
    return not path.with_name(f"{path.name}.done").exists() and not (path / "c").exists()


@dataclass(frozen=True)
class _StoredColumn:
    """A column on disk, whether its metadata can be read or not."""

    path: Path

    @property
    def relative_path(self) -> str:
        """Path below `features/`, as `ColumnSpec.relative_path`."""
        return "/".join(self.path.parts[-3:])

    @property
    def names(self) -> tuple[str, str]:
        backbone, feature = (unquote(part) for part in self.path.parts[-3:-1])
        return backbone, feature

    @cached_property
    def attributes(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / "zarr.json").read_bytes())["attributes"])
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def fingerprint(self) -> str:
        return str((self.attributes or {}).get("fingerprint", self.path.name))

    @property
    def label(self) -> str:
        return f"{' '.join(self.names)} {self.path.name}"

    def decision(self, store: Path, why: str, holders: Sequence[str] = ()) -> ColumnDecision:
        staged = store / staging.FOLDER / self.relative_path
        size = sum(map(_size, (self.path, Path(f"{self.path}.done"), staged)))
        return ColumnDecision(*self.names, self.fingerprint, size, why, tuple(holders))


def _plan(
    store: Path, drop: Sequence[str]
) -> tuple[GarbageReport, list[_StoredColumn], list[Reference]]:
    """Decide what to do with each column; change nothing.

    Returns:
        The report of a dry run, the columns to remove, and the references to remove.

    Raises:
        ValueError: An entry of `drop` names no column, several, or a column that is needed.
        Damaged: A reference cannot be read.
    """
    columns = [
        _StoredColumn(metadata.parent)
        for metadata in sorted((store / FEATURES).glob("*/*/*/zarr.json"))
        if metadata.parent.suffix != ".done"
    ]
    every_reference = references.read_all(store)
    dropped = {_named(store, columns, name) for name in drop}
    freed: dict[_StoredColumn, ColumnDecision] = {}
    kept: list[ColumnDecision] = []
    for column in columns:
        needing = [r for r in every_reference if r.needs(column.path.name)]
        holders = [str(r.holder) for r in needing if r.holder_exists]
        missing = [str(r.holder) for r in needing if not r.holder_exists]
        why = _reason_to_remove(column, column in dropped, holders, missing)
        if why:
            freed[column] = column.decision(store, why)
        elif column.attributes is None:
            why = "its zarr.json is damaged, so its origin is unknown; it can be dropped by name"
            kept.append(column.decision(store, why, holders))
        elif column.attributes.get("grafts"):
            kept.append(column.decision(store, f"needed by {', '.join(holders)}", holders))
    expired = [r for r in every_reference if not r.holder_exists]
    missing_holders = tuple(str(reference.holder) for reference in expired)
    report = GarbageReport(store, True, tuple(freed.values()), tuple(kept), missing_holders)
    return report, list(freed), expired


def _reason_to_remove(
    column: _StoredColumn, dropped: bool, holders: list[str], missing: list[str]
) -> str:
    """Return why a column is to be removed; "" if it is to be kept.

    Args:
        dropped: Whether the caller named the column.
        holders: Run folders that need it.
        missing: Run folders that needed it and no longer exist.

    Raises:
        ValueError: The caller named a column that a run folder needs.
    """
    if is_shell(column.path):
        return "an interrupted removal left it"
    if dropped:
        if holders:
            raise ValueError(
                f"{column.label} is needed by the run folder {', '.join(holders)}: delete that "
                "folder or remove its reference (`FeatureStore.remove_reference`) first. Nothing "
                "was removed"
            )
        return "named to be dropped"
    grafts = (column.attributes or {}).get("grafts")
    if not grafts or holders:
        return ""
    if missing:
        return f"its run folder {', '.join(missing)} no longer exists"
    return f"a method changed {', '.join(grafts)}, and no run folder needs it"


def _named(store: Path, columns: list[_StoredColumn], name: str) -> _StoredColumn:
    """Return the one column whose fingerprint, or BACKBONE/FEATURE/fingerprint, begins with `name`.

    Raises:
        ValueError: No column does, or several do, or the name has too few digits.
    """
    digits = name.rpartition("/")[2]
    matches = [
        column
        for column in columns
        if column.fingerprint.startswith(name)
        or "/".join([*column.names, column.fingerprint]).startswith(name)
    ]
    if len(matches) == 1 and len(digits) >= MIN_DIGITS:
        return matches[0]
    if len(digits) < MIN_DIGITS:
        problem = f"{name!r} is too short to name a column: give {MIN_DIGITS} digits or more"
    elif not matches:
        problem = f"no column's fingerprint begins with {name!r}"
    else:
        problem = f"{len(matches)} begin with {name!r}: give more, or BACKBONE/FEATURE/DIGITS"
    listed = "\n".join(f"  {c.label}" for c in columns) or "  no column"
    raise ValueError(f"{problem}. Nothing was removed; {store} has\n{listed}")


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # during a dry run a build may move its files
            total += file.stat().st_size if file.is_file() else 0
    return total


def _remove(store: Path, column: _StoredColumn) -> None:
    """Remove a column. After each step readers and builders still understand what is left."""
    staging.drop(store, staging.files(store, column.relative_path))
    marks = Path(f"{column.path}.done")
    for part in (marks / "c", column.path / "c", marks, column.path):
        if part.exists():
            _move_to_temporary(store, part)


def _remove_empty_groups(store: Path) -> None:
    for depth in ("*/*", "*"):
        for group in sorted((store / FEATURES).glob(depth)):
            if group.is_dir() and [inner.name for inner in group.iterdir()] == ["zarr.json"]:
                _move_to_temporary(store, group)


def _move_to_temporary(store: Path, folder: Path) -> None:
    """Move a folder into `.tmp/`, whose contents are deleted."""
    (store / atomic.TEMPORARY).mkdir(exist_ok=True)
    os.rename(folder, store / atomic.TEMPORARY / uuid.uuid4().hex)
    atomic.sync_folder(folder.parent)
