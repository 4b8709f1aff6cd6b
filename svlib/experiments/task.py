"""An experiment with its data on a device: its networks, its batches, and how it is measured."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812, as torch's own documentation calls it

from svlib import _check
from svlib._random import stream
from svlib.experiments import data, networks
from svlib.experiments.experiment import CLASSES, Experiment
from svlib.probing import init
from svlib.probing.probe import probe, probe_gradients

CROP = 128  # pixels a side of micrographs: random crops in training, tiles of those held out
_PROBED = 2**18  # pixels: layers are measured on as many held-out images or tiles, at least 16
_INITIALIZERS: dict[str, Callable[..., Any]] = {
    "total": init.total_, "layer": partial(init.total_, centred=True), "sample": init.sample_,
}  # fmt: skip

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """An experiment, its data, and the device on which both are."""

    experiment: Experiment
    split: data.Split
    device: torch.device

    @classmethod
    def load(
        cls,
        experiment: Experiment | Mapping[str, Any],
        folder: str | os.PathLike[str] | None,
        device: torch.device | str,
    ) -> Task:
        """Read the data, and check that they, the experiment and the device go together."""
        experiment = Experiment(**experiment) if isinstance(experiment, Mapping) else experiment
        if not isinstance(experiment, Experiment):
            raise TypeError(f"experiment must be an Experiment, got {type(experiment).__name__}")
        device = _check.device(device)
        if experiment.mixed_precision and device.type != "cuda":
            raise ValueError(
                f"mixed_precision must be False unless device is cuda, got device {device}"
            )
        place = os.environ.get(data.FOLDER_VARIABLE) if folder is None else os.fspath(folder)
        split = _load(experiment.data, place, device, _files(place), experiment.centred)
        for name in ("batch_size", "calibration"):
            asked, there = getattr(experiment, name), len(split.images)
            if experiment.data != "micrographs" and asked > there:
                raise ValueError(f"{name} must be at most the {there} training images, got {asked}")
        return cls(experiment, split, device)

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie in memory."""
        last = self.experiment.channels_last
        return torch.channels_last if last else torch.contiguous_format

    def network(self, seed: int) -> nn.Module:
        """The network with He's weights, on the device."""
        experiment = self.experiment
        batchnorm = experiment.initialization == "batchnorm"
        model: nn.Module
        if experiment.data in CLASSES:
            channels = 3 if experiment.data == "cifar10" else 1
            model = networks.all_cnn_c(
                experiment.width, channels=channels, batchnorm=batchnorm, seed=seed
            )
        else:
            levels = 4 if experiment.data == "micrographs" else 2
            model = networks.UNet(experiment.width, levels=levels, batchnorm=batchnorm, seed=seed)
        model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return model

    def initialized(self, seed: int) -> nn.Module:
        """The network with the experiment's initialization."""
        model = self.network(seed)
        initialize = _INITIALIZERS.get(self.experiment.initialization)
        if initialize is not None:
            images = self._calibration(seed)
            initialize(model, images.contiguous(memory_format=self.memory_format))
        return model

    def _calibration(self, seed: int) -> torch.Tensor:
        generator, images = stream(seed, "calibration"), self.split.images
        if self.experiment.data == "micrographs":
            return self._crops(self.experiment.calibration, generator)[0]
        order = torch.randperm(len(images), generator=generator)
        return images[order[: self.experiment.calibration].to(self.device)]

    def batches(self, seed: int, start: int) -> Iterator[Batch]:
        """Yield training batches from an iteration on; each depends on seed and iteration alone."""
        size, split = self.experiment.batch_size, self.split
        if self.experiment.data == "micrographs":
            for iteration in itertools.count(start):
                yield self._crops(size, stream(seed, "order", iteration))
        per_epoch = len(split.images) // size  # the incomplete last batch is left out
        for iteration in itertools.count(start):
            epoch, place = divmod(iteration, per_epoch)
            if place == 0 or iteration == start:
                order = torch.randperm(len(split.images), generator=stream(seed, "order", epoch))
                order = order.to(self.device)
            rows = order[place * size : (place + 1) * size]
            yield split.images[rows], split.labels[rows]

    def _crops(self, count: int, generator: torch.Generator) -> Batch:
        split = self.split
        sections = torch.randint(len(split.images), (count,), generator=generator).tolist()
        tops, lefts = (
            torch.randint(side - CROP + 1, (count,), generator=generator).tolist()
            for side in split.images.shape[2:]
        )
        places = list(zip(sections, tops, lefts, strict=True))
        images, labels = (
            torch.stack([part[at, :, y : y + CROP, x : x + CROP] for at, y, x in places])
            for part in (split.images, split.labels)
        )
        return images, labels

    def measure(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Decomposition and gradient of each layer in training mode; errors on held-out data."""
        count = max(16, _PROBED // self.split.images[0, 0, :CROP, :CROP].numel())
        images = self.split.held_out_images[:count].contiguous(memory_format=self.memory_format)
        layers, units = probe(model, images), probe(model, images, positions="units")
        gradients = probe_gradients(model, images, seed=seed)
        columns = {
            "name": layers.name, "m2": layers.m2, "v2": layers.v2, "m2_units": units.m2,
            "v2_units": units.v2, "gradient2": gradients.gradient2,
        }  # fmt: skip
        found: dict[str, Any] = {name: column.tolist() for name, column in columns.items()}
        return found | self._held_out(model)

    def _held_out(self, model: nn.Module) -> dict[str, float]:
        """The model's errors in evaluation mode."""
        model.eval()
        with torch.no_grad():
            parts = torch.split(self.split.held_out_images, 256)
            scores = torch.cat([model(x.to(memory_format=self.memory_format)) for x in parts])
        model.train()
        return errors(scores, self.split.held_out_labels)


def errors(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Loss and fraction of wrong images or pixels; for masks, intersection over union."""
    masks = scores.ndim == 4
    guesses = (scores > 0).to(labels) if masks else scores.argmax(1)
    found = {
        "held_out_loss": float(loss(scores, labels)),
        "held_out_error": float((guesses != labels).double().mean()),
    }
    if masks:
        union = float(torch.maximum(guesses, labels).sum())
        found["held_out_iou"] = float((guesses * labels).sum()) / union if union else 1.0
    return found


def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy: of images with classes, or of pixels with masks."""
    if scores.ndim == 4:
        return F.binary_cross_entropy_with_logits(scores, labels)
    return F.cross_entropy(scores, labels)


@lru_cache(maxsize=2)
def _load(
    name: str,
    folder: str | None,
    device: torch.device,
    files: frozenset[tuple[str, int, int]],
    centred: bool,
) -> data.Split:
    """The data on the device. ``files`` tells a folder from what it was before."""
    if name in ("digits", "membranes"):
        split = data.digits() if name == "digits" else data.membranes(seed=0)
    else:
        split = data.cifar10(folder) if name == "cifar10" else _tiled(data.micrographs(folder))
    split = split if centred else _from_zero(split)
    images, labels, held_out_images, held_out_labels = (part.to(device) for part in split[:4])
    return data.Split(images, labels, held_out_images, held_out_labels, split.source, split.sha256)


def _files(folder: str | None) -> frozenset[tuple[str, int, int]]:
    """Path, time and size of the files in a folder and in its folders."""
    place = None if folder is None else Path(folder).resolve()
    found = [] if place is None else [*place.glob("*"), *place.glob("*/*")]
    files = [(path, path.stat()) for path in found if path.is_file()]
    return frozenset((str(path), about.st_mtime_ns, about.st_size) for path, about in files)


def _from_zero(split: data.Split) -> data.Split:
    """Images whose training values fill [0, 1], as a loader gives them."""
    low, high = float(split.images.min()), float(split.images.max())
    images, held_out = ((x - low) / (high - low) for x in (split.images, split.held_out_images))
    return split._replace(images=images, held_out_images=held_out)


def _tiled(split: data.Split) -> data.Split:
    """Cut the held-out sections into tiles of the size of the training crops."""
    if min(sides := tuple(split.images.shape[2:])) < CROP:
        raise ValueError(f"micrographs must be at least {CROP} pixels a side, got {sides}")

    def tiles(pictures: torch.Tensor) -> torch.Tensor:
        return pictures.unfold(2, CROP, CROP).unfold(3, CROP, CROP).reshape(-1, 1, CROP, CROP)

    return split._replace(
        held_out_images=tiles(split.held_out_images), held_out_labels=tiles(split.held_out_labels)
    )
