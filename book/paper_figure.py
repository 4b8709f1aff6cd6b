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
    paper: pd.DataFrame,
    *,
    live: Mapping[int, xr.Dataset],
    record: Mapping[int, xr.Dataset],
) -> pd.DataFrame:
    """Summaries by width beside the paper's points.

    The deviation is record minus paper, in units of the record's
    standard error and the reading error together.
    """
    table = paper.rename(columns={"ratio": "paper"})
    for name, found in (("live", live), ("record", record)):
        places = zip(paper.width, paper.layer, strict=True)
        pairs = [
            claims.value(found[width].ratio, layer=layer)
            for width, layer in places
        ]
        table[name], table[f"error of {name}"] = zip(
            *pairs, strict=True
        )
    error = np.hypot(table["error of record"], READING)
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
