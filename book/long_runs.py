"""The longer runs of chapter 5 beside the paper's curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import svlib as sv
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray
from svlib.experiments.comparison import (
    at_rates,
    best_rates,
    mean_loss,
    ratio,
)

import claims
from runs import PAIRS, TITLES

TASKS = {"cifar10": "ALLCNN-C", "micrographs": "UNET"}
MOMENTS = {"cifar10": (5_000, 20_000), "micrographs": (5_000, 10_000)}
BINS = 40  # of a curve
NEAR = 500  # iterations on either side of a moment, as far as there are


def load(task: str) -> xr.DataArray:
    """Losses (initialization, seed, iteration), each initialization at its own rate."""
    folder = claims.RESULTS / "overnight"
    parts = []
    for kind in TITLES:
        path = folder / f"length-{task}-{kind}.nc"
        record = xr.load_dataset(path, engine="scipy")
        rate = float(record.learning_rate[0])
        one = record.loss.isel(learning_rate=0, drop=True)
        parts.append(one.assign_coords(rate=("initialization", [rate])))
    joined: xr.DataArray = xr.concat(
        parts, "initialization", join="inner"
    )
    return joined


def paper() -> pd.DataFrame:
    """The curves of the paper's figure, read off: task, initialization, iteration, loss."""
    table = pd.read_csv(claims.RESULTS / "paper-learning-curves.csv")
    names = {title: kind for kind, title in TITLES.items()}
    tasks = {name: task for task, name in TASKS.items()}
    return table.assign(
        task=table.network.map(tasks),
        initialization=table.init.map(names),
    )


def binned(losses: xr.DataArray) -> xr.DataArray:
    """Means over windows of equal length."""
    size = losses.sizes["iteration"] // BINS
    return losses.coarsen(iteration=size, boundary="trim").mean()


def read_off(task: str, kind: str) -> pd.DataFrame:
    """The paper's curve of one initialization: iteration, loss."""
    table = paper()
    return table[(table.task == task) & (table.initialization == kind)]


def draw_losses(
    losses: Mapping[str, xr.DataArray], task: str, axes: Axes
) -> None:
    """Our curves (iteration,) by initialization, and the paper's points."""
    for index, (kind, loss) in enumerate(losses.items()):
        look, curve = sv.plot.look(index), binned(loss)
        axes.plot(
            curve.iteration,
            curve,
            label=TITLES[kind],
            **look,
            markevery=8,
        )
        theirs = read_off(task, kind)
        axes.scatter(
            theirs.iteration, theirs.loss, s=14, color=look["color"]
        )
    axes.set(yscale="log", ylabel="training loss")


def draw_ratios(losses: xr.DataArray, task: str, axes: Axes) -> None:
    """Ratios of losses paired over seeds, with the range of the seeds, and the paper's."""
    curves, read = binned(losses), paper()
    theirs = read[read.task == task].pivot(
        index="iteration", columns="initialization", values="loss"
    )
    for index, (a, b) in enumerate(PAIRS):
        look = sv.plot.look(index + 3)
        each = curves.sel(initialization=a) / curves.sel(
            initialization=b
        )
        label = f"{TITLES[a]} / {TITLES[b]}"
        axes.plot(
            each.iteration,
            each.mean("seed"),
            label=label,
            **look,
            markevery=8,
        )
        axes.fill_between(
            each.iteration,
            each.min("seed"),
            each.max("seed"),
            color=look["color"],
            alpha=0.25,
            linewidth=0,
        )
        points = (theirs[a] / theirs[b]).dropna()
        axes.scatter(points.index, points, s=14, color=look["color"])
    axes.axhline(1, color=sv.plot.GREY, linewidth=1)
    axes.set(xscale="log", xlabel="iteration", ylabel="ratio of losses")


def at(losses: xr.DataArray, moment: int) -> xr.DataArray:
    """Mean losses about a moment, of the last iterations at the end."""
    near = losses.iteration
    return losses[
        ..., (near >= moment - NEAR) & (near < moment + NEAR)
    ].mean("iteration")


