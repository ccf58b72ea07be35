"""Plots of runs: accuracy over the tasks, forgetting, routing, residuals in their plane.

Each call takes numbers and returns a matplotlib Figure, which Jupyter shows and `savefig` writes;
no global state is changed. Fonts and background are those of the user's matplotlib style, by
default dark on white. Colours are of Okabe and Ito's palette and of cividis, which colour-blind
people can distinguish; markers differ, too.

Shapes: N clips, D width, C classes, K experts.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from varve.pipeline.experiments.metrics import Matrix
from varve.pipeline.experiments.results import requested
from varve.pipeline.experiments.run_folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from varve.heads import Routing

# Without its yellow and black, which are invisible on white and on dark pages.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^vPX"
GREY = "#999999"
HEAT = "cividis"
NAMED_CLASSES = 40


def groups(runs: pd.DataFrame, by: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """Group finished runs by configuration, the seeds of one together under its name.

    Args:
        runs: Table of `results.read`, or `DataFrame(table.attrs["runs"])` of an ablation.
        by: Columns in which configurations differ: by default those in which the runs differ, but
            for seeds.

    Raises:
        ValueError: No run has finished.
    """
    done = runs[runs["finished"].astype(bool)]
    if done.empty:
        raise ValueError(f"none of {len(runs)} runs has finished, so there is nothing to draw")
    if by is None:
        differ = [x for x in requested(done) if done[x].nunique(dropna=False) > 1]
        # Fingerprints mostly repeat the options.
        by = [x for x in differ if not x.startswith("features.")] or differ or ["head"]
    configurations: dict[str, list[Run]] = {}
    for record in done.to_dict("records"):
        name = ", ".join(_description(column, record[column]) for column in by)
        configurations.setdefault(name, []).append(Run.read(record["run"]))
    return configurations


def accuracy(runs: Mapping[str, Sequence[Run]], classifier: str = "cnn") -> "Figure":
    """Draw the accuracy over all classes learned so far, after each task.

    A line is the mean over the runs of a name, and its band one standard deviation (n - 1 in the
    denominator) to either side; a single run has no band.

    Args:
        runs: Runs by name, such as those of `groups`; one for each seed.
        classifier: "cnn" or "nme".

    Raises:
        ValueError: Runs of one name have tasks of other sizes, or a run lacks the classifier.
    """
    figure, axes = _figure(6.4, 3.8 + 0.25 * len(runs))
    ticks: set[int] = set()
    for number, (name, alike) in enumerate(runs.items()):
        sizes = {tuple(len(task) for task in run.spec["tasks"]) for run in alike}
        matrices = [run.matrix if classifier == "cnn" else run.nme for run in alike]
        if len(sizes) != 1 or classifier not in ("cnn", "nme") or None in matrices:
            raise ValueError(
                f"{name}: {len(alike)} runs with tasks of {sorted(sizes)} classes, of which "
                f"{sum(m is not None for m in matrices)} have {classifier!r}: draw runs of one "
                "scenario, by a classifier that all of them have"
            )
        classes = np.cumsum(sizes.pop())
        stages = range(len(classes))
        shares = np.array(
            [[m.after(i).metric("final") for i in stages] for m in matrices if m is not None]
        )
        means = 100 * shares.mean(axis=0)
        style = style_of(number)
        label = textwrap.fill(f"{name} (n = {len(alike)})", 75)
        axes.plot(classes, means, label=label, markersize=5, **style)
        if len(alike) > 1:
            deviations = 100 * shares.std(axis=0, ddof=1)
            axes.fill_between(classes, means - deviations, means + deviations, linewidth=0.8,
                              facecolor=(style["color"], 0.12),
                              edgecolor=(style["color"], 0.5))  # fmt: skip
        ticks.update(classes.tolist())
    axes.set(xlabel="classes learned", ylabel="accuracy on all of them (%)")
    axes.set_xticks(_thinned(sorted(ticks)))
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center")
    return figure


def forgetting(matrix: Matrix) -> "Figure":
    """Draw the accuracy matrix: a row is one model on all tasks, a column shows forgetting."""
    tasks = len(matrix.clips)
    side = min(1.6 + 0.6 * tasks, 10.0)
    figure, axes = _figure(side + 1.0, side)
    image = axes.imshow(100 * matrix.accuracy, cmap=HEAT, vmin=0, vmax=100)
    for i, j in np.argwhere(np.tri(tasks)).tolist():
        percent = 100 * matrix.accuracy[i, j]
        # cividis is dark below its middle.
        colour = "white" if percent < 50 else "black"
        axes.text(j, i, f"{percent:.0f}", ha="center", va="center", color=colour,
                  fontsize=min(10, 120 / tasks))  # fmt: skip
    ticks = _thinned(range(tasks))
    axes.set(xlabel="tested on task", ylabel="after learning task", xticks=ticks, yticks=ticks)
    figure.colorbar(image, label="accuracy (%)", shrink=0.8)
    return figure


def routing(routed: "Routing", labels: Sequence[str], tasks: Sequence[Sequence[str]]) -> "Figure":
    """Draw the weight of each expert for each clip; clips in the order of arrival of classes.

    Frames mark the experts of the clips' own tasks: there the weights should be highest, and the
    title has the share of clips for which they are. An expert that was not evaluated on a clip is
    blank. Colours span the middle 96 % of the weights.

    Args:
        routed: Experts and weights of N clips.
        labels: Class names of the N clips.
        tasks: Class names of each task, one expert each; `spec["tasks"]` of a run.

    Raises:
        ValueError: The numbers do not fit, or a label is of no task.
    """
    task_of = {label: number for number, task in enumerate(tasks) for label in task}
    experts_NS, weights_NS = routed.experts.cpu().numpy(), routed.weights.cpu().numpy()
    unknown = sorted(set(labels) - set(task_of))
    if len(labels) != len(weights_NS) or unknown or experts_NS.max() >= len(tasks):
        raise ValueError(
            f"{len(labels)} labels for {len(weights_NS)} clips of {experts_NS.max() + 1} experts "
            f"and {len(tasks)} tasks; of no task: {', '.join(unknown[:5]) or 'none'}"
        )
    weights_NK = np.full((len(labels), len(tasks)), np.nan)
    np.put_along_axis(weights_NK, experts_NS, weights_NS, axis=1)
    arrival = list(task_of)
    class_N = np.array([arrival.index(label) for label in labels])
    own_N = np.array([task_of[label] for label in labels])
    counts_C = np.bincount(class_N, minlength=len(arrival))
    present = [label for label, count in zip(arrival, counts_C, strict=True) if count]

    height = float(np.clip(1.5 + 0.25 * len(present), 3.0, 9.0))
    figure, axes = _figure(2.8 + 0.7 * min(len(tasks), 12), height)
    # A few clips far from every anchor would leave all others one colour.
    low, high = np.nanpercentile(weights_NK, [2, 98])
    image = axes.imshow(weights_NK[np.argsort(class_N, kind="stable")], cmap=HEAT, vmin=low,
                        vmax=high, aspect="auto", interpolation="nearest")  # fmt: skip
    counts_K = np.bincount(own_N, minlength=len(tasks))
    ends_K = np.cumsum(counts_K)
    for task, (count, end) in enumerate(zip(counts_K.tolist(), ends_K.tolist(), strict=True)):
        rectangle(axes, (task - 0.5, end - count - 0.5), 1, count)
        if end < len(labels):
            axes.axhline(end - 0.5, color="white", linewidth=0.8)
    middles_C = np.cumsum(counts_C) - counts_C / 2 - 0.5
    if len(present) <= NAMED_CLASSES:
        axes.set_yticks(middles_C[counts_C > 0], present)
    axes.set(xlabel="expert of task", ylabel="clips, by class", xticks=_thinned(range(len(tasks))))
    figure.colorbar(image, label="weight", extend="both")
    share = (experts_NS[np.arange(len(labels)), weights_NS.argmax(axis=1)] == own_N).mean()
    axes.set_title(f"own expert weighs most: {share:.0%} of the clips", fontsize="medium")
    return figure


def residuals(
    residuals_ND: Any, labels: Sequence[str], anchors_CD: Any, classes: Sequence[str]
) -> "Figure":
    """Draw the residuals of an expert and its anchors, in the plane of largest variance.

    The plane is that of the first two principal components of the clips. Anchors are larger marks;
    clips of classes without an anchor are grey.

    Args:
        residuals_ND: Residuals of one expert, array or tensor: `StPR.residuals(batch, [k])[:, 0]`.
        labels: Class names of the N clips.
        anchors_CD: Anchors of the expert: `StPR.pool.anchors(k)`.
        classes: Class names of the anchors.

    Raises:
        ValueError: The numbers do not fit, or are too few to span a plane.
    """
    x_ND, anchors_CD = _float64(residuals_ND), _float64(anchors_CD)
    if x_ND.ndim != 2 or len(x_ND) != len(labels) or anchors_CD.shape != (
        len(classes), x_ND.shape[1],
    ):  # fmt: skip
        raise ValueError(
            f"residuals {list(x_ND.shape)} of {len(labels)} labelled clips, anchors "
            f"{list(anchors_CD.shape)} of {len(classes)} classes: give a vector for each"
        )
    mean_D, axes_2D, shares = plane(x_ND)
    clips_N2, anchors_C2 = (x_ND - mean_D) @ axes_2D.T, (anchors_CD - mean_D) @ axes_2D.T
    names = np.array(labels)
    figure, axes = _figure(6.4, 4.4)
    outline = axes.xaxis.label.get_color()  # of whatever style, not the background's
    others = ~np.isin(names, list(classes))
    if others.any():
        x_N, y_N = clips_N2[others].T
        axes.scatter(x_N, y_N, s=12, color=GREY, marker=".", label="other classes")
    for number, name in enumerate(classes):
        style = style_of(number)
        x_N, y_N = clips_N2[names == name].T
        axes.scatter(x_N, y_N, s=22, alpha=0.8, label=name, **style)
        x, y = anchors_C2[number]
        axes.scatter([x], [y], s=170, edgecolors=outline, linewidths=1.5, zorder=3,
                     label=f"_anchor of {name}", **style)  # fmt: skip
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%} of the variance)")
    axes.set_aspect("equal", adjustable="datalim")
    columns = 1 + len(classes) // 18
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", ncols=columns,
                title="large: anchor")  # fmt: skip
    return figure


def plane(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the first two principal components of some vectors, float64.

    Returns:
        mean_D: Mean of the vectors.
        axes_2D: Unit vectors; the largest entry of each is positive, so that equal vectors give
            equal plots.
        shares: [2], shares of the variance.

    Raises:
        ValueError: They are too few or too narrow for a plane, all the same, or not finite.
    """
    mean_D = x_ND.mean(axis=0)
    centred_ND = x_ND - mean_D
    if min(x_ND.shape) < 2 or not np.isfinite(x_ND).all() or not centred_ND.any():
        raise ValueError(
            f"{list(x_ND.shape)} numbers span no plane: give two or more vectors that differ, all "
            "of them finite"
        )
    _, sizes, axes_DD = np.linalg.svd(centred_ND, full_matrices=False)
    largest = np.abs(axes_DD[:2]).argmax(axis=1)
    axes_2D = axes_DD[:2] * np.sign(axes_DD[[0, 1], largest])[:, None]
    return mean_D, axes_2D, sizes[:2] ** 2 / (sizes**2).sum()


