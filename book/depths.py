"""Does a repair help a plain network, and how deep? ``python depths.py`` trains them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import svlib as sv
import torch
from torch import nn
from tqdm import tqdm

import claims
from ways import Block

PATH = claims.RESULTS / "depths.csv"
DEPTHS = (10, 20, 30, 60)
STARTS = (
    "He",
    "total init",
    "sample init",
    "BatchNorm",
    "branches / √L",
)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WIDTH, STEPS, BATCH = 128, 250, 64


def network(start: str, depth: int, seed: int) -> nn.Sequential:
    """Blocks of ReLU and a linear layer between two linear layers, on digits."""
    generator = torch.Generator().manual_seed(seed)
    images = sv.data.digits().images.flatten(1)
    options: dict[str, dict[str, Any]] = {
        "BatchNorm": {"norm": nn.BatchNorm1d},
        "branches / √L": {"residual": 1 / depth},
    }
    ends = [nn.Linear(images.shape[1], WIDTH), nn.Linear(WIDTH, 10)]
    for end in ends:
        deviation = end.in_features**-0.5
        nn.init.normal_(end.weight, 0.0, deviation, generator=generator)
        nn.init.zeros_(end.bias)
    blocks = [
        Block(WIDTH, generator, **options.get(start, {}))
        for _ in range(depth - 2)
    ]
    model = nn.Sequential(ends[0], *blocks, ends[1])
    repair = {
        "total init": sv.init.total_,
        "sample init": sv.init.sample_,
    }
    if start in repair:
        with warnings.catch_warnings(action="ignore"):  # of gradients
            repair[start](model, images[:512])
    return model


def final_loss(start: str, depth: int, rate: float, seed: int) -> float:
    """Mean loss of the last fifth of the steps of Adam; infinite if it diverged."""
    digits, model = sv.data.digits(), network(start, depth, seed)
    images = digits.images.flatten(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        scores = model(images[rows])
        loss = nn.functional.cross_entropy(scores, digits.labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    last = float(np.mean(losses[-STEPS // 5 :]))
    return last if np.isfinite(last) else np.inf


def main(seeds: int = 2) -> None:
    """Train all and store their final losses."""
    rows = [
        (depth, start, rate, seed)
        for depth in DEPTHS
        for start in STARTS
        for rate in RATES
        for seed in range(seeds)
    ]
    found = [
        (*row, final_loss(row[1], row[0], *row[2:]))
        for row in tqdm(rows)
    ]
    names = ["depth", "start", "rate", "seed", "loss"]
    pd.DataFrame(found, columns=names).round(4).to_csv(
        PATH, index=False
    )


def best() -> pd.DataFrame:
    """Mean loss at the best rate, and its standard error over seeds, by depth and start."""
    table = pd.read_csv(PATH)
    by_rate = table.groupby(["depth", "start", "rate"]).loss
    both = pd.DataFrame(
        {"loss": by_rate.mean(), "error": by_rate.sem()}
    )
    return both.loc[both.groupby(["depth", "start"]).loss.idxmin()]


def lines() -> list[tuple[str, ...]]:
    """A row for each start, a column for each depth: loss ± error (rate)."""
    found = best().reset_index("rate")
    told = [
        f"{x.loss:.3f} ± {x.error:.3f} ({x.rate:g})"
        for x in found.itertuples()
    ]
    table = pd.Series(told, found.index).unstack("depth")
    return [(start, *table.loc[start]) for start in STARTS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
