"""Which setting makes the paper's curves: ``python book/settings.py DATA [NAME ...]``.

``python book/settings.py summary`` prints what was found.

Each run is one record in ``results/settings``; a run that was killed goes on from its
checkpoint in DATA. The plan stands in the README beside the records.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import svlib as sv
import xarray as xr

RESULTS = Path(__file__).parent / "results" / "settings"
COMMON: dict[str, Any] = {
    "data": "cifar10", "width": 24, "calibration": 256, "channels_last": True,
}  # fmt: skip


def runs() -> dict[str, tuple[dict[str, Any], int]]:
    """Experiments and seeds by the name of their record, in the order of the plan."""
    found: dict[str, tuple[dict[str, Any], int]] = {}

    def add(
        name: str,
        kind: str,
        rate: float,
        iterations: int,
        seed: int,
        **more: Any,
    ) -> None:
        moments = tuple(
            at for at in (1_000, 5_000, 10_000) if at < iterations
        )
        experiment = COMMON | {
            "initialization": kind, "learning_rate": rate, "iterations": iterations,
            "probed": moments,
        }  # fmt: skip
        found[f"{name}-{kind}-{rate:g}-{seed}"] = (
            experiment | more,
            seed,
        )

    # 1. images in [0, 1], not centred: rates about that of a quick trial, then all at it
    for rate in (0.002, 0.004):
        add("from-zero", "total", rate, 5_000, 0, centred=False)
    for kind in ("sample", "batchnorm"):
        add("from-zero", kind, 0.002, 5_000, 0, centred=False)
    # 2. constant rates at full length: the missing cells
    add("constant", "total", 0.01, 20_000, 2)
    for seed in range(3):
        add("constant", "sample", 0.03, 20_000, seed)
        add("constant", "sample", 0.003, 20_000, seed)
        add("constant", "total", 0.003, 20_000, seed)
    # 3. rates that decay
    for seed in range(2):
        for kind in ("total", "sample", "batchnorm"):
            add("cosine", kind, 0.01, 10_000, seed, schedule="cosine")
    return found


def main() -> None:
    """Run what is named, or everything, and store each record as soon as it is there."""
    folder, *names = sys.argv[1:]
    if folder == "summary":
        rates = at_one_rate()
        logs = np.log((rates.total / rates["sample"]).to_numpy(float))
        half = (
            4.303 * float(logs.std(ddof=1)) / 3**0.5
        )  # Student's t, three seeds
        bounds = np.exp(
            float(logs.mean()) + half * np.array([0, -1, 1])
        )
        print(
            not_centred().round(3),
            rates.round(4),
            bounds.round(3),
            sep="\n",
        )
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, (experiment, seed) in runs().items():
        path = RESULTS / f"{name}.nc"
        if path.exists() or (names and name not in names):
            continue
        record = sv.training.run(
            experiment, seed, folder=folder, checkpoints=folder
        )
        record.to_netcdf(path, engine="scipy")
        print(name, float(record.loss[-20:].mean()), flush=True)


def near(record: xr.Dataset, moment: int, width: int = 250) -> float:
    """Mean training loss about a moment."""
    chosen = abs(record.iteration - moment) < width
    return float(record.loss.where(chosen, drop=True).mean())


def not_centred() -> pd.DataFrame:
    """Losses and ratios of images in [0, 1] at one rate, by iteration."""
    kinds = ("total", "sample", "batchnorm")
    held = {kind: load(f"from-zero-{kind}-0.002-0") for kind in kinds}
    moments = (1_000, 3_000, 4_750)
    table = pd.DataFrame(
        {k: [near(x, m) for m in moments] for k, x in held.items()},
        moments,
    )
    table["total/sample"] = table.total / table["sample"]
    table["sample/batchnorm"] = table["sample"] / table.batchnorm
    return table


def at_one_rate() -> pd.DataFrame:
    """Total and sample init at 0.01, 20,000 iterations, by seed: loss, held-out error."""
    folder = RESULTS.parent / "overnight"
    before = xr.load_dataset(
        folder / "slow-cifar10-total.nc", engine="scipy"
    ).squeeze()
    total = [
        before.sel(seed=0),
        before.sel(seed=1),
        load("constant-total-0.01-2"),
    ]
    sample = xr.load_dataset(
        folder / "length-cifar10-sample.nc", engine="scipy"
    ).squeeze()
    rows = []
    for seed, mine in enumerate(total):
        other = sample.sel(seed=seed)
        rows.append(
            {
                "total": near(mine, 19_750),
                "sample": near(other, 19_750),
                "error, total": float(mine.held_out_error[-1]),
                "error, sample": float(other.held_out_error[-1]),
            }
        )
    return pd.DataFrame(rows).rename_axis("seed")


def load(name: str) -> xr.Dataset:
    """A stored record."""
    return xr.load_dataset(RESULTS / f"{name}.nc", engine="scipy")


if __name__ == "__main__":
    main()
