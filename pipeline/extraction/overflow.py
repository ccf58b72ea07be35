"""Overflow: a feature that the number format on disk cannot hold.

It is a property of one cell, not of the clip: the clip's other cells are kept. The row's `detail`
has a sentence for each such column, so that no build computes the cell again only to lose it.
"""

from varve.stores.columns import ColumnSpec

_MARK = "leaves the range of"


def sentence(spec: ColumnSpec) -> str:
    """What `detail` says of a cell of this column."""
    return (
        f"{spec.feature} of {spec.backbone} ({spec.short}) {_MARK} {spec.dtype}; "
        "keep it with --dtype float32 or bfloat16"
    )


def known(detail: str, short: str = "") -> bool:
    """Whether `detail` tells of an overflow: of the column of that short fingerprint, or of any."""
    return _MARK in detail and f"({short}" in detail


def joined(old: str, new: str) -> str:
    """Two details that tell of overflows as one, each sentence once."""
    lines = [*old.split("\n"), *new.split("\n")]
    return "\n".join(dict.fromkeys(line for line in lines if known(line)))
