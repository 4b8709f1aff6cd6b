"""The first page's picture: what the units of one network say of the same inputs."""

from __future__ import annotations

import matplotlib.pyplot as plt
import svlib as sv
from matplotlib.figure import Figure

LAYERS = (0, 5, 20, 50)


def draw_collapse(
    width: int = 512, units: int = 24, inputs: int = 24
) -> Figure:
    """Preactivations (units, inputs) at four layers, each over its root mean square."""
    y = sv.sample_preactivations(
        width,
        list(LAYERS),
        networks=1,
        samples=inputs,
        units=units,
        seed=1,
    )[0]
    figure, panels = plt.subplots(
        1, len(LAYERS), figsize=(8, 2.5), layout="constrained"
    )
    for panel, layer in zip(panels, LAYERS, strict=True):
        values = y.sel(layer=layer).transpose("unit", "sample").values
        scaled = values / (values**2).mean() ** 0.5
        image = panel.imshow(scaled, cmap="RdBu_r", vmin=-2.5, vmax=2.5)
        panel.set(title=f"layer {layer}", xticks=[], yticks=[])
        panel.set_xlabel("inputs")
    panels[0].set_ylabel("units")
    bar = figure.colorbar(
        image, ax=panels, ticks=[-2, 0, 2], shrink=0.7
    )
    bar.set_label(r"preactivation / $\sigma$")
    return figure
