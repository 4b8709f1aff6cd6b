"""Networks against the laws of chapters 4 and 7: ``python laws.py`` writes the tables.

Names of tables behind it select some: ``python laws.py drift orthogonal``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import svlib as sv
import torch
import xarray as xr
from matplotlib.figure import Figure
from svlib.theory import batchnorm
from svlib.theory.activations import NAMES
from tqdm import tqdm

import claims

FOLDER = claims.RESULTS / "laws"
DEPTH = 49
# networks by width
ONSET = {256: 12, 512: 8, 1024: 6, 2048: 4, 4096: 2}
# without normalization their scale runs away from He's fixed point
UNSTABLE = ("gelu", "gelu_tanh", "silu", "mish")


def mean_and_error(values: xr.DataArray) -> tuple[float, float]:
    """Over networks."""
    error = (
        values.std("network", ddof=1) / values.sizes["network"] ** 0.5
    )
    return float(values.mean("network")), float(error)


def drift() -> pd.DataFrame:
    """m²/σ² before BatchNorm, the ratio of averages, and m/v, by layer."""
    tables = {}
    for width, networks in {512: 96, 1024: 64, 2048: 32}.items():
        for batch in (32, 128, 256):
            record = sv.simulate(
                width,
                DEPTH,
                networks=networks,
                samples=batch,
                seed=width + batch,
                normalization="batch",
                dtype="float64",
                method="gram",
            )
            total = record.sigma2.mean("network")
            shared = record.m2.mean("network") / total
            rest = (record.m2 - shared * record.sigma2) / total
            found = {
                "m2": shared.values,
                "m2_error": [
                    mean_and_error(rest[:, k])[1]
                    for k in record.layer.values
                ],
            }
            ratio = [
                mean_and_error(record.ratio[:, k])
                for k in record.layer.values
            ]
            found["ratio"], found["ratio_error"] = zip(
                *ratio, strict=True
            )
            tables[width, batch] = pd.DataFrame(found)
            tables[width, batch].insert(0, "networks", networks)
    return pd.concat(tables, names=["width", "batch", "layer"])


def model() -> pd.DataFrame:
    """m²/σ² and m/v before BatchNorm by the reduced model, beyond the onset too."""
    tables = {}
    for width in (512, 1024, 2048):
        for batch in (256,):
            found = batchnorm.random_lengths(
                width, DEPTH, batch, networks=12, seed=width
            )
            with np.errstate(invalid="ignore"):
                ratio = np.sqrt(found / (1 - found))
            columns = {"m2": found, "ratio": ratio}
            error = {
                f"{k}_error": v.std(0, ddof=1) / 12**0.5
                for k, v in columns.items()
            }
            mean = {k: v.mean(0) for k, v in columns.items()}
            tables[width, batch] = pd.DataFrame(mean | error)
    return pd.concat(tables, names=["width", "batch", "layer"])


def saturation() -> pd.DataFrame:
    """m/v before BatchNorm far beyond the onset: width 512, 256 inputs."""
    record = sv.simulate(
        512,
        400,
        networks=6,
        samples=256,
        seed=9,
        normalization="batch",
        dtype="float64",
    )
    rows = [
        (k, *mean_and_error(record.ratio[:, k]))
        for k in (100, 200, 300, 400)
    ]
    names = ["layer", "ratio", "error"]
    return pd.DataFrame(rows, columns=names).set_index("layer")


def lengths(width: int, depth: int, batch: int, seed: int) -> Any:
    """The lengths' spread M after BatchNorm, by layer, in one ReLU network."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, width, generator=generator)
    found = []
    for layer in range(depth + 1):
        if layer > 0:
            weight = torch.randn(width, width, generator=generator)
            y = y.clamp_min(0) @ (weight * (2 / width) ** 0.5)
        y = (y - y.mean(0)) / y.std(0, correction=0)
        found.append(float(y.square().mean(1).var()))
    return np.array(found)


def onset() -> pd.DataFrame:
    """Where the lengths' spread is twice that of first order, in a large batch."""
    rows, batch = [], 4096
    for width, networks in ONSET.items():
        scale = batchnorm.onset(width)
        depth = int(1.5 * scale)
        first = 2 / width + batchnorm.TAU2 / width * np.arange(
            depth + 1
        )
        crossed = []
        for seed in range(networks):
            above = lengths(width, depth, batch, seed) > 2 * first
            if not above.any():
                raise RuntimeError(f"no onset in {depth} layers")
            crossed.append(above.argmax() / scale)
        measured = mean_and_error(xr.DataArray(crossed, dims="network"))
        rows.append((width, networks, batch, scale, *measured))
        print(rows[-1], flush=True)
    names = "width networks batch scale depth_over_scale error"
    table = pd.DataFrame(rows, columns=names.split())
    return table.set_index("width")


