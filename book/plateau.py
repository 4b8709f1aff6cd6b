"""The plateau of m/v at finite width: the law in 1/width against deep random networks.

``python book/plateau.py`` writes ``results/plateau.csv``, in some twenty minutes on
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
    128: 16000,
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
    return (
        x / x.norm(dim=1, keepdim=True)
        if case.endswith("unit norm")
        else x
    )


def law(case: str, width: int) -> dict[str, np.ndarray]:
    """The parts of v^2 over m^2 by layer.

    They follow from the spread of the inputs' norms and from their
    correlations. Where these differ from pair to pair, as in images, the
    parts are averages over pairs, in a dozen groups of near correlation.
    """
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
    rho = np.mean([x.m2 / (x.m2 + x.angular) for x in laws], axis=0)
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # white: m2 = 0
        radial = np.mean([x.radial / x.m2 for x in laws], axis=0)
        rest = np.mean([x.remainder / x.m2 for x in laws], axis=0)
        angular = 1 / rho - 1
    return {
        "angular": angular,
        "radial": cv2 + radial,
        "remainder": rest,
    }


def activation(case: str) -> dict[str, Any]:
    if case.startswith("leaky"):
        return {"activation": "leaky_relu", "negative_slope": 0.2}
    return {}


def simulate(
    case: str, width: int, first: int, networks: int
) -> xr.Dataset:
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
    parts = {
        f"{name}_over_m2": name for name in ("v2", "angular", "radial")
    }
    kept: xr.Dataset = record[list(parts)].sel(layer=list(LAYERS))
    return kept.rename(parts)


def table() -> pd.DataFrame:
    """The stored record, with the law and the measured excess over it."""
    found = pd.read_csv(RESULTS / "plateau.csv")
    law = (
        found["law angular"]
        + found["law radial"]
        + found["law remainder"]
    )
    found["per cent"] = 100 * (found.v2 / law - 1)
    found["error"] = 100 * found["v2 error"] / law
    found["N v²/m², measured"] = found.width * found.v2
    found["law"] = found.width * law
    return found


def by_layer(found: pd.DataFrame, layers: list[int]) -> pd.DataFrame:
    """The excess in per cent with its error: cases and widths by layer."""
    pairs = zip(found["per cent"], found["error"], strict=True)
    cells = found.assign(text=[f"{x:+.1f} ± {e:.1f}" for x, e in pairs])
    whole = cells.pivot_table(
        index=["case", "width"],
        columns="layer",
        values="text",
        aggfunc="first",
        sort=False,
    )
    return whole[layers]


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
            record = xr.concat(
                sv.sweep.run(simulate, points, store), "network"
            )
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
                    row |= {
                        f"{part} error": float(
                            at[part].sel(statistic="error")
                        )
                    }
                row |= {
                    f"law {part}": float(values[layer])
                    for part, values in expected.items()
                }
                rows.append(row)
            pd.DataFrame(rows).to_csv(
                RESULTS / "plateau.csv",
                index=False,
                float_format="%.6g",
            )
            print(case, width, flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else RESULTS / "plateau.store"
    )
