r"""The rows of a table, and the forward pass that fills them.

What positions count as. With :math:`y_{aup}` the output for input a, unit u, position p,

- ``positions="samples"`` counts positions as samples, though not as independent ones: :math:`m^2`
  is the mean over u and over pairs of different inputs of :math:`\bar y_{au}\bar y_{bu}`, where
  :math:`\bar y_{au}` is the mean over p, and :math:`v^2=\overline{y^2}-m^2`;
- ``positions="units"`` keeps them apart: every pair (u, p) is a unit, and :math:`m^2` is the mean
  of :math:`y_{aup}y_{bup}`. A pattern over positions that all inputs share then counts as mean, not
  as variance.

Without positions the two agree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from svlib import _check
from svlib.moments import Moments
from svlib.probing.batches import counted
from svlib.probing.models import (
    Dimensions,
    LostInputsError,
    MaskError,
    MergedInputsError,
)

Layers = str | Sequence[str | type[nn.Module]] | None
POSITIONS = ("samples", "units")


@dataclass(frozen=True)
class Values:
    """What was measured of an output; the table of :func:`svlib.probe` has the same columns.

    Attributes:
        mean2: Squared mean over inputs and units.
        dead: Fraction of units that are positive for no input; ``deep``: that are above -3.
        cosine: Mean cosine of two inputs, NaN where positions count as samples.
        maximum: Largest absolute value, if it was asked for.
    """

    kind: str
    shape: tuple[int, ...]
    m2: float
    v2: float
    sigma2: float
    fraction: float
    ratio: float
    dead: float
    samples: int
    mean2: float
    deep: float
    cosine: float = math.nan
    maximum: float = math.nan

    @property
    def spread(self) -> float:
        """The smaller one of v^2/sigma^2 and, of many units, 1 minus the mean cosine: what tells
        inputs apart, by their length too or by their direction alone."""
        wide = math.prod(self.shape) >= _DIRECTIONS and math.isfinite(self.cosine)
        return min(self.fraction, 1 - self.cosine) if wide else self.fraction


_DIRECTIONS = 16  # units below which a mean cosine says little
COLUMNS = ("shape", "m2", "v2", "sigma2", "fraction", "ratio", "dead", "samples")


class Row:
    """The moments of one output over the batches and, on request, the mean cosine of two inputs."""

    def __init__(
        self,
        kind: str,
        y: torch.Tensor,
        dims: Dimensions,
        positions: str,
        *,
        directions: bool = False,
        maximum: bool = False,
    ) -> None:
        self.kind, self._flat, self._maximum = kind, positions == "units", maximum
        self.shape = tuple(size for dim, size in enumerate(y.shape) if dim != dims[0])
        self.moments = Moments(0, 1, () if self._flat else (2,))
        self._directions = directions and (self._flat or not dims[2])
        self._sum, self._count = torch.zeros((), dtype=torch.float64), 0  # of unit vectors
        self._peak = 0.0

    def update(self, y: torch.Tensor, dims: Dimensions, mask: torch.Tensor | None = None) -> Row:
        """Add an output of a batch."""
        y, mask = counted(y, dims, mask)
        if not y.shape[dims[0]]:
            return self
        if self._flat:
            y = y.movedim(dims[0], 0).flatten(1)
        else:  # (inputs, units, positions)
            y = y.permute(dims[0], dims[1], *dims[2])
            y = y.flatten(2) if dims[2] else y[..., None]
        mask = None if mask is None else mask.flatten(1)
        self.moments.update(y, mask)
        if self._maximum:
            held = (y if mask is None else y.movedim(1, 2)[mask]).detach()
            self._peak = max(self._peak, float(held.abs().max()))
        if self._directions:
            unit = nn.functional.normalize(y.detach().double().flatten(1), dim=1)
            self._count += int((unit != 0).any(1).sum())
            self._sum = self._sum + unit.sum(0).cpu()
        return self

    def merge(self, other: Row) -> None:
        """Add what another row has seen."""
        self.moments.merge(other.moments)
        self._peak = max(self._peak, other._peak)
        self._sum, self._count = self._sum + other._sum, self._count + other._count

    def values(self) -> Values:
        """What was measured so far."""
        found, n = self.moments.result(), self._count
        square = float(self._sum.square().sum())
        return Values(
            kind=self.kind,
            shape=self.shape,
            m2=float(found.m2),
            v2=float(found.v2),
            sigma2=float(found.sigma2),
            fraction=float(found.fraction),
            ratio=float(found.ratio),
            dead=float((found.largest <= 0).mean()),
            samples=found.samples,
            mean2=float(found.mean.mean()) ** 2,
            deep=float((found.largest <= -3).mean()),
            cosine=(square - n) / (n * (n - 1)) if n > 1 else math.nan,
            maximum=self._peak if self._maximum else math.nan,
        )


class UnreadError(MergedInputsError):
    """An output whose entries are no real numbers, or cannot be read."""


class _LeftOut(NamedTuple):
    """Why an output has no row, and whether a warning is enough to say so."""

    error: ValueError
    excusable: bool


class Rows:
    """The rows of a table in execution order, gathered over forward passes.

    An output that cannot have a row does not end the pass: ``left_out`` holds the reason by name,
    and the caller decides what is an error.
    """

    def __init__(
        self, layers: Layers, positions: str, *, directions: bool = False, maximum: bool = False
    ) -> None:
        self.positions = _check.choice("positions", positions, POSITIONS)
        maximum = _check.choice("maximum", maximum, (True, False))
        self._options = {"directions": directions, "maximum": maximum}
        self._layers = layers
        self._chosen, self.everything = _selection(layers), layers is not None
        self._rows: dict[str, Row] = {}
        self.left_out: dict[str, _LeftOut] = {}
        self.over_inputs: dict[str, None] = {}  # names of recurrences and attention between inputs

    def asks_for(self, module: nn.Module | None, *names: str) -> bool:
        """Whether an output with one of these names is asked for."""
        return any(self._chosen(name, module) for name in names)

    def add(
        self,
        name: str,
        module: nn.Module | None,
        kind: str,
        y: torch.Tensor,
        dims: Dimensions,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Add an output of a module or of a function to its row."""
        if name not in self._rows:
            self._rows[name] = Row(kind, y, dims, self.positions, **self._options)
        try:
            self._rows[name].update(y, dims, mask)
        except _check.NotFiniteError as error:  # scores of attention are not, under a mask
            found = _check.NotFiniteError(f"layer {name!r}: {error}")
            self.leave_out(name, found, excusable=module is None)
        except ValueError as error:
            excusable = isinstance(error, MaskError)  # what has fewer positions than the mask
            kind_of_error = MaskError if excusable else ValueError
            self.leave_out(name, kind_of_error(f"layer {name!r}: {error}"), excusable=excusable)

    def leave_out(self, name: str, error: ValueError, *, excusable: bool) -> None:
        """From now on this output has no row."""
        self._rows.pop(name, None)
        self.left_out[name] = _LeftOut(error, excusable)

    def empty(self) -> Rows:
        """Rows of the same kind for one batch, to be merged."""
        return Rows(self._layers, self.positions, **self._options)

    def merge(self, other: Rows) -> None:
        """Add the rows of a batch; an output that had none in one of them has none."""
        for name, row in other._rows.items():
            if name in self._rows:
                try:
                    self._rows[name].merge(row)
                except ValueError as error:
                    self.leave_out(name, ValueError(f"layer {name!r}: {error}"), excusable=False)
            elif name not in self.left_out:
                self._rows[name] = row
        for name, left in other.left_out.items():
            self.leave_out(name, left.error, excusable=left.excusable)
        self.over_inputs.update(other.over_inputs)

    def refuse(self) -> None:
        """Raise for an output without a row where a warning is not enough."""
        for left in self.left_out.values():
            if not left.excusable:
                raise left.error

    def names(self) -> set[str]:
        """Names of rows, and of outputs that were called and have none."""
        return {*self._rows, *self.left_out}

    def values(self) -> dict[str, Values]:
        """What was measured, by name."""
        return {name: row.values() for name, row in self._rows.items()}

    def frame(self) -> pd.DataFrame:
        """The table; empty without rows."""
        asked = {"maximum": self._options["maximum"], "cosine": self._options["directions"]}
        columns = [*COLUMNS, *(name for name, wanted in asked.items() if wanted)]
        return pd.DataFrame(
            {"name": name, "type": x.kind} | {column: getattr(x, column) for column in columns}
            for name, x in self.values().items()
        )

    def warn(self, uncalled: Iterable[str] = (), *, stacklevel: int) -> None:
        """Say which outputs have no row, and why."""
        if self.over_inputs:
            text = f"{len(self.over_inputs)} modules run over the first dimension, where inputs are"
            text += " taken to lie, as over time (batch_first=False, or no dimension for a batch): "
            warnings.warn(text + some(self.over_inputs), stacklevel=stacklevel + 1)
        reasons = {"were not called as modules": list(uncalled)}
        for name, (error, _) in self.left_out.items():
            reasons.setdefault(_reason(error), []).append(name)
        for reason, names in reasons.items():
            if names:
                text = f"{len(names)} outputs have no row because they {reason}: {some(names)}"
                warnings.warn(text, stacklevel=stacklevel + 1)


