"""One training run in, one record out: total init, sample init or BatchNorm.

ALL-CNN-C on digits or CIFAR-10, or a U-Net on drawn membranes or electron micrographs. The paper
does not state its optimizer, learning rate, batch size or calibration batch; plain SGD with
momentum stands in, without weight decay, dropout or augmentation.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F  # noqa: N812, as torch's own documentation calls it
from tqdm import tqdm

from svlib import _check
from svlib._files import provenance, write_whole
from svlib._random import stream
from svlib.experiments import data, networks
from svlib.probing import init
from svlib.probing.probe import probe, probe_gradients

CLASSES, MASKS = ("digits", "cifar10"), ("membranes", "micrographs")
DATA = CLASSES + MASKS
INITIALIZATIONS = ("total", "sample", "batchnorm")
VARIANTS = ("layer",)  # total init in its other reading
CROP = 128  # pixels a side: micrographs are trained on random crops, and held-out ones are cut into tiles
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {  # seconds a run: the whole way, nothing to conclude from
        "digits": {"width": 16, "iterations": 40, "batch_size": 32},
        "membranes": {"width": 8, "iterations": 40, "batch_size": 4, "calibration": 32},
        "cifar10": {"width": 8, "iterations": 40, "batch_size": 32},
        "micrographs": {"width": 4, "iterations": 20, "batch_size": 2, "calibration": 16},
    },
    "laptop": {  # a minute a run, one or two hours the grid, on two cores
        "cifar10": {"width": 24, "iterations": 800, "calibration": 256, "probed": (100,), "channels_last": True},
        "micrographs": {
            "width": 8, "iterations": 600, "batch_size": 4, "calibration": 32, "probed": (100,), "channels_last": True,
        },
    },
    "overnight": {  # some forty minutes a run on two cores: laptop's networks at a fifth of the paper's iterations
        "cifar10": {
            "width": 24, "iterations": 20_000, "calibration": 256, "probed": (100, 1_000, 5_000, 20_000), "channels_last": True,
        },
        "micrographs": {
            "width": 8, "iterations": 10_000, "batch_size": 4, "calibration": 32, "probed": (100, 1_000, 5_000, 10_000),
            "channels_last": True,
        },
    },
    "paper": {  # a GPU
        "cifar10": {
            "width": 96, "iterations": 100_000, "calibration": 512, "probed": (1_000, 5_000, 20_000), "channels_last": True,
        },
        "micrographs": {
            "width": 64, "iterations": 50_000, "batch_size": 4, "calibration": 32, "probed": (1_000, 5_000, 10_000),
            "channels_last": True,
        },
    },
}  # fmt: skip
LEARNING_RATES = {  # the same for every initialization; where one's best lies on the edge, the grid wants another rate
    "digits": (0.003, 0.01, 0.03, 0.1, 0.3),
    "membranes": (0.01, 0.03, 0.1, 0.3, 1.0),
    "cifar10": (0.003, 0.01, 0.03, 0.1, 0.3),
    "micrographs": (0.01, 0.03, 0.1, 0.3, 1.0),
}
_PROBED = 2**18  # pixels: layers are measured on as many held-out images or tiles, at least 16
_LOST = 1e4  # a loss above this has diverged, as one that is not finite
_LOOK = 50  # iterations between looks at the losses: on a GPU every look waits for it
_CLOCK = 60.0  # seconds between checkpoints
_CURVE = 2_000  # points that a record keeps of a curve: means over windows of a longer one


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
        learning_rate: Step size, constant.
        momentum: Momentum of SGD.
        calibration: Images in the calibration batch.
        probed: Iterations before which layers, gradients and held-out data are measured, beside the
            start and the end.
        channels_last: Keep images and weights with the channels last in memory: often faster.
        mixed_precision: Forward pass in bfloat16 where torch's autocast does so; CUDA only.

    Raises:
        TypeError: If a number is not a number, or a switch not a bool.
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
    probed: tuple[int, ...] = ()
    channels_last: bool = False
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        _check.choice("data", self.data, DATA)
        _check.choice("initialization", self.initialization, INITIALIZATIONS + VARIANTS)
        for name, minimum in (
            ("width", 1),
            ("iterations", 1),
            ("batch_size", 2),
            ("calibration", 2),
        ):
            object.__setattr__(self, name, _check.integer(name, getattr(self, name), minimum))
        object.__setattr__(
            self,
            "learning_rate",
            _check.real("learning_rate", self.learning_rate, 0, open_low=True),
        )
        object.__setattr__(self, "momentum", _check.real("momentum", self.momentum, 0, 1))
        for name in ("channels_last", "mixed_precision"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.probed, tuple | list):
            raise TypeError(f"probed must be a tuple of iterations, got {self.probed!r}")
        object.__setattr__(
            self,
            "probed",
            tuple(_check.integer("probed", iteration, 0) for iteration in self.probed),
        )
        if max(self.probed, default=0) > self.iterations:
            raise ValueError(
                f"probed must be at most the {self.iterations} iterations, got {max(self.probed)}"
            )


@lru_cache(maxsize=2)
def _load(
    name: str, folder: str | None, device: torch.device, files: frozenset[tuple[str, int, int]]
) -> data.Split:
    """The data on the device. ``files`` tells a folder from what it was before."""
    if name in ("digits", "membranes"):
        split = data.digits() if name == "digits" else data.membranes(seed=0)
    else:
        split = data.cifar10(folder) if name == "cifar10" else _tiled(data.micrographs(folder))
    images, labels, held_out_images, held_out_labels = (part.to(device) for part in split[:4])
    return data.Split(images, labels, held_out_images, held_out_labels, split.source)


def _files(folder: str | None) -> frozenset[tuple[str, int, int]]:
    """Path, time and size of what lies in a folder and in its folders."""
    place = None if folder is None else Path(folder).resolve()
    paths = (
        []
        if place is None
        else [path for pattern in ("*", "*/*") for path in place.glob(pattern) if path.is_file()]
    )
    return frozenset((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


def _tiled(split: data.Split) -> data.Split:
    """Cut the held-out sections into tiles of the size of the training crops."""
    if min(split.images.shape[2:]) < CROP:
        raise ValueError(
            f"micrographs must be at least {CROP} pixels a side, got {tuple(split.images.shape[2:])}"
        )

    def tiles(pictures: torch.Tensor) -> torch.Tensor:
        return pictures.unfold(2, CROP, CROP).unfold(3, CROP, CROP).reshape(-1, 1, CROP, CROP)

    return split._replace(
        held_out_images=tiles(split.held_out_images), held_out_labels=tiles(split.held_out_labels)
    )


def _prepare(
    experiment: Any, folder: str | os.PathLike[str] | None, device: torch.device | str
) -> tuple[Experiment, data.Split, torch.device]:
    """The experiment, its data on the device, and the device, if they go together."""
    experiment = Experiment(**experiment) if isinstance(experiment, Mapping) else experiment
    if not isinstance(experiment, Experiment):
        raise TypeError(f"experiment must be an Experiment, got {type(experiment).__name__}")
    device = _check.device(device)
    if experiment.mixed_precision and device.type != "cuda":
        raise ValueError(
            f"mixed_precision must be False unless device is cuda, got device {device}"
        )
    place = os.environ.get(data.FOLDER_VARIABLE) if folder is None else os.fspath(folder)
    split = _load(experiment.data, place, device, _files(place))
    for name in ("batch_size", "calibration"):
        if experiment.data != "micrographs" and getattr(experiment, name) > len(split.images):
            raise ValueError(
                f"{name} must be at most the {len(split.images)} training images, got {getattr(experiment, name)}"
            )
    return experiment, split, device


def _network(experiment: Experiment, seed: int) -> nn.Module:
    batchnorm = experiment.initialization == "batchnorm"
    if experiment.data in CLASSES:
        channels = 3 if experiment.data == "cifar10" else 1
        return networks.all_cnn_c(
            experiment.width, channels=channels, batchnorm=batchnorm, seed=seed
        )
    levels = 4 if experiment.data == "micrographs" else 2
    return networks.UNet(experiment.width, levels=levels, batchnorm=batchnorm, seed=seed)


def _memory_format(experiment: Experiment) -> torch.memory_format:
    return torch.channels_last if experiment.channels_last else torch.contiguous_format


def _crops(
    split: data.Split, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    sections = torch.randint(len(split.images), (count,), generator=generator).tolist()
    tops, lefts = (
        torch.randint(side - CROP + 1, (count,), generator=generator).tolist()
        for side in split.images.shape[2:]
    )
    places = list(zip(sections, tops, lefts, strict=True))
    images, labels = (
        torch.stack(
            [
                part[section, :, top : top + CROP, left : left + CROP]
                for section, top, left in places
            ]
        )
        for part in (split.images, split.labels)
    )
    return images, labels


def _batches(
    experiment: Experiment, split: data.Split, seed: int, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield training batches from an iteration on: what comes depends on seed and iteration alone."""
    if experiment.data == "micrographs":
        for iteration in itertools.count(start):
            yield _crops(split, experiment.batch_size, stream(seed, "order", iteration))
    per_epoch = len(split.images) // experiment.batch_size  # the incomplete last batch is left out
    for iteration in itertools.count(start):
        epoch, place = divmod(iteration, per_epoch)
        if place == 0 or iteration == start:
            order = torch.randperm(len(split.images), generator=stream(seed, "order", epoch)).to(
                split.images.device
            )
        rows = order[place * experiment.batch_size : (place + 1) * experiment.batch_size]
        yield split.images[rows], split.labels[rows]


