"""One training run in, one record out: total init, sample init or BatchNorm.

ALL-CNN-C on digits or CIFAR-10, or a U-Net on drawn membranes or electron micrographs. The paper
does not state its optimizer, learning rate, batch size or calibration batch; plain SGD with
momentum stands in, without weight decay, dropout or augmentation.

A **record** holds ``loss`` and ``gradient_norm`` by iteration: those of each step's batch before
the step, the norm over all parameters; of more than 2,000 iterations, means over windows that begin
at ``iteration``. At the iterations ``probed`` (0, those asked for, the last) it holds ``m2``,
``v2``, ``m2_units``, ``v2_units`` and ``gradient2`` of the outputs of weighted layers, on held-out
images of 2**18 pixels (of micrographs, the first tiles) in training mode, positions as samples and
as units (see :func:`svlib.probe` and :func:`svlib.probe_gradients`); and ``held_out_loss``,
``held_out_error`` (fraction of wrong images or pixels) and, for masks, ``held_out_iou``
(intersection over union of membranes). Its ``attrs`` hold configuration, seed, ``source`` and
``sha256`` of the data, versions, device, ``wall_time``, ``initialization_seconds``,
``seconds_per_iteration`` and ``diverged``: -1, or the iteration at which the run ended, because its
loss was not finite or above 10,000 or, where probed, a layer's output was not finite. All numbers
from there on are NaN.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

from svlib import _check
from svlib._files import provenance
from svlib.experiments.comparison import collect
from svlib.experiments.experiment import (
    DATA,
    INITIALIZATIONS,
    LEARNING_RATES,
    SCALES,
    VARIANTS,
    Experiment,
    grid,
)
from svlib.experiments.state import State
from svlib.experiments.task import Batch, Task, loss

__all__ = [
    "DATA", "INITIALIZATIONS", "LEARNING_RATES", "SCALES", "VARIANTS",
    "Experiment", "collect", "grid", "initialized", "run",
]  # fmt: skip

_LOST = 1e4  # a loss above this has diverged, as one that is not finite
_LOOK = 50  # iterations between looks at the losses: on a GPU every look waits for it
_CLOCK = 60.0  # seconds between checkpoints


def initialized(
    experiment: Experiment | Mapping[str, Any],
    seed: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The experiment's network with its initialization, in training mode.

    The same seed gives all initializations the same He weights and the same calibration batch.

    Args:
        experiment: The configuration, or a mapping with its fields.
        seed: Seed of weights and calibration batch.
        folder: Where CIFAR-10 or micrographs lie; ``None`` takes the environment variable
            SVLIB_DATA.
        device: Where the network goes.

    Raises:
        ValueError: If there are fewer images than a batch wants.
        FileNotFoundError: If the data are not in ``folder``.
    """
    return Task.load(experiment, folder, device).initialized(seed)


def run(
    experiment: Experiment | Mapping[str, Any],
    seed: int,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    sha256: str | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    every: float = _CLOCK,
    progress: bool | None = None,
) -> xr.Dataset:
    """Train one network; :mod:`svlib.experiments.training` describes the record.

    With ``checkpoints``, a run that was killed goes on from its last one, and a longer run from a
    shorter one's end, bit for bit on the same machine with as many threads: batches depend on seed
    and iteration alone, and cuDNN is held to deterministic algorithms.

    Args:
        experiment: The configuration, or a mapping with its fields.
        seed: Seed of weights, calibration batch and order; runs with one seed are paired.
        folder: As for :func:`initialized`.
        device: Where to train.
        sha256: Train on the copy of the data with this checksum only; ``None``: on any.
        checkpoints: Folder of checkpoints, made if missing; each run has a file of its own.
        every: Seconds between checkpoints.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Raises:
        ValueError: If there are too few images, the data are another copy than ``sha256``, or a
            checkpoint is past an iteration that is to be probed.
        OSError: If the data are not in ``folder``, or a checkpoint cannot be written.

    Warns:
        UserWarning: If a checkpoint is damaged, or the last one cannot be written.

    Examples:
        >>> record = run(Experiment("digits", "sample", width=4, iterations=2, batch_size=8), 0)
        >>> dict(record.sizes)["iteration"], record.attrs["diverged"]
        (2, -1)
    """
    started = time.perf_counter()
    seed, every = _check.integer("seed", seed, 0), _check.real("every", every, 0)
    task = Task.load(experiment, folder, device)
    if sha256 not in (None, task.split.sha256):
        raise ValueError(f"sha256 must be the data's, {task.split.sha256!r}, got {sha256!r}")
    about = provenance(task.device, started)
    path = _checkpoint(Path(checkpoints), task, seed, about) if checkpoints is not None else None
    state = State.load(path, task.device)
    state.lengthen(task.experiment)
    training = _Training(task, seed, state, started)
    training.until_end(path, every, progress)
    try:
        training.save(path)
    except OSError as error:  # the caller gets the record all the same
        text = "the run is over, its last checkpoint could not be written"
        warnings.warn(f"{text}: {error}", stacklevel=2)
    about = provenance(task.device, started) | {"seed": seed}
    about |= {"source": task.split.source, "sha256": task.split.sha256}
    record = state.record(task.experiment)
    return record.assign_attrs(about | record.attrs)


