"""Frames in the first axis as clips of T, and moving them in time."""

import torch
from torch import Tensor


def frames_of(graft: object, inner: object, frames: int) -> int:
    """`frames`, checked against those of an inner that is temporal itself.

    Raises:
        ValueError: Not a count, or another than the inner's.
    """
    name, own = type(graft).__name__, getattr(inner, "frames", 0)
    if frames < 1:
        raise ValueError(f"{name} with {frames=}: give T, the frames of a clip, at least 1")
    if own not in (0, frames):
        raise ValueError(
            f"{name} with {frames=} around a {type(inner).__name__} of {own} frames: grafts on one "
            "stage see the same clips, so give both the same number"
        )
    return frames


def by_clip(x: Tensor, frames: int) -> Tensor:
    """[B * T, ...] as [B, T, ...], a view.

    Raises:
        ValueError: The first axis is no whole number of clips.
    """
    if len(x) % frames:
        raise ValueError(
            f"{len(x)} frames are no whole number of clips of {frames}: a temporal graft needs all "
            f"T frames of every clip, clip by clip (found {list(x.shape)}, frames={frames})"
        )
    return x.view(len(x) // frames, frames, *x.shape[1:])


def shift_left(x: Tensor, frames: int) -> Tensor:
    """Frame t gets frame t + 1 of its clip, the last one zeros. The memory format is kept."""
    out = torch.zeros_like(x)
    by_clip(out, frames)[:, :-1] = by_clip(x, frames)[:, 1:]
    return out


def shift_right(x: Tensor, frames: int) -> Tensor:
    """Frame t gets frame t - 1 of its clip, the first one zeros. The memory format is kept."""
    out = torch.zeros_like(x)
    by_clip(out, frames)[:, 1:] = by_clip(x, frames)[:, :-1]
    return out