def _calibration(experiment: Experiment, split: data.Split, seed: int) -> torch.Tensor:
    generator = stream(seed, "calibration")
    if experiment.data == "micrographs":
        return _crops(split, experiment.calibration, generator)[0]
    order = torch.randperm(len(split.images), generator=generator)
    return split.images[order[: experiment.calibration].to(split.images.device)]


def _loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if scores.ndim == 4:
        return F.binary_cross_entropy_with_logits(scores, labels)
    return F.cross_entropy(scores, labels)


def _held_out(
    model: nn.Module, split: data.Split, memory_format: torch.memory_format
) -> dict[str, float]:
    """Loss and fraction of images (or of pixels) classified wrongly, in evaluation mode; for masks, how much they overlap."""
    model.eval()
    with torch.no_grad():
        parts = torch.split(split.held_out_images, 256)
        scores = torch.cat([model(images.to(memory_format=memory_format)) for images in parts])
    model.train()
    labels = split.held_out_labels
    guesses = (scores > 0).to(labels) if scores.ndim == 4 else scores.argmax(1)
    found = {
        "held_out_loss": float(_loss(scores, labels)),
        "held_out_error": float((guesses != labels).double().mean()),
    }
    if scores.ndim == 4:
        union = float(torch.maximum(guesses, labels).sum())
        found["held_out_iou"] = float((guesses * labels).sum()) / union if union else 1.0
    return found


