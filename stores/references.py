"""References: which columns a run folder needs, so that `gc` leaves them.

`references/<digest of the folder's path>.json` is {"holder": path, "fingerprints": [...]}. A
reference counts while its folder exists: to let a run's columns go, delete the run's folder.
References have a lock and a `.tmp/` of their own: a run may hold columns while another process has
the store's lock, whose holder empties the store's `.tmp/`.
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
from varve.stores.identity import digest

FOLDER = "references"
LOCK = ".lock"
_FINGERPRINT = re.compile("[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Reference:
    """What one run folder holds.

    Attributes:
        holder: The folder's absolute path.
        fingerprints: Of the columns it needs; the first 16 digits tell.
        living: Whether the folder is still there.
        file: Where the reference is written.
    """

    holder: Path
    fingerprints: tuple[str, ...]
    living: bool
    file: Path

    def needs(self, fingerprint: str) -> bool:
        return any(held[:16] == fingerprint[:16] for held in self.fingerprints)


def held(store: Path) -> list[Reference]:
    """Every reference, by its holder's path.

    Raises:
        Damaged: A file does not say what is held. It is never passed over: that would free what
            it protects.
    """
    found = []
    for file in sorted((store / FOLDER).glob("*.json")):
        with suppress(FileNotFoundError):  # released meanwhile
            found.append(_read(file))
    return sorted(found, key=lambda reference: reference.holder)


def hold(store: Path, holder: str | Path, fingerprints: Iterable[str]) -> None:
    """Add columns to what a run folder holds. They need not exist yet.

    Raises:
        ValueError: The folder does not exist, or a fingerprint has fewer than 16 digits.
        Damaged: What the folder holds already cannot be read.
    """
    folder = Path(holder).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"{holder} is no folder, so nothing can be held for it: a reference lasts as long as "
            "its run folder. Make the folder first"
        )
    asked = list(fingerprints)
    for fingerprint in asked:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(
                f"{fingerprint!r} names no column: give its fingerprint, 16 to 64 hexadecimal "
                "digits (`Feature.fingerprint`)"
            )
    with locked(store):
        file = _file(store, folder)
        before = set(_read(file).fingerprints) if file.exists() else set()
        after = sorted(before | set(asked))
        if after != sorted(before):
            text = json.dumps({"holder": str(folder), "fingerprints": after}, indent=1)
            atomic.clear_temporary(store / FOLDER)
            atomic.write(store / FOLDER, file, text.encode())


def release(store: Path, holder: str | Path) -> None:
    """Hold nothing for this folder any more, whether it exists or not."""
    file = _file(store, Path(holder).resolve())
    if file.exists():
        with locked(store):
            file.unlink(missing_ok=True)


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Keep the references as they are for the length of a `with` block. Waits for its turn."""
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
        found = json.loads(file.read_bytes())
        holder, fingerprints = found["holder"], found["fingerprints"]
        if not isinstance(holder, str) or file.stem != digest(holder)[:16]:
            raise ValueError(f"its name does not go with the folder {holder!r}")
        if not isinstance(fingerprints, list) or not all(map(_FINGERPRINT.fullmatch, fingerprints)):
            raise ValueError("what it holds are no fingerprints")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{file} is damaged ({error}). It says which columns a run folder needs, and nothing "
            "is freed without it: put it back as it was, or remove it and hold again what the run "
            "needs (`FeatureStore.hold`)"
        ) from error
    return Reference(Path(holder), tuple(fingerprints), _exists(Path(holder)), file)


def _exists(holder: Path) -> bool:
    """Whether the folder is there. One that cannot be looked at (no permission, a server that does
    not answer) is not known to be gone."""
    try:
        holder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
