"""Decoding in child processes that can be killed: a deadline per file, a reason for each loss.

A decoder may hang where only SIGKILL reaches it, or end its process. Each child therefore has a
pebble pool of its own. A child that dies with a lock taken, or halfway through a message, does not
harm the others, and its pool is thrown away with it.
"""

import contextlib
import ctypes
import functools
import importlib.util
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool

import pebble

from varve.pipeline.decoders._child import decode
from varve.pipeline.decoders._values import Decoded, Failure, Request, Timeline
from varve.pipeline.main_guard import require_guard
from varve.pipeline.registry import variant

Results = list[Decoded | Timeline | Failure]

# At its default of 3 seconds pebble waits that long for a hung child to take SIGTERM.
pebble.CONSTS.term_timeout = 0.1

# Libraries leak memory; new children bound the sum.
FILES_PER_CHILD = 1000

# Time to start an interpreter and import av, on a busy machine.
START_SECONDS = 120.0

PR_SET_PDEATHSIG = 1


class DecodePool:
    """Child processes that decode files, each one file at a time.

    Args:
        children: Number of files that are decoded at once.
        timeout_seconds: Wall-clock deadline of one file.

    Raises:
        RuntimeError: This process may not have children (a daemonic worker, a script without a
            guard).
    """

    def __init__(self, children: int, timeout_seconds: float) -> None:
        if children < 1 or not timeout_seconds > 0:
            raise ValueError(f"{children=}, {timeout_seconds=}: both must be above 0")
        if multiprocessing.current_process().daemon:
            raise RuntimeError(
                "this process is daemonic and may not start decoding children; start Dask workers "
                "with the setting distributed.worker.daemon: False"
            )
        require_guard("samplings", "decoders")
        self.timeout_seconds = timeout_seconds
        self._requests = queue.SimpleQueue[tuple[Request, Future[Results]] | None]()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        # A child dies with the thread that started it, so each has a thread of its own.
        self._keepers = [
            threading.Thread(target=self._keep, name=f"decode-{i}", daemon=True)
            for i in range(children)
        ]
        for keeper in self._keepers:
            keeper.start()

    def submit(self, request: Request) -> "Future[Results]":
        """Queue a file; the future gives one result per clip of the request.

        A file that outlasts the deadline fails with `timeout`, one whose child dies with `crashed`.

        Raises:
            RuntimeError: The pool is closed.
            ValueError: The library of a decoder is not installed.
        """
        for frame_set in request.frame_sets:
            require(frame_set.decoder)
        future: Future[Results] = Future()
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the decoding pool is closed")
            self._requests.put((request, future))
        return future

    def close(self) -> None:
        """Kill all children. Queued files are cancelled, those in progress raise `PoolClosed`."""
        with self._lock:
            self._closed.set()
            for _ in self._keepers:
                self._requests.put(None)
        for keeper in self._keepers:
            keeper.join()
        with contextlib.suppress(queue.Empty):
            while True:
                entry = self._requests.get_nowait()
                if entry is not None:
                    entry[1].cancel()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _keep(self) -> None:
        """Feed one child, and replace it when it is lost."""
        child = _Child(self.timeout_seconds, self._closed)
        while (entry := self._requests.get()) is not None:
            request, future = entry
            if self._closed.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                results = child.decode(request)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(results)
        child.kill()


class PoolClosed(RuntimeError):
    """The pool was closed while the file was being decoded."""


class _Child:
    """One child process, started on first use and again after each loss."""

    def __init__(self, timeout_seconds: float, closed: threading.Event) -> None:
        self.timeout_seconds, self.closed = timeout_seconds, closed
        self.pool: pebble.ProcessPool | None = None

    def decode(self, request: Request) -> Results:
        for _ in range(2):
            try:
                future = self._start().schedule(
                    decode, args=(request,), timeout=self.timeout_seconds
                )
            except RuntimeError:
                # An idle child was killed, and its pool with it: the file is not to blame.
                self.kill()
                continue
            try:
                return self._wait(future)
            except TimeoutError:
                self.kill()
                detail = f"not decoded within {self.timeout_seconds:g} seconds"
                return [Failure("timeout", detail)] * max(1, len(request.clips))
            except pebble.ProcessExpired as error:
                self.kill()
                detail = f"the decoding process {_end(error.exitcode)}"
                return [Failure("crashed", detail)] * max(1, len(request.clips))
            except BrokenProcessPool:
                # The child was lost before it began the file: the file is not to blame.
                self.kill()
        raise RuntimeError(
            "decoding children end before they begin: their interpreter must be able to import "
            "varve.pipeline.decoders, and a script must start them under "
            "`if __name__ == '__main__':`"
        )

    def kill(self) -> None:
        """End the child and forget its pool."""
        pool, self.pool = self.pool, None
        if pool is not None:
            # pebble ends the child first, then waits for its own reader, which never returns if
            # the child died halfway through a message.
            ending = threading.Thread(target=_end_pool, args=(pool,), daemon=True)
            ending.start()
            ending.join(timeout=10)

    def _start(self) -> pebble.ProcessPool:
        if self.pool is None:
            self.pool = pebble.ProcessPool(
                max_workers=1,
                max_tasks=FILES_PER_CHILD,
                initializer=_begin,
                initargs=(os.getpid(),),
                # A fork would copy the locks of other threads of this process.
                context=multiprocessing.get_context("spawn"),
            )
        return self.pool

    def _wait(self, future: "pebble.ProcessFuture[Results]") -> Results:
        # The clock of pebble starts when the child begins the file. This one bounds all of it.
        last_call = time.monotonic() + self.timeout_seconds + START_SECONDS
        while not wait([future], timeout=0.25).done:
            if self.closed.is_set():
                raise PoolClosed("the decoding pool was closed while the file was decoded")
            if time.monotonic() > last_call:
                raise TimeoutError
        results: Results = future.result()
        return results


def _end_pool(pool: pebble.ProcessPool) -> None:
    pool.stop()
    pool.join()


@functools.cache
def require(decoder: str) -> None:
    """Check that the library of a decoder is installed.

    Raises:
        ValueError: It is not; the message says what to do.
    """
    library = "" if decoder == "auto" else getattr(variant("decoders", decoder), "LIBRARY", "")
    if library and importlib.util.find_spec(library) is None:
        raise ValueError(
            f"decoder {decoder!r} was asked for and is not installed here: pip install {library}, "
            "or leave the decoder at auto (PyAV)"
        )


def _begin(parent: int) -> None:
    """Prepare a child: be quiet, leave Ctrl-C to the parent, and die with it."""
    import av.logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    av.logging.set_level(None)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end(exitcode: int) -> str:
    """Describe how a process ended.

    >>> _end(-11), _end(3)
    ('was ended by SIGSEGV', 'exited with code 3')
    """
    if exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"
