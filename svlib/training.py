"""One training run in, one record out: total init, sample init or BatchNorm on the embedded data.

ALL-CNN-C on digits, or a U-Net on membranes. The paper does not state its optimizer, learning rate, batch size
or calibration batch; plain SGD with momentum stands in, without weight decay, dropout or augmentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F  # noqa: N812, as torch's own documentation calls it
from tqdm import tqdm

from svlib import _check, data, init, networks
from svlib._random import stream
from svlib._record import provenance
from svlib.probing import probe

DATA = ("digits", "membranes")
INITIALIZATIONS = ("total", "sample", "batchnorm")
_PROBED = 256  # images on which the layers are measured before training


@dataclass(frozen=True)
class Experiment:
    """What is the same for all seeds of a training experiment.

    Attributes:
        data: "digits" (ALL-CNN-C, cross-entropy) or "membranes" (U-Net with 2 levels, cross-entropy per pixel).
        initialization: "total", "sample" (He's weights, then :mod:`svlib.init` on a calibration batch) or
            "batchnorm" (He's weights, BatchNorm before every ReLU).
        width: Channels of the first layer (published: 96 for ALL-CNN-C, 64 for the U-Net).
        iterations: Steps of SGD.
        batch_size: Images in a step, drawn without replacement, epoch by epoch.
        learning_rate: Step size, constant.
        momentum: Momentum of SGD.
        calibration: Images in the calibration batch.

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a number is out of range or a name unknown.
    """

    data: str
    initialization: str
    width: int
    iterations: int
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    calibration: int = 128

    def __post_init__(self) -> None:
        _check.choice("data", self.data, DATA)
        _check.choice("initialization", self.initialization, INITIALIZATIONS)
        for name, minimum in (("width", 1), ("iterations", 1), ("batch_size", 2), ("calibration", 2)):
            _check.integer(name, getattr(self, name), minimum)
        _check.real("learning_rate", self.learning_rate, 0, open_low=True)
        _check.real("momentum", self.momentum, 0, 1)


@lru_cache(maxsize=2)
def _load(name: str) -> data.Split:
    return data.digits() if name == "digits" else data.membranes(seed=0)


def _split(experiment: Experiment) -> data.Split:
    """The experiment's data, if there are enough of them."""
    if not isinstance(experiment, Experiment):
        raise TypeError(f"experiment must be an Experiment, got {type(experiment).__name__}")
    split = _load(experiment.data)
    for name in ("batch_size", "calibration"):
        if getattr(experiment, name) > len(split.images):
            raise ValueError(f"{name} must be at most the {len(split.images)} training images, got {getattr(experiment, name)}")
    return split


def _network(experiment: Experiment, seed: int) -> nn.Module:
    batchnorm = experiment.initialization == "batchnorm"
    if experiment.data == "digits":
        return networks.all_cnn_c(experiment.width, channels=1, batchnorm=batchnorm, seed=seed)
    return networks.UNet(experiment.width, levels=2, batchnorm=batchnorm, seed=seed)


def _loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if scores.ndim == 4:
        return F.binary_cross_entropy_with_logits(scores, labels)
    return F.cross_entropy(scores, labels)


def _held_out(model: nn.Module, split: data.Split) -> tuple[float, float]:
    """Loss, and fraction of images (or of pixels) classified wrongly, on the held-out data in evaluation mode."""
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(images) for images in torch.split(split.held_out_images, 256)])
    labels = split.held_out_labels
    guesses = (scores > 0).to(labels) if scores.ndim == 4 else scores.argmax(1)
    return float(_loss(scores, labels)), float((guesses != labels).double().mean())


def initialized(experiment: Experiment, seed: int) -> nn.Module:
    """The experiment's network with its initialization, in training mode.

    The same seed gives all three initializations the same He weights and the same calibration batch.

    Raises:
        TypeError: If ``experiment`` is not an Experiment or ``seed`` not an integer.
        ValueError: If ``seed`` is negative, or there are fewer images than a batch wants.
    """
    split = _split(experiment)
    model = _network(experiment, seed)
    initializers: dict[str, Callable[..., Any]] = {"total": init.total_, "sample": init.sample_}
    if experiment.initialization in initializers:
        order = torch.randperm(len(split.images), generator=stream(seed, "calibration"))
        initializers[experiment.initialization](model, split.images[order[: experiment.calibration]])
    return model


def run(experiment: Experiment, seed: int, *, progress: bool | None = None) -> xr.Dataset:
    """Train one network.

    Args:
        experiment: The configuration.
        seed: Seed of weights, calibration batch and order of the data; runs with one seed are paired.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Returns:
        Dataset with ``loss`` (iteration), the training loss of each step's batch before the step; ``held_out_loss`` and
        ``held_out_error`` (fraction of wrong images or pixels) after the last; ``m2``, ``v2`` (layer, by name) before
        training, on held-out images. ``attrs`` hold configuration, seed, versions, device, wall time and ``diverged``:
        the iteration at which the loss stopped being finite and the run ended, or -1. Losses from there on are NaN, and
        so are ``held_out_loss`` and ``held_out_error``.

    Raises:
        TypeError: If ``experiment`` is not an Experiment or ``seed`` not an integer.
        ValueError: If ``seed`` is negative, or there are fewer images than a batch wants.

    Examples:
        >>> record = run(Experiment("digits", "sample", width=4, iterations=2, batch_size=8), seed=0)
        >>> dict(record.sizes)["iteration"], record.attrs["diverged"]
        (2, -1)
    """
    started = time.perf_counter()
    split = _split(experiment)
    model = initialized(experiment, seed)
    layers = probe(model, split.held_out_images[:_PROBED])
    optimizer = torch.optim.SGD(model.parameters(), lr=experiment.learning_rate, momentum=experiment.momentum)
    losses = np.full(experiment.iterations, np.nan)
    diverged = -1
    order = _order(len(split.images), experiment.batch_size, stream(seed, "order"))
    for iteration in tqdm(range(experiment.iterations), disable=None if progress is None else not progress):
        rows = next(order)
        loss = _loss(model(split.images[rows]), split.labels[rows])
        if not torch.isfinite(loss):
            diverged = iteration
            break
        losses[iteration] = float(loss.detach())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    held_out_loss, held_out_error = (np.nan, np.nan) if diverged >= 0 else _held_out(model, split)
    return xr.Dataset(
        {
            "loss": ("iteration", losses),
            "held_out_loss": held_out_loss,
            "held_out_error": held_out_error,
            "m2": ("layer", layers.m2),
            "v2": ("layer", layers.v2),
        },
        coords={"iteration": np.arange(experiment.iterations), "layer": list(layers.name)},
        attrs=provenance(torch.device("cpu"), started) | asdict(experiment) | {"seed": seed, "diverged": diverged},
    )


def _order(images: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield rows of batches for ever; every epoch in a new order, the incomplete last batch left out."""
    while True:
        rows = torch.randperm(images, generator=generator)
        yield from torch.split(rows[: images - images % batch_size], batch_size)
