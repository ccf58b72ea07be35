"""Schedule: gives blocks to workers, and recovers when a worker dies.

A local cluster has CPU workers that decode and, without a GPU, also run the forward; each GPU has
a worker of its own. At most `AHEAD` blocks per forward worker are in flight, so that memory is
bounded by the number of blocks and not of clips.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from varve.pipeline.config import Runtime
from varve.pipeline.decoders import Failure
from varve.pipeline.extraction.blocks import Block
from varve.pipeline.extraction.cluster import connected
from varve.pipeline.extraction.extract import close_pools
from varve.pipeline.extraction.forward import adopt, adopted, dismiss
from varve.pipeline.extraction.worker import DecodedBlock, Job, Report, decode, forward

if TYPE_CHECKING:
    from varve.pipeline.backbones import Backbone

AHEAD = 3
FORWARD, GPU = "FORWARD", "GPU"
LOOK_SECONDS = 20.0
GONE_SECONDS = 120.0


@dataclass(frozen=True)
class Events:
    """Callbacks that report progress."""

    decoded: Callable[[Block], None] = lambda block: None
    message: Callable[[str], None] = lambda line: None


@dataclass
class Lost:
    """A block of a single file that killed every worker that ran it."""

    block: Block
    failure: Failure = field(
        default_factory=lambda: Failure("crashed", "the process computing it died, also alone")
    )


class NoSuchWorker(RuntimeError):
    """The cluster has no worker that can do the work; a task would wait for ever."""


def run_blocks(
    job: Job,
    blocks: list[Block],
    runtime: Runtime,
    events: Events,
    networks: "Mapping[str, Backbone] | None" = None,
) -> Iterator[Report | Lost]:
    """Run blocks and yield the result of each, in any order.

    A worker that dies costs its block another try and nothing else. A block that keeps killing
    workers is halved and its parts run one at a time; only a file that kills its worker with
    nothing else running is given up, as `Lost`.

    Args:
        networks: Networks that the workers are given, by name; they load the others.

    Raises:
        NoSuchWorker: No worker of the cluster offers what the work needs.
    """
    if runtime.serial:
        yield from _run_serially(job, blocks, events, networks or {})
        return
    need = GPU if any(pass_.execution.device == "cuda" for pass_ in job.passes) else FORWARD
    with _client(job, runtime, need, events) as client, _shared(client, networks or {}):
        suspects: list[Block] = []
        in_flight = AHEAD * _slots(client, need)
        yield from _run(client, job, blocks, need, events, in_flight, suspects)
        while suspects:
            block = suspects.pop(0)
            again: list[Block] = []
            yield from _run(client, job, [block], need, events, 1, again)
            if again and block.halves() == [block]:
                yield Lost(block)
            elif again:
                events.message(f"block {block.number} killed its worker; trying its halves alone")
                suspects += block.halves()


def _run_serially(
    job: Job, blocks: list[Block], events: Events, networks: "Mapping[str, Backbone]"
) -> Iterator[Report]:
    """Run blocks one after the other in this process."""
    try:
        with adopted(networks):
            for block in blocks:
                decoded = DecodedBlock(block)
                if block.files:
                    decoded = decode(job, block)
                    events.decoded(block)
                yield forward(job, decoded)
    finally:
        close_pools()


def local_workers(threads: int, workers: int) -> int:
    """Return the number of CPU workers of a local cluster.

    Args:
        threads: Threads of a forward on a CPU; 0 where forwards run on GPUs, and one worker with
            as many decoding children as there are cores feeds them.
        workers: The number requested; 0 for as many forwards as fit the cores.
    """
    return workers or (max(1, (os.cpu_count() or 1) // threads) if threads else 1)


def _run(
    client: Any,
    job: Job,
    blocks: list[Block],
    need: str,
    events: Events,
    in_flight: int,
    suspects: list[Block],
) -> Iterator[Report]:
    from distributed import KilledWorker

    waiting = iter(blocks)
    decodes: dict[Any, Block] = {}
    forwards: dict[Any, Block] = {}

    def submit() -> None:
        block = next(waiting, None)
        if block is None:
            return
        if block.cached:
            decoded = DecodedBlock(block)
        else:
            decoded = client.submit(decode, job, block, pure=False, priority=-block.number)
            decodes[decoded] = block
        report = client.submit(
            forward, job, decoded, pure=False, resources={need: 1}, priority=-block.number
        )
        forwards[report] = block

    for _ in range(in_flight):
        submit()
    while forwards:
        for future in _finished(client, [*decodes, *forwards], need):
            if future in decodes:
                block = decodes.pop(future)
                if future.status == "finished":
                    events.decoded(block)
                continue
            block = forwards.pop(future)
            submit()
            error = future.exception()
            if error is None:
                yield future.result()
            elif isinstance(error, KilledWorker):
                suspects.append(block)
            else:
                raise error


def _finished(client: Any, futures: list[Any], need: str) -> list[Any]:
    """Wait until some of `futures` have ended, and return those.

    Raises:
        NoSuchWorker: The scheduler, or every worker that could do the work, is gone for minutes.
    """
    from distributed import CancelledError, wait

    gone_seconds = 0.0
    while True:
        try:
            done = wait(futures, timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            gone_seconds = 0.0 if _offering(client, need) else gone_seconds + LOOK_SECONDS
            if gone_seconds and client.cluster is not None:
                # A worker killed while its nanny was still starting it is not started again by it.
                client.cluster.scale(len(client.cluster.worker_spec))
            if gone_seconds >= GONE_SECONDS:
                raise NoSuchWorker(
                    f"the cluster has had no worker for {gone_seconds:.0f} seconds. What was "
                    "finished is kept: start workers and run the same command again"
                ) from None
            continue
        except CancelledError as error:
            raise NoSuchWorker(
                "the connection to the scheduler was lost. What was finished is kept: run the "
                "same command again"
            ) from error
        # A decode's future is dropped only here: its forward still refers to the frames.
        return sorted(done, key=futures.index)


def _offering(client: Any, need: str) -> int:
    """Return the number of workers that offer the resource of a forward."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(need in worker["resources"] for worker in workers)


