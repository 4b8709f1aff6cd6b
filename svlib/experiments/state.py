"""How far a training run is: what its checkpoint keeps, and the record that is made of it."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.nn import functional as F  # noqa: N812

from svlib._files import write_whole
from svlib.experiments.experiment import Experiment

_CURVE = 2_000  # points that a record keeps of a curve: means over windows of a longer one


@dataclass
class State:
    """A run at an iteration: a longer run can go on from it."""

    losses: torch.Tensor  # of each step's batch, before the step
    gradient_norms: torch.Tensor
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)  # by iteration
    iteration: int = 0
    diverged: int = -1  # or the iteration
    seconds: float = 0.0  # in steps of training
    initialization_seconds: float = 0.0
    wall_time: float = 0.0
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None

    def lengthen(self, experiment: Experiment) -> None:
        """Make room for the experiment's curves; refuse if a moment to probe has passed."""
        passed = [
            at
            for at in experiment.moments
            if at < self.iteration and at not in self.measured and self.diverged < 0
        ]
        if passed:
            raise ValueError(
                f"checkpoints must be of a run that was probed at {passed}, got one that is past "
                f"it ({self.iteration}): take another folder"
            )
        missing = max(0, experiment.iterations - len(self.losses))
        self.losses = F.pad(self.losses, (0, missing), value=torch.nan)
        self.gradient_norms = F.pad(self.gradient_norms, (0, missing), value=torch.nan)

    def save(self, path: Path) -> None:
        """Write the checkpoint, behind its own SHA-256."""
        content = io.BytesIO()
        torch.save(vars(self), content)
        write_whole(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())

    @classmethod
    def load(cls, path: Path | None, device: torch.device) -> State:
        """The state in the file; a new one without a file or, with a warning, if it is damaged."""
        if path is not None and path.exists():
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                kept = torch.load(io.BytesIO(content[32:]), device, weights_only=True)
                return cls(**kept)
            path.rename(path.with_suffix(".rejected"))
            warnings.warn(
                f"{path} is damaged; set aside as {path.stem}.rejected, the run starts again",
                stacklevel=3,
            )
        return cls(torch.empty(0, device=device), torch.empty(0, device=device))

    def record(self, experiment: Experiment) -> xr.Dataset:
        """Curves and measurements of a run of the experiment's length, which may be shorter."""
        length = experiment.iterations
        diverged = self.diverged if self.diverged < length or length not in self.measured else -1
        done = length if diverged < 0 else diverged
        starts = np.arange(0, length, -(-length // _CURVE))
        variables: dict[str, tuple[Any, Any]] = {
            "loss": ("iteration", _curve(self.losses, starts, length, done)),
            "gradient_norm": ("iteration", _curve(self.gradient_norms, starts, length, done)),
        }
        first, moments = self.measured[0], experiment.moments
        kept = [self.measured.get(at, {}) if diverged < 0 or at < done else {} for at in moments]
        for name, value in first.items():
            if isinstance(value, float):
                variables[name] = ("probed", [found.get(name, np.nan) for found in kept])
            elif name != "name":
                lost = [np.nan] * len(value)
                variables[name] = (("probed", "layer"), [found.get(name, lost) for found in kept])
        attributes = {  # netCDF knows no bool
            name: int(value) if isinstance(value, bool) else value
            for name, value in asdict(experiment).items()
        } | {
            "probed": moments,
            "diverged": diverged,
            "initialization_seconds": round(self.initialization_seconds, 4),
            "seconds_per_iteration": round(self.seconds / max(1, self.iteration), 6),
            "wall_time": round(self.wall_time, 3),
        }
        coordinates = {"iteration": starts, "probed": moments, "layer": first["name"]}
        return xr.Dataset(variables, coordinates, attributes)


def _curve(values: torch.Tensor, starts: np.ndarray, length: int, done: int) -> np.ndarray:
    """Means over windows that begin at ``starts``; NaN from the window on in which it ends."""
    curve = values[:length].cpu().numpy().astype(np.float64)
    curve[done:] = np.nan
    return (np.add.reduceat(curve, starts) / np.diff(starts, append=length)).astype(np.float32)
