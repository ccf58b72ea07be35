"""Garbage: columns of changed networks that no run folder needs, and how they are removed.

A column of a network as published is what a build asked for, and stays unless it is named. One of
a network that a method has changed (its attributes say `grafts`) stays while a run folder holds it.

Whoever is killed here leaves whole columns, empty ones, or a shell (metadata alone) that counts for
nothing: marks go first, then cells, then the two arrays, each by a rename into `.tmp/`.
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
from varve.stores.references import Reference
from varve.stores.remote import Place

MIN_DIGITS = 6


@dataclass(frozen=True)
class Fate:
    """What becomes of a column, and why.

    Attributes:
        fingerprint: 64 digits, or 16 where the column's metadata cannot be read.
        size_bytes: Of its files, staged blocks included.
        holders: Run folders that need it.
    """

    backbone: str
    feature: str
    fingerprint: str
    size_bytes: int
    why: str
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Garbage:
    """What was freed, or would be.

    Attributes:
        freed: Columns removed.
        kept: Columns of changed networks that stay.
        gone: Run folders that are no longer there, whose references were removed.
    """

    store: Path
    dry_run: bool
    freed: tuple[Fate, ...]
    kept: tuple[Fate, ...]
    gone: tuple[str, ...]

    @property
    def freed_bytes(self) -> int:
        return sum(column.size_bytes for column in self.freed)


def collect(store: Path, dry_run: bool = False, drop: Sequence[str] = ()) -> Garbage:
    """See `FeatureStore.gc`."""
    if dry_run:
        return _survey(store, drop)[0]
    with lock.held(store):
        atomic.clear_temporary(store)
        # Held until the last column is out of its place: what somebody holds afterwards stays.
        with references.locked(store):
            report, columns, dead = _survey(store, drop)
            for column in columns:
                _remove(store, column)
            for reference in dead:
                reference.file.unlink()
        _remove_empty_groups(store)
        atomic.clear_temporary(store)
    return replace(report, dry_run=False)


def is_shell(path: Place) -> bool:
    """Whether a column's folder is what an interrupted removal left: no marks, no cells."""
    return not path.with_name(f"{path.name}.done").exists() and not (path / "c").exists()


@dataclass(frozen=True)
class _Found:
    """A column by its folder, readable or not."""

    path: Path

    @property
    def place(self) -> str:
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


def _survey(store: Path, drop: Sequence[str]) -> tuple[Garbage, list[_Found], list[Reference]]:
    """The report of a dry run, the columns to remove, and the references of folders gone.

    Raises:
        ValueError: `drop` names no column, several, or one that is needed.
        Damaged: A reference cannot be read.
    """
    columns = [
        _Found(metadata.parent)
        for metadata in sorted((store / FEATURES).glob("*/*/*/zarr.json"))
        if metadata.parent.suffix != ".done"
    ]
    held = references.held(store)
    dropped = {_named(store, columns, asked) for asked in drop}
    freed: list[tuple[_Found, str]] = []
    kept: list[tuple[_Found, str, list[str]]] = []
    for column in columns:
        needing = [r for r in held if r.needs(column.path.name)]
        holders = [str(r.holder) for r in needing if r.living]
        if is_shell(column.path):
            freed.append((column, "an interrupted removal left it"))
        elif column in dropped:
            if holders:
                raise ValueError(
                    f"{column.label} is needed by the run folder {', '.join(holders)}: delete "
                    "that folder or release it (`FeatureStore.release`) first. Nothing was removed"
                )
            freed.append((column, "named to be dropped"))
        elif column.attributes is None:
            why = "its zarr.json is damaged: nothing tells what made it; it can be dropped by name"
            kept.append((column, why, holders))
        elif grafts := column.attributes.get("grafts"):
            if holders:
                kept.append((column, f"needed by {', '.join(holders)}", holders))
                continue
            gone = [str(r.holder) for r in needing]
            why = f"its run folder {', '.join(gone)} is no longer there"
            changed = f"a method changed {', '.join(grafts)}, and no run folder needs it"
            freed.append((column, why if gone else changed))
    dead = [reference for reference in held if not reference.living]
    report = Garbage(
        store,
        True,
        tuple(_fate(store, column, why) for column, why in freed),
        tuple(_fate(store, column, why, holders) for column, why, holders in kept),
        tuple(str(reference.holder) for reference in dead),
    )
    return report, [column for column, _ in freed], dead


def _named(store: Path, columns: list[_Found], asked: str) -> _Found:
    """The one column that `asked` names: the beginning of its fingerprint, after
    BACKBONE/FEATURE/ where two backbones share it."""
    digits = asked.rpartition("/")[2]
    found = [
        column
        for column in columns
        if column.fingerprint.startswith(asked)
        or "/".join([*column.names, column.fingerprint]).startswith(asked)
    ]
    if len(found) == 1 and len(digits) >= MIN_DIGITS:
        return found[0]
    if len(digits) < MIN_DIGITS:
        problem = f"{asked!r} is too short to name a column: give {MIN_DIGITS} digits or more"
    elif not found:
        problem = f"no column's fingerprint begins with {asked!r}"
    else:
        problem = f"{len(found)} begin with {asked!r}: give more, or BACKBONE/FEATURE/DIGITS"
    listed = "\n".join(f"  {c.label}" for c in columns) or "  no column"
    raise ValueError(f"{problem}. Nothing was removed; {store} has\n{listed}")


def _fate(store: Path, column: _Found, why: str, holders: Sequence[str] = ()) -> Fate:
    folders = (column.path, Path(f"{column.path}.done"), store / staging.FOLDER / column.place)
    size = sum(map(_size, folders))
    return Fate(*column.names, column.fingerprint, size, why, tuple(holders))


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a build beside a dry run moves its files
            total += file.stat().st_size if file.is_file() else 0
    return total


def _remove(store: Path, column: _Found) -> None:
    """Take a column out of its place. Every step leaves what a reader and a builder understand."""
    staging.drop(store, staging.files(store, column.place))
    marks = Path(f"{column.path}.done")
    for part in (marks / "c", column.path / "c", marks, column.path):
        if part.exists():
            _set_aside(store, part)


def _remove_empty_groups(store: Path) -> None:
    for depth in ("*/*", "*"):
        for group in sorted((store / FEATURES).glob(depth)):
            if group.is_dir() and [inner.name for inner in group.iterdir()] == ["zarr.json"]:
                _set_aside(store, group)


def _set_aside(store: Path, folder: Path) -> None:
    """Move a folder into `.tmp/`, to be deleted with it."""
    (store / atomic.TEMPORARY).mkdir(exist_ok=True)
    os.rename(folder, store / atomic.TEMPORARY / uuid.uuid4().hex)
    atomic.sync_folder(folder.parent)
