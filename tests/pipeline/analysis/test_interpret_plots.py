"""Plots of trained heads draw the numbers of the arguments, over the frames of the arguments."""

import numpy as np
import pytest
import torch

from varve.pipeline.analysis import interpret_plots

T, S = 3, 28
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (T, S, S, 3), np.uint8)


def maps(low=0.0) -> dict[str, np.ndarray]:
    return {"coarse": RNG.uniform(low, 2, (T, 2, 2)), "fine": RNG.uniform(low, 5, (T, 4, 4))}


def test_tubes_are_a_row_of_frames_and_a_row_a_stage_with_separate_scales():
    heat_maps = maps()
    figure = interpret_plots.tubes(PICTURES, heat_maps)
    assert len(figure.axes) == T * 3 + 1
    tiles = np.array(figure.axes[: T * 3]).reshape(3, T)
    for t in range(T):
        np.testing.assert_array_equal(tiles[0, t].images[0].get_array(), PICTURES[t])
        for row, map_THW in zip(tiles[1:], heat_maps.values(), strict=True):
            heat = row[t].images[1]
            np.testing.assert_allclose(heat.get_array(), map_THW[t] / map_THW.max())
            assert heat.get_clim() == (0, 1)
            assert tuple(heat.get_extent()) == (-0.5, S - 0.5, S - 0.5, -0.5)
    assert [row[0].get_ylabel() for row in tiles] == ["", "coarse", "fine"]


def test_a_stage_without_heat_is_labelled():
    figure = interpret_plots.tubes(PICTURES, {"last": np.zeros((T, 2, 2))})
    assert figure.axes[T].get_ylabel() == "last\n(all 0)"
    assert figure._repr_png_()


def test_gates_have_one_scale_that_is_even_about_zero():
    gate_maps = maps(-1.0)
    gate_maps["fine"][0, 0, 0] = -7
    figure = interpret_plots.gates(PICTURES, gate_maps)
    assert len(figure.axes) == T * 3 + 1
    drawn = [axes.images[1].get_array() for axes in figure.axes[T : T * 3]]
    for heat, map_HW in zip(drawn, [*gate_maps["coarse"], *gate_maps["fine"]], strict=True):
        np.testing.assert_array_equal(heat, map_HW)
    assert {axes.images[1].get_clim() for axes in figure.axes[T : T * 3]} == {(-7, 7)}
    zeros = {"a": np.zeros((T, 2, 2))}
    assert interpret_plots.gates(PICTURES, zeros).axes[T].images[1].get_clim() == (-1, 1)
    assert interpret_plots.gates(PICTURES, zeros, 0.5).axes[T].images[1].get_clim() == (-0.5, 0.5)


def test_correlations_of_a_position_are_drawn_over_the_previous_frame():
    levels = {"2 x 2": RNG.random((T, 1, 2, 2, 2, 2)), "4 x 4": RNG.random((T, 3, 4, 4, 4, 4))}
    positions = [(0.5, 0.99), (0.0, 0.3)]
    figure = interpret_plots.correlations(PICTURES[0], PICTURES[1], levels, 1, positions)
    assert len(figure.axes) == 2 * 3 + 2
    tiles = np.array(figure.axes[:6]).reshape(2, 3)
    for row, cells in zip(tiles, [((1, 1), (2, 3)), ((0, 0), (0, 1))], strict=True):
        np.testing.assert_array_equal(row[0].images[0].get_array(), PICTURES[0])
        corners = [p.get_xy() for p in row[0].patches[::2]]
        expected = [(j * S / n - 0.5, i * S / n - 0.5) for (i, j), n in zip(cells, (2, 4))]  # noqa: B905
        np.testing.assert_allclose(corners, expected)
        for axes, c, (i, j) in zip(row[1:], levels.values(), cells, strict=True):
            grey = PICTURES[1] @ [0.299, 0.587, 0.114]
            np.testing.assert_allclose(axes.images[0].get_array(), grey)
            np.testing.assert_allclose(axes.images[1].get_array(), c[1, :, i, j].mean(axis=0))
    assert tiles[0, 1].images[1].get_clim() == tiles[1, 1].images[1].get_clim()


def test_a_rows_colours_may_begin_at_its_lowest_number():
    heat_maps = {"a": 5 + RNG.random((T, 2, 2)), "b": np.ones((T, 2, 2))}
    figure = interpret_plots.tubes(PICTURES, heat_maps, from_lowest=True)
    drawn = np.stack([axes.images[1].get_array() for axes in figure.axes[T : 2 * T]])
    low, high = heat_maps["a"].min(), heat_maps["a"].max()
    np.testing.assert_allclose(drawn, (heat_maps["a"] - low) / (high - low))
    assert not figure.axes[2 * T].images[1].get_array().any()


def test_channels_that_differ_most_between_classes_come_first():
    class_excitations = {"a": torch.from_numpy(RNG.random((2, 6))), "b": RNG.random((2, 3))}
    class_excitations["a"][:, 4] = torch.tensor([0.0, 1.0])
    figure = interpret_plots.excitations(class_excitations, ["ant", "bee"], most=4)
    assert len(figure.axes) == 3
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (2, 4)
    assert drawn[:, 0].tolist() == [0, 1]
    spread = drawn.var(axis=0)
    assert (np.diff(spread) <= 0).all()
    assert spread[-1] >= np.sort(class_excitations["a"].numpy().var(axis=0))[2]
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["ant", "bee"]
    assert figure.axes[1].get_title() == "b: 3 of 3 channels"


def test_what_does_not_fit_is_refused():
    for draw in (interpret_plots.tubes, interpret_plots.gates):
        with pytest.raises(ValueError, match="3 frames for maps of nothing"):
            draw(PICTURES, {})
        with pytest.raises(ValueError, match=r"3 frames for maps of \{'a': 2\}"):
            draw(PICTURES, {"a": np.zeros((2, 2, 2))})
    level = {"a": np.ones((T, 1, 2, 2, 2, 2))}
    picture = PICTURES[0]
    with pytest.raises(ValueError, match="frame=3 of 3"):
        interpret_plots.correlations(picture, picture, level, 3)
    with pytest.raises(ValueError, match="less than 1"):
        interpret_plots.correlations(picture, picture, level, 0, [(0.5, 1.0)])
    with pytest.raises(ValueError, match="0 levels"):
        interpret_plots.correlations(picture, picture, {}, 0)
    with pytest.raises(ValueError, match=r"3 classes for \{'a': \[2, 6\]\}"):
        interpret_plots.excitations({"a": np.ones((2, 6))}, ["x", "y", "z"])
