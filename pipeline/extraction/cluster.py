"""Cluster: a Dask client of a local cluster, or of a scheduler that is already running."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from multiprocessing import forkserver
from typing import Any

from varve.pipeline.main_guard import require_guard

# Deaths of its worker before a block is tried alone. At 0, blocks that ran beside the one that
# killed the worker would be blamed with it.
ALLOWED_FAILURES = 1
# Imported once for all workers of a process, where the process itself has imported them.
PRELOADED = (
    *("distributed", "torch", "torchvision", "open_clip", "timm"),
    "varve.pipeline.extraction.worker",
)


@contextlib.contextmanager
def connected(
    scheduler: str, workers: Sequence[Mapping[str, Any]], threads: int, kinds: Sequence[str]
) -> Iterator[Any]:
    """Give a client of a running scheduler, or of a local cluster that ends with the block.

    Args:
        scheduler: Address of a running scheduler; "" for a local cluster.
        workers: Arguments of each local `distributed.Worker`, with `nthreads`.
        threads: OpenMP threads of each local worker.
        kinds: Kinds of variants that the work uses and local workers must find.
    """
    import dask
    from distributed import Client

    with contextlib.ExitStack() as stack:
        if scheduler:
            yield stack.enter_context(Client(scheduler))
            return
        require_guard(*kinds)
        settings = {
            # Workers have decoding children, which a daemonic process may not.
            "distributed.worker.daemon": False,
            "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
            # Its two sampling threads wake every 10 ms on cores that the forward fills.
            "distributed.worker.profile.enabled": False,
            "distributed.worker.multiprocessing-method": "forkserver",
        }
        environment = _environment(threads)
        stack.enter_context(dask.config.set(settings))
        with _ctrl_c_for_us_alone():
            _start_fork_server(environment)
            environment = {**os.environ, **environment}
            cluster = stack.enter_context(_cluster(workers, environment))
        client = stack.enter_context(Client(cluster))
        names = {*environment, *(name for worker in workers for name in worker.get("env", ()))}
        client.register_plugin(_without_others(names), name="varve-environment")
        yield client


def _start_fork_server(environment: Mapping[str, str]) -> None:
    """Start the process of which all workers of this process's clusters are forks, once.

    It imports the large libraries, which takes seconds, so that its forks need not. The allocator
    reads the environment as a process starts, and Python the path of modules. It stays until this
    process ends, which has one such server: pools of the user's with the start method "forkserver"
    are its forks too, from then on.
    """
    from distributed.utils import get_mp_context

    modules = [name for name in PRELOADED if name in sys.modules]
    get_mp_context().set_forkserver_preload(modules)
    # A safe path, since the present folder would come before it: a file `fractions.py` of the
    # user's is no part of a library.
    path = os.pathsep.join(filter(None, sys.path))
    changes = {**environment, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _without_others(names: Set[str]) -> Any:
    """Return a plugin that removes all but some variables from the environment of a worker.

    A fork has those of the server, of which this process may have removed some since.
    """
    from distributed import WorkerPlugin

    class Environment(WorkerPlugin):  # type: ignore[misc]
        def setup(self, worker: Any) -> None:
            for name in os.environ.keys() - names:
                del os.environ[name]

    return Environment()


def _cluster(workers: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> Any:
    from distributed import Nanny, Scheduler, SpecCluster

    common = {"memory_limit": 0, "dashboard_address": None, "silence_logs": 40}
    specs = {
        f"worker-{i}": {
            "cls": Nanny,
            "options": {**common, **worker, "env": {**environment, **worker.get("env", {})}},
        }
        for i, worker in enumerate(workers)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": "127.0.0.1:0",
                                               "host": "127.0.0.1"}}  # fmt: skip
    return SpecCluster(scheduler=scheduler, workers=specs, silence_logs=40)


@contextlib.contextmanager
def _ctrl_c_for_us_alone() -> Iterator[None]:
    """Block SIGINT: processes and threads started meanwhile never see it, and we see it after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(threads: int) -> dict[str, str]:
    """Return the environment of worker processes, which the allocator reads as they start.

    Dask's default returns freed memory from 64 kB on, and a forward allocates activations by the
    gigabyte: 16,000 page faults per frame of a ViT-S. ViT-B-16 in bfloat16 ran at 12.9 frames/s,
    and at 16.4 with these settings.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_ARENA_MAX": "1",
    }