def frames(
    width: int, depth: int, networks: int, generator: torch.Generator
) -> torch.Tensor:
    """v²/m² at a layer of networks with orthogonal weights, of 16 orthogonal inputs.

    Such weights keep the inputs' products and turn them at random: units are drawn as a
    frame of these products, which costs no matrix of N by N.
    """
    size = (networks, 16, 16)
    product = torch.eye(16, dtype=torch.float64).expand(size)
    for layer in range(depth + 1):
        noise = torch.randn(
            *size[:2], width, generator=generator, dtype=torch.float64
        )
        lower = torch.linalg.cholesky(noise @ noise.mT / width)
        frame = torch.linalg.solve_triangular(lower, noise, upper=False)
        values, vectors = torch.linalg.eigh(product)
        root = vectors * values.clamp_min(0).sqrt()[:, None]
        z = root @ frame
        if layer < depth:
            a = z.clamp_min(0)
            product = a @ a.mT
            trace = product.diagonal(dim1=1, dim2=2).mean(1)
            product = product / trace[:, None, None]
    v2 = z.var(1).mean(1)
    m2 = z.mean(1).square().mean(1) - v2 / 16
    found: torch.Tensor = v2 / m2
    return found


def orthogonal() -> pd.DataFrame:
    """N v²/m² at layer 200 with orthogonal weights."""
    rows = []
    many = {64: 4800, 128: 3200, 256: 1600, 512: 800}
    for width, networks in many.items():
        generator = torch.Generator().manual_seed(width)
        blocks = [
            frames(width, 200, 16, generator)
            for _ in range(networks // 16)
        ]
        values = xr.DataArray(torch.cat(blocks).numpy(), dims="network")
        found = mean_and_error(width * values)
        law = sv.theory.finite_width(width, 200, weights="orthogonal")
        expected = width * law.v2[200] / law.m2[200]
        rows.append((width, networks, *found, expected))
    names = ["width", "networks", "measured", "error", "law"]
    return pd.DataFrame(rows, columns=names).set_index("width")


def norms() -> pd.DataFrame:
    """Change of ln(v²/m²) a layer, from layer 60 to 160, at width 64."""
    rows = []
    for kind in ("rms", "layer"):
        record = sv.simulate(
            64,
            160,
            networks=400,
            samples=32,
            seed=5,
            normalization=kind,
            dtype="float64",
        )
        logs = np.log(record.v2_over_m2.sel(layer=[60, 160]))
        found = mean_and_error((logs[:, 1] - logs[:, 0]) / 100)
        law = sv.theory.finite_width(64, 160, normalization=kind)
        change = np.log((law.v2 / law.m2)[[60, 160]])
        rows.append((kind, *found, (change[1] - change[0]) / 100))
    names = ["normalization", "measured", "error", "law"]
    return pd.DataFrame(rows, columns=names).set_index("normalization")


def scaling() -> pd.DataFrame:
    """v²/σ² at the end of networks whose slope or branches are scaled with the depth."""
    rows = []
    for depth in (50, 100):
        kinds: dict[str, dict[str, Any]] = {
            "slope 1 - 1/sqrt(L)": {
                "activation": "leaky_relu",
                "negative_slope": 1 - depth**-0.5,
            },
            "residual 1/L": {"residual": 1 / depth},
            "plain ReLU": {},
        }
        for name, options in kinds.items():
            record = sv.simulate(
                256,
                depth,
                networks=100,
                samples=64,
                seed=depth,
                **options,
            )
            found = mean_and_error(record.fraction[:, depth])
            exact = sv.theory.trajectory(depth, **options).fraction[
                depth
            ]
            rows.append((name, depth, *found, exact))
    names = ["network", "depth", "measured", "error", "infinite width"]
    return pd.DataFrame(rows, columns=names).set_index(
        ["network", "depth"]
    )


def activations() -> pd.DataFrame:
    """v²/σ² at layer 30 of width 512 at He's rule."""
    rows = []
    for name in NAMES:
        norm = "rms" if name in UNSTABLE else None
        record = sv.simulate(
            512,
            30,
            networks=100,
            samples=64,
            seed=3,
            activation=name,
            normalization=norm,
            dtype="float64",
        )
        found = mean_and_error(record.fraction[:, 30])
        scale = float(record.sigma2[:, 30].mean())
        exact = sv.theory.trajectory(30, activation=name).fraction[30]
        rows.append((name, norm or "", *found, exact, scale))
    names = ["activation", "normalization", "measured", "error"]
    names += ["infinite width", "sigma2"]
    return pd.DataFrame(rows, columns=names).set_index("activation")


def band(many: dict[int, int], layers: tuple[int, ...]) -> pd.DataFrame:
    """Standard deviation over networks of v²/m² and of m/v, 64 inputs each."""
    rows = []
    for width, networks in many.items():
        record = sv.simulate(
            width,
            layers[-1],
            networks=networks,
            samples=64,
            seed=width + 1,
        )
        for layer in layers:
            found = []
            for name in ("v2_over_m2", "ratio"):
                one = record[name][:, layer].dropna("network")
                squares = (one - one.mean()) ** 2
                deviation, error = mean_and_error(squares)
                found += [deviation**0.5, error / 2 / deviation**0.5]
            rows.append((width, layer, one.size, *found))
        print(rows[-1], flush=True)
    names = "width layer networks x x_error ratio ratio_error"
    table = pd.DataFrame(rows, columns=names.split())
    return table.set_index(["width", "layer"])


BANDS = {
    "band": (
        {64: 6000, 128: 4000, 256: 2000, 1000: 2000},
        (5, 10, 20, 49, 200),
    ),
    # where the paper's figure was read
    "bands": (
        {30: 4000, 100: 4000, 300: 2000, 1000: 1000, 3000: 600},
        (47,),
    ),
}


def load(name: str) -> pd.DataFrame:
    """A stored table."""
    keys = {
        "drift": 3,
        "model": 3,
        "scaling": 2,
        "band": 2,
        "bands": 2,
    }.get(name, 1)
    return pd.read_csv(
        FOLDER / f"{name}.csv", index_col=list(range(keys))
    )


def entry(name: str, key: tuple[int, ...]) -> tuple[float, float]:
    """m²/σ² of a stored table, and its standard error."""
    found = load(name)
    row = found[found.index == key]
    return float(row.m2.iloc[0]), float(row.m2_error.iloc[0])


def drift_table() -> pd.DataFrame:
    """Three places of the drift at width 1024: measured, to first order, reduced model."""
    rows = {}
    for batch, layer in ((32, 30), (256, 10), (256, 49)):
        found, error = entry("drift", (1024, batch, layer))
        law = 1 - np.sum(
            batchnorm.first_order(1024, DEPTH, batch), axis=0
        )
        held = batch == 32
        other = (
            ""
            if held
            else f"{load('model').xs((1024, batch, layer)).m2:.4f}"
        )
        told = (
            f"{found:.4f} ± {error:.4f}",
            f"{law[layer]:.4f}",
            other,
        )
        rows[f"layer {layer}, B = {batch}"] = told
    columns = ["measured", "first order", "reduced model"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def band_lines() -> tuple[list[list[str]], list[str]]:
    """Standard deviation of m/v over networks: measured, and measured over law, minus 1."""
    rows: dict[int, list[str]] = {}
    for found in load("band").reset_index().to_dict("records"):
        width, layer = int(found["width"]), int(found["layer"])
        law = sv.theory.fluctuations(width, layer, samples=64)
        off = found["ratio"] / law.ratio[-1] - 1
        error = found["ratio_error"] / law.ratio[-1]
        cell = f"{found['ratio']:.3f} ({off:+.1%} ± {error:.1%})"
        rows.setdefault(width, [str(width)]).append(cell)
    layers = load("band").index.unique("layer")
    return list(rows.values()), [
        "width",
        *(f"layer {layer}" for layer in layers),
    ]


def draw_drift() -> Figure:
    """Measured points, first order (dashed beyond its onset) and the reduced model."""
    measured, reduced = load("drift"), load("model")
    widths = list(measured.index.unique("width"))
    batches = list(measured.index.unique("batch"))
    figure, panels = plt.subplots(1, 3, sharey=True, figsize=(8, 3.2))
    for axes, batch in zip(panels, batches, strict=True):
        for k, width in enumerate(widths):
            found = measured.loc[width, batch].iloc[1::4]
            style = {
                "color": f"C{k}",
                "fmt": "os^"[k],
                "ms": 3.5,
                "lw": 1,
            }
            axes.errorbar(
                found.index,
                found.m2,
                2 * found.m2_error,
                label=f"N = {width}",
                **style,
            )
            law = 1 - np.sum(
                batchnorm.first_order(width, DEPTH, batch), axis=0
            )
            held = batchnorm.is_held(width, batch)
            ends = DEPTH if held else int(batchnorm.onset(width))
            axes.plot(
                range(1, ends + 1), law[1 : ends + 1], color=f"C{k}"
            )
            axes.plot(
                range(ends, DEPTH + 1),
                law[ends:],
                "--",
                color=f"C{k}",
                lw=1,
            )
            if batch in reduced.index.unique("batch"):
                line = reduced.loc[width, batch].m2.iloc[1:]
                axes.plot(line.index, line, ":", color=f"C{k}", lw=2)
        axes.set(title=f"B = {batch}", xlabel="layer")
    panels[0].set_ylabel("$m^2/\\sigma^2$ before BatchNorm")
    panels[0].legend(loc="lower left")
    return figure


TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    f.__name__: f
    for f in (
        drift,
        model,
        saturation,
        onset,
        orthogonal,
        norms,
        scaling,
        activations,
    )
} | {name: partial(band, *options) for name, options in BANDS.items()}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in tqdm(sys.argv[1:] or TABLES):
        TABLES[name]().to_csv(
            FOLDER / f"{name}.csv", float_format="%.6g"
        )
