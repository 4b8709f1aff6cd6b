r"""Comparisons between training runs: best learning rates, and ratios of losses paired over seeds.

A loss in a comparison is *missing* (NaN) if there was no such run, *infinite* if the run diverged.
Ratios are paired: with one seed, two initializations share their weights, calibration batch and
order of the data. Over :math:`n` seeds, :math:`\log` of the ratio has mean :math:`\mu` and standard
error :math:`s`; the ratio is :math:`e^\mu`, its 95 % interval :math:`e^{\mu\pm ts}` with Student's
:math:`t` of :math:`n-1` degrees of freedom, its standard error :math:`e^\mu s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from scipy import special

from svlib.experiments.experiment import INITIALIZATIONS, VARIANTS, Experiment

_PER_RUN = ("diverged", "initialization_seconds", "seconds_per_iteration", "wall_time")
_POINT = ("initialization", "learning_rate", "seed")

_BEFORE = {"schedule": "constant", "centred": 1}  # of records that do not say it

Data = TypeVar("Data", xr.Dataset, xr.DataArray)


def _attribute(record: xr.Dataset, name: str) -> Any:
    return record.attrs.get(name, _BEFORE.get(name))


def collect(records: Iterable[xr.Dataset]) -> xr.Dataset:
    """Join records of runs along ``initialization``, ``learning_rate`` and ``seed``.

    Layers are counted from 0. Attributes that differ from run to run (``diverged``, times) become
    variables; ``wall_time`` is also summed up in ``attrs``. Runs that are missing from the grid are
    NaN.

    Raises:
        ValueError: If there are none, or they are of other data, of other copies of them, of other
            configurations or versions.
    """
    listed = list(records)
    if not listed:
        raise ValueError("records must hold at least one, got none")
    settings = [name for name in Experiment.__dataclass_fields__ if name not in _POINT]
    for name in (*settings, "source", "sha256", "svlib", "torch"):
        values = (_attribute(record, name) for record in listed)
        if len(found := {str(np.asarray(value).tolist()) for value in values}) > 1:
            raise ValueError(f"records must agree in {name}, got {sorted(found)}")
    parts = [
        record.assign_coords(layer=np.arange(record.sizes["layer"]))
        .assign({name: record.attrs[name] for name in _PER_RUN})
        .drop_attrs()
        .expand_dims({name: [record.attrs[name]] for name in _POINT})
        for record in listed
    ]
    joined = xr.merge(parts, join="outer", compat="no_conflicts")
    kinds = [kind for kind in INITIALIZATIONS + VARIANTS if kind in joined.initialization]
    common = {
        name: value
        for name, value in listed[0].attrs.items()
        if all(np.array_equal(value, _attribute(record, name)) for record in listed)
    }
    return joined.sel(initialization=kinds).assign_attrs(
        common | {"wall_time": float(joined.wall_time.sum())}
    )


def mean_loss(
    record: xr.Dataset, first: int | None = None, last: int | None = None
) -> xr.DataArray:
    """Mean training loss of every run over the iterations [first, last).

    Args:
        record: A dataset of :func:`collect`. Of windows, those that begin in this range count.
        first: ``None`` takes the last tenth of the iterations.
        last: ``None`` takes all from ``first`` on.

    Returns:
        (initialization, learning_rate, seed); NaN where missing, infinite where diverged.
    """
    end = int(record.attrs["iterations"])
    start = end - -(-end // 10) if first is None else first
    starts = record.iteration
    weights = xr.DataArray(np.diff(starts, append=end), starts.coords)
    chosen = (starts >= start) & (starts < (end if last is None else last))
    window, weights = record.loss[..., chosen.values], weights[chosen.values]
    mean = (window.astype(float) * weights).sum("iteration", skipna=False) / weights.sum()
    losses: xr.DataArray = mean.where(~(record.diverged >= 0), np.inf)
    return losses


def best_rates(losses: xr.DataArray) -> pd.DataFrame:
    """The learning rate of the lowest loss, averaged over seeds, of each initialization.

    A rate at which a seed diverged is not eligible; missing seeds do not count.

    Args:
        losses: (initialization, learning_rate, seed), NaN where missing, infinite where diverged.

    Returns:
        By initialization: ``learning_rate``, ``loss``, its standard error ``error``, and
        ``at_edge``, whether no lower or no higher rate was tried. The rate and its loss are NaN if
        at every rate a seed diverged.
    """
    rows = []
    for kind in losses.initialization.values:
        mine = losses.sel(initialization=kind).transpose("learning_rate", "seed")
        tried = pd.DataFrame(mine.to_pandas()).dropna(how="all").sort_index()
        means = tried.mean(axis=1)
        eligible = means[np.isfinite(means)]
        rate = eligible.idxmin() if len(eligible) else np.nan
        error = tried.loc[rate].sem(ddof=1) if len(eligible) else np.nan
        at_edge = rate in (*tried.index[:1], *tried.index[-1:])
        rows.append((kind, rate, eligible.min(), error, at_edge))
    columns = ["initialization", "learning_rate", "loss", "error", "at_edge"]
    return pd.DataFrame(rows, columns=columns).set_index("initialization")


def at_rates(data: Data, rates: Mapping[str, float]) -> Data:
    """Each initialization at a rate of its own: (initialization, seed, ...)."""
    kinds = xr.DataArray(list(rates), dims="initialization")
    chosen = xr.DataArray(list(rates.values()), dims="initialization")
    return data.sel(initialization=kinds, learning_rate=chosen)


def ratio(losses: xr.DataArray, above: str, below: str) -> xr.Dataset:
    """The loss of one initialization over that of another, paired over seeds.

    Args:
        losses: (initialization, seed) as of :func:`at_rates`, NaN where missing, infinite where
            diverged; or with further dimensions, ``iteration`` for example, along which a run that
            diverged is NaN from there on and one that is missing NaN throughout.
        above: Initialization in the numerator.
        below: Initialization in the denominator.

    Returns:
        ``ratio``, ``low`` and ``high`` (95 % interval) and ``error``, along the further dimensions;
        NaN where a run diverged. With one seed there is no interval: NaN.
    """
    a, b = (
        losses.sel(initialization=kind, drop=True).dropna("seed", how="all")
        for kind in (above, below)
    )
    a, b = xr.align(a, b, join="inner")
    if not (seeds := a.sizes["seed"]):
        raise ValueError(f"losses must have seeds of both {above} and {below}, got none in common")
    a, b = (x.where(np.isfinite).astype(float) for x in (a, b))
    logs: xr.DataArray = xr.apply_ufunc(np.log, a) - xr.apply_ufunc(np.log, b)
    middle = logs.mean("seed", skipna=False)
    if seeds > 1:
        error = logs.std("seed", ddof=1, skipna=False) / np.sqrt(seeds)
        half = special.stdtrit(seeds - 1, 0.975) * error
    else:
        error = half = xr.full_like(middle, np.nan)
    bounds = {"ratio": middle, "low": middle - half, "high": middle + half}
    found = {name: xr.apply_ufunc(np.exp, bound) for name, bound in bounds.items()}
    return xr.Dataset(found | {"error": found["ratio"] * error})
