"""Networks of the paper's ensemble that others published; run, this file simulates theirs.

WhestBench (Alignment Research Center and AIcrowd, 2026, arXiv:2605.05179, data CC-BY-4.0): L
matrices without biases, each followed by ReLU, weights of variance 2/N, inputs white noise. Its
``avg_variance``, the variance over inputs of the last activations averaged over units, is v² of
the next preactivation where σ² is 1 on average.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import svlib as sv

import claims

PATH = claims.RESULTS / "laws" / "published.csv"
# width, matrices: mean of avg_variance as published, ± one standard error over networks where given
PUBLISHED = {
    (256, 1): "0.6809 ± 0.0009",
    (256, 2): "0.506 ± 0.006",
    (256, 4): "0.331 ± 0.007",
    (256, 8): "0.178 ± 0.006",
    (256, 16): "0.094 ± 0.007",
    (256, 32): "0.0495; 0.055 ± 0.002",
    (512, 32): "0.040",
    (1024, 16): "0.0748",
}
# of the network 'kenneth-simmons' of aicrowd/whestbench-smoke-mlp@v1, from about 1,000 inputs
FIRST_WEIGHTS = (
    -0.04527774,
    -0.02478481,
    -0.07038717,
    0.13971251,
    0.11752415,
)
AVG_VARIANCE = 0.20255
LAST_MEANS = (1.942, 0.0193, 0.00016, 0.0407, 2.095)


def weights() -> list[np.ndarray]:
    """The eight matrices (inputs, units) of that network, rebuilt from its seed."""
    seed = np.random.SeedSequence(20260525).spawn(3)[0]
    random = np.random.default_rng(seed)
    scale = np.sqrt(2 / 256)
    return [
        (random.standard_normal((256, 256)) * scale).astype(np.float32)
        for _ in range(8)
    ]


def activations(count: int, seed: int = 0) -> list[np.ndarray]:
    """The network's activations (inputs, units), layer by layer, of white noise."""
    x = np.random.default_rng(seed).standard_normal(
        (count, 256), dtype=np.float32
    )
    found = []
    for matrix in weights():
        x = np.maximum(x @ matrix, 0)
        found.append(x)
    return found


def simulated(
    width: int, depth: int, networks: int, each: int = 20
) -> dict[str, float]:
    """Means over networks, 64 inputs through a first matrix, other inputs for ``each`` of them.

    Networks that share inputs are not independent: errors are those of the sets' means.
    """
    names = ("v2", "fraction", "v2_over_m2")
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for seed in range(networks // each):
        inputs = sv.data.gaussian(64, width, seed=seed)
        record = sv.simulate(
            width, depth, networks=each, inputs=inputs, seed=1000 + seed
        )
        for name in names:
            drawn[name].append(record[name].values[:, depth])
    row: dict[str, float] = {"networks": networks}
    for name, parts in drawn.items():
        values = np.stack(parts)
        means = values.mean(1)
        row[name] = means.mean()
        row[f"{name} error"] = means.std(ddof=1) / len(means) ** 0.5
        row[f"{name} spread"] = values.std(ddof=1) / row[name]
    return row


def read() -> dict[tuple[int, int], dict[str, float]]:
    """The stored means by width and number of matrices."""
    rows = pd.read_csv(PATH).to_dict("records")
    return {
        (int(row["width"]), int(row["depth"])): {
            str(key): float(value) for key, value in row.items()
        }
        for row in rows
    }


def lines() -> tuple[list[tuple[str, ...]], list[str]]:
    """Infinite width, law, simulation and published values, by ensemble."""
    rows = []
    stored = read()
    for (width, depth), published in PUBLISHED.items():
        found = stored[width, depth]
        spread = sv.theory.fluctuations(width, depth, samples=64)
        law = sv.theory.finite_width(width, depth, features=width)
        row = {
            "units, layers": f"{width}, {depth}",
            "infinite width": f"{sv.theory.trajectory(depth).fraction[-1]:.4f}",
            "law, v²/σ²": f"{law.fraction[-1]:.4f}",
            "simulated, v²/σ²": f"{found['fraction']:.4f} ± {found['fraction error']:.4f}",
            "simulated, v²": f"{found['v2']:.4f} ± {found['v2 error']:.4f}",
            "published, v²": published,
            "scatter of v²/m²": f"{found['v2_over_m2 spread']:.0%}",
            "its law": f"{spread.v2_over_m2[-1] * law.ratio[-1] ** 2:.0%}",
        }
        rows.append(row)
    return [tuple(row.values()) for row in rows], list(rows[0])


def main() -> None:
    """Simulate every ensemble and store the means."""
    rows = []
    for width, depth in PUBLISHED:
        networks = 4000 if width == 256 else 800
        rows.append(
            {"width": width, "depth": depth}
            | simulated(width, depth, networks)
        )
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(PATH, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
