"""Which setting makes the paper's curves: ``python book/settings.py DATA [NAME ...]``.

Each run is one record in ``results/settings``; a run that was killed goes on from its
checkpoint in DATA. The plan stands in the README beside the records.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import svlib as sv

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
    for rate in (
        0.001,
        0.0008,
    ):  # total init read 1.32 at 0.002, 1.42 at 0.001
        for kind in ("total", "sample", "batchnorm"):
            add("from-zero", kind, rate, 5_000, 0, centred=False)
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


if __name__ == "__main__":
    main()
