"""Precisions that a CPU has no instructions for, detected by timing one matrix product."""

import timeit

import torch

SLOW_RATIO = 5.0


def precision_warning(precision: str) -> str:
    """Return a warning if this CPU has no instructions for a precision, else "".

    torch computes in any precision on any CPU, up to a hundred times slower than in float32. One
    matrix product is timed, which takes a hundredth of a second where there are instructions.
    """
    if precision == "float32":
        return ""
    ratio = _seconds(precision) / _seconds("float32")
    if ratio < SLOW_RATIO:
        return ""
    return (
        f"{precision} takes {ratio:.0f} times as long as float32 on this CPU, which has no "
        "instructions for it: float32 is quicker here"
    )


def _seconds(precision: str) -> float:
    """Return the least time of five products: other processes can only add to it."""
    x = torch.ones(128, 128, dtype=getattr(torch, precision))
    return min(timeit.repeat(lambda: x @ x, number=1, repeat=5))
