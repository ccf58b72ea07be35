"""The lock of a store: one process writes at a time, and a killed process leaves no lock behind."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = ".lock"


class StoreLocked(RuntimeError):
    """Another process is building the same store."""


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Lock a store for the length of a `with` block.

    The lock is the kernel's (`flock`). It ends with the process that has it, so no file has to be
    removed by hand. The text of the file only informs the person who finds the store locked.

    Raises:
        StoreLocked: Another process has the lock; the message names it and the time.
    """
    # O_CLOEXEC (Python's default) keeps worker processes from inheriting the lock.
    descriptor = os.open(store / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(_busy(store, os.read(descriptor, 4096))) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _busy(store: Path, text: bytes) -> str:
    try:
        owner = json.loads(text)
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        who = "an unknown process"
    return (
        f"{store} is being built by {who}. Wait for it to end, or stop it; what it has finished "
        "is kept, and the next build resumes from there."
    )
