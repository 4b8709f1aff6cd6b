"""One training experiment: its configuration, the scales it is run at, and grids of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from svlib import _check

CLASSES, MASKS = ("digits", "cifar10"), ("membranes", "micrographs")
DATA = CLASSES + MASKS
INITIALIZATIONS = ("total", "sample", "batchnorm")
VARIANTS = ("layer",)  # total init in its other reading
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {  # seconds a run: the whole way, nothing to conclude from
        "digits": {"width": 16, "iterations": 40, "batch_size": 32},
        "membranes": {"width": 8, "iterations": 40, "batch_size": 4, "calibration": 32},
        "cifar10": {"width": 8, "iterations": 40, "batch_size": 32},
        "micrographs": {"width": 4, "iterations": 20, "batch_size": 2, "calibration": 16},
    },
    "laptop": {  # a minute a run, one or two hours the grid, on two cores
        "cifar10": {
            "width": 24, "iterations": 800, "calibration": 256, "channels_last": True,
            "probed": (100,),
        },
        "micrographs": {
            "width": 8, "iterations": 600, "batch_size": 4, "calibration": 32,
            "channels_last": True, "probed": (100,),
        },
    },
    "overnight": {  # some forty minutes a run on two cores: a fifth of the paper's iterations
        "cifar10": {
            "width": 24, "iterations": 20_000, "calibration": 256, "channels_last": True,
            "probed": (100, 1_000, 5_000, 20_000),
        },
        "micrographs": {
            "width": 8, "iterations": 10_000, "batch_size": 4, "calibration": 32,
            "channels_last": True, "probed": (100, 1_000, 5_000, 10_000),
        },
    },
    "paper": {  # a GPU
        "cifar10": {
            "width": 96, "iterations": 100_000, "calibration": 512, "channels_last": True,
            "probed": (1_000, 5_000, 20_000),
        },
        "micrographs": {
            "width": 64, "iterations": 50_000, "batch_size": 4, "calibration": 32,
            "channels_last": True, "probed": (1_000, 5_000, 10_000),
        },
    },
}  # fmt: skip
LEARNING_RATES = {  # every initialization has the same; if its best is at an end, add a rate there
    "digits": (0.003, 0.01, 0.03, 0.1, 0.3),
    "membranes": (0.01, 0.03, 0.1, 0.3, 1.0),
    "cifar10": (0.003, 0.01, 0.03, 0.1, 0.3),
    "micrographs": (0.01, 0.03, 0.1, 0.3, 1.0),
}


@dataclass(frozen=True)
class Experiment:
    """What is the same for all seeds of a training experiment.

    Attributes:
        data: "digits" or "cifar10" (ALL-CNN-C, cross-entropy); "membranes" (U-Net with 2 levels) or
            "micrographs" (4 levels, random crops of 128 pixels), cross-entropy per pixel.
        initialization: "total", "sample" (He's weights, then :mod:`svlib.probing.init` on a
            calibration batch), "batchnorm" (He's weights, BatchNorm before every ReLU) or "layer"
            (as "total", the mean of each layer subtracted).
        width: Channels of the first layer (published: 96 for ALL-CNN-C, 64 for the U-Net).
        iterations: Steps of SGD.
        batch_size: Images in a step, drawn without replacement, epoch by epoch (micrographs: crops,
            with replacement).
        learning_rate: Step size, at the start if there is a schedule.
        momentum: Momentum of SGD.
        schedule: "constant", or "cosine" to 0 at the last iteration.
        centred: Inputs of mean 0 and deviation 1; False: bytes over 255, as a loader gives them.
        calibration: Images in the calibration batch.
        probed: Iterations before which layers, gradients and held-out data are measured, beside the
            start and the end.
        channels_last: Keep images and weights with the channels last in memory: often faster.
        mixed_precision: Forward pass in bfloat16 where torch's autocast does so; CUDA only.
    """

    data: str
    initialization: str
    width: int
    iterations: int
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    calibration: int = 128
    probed: tuple[int, ...] = ()
    channels_last: bool = False
    mixed_precision: bool = False
    schedule: str = "constant"
    centred: bool = True

    def __post_init__(self) -> None:
        _check.choice("data", self.data, DATA)
        _check.choice("initialization", self.initialization, INITIALIZATIONS + VARIANTS)
        _check.choice("schedule", self.schedule, ("constant", "cosine"))
        for name in ("channels_last", "mixed_precision", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.probed, tuple | list):
            raise TypeError(f"probed must be a tuple of iterations, got {self.probed!r}")
        least = {"width": 1, "iterations": 1, "batch_size": 2, "calibration": 2}
        checked = {
            name: _check.integer(name, getattr(self, name), low) for name, low in least.items()
        } | {
            "learning_rate": _check.real("learning_rate", self.learning_rate, 0, open_low=True),
            "momentum": _check.real("momentum", self.momentum, 0, 1),
            "probed": tuple(_check.integer("probed", at, 0) for at in self.probed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if (last := max(self.probed, default=0)) > self.iterations:
            raise ValueError(f"probed must be at most the {self.iterations} iterations, got {last}")

    @property
    def moments(self) -> list[int]:
        """The iterations before which layers are measured, the start, those probed, the end."""
        return sorted({0, *self.probed, self.iterations})


def grid(
    data: str,
    scale: str,
    *,
    seeds: int = 3,
    initializations: Iterable[str] = INITIALIZATIONS,
    learning_rates: Iterable[float] | None = None,
    width: int | None = None,
    iterations: int | None = None,
    mixed_precision: bool = False,
) -> list[dict[str, Any]]:
    """Points of a comparison: every initialization at every rate, seed by seed.

    They are for :func:`svlib.sweep.run` with :func:`svlib.experiments.training.run`.

    Args:
        data: As in :class:`Experiment`.
        scale: "quick" (seconds a run); of CIFAR-10 and micrographs also "laptop" (a minute or two a
            run on two cores), "overnight" (about an hour) and "paper" (a GPU).
        seeds: Number of seeds, from 0.
        initializations: Some of total, sample, batchnorm, layer.
        learning_rates: The grid; ``None`` takes the five of ``LEARNING_RATES``.
        width: Channels of the first layer; ``None`` takes the scale's.
        iterations: Steps of SGD; ``None`` takes the scale's. Moments to probe that lie beyond
            are dropped.
        mixed_precision: As in :class:`Experiment`.

    Examples:
        >>> len(grid("cifar10", "laptop"))  # 3 initializations, 5 rates, 3 seeds
        45
    """
    _check.choice("data", data, DATA)
    scales = [name for name, sizes in SCALES.items() if data in sizes]
    settings = dict(SCALES[_check.choice("scale", scale, scales)][data])
    settings["mixed_precision"] = mixed_precision
    if width is not None:
        settings["width"] = width
    if iterations is not None:
        last = settings["iterations"] = _check.integer("iterations", iterations)
        settings["probed"] = tuple(at for at in settings.get("probed", ()) if at <= last)
    rates = LEARNING_RATES[data] if learning_rates is None else tuple(learning_rates)
    kinds = tuple(initializations)
    return [
        {
            "experiment": asdict(Experiment(data, kind, learning_rate=rate, **settings)),
            "seed": seed,
        }
        for seed in range(_check.integer("seeds", seeds))
        for rate in rates
        for kind in kinds
    ]
