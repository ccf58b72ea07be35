"""Feature stores: cached features of clips on disk, read and written as numpy arrays.

A store is a folder: a Zarr v3 group that any Zarr library opens, and a table `clips.parquet` with
one row per clip. `FeatureStore` reads a store on a local disk or on object storage.
`varve.build` makes one on a local disk.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd

from varve.stores import atomic, clips, garbage, lock, references, text_features
from varve.stores.columns import FEATURES, Damaged, group_json
from varve.stores.digests import store_name
from varve.stores.feature import Feature, FeatureDataset
from varve.stores.garbage import GarbageReport
from varve.stores.locations import Location, Unreachable, local_folder, location_of
from varve.stores.video_feature import SampledFeature, VideoFeature, WindowFeature

__all__ = [
    "Damaged",
    "Feature",
    "FeatureDataset",
    "FeatureStore",
    "NotAStore",
    "SampledFeature",
    "SpecMismatch",
    "Unreachable",
    "VideoFeature",
    "WindowFeature",
]

FORMAT = 2


class NotAStore(ValueError):
    """The folder is not a store that this version can read."""


class SpecMismatch(ValueError):
    """No column of the store matches the request, or several columns match."""


class FeatureStore:
    """Cached features of a data set's clips, by backbone and stage.

    Attributes:
        location: Folder or object-storage prefix of the store; `str` gives its path or URL.
        attributes: Attributes of the store, such as the data set's folder and classes.

    >>> FeatureStore.open("no/such.zarr")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    varve.stores.NotAStore: no/such.zarr: no such folder; `varve build DATASET --store ...` ...
    """

    def __init__(self, location: Location, attributes: Mapping[str, Any]) -> None:
        self.location, self.attributes = location, dict(attributes)

    @classmethod
    def open(
        cls, path: str | Path, storage_options: Mapping[str, Any] | None = None
    ) -> "FeatureStore":
        """Open a store for reading.

        Args:
            path: Folder of a store, or URL of a copy (s3://BUCKET/PREFIX, gs://..., az://...).
            storage_options: For a URL: arguments of `obstore.store.from_url` (`endpoint`, `region`,
                `access_key_id`, ...). They replace environment variables.

        Raises:
            NotAStore: There is no store, or a newer version made it; the message gives the reason.
            Unreachable: Object storage does not respond, or refuses.
        """
        location = location_of(path, storage_options)
        if isinstance(location, Path) and not location.is_dir():
            raise NotAStore(f"{path}: no such folder; `varve build DATASET --store ...` makes one")
        return cls(location, _attributes(location))

    @classmethod
    def create(cls, path: str | Path) -> "FeatureStore":
        """Open a store for writing. Create it if the folder is new or empty.

        Raises:
            NotAStore: The folder has other files, or a newer version's store.
            io.UnsupportedOperation: The path is a URL; object storage is read only.
        """
        folder = local_folder(path)
        if folder.exists() and not folder.is_dir():
            raise NotAStore(f"{path} is a file; a store is a folder: give a new path")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "zarr.json").exists():
            cls.check_empty(folder)
            store = cls(folder, {"format": FORMAT})
            store.set_attributes({})
            return store
        return cls(folder, _attributes(folder))

    @staticmethod
    def check_empty(folder: Path) -> None:
        """Check that a folder without a store has no files of the user.

        Raises:
            NotAStore: It has; the message names some of them.
        """
        # A build that is killed at its start leaves these files, and no zarr.json.
        ours = {lock.FILE, atomic.TEMPORARY}
        others = sorted(p.name for p in folder.iterdir() if p.name not in ours)
        if others:
            raise NotAStore(
                f"{folder} is no store: it has no zarr.json, but {', '.join(others[:5])}"
                f"{', ...' if len(others) > 5 else ''}. Give a new or empty folder."
            )

    def __repr__(self) -> str:
        counts = f"{len(self.clips)} clips, {len(self.features())} features"
        return f"<FeatureStore {self.location}: {counts}>"

    @property
    def path(self) -> Path:
        """Return the store's folder.

        Raises:
            io.UnsupportedOperation: The store is on object storage, where it is read only.
        """
        return local_folder(self.location)

    @cached_property
    def clips(self) -> pd.DataFrame:
        """Table of clips, indexed by row id; see `varve.stores.clips.COLUMNS`."""
        return clips.read(self.location)

    def features(self) -> list[Feature]:
        """Return all columns of the store, sorted by backbone, stage and fingerprint."""
        return [
            self.feature_at(location, backbone, name)
            for backbone, name, location in sorted(self.columns())
        ]

    def sampled(
        self,
        frames: int = 8,
        sampling: str = "tsn",
        *,
        fps: float = 0.0,
        stride: int = 0,
        view: int = 0,
    ) -> "FeatureStore":
        """Return the store with its whole videos read as T frames per clip.

        Each column of whole videos is then a `SampledFeature`, and no other column is listed.

        Args: As `VideoFeature.sampled`.
        """
        options = {"frames": frames, "sampling": sampling, "fps": fps, "stride": stride}
        return _SampledStore(self, {**options, "view": view})

    def feature_at(self, location: Location, backbone: str, name: str) -> Feature:
        """Return the column at a location that `columns` gives.

        Raises:
            Damaged: Its metadata cannot be read.
        """
        feature = Feature(location, backbone, name, self.clips)
        kinds = {"pages": VideoFeature, "windows": WindowFeature}
        for kind in kinds.keys() & feature.spec.keys():
            return kinds[kind](location, backbone, name, self.clips, self.location)
        return feature

    def feature(
        self, backbone: str, name: str, *, view: int | None = None, fingerprint: str = ""
    ) -> Feature:
        """Return one column.

        The columns of a network that a method has changed have the same names as those of the
        unchanged network. Without a fingerprint the unchanged network's column is returned.

        Args:
            backbone: Backbone as in `--backbone` (a weight file may be given by its path), or the
                network's name alone if one backbone matches.
            name: Feature as in `--keep`: a stage, or stage:reduction.
            view: View of the clips, if the store has several.
            fingerprint: First digits of the fingerprint, if several columns match.

        Raises:
            SpecMismatch: No column matches, or several do. The message lists the columns, and how
                the matching ones differ.
        """
        columns = sorted(self.columns())
        full_name = store_name(backbone)
        matches = [
            column
            for column in columns
            if (column[0] == full_name or column[0].partition(":")[0] == backbone)
            and name in (column[1], *_whole(column[1]))
            and column[2].name.startswith(fingerprint[:16])
        ]
        features = [
            feature
            for b, n, path in matches
            for feature in [self.feature_at(path, b, n)]
            if view is None or feature.spec["frames"]["view"] == view
        ]
        if len(features) > 1 and not fingerprint:
            features = [f for f in features if not f.spec.get("grafts")] or features
        if len(features) == 1:
            return features[0]
        request = f"{backbone} {name}" + (f" {fingerprint}" if fingerprint else "")
        request += "" if view is None else f", view {view}"
        if not features:
            listed = "\n".join(f"  {b} {n} {p.name}" for b, n, p in columns) or "  no feature"
            raise SpecMismatch(f"{self.location} has no {request}; it has\n{listed}")
        raise SpecMismatch(
            f"{len(features)} columns of {self.location} match {request}; give `fingerprint=` (or "
            "`view=`) as well:\n" + "\n".join(differences(features))
        )

    def text(
        self, backbone: str, classes: Sequence[str] | None = None
    ) -> text_features.TextFeatures:
        """Return the text features of class names for a CLIP backbone, one unit vector per class.

        Args:
            backbone: Backbone as in `--backbone`.
            classes: Class names in the desired order; by default those of the data set.

        Raises:
            LookupError: The store does not have them; the message lists the backbones it has.
        """
        names = list(self.attributes["classes"] if classes is None else classes)
        return text_features.read(self.location, store_name(backbone), names)

    def add_reference(self, holder: str | Path, fingerprints: Iterable[str]) -> None:
        """Record that a run folder needs columns, so that `gc` keeps them while it exists.

        The columns are added to the folder's earlier ones. Add the reference first and open the
        columns after it: from then on they are not removed.

        Raises:
            ValueError: The folder does not exist, or an entry is no fingerprint.
            Damaged: The folder's present reference cannot be read.
        """
        references.add(self.path, holder, fingerprints)

    def remove_reference(self, holder: str | Path) -> None:
        """Record that a run folder needs no column of this store any more."""
        references.remove(self.path, holder)

    def gc(self, dry_run: bool = False, drop: Sequence[str] = ()) -> GarbageReport:
        """Remove the columns of changed networks that no run folder needs, and report them.

        Args:
            dry_run: Whether to change nothing, and report what would be removed.
            drop: First digits (6 or more) of the fingerprints of other columns to remove.

        Raises:
            ValueError: An entry of `drop` names no column, several, or one that a run folder needs.
            Damaged: A reference cannot be read. Nothing is removed then.
            StoreLocked: Another process writes to this store.
        """
        return garbage.collect(self.path, dry_run, drop)

    def set_attributes(self, changes: Mapping[str, Any]) -> None:
        """Change attributes of the store, such as the data set's folder and classes."""
        file = self.path / "zarr.json"
        self.attributes |= changes
        atomic.update(self.path, file, group_json({"varve": self.attributes}))

    def columns(self) -> Iterator[tuple[str, str, Location]]:
        """Iterate over (backbone, feature, location of the array) of all columns, in no order."""
        metadata = (self.location / FEATURES).glob("*/*/*/zarr.json")
        locations = {file.parent for file in metadata}
        for location in locations:
            marked = location.with_name(f"{location.name}.done") in locations
            if not location.name.endswith(".done") and (marked or not garbage.is_shell(location)):
                backbone, name = (unquote(part) for part in location.parts[-3:-1])
                yield backbone, name, location


class _SampledStore(FeatureStore):
    """A store whose features are samples of its whole videos."""

    def __init__(self, store: FeatureStore, options: Mapping[str, Any]) -> None:
        super().__init__(store.location, store.attributes)
        self._options = options

    def columns(self) -> Iterator[tuple[str, str, Location]]:
        for backbone, name, location in super().columns():
            if isinstance(super().feature_at(location, backbone, name), VideoFeature):
                yield backbone, name, location

    def feature_at(self, location: Location, backbone: str, name: str) -> Feature:
        feature = super().feature_at(location, backbone, name)
        assert isinstance(feature, VideoFeature)  # `columns` lists no other
        return feature.sampled(**self._options)


def differences(features: list[Feature]) -> list[str]:
    """Return one line per feature, with the entries of its specification that differ."""
    flat = [dict(_flatten(feature.spec)) for feature in features]
    keys = sorted({key for spec in flat for key in spec})
    differing = [k for k in keys if len({json.dumps(spec.get(k)) for spec in flat}) > 1]
    shown = [k for k in differing if "parameters" not in k and k != "fingerprint"] or differing
    return [
        f"  {feature.location.name}: " + ", ".join(f"{k}={spec.get(k)}" for k in shown[:8])
        for feature, spec in zip(features, flat, strict=True)
    ]


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from _flatten(inner, f"{path}.{i}")
    else:
        yield path, value


def _attributes(folder: Location) -> dict[str, Any]:
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
            f"{folder} has format {version}, this version reads format {FORMAT}; nothing was "
            "changed. Install a newer Varve to use it."
        )
    if version < FORMAT:
        raise NotAStore(
            f"{folder} has format {version}, which an older Varve wrote; this version reads "
            f"format {FORMAT}. Nothing was changed. Build it again into a new folder: "
            "`varve build DATASET --store NEW`."
        )
    return dict(ours)


def _whole(name: str) -> tuple[str, str]:
    """Return the names by which a whole output may also be requested."""
    return (f"{name}:tokens", f"{name}:map") if ":" not in name else ("", "")
