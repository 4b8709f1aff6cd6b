"""The comparison with the paper's figure, on a summary with known values."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
import claims
import paper_figure
import plateau


def summary(ratios: list[float], error: float) -> xr.Dataset:
    values = np.array([ratios, [9.0] * len(ratios), [error] * len(ratios)])
    coordinates = {"statistic": ["mean", "deviation", "error"], "layer": range(len(ratios))}
    return xr.Dataset({"ratio": (("statistic", "layer"), values)}, coordinates)


POINTS = pd.DataFrame({"width": [30, 30, 100], "layer": [0, 2, 1], "ratio": [1.0, 3.0, 2.0]})
FOUND = {30: summary([1.0, 2.0, 3.5], 0.04), 100: summary([0.0, 2.0, 7.0], 0.04)}


def test_value_is_mean_and_error() -> None:
    assert claims.value(FOUND[30].ratio, layer=2) == (3.5, 0.04)


def test_chi2_counts_statistical_and_reading_error() -> None:
    assert paper_figure.chi2(FOUND, POINTS) == pytest.approx((0.5 / 0.05) ** 2)


def test_chi2_of_shifted_layers_stays_within_the_record() -> None:
    expected = (1.0**2 + 0.5**2 + 5.0**2) / 0.05**2
    assert paper_figure.chi2(FOUND, POINTS, 1) == pytest.approx(expected)
    expected = (0 + 1.0**2 + 2.0**2) / 0.05**2
    assert paper_figure.chi2(FOUND, POINTS, -1) == pytest.approx(expected)


def test_compare_lists_the_record_and_the_deviation() -> None:
    table = paper_figure.compare(POINTS, FOUND)
    assert table.paper.tolist() == [1, 3, 2]
    assert table.record.tolist() == [1, 3.5, 2]
    assert table["its error"].tolist() == [0.04] * 3
    np.testing.assert_allclose(table.deviation, [0, 10, 0])


def test_the_points_of_the_paper() -> None:
    points = paper_figure.read()
    assert set(points.width) == {30, 100, 300, 1000, 3000}
    assert points.layer.max() == 49


def test_law_of_the_plateau_is_the_stored_one() -> None:
    """The parts are over m2, for a start of one correlation and for images."""
    stored = pd.read_csv(plateau.RESULTS / "plateau.csv")
    for case, width in (("white", 64), ("first matrix", 64), ("digits", 256)):
        rows = stored[(stored.case == case) & (stored.width == width)].set_index("layer")
        for part, values in plateau.law(case, width).items():
            found = values[list(rows.index)]
            np.testing.assert_allclose(found, rows[f"law {part}"], rtol=1e-5)
