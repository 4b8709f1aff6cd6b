"""Tables and selections of chapter 5, from records of training runs."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import svlib as sv
import xarray as xr
from svlib.experiments.comparison import (
    at_rates,
    best_rates,
    mean_loss,
    ratio,
)
from svlib.experiments.training import (
    INITIALIZATIONS,
    Experiment,
    initialized,
)

TITLES = {
    "total": "total init",
    "sample": "sample init",
    "batchnorm": "BatchNorm",
}
PAIRS = (("total", "sample"), ("sample", "batchnorm"))
FINAL = 100  # iterations at the end that count


def load(path: str) -> xr.Dataset:
    """A stored record."""
    return xr.load_dataset(path, engine="scipy")


def final(record: xr.Dataset) -> xr.DataArray:
    """Mean loss of the last iterations of every run."""
    return mean_loss(record, int(record.attrs["iterations"]) - FINAL)


def rates(losses: xr.DataArray) -> dict[str, float]:
    """The best rate of each initialization."""
    best = best_rates(losses).learning_rate
    return {str(kind): float(rate) for kind, rate in best.items()}


def start(data: str, width: int) -> dict[str, pd.DataFrame]:
    """The layers of each initialization before training, on held-out data."""
    split = (
        sv.data.digits()
        if data == "digits"
        else sv.data.membranes(seed=0)
    )
    tables = {}
    for kind in INITIALIZATIONS:
        calibration = 32 if data == "membranes" else 128
        experiment = Experiment(
            data,
            kind,
            width,
            iterations=1,
            batch_size=8,
            calibration=calibration,
        )
        model = initialized(experiment, seed=0)
        tables[kind] = sv.probe(model, split.held_out_images)
    return tables


def tuned(
    record: xr.Dataset, best: dict[str, float]
) -> dict[str, xr.Dataset]:
    """Each initialization's runs at its best rate."""
    return {
        TITLES[kind]: record.sel(
            initialization=kind, learning_rate=rate
        )
        for kind, rate in best.items()
    }


def about(record: xr.Dataset) -> dict[str, object]:
    """A record in words and numbers."""
    attrs = record.attrs
    return {
        "channels": attrs["width"],
        "iterations": attrs["iterations"],
        "images in a batch": attrs["batch_size"],
        "images in the calibration batch": attrs["calibration"],
        "runs": int(record.diverged.count()),
        "of them diverged": int((record.diverged >= 0).sum()),
        "hours, all together": round(attrs["wall_time"] / 3600, 1),
        "device": attrs["device"],
        "copy of the data": attrs["source"],
        "its SHA-256 begins with": attrs["sha256"][:12],
    }


def told(
    losses: xr.DataArray, above: str, below: str, at: dict[str, float]
) -> str:
    """A ratio with its interval, in words."""
    found = ratio(at_rates(losses, at), above, below)
    if not float(found.ratio) > 0:
        return "diverged"
    middle, low, high = (
        float(found[x]) for x in ("ratio", "low", "high")
    )
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def compared(
    moments: dict[str, xr.DataArray], best: dict[str, float]
) -> pd.DataFrame:
    """Every pair at the best rate of each, and at equal rates."""
    losses = next(iter(moments.values()))
    settings = {"each at its best": best} | {
        f"both at {rate:g}": dict.fromkeys(INITIALIZATIONS, float(rate))
        for rate in losses.learning_rate.values
    }
    columns = {
        (when, f"{TITLES[a]} / {TITLES[b]}"): {
            label: told(found, a, b, at)
            for label, at in settings.items()
        }
        for when, found in moments.items()
        for a, b in PAIRS
    }
    return pd.DataFrame(columns)


def held_out(
    record: xr.Dataset, best: dict[str, float], measures: Sequence[str]
) -> pd.DataFrame:
    """Held-out measures at the moments probed, averaged over seeds."""
    chosen = at_rates(record[list(measures)], best).mean("seed")
    tables = {}
    for name in measures:
        table = pd.DataFrame(chosen[name].to_pandas()).rename(TITLES)
        tables[name.replace("held_out_", "held-out ")] = table
    found = pd.concat(tables).round(3)
    return found.rename_axis(columns="iteration", index=["", ""])


def diverged(records: dict[str, xr.Dataset]) -> pd.DataFrame:
    """How many seeds diverged, by initialization and learning rate."""
    lost = {}
    for name, record in records.items():
        count = pd.DataFrame(
            (record.diverged >= 0).sum("seed").to_pandas()
        )
        lost[name] = count.rename(TITLES).T
    counts: pd.DataFrame = pd.concat(lost, axis=1).sort_index()
    texts = counts.astype("Int64").astype(object)
    return texts.where(counts.notna(), "")


def costs(record: xr.Dataset) -> dict[str, float]:
    """Times, each over that of an iteration of total init."""
    over = ["learning_rate", "seed"]
    step = record.seconds_per_iteration.median(over)
    once = record.initialization_seconds.median(over)
    unit = step.sel(initialization="total")
    times = {
        "one initialization, total init": once.sel(
            initialization="total"
        ),
        "one initialization, sample init": once.sel(
            initialization="sample"
        ),
        "every iteration, BatchNorm": step.sel(
            initialization="batchnorm"
        ),
    }
    return {name: float(time / unit) for name, time in times.items()}


def claimed(
    key: str, moments: dict[str, xr.DataArray], best: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Ratios at the best rates with their standard errors, by the names of the claims."""
    found = {}
    for when, losses in moments.items():
        for a, b in PAIRS:
            one = ratio(at_rates(losses, best), a, b)
            found[f"{key}_{when}_{a}_{b}"] = (
                float(one.ratio),
                float(one.error),
            )
    return found


def draw_tasks(networks: dict[str, pd.DataFrame]) -> None:
    """A drawn micrograph and its mask; sides and channels of both networks' layers."""
    split = sv.data.membranes(2, 1, size=128, seed=3)
    panels = plt.subplots(1, 4, figsize=(8, 2.4), layout="constrained")[
        1
    ]
    drawn = {"input": split.images[0, 0], "label": split.labels[0]}
    for panel, (title, image) in zip(
        panels, drawn.items(), strict=False
    ):
        panel.imshow(image.squeeze(), cmap="gray")
        panel.set(title=title, xticks=[], yticks=[])
        panel.grid(visible=False)
    for panel, (title, table) in zip(
        panels[2:], networks.items(), strict=True
    ):
        sides = [shape[-1] for shape in table["shape"]]
        panel.bar(range(len(sides)), sides)
        panel.set(title=title, xlabel="convolution")
    panels[2].set_ylabel("pixels a side")
