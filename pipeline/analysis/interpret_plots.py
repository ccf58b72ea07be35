"""Pictures of what learned heads see: heat over a clip's frames, channels by class.

The numbers are those of `varve.pipeline.analysis.interpret`; see `varve.pipeline.analysis.plots`
for what all pictures share.

Shapes: T frames, S pixels, H, W places of the new map, U, V of the old, K classes, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from varve.pipeline.analysis.plots import HEAT, NAMED_CLASSES, blank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNED = "PuOr_r"  # orange above 0, purple below: the colour-blind tell them apart
OPACITY = 0.7
BLACK = -350  # below 0: the greys are light, so that the heat has the colours of its bar
TILE = 1.15  # inches


def tubes(
    pictures_TSS3: np.ndarray,
    maps: Mapping[str, np.ndarray],
    label: str = "share of the highest",
    from_lowest: bool = False,
) -> "Figure":
    """Numbers as heat over the frames: a row a stage or level, under the frames' own.

    Each row is scaled by its own highest number; one of nothing but zeros says so.

    Args:
        pictures_TSS3: uint8, of the clip.
        maps: [T, H, W] each, such as `looking.saliency` and `looking.agreement` give.
        label: Of the colour bar.
        from_lowest: A row's colours begin at its lowest number in the place of 0: for numbers
            that are all far from it.

    Raises:
        ValueError: There is no map, or one is of another number of frames.
    """
    figure, axes = _rows(pictures_TSS3, maps)
    for row, (name, map_THW) in zip(axes[1:], maps.items(), strict=True):
        least = float(map_THW.min()) if from_lowest else 0.0
        most = float(map_THW.max())
        for tile, picture, map_HW in zip(row, pictures_TSS3, map_THW, strict=True):
            image = _heat(tile, picture, (map_HW - least) / (most - least or 1), 0, 1, HEAT)
        row[0].set_ylabel(name if most else f"{name}\n(all 0)", fontsize="small")
    figure.colorbar(image, ax=[*axes.flat], shrink=0.8).set_label(label, fontsize="small")
    return figure


def gates(
    pictures_TSS3: np.ndarray, maps: Mapping[str, np.ndarray], limit: float | None = None
) -> "Figure":
    """HF-Net's gates over the frames, a row a gated stage: difference below 0, average above.

    Args:
        pictures_TSS3: uint8, of the clip.
        maps: [T, H, W] in [-1, 1] each, of `looking.gates`.
        limit: Where the colours end; by default at the largest number of all, whatever its sign.

    Raises:
        ValueError: There is no map, or one is of another number of frames.
    """
    figure, axes = _rows(pictures_TSS3, maps)
    # At no gates at all any limit shows their zeros.
    limit = limit or max(float(np.abs(map_THW).max()) for map_THW in maps.values()) or 1.0
    for row, (name, map_THW) in zip(axes[1:], maps.items(), strict=True):
        for tile, picture, map_HW in zip(row, pictures_TSS3, map_THW, strict=True):
            image = _heat(tile, picture, map_HW, -limit, limit, SIGNED)
        row[0].set_ylabel(name, fontsize="small")
    bar = figure.colorbar(image, ax=[*axes.flat], shrink=0.8)
    bar.set_label("gate: difference < 0 < average", fontsize="small")
    return figure


def correlations(
    new_SS3: np.ndarray,
    old_SS3: np.ndarray,
    levels: Mapping[str, np.ndarray],
    frame: int,
    places: Sequence[tuple[float, float]] = ((0.5, 0.5),),
) -> "Figure":
    """Where the old network saw what the new one sees at a place: a row a place, a column a level.

    First stands the frame of the new network with the place, a framed cell for each level's grid;
    then, over the frame of the old one, the mean hypercorrelation of the level's blocks. Each
    level has colours from its lowest to its highest number drawn here.

    Args:
        new_SS3, old_SS3: uint8, the frames; the same one where a clip is compared with itself.
        levels: [T, L, H, W, U, V] each, of `looking.hypercorrelations`.
        frame: Which of the T.
        places: Shares of the picture's height and width, from the top left.

    Raises:
        ValueError: There is no level, frame or place of that number.
    """
    if not levels or not places or not all(0 <= x < 1 for place in places for x in place):
        raise ValueError(
            f"{len(levels)} levels at {places=}: give one of each, places from 0 to less than 1"
        )
    if any(not 0 <= frame < len(c) for c in levels.values()):
        raise ValueError(f"{frame=} of {len(next(iter(levels.values())))} frames, from 0")
    figure = blank(2.0 * TILE * (1 + len(levels)), 0.6 + 1.8 * TILE * len(places))
    axes = figure.subplots(len(places), 1 + len(levels), squeeze=False)
    for first in axes[:, 0]:
        first.imshow(new_SS3)
        _bare(first)
    axes[0, 0].set_title("place", fontsize="medium")
    for column, (level, c) in zip(axes.T[1:], levels.items(), strict=True):
        H, W = c.shape[2:4]
        cells = [(int(y * H), int(x * W)) for y, x in places]
        maps = [c[frame, :, i, j].mean(axis=0) for i, j in cells]
        low, high = min(m.min() for m in maps), max(m.max() for m in maps)
        for tile, first, (i, j), map_UV in zip(column, axes[:, 0], cells, maps, strict=True):
            image = _heat(tile, old_SS3, map_UV, low, high, HEAT)
            _mark(first, i / H, j / W, 1 / H, 1 / W, len(new_SS3))
        column[0].set_title(level, fontsize="medium")
        figure.colorbar(image, ax=[*column], label="cosine", shrink=0.8,
                        location="bottom")  # fmt: skip
    return figure


def excitations(found: Mapping[str, Any], classes: Sequence[str], most: int = 64) -> "Figure":
    """How much channels speak for classes, a panel a stage: the channels that differ most by class.

    Args:
        found: [K, C] from 0 to 1 by stage, `excitations` of a head of class_regularization.
        classes: Names of the K, in the order of `head.classes`.
        most: How many channels of each stage, by descending variance over the classes.

    Raises:
        ValueError: There is no stage, or one has another number of classes.
    """
    tables = {name: np.asarray(x, np.float64) for name, x in found.items()}
    if not tables or any(x.shape[0] != len(classes) for x in tables.values()):
        held = {name: list(x.shape) for name, x in tables.items()}
        raise ValueError(f"{len(classes)} classes for {held}: give a name for each row of a stage")
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
    panels[-1].set_xlabel("channels, by how much they differ between classes")
    figure.colorbar(image, ax=[*panels], label="excitation", shrink=0.8)
    return figure


def _rows(pictures_TSS3: np.ndarray, maps: Mapping[str, np.ndarray]) -> tuple["Figure", Any]:
    """A figure of the frames in its first row, with empty rows for the maps."""
    lengths = {name: len(map_THW) for name, map_THW in maps.items()}
    frames = len(pictures_TSS3)
    if not maps or set(lengths.values()) != {frames}:
        raise ValueError(f"{frames} frames for maps of {lengths or 'nothing'}: give one for each")
    figure = blank(1.4 + TILE * frames, 0.3 + TILE * (1 + len(maps)))
    axes = figure.subplots(1 + len(maps), frames, squeeze=False)
    for number, (tile, picture) in enumerate(zip(axes[0], pictures_TSS3, strict=True)):
        tile.imshow(picture)
        tile.set_title(f"t = {number}", fontsize="small")
    for tile in axes.flat:
        _bare(tile)
    return figure, axes


def _heat(
    axes: "Axes", picture_SS3: np.ndarray, map_HW: np.ndarray, low: float, high: float, colours: str
) -> Any:
    """A map over a picture in grey."""
    size = len(picture_SS3)
    axes.imshow(picture_SS3 @ [0.299, 0.587, 0.114], cmap="gray", vmin=BLACK, vmax=255)
    _bare(axes)
    return axes.imshow(map_HW, cmap=colours, vmin=low, vmax=high, alpha=OPACITY,
                       interpolation="bilinear",
                       extent=(-0.5, size - 0.5, size - 0.5, -0.5))  # fmt: skip


def _mark(axes: "Axes", y: float, x: float, height: float, width: float, size: int) -> None:
    """A cell framed so that it is seen on dark and on light."""
    from matplotlib.patches import Rectangle

    for colour, line in (("white", 3.0), ("black", 1.0)):
        corner = (x * size - 0.5, y * size - 0.5)
        axes.add_patch(Rectangle(corner, width * size, height * size, fill=False,
                                 edgecolor=colour, linewidth=line))  # fmt: skip


def _bare(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
