"""Embeddings: clips by class in two dimensions, before and after a head was trained (t-SNE).

As in HCE's Fig. 4 and HF-Net's Fig. 3b and c. `representations` reads the vectors of a run's test
clips, `clips_by_class` draws them. Distances between clusters and their sizes mean nothing in such
a picture: it shows which clips are neighbours.

Shapes: N clips, W width of a clip's vector.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from varve.heads import Head
from varve.heads.parts.clips import Clips
from varve.pipeline.analysis.plots import blank, style_of
from varve.pipeline.experiments import head_inputs
from varve.pipeline.experiments.cost import modules_of
from varve.pipeline.experiments.routing import restored
from varve.pipeline.experiments.run_folder import Run
from varve.stores import FeatureStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENCODER = "encoder"
BATCH = 40
PERPLEXITY = 30.0
LEGEND_ROWS = 18


def representations(
    run: str | Path | Run,
    store: str | Path | FeatureStore | None = None,
    classes: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the vectors of a run's test clips before and after its training.

    Before, the vector of a clip is the mean over the frames of the last vector of the frozen
    network, as the store has it; afterwards it is what the head's encoder returns.

    Args:
        run: A finished run, or its folder, with its checkpoints.
        store: Where the run's store is now, if it was moved.
        classes: Class names; by default all that the run has learned.

    Returns:
        Vectors [N, W] float32 by "before training" and "after training", and the N class names.

    Raises:
        ValueError: The head has no encoder, there are no such clips, or the checkpoints are gone.
        SpecMismatch: The store is not that of the run, or has no vector of the frozen network.
    """
    done = run if isinstance(run, Run) else Run.read(run)
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(
        store or done.spec["store"]
    )  # fmt: skip
    predictions = done.predictions
    tested = predictions[predictions["stage"] == predictions["stage"].max()]
    tested = tested.drop_duplicates("row").sort_values("row")
    if classes:
        tested = tested[tested["label"].isin([*classes])]
    if tested.empty:
        raise ValueError(f"{done.folder} has no test clips of {', '.join(classes) or 'any class'}")
    rows, labels = tested["row"].to_numpy(np.int64, copy=True), tested["label"].tolist()
    head, features = restored(done, opened)
    sampled = done.spec.get("sampled")
    reads = opened.sampled(**sampled) if sampled else opened
    frozen = head_inputs.find_features(reads, done.spec["backbone"], ["vector"])["vector"]
    numbers = head_inputs.class_numbers(opened)
    after = encoded(head, head_inputs.make_clips(features, rows, numbers))
    before = frozen.read(rows).astype(np.float32).mean(axis=1)
    return {"before training": before, "after training": after}, labels


def encoded(head: Head, clips: Clips) -> np.ndarray:
    """Return the vectors of clips that a head's encoder computes, float32 [N, W].

    Raises:
        ValueError: The head declares no module `encoder` (`varve.heads.HasModules`), or has not
            learned anything.
    """
    encoders = [module for name, module in modules_of(head) if name == ENCODER]
    if not encoders:
        raise ValueError(
            f"{type(head).__name__} has no encoder that gives one vector a clip: draw another head "
            "after it has learned a task, such as hce, hf_net or lucir"
        )
    parts: list[np.ndarray] = []

    def keep(module: nn.Module, inputs: Any, vectors_BW: Tensor) -> None:
        parts.append(vectors_BW.detach().float().cpu().numpy())

    hook = encoders[0].register_forward_hook(keep)
    try:
        with torch.no_grad():
            for _, batch in clips.batches(BATCH):
                head.scores(batch)
    finally:
        hook.remove()
    return np.concatenate(parts)


def tsne(vectors_NW: np.ndarray, perplexity: float | None = None, seed: int = 0) -> np.ndarray:
    """Embed vectors in two dimensions by t-SNE (van der Maaten and Hinton, 2008), float64 [N, 2].

    It starts from the two first principal components. Equal arguments give equal points on one
    machine.

    Args:
        vectors_NW: Vectors of N clips.
        perplexity: About the number of neighbours of a clip; None for 30, or a third of the other
            clips where these are fewer.
        seed: Seed of the gradient descent.

    Raises:
        ValueError: There are fewer than four clips, the perplexity is not below their number, or a
            vector is not finite.
    """
    N = len(vectors_NW)
    if N < 4 or vectors_NW.ndim != 2 or not np.isfinite(vectors_NW).all():
        raise ValueError(f"{list(vectors_NW.shape)} vectors: give four or more, all of them finite")
    if perplexity is None:
        perplexity = min(PERPLEXITY, (N - 1) / 3)
    if not 0 < perplexity < N:
        raise ValueError(f"{perplexity=} of {N} clips: give a number above 0 and below {N}")
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn computes t-SNE, and is not installed: pip install -e '.[notebooks]'"
        ) from error
    embedding = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return np.asarray(embedding.fit_transform(vectors_NW.astype(np.float32)), np.float64)


def clips_by_class(
    vectors: Mapping[str, np.ndarray],
    labels: Sequence[str],
    perplexity: float | None = None,
    seed: int = 0,
) -> "Figure":
    """Draw clips by class in two dimensions, a panel for each representation.

    Args:
        vectors: [N, W] by title, such as those of `representations`. They are embedded by `tsne`;
            vectors of width 2 are points, and drawn as they are.
        labels: Class names of the N clips.
        perplexity: Option of `tsne`, as is `seed`.

    Raises:
        ValueError: There is no representation, or one is of another number of clips.
    """
    lengths = {title: len(x) for title, x in vectors.items()}
    if not vectors or set(lengths.values()) != {len(labels)}:
        raise ValueError(f"{len(labels)} labels for clips of {lengths}: give a label for each")
    names, classes = np.array(labels), list(dict.fromkeys(labels))
    columns = -(-len(classes) // LEGEND_ROWS)
    figure = blank(3.6 * len(vectors) + 1.7 * columns, 3.8)
    panels = figure.subplots(1, len(vectors), squeeze=False)[0]
    for axes, (title, x) in zip(panels, vectors.items(), strict=True):
        points_N2 = x if x.shape[1] == 2 else tsne(x, perplexity, seed)
        for number, name in enumerate(classes):
            axes.scatter(*points_N2[names == name].T, s=18, alpha=0.8, label=name,
                         **style_of(number))  # fmt: skip
        axes.set_title(title, fontsize="medium")
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper",
                  fontsize="small", ncols=columns)  # fmt: skip
    return figure