def _checkpoint(folder: Path, task: Task, seed: int, about: Mapping[str, Any]) -> Path:
    """A file named by all that the numbers depend on: not by the run's length or its probes."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(task.experiment)
    del settings["probed"]
    if task.experiment.schedule == "constant":  # else the length decides every step
        del settings["iterations"]
    identity = [settings, seed, task.split.sha256, task.device.type, about["svlib"], about["torch"]]
    text = json.dumps(identity)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.checkpoint"


class _Training:
    """A run under way: its network, its optimizer, and the state that a checkpoint keeps."""

    def __init__(self, task: Task, seed: int, state: State, started: float) -> None:
        self.task, self.seed, self.state = task, seed, state
        self.started, self.earlier = started, state.wall_time
        clock = time.perf_counter()
        self.model = (task.initialized if state.model is None else task.network)(seed)
        experiment = task.experiment
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), experiment.learning_rate, experiment.momentum
        )
        if state.model is None or state.optimizer is None:
            state.initialization_seconds = time.perf_counter() - clock
        else:
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)

    def until_end(self, path: Path | None, every: float, progress: bool | None) -> None:
        """Train to the last iteration or to divergence, with measurements and checkpoints."""
        state, experiment = self.state, self.task.experiment
        end, saved = experiment.iterations, time.perf_counter()
        stops = sorted({*experiment.moments, *range(0, end, _LOOK)})
        batches = self.task.batches(self.seed, state.iteration)
        hidden = None if progress is None else not progress
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with exact, tqdm(total=end, initial=state.iteration, disable=hidden) as bar:
            while state.diverged < 0:
                if state.iteration in experiment.moments and state.iteration not in state.measured:
                    self.measure()
                if state.diverged >= 0 or state.iteration >= end:
                    break
                if time.perf_counter() - saved >= every:
                    self.save(path)
                    saved = time.perf_counter()
                stop = next(stop for stop in stops if stop > state.iteration)
                self.steps(itertools.islice(batches, stop - state.iteration), bar)

    def measure(self) -> None:
        """Measure layers and held-out data; a network whose outputs are not finite has diverged."""
        state = self.state
        try:
            state.measured[state.iteration] = self.task.measure(self.model, self.seed)
        except _check.NotFiniteError:
            if state.iteration == 0:
                raise
            state.diverged = state.iteration

    def steps(self, batches: Iterable[Batch], bar: tqdm[Any]) -> None:
        """Train on the batches, then check for divergence."""
        task, state, model = self.task, self.state, self.model
        clock, first = time.perf_counter(), state.iteration
        mixed = task.experiment.mixed_precision
        for images, labels in batches:
            if task.experiment.schedule == "cosine":
                part = state.iteration / task.experiment.iterations
                rate = task.experiment.learning_rate * (1 + math.cos(math.pi * part)) / 2
                self.optimizer.param_groups[0]["lr"] = rate
            with torch.autocast(task.device.type, torch.bfloat16, enabled=mixed):
                value = loss(model(images.contiguous(memory_format=task.memory_format)), labels)
            self.optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            state.losses[state.iteration] = value.detach()
            gradients = [x.grad for x in model.parameters() if x.grad is not None]
            state.gradient_norms[state.iteration] = nn.utils.get_total_norm(gradients)
            self.optimizer.step()
            state.iteration += 1
            bar.update()
        # here, and only here, a GPU is waited for
        lost = torch.nonzero(~(state.losses[first : state.iteration] <= _LOST))
        state.diverged = first + int(lost[0]) if len(lost) else -1
        state.seconds += time.perf_counter() - clock

    def save(self, path: Path | None) -> None:
        """Write a checkpoint, if there is a place for it."""
        state = self.state
        state.model, state.optimizer = self.model.state_dict(), self.optimizer.state_dict()
        state.wall_time = self.earlier + time.perf_counter() - self.started
        if path is not None:
            state.save(path)