def _measure(
    model: nn.Module, split: data.Split, seed: int, memory_format: torch.memory_format
) -> dict[str, Any]:
    """The decomposition and the gradient, layer by layer, in training mode, and what the held-out data say."""
    count = max(16, _PROBED // split.images[0, 0, :CROP, :CROP].numel())
    images = split.held_out_images[:count].contiguous(memory_format=memory_format)
    layers, units = probe(model, images), probe(model, images, positions="units")
    by_layer = {
        "name": layers.name,
        "m2": layers.m2,
        "v2": layers.v2,
        "m2_units": units.m2,
        "v2_units": units.v2,
    }
    by_layer["gradient2"] = probe_gradients(model, images, seed=seed).gradient2
    return {name: column.tolist() for name, column in by_layer.items()} | _held_out(
        model, split, memory_format
    )


def source(
    experiment: Experiment | Mapping[str, Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> str:
    """Which copy of the data an experiment would train on. Raises what :func:`run` does for experiment, data and device.

    Examples:
        >>> source(Experiment("digits", "total", width=4, iterations=1))
        "scikit-learn's digits"
    """
    return _prepare(experiment, folder, device)[1].source


def initialized(
    experiment: Experiment | Mapping[str, Any],
    seed: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The experiment's network with its initialization, in training mode.

    The same seed gives all three initializations the same He weights and the same calibration
    batch.

    Args:
        experiment: The configuration, or a mapping with its fields.
        seed: Seed of weights and calibration batch.
        folder: Where CIFAR-10 or micrographs lie; ``None`` takes the environment variable
            SVLIB_DATA.
        device: Where the network goes.

    Raises:
        TypeError: If ``experiment`` is not an Experiment or ``seed`` not an integer.
        ValueError: If ``seed`` is negative, the device not there, or there are fewer images than a
            batch wants.
        FileNotFoundError: If the data are not in ``folder``.
    """
    experiment, split, device = _prepare(experiment, folder, device)
    model = _network(experiment, seed).to(device)
    model.to(memory_format=_memory_format(experiment))  # type: ignore[call-overload]  # torch's stubs lack it
    initializers: dict[str, Callable[..., Any]] = {
        "total": init.total_, "layer": partial(init.total_, centred=True), "sample": init.sample_,
    }  # fmt: skip
    if experiment.initialization in initializers:
        calibration = _calibration(experiment, split, seed).contiguous(
            memory_format=_memory_format(experiment)
        )
        initializers[experiment.initialization](model, calibration)
    return model


@dataclass
class _State:
    """How far a run is: what a checkpoint holds, from which a longer run goes on."""

    losses: torch.Tensor
    gradient_norms: torch.Tensor
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)
    iteration: int = 0
    diverged: int = -1
    seconds: float = 0.0  # in steps of training
    initialization_seconds: float = 0.0
    wall_time: float = 0.0
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None

    def lengthen(self, iterations: int) -> None:
        """Make room for the curves of a longer run."""
        missing = max(0, iterations - len(self.losses))
        self.losses, self.gradient_norms = (
            F.pad(x, (0, missing), value=torch.nan) for x in (self.losses, self.gradient_norms)
        )

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        torch.save(vars(self), content)
        write_whole(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())

    @classmethod
    def load(cls, path: Path, device: torch.device) -> _State | None:
        """What the file holds, or ``None``, with a warning, if it is damaged."""
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return cls(
                **torch.load(io.BytesIO(content[32:]), map_location=device, weights_only=True)
            )
        path.rename(path.with_suffix(".rejected"))
        warnings.warn(
            f"{path} is damaged; set aside as {path.stem}.rejected, the run starts again",
            stacklevel=3,
        )
        return None


def run(
    experiment: Experiment | Mapping[str, Any],
    seed: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    source: str | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    every: float = _CLOCK,
    progress: bool | None = None,
) -> xr.Dataset:
    """Train one network.

    With ``checkpoints``, a run that was killed goes on from its last one, a longer run from a
    shorter one's end, and ends, on the same machine with the same number of threads, with the same
    numbers bit for bit: batches depend on seed and iteration alone, and cuDNN is held to
    deterministic algorithms. A point of :func:`svlib.sweep.run` is ``{"experiment":
    dataclasses.asdict(experiment), "seed": seed}``.

    Args:
        experiment: The configuration, or a mapping with its fields.
        seed: Seed of weights, calibration batch and order of the data; runs with one seed are
            paired.
        folder: Where CIFAR-10 or micrographs lie; ``None`` takes the environment variable
            SVLIB_DATA.
        device: Where to train.
        source: The copy of the data that is meant, as :func:`source` gives it, so that a sweep does
            not mix two; ``None``: any.
        checkpoints: Folder of checkpoints, made if missing; each run has a file of its own.
            ``None`` keeps none.
        every: Seconds between checkpoints.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Returns:
        Dataset with ``loss`` and ``gradient_norm`` (iteration): of each step's batch before the
        step, the norm over all parameters; of more than 2,000 iterations, means over windows that
        begin at ``iteration``. At the iterations ``probed`` (0, those asked for, the last): ``m2``,
        ``v2``, ``m2_units``, ``v2_units``, ``gradient2`` (probed, layer), of the outputs of
        weighted layers on held-out images of 2**18 pixels in training mode, positions as samples
        and as units (see :func:`svlib.probe` and :func:`svlib.probe_gradients`); ``held_out_loss``,
        ``held_out_error`` (fraction of wrong images or pixels) and, for masks, ``held_out_iou``
        (intersection over union of membranes) (probed). ``attrs`` hold configuration, seed,
        ``source`` of the data, versions, device, ``wall_time``, ``initialization_seconds``,
        ``seconds_per_iteration`` and ``diverged``: -1, or the iteration at which the run ended,
        because its loss was not finite or above 10,000 or, where probed, a layer's output not
        finite. All numbers from there on are NaN. Of micrographs the first tiles are probed.

    Raises:
        TypeError: If ``experiment`` is not an Experiment or ``seed`` not an integer.
        ValueError: If ``seed`` or ``every`` is negative, the device not there, the data another
            copy than ``source``, or there are fewer images than a batch wants.
        FileNotFoundError: If the data are not in ``folder``.
        OSError: If a checkpoint cannot be written; the one before it stays.

    Warns:
        UserWarning: If a checkpoint is damaged; it is set aside and the run starts again. If the
            last one cannot be written.

    Examples:
        >>> record = run(Experiment("digits", "sample", width=4, iterations=2, batch_size=8), seed=0)
        >>> dict(record.sizes)["iteration"], record.attrs["diverged"]
        (2, -1)
    """
    started = time.perf_counter()
    seed, every = _check.integer("seed", seed, 0), _check.real("every", every, 0)
    experiment, split, device = _prepare(experiment, folder, device)
    if source not in (None, split.source):
        raise ValueError(
            f"source must be that of the data in the folder, {split.source!r}, got {source!r}"
        )
    path, state = None, None
    if checkpoints is not None:
        path = Path(checkpoints) / f"{_identity(experiment, seed, split, device)}.checkpoint"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = _State.load(path, device) if path.exists() else None
    probed = sorted({0, *experiment.probed, experiment.iterations})
    if state is not None:
        state.lengthen(experiment.iterations)
        passed = [
            at
            for at in probed
            if at < state.iteration and at not in state.measured and state.diverged < 0
        ]
        if passed:
            message = (
                f"checkpoints must be of a run that was probed at {passed}, got one that is past it"
            )
            raise ValueError(f"{message} ({state.iteration}): take another folder")
    started_initialization = time.perf_counter()
    model = initialized(experiment, seed, folder=folder, device=device)
    if state is None:
        losses, norms = (
            torch.full((experiment.iterations,), torch.nan, device=device) for _ in range(2)
        )
        state = _State(
            losses, norms, initialization_seconds=time.perf_counter() - started_initialization
        )
    started -= state.wall_time
    optimizer = torch.optim.SGD(
        model.parameters(), lr=experiment.learning_rate, momentum=experiment.momentum
    )
    if state.model is not None and state.optimizer is not None:
        model.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
    batches = _batches(experiment, split, seed, state.iteration)
    stops = sorted({*probed, *range(0, experiment.iterations, _LOOK)})
    saved = time.perf_counter()
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    hidden = None if progress is None else not progress
    with exact, tqdm(total=experiment.iterations, initial=state.iteration, disable=hidden) as bar:
        while state.diverged < 0:
            if state.iteration in probed and state.iteration not in state.measured:
                try:
                    state.measured[state.iteration] = _measure(
                        model, split, seed, _memory_format(experiment)
                    )
                except _check.NotFiniteError:
                    if state.iteration == 0:
                        raise
                    state.diverged = state.iteration
                    break
            if state.iteration >= experiment.iterations:
                break
            if path and time.perf_counter() - saved >= every:
                state.model, state.optimizer = model.state_dict(), optimizer.state_dict()
                state.wall_time, saved = time.perf_counter() - started, time.perf_counter()
                state.save(path)
            stop = next(stop for stop in stops if stop > state.iteration)
            _steps(
                experiment,
                model,
                optimizer,
                itertools.islice(batches, stop - state.iteration),
                state,
                bar,
            )
    state.model, state.optimizer, state.wall_time = (
        model.state_dict(),
        optimizer.state_dict(),
        time.perf_counter() - started,
    )
    if path:
        try:
            state.save(path)
        except OSError as error:  # the caller gets the record all the same
            warnings.warn(
                f"the run is over, its last checkpoint could not be written: {error}", stacklevel=2
            )
    return _record(experiment, seed, split, state, probed)


def _identity(experiment: Experiment, seed: int, split: data.Split, device: torch.device) -> str:
    """A name for all that a run's numbers depend on: not on how long it is, nor on when it is looked at."""
    common = {
        name: value
        for name, value in asdict(experiment).items()
        if name not in ("iterations", "probed")
    }
    text = json.dumps(
        [common, seed, split.source, version("svlib"), str(torch.__version__), device.type]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _steps(
    experiment: Experiment,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    state: _State,
    bar: Any,
) -> None:
    """Train on the batches, then look whether a loss is lost."""
    clock, first = time.perf_counter(), state.iteration
    device_type = state.losses.device.type
    for images, labels in batches:
        with torch.autocast(device_type, torch.bfloat16, enabled=experiment.mixed_precision):
            loss = _loss(model(images.contiguous(memory_format=_memory_format(experiment))), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        state.losses[state.iteration] = loss.detach()
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        state.gradient_norms[state.iteration] = nn.utils.get_total_norm(gradients)
        optimizer.step()
        state.iteration += 1
        bar.update()
    lost = torch.nonzero(
        ~(state.losses[first : state.iteration] <= _LOST)
    )  # a GPU is waited for here, and only here
    state.diverged = first + int(lost[0]) if len(lost) else -1
    state.seconds += time.perf_counter() - clock


def _record(
    experiment: Experiment, seed: int, split: data.Split, state: _State, probed: list[int]
) -> xr.Dataset:
    series = {
        "loss": state.losses.cpu().numpy(),
        "gradient_norm": state.gradient_norms.cpu().numpy(),
    }
    length = experiment.iterations  # of a run that may have gone on beyond
    diverged = state.diverged if state.diverged < length or length not in state.measured else -1
    done = length if diverged < 0 else diverged
    starts = np.arange(0, length, -(-length // _CURVE))
    for name, values in series.items():
        curve = values[:length].astype(np.float64)
        curve[done:] = np.nan
        series[name] = (np.add.reduceat(curve, starts) / np.diff(starts, append=length)).astype(
            np.float32
        )
    first = state.measured[0]
    kept = [state.measured.get(at, {}) if diverged < 0 or at < done else {} for at in probed]
    scalars, per_layer = {}, {}
    for name, values in first.items():
        if name.startswith("held_out"):
            scalars[name] = [found.get(name, np.nan) for found in kept]
        elif name != "name":
            per_layer[name] = [found.get(name, [np.nan] * len(values)) for found in kept]
    attributes = asdict(experiment) | {
        "probed": list(probed), "seed": seed, "source": split.source, "diverged": diverged,
        "initialization_seconds": round(state.initialization_seconds, 4),
        "seconds_per_iteration": round(state.seconds / max(1, state.iteration), 6),
    }  # fmt: skip
    attributes = {
        name: int(value) if isinstance(value, bool) else value for name, value in attributes.items()
    }  # for netCDF
    attributes |= provenance(state.losses.device, time.perf_counter() - state.wall_time)
    return xr.Dataset(
        {name: ("iteration", values) for name, values in series.items()}
        | {name: (("probed", "layer"), values) for name, values in per_layer.items()}
        | {name: ("probed", values) for name, values in scalars.items()},
        coords={"iteration": starts, "probed": probed, "layer": first["name"]},
        attrs=attributes,
    )


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
    """Points of a comparison for :func:`svlib.sweep.run` with :func:`run`: every initialization at every rate, seed by seed.

    Args:
        data: As in :class:`Experiment`.
        scale: "quick" (seconds a run); of CIFAR-10 and micrographs also "laptop" (a minute or two a
            run on two cores), "overnight" (about an hour) and "paper" (a GPU).
        seeds: Number of seeds, from 0.
        initializations: Some of total, sample, batchnorm.
        learning_rates: The grid; ``None`` takes the five of ``LEARNING_RATES``.
        width: Channels of the first layer; ``None`` takes the scale's.
        iterations: Steps of SGD; ``None`` takes the scale's. Where fewer, what was to be probed
            behind them is not.
        mixed_precision: As in :class:`Experiment`.

    Raises:
        TypeError: If a number is not a number.
        ValueError: If a name is unknown, the data have no such scale, or a number is out of range.

    Examples:
        >>> len(grid("cifar10", "laptop"))  # 3 initializations, 5 rates, 3 seeds
        45
    """
    _check.choice("data", data, DATA)
    settings = dict(
        SCALES[
            _check.choice("scale", scale, [name for name, sizes in SCALES.items() if data in sizes])
        ][data]
    )
    if width is not None:
        settings["width"] = width
    if iterations is not None:
        last = settings["iterations"] = _check.integer("iterations", iterations)
        settings["probed"] = tuple(at for at in settings.get("probed", ()) if at <= last)
    rates = LEARNING_RATES[data] if learning_rates is None else tuple(learning_rates)
    return [
        {
            "experiment": asdict(
                Experiment(
                    data, kind, learning_rate=rate, mixed_precision=mixed_precision, **settings
                )
            ),
            "seed": seed,
        }
        for seed in range(_check.integer("seeds", seeds))
        for rate in rates
        for kind in initializations
    ]


def collect(records: Iterable[xr.Dataset]) -> xr.Dataset:
    """Join records of :func:`run` along ``initialization``, ``learning_rate`` and ``seed``; layers are counted from 1.

    What differs from run to run in ``attrs`` (``diverged``, times) becomes a variable;
    ``wall_time`` is also summed up in ``attrs``. Runs that are missing from the grid are NaN.

    Raises:
        ValueError: If there are none, or they are of other data, of other copies of them, of other
            configurations or versions.
    """
    listed = list(records)
    if not listed:
        raise ValueError("records must hold at least one, got none")
    settings = [
        f for f in Experiment.__dataclass_fields__ if f not in ("initialization", "learning_rate")
    ]
    for name in (*settings, "source", "svlib", "torch"):
        if len(found := {str(np.asarray(record.attrs[name]).tolist()) for record in listed}) > 1:
            raise ValueError(f"records must agree in {name}, got {sorted(found)}")
    varying = ("diverged", "initialization_seconds", "seconds_per_iteration", "wall_time")
    parts = [
        record.assign_coords(layer=np.arange(1, record.sizes["layer"] + 1))
        .assign({name: record.attrs[name] for name in varying})
        .drop_attrs()
        .expand_dims(
            {name: [record.attrs[name]] for name in ("initialization", "learning_rate", "seed")}
        )
        for record in listed
    ]
    joined = xr.merge(parts, join="outer", compat="no_conflicts")
    joined = joined.sel(
        initialization=[
            kind for kind in INITIALIZATIONS + VARIANTS if kind in joined.initialization
        ]
    )
    common = {
        name: x
        for name, x in listed[0].attrs.items()
        if all(np.array_equal(x, r.attrs[name]) for r in listed)
    }
    return joined.assign_attrs(common | {"wall_time": float(joined.wall_time.sum())})
