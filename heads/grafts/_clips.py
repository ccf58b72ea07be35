"""Operations on frames in the first axis as clips of T frames."""

import torch
from torch import Tensor, nn


def frames_of(graft: object, inner: object, frames: int) -> int:
    """Return `frames`, checked against those of an inner module that is temporal itself.

    Raises:
        ValueError: It is below 1, or differs from the inner module's.
    """
    name, inner_frames = type(graft).__name__, getattr(inner, "frames", 0)
    if frames < 1:
        raise ValueError(f"{name} with {frames=}: give T, the frames of a clip, at least 1")
    if inner_frames not in (0, frames):
        raise ValueError(
            f"{name} with {frames=} around a {type(inner).__name__} of {inner_frames} frames: "
            "grafts on one stage see the same clips, so give both the same number"
        )
    return frames


def given_steps(inner: nn.Module, steps: int) -> int:
    """Return the number of time steps of a clip that a stage is given, of which it makes `steps`.

    They differ where a stage of a 3D network merges time steps; its module has `mixes_time`.
    """
    for part in inner.modules():
        if getattr(part, "mixes_time", False) and (frames := getattr(part, "frames", 0)):
            return int(frames)
    return steps


def refuse_video_stage(graft: object, inner: nn.Module) -> None:
    """Refuse a stage of a 3D network, whose modules declare `mixes_time`.

    Raises:
        ValueError: A part of the stage mixes the time steps of a clip by itself.
    """
    if any(getattr(part, "mixes_time", False) for part in inner.modules()):
        raise ValueError(
            f"{type(graft).__name__} on a block of a 3D network, which mixes the time steps of a "
            "clip by itself: it is for networks that compute each frame alone, such as resnet18. "
            "Train the block without it"
        )


def by_clip(x: Tensor, frames: int) -> Tensor:
    """Return a view [B, T, ...] of [B * T, ...].

    Raises:
        ValueError: The first axis is not a whole number of clips.
    """
    if len(x) % frames:
        raise ValueError(
            f"{len(x)} frames are no whole number of clips of {frames}: a temporal graft needs all "
            f"T frames of every clip, clip by clip (found {list(x.shape)}, frames={frames})"
        )
    return x.view(len(x) // frames, frames, *x.shape[1:])


def shift_left(x: Tensor, frames: int) -> Tensor:
    """Return frame t + 1 of the clip for frame t, and zeros for the last, in the memory format."""
    out = torch.zeros_like(x)
    by_clip(out, frames)[:, :-1] = by_clip(x, frames)[:, 1:]
    return out


def shift_right(x: Tensor, frames: int) -> Tensor:
    """Return frame t - 1 of the clip for frame t, and zeros for the first, in the memory format."""
    out = torch.zeros_like(x)
    by_clip(out, frames)[:, 1:] = by_clip(x, frames)[:, :-1]
    return out