def _reason(error: ValueError) -> str:
    if isinstance(error, LostInputsError):
        return "have inputs along a dimension that could not be followed"
    if isinstance(error, MaskError):
        return "have other positions than the mask"
    if isinstance(error, _check.NotFiniteError):
        return "are not finite"
    if isinstance(error, UnreadError):
        return str(error)
    if isinstance(error, MergedInputsError):
        return "do not keep the inputs of a batch apart"
    return str(error)


def some(names: Iterable[str]) -> str:
    """The first five names, in words."""
    listed = list(names)
    return ", ".join([*listed[:5], *["..."] * bool(listed[5:])])


def _selection(layers: Layers) -> Callable[[str, nn.Module | None], bool]:
    """Whether a row is asked for, by its name and its module."""
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return lambda name, module: True
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        wanted = "None, 'all' or a list of names and module types"
        raise TypeError(f"layers must be {wanted}, got {layers!r}")
    listed = list(layers)
    patterns = [x for x in listed if isinstance(x, str)]
    types = tuple(x for x in listed if isinstance(x, type) and issubclass(x, nn.Module))
    wrong = [x for x in listed if x not in patterns and x not in types]
    if wrong or not listed:
        wanted = "names (with * as a wildcard) or module types"
        raise TypeError(f"layers must hold {wanted}, got {wrong or listed}")

    def chosen(name: str, module: nn.Module | None) -> bool:
        by_name = any(name == x or (name and fnmatchcase(name, x)) for x in patterns)
        return isinstance(module, types) or by_name

    return chosen
