"""References: the columns that each run folder needs, and that garbage collection keeps.

`references/<digest of the folder's path>.json` is {"holder": path, "fingerprints": [...]}. The
holder is the run folder. A reference is valid while that folder exists: to release the columns of
a run, delete its folder. References have a lock and a `.tmp/` of their own, because a run may add
one while another process has the store's lock and empties the store's `.tmp/`.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from varve.stores import atomic
from varve.stores.columns import Damaged
from varve.stores.digests import digest

FOLDER = "references"
LOCK = ".lock"
_FINGERPRINT = re.compile("[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Reference:
    """The columns that one run folder needs.

    Attributes:
        holder: Absolute path of the run folder.
        fingerprints: Fingerprints of the columns; their first 16 digits are compared.
        holder_exists: Whether the folder is still there.
        file: File of the reference.
    """

    holder: Path
    fingerprints: tuple[str, ...]
    holder_exists: bool
    file: Path

    def needs(self, fingerprint: str) -> bool:
        """Return whether the run folder needs a column."""
        return any(needed[:16] == fingerprint[:16] for needed in self.fingerprints)


def read_all(store: Path) -> list[Reference]:
    """Return every reference, sorted by its holder's path.

    Raises:
        Damaged: A file cannot be read. It is not skipped, since its columns would then be removed.
    """
    references = []
    for file in sorted((store / FOLDER).glob("*.json")):
        with suppress(FileNotFoundError):  # removed meanwhile
            references.append(_read(file))
    return sorted(references, key=lambda reference: reference.holder)


def add(store: Path, holder: str | Path, fingerprints: Iterable[str]) -> None:
    """Add columns to the reference of a run folder. The columns need not exist yet.

    Raises:
        ValueError: The folder does not exist, or a fingerprint has fewer than 16 digits.
        Damaged: The folder's present reference cannot be read.
    """
    folder = Path(holder).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"{holder} is no folder, so no column can be kept for it: a reference lasts as long as "
            "its run folder. Make the folder first"
        )
    added = set(fingerprints)
    for fingerprint in added:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(
                f"{fingerprint!r} names no column: give its fingerprint, 16 to 64 hexadecimal "
                "digits (`Feature.fingerprint`)"
            )
    with locked(store):
        file = _file(store, folder)
        before = set(_read(file).fingerprints) if file.exists() else set()
        if added - before:
            text = json.dumps(
                {"holder": str(folder), "fingerprints": sorted(before | added)}, indent=1
            )
            atomic.clear_temporary(store / FOLDER)
            atomic.write(store / FOLDER, file, text.encode())


def remove(store: Path, holder: str | Path) -> None:
    """Remove the reference of a run folder, whether the folder exists or not."""
    file = _file(store, Path(holder).resolve())
    if file.exists():
        with locked(store):
            file.unlink(missing_ok=True)


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Lock the references for the length of a `with` block; wait until the lock is free."""
    folder = store / FOLDER
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        atomic.sync_folder(store)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _file(store: Path, holder: Path) -> Path:
    return store / FOLDER / f"{digest(str(holder))[:16]}.json"


def _read(file: Path) -> Reference:
    try:
        content = json.loads(file.read_bytes())
        holder, fingerprints = content["holder"], content["fingerprints"]
        if not isinstance(holder, str) or file.stem != digest(holder)[:16]:
            raise ValueError(f"its name does not belong to the folder {holder!r}")
        if not isinstance(fingerprints, list) or not all(map(_FINGERPRINT.fullmatch, fingerprints)):
            raise ValueError("its entries are no fingerprints")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{file} is damaged ({error}). It lists the columns that a run folder needs, and "
            "nothing is removed without it: restore it, or delete it and add the reference again "
            "(`FeatureStore.add_reference`)"
        ) from error
    return Reference(Path(holder), tuple(fingerprints), _exists(Path(holder)), file)


def _exists(folder: Path) -> bool:
    """Return False only if the folder is certainly not there.

    A folder that cannot be read (no permission, a server that does not respond) counts as there.
    """
    try:
        folder.stat()
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))
    return True
