"""Stores: bytes on disk. Knows clips, features and fingerprints; numpy in and out.

A store is a folder: a Zarr v3 group that any Zarr library opens, and beside it `clips.parquet`,
a row per clip. `FeatureStore` is how to read one, there or on object storage; the
pipeline's build is how to make one, on a local disk.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd

from varve.stores import atomic, clips, garbage, lock, references, text
from varve.stores.columns import FEATURES, Damaged, group_json
from varve.stores.feature import Feature, FeatureDataset
from varve.stores.garbage import Garbage
from varve.stores.identity import store_name
from varve.stores.remote import Place, Unreachable, local_folder, place_of

__all__ = [
    "Damaged",
    "Feature",
    "FeatureDataset",
    "FeatureStore",
    "NotAStore",
    "SpecMismatch",
    "Unreachable",
]

FORMAT = 1


class NotAStore(ValueError):
    """The folder holds no store that this version can read."""


class SpecMismatch(ValueError):
    """What was asked for is not what the store holds, or more than one thing it holds."""


class FeatureStore:
    """Features of a data set's clips, by backbone and stage.

    Attributes:
        place: Where it lies, on local disk or on object storage; `str` of it is the path or URL.
        attributes: The store's own: where the data set lies, its classes.

    >>> FeatureStore.open("no/such.zarr")
    Traceback (most recent call last):
    stores.NotAStore: no/such.zarr: no such folder; `varve build DATASET --store ...` makes one
    """

    def __init__(self, place: Place, attributes: Mapping[str, Any]) -> None:
        self.place, self.attributes = place, dict(attributes)

    @classmethod
    def open(
        cls, path: str | Path, storage_options: Mapping[str, Any] | None = None
    ) -> "FeatureStore":
        """Open a store to read it.

        Args:
            path: A folder, or s3://BUCKET/PREFIX, gs://... or az://... of a copy of one.
            storage_options: For a URL: what `obstore.store.from_url` takes (`endpoint`, `region`,
                `access_key_id`, ...), in place of environment variables.

        Raises:
            NotAStore: There is none, or a newer version made it; the message says which.
            Unreachable: Object storage gives no answer, or refuses.
        """
        place = place_of(path, storage_options)
        if isinstance(place, Path) and not place.is_dir():
            raise NotAStore(f"{path}: no such folder; `varve build DATASET --store ...` makes one")
        return cls(place, _attributes(place))

    @classmethod
    def create(cls, path: str | Path) -> "FeatureStore":
        """Open a store to build it, and make it first where the folder is new or empty.

        Raises:
            NotAStore: The folder holds something else, or a newer version's store.
            io.UnsupportedOperation: It is a URL, as for all that writes.
        """
        folder = local_folder(path)
        if folder.exists() and not folder.is_dir():
            raise NotAStore(f"{path} is a file; a store is a folder: give a new path")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "zarr.json").exists():
            cls.refuse_strangers(folder)
            store = cls(folder, {"format": FORMAT})
            store.set_attributes({})
            return store
        return cls(folder, _attributes(folder))

    @staticmethod
    def refuse_strangers(folder: Path) -> None:
        """Refuse a folder that is no store and holds somebody's files.

        Raises:
            NotAStore: It names some of what the folder holds.
        """
        # A build killed in its first moments leaves these, and no zarr.json.
        ours = {lock.FILE, atomic.TEMPORARY}
        strange = sorted(p.name for p in folder.iterdir() if p.name not in ours)
        if strange:
            raise NotAStore(
                f"{folder} is no store: it has no zarr.json and holds {', '.join(strange[:5])}"
                f"{', ...' if len(strange) > 5 else ''}. Give a new or empty folder."
            )

    def __repr__(self) -> str:
        return (
            f"<FeatureStore {self.place}: {len(self.clips)} clips, {len(self.features())} features>"
        )

    @property
    def path(self) -> Path:
        """The folder, for who writes.

        Raises:
            io.UnsupportedOperation: The store lies on object storage, where it is read only.
        """
        return local_folder(self.place)

    @cached_property
    def clips(self) -> pd.DataFrame:
        """The table of clips, indexed by row id; see `varve.stores.clips.COLUMNS`."""
        return clips.read(self.place)

    def features(self) -> list[Feature]:
        """Every column of the store, by backbone, stage and fingerprint."""
        return [
            Feature(place, backbone, name, self.clips)
            for backbone, name, place in sorted(self.columns())
        ]

    def feature(
        self, backbone: str, name: str, *, view: int | None = None, fingerprint: str = ""
    ) -> Feature:
        """One column.

        Where a method has changed the network, its columns have the same names: without a
        fingerprint they are passed over in favour of the network's own.

        Args:
            backbone: As given to `--backbone` (a weight file may be given by its path), or the
                bare network name where one matches.
            name: As given to `--keep`: a stage, or stage:reduction.
            view: Of the clips, where the store has several.
            fingerprint: The beginning of the column's, where several match (other frames, say).

        Raises:
            SpecMismatch: No column matches, or several do; the message lists them, and how
                those that match differ.
        """
        columns = sorted(self.columns())
        wanted = store_name(backbone)
        found = [
            column
            for column in columns
            if (column[0] == wanted or column[0].partition(":")[0] == backbone)
            and name in (column[1], *_whole(column[1]))
            and column[2].name.startswith(fingerprint[:16])
        ]
        features = [
            feature
            for b, n, path in found
            for feature in [Feature(path, b, n, self.clips)]
            if view is None or feature.spec["frames"]["view"] == view
        ]
        if len(features) > 1 and not fingerprint:
            features = [f for f in features if not f.spec.get("grafts")] or features
        if len(features) == 1:
            return features[0]
        asked = f"{backbone} {name}" + (f" {fingerprint}" if fingerprint else "")
        asked += "" if view is None else f", view {view}"
        if not features:
            held = "\n".join(f"  {b} {n} {p.name}" for b, n, p in columns) or "  no feature at all"
            raise SpecMismatch(f"{self.place} has no {asked}; it holds\n{held}")
        raise SpecMismatch(
            f"{len(features)} columns of {self.place} are {asked}; give `fingerprint=` (or "
            "`view=`) as well:\n" + "\n".join(differences(features))
        )

    def text(self, backbone: str, classes: Sequence[str] | None = None) -> text.TextFeatures:
        """Text features of class names, for a CLIP backbone: a unit vector a class.

        Args:
            backbone: As given to `--backbone`.
            classes: Names in the order wanted; the data set's own by default.

        Raises:
            LookupError: The store lacks them; the message says what it has.
        """
        names = list(self.attributes["classes"] if classes is None else classes)
        return text.read(self.place, store_name(backbone), names)

    def hold(self, holder: str | Path, fingerprints: Iterable[str]) -> None:
        """Say that a run folder needs columns: `gc` leaves them while the folder exists.

        Adds to what the folder holds already. Hold first, then open: from then on they stay.

        Raises:
            ValueError: The folder does not exist, or what is given is no fingerprint.
        """
        references.hold(self.path, holder, fingerprints)

    def release(self, holder: str | Path) -> None:
        """Say that a run folder needs nothing of this store any more."""
        references.release(self.path, holder)

    def gc(self, dry_run: bool = False, drop: Sequence[str] = ()) -> Garbage:
        """Remove the columns of changed networks that no run folder holds, and say what it freed.

        Args:
            dry_run: Change nothing, and say what would be freed.
            drop: Beginnings of the fingerprints, 6 digits or more, of other columns to remove.

        Raises:
            ValueError: `drop` names no column or several, or one that a run folder needs.
            Damaged: A reference cannot be read, so that nothing may be freed.
            StoreLocked: Another process writes this store.
        """
        return garbage.collect(self.path, dry_run, drop)

    def set_attributes(self, changes: Mapping[str, Any]) -> None:
        """Change the store's own attributes (where the data set lies, its classes)."""
        file = self.path / "zarr.json"
        self.attributes |= changes
        text = group_json({"varve": self.attributes})
        if not file.exists() or file.read_bytes() != text:
            atomic.write(self.path, file, text)

    def columns(self) -> Iterator[tuple[str, str, Place]]:
        """Backbone, feature and array of every column, in no order."""
        found = {metadata.parent for metadata in (self.place / FEATURES).glob("*/*/*/zarr.json")}
        for place in found:
            marked = place.with_name(f"{place.name}.done") in found
            if not place.name.endswith(".done") and (marked or not garbage.is_shell(place)):
                backbone, name = (unquote(part) for part in place.parts[-3:-1])
                yield backbone, name, place


