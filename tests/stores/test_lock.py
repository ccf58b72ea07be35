import os
import signal
import subprocess
import sys

import pytest

from varve.stores import lock

HOLD = """
import sys, time
from pathlib import Path
from varve.stores import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_builder_is_told_who_holds_the_store(tmp_path, holder):
    told = pytest.raises(lock.StoreLocked, match=f"process {holder.pid} on .*, since 2")
    with told, lock.locked(tmp_path):
        pass


def test_a_killed_holder_frees_the_store(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
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
