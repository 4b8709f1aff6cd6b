"""Pictures of records. Every function draws on the axes it is given (or new ones) and returns them.

Colours are Okabe and Ito's, told apart by the colour-blind, some of them darker: on white each has
a contrast of 3:1 and text of 4.5:1, and so they have inverted, on a dark page. Lines differ by
style or marker as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from cycler import cycler
from matplotlib.axes import Axes

COLORS = ("#0072B2", "#B07800", "#008A64", "#D55E00", "#BC5F93", "#2E8BC0")
GREY = "#767676"
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_LINEAR = 30  # factor of sigma up to which a linear scale shows it
_TOTAL = r"$\sigma$, total"
_MARKERS = ("o", "s", "^", "D", "v", "P")


STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "text.color"), GREY),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor", "grid.color"), GREY),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "font.size": 12, "axes.titlesize": 12, "lines.linewidth": 1.8,
    "figure.figsize": (6.4, 3.8), "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=COLORS), "svg.hashsalt": "svlib",
}  # fmt: skip
"""Matplotlib's rcParams for pictures that are transparent, grey and reproducible as SVG."""


def use_book_style() -> None:
    """Make :data:`STYLE` and SVG the defaults, as in the book. Changes global rcParams."""
    mpl.rcParams.update(STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    set_matplotlib_formats("svg", metadata={"Date": None})  # type: ignore[no-untyped-call]


def look(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the series with this index, for ``Axes.plot``."""
    if index < 0:
        raise ValueError(f"index must be at least 0, got {index}")
    color, style, marker = (x[index % 6] for x in (COLORS, _STYLES, _MARKERS))
    return {"color": color, "linestyle": style, "marker": marker, "markersize": 4}


def _axes(axes: Axes | None) -> Axes:
    return plt.subplots()[1] if axes is None else axes


def band(
    x: Any,
    mean: Any = None,
    spread: Any = None,
    *,
    index: int = 0,
    label: str = "",
    axes: Axes | None = None,
) -> Axes:
    """A line with a band of ``spread`` on either side.

    Args:
        x: (points,) positions. Alone, a variable of a record or of its summary, ``record.fraction``
            for example: the line is its mean over networks, the band one standard error.
        mean: (points,) the line.
        spread: (points,) half the height of the band, in the units of ``mean``.
        index: Which colour and style.
        label: Name in the legend.
        axes: Where to draw.
    """
    axes = _axes(axes)
    if mean is None:
        x, mean, spread = _mean_and_error(x)
        axes.set(xlabel=x.name)
    mean, spread = np.asarray(mean), np.asarray(spread)
    axes.plot(x, mean, label=label, markevery=max(1, len(mean) // 8), **look(index))
    edges = mean - spread, mean + spread
    axes.fill_between(x, *edges, color=COLORS[index % 6], alpha=0.2, linewidth=0)
    return axes


def _mean_and_error(values: Any) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Coordinate, mean and standard error of a variable by network or by statistic."""
    if not isinstance(values, xr.DataArray) or not {"network", "statistic"} & set(values.dims):
        raise TypeError(
            "x must come with mean and spread, or be a variable of a record or a summary, "
            f"got {type(values).__name__}"
        )
    if "statistic" in values.dims:
        mean, error = (values.sel(statistic=name) for name in ("mean", "error"))
    else:
        finite = values.where(np.isfinite)
        mean = finite.mean("network")
        error = finite.std("network", ddof=1) / np.sqrt(finite.count("network"))
    return mean[mean.dims[0]], mean, error


def theory(
    values: Any, *, label: str = "infinite width", x: Any = None, axes: Axes | None = None
) -> Axes:
    """A result of theory, as a dashed grey line.

    Args:
        values: (layers,) ``trajectory(49).ratio`` for example.
        label: Name in the legend.
        x: (layers,) positions, by default 0, 1, 2, ...
        axes: Where to draw.
    """
    axes = _axes(axes)
    x = np.arange(len(values)) if x is None else x
    axes.plot(x, values, label=label, color=GREY, linestyle="--", linewidth=1.4)
    return axes


def points(x: Any, y: Any, *, label: str = "paper", axes: Axes | None = None) -> Axes:
    """Values from elsewhere, the paper's for example, as white circles with a dark rim."""
    axes = _axes(axes)
    axes.scatter(x, y, facecolor="white", edgecolor="#404040", s=28, zorder=5, label=label)
    return axes


def fractions(series: dict[str, Any], *, axes: Axes | None = None) -> Axes:
    """v^2/sigma^2 against layer, on a logarithmic scale.

    Args:
        series: Name in the legend to a record or its summary (a line with a band of one standard
            error over networks) or a trajectory (a line).
        axes: Where to draw.
    """
    axes = _axes(axes)
    for index, (label, item) in enumerate(series.items()):
        if isinstance(item, xr.Dataset):
            band(item.fraction, index=index, label=label, axes=axes)
        else:
            axes.plot(item.fraction, label=label, **look(index) | {"marker": None})
    axes.set(xlabel="layer", ylabel=r"$v^2/\sigma^2$", yscale="log")
    axes.legend()
    return axes


def ratio(record: xr.Dataset, *, index: int = 0, label: str = "", axes: Axes | None = None) -> Axes:
    """m/v against layer, mean and standard deviation over networks (the paper's figure)."""
    spread = record.ratio.std("network", ddof=1)
    mean = record.ratio.mean("network")
    axes = band(record.layer, mean, spread, index=index, label=label, axes=axes)
    axes.set(xlabel="layer", ylabel="$m/v$")
    return axes


def decomposition(table: Any, *, theory: Any = None, axes: Axes | None = None) -> Axes:
    """m, v and sigma by layer.

    Where sigma changes by a factor of 30 the scale is logarithmic, down to 1/30 of its smallest.

    Args:
        table: Anything with ``m2`` and ``v2`` by layer: a :class:`svlib.theory.Trajectory`, the
            table of :func:`svlib.probe`, a record averaged over networks. A negative m2 is drawn as
            0.
        theory: Another such, drawn beneath as broad pale lines; those of an
            :class:`svlib.Explanation` are broken where theory starts anew from the measured values.
        axes: Where to draw.
    """
    for name, value in {"table": table, "theory": table if theory is None else theory}.items():
        if not (hasattr(value, "m2") and hasattr(value, "v2")):
            raise TypeError(f"{name} must have m2 and v2 by layer, got {type(value).__name__}")
        if (layers := len(value.m2)) != len(table.m2):
            raise ValueError(f"theory must have the {len(table.m2)} layers of table, got {layers}")
    axes = _axes(axes)
    if theory is not None:
        starts = np.asarray(getattr(theory, "start", [""] * len(theory.m2))) != ""
        for index, square in enumerate(_decomposed(theory).values()):
            broad: Any = {"color": COLORS[index], "linewidth": 7, "alpha": 0.3}
            for part in np.split(np.arange(len(square)), np.flatnonzero(starts)):
                line = axes.plot(part, np.sqrt(square[part]), **broad)
        line[0].set_label("theory")
    for index, (label, square) in enumerate(_decomposed(table).items()):
        axes.plot(np.sqrt(square), label=label, markevery=max(1, len(square) // 10), **look(index))
    axes.set(xlabel="layer", ylabel="preactivation", ylim=(0, None))
    sigma = np.sqrt(_decomposed(table)[_TOTAL])
    if sigma.max() > _LINEAR * sigma.min() > 0:
        axes.set(yscale="log", ylim=(sigma.min() / _LINEAR, 2 * sigma.max()))
    axes.legend()
    return axes


def _decomposed(table: Any) -> dict[str, np.ndarray]:
    m2, v2 = (np.asarray(getattr(table, name), dtype=float) for name in ("m2", "v2"))
    return {"$m$, mean": np.maximum(m2, 0), "$v$, deviation": v2, _TOTAL: m2 + v2}


def histograms(columns: dict[str, np.ndarray], layers: Iterable[str]) -> np.ndarray:
    """A grid of histograms: one row per layer, one column per kind of randomness.

    Args:
        columns: Title to array (layers, draws), or (layers, units, draws) for one histogram a unit.
        layers: Names of the rows. Draws beyond -4 and 4 are not shown.

    Returns:
        The axes, (rows, columns).
    """
    names = list(layers)
    size, shape = (6.4, 1.5 * len(names)), (len(names), len(columns))
    _, grid = plt.subplots(*shape, sharex=True, squeeze=False, figsize=size)
    bins = np.linspace(-4, 4, 41)
    for column, (title, draws) in enumerate(columns.items()):
        grid[0, column].set_title(title)
        grid[-1, column].set_xlabel("preactivation")
        for row, name in enumerate(names):
            kind = "bar" if draws.ndim == 2 else "step"
            for k, unit in enumerate(np.atleast_2d(draws[row])):
                color = COLORS[(k if draws.ndim == 3 else column) % 6]
                grid[row, column].hist(unit, bins, density=True, color=color, histtype=kind)
            grid[row, column].set(yticks=[], ylabel=name if column == 0 else "")
    return np.asarray(grid)


def cobweb(
    step: Callable[[float], float], start: float, steps: int, *, axes: Axes | None = None
) -> Axes:
    """A map on [0, 1], the diagonal, and the path of its iterates from ``start``."""
    axes = _axes(axes)
    grid = np.linspace(0, 1, 201)
    axes.plot(grid, [step(x) for x in grid], color=COLORS[0], label="map")
    axes.plot(grid, grid, color=GREY, linestyle="--", label="identity")
    path = [start]
    for _ in range(steps):
        path.append(step(path[-1]))
    x = np.repeat(path[:-1], 2)
    y = np.append(np.array([start]), np.repeat(path[1:], 2))[: len(x)]
    axes.plot(x, y, color=COLORS[3], linewidth=1, label="iterates")
    axes.set(xlabel=r"$\rho_l$", ylabel=r"$\rho_{l+1}$", aspect="equal")
    axes.legend()
    return axes


def learning_rates(
    losses: xr.DataArray, labels: dict[str, str], *, axes: Axes | None = None
) -> Axes:
    """Loss against learning rate: points are seeds, the line is their mean.

    A diverged seed has no point, and its rate no line.

    Args:
        losses: (initialization, learning_rate, seed), in any order; NaN or infinite where a run
            diverged.
        labels: Initialization to its name in the legend.
        axes: Where to draw.
    """
    axes = _axes(axes)
    for index, (kind, label) in enumerate(labels.items()):
        mine = losses.sel(initialization=kind).transpose("learning_rate", "seed").where(np.isfinite)
        style = look(index)
        axes.plot(mine.learning_rate, mine.mean("seed", skipna=False), label=label, **style)
        axes.plot(mine.learning_rate, mine, style["marker"], color=style["color"], alpha=0.4)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.legend()
    return axes


def training_layers(runs: dict[str, xr.Dataset]) -> np.ndarray:
    """Layers in the course of training, a line for each moment probed.

    Above v^2/sigma^2, below log10 of squared gradients.

    Args:
        runs: Title to the part of :func:`svlib.experiments.training.collect`'s dataset with one
            initialization and one learning rate; a column each. Lines are means over seeds, bands
            one standard deviation.

    Returns:
        The axes, (2, columns).
    """
    _, grid = plt.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False, figsize=(6.4, 5))
    for (above, below), (title, chosen) in zip(grid.T, runs.items(), strict=True):
        drawn = {above: chosen.v2 / (chosen.m2 + chosen.v2), below: np.log10(chosen.gradient2)}
        for axes, values in drawn.items():
            for index, moment in enumerate(values.probed.values):
                found, label = values.sel(probed=moment), f"iteration {moment}"
                mean, spread = found.mean("seed"), found.std("seed", ddof=1)
                band(found.layer, mean, spread, index=index, label=label, axes=axes)
        above.set(title=title, ylim=(0, 1.1))
        below.set(xlabel="layer")
    grid[0, 0].set_ylabel(r"$v^2/\sigma^2$")
    grid[1, 0].set_ylabel(r"$\log_{10}$ squared gradient")
    grid[0, -1].legend(fontsize="x-small", loc="lower center")
    return np.asarray(grid)