def blank(width: float, height: float) -> "Figure":
    """Make a figure without axes; width and height in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib draws the plots, and is not installed: pip install -e '.[notebooks]'"
        ) from error

    class Picture(Figure):
        """A figure that Jupyter shows without pyplot, which would keep it in memory."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Picture(figsize=(width, height), dpi=110, layout="constrained")


def rectangle(axes: "Axes", corner: tuple[float, float], width: float, height: float) -> None:
    """Draw a rectangle that is visible on dark and on light."""
    from matplotlib.patches import Rectangle

    for colour, line in (("white", 3.0), ("black", 1.0)):
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour,
                                 linewidth=line))  # fmt: skip


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure = blank(width, height)
    return figure, figure.add_subplot()


def style_of(number: int) -> dict[str, Any]:
    """Return one of 42 different styles."""
    return {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}


def _description(column: str, value: Any) -> str:
    """Describe an option and its value, such as `position learned` and `no position`.

    >>> _description("option.position", None), _description("head", "stpr")
    ('no position', 'stpr')
    """
    name = column.removeprefix("option.")
    if pd.isna(value):
        return f"no {name}"
    return str(value) if name in ("head", "scenario", "backbone") else f"{name} {value}"


def _thinned(values: Sequence[int], most: int = 16) -> list[int]:
    """Return at most `most` of many values, evenly spaced, for ticks.

    >>> _thinned(range(40))
    [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39]
    """
    return list(values)[:: -(-len(values) // most)]


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x, np.float64)