def differences(features: list[Feature]) -> list[str]:
    """One line a feature, with the entries of its specification that differ among them."""
    flat = [dict(_flatten(feature.spec)) for feature in features]
    keys = sorted({key for one in flat for key in one})
    differing = [k for k in keys if len({json.dumps(one.get(k)) for one in flat}) > 1]
    telling = [k for k in differing if "parameters" not in k and k != "fingerprint"] or differing
    return [
        f"  {feature.place.name}: " + ", ".join(f"{k}={one.get(k)}" for k in telling[:8])
        for feature, one in zip(features, flat, strict=True)
    ]


def _flatten(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from _flatten(inner, f"{place}.{i}")
    else:
        yield place, value


def _attributes(folder: Place) -> dict[str, Any]:
    try:
        root = json.loads((folder / "zarr.json").read_bytes())
        ours = root["attributes"]["varve"]
        version = ours["format"]
    except FileNotFoundError as error:
        why = "it has no zarr.json" if isinstance(folder, Path) else str(error)
        raise NotAStore(f"{folder} is no store: {why}") from None
    except (ValueError, KeyError, TypeError):
        raise NotAStore(f"{folder} is no store: its zarr.json was not written by Varve") from None
    if not isinstance(version, int) or version > FORMAT:
        raise NotAStore(
            f"{folder} has format {version}, this version reads up to {FORMAT}; nothing was "
            "changed. Install a newer Varve to use it."
        )
    return dict(ours)


def _whole(name: str) -> tuple[str, str]:
    """A whole output may also be asked for by its form."""
    return (f"{name}:tokens", f"{name}:map") if ":" not in name else ("", "")
