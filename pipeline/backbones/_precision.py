"""Precisions that a CPU has no instructions for, found by timing one matrix product."""

import time

import torch

MUCH = 5.0


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
