"""Chapter 5, decided: held-out errors, rates at full length, and other settings."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats
from svlib.experiments.comparison import (
    at_rates,
    best_rates,
    mean_loss,
    ratio,
)

import claims
import long_runs
from runs import PAIRS, TITLES

STORED = {
    "constant": (
        "overnight/length-cifar10-*.nc",
        "overnight/slow-cifar10-*.nc",
        "settings/constant-*.nc",
    ),
    "from-zero": ("settings/from-zero-*.nc",),
    "cosine": ("settings/cosine-*.nc",),
}
POINT = ["initialization", "learning_rate", "seed"]
MEASURES = ["loss", "held_out_loss", "held_out_error"]
END = 20_000  # iterations of the long runs on CIFAR-10


def ends(name: str, moment: int = END) -> xr.Dataset:
    """Training loss about an iteration, held-out loss and error at it, of one set of runs.

    Each is (initialization, learning_rate, seed): NaN where there is no such run or it
    was not measured then, infinite where it diverged.
    """
    folder, parts = claims.RESULTS, []
    for pattern in STORED[name]:
        for path in sorted(folder.glob(pattern)):
            record = xr.load_dataset(path, engine="scipy")
            if "seed" not in record.dims:  # the record of one run
                record["diverged"] = record.attrs["diverged"]
                record = record.expand_dims(
                    {key: [record.attrs[key]] for key in POINT}
                )
            held = record.reindex(probed=[moment]).isel(probed=0)
            found = held[MEASURES[1:]].assign(
                loss=long_runs.at(record.loss, moment)
            )
            found = found.where(~(record.diverged >= 0), np.inf)
            frame = found[MEASURES].to_dataframe().reset_index()
            parts.append(frame[POINT + MEASURES])
    joined = pd.concat(parts).dropna(subset="loss").set_index(POINT)
    return xr.Dataset.from_dataframe(joined)


def best() -> pd.DataFrame:
    """The rate that is best at the end, of those that were run, by initialization."""
    return best_rates(ends("constant").loss)


def paired(measure: str) -> xr.Dataset:
    """Total over sample init at the end, each at its best rate there."""
    rates = best().learning_rate[["total", "sample"]]
    chosen = {str(kind): float(rate) for kind, rate in rates.items()}
    return ratio(
        at_rates(ends("constant")[measure], chosen), "total", "sample"
    )


def spread(values: xr.DataArray, scale: float, digits: int) -> str:
    """Mean ± standard error over seeds, in words."""
    found = values.values[np.isfinite(values.values)] * scale
    if not len(found):
        return ""
    text = f"{found.mean():.{digits}f}"
    if len(found) == 1:
        return text
    return f"{text} ± {stats.sem(found):.{digits}f}"


def lines(name: str, moment: int = END) -> list[tuple[str, ...]]:
    """Every cell of one set of runs: losses and held-out errors at an iteration."""
    found: list[tuple[str, ...]] = []
    table = ends(name, moment)
    for kind, title in TITLES.items():
        for rate in table.learning_rate.values:
            cell = table.sel(initialization=kind, learning_rate=rate)
            if seeds := int(cell.loss.notnull().sum()):
                found.append(
                    (
                        title,
                        f"{rate:g}",
                        str(seeds),
                        spread(cell.loss, 1, 3),
                        spread(cell.held_out_loss, 1, 2),
                        spread(cell.held_out_error, 100, 1),
                    )
                )
    return found


def at_one_rate(moment: int) -> pd.DataFrame:
    """Losses about a moment on CIFAR-10 by seed: total init, slower, sample init.

    Slower is total init at the rate of sample init. The columns ``own`` and ``same``
    are the ratios of the two to sample init.
    """
    losses = ends("constant", moment).loss
    cells = {
        "total": ("total", 0.03),
        "slower": ("total", 0.01),
        "sample": ("sample", 0.01),
    }
    table = pd.DataFrame(
        {
            key: losses.sel(
                initialization=kind, learning_rate=rate
            ).to_pandas()
            for key, (kind, rate) in cells.items()
        }
    ).dropna()
    table["own"] = table.total / table["sample"]
    table["same"] = table.slower / table["sample"]
    return table


def held_out_error(task: str) -> xr.DataArray:
    """Fraction of wrong images or pixels (initialization, seed, probed), the long runs."""
    folder = claims.RESULTS / "overnight"
    parts = [
        xr.load_dataset(
            folder / f"length-{task}-{kind}.nc", engine="scipy"
        ).held_out_error.isel(learning_rate=0, drop=True)
        for kind in TITLES
    ]
    joined: xr.DataArray = xr.concat(parts, "initialization")
    return joined


def held_out_lines() -> list[tuple[str, ...]]:
    """Held-out errors of the long runs in per cent, mean ± standard error over seeds."""
    lines = []
    for task, moments in long_runs.MOMENTS.items():
        errors = held_out_error(task)
        for moment in moments:
            cells = [
                spread(
                    errors.sel(initialization=kind, probed=moment),
                    100,
                    1,
                )
                for kind in TITLES
            ]
            name = "CIFAR-10" if task == "cifar10" else task
            lines.append((name, f"{moment:,}", *cells))
    return lines


def points(above: str, below: str) -> tuple[float, float]:
    """Held-out error above another's, in points, and half its 95 % interval."""
    errors = held_out_error("cifar10").sel(probed=END)
    apart = 100 * (
        errors.sel(initialization=above)
        - errors.sel(initialization=below)
    )
    half = stats.t.ppf(0.975, apart.size - 1) * stats.sem(apart)
    return float(apart.mean()), float(half)


