"""Disk space: whether a plan fits the store's disk, and errors that say what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from varve.pipeline.extraction.plan import Plan
from varve.pipeline.units import size


class DiskTooSmall(OSError):
    """The store's disk has less free space than the plan needs."""


def needed_bytes(plan: Plan) -> int:
    """Return the free bytes that a plan needs while it runs.

    They are the cells themselves, the shard being replaced, and the staged cells of a shard.
    """
    total = plan.file_bytes - plan.disk_bytes
    for column in plan.all_columns:
        spec = column.output.spec
        total += 2 * min(column.missing, spec.shard_clips) * spec.cell_bytes
    return total


def free_bytes(store: Path) -> int:
    """Return the free bytes of the disk that the store is on, or will be."""
    folder = next(folder for folder in (store, *store.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(folder).free


def check_disk(plan: Plan, store: Path) -> None:
    """Refuse a plan that does not fit the disk.

    Raises:
        DiskTooSmall: The message gives the bytes needed and free, and the largest columns.
    """
    need, free = needed_bytes(plan), free_bytes(store)
    if need <= free:
        return
    weights = [(c.missing * c.output.spec.cell_bytes, c.output.spec) for c in plan.all_columns]
    largest = sorted(weights, key=lambda pair: -pair[0])[:3]
    names = ", ".join(f"--keep {spec.feature} ({size(amount)})" for amount, spec in largest)
    raise DiskTooSmall(
        errno.ENOSPC,
        f"the plan needs {size(need)} on the disk of {store} and {size(free)} are free. Drop a "
        f"feature, the largest being {names}; or give a store on a larger disk",
    )


@contextmanager
def explained(store: Path) -> Iterator[None]:
    """Turn a disk that is full or read-only into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"the disk of {store} is full. Everything finished is kept: make room "
                f"({size(free_bytes(store))} are free) and run the same command again"
            )
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and _within(error, store):
            message = (
                f"{store} may not be written ({error.strerror}: {error.filename}). Nothing was "
                "changed; reading it needs no permission to write"
            )
        else:
            raise
        raise OSError(error.errno, message) from error


def _within(error: OSError, store: Path) -> bool:
    return Path(str(error.filename)).absolute().is_relative_to(store.absolute())
