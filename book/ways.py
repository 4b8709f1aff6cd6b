"""Ways to start a deep network, compared in chapter 6: variance kept, gradients, price."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import svlib as sv
import torch
from torch import nn

LEAKY: dict[str, Any] = {
    "activation": "leaky_relu",
    "negative_slope": 0.3,
}
# name: options of the model, options of the simulation, price
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "He": ({}, {}, "[nothing](05-training.ipynb)"),
    "BatchNorm": (
        {"norm": nn.BatchNorm1d},
        {"normalization": "batch"},
        "[batch statistics; gradients](04-batchnorm.ipynb)",
    ),
    "LayerNorm": (
        {"norm": nn.LayerNorm},
        {"normalization": "layer"},
        "[layer statistics](04-batchnorm.ipynb)",
    ),
    "residual, β = 1": (
        {"residual": 1.0},
        {"residual": 1.0},
        "[scale grows by 1 + β](02-infinite-width.ipynb)",
    ),
    "leaky ReLU, slope 0.3": (
        {"slope": 0.3},
        LEAKY,
        "[less nonlinear](02-infinite-width.ipynb)",
    ),
}
SAMPLE_INIT = "[one pass; gradients](04-batchnorm.ipynb)"


class Block(nn.Module):
    """y to W phi(norm(y)), or y + sqrt(residual) W phi(norm(y)), at He's rule."""

    def __init__(
        self,
        width: int,
        generator: torch.Generator,
        slope: float = 0.0,
        residual: float | None = None,
        norm: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear = nn.Linear(width, width)
        self.slope, self.residual = slope, residual
        deviation = (2 / (1 + slope**2) / width) ** 0.5
        nn.init.normal_(
            self.linear.weight, 0.0, deviation, generator=generator
        )
        nn.init.zeros_(self.linear.bias)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """(inputs, width) to (inputs, width)."""
        activation = nn.functional.leaky_relu(self.norm(y), self.slope)
        branch: torch.Tensor = self.linear(activation)
        return (
            branch
            if self.residual is None
            else y + self.residual**0.5 * branch
        )


def gradients(
    repair: Callable[..., Any] | None = None,
    width: int = 256,
    depth: int = 50,
    **options: Any,
) -> tuple[float, float]:
    """Growth per layer, backwards, of gradient² times σ²; v²/σ² at the last layer."""
    generator = torch.Generator().manual_seed(0)
    blocks = [Block(width, generator, **options) for _ in range(depth)]
    model = nn.Sequential(*blocks).double()
    if repair is not None:
        with warnings.catch_warnings(action="ignore"):  # of this growth
            repair(
                model, sv.data.gaussian(1024, width, seed=1).double()
            )
    inputs = sv.data.gaussian(256, width, seed=2).double()
    table = sv.probe(model, inputs)
    found = sv.probe_gradients(model, inputs, seed=3)
    size = (found.gradient2 * table.sigma2).to_numpy()
    first, last = depth // 10 - 1, depth - depth // 10 - 1
    growth = (size[first] / size[last]) ** (1 / (last - first))
    return float(growth), float(table.fraction.iloc[-1])


def simulated(
    width: int, depth: int, networks: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """v²/σ² and m/v by layer, medians over networks."""
    record = sv.simulate(
        width,
        depth,
        networks=networks,
        samples=100,
        seed=5,
        dtype=torch.float64,
        **options,
    ).median("network")
    return record.fraction.values, record.ratio.values


def compared() -> pd.DataFrame:
    """One row per way: variance kept at layer 49 of width 256, growth of gradients,
    m/v at layers 100 and 200 of width 64 (NaN after sample init), price."""
    rows = {}
    for name, (of_model, of_simulation, price) in WAYS.items():
        kept = simulated(256, 49, 4, **of_simulation)[0][49]
        ratio = simulated(64, 200, 20, **of_simulation)[1]
        growth = gradients(**of_model)[0]
        rows[name] = [kept, growth, ratio[100], ratio[200], price]
        if name == "He":
            growth, kept = gradients(repair=sv.init.sample_)
            rows["sample init"] = [
                kept,
                growth,
                np.nan,
                np.nan,
                SAMPLE_INIT,
            ]
    columns = ["kept", "gradients", "at 100", "at 200", "price"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def lines(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """The rows of :func:`compared` in words."""
    told: list[tuple[str, ...]] = []
    for name, row in table.iterrows():
        level = "yes" if row["at 200"] / row["at 100"] < 1.2 else "no"
        plateau = f"{level}: {row['at 100']:.1f}, {row['at 200']:.1f}"
        if np.isnan(row["at 100"]):
            plateau = "no mean, by construction"
        numbers = (f"{row.kept:.2f}", f"{row.gradients:.2f}")
        told.append((str(name), *numbers, plateau, str(row.price)))
    return told


def train(model: nn.Module, rate: float, seed: int) -> list[float]:
    """Losses of 48 steps of SGD with momentum on 20 digits each."""
    digits = sv.data.digits()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.images), generator=generator)
    losses = []
    for rows in torch.split(order[:960], 20):
        scores = model(digits.images[rows])
        loss = nn.functional.cross_entropy(scores, digits.labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


class Plain(nn.Module):
    """Nine convolutions with ReLU, three poolings, a linear layer: in the manner of VGG."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = pairwise([1] + [channels] * 9)
        self.hidden = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in widths
        )
        self.scores = nn.Linear(4 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.hidden, start=1):
            x = torch.relu(layer(x))
            if number % 3 == 0:
                x = nn.functional.max_pool2d(x, 2)
        scores: torch.Tensor = self.scores(x.flatten(1))
        return scores


def plain(seed: int) -> Plain:
    """The network above with He's initialization."""
    model = Plain()
    sv.networks.he_(model, seed)
    return model
