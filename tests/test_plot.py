"""Pictures show the numbers that they are given."""

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import svlib as sv

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with mpl.rc_context():
        yield
    plt.close("all")


def test_decomposition_draws_roots() -> None:
    layers = sv.theory.trajectory(5)
    m, v, sigma = sv.plot.decomposition(layers).lines
    np.testing.assert_allclose(np.asarray(m.get_ydata()), layers.m)
    np.testing.assert_allclose(np.asarray(v.get_ydata()), layers.v)
    np.testing.assert_allclose(np.asarray(sigma.get_ydata()), 1)


def test_decomposition_over_theory() -> None:
    model = sv.networks.mlp(20, width=30, depth=6, outputs=5, seed=0)
    explanation = sv.explain(model, sv.data.gaussian(50, 20, seed=1))
    lines = sv.plot.decomposition(explanation.table, theory=explanation.theory).lines
    np.testing.assert_allclose(np.asarray(lines[-1].get_ydata()), np.sqrt(explanation.table.sigma2))
    broad = [
        line for line in lines if line.get_linewidth() > 5 and len(np.asarray(line.get_ydata()))
    ]
    assert sorted({len(np.asarray(line.get_ydata())) for line in broad}) == [
        6
    ]  # one piece: theory starts at the first layer
    np.testing.assert_allclose(np.asarray(broad[1].get_ydata()), np.sqrt(explanation.theory.v2))


def test_decomposition_on_a_logarithmic_scale_where_sigma_changes_much() -> None:
    table = sv.probe(
        sv.networks.mlp(20, width=30, depth=6, outputs=5, seed=0), sv.data.gaussian(50, 20, seed=1)
    )
    assert sv.plot.decomposition(table).get_yscale() == "linear"
    faded = table.assign(m2=table.m2 * 10.0 ** -np.arange(6), v2=table.v2 * 10.0 ** -np.arange(6))
    axes = sv.plot.decomposition(faded)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < np.sqrt(faded.v2.min())
    for arguments, error, message in (
        ({"table": [1.0]}, TypeError, "table must have m2 and v2 by layer, got list"),
        ({"table": table, "theory": 3}, TypeError, "theory must have m2 and v2 by layer, got int"),
        (
            {"table": table, "theory": sv.theory.trajectory(2)},
            ValueError,
            "theory must have the 6 layers of table, got 3",
        ),
    ):
        with pytest.raises(error, match=message):
            sv.plot.decomposition(**arguments)


def test_ratio_draws_mean_and_standard_deviation_over_networks() -> None:
    record = sv.simulate(8, 3, networks=5, samples=6, seed=0)
    axes = sv.plot.ratio(record, index=1, label="x")
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), record.ratio.mean("network"))
    heights = axes.collections[0].get_paths()[0].vertices
    spread = record.ratio.std("network", ddof=1)
    assert np.asarray(heights)[:, 1].max() == pytest.approx(
        float((record.ratio.mean("network") + spread).max())
    )


