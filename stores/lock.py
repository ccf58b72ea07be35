"""One builder a store: a kernel lock that dies with its holder."""

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
def held(store: Path) -> Iterator[None]:
    """Hold the store's lock for the length of a `with` block.

    The lock is the kernel's (`flock`): a killed holder frees it, and no file has to be removed by
    hand. The file's text is only for the person who finds the store busy.

    Raises:
        StoreLocked: Somebody else holds it; the message says who, and since when.
    """
    # O_CLOEXEC (Python's default) keeps worker processes from inheriting the lock.
    descriptor = os.open(store / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(_busy(store, os.read(descriptor, 4096))) from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _busy(store: Path, text: bytes) -> str:
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "a process that has not said its name"
    return (
        f"{store} is being built by {who}. Wait for it to end, or stop it; what it has finished "
        "is kept, and the next build goes on from there."
    )
