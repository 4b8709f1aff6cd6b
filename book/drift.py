"""Measure the drift before BatchNorm: ``python drift.py`` writes ``results/batchnorm-drift.csv``."""

from __future__ import annotations

import pandas as pd
import svlib as sv
import xarray as xr

import claims

FILE = claims.RESULTS / "batchnorm-drift.csv"
NETWORKS = {512: 96, 1024: 64, 2048: 32}  # by width
BATCHES = (32, 128, 256)
DEPTH = 49


def measured(width: int, batch: int, networks: int) -> pd.DataFrame:
    """m²/σ² by layer, the ratio of averages over networks, and m/v; with standard errors."""
    record = sv.simulate(
        width,
        DEPTH,
        networks=networks,
        samples=batch,
        seed=width + batch,
        normalization="batch",
        dtype="float64",
        method="gram",
    )
    m2, sigma2 = record.m2, record.sigma2
    shared = m2.mean("network") / sigma2.mean("network")
    rest = (m2 - shared * sigma2) / sigma2.mean("network")
    found = {"m2": shared, "m2_error": sem(rest)}
    found |= {"ratio": record.ratio.mean("network")}
    found |= {"ratio_error": sem(record.ratio)}
    table = pd.DataFrame({k: v.to_series() for k, v in found.items()})
    table.insert(0, "networks", networks)
    return table


def sem(values: xr.DataArray) -> xr.DataArray:
    """Standard error over networks."""
    count = values.sizes["network"] ** 0.5
    error: xr.DataArray = values.std("network", ddof=1) / count
    return error


if __name__ == "__main__":
    tables = {
        (width, batch): measured(width, batch, networks)
        for width, networks in NETWORKS.items()
        for batch in BATCHES
    }
    whole = pd.concat(tables, names=["width", "batch"])
    whole.to_csv(FILE, float_format="%.6g")
