"""Plots of trained heads: heat maps over the frames of a clip, channel weights by class.

The numbers are those of `varve.pipeline.analysis.interpret`; `varve.pipeline.analysis.plots` says
what all plots share.

Shapes: T frames, S pixels, H, W rows and columns of the new map, U, V of the teacher's, K classes,
C channels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from varve.pipeline.analysis.plots import HEAT, NAMED_CLASSES, blank, rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNED = "PuOr_r"  # orange above 0, purple below: the colour-blind tell them apart
OPACITY = 0.7
BLACK = -350  # below 0: greys become light, so that the heat keeps the colours of its bar
TILE = 1.15  # inches


def tubes(
    pictures_TSS3: np.ndarray,
    maps: Mapping[str, np.ndarray],
    label: str = "share of the highest",
    from_lowest: bool = False,
) -> "Figure":
    """Draw numbers as heat over the frames: a row for each stage or level, below the frames.

    Each row is scaled by its own highest number; a row of zeros is labelled as such.

    Args:
        pictures_TSS3: uint8, the frames of the clip.
        maps: [T, H, W] each, such as those of `interpret.saliency` and `interpret.agreement`.
        label: Label of the colour bar.
        from_lowest: Whether the colours of a row start at its lowest number instead of 0: for
            numbers that are all far from 0.

    Raises:
        ValueError: There is no map, or one is of another number of frames.
    """
    _check_frames(pictures_TSS3, maps)
    scaled = {}
    for name, map_THW in maps.items():
        least = float(map_THW.min()) if from_lowest else 0.0
        most = float(map_THW.max())
        scaled[name if most else f"{name}\n(all 0)"] = (map_THW - least) / (most - least or 1)
    return _rows(pictures_TSS3, scaled, 0, 1, HEAT, label)


def gates(
    pictures_TSS3: np.ndarray, maps: Mapping[str, np.ndarray], limit: float | None = None
) -> "Figure":
    """Draw HF-Net's gates over the frames: differences below 0, averages above.

    Args:
        pictures_TSS3: uint8, the frames of the clip.
        maps: [T, H, W] in [-1, 1] each, of `interpret.gates`; a row for each gated stage.
        limit: Number at which the colours end; by default the largest absolute number.

    Raises:
        ValueError: There is no map, or one is of another number of frames.
    """
    _check_frames(pictures_TSS3, maps)
    # Where all gates are 0, any limit shows it.
    limit = limit or max(float(np.abs(map_THW).max()) for map_THW in maps.values()) or 1.0
    label = "gate: difference < 0 < average"
    return _rows(pictures_TSS3, maps, -limit, limit, SIGNED, label)


def correlations(
    new_SS3: np.ndarray,
    old_SS3: np.ndarray,
    levels: Mapping[str, np.ndarray],
    frame: int,
    positions: Sequence[tuple[float, float]] = ((0.5, 0.5),),
) -> "Figure":
    """Draw how the teacher's feature map correlates with one position of the new map.

    A row for each position, a column for each level. The first column is the frame of the new
    network, with the cell of the position framed in the grid of each level. The others are the
    frame of the teacher under the mean hypercorrelation of the level's blocks. The colours of a
    level go from its lowest to its highest number drawn here.

    Args:
        new_SS3, old_SS3: uint8, the frames of the new network and of the teacher; the same frame
            where a clip is compared with itself.
        levels: [T, L, H, W, U, V] each, of `interpret.hypercorrelations`.
        frame: Number of the frame, from 0.
        positions: Shares of the picture's height and width, from the top left.

    Raises:
        ValueError: There is no level, no such frame, or a position outside the picture.
    """
    if not levels or not positions or not all(0 <= x < 1 for yx in positions for x in yx):
        raise ValueError(
            f"{len(levels)} levels at {positions=}: give at least one of each, positions from 0 to "
            "less than 1"
        )
    if any(not 0 <= frame < len(c) for c in levels.values()):
        raise ValueError(f"{frame=} of {len(next(iter(levels.values())))} frames, from 0")
    figure = blank(2.0 * TILE * (1 + len(levels)), 0.6 + 1.8 * TILE * len(positions))
    axes = figure.subplots(len(positions), 1 + len(levels), squeeze=False)
    for first in axes[:, 0]:
        first.imshow(new_SS3)
        _bare(first)
    axes[0, 0].set_title("position", fontsize="medium")
    for column, (level, c) in zip(axes.T[1:], levels.items(), strict=True):
        H, W = c.shape[2:4]
        cells = [(int(y * H), int(x * W)) for y, x in positions]
        maps = [c[frame, :, i, j].mean(axis=0) for i, j in cells]
        low, high = min(m.min() for m in maps), max(m.max() for m in maps)
        for tile, first, (i, j), map_UV in zip(column, axes[:, 0], cells, maps, strict=True):
            image = _heat(tile, old_SS3, map_UV, low, high, HEAT)
            size = len(new_SS3)
            rectangle(first, (j / W * size - 0.5, i / H * size - 0.5), size / W, size / H)
        column[0].set_title(level, fontsize="medium")
        figure.colorbar(image, ax=[*column], label="cosine", shrink=0.8,
                        location="bottom")  # fmt: skip
    return figure


def excitations(weights: Mapping[str, Any], classes: Sequence[str], most: int = 64) -> "Figure":
    """Draw the channel re-weighting by class, a panel for each stage.

    Args:
        weights: [K, C] from 0 to 1 by stage, `excitations` of a head of class_regularization.
        classes: Names of the K classes, in the order of `head.classes`.
        most: Number of channels drawn of each stage, by descending variance over the classes.

    Raises:
        ValueError: There is no stage, or one has another number of classes.
    """
    tables = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    if not tables or any(x.shape[0] != len(classes) for x in tables.values()):
        shapes = {name: list(x.shape) for name, x in tables.items()}
        raise ValueError(
            f"{len(classes)} classes for {shapes}: give a name for each row of a stage"
        )
    height = float(np.clip(0.9 + 0.17 * len(classes), 1.6, 5.0))
    figure = blank(7.0, 0.4 + height * len(tables))
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (name, x_KC) in zip(panels, tables.items(), strict=True):
        top = np.argsort(-x_KC.var(axis=0), kind="stable")[:most]
        image = axes.imshow(x_KC[:, top], cmap=HEAT, vmin=0, vmax=1, aspect="auto",
                            interpolation="nearest")  # fmt: skip
        axes.set_title(f"{name}: {len(top)} of {x_KC.shape[1]} channels", fontsize="medium")
        if len(classes) <= NAMED_CLASSES:
            axes.set_yticks(range(len(classes)), classes, fontsize="small")
        axes.set_xticks([])
    panels[-1].set_xlabel("channels, by their variance over the classes")
    figure.colorbar(image, ax=[*panels], label="excitation", shrink=0.8)
    return figure


def _check_frames(pictures_TSS3: np.ndarray, maps: Mapping[str, np.ndarray]) -> None:
    """Refuse maps of another number of frames than there are pictures."""
    frames, lengths = len(pictures_TSS3), {name: len(map_THW) for name, map_THW in maps.items()}
    if not maps or set(lengths.values()) != {frames}:
        raise ValueError(f"{frames} frames for maps of {lengths or 'nothing'}: give one for each")


def _rows(
    pictures_TSS3: np.ndarray, maps: Mapping[str, np.ndarray], low: float, high: float,
    colours: str, label: str,
) -> "Figure":  # fmt: skip
    """Draw the frames in the first row, and each map over the frames in a row of its own."""
    frames = len(pictures_TSS3)
    figure = blank(1.4 + TILE * frames, 0.3 + TILE * (1 + len(maps)))
    axes = figure.subplots(1 + len(maps), frames, squeeze=False)
    for number, (tile, picture) in enumerate(zip(axes[0], pictures_TSS3, strict=True)):
        tile.imshow(picture)
        tile.set_title(f"t = {number}", fontsize="small")
        _bare(tile)
    for row, (name, map_THW) in zip(axes[1:], maps.items(), strict=True):
        for tile, picture, map_HW in zip(row, pictures_TSS3, map_THW, strict=True):
            image = _heat(tile, picture, map_HW, low, high, colours)
        row[0].set_ylabel(name, fontsize="small")
    figure.colorbar(image, ax=[*axes.flat], shrink=0.8).set_label(label, fontsize="small")
    return figure


def _heat(
    axes: "Axes", picture_SS3: np.ndarray, map_HW: np.ndarray, low: float, high: float, colours: str
) -> Any:
    """Draw a map over a picture in grey."""
    size = len(picture_SS3)
    axes.imshow(picture_SS3 @ [0.299, 0.587, 0.114], cmap="gray", vmin=BLACK, vmax=255)
    _bare(axes)
    return axes.imshow(map_HW, cmap=colours, vmin=low, vmax=high, alpha=OPACITY,
                       interpolation="bilinear",
                       extent=(-0.5, size - 0.5, size - 0.5, -0.5))  # fmt: skip


def _bare(axes: "Axes") -> None:
    axes.set(xticks=[], yticks=[])