@contextlib.contextmanager
def _client(job: Job, runtime: Runtime, need: str, events: Events) -> Iterator[Any]:
    threads = max((pass_.execution.threads for pass_ in job.passes), default=1)
    workers, kinds = _workers(threads, runtime, need), ("backbones", "reductions")
    with connected(runtime.scheduler, workers, threads, kinds) as client:
        _require(client, need, runtime.scheduler)
        events.message(f"Dask dashboard: {client.dashboard_link}")
        yield client
        if not runtime.scheduler:
            # A worker would wait for its decoding children, which wait for more files.
            client.run(close_pools)


def _workers(threads: int, runtime: Runtime, need: str) -> list[dict[str, Any]]:
    """Return the workers of a local cluster: those of the CPUs, and one for each GPU."""
    cpu: dict[str, Any] = {} if need == GPU else {"resources": {FORWARD: 1}}
    workers = [cpu] * local_workers(threads, runtime.workers)
    if need == GPU:
        import torch

        workers += [
            {"resources": {GPU: 1}, "env": {"CUDA_VISIBLE_DEVICES": str(i)}}
            for i in range(torch.cuda.device_count())
        ]
    return [{"nthreads": 2, **worker} for worker in workers]


def _packed(networks: "Mapping[str, Backbone]") -> bytes:
    """Pickle networks with the classes that a worker cannot import: a script's, a notebook's."""
    import cloudpickle

    from varve.pipeline.backbones import origin

    stages = [stage for backbone in networks.values() for stage in backbone.stages]
    parts = {type(part).__module__ for stage in stages for part in stage.module.modules()}
    importable = ("varve", "__main__")
    modules = [
        sys.modules[name]
        for name in parts
        if name in sys.modules
        and name.partition(".")[0] not in importable
        and origin(name) == "user"
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(dict(networks)))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@contextlib.contextmanager
def _shared(client: Any, networks: "Mapping[str, Backbone]") -> Iterator[None]:
    """Give workers these networks inside the block, also those that start later."""
    import cloudpickle
    from distributed import WorkerPlugin

    payload, names = _packed(networks), list(networks)

    class Networks(WorkerPlugin):  # type: ignore[misc]
        def setup(self, worker: Any) -> None:
            for name, backbone in cloudpickle.loads(payload).items():
                adopt(name, backbone)

        def teardown(self, worker: Any) -> None:
            for name in names:
                dismiss(name)

    if not names:
        yield
        return
    name = "varve-networks-" + "-".join(names)
    client.register_plugin(Networks(), name=name)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            client.unregister_worker_plugin(name)


def _require(client: Any, need: str, address: str) -> None:
    """Refuse a cluster without the resource, or whose workers may not start processes."""
    try:
        client.wait_for_workers(1, timeout=LOOK_SECONDS)
    except TimeoutError:
        raise NoSuchWorker(
            f"{address or 'the cluster'} has had no worker for {LOOK_SECONDS:.0f} seconds"
        ) from None
    if not _offering(client, need):
        workers = client.scheduler_info(n_workers=-1)["workers"]
        raise NoSuchWorker(
            f"none of the {len(workers)} workers of {address or 'the cluster'} offers {need}. "
            f"Start workers with `DASK_DISTRIBUTED__WORKER__DAEMON=False dask worker {address} "
            f'--nthreads 2 --resources "{need}=1"`'
        )
    daemons = [name for name, daemon in client.run(_is_daemon).items() if daemon]
    if daemons:
        raise NoSuchWorker(
            f"workers {', '.join(daemons)} are daemonic and may not start the processes that "
            "decode. Start them with DASK_DISTRIBUTED__WORKER__DAEMON=False in their environment"
        )


def _is_daemon() -> bool:
    import multiprocessing

    return multiprocessing.current_process().daemon


def _slots(client: Any, need: str) -> int:
    return max(1, _offering(client, need))
