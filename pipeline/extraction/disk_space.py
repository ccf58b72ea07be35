"""The disk under a store: whether a plan fits it, and what to say when it refuses."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from varve.pipeline.extraction.plan import Plan
from varve.pipeline.units import size


class DiskTooSmall(OSError):
    """The store's disk has not the room that the plan needs."""


def needed_bytes(plan: Plan) -> int:
    """Free disk that carrying out a plan takes.

    Beside the cells themselves: the shard being replaced, and staged cells that wait for theirs.
    """
    total = plan.file_bytes - plan.held_bytes
    for column in plan.all_columns:
        spec = column.output.spec
        total += 2 * min(column.missing, spec.shard_clips) * spec.cell_bytes
    return total


def free_bytes(store: Path) -> int:
    """Free bytes of the disk that the store is on, or will be."""
    place = next(folder for folder in (store, *store.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free


def check_disk(plan: Plan, store: Path) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        DiskTooSmall: It names what is needed, what is free, and the largest columns.
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
    """Turn a full or refusing disk into an error that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            said = (
                f"the disk of {store} is full. Everything finished is kept: make room "
                f"({size(free_bytes(store))} are free) and run the same command again"
            )
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and _within(error, store):
            said = (
                f"{store} may not be written ({error.strerror}: {error.filename}). Nothing was "
                "changed; reading it needs no permission to write"
            )
        else:
            raise
        raise OSError(error.errno, said) from error


def _within(error: OSError, store: Path) -> bool:
    return Path(str(error.filename)).absolute().is_relative_to(store.absolute())
