"""Children that hang, die or lose their parent: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, wait

import psutil
import pytest

from varve.pipeline.config import FrameSet, Picture
from varve.pipeline.decoders import Decoded, DecodePool, Failure, Request, Stretch, _pool

QUICK = FrameSet(picture=Picture(size=32, resize=32))
# Seconds of work with a small result: every frame is enlarged to 4000 pixels first.
SLOW = FrameSet(frames=60, picture=Picture(size=8, resize=4000))


OTHERS: set[int] = set()


@pytest.fixture
def quick(videos):
    return Request(str(videos["h264.mp4"].path), (Stretch(),), (QUICK,))


@pytest.fixture
def slow(videos):
    return Request(str(videos["h264.mp4"].path), (Stretch(), Stretch()), (SLOW,))


@pytest.fixture(autouse=True)
def others():
    """Processes of other tests, such as the workers of a shared Dask client."""
    OTHERS.update(child.pid for child in psutil.Process().children())
    yield
    OTHERS.clear()


def decoders():
    """Return the running decoding children; spawn's resource tracker is none."""
    return [
        child
        for child in psutil.Process().children()
        if child.pid not in OTHERS and any("spawn_main" in word for word in child.cmdline())
    ]


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds")


def at_work(seconds=0.6):
    """The child that is busy, once one is."""

    def busy():
        known = [child for child in decoders() if child.pid in start]
        return [child for child in known if child.cpu_times().user > start[child.pid]]

    until(decoders)
    start = {child.pid: child.cpu_times().user + seconds for child in decoders()}
    return until(busy)[0]


def test_answers_come_back_and_every_child_has_ended_after_close(quick):
    with DecodePool(2, 60) as pool:
        answers = [future.result() for future in [pool.submit(quick) for _ in range(6)]]
        children = decoders()
        assert len(children) == 2
    assert all(len(answer) == 1 and isinstance(answer[0], Decoded) for answer in answers)
    assert answers[0][0].frames[0].shape == (8, 32, 32, 3)
    assert not any(child.is_running() for child in children)


def test_a_file_past_its_deadline_is_a_timeout_and_the_next_is_decoded(quick, slow):
    with DecodePool(1, 1.5) as pool:
        late, after = pool.submit(slow), pool.submit(quick)
        expected = Failure("timeout", "not decoded within 1.5 seconds")
        assert late.result() == [expected, expected]
        assert isinstance(after.result()[0], Decoded)


def test_a_suspended_child_is_killed_all_the_same(quick, slow):
    with DecodePool(1, 5) as pool:
        hung = pool.submit(slow)
        child = at_work()
        child.suspend()
        assert [answer.reason for answer in hung.result()] == ["timeout", "timeout"]
        assert not child.is_running()
        assert isinstance(pool.submit(quick).result()[0], Decoded)


def test_a_child_that_is_killed_loses_its_file_alone(quick, slow):
    with DecodePool(2, 60) as pool:
        lost = pool.submit(slow)
        others = [pool.submit(quick) for _ in range(4)]
        wait(others)
        at_work().kill()
        expected = Failure("crashed", "the decoding process was ended by SIGKILL")
        assert lost.result() == [expected, expected]
        others += [pool.submit(quick) for _ in range(4)]
        assert all(isinstance(future.result()[0], Decoded) for future in others)


def test_an_idle_child_that_dies_costs_nothing(quick):
    with DecodePool(1, 60) as pool:
        pool.submit(quick).result()
        (child,) = decoders()
        child.kill()
        for _ in range(3):
            assert isinstance(pool.submit(quick).result()[0], Decoded)


def test_ctrl_c_is_handled_by_the_parent(quick):
    with DecodePool(1, 60) as pool:
        pool.submit(quick).result()
        (child,) = decoders()
        child.send_signal(signal.SIGINT)
        assert isinstance(pool.submit(quick).result()[0], Decoded)
        assert decoders() == [child]


def test_children_are_replaced_after_their_share_of_files(quick, monkeypatch):
    monkeypatch.setattr(_pool, "FILES_PER_CHILD", 2)
    with DecodePool(1, 60) as pool:
        seen = set()
        for _ in range(5):
            assert isinstance(pool.submit(quick).result()[0], Decoded)
            seen |= {child.pid for child in decoders()}
    assert len(seen) >= 2


def test_closing_ends_work_under_way_and_cancels_what_waits(slow):
    pool = DecodePool(1, 600)
    running, waiting = pool.submit(slow), pool.submit(slow)
    at_work()
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 5
    with pytest.raises(_pool.PoolClosed):
        running.result()
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(slow)
    assert not decoders()


PARENT = """
import sys, time
from varve.pipeline.decoders import Request, Stretch
from varve.pipeline.decoders import DecodePool
from varve.pipeline.config import FrameSet, Picture

if __name__ == "__main__":
    import psutil
    slow = FrameSet(frames=60, picture=Picture(size=8, resize=4000))
    pool = DecodePool(2, 600)
    for _ in range(2):
        pool.submit(Request(sys.argv[1], (Stretch(),), (slow,)))
    while True:
        busy = [c.pid for c in psutil.Process().children() if c.cpu_times().user > 0.9]
        if len(busy) == 2:
            break
        time.sleep(0.1)
    print(*busy, flush=True)
    time.sleep(600)
"""


def test_children_die_with_a_parent_that_is_killed(slow, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells children of their parent's death")
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), slow.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()

    def has_ended(pid):
        # Without an init to reap it, a dead orphan stays as a zombie.
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"

    until(lambda: all(has_ended(pid) for pid in pids), seconds=3)


def test_children_that_cannot_start_are_an_error_and_no_fault_of_the_file(quick, monkeypatch):
    # A child that does not find its parent ends at once.
    monkeypatch.setattr(_pool.os, "getpid", lambda: os.getppid())
    with DecodePool(1, 60) as pool, pytest.raises(RuntimeError, match="end before they begin"):
        pool.submit(quick).result()


def test_for_a_daemonic_process_the_option_to_set_is_named(monkeypatch):
    monkeypatch.setitem(_pool.multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(RuntimeError, match=r"distributed\.worker\.daemon: False"):
        DecodePool(1, 60)


def test_a_decoder_that_is_not_installed_is_refused_on_submitting(quick, monkeypatch):
    monkeypatch.setattr(_pool.importlib.util, "find_spec", lambda name: None)
    _pool.require.cache_clear()
    request = Request(quick.path, quick.clips, (FrameSet(decoder="torchcodec"),))
    with DecodePool(1, 60) as pool, pytest.raises(ValueError, match="pip install torchcodec"):
        pool.submit(request)
    _pool.require.cache_clear()


def test_a_file_with_many_messages_on_stderr_is_decoded_in_silence(videos, tmp_path, capfd):
    content = bytearray(videos["mpeg4_b.avi"].path.read_bytes())
    content[len(content) // 2 :: 50] = bytes(len(content[len(content) // 2 :: 50]))
    noisy = tmp_path / "noisy.avi"
    noisy.write_bytes(content)
    with DecodePool(1, 60) as pool:
        assert len(pool.submit(Request(str(noisy), (Stretch(),), (QUICK,))).result()) == 1
    assert capfd.readouterr().err == ""
