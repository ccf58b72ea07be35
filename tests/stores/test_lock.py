"""The lock of a store: it excludes other processes, and ends with its process."""

import os
import signal
import subprocess
import sys

import pytest

from varve.stores import lock

LOCK = """
import sys, time
from pathlib import Path
from varve.stores import lock
with lock.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def locking_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_error_names_the_process_that_has_the_lock(tmp_path, locking_process):
    refused = pytest.raises(lock.StoreLocked, match=f"process {locking_process.pid} on .*, since 2")
    with refused, lock.locked(tmp_path):
        pass


def test_the_lock_ends_with_a_killed_process(tmp_path, locking_process):
    os.kill(locking_process.pid, signal.SIGKILL)
    locking_process.wait()
    with lock.locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / lock.FILE).read_text()
    assert (tmp_path / lock.FILE).read_bytes() == b""


def test_a_child_process_does_not_inherit_the_lock(tmp_path):
    with lock.locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with lock.locked(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
