"""Our m/v against the values that were read off the paper's figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

import claims

READING = 0.03  # error of a value read off the figure


def read() -> pd.DataFrame:
    """The points: width, layer (counted from 0) and m/v."""
    path = Path(__file__).parent / "results" / "paper-figure.csv"
    return pd.read_csv(path)


def compare(
    paper: pd.DataFrame, record: Mapping[int, xr.Dataset]
) -> pd.DataFrame:
    """Summaries by width beside the paper's points.

    The deviation is record minus paper, in units of the record's
    standard error and the reading error together.
    """
    table = paper.rename(columns={"ratio": "paper"})
    places = zip(paper.width, paper.layer, strict=True)
    pairs = [
        claims.value(record[width].ratio, layer=layer)
        for width, layer in places
    ]
    table["record"], table["its error"] = zip(*pairs, strict=True)
    error = np.hypot(table["its error"], READING)
    table["deviation"] = (table.record - table.paper) / error
    return table


def chi2(
    found: Mapping[int, xr.Dataset],
    points: pd.DataFrame,
    shift: int = 0,
) -> float:
    """Sum of squared deviations from the paper's points.

    ``found`` holds summaries by width, read at the layers of the points
    plus ``shift``.
    """
    total = 0.0
    columns = points.width, points.layer, points.ratio
    for width, layer, expected in zip(*columns, strict=True):
        ratio = found[width].ratio
        at = min(max(layer + shift, 0), ratio.sizes["layer"] - 1)
        mean, error = claims.value(ratio, layer=at)
        total += (mean - expected) ** 2 / (error**2 + READING**2)
    return total


def versions(record: xr.Dataset, layer: int = 49) -> pd.DataFrame:
    """Both public versions of the figure beside three averages of ours, by width.

    Errors are standard errors over networks; that of the root of the means by the delta
    method, as if m² and v² were independent.
    """
    path = Path(__file__).parent / "results"
    read = pd.read_csv(path / "paper-figure-versions.csv")
    there = read[read.layer == layer]
    table = there.pivot(
        index="width", columns="version", values="ratio"
    )
    table.columns = [f"figure of {x}" for x in table.columns]
    at = record.sel(layer=layer)

    def told(mean: xr.DataArray, error: xr.DataArray) -> list[str]:
        pairs = zip(mean.values, error.values, strict=True)
        return [f"{x:.2f} ± {e:.2f}" for x, e in pairs]

    mean, error = (
        at.sel(statistic=name, width=table.index)
        for name in ("mean", "error")
    )
    root = (mean.m2 / mean.v2) ** 0.5
    spread = (
        (error.m2 / mean.m2) ** 2 + (error.v2 / mean.v2) ** 2
    ) ** 0.5
    inverse = mean.v2_over_m2**-0.5
    table["mean of m/v"] = told(mean.ratio, error.ratio)
    table["root of mean m² over mean v²"] = told(
        root, root * spread / 2
    )
    table["inverse root of mean v²/m²"] = told(
        inverse, inverse * error.v2_over_m2 / mean.v2_over_m2 / 2
    )
    return table
