"""Pictures of records. Every function draws on the axes it is given (or new ones) and returns them.

Colours are Okabe and Ito's, told apart by the colour-blind; lines differ by style or marker as
well. Grey text on a transparent ground reads on light and dark pages.
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

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
GREY = "#808080"
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_LINEAR = 30  # factor of sigma up to which a linear scale shows it
_TOTAL = r"$\sigma$, total"
_MARKERS = ("o", "s", "^", "D", "v", "P")


STYLE: Any = {
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY, "text.color": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "legend.labelcolor": GREY, "legend.frameon": False,
    "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "font.size": 12,
    "axes.titlesize": 12, "lines.linewidth": 1.8, "figure.figsize": (6.4, 3.8), "figure.constrained_layout.use": True,
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
    return {
        "color": COLORS[index % 6],
        "linestyle": _STYLES[index % 6],
        "marker": _MARKERS[index % 6],
        "markersize": 4,
    }


def _axes(axes: Axes | None) -> Axes:
    return plt.subplots()[1] if axes is None else axes


def band(
    x: Any, mean: Any, spread: Any, *, index: int = 0, label: str = "", axes: Axes | None = None
) -> Axes:
    """A line with a band of ``spread`` on either side.

    Args:
        x: (points,) positions.
        mean: (points,) the line.
        spread: (points,) half the height of the band, in the units of ``mean``.
        index: Which colour and style.
        label: Name in the legend.
        axes: Where to draw.
    """
    axes = _axes(axes)
    mean, spread = np.asarray(mean), np.asarray(spread)
    axes.plot(x, mean, label=label, markevery=max(1, len(mean) // 8), **look(index))
    axes.fill_between(
        x, mean - spread, mean + spread, color=COLORS[index % 6], alpha=0.2, linewidth=0
    )
    return axes


def ratio(record: xr.Dataset, *, index: int = 0, label: str = "", axes: Axes | None = None) -> Axes:
    """m/v against layer: the mean over networks, the band one standard deviation over networks (the paper's figure)."""
    over = record.ratio
    axes = band(
        record.layer,
        over.mean("network"),
        over.std("network", ddof=1),
        index=index,
        label=label,
        axes=axes,
    )
    axes.set(xlabel="layer", ylabel="$m/v$")
    return axes


def decomposition(table: Any, *, theory: Any = None, axes: Axes | None = None) -> Axes:
    """m, v and sigma by layer; on a logarithmic scale, down to 1/30 of the smallest sigma, where sigma changes 30 times.

    Args:
        table: Anything with ``m2`` and ``v2`` by layer: a :class:`svlib.theory.Trajectory`, the
            table of :func:`svlib.probe`, a record averaged over networks. A negative m2 is drawn as
            0.
        theory: Another such, drawn beneath as broad pale lines; those of an
            :class:`svlib.Explanation` are broken where theory starts anew from the measured values.
        axes: Where to draw.

    Raises:
        TypeError: If ``table`` or ``theory`` has no m2 and v2.
        ValueError: If their lengths differ.
    """
    for name, value in {"table": table, "theory": table if theory is None else theory}.items():
        if not (hasattr(value, "m2") and hasattr(value, "v2")):
            raise TypeError(f"{name} must have m2 and v2 by layer, got {type(value).__name__}")
        if len(value.m2) != len(table.m2):
            raise ValueError(
                f"theory must have the {len(table.m2)} layers of table, got {len(value.m2)}"
            )
    axes = _axes(axes)
    if theory is not None:
        starts = np.asarray(getattr(theory, "start", [""] * len(theory.m2))) != ""
        for index, square in enumerate(_decomposed(theory).values()):
            for part in np.split(np.arange(len(square)), np.flatnonzero(starts)):
                line = axes.plot(
                    part, np.sqrt(square[part]), color=COLORS[index], linewidth=7, alpha=0.3
                )
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
        columns: Title to array (layers, draws).
        layers: Names of the rows. Draws beyond -4 and 4 are not shown.

    Returns:
        The axes, (rows, columns).
    """
    names = list(layers)
    _, grid = plt.subplots(
        len(names), len(columns), sharex=True, squeeze=False, figsize=(6.4, 1.5 * len(names))
    )
    bins = np.linspace(-4, 4, 41)
    for column, (title, draws) in enumerate(columns.items()):
        grid[0, column].set_title(title)
        grid[-1, column].set_xlabel("preactivation")
        for row, name in enumerate(names):
            grid[row, column].hist(draws[row], bins=bins, density=True, color=COLORS[column % 6])
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


def losses(
    records: dict[str, list[xr.Dataset]], *, window: int = 1, axes: Axes | None = None
) -> Axes:
    """Training loss against iteration: the mean over seeds, the band one standard error, both of running means
    over the last iterations. The line of a series ends where one of its seeds diverged.

    Args:
        records: Name of the series to the records of its seeds.
        window: Iterations in the running mean.
        axes: Where to draw.
    """
    axes = _axes(axes)
    for index, (label, runs) in enumerate(records.items()):
        # a seed that has diverged ends the line: without it the mean would fall
        loss = xr.concat([run.loss for run in runs], "seed").rolling(iteration=window).mean()
        error = loss.std("seed", ddof=1, skipna=False) / np.sqrt(len(runs))
        band(
            loss.iteration,
            loss.mean("seed", skipna=False),
            error,
            index=index,
            label=label,
            axes=axes,
        )
    axes.set(xlabel="iteration", ylabel="training loss")
    axes.legend()
    return axes


def learning_rates(
    losses: xr.DataArray, labels: dict[str, str], *, axes: Axes | None = None
) -> Axes:
    """Loss against learning rate: points are seeds, the line their mean. A diverged seed has no point, and its rate no line.

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
    """Layers in the course of training: v^2/sigma^2 above, log10 of squared gradients below, a line for each moment probed.

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
                found = values.sel(probed=moment)
                spread = found.std("seed", ddof=1)
                band(
                    found.layer,
                    found.mean("seed"),
                    spread,
                    index=index,
                    label=f"iteration {moment}",
                    axes=axes,
                )
        above.set(title=title, ylim=(0, 1.1))
        below.set(xlabel="layer")
    grid[0, 0].set_ylabel(r"$v^2/\sigma^2$")
    grid[1, 0].set_ylabel(r"$\log_{10}$ squared gradient")
    grid[0, -1].legend(fontsize="x-small", loc="lower center")
    return np.asarray(grid)
