"""Embeddings: the vectors of a run's clips, t-SNE of them, and the points that are drawn."""

import numpy as np
import pytest
import torch

from varve import run
from varve.heads.hf_net import HFNet
from varve.pipeline.analysis import embedding
from varve.pipeline.experiments import head_inputs
from varve.pipeline.experiments.routing import restored

QUICK = {"first_epochs": 2, "epochs": 1}


def groups(clips: int = 12, classes: int = 3) -> tuple[np.ndarray, list[str]]:
    """Clips around the corners of a cube, by class."""
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(classes, 8)
    x = np.repeat(centres, clips, axis=0) + rng.normal(size=(clips * classes, 8))
    return x.astype(np.float32), [f"class {n}" for n in range(classes) for _ in range(clips)]


def test_clips_that_are_near_stay_near():
    x_NW, labels = groups()
    points_N2 = embedding.tsne(x_NW)
    assert points_N2.shape == (36, 2)
    np.testing.assert_array_equal(points_N2, embedding.tsne(x_NW))
    distances_NN = np.linalg.norm(points_N2[:, None] - points_N2, axis=2)
    np.fill_diagonal(distances_NN, np.inf)
    nearest = distances_NN.argmin(axis=1)
    assert [labels[n] for n in nearest] == labels


@pytest.mark.parametrize(
    ("x_NW", "perplexity", "message"),
    [
        (np.zeros((3, 8)), None, "four or more"),
        (np.full((9, 8), np.nan), None, "finite"),
        (np.eye(9), 9.0, "below 9"),
    ],
)
def test_what_cannot_be_embedded_is_refused(x_NW, perplexity, message):
    with pytest.raises(ValueError, match=message):
        embedding.tsne(x_NW, perplexity)


def test_a_panel_has_the_points_of_every_class():
    x_NW, labels = groups()
    order = np.random.default_rng(1).permutation(len(labels))
    x_NW, labels = x_NW[order], [labels[n] for n in order]
    points_N2 = np.random.default_rng(2).random((len(labels), 2))
    figure = embedding.clips_by_class({"before": x_NW, "after": points_N2}, labels)
    embedded, drawn = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    for axes, expected in ((embedded, embedding.tsne(x_NW)), (drawn, points_N2)):
        assert [c.get_label() for c in axes.collections] == list(dict.fromkeys(labels))
        for collection in axes.collections:
            of_class = [label == collection.get_label() for label in labels]
            np.testing.assert_allclose(collection.get_offsets(), expected[of_class])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(dict.fromkeys(labels))
    with pytest.raises(ValueError, match="36 labels for clips of"):
        embedding.clips_by_class({"before": x_NW[:-1]}, labels)
    with pytest.raises(ValueError, match="36 labels"):
        embedding.clips_by_class({}, labels)


def test_representations_are_the_frozen_vectors_and_those_of_the_encoder(vector_store, tmp_path):
    options = QUICK | {"encoder": "expert", "expert": {"layers": 1, "ffn": 16}}
    done = run(vector_store, "lucir", "2+2x2", options=options, out=tmp_path)
    vectors, labels = embedding.representations(done, vector_store)
    table = vector_store.clips
    rows = table.index[table["split"] == "test"].to_numpy()
    assert labels == table.loc[rows, "label"].tolist()
    cells = vector_store.feature("net:tag", "pool").read(rows)
    np.testing.assert_allclose(vectors["before training"], cells.mean(axis=1), rtol=1e-6)
    head, _ = restored(done, vector_store)
    with torch.no_grad():
        expected = head._model.vectors({"vector": torch.from_numpy(cells)}).numpy()
    np.testing.assert_allclose(vectors["after training"], expected, rtol=1e-4, atol=1e-6)
    assert not head._model.encoder._forward_hooks

    some, labels = embedding.representations(done, vector_store, classes=["cat", "fox"])
    assert set(labels) == {"cat", "fox"}
    assert len(some["after training"]) == len(labels) == 6
    with pytest.raises(ValueError, match="no test clips of gnu"):
        embedding.representations(done, vector_store, classes=["gnu"])


def test_nearest_means_of_exemplars_have_an_encoder_too(vector_store, tmp_path):
    done = run(vector_store, "icarl", "3+3x1", options=QUICK, out=tmp_path)
    vectors, _ = embedding.representations(done.folder)
    assert vectors["after training"].shape == vectors["before training"].shape


def test_heads_without_an_encoder_are_refused(vector_store, tmp_path):
    done = run(vector_store, "nearest_mean", "3+3x1", out=tmp_path)
    with pytest.raises(ValueError, match="NearestMean has no encoder"):
        embedding.representations(done, vector_store)
    features = {"vector": vector_store.feature("net:tag", "pool")}
    clips = head_inputs.make_clips(features, np.arange(4), np.zeros(60, np.int64))
    with pytest.raises(ValueError, match="learned a task"):
        embedding.encoded(HFNet(), clips)
