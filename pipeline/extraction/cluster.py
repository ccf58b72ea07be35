"""Clusters: a Dask client on workers of our own, or on somebody's running scheduler."""

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from varve.pipeline.main_guard import require_guard

# Deaths of its worker that a block is forgiven before it is tried alone. At 0, whatever ran beside
# the culprit would be blamed with it.
ALLOWED_FAILURES = 1


@contextlib.contextmanager
def connected(scheduler: str, workers: Sequence[Mapping[str, Any]], threads: int) -> Iterator[Any]:
    """A client of a running scheduler, or of a cluster that lives as long as the block.

    Args:
        scheduler: Its address; "" for a cluster of our own.
        workers: Of one of our own: what `distributed.Worker` takes, each with `nthreads`.
        threads: Of OpenMP in each of them.
    """
    import dask
    from distributed import Client

    with contextlib.ExitStack() as stack:
        if scheduler:
            yield stack.enter_context(Client(scheduler))
            return
        require_guard()
        settings = {
            # Workers have decoding children, which a daemonic process may not.
            "distributed.worker.daemon": False,
            "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
            # Its two sampling threads wake every 10 ms on cores that the forward fills.
            "distributed.worker.profile.enabled": False,
            "distributed.nanny.pre-spawn-environ": _environment(threads),
        }
        stack.enter_context(dask.config.set(settings))
        with _ctrl_c_for_us_alone():
            cluster = stack.enter_context(_cluster(workers))
        yield stack.enter_context(Client(cluster))


def _cluster(workers: Sequence[Mapping[str, Any]]) -> Any:
    from distributed import Nanny, Scheduler, SpecCluster

    common = {"memory_limit": 0, "dashboard_address": None, "silence_logs": 40}
    specs = {
        f"worker-{i}": {"cls": Nanny, "options": {**common, **worker}}
        for i, worker in enumerate(workers)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": "127.0.0.1:0",
                                               "host": "127.0.0.1"}}  # fmt: skip
    return SpecCluster(scheduler=scheduler, workers=specs, silence_logs=40)


@contextlib.contextmanager
def _ctrl_c_for_us_alone() -> Iterator[None]:
    """Processes and threads started meanwhile never see SIGINT; a Ctrl-C now is seen at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(threads: int) -> dict[str, str]:
    """Of worker processes, before they start: later the allocator would not look.

    Dask's own gives freed memory back from 64 kB on, and a forward's activations come and go by
    the gigabyte: 16,000 page faults a frame of a ViT-S; ViT-B-16 in bfloat16 ran at 12.9 in place
    of 16.4 frames/s.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_ARENA_MAX": "1",
    }
