"""The plateau of m/v at finite width: the law in 1/width against deep random networks.

``python book/plateau.py`` writes ``results/plateau.csv``, in three quarters of an hour on
two cores. Finished points are kept in ``STORE`` (the first argument, by default
``results/plateau.store``), so that a second call goes on where the first one stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import svlib as sv
import torch
import xarray as xr
from sklearn.datasets import load_digits

RESULTS = Path(__file__).parent / "results"
SAMPLES, DEPTH = 32, 200
LAYERS = (5, 10, 20, 50, 100, 200)
NETWORKS = {
    16: 6000,
    32: 6000,
    64: 5000,
    128: 4000,
    256: 3000,
    512: 2000,
    1000: 2000,
}
CASES = {  # start of the networks: widths
    "white": tuple(NETWORKS),
    "first matrix": (64, 256),
    "unit norm": (64, 256),
    "leaky ReLU 0.2": (64, 256),
    "digits": (64, 256),
    "digits, unit norm": (64, 256),
}


def inputs(case: str, width: int) -> torch.Tensor | None:
    """The inputs of a case: (samples, features), or None where layer 0 is white noise."""
    if case in ("white", "leaky ReLU 0.2"):
        return None
    if case.startswith("digits"):
        x = torch.from_numpy(
            load_digits().data[:SAMPLES]
        )  # pixels from 0 to 16, as they come
    else:
        x = sv.data.gaussian(SAMPLES, width, seed=7)
    return x / x.norm(dim=1, keepdim=True) if case.endswith("unit norm") else x


def law(case: str, width: int) -> dict[str, np.ndarray]:
    """The parts of the law by layer, from what it needs to know of the inputs: the spread
    of their norms, and their correlations. Where these differ from pair to pair, as in
    images, the parts are averages over pairs, in a dozen groups of near correlation."""
    x, cv2, groups = inputs(case, width), 0.0, [np.zeros(1)]
    if x is not None:
        norms = x.double().norm(dim=1)
        cv2 = float(norms.var() / norms.mean() ** 2)
        if case.startswith("digits"):
            unit = (x / norms[:, None]).numpy()
            pairs = (unit @ unit.T)[np.triu_indices(SAMPLES, 1)]
            groups = np.array_split(np.sort(pairs), 12)
    laws = [
        sv.theory.finite_width(
            width, DEPTH, rho0=float(group.mean()), **activation(case)
        )
        for group in groups
    ]
    correlation = np.mean([1 / (1 + each.angular) for each in laws], axis=0)
    with np.errstate(divide="ignore"):
        angular = 1 / correlation - 1
    radial, remainder = (
        np.mean([getattr(each, part) for each in laws], axis=0)
        for part in ("radial", "remainder")
    )
    return {"angular": angular, "radial": cv2 + radial, "remainder": remainder}


def activation(case: str) -> dict[str, Any]:
    if case.startswith("leaky"):
        return {"activation": "leaky_relu", "negative_slope": 0.2}
    return {}


def simulate(case: str, width: int, first: int, networks: int) -> xr.Dataset:
    """v^2/m^2 and its parts in one block of networks."""
    record = sv.simulate(
        width,
        DEPTH,
        networks=range(first, first + networks),
        samples=SAMPLES,
        seed=11,
        inputs=inputs(case, width),
        progress=False,
        **activation(case),
    )
    parts = record[["v2", "angular", "radial"]] / record.m2
    kept: xr.Dataset = parts.sel(layer=list(LAYERS)).assign_attrs(record.attrs)
    return kept


def main(store: Path) -> None:
    rows = []
    for case, widths in CASES.items():
        for width in widths:
            block = NETWORKS[width] // 10
            points = [
                {
                    "case": case,
                    "width": width,
                    "first": k * block,
                    "networks": block,
                }
                for k in range(10)
            ]
            record = xr.concat(sv.sweep.run(simulate, points, store), "network")
            found = sv.summarize(record)
            expected = law(case, width)
            for layer in LAYERS:
                at = found.sel(layer=layer)
                row = {
                    "case": case,
                    "width": width,
                    "layer": layer,
                    "networks": int(at.alive),
                }
                for part in ("v2", "angular", "radial"):
                    row |= {part: float(at[part].sel(statistic="mean"))}
                    row |= {f"{part} error": float(at[part].sel(statistic="error"))}
                row |= {
                    f"law {part}": float(values[layer])
                    for part, values in expected.items()
                }
                rows.append(row)
            pd.DataFrame(rows).to_csv(
                RESULTS / "plateau.csv", index=False, float_format="%.6g"
            )
            print(case, width, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "plateau.store")