def sixteen_at(rate: float) -> xr.Dataset:
    """Total over sample init on micrographs, sixteen seeds, both at one rate."""
    path = claims.RESULTS / "overnight" / "tie-micrographs.nc"
    losses = mean_loss(xr.load_dataset(path, engine="scipy"), 500)
    both = dict.fromkeys(("total", "sample"), rate)
    return ratio(at_rates(losses, both), "total", "sample")


def better_rates() -> tuple[dict[str, float], dict[str, float]]:
    """The best rates on micrographs at 600 iterations: of six seeds, and of sixteen."""
    found = []
    for name in ("training-micrographs", "overnight/tie-micrographs"):
        record = xr.load_dataset(
            claims.RESULTS / f"{name}.nc", engine="scipy"
        )
        rates = best_rates(mean_loss(record, 500)).learning_rate
        found.append({str(k): float(rate) for k, rate in rates.items()})
    return found[0], found[1]


def from_zero_lines(rate: float) -> list[tuple[str, ...]]:
    """Images in [0, 1], all three at one rate: losses and ratios beside the paper's."""
    theirs = long_runs.paper()
    theirs = theirs[theirs.task == "cifar10"].pivot(
        index="iteration", columns="initialization", values="loss"
    )
    lines = []
    for moment in (1_000, 3_000, 5_000):
        losses = ends("from-zero", moment).loss.sel(
            learning_rate=rate, seed=0
        )
        ours = {
            kind: float(losses.sel(initialization=kind))
            for kind in TITLES
        }
        cells = [f"{ours[kind]:.3f}" for kind in TITLES]
        for a, b in PAIRS:
            read = theirs.reindex([moment])
            paper = float((read[a] / read[b]).iloc[0])
            told = "" if np.isnan(paper) else f" ({paper:.2f})"
            cells.append(f"{ours[a] / ours[b]:.2f}{told}")
        lines.append((f"{moment:,}", *cells))
    return lines


def claimed() -> dict[str, tuple[float, ...]]:
    """Total over sample init on CIFAR-10, three seeds, by the names of the claims."""
    last = paired("loss")
    early = ends("constant", 1_000).loss
    both = dict.fromkeys(("total", "sample"), 0.01)
    first = ratio(at_rates(early, both), "total", "sample")
    end = (float(last.ratio), float(last.error), 3)
    return {
        "cifar10_long_total_sample": end,
        "cifar10_long_total_sample_size": end,
        "cifar10_one_rate_total_sample": (
            float(first.ratio),
            float(first.error),
            3,
        ),
    }


def listed(values: pd.Series) -> str:
    """Numbers in words: 0.97, 0.93 and 0.98."""
    *most, last = (f"{value:.2f}" for value in values)
    return f"{', '.join(most)} and {last}"


def interval(found: xr.Dataset) -> str:
    """A ratio with its 95 % interval, in words."""
    middle, low, high = (
        float(found[name]) for name in ("ratio", "low", "high")
    )
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