def drawn(axes: Axes, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A line, and the top of the band about it."""
    top = axes.collections[index].get_paths()[0].vertices[:, 1]  # type: ignore[index]
    return np.asarray(axes.lines[index].get_ydata()), np.asarray(top)


def test_band_of_a_record_and_of_its_summary() -> None:
    record = sv.simulate(2, 4, networks=200, samples=4, seed=0)  # many are dead, with a NaN
    summary = sv.summarize(record)
    expected = summary.ratio.sel(statistic="mean")
    top = (expected + summary.ratio.sel(statistic="error")).max()
    for values in (summary.ratio, record.ratio):
        axes = sv.plot.band(values, label="x")
        line, edge = drawn(axes, 0)
        np.testing.assert_allclose(line, expected)
        assert edge.max() == pytest.approx(float(top))
        assert axes.get_xlabel() == "layer"
    for bad in (summary.layer, np.ones(3)):
        with pytest.raises(TypeError, match="x must come with mean and spread, or be a variable"):
            sv.plot.band(bad)


def test_fractions_of_records_summaries_and_trajectories() -> None:
    record = sv.simulate(8, 3, networks=5, samples=6, seed=0)
    exact = sv.theory.trajectory(3, residual=1.0)
    axes = sv.plot.fractions({"a": record, "b": sv.summarize(record), "c": exact})
    mean = (record.v2 / record.sigma2).mean("network")
    for index, expected in enumerate((mean, mean, exact.v2 / exact.sigma2)):
        np.testing.assert_allclose(np.asarray(axes.lines[index].get_ydata()), expected)
    assert len(axes.collections) == 2  # no band about theory
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert axes.get_yscale() == "log"


def test_theory_and_points() -> None:
    axes = sv.plot.theory([3.0, 2.0], label="law")
    assert sv.plot.points([0.5], [2.5], axes=axes) is axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 3], [1, 2]])
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[0.5, 2.5]])
    assert [artist.get_label() for artist in (line, axes.collections[0])] == ["law", "paper"]
    shifted = sv.plot.theory([3.0, 2.0], x=[1, 2]).lines[0]
    np.testing.assert_array_equal(shifted.get_xdata(), [1, 2])


def test_given_axes_are_used_and_returned() -> None:
    _, axes = plt.subplots()
    assert sv.plot.decomposition(sv.theory.trajectory(2), axes=axes) is axes
    assert sv.plot.cobweb(sv.theory.maps.correlation, 0.0, 3) is not axes


def test_cobweb_follows_the_iterates() -> None:
    path = sv.plot.cobweb(lambda x: x / 2, 1.0, 3).lines[2]
    np.testing.assert_allclose(np.asarray(path.get_xdata()), [1, 1, 0.5, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(np.asarray(path.get_ydata()), [1, 0.5, 0.5, 0.25, 0.25, 0.125])


def test_histograms() -> None:
    draws = np.array([[0.05, 0.05, 0.25, 99.0], [-1.0, -1.0, -1.0, 1.1]])
    axes = sv.plot.histograms({"a": draws, "b": draws}, ["first", "second"])
    heights = [bar.get_height() for bar in axes[0, 1].patches]
    assert max(heights) == pytest.approx(2 / 3 / 0.2)  # what lies beyond 4 is not counted
    assert axes.shape == (2, 2)


def test_book_style_is_the_same_every_time() -> None:
    sv.plot.use_book_style()
    assert mpl.rcParams["svg.hashsalt"] == "svlib"
    assert mpl.rcParams["figure.facecolor"] == "none"


def test_bad_index() -> None:
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        sv.plot.look(-1)


def test_learning_rates_show_every_seed_and_no_mean_of_survivors() -> None:
    coordinates = {"initialization": ["a", "b"], "learning_rate": [0.1, 1.0], "seed": [0, 1]}
    losses = xr.DataArray([[[1.0, 3.0], [5.0, np.inf]], [[2.0, 2.0], [4.0, 6.0]]], coordinates)
    lines = sv.plot.learning_rates(
        losses, {"b": "second", "a": "first"}
    ).lines  # mean, then a line of points per seed
    drawn = [np.asarray(line.get_ydata()).tolist() for line in lines]
    assert drawn[:3] == [[2, 5], [2, 4], [2, 6]]
    np.testing.assert_array_equal(drawn[3:], [[2, np.nan], [1, 5], [3, np.nan]])
    legend = lines[0].axes.get_legend()  # type: ignore[union-attr]
    assert [text.get_text() for text in legend.get_texts()] == ["second", "first"]  # type: ignore[union-attr]


def test_training_layers() -> None:
    dims = ("probed", "layer", "seed")
    m2 = np.random.default_rng(0).random((2, 3, 4))
    gradient = np.random.default_rng(1).random((2, 3, 4))
    run = xr.Dataset(
        {"m2": (dims, m2), "v2": (dims, 3 - m2), "gradient2": (dims, gradient)},
        {"probed": [0, 9], "layer": [1, 2, 3]},
    )
    grid = sv.plot.training_layers({"one": run, "two": run})
    assert grid.shape == (2, 2)
    assert grid[0, 1].get_title() == "two"
    for axes, expected in zip(grid[:, 1], (1 - m2 / 3, np.log10(gradient)), strict=True):
        for line, moment in zip(axes.lines, expected, strict=True):
            np.testing.assert_allclose(line.get_ydata(), moment.mean(1))
        top = axes.collections[1].get_paths()[0].vertices[:, 1].max()
        assert top == pytest.approx((expected[1].mean(1) + expected[1].std(1, ddof=1)).max())
    assert [line.get_label() for line in grid[0, 0].lines] == ["iteration 0", "iteration 9"]
