"""Cost of a run: multiply-adds of a head and peak memory of the process."""

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
    """Of the head's scores for a clip: matrix products and convolutions, a multiply-add as one.

    A mean over a few clips, since some may be asked more than others. What is looked up elsewhere
    (FAISS) and what is counted by element are left out.
    """
    places = torch.arange(min(8, len(clips)))
    with FlopCounterMode(display=False) as counter:
        for place in places:
            head.scores(clips[place[None]])
    return int(counter.get_total_flops()) // (2 * len(places))


@contextlib.contextmanager
def memory_peak() -> Iterator[Callable[[], int]]:
    """The process's largest resident memory while the block runs, in bytes; on a GPU its own.

    Where the kernel does not let the mark be reset, since the process began.
    """
    with contextlib.suppress(OSError, AttributeError):
        # What earlier runs have freed goes back, or it would be counted here: glibc keeps it.
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
