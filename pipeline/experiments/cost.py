"""Cost of a run: multiply-adds of a head, and peak memory of the process."""

import contextlib
import ctypes
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from varve.heads import Head
from varve.heads.parts.clips import Clips


def multiply_adds(head: Head, clips: Clips) -> int:
    """Count the multiply-adds of a head's scores for one clip.

    Matrix products and convolutions count, one for each multiplication with its addition. Searches
    in an index (FAISS) and elementwise operations do not. The result is the mean over up to eight
    clips, since a head may route some of them to more experts than others.
    """
    indices = torch.arange(min(8, len(clips)))
    with FlopCounterMode(display=False) as counter:
        for index in indices:
            head.scores(clips[index[None]])
    return int(counter.get_total_flops()) // (2 * len(indices))


@contextlib.contextmanager
def memory_peak() -> Iterator[Callable[[], int]]:
    """Measure the largest memory while the block runs: give a function that returns bytes.

    On the CPU it is the resident memory of the process, on a GPU what torch allocated there. Where
    the kernel does not let the mark be reset, it is the largest since the process started.
    """
    with contextlib.suppress(OSError, AttributeError):
        # glibc keeps what earlier runs have freed, and it would count here.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def peak() -> int:
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return int(torch.cuda.max_memory_allocated())
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    yield peak