def ratios() -> pd.DataFrame:
    """Ratios at the moments that the paper's figure is read at, with 95 % intervals."""
    rows, read = [], paper()
    for task, moments in MOMENTS.items():
        losses = load(task)
        for moment in moments:
            theirs = read[
                (read.task == task) & (read.iteration == moment)
            ]
            loss = theirs.set_index("initialization").loss
            for a, b in PAIRS:
                found = ratio(at(losses, moment), a, b)
                rows.append(
                    {
                        "task": task,
                        "iteration": moment,
                        "above": a,
                        "below": b,
                        "ratio": float(found.ratio),
                        "low": float(found.low),
                        "high": float(found.high),
                        "error": float(found.error),
                        "paper": loss[a] / loss[b],
                    }
                )
    return pd.DataFrame(rows)


def lines(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """The rows of :func:`ratios` in words."""
    names = {"cifar10": "CIFAR-10", "micrographs": "micrographs"}
    return [
        (
            names[str(row.task)],
            f"{row.iteration:,}",
            f"{TITLES[str(row.above)]} / {TITLES[str(row.below)]}",
            f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
            f"{row.paper:.2f}",
        )
        for row in table.itertuples()
    ]


def rates() -> pd.DataFrame:
    """Losses of the rates that were tried first: the mean over the last tenth."""
    rows = []
    for path in sorted(
        (claims.RESULTS / "overnight").glob("rates-*.nc")
    ):
        record = xr.load_dataset(path, engine="scipy")
        task = "CIFAR-10" if "cifar10" in path.name else "micrographs"
        for kind in record.initialization.values:
            losses = mean_loss(record).sel(initialization=kind, seed=0)
            for rate in losses.learning_rate.values:
                loss = float(losses.sel(learning_rate=rate))
                rows.append(
                    (task, TITLES[str(kind)], float(rate), loss)
                )
    names = ["task", "initialization", "learning rate", "loss"]
    table = pd.DataFrame(rows, columns=names)
    return table.pivot(index=names[:2], columns=names[2], values="loss")


def sixteen() -> xr.Dataset:
    """Total over sample init on micrographs, sixteen seeds, each at its better rate."""
    path = claims.RESULTS / "overnight" / "tie-micrographs.nc"
    losses = mean_loss(xr.load_dataset(path, engine="scipy"), 500)
    best = best_rates(losses).learning_rate
    rates = {str(kind): float(rate) for kind, rate in best.items()}
    return ratio(at_rates(losses, rates), "total", "sample")


def during(rounded: bool = True) -> pd.DataFrame:
    """v²/σ² at the last layer but one, held-out loss, gradient norm while training."""
    rows = []
    for task, title in (
        ("cifar10", "CIFAR-10"),
        ("micrographs", "micrographs"),
    ):
        for kind, name in TITLES.items():
            path = (
                claims.RESULTS
                / "overnight"
                / f"length-{task}-{kind}.nc"
            )
            record = xr.load_dataset(path, engine="scipy").mean("seed")
            one = record.isel(
                initialization=0, learning_rate=0, layer=-2
            )
            for moment in one.probed.values:
                here = one.sel(probed=moment)
                near = (
                    abs(
                        here.iteration - min(moment, here.iteration[-1])
                    )
                    < 50
                )
                rows.append(
                    {
                        "task": title,
                        "initialization": name,
                        "iteration": int(moment),
                        "v²/σ², samples": float(
                            here.v2 / (here.v2 + here.m2)
                        ),
                        "v²/σ², units": float(
                            here.v2_units
                            / (here.v2_units + here.m2_units)
                        ),
                        "held-out loss": float(here.held_out_loss),
                        "gradient norm": float(
                            here.gradient_norm[near].mean()
                        ),
                    }
                )
    keys = ["task", "initialization", "iteration"]
    table = pd.DataFrame(rows).set_index(keys)
    return table.round(2) if rounded else table


def layer_variant() -> dict[str, float]:
    """Final loss of total init that subtracts layer means, over total init's, same seed."""
    found = {}
    for task in TASKS:
        folder = claims.RESULTS / "overnight"
        variant, plain = (
            xr.load_dataset(folder / name, engine="scipy").loss.sel(
                seed=0
            )
            for name in (f"layer-{task}.nc", f"length-{task}-total.nc")
        )
        last = MOMENTS[task][-1]
        ends = [float(at(x, last).squeeze()) for x in (variant, plain)]
        found[task] = ends[0] / ends[1]
    return found


def claimed(table: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """The last moments of :func:`ratios`, three seeds each, by the names of the claims."""
    found: dict[str, tuple[float, ...]] = {}
    for row in table.itertuples():
        if row.iteration == MOMENTS[str(row.task)][-1]:
            name = f"{row.task}_long_{row.above}_{row.below}"
            found[name] = (
                float(str(row.ratio)),
                float(str(row.error)),
                3,
            )
            found[f"{name}_size"] = found[name]
    last = sixteen()
    found["micrographs_sixteen"] = (
        float(last.ratio),
        float(last.error),
    )
    return found


FAR = {
    "cifar10": (20_000, 40_000, 60_000, 80_000, 100_000),
    "micrographs": (10_000, 20_000, 30_000),
}


def far_losses(task: str) -> dict[str, xr.DataArray]:
    """Losses (iteration,) of the longest runs, one seed, by initialization."""
    folder = claims.RESULTS / "overnight"
    return {
        kind: xr.load_dataset(
            folder / f"far-{task}-{kind}.nc", engine="scipy"
        ).loss.squeeze(drop=True)
        for kind in TITLES
    }


def far() -> pd.DataFrame:
    """Losses of the longest runs, and the nearest that was read off the paper's figure."""
    rows = {}
    for task, moments in FAR.items():
        losses = far_losses(task)
        for moment in moments:
            for kind, title in TITLES.items():
                theirs = read_off(task, kind)
                away = abs(theirs.iteration - moment)
                near = away.min() <= moment / 10
                until = losses[kind].sel(iteration=slice(moment - 1))
                rows[task, moment, title] = {
                    "ours": float(at(until, moment)),
                    "paper": theirs.loss.iloc[int(away.argmin())]
                    if near
                    else float("nan"),
                }
    found = pd.DataFrame(rows).T
    found.index.names = ["task", "iteration", "initialization"]
    return found


def far_lines() -> list[tuple[str, ...]]:
    """The rows of :func:`far` in words: ours, and the paper's in brackets."""
    found, lines = far().round(3), []
    for task, moments in FAR.items():
        for moment in moments:
            cells = []
            for title in TITLES.values():
                ours, theirs = map(
                    float, found.xs((task, moment, title))
                )
                mine = "not run" if np.isnan(ours) else f"{ours:.3f}"
                read = "" if np.isnan(theirs) else f" ({theirs:.3f})"
                cells.append(mine + read)
            name = "CIFAR-10" if task == "cifar10" else task
            lines.append((name, f"{moment:,}", *cells))
    return lines


def draw_during(panels: NDArray[Any]) -> None:
    """v²/σ², held-out loss, gradient norm while training; a row for each task."""
    found = during(rounded=False)
    for row, task in zip(
        panels, ("CIFAR-10", "micrographs"), strict=True
    ):
        names = ("v²/σ², units", "held-out loss", "gradient norm")
        for panel, name in zip(row, names, strict=True):
            table = found.loc[task][name].unstack("initialization")
            for index, title in enumerate(TITLES.values()):
                values = table[title]
                panel.plot(values, label=title, **sv.plot.look(index))
            panel.set_xscale("symlog", linthresh=100)
            panel.set_xticks([0, 100, 10000], ["0", "100", "10,000"])
            panel.set(ylabel=name, ylim=(0, None))
        row[0].set_title(task, loc="left")
    for panel in panels[-1]:
        panel.set_xlabel("iteration")
    panels[0, 0].legend(fontsize="small")
