"""Measuring: what a run takes of the machine, and what the machine is slow at."""

import contextlib
import ctypes
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from heads import Head
from heads.parts.clips import Clips

MUCH = 5.0


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


def slower(precision: str) -> str:
    """Of a precision that this CPU has no instructions for: a sentence that says so, else "".

    A product of matrices is timed, a hundredth of a second where there are such instructions:
    torch computes in any precision everywhere, up to a hundred times slower than in float32.
    """
    if precision == "float32":
        return ""
    ratio = _seconds(precision) / _seconds("float32")
    if ratio < MUCH:
        return ""
    return (
        f"{precision} takes {ratio:.0f} times as long as float32 on this CPU, which has no "
        "instructions for it: float32 is quicker here"
    )


def _seconds(precision: str) -> float:
    """Of one product, the least of some: other work on the machine only adds to it."""
    x = torch.ones(128, 128, dtype=getattr(torch, precision))
    found = []
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        found.append(time.perf_counter() - began)
    return min(found)


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
