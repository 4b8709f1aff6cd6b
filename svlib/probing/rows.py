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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from svlib import _check
from svlib.moments import Moments
from svlib.probing.axes import Axes, watching_sequences
from svlib.probing.calls import Call, Recorder, inputs_of
from svlib.probing.models import (
    DEPTH,
    Dimensions,
    LostInputsError,
    MergedInputsError,
    dimensions,
    hooked,
    named_modules,
    row_name,
    tensors,
    weighted_layers,
)
from svlib.probing.operations import Measured

Layers = str | Sequence[str | type[nn.Module]] | None
POSITIONS = ("samples", "units")


class _Row:
    """The moments of one row of the table and, on request, the mean cosine of two inputs."""

    def __init__(
        self,
        kind: str,
        y: torch.Tensor,
        dims: Dimensions,
        positions: str,
        *,
        directions: bool = False,
    ) -> None:
        self._axis, *others = dims[0], dims[1], *dims[2]
        self.kind, self._flat = kind, positions == "units"
        self.shape = tuple(size for dim, size in enumerate(y.shape) if dim != self._axis)
        unit, *places = (dim + (dim < self._axis) for dim in others)  # with the inputs in front
        self.moments = Moments(0, *((1, ()) if self._flat else (unit, tuple(places))))
        self._directions = directions and (self._flat or not dims[2])
        self._sum, self._count = torch.zeros((), dtype=torch.float64), 0  # of unit vectors

    def update(self, y: torch.Tensor) -> None:
        y = y.movedim(self._axis, 0)
        y = y.flatten(1) if self._flat else y
        self.moments.update(y)
        if self._directions:
            unit = nn.functional.normalize(y.detach().double(), dim=1)
            self._count += int((unit != 0).any(1).sum())
            self._sum = self._sum + unit.sum(0).cpu()

    def cosine(self) -> float:
        """Mean cosine between two different inputs, of those that are not 0."""
        n = self._count
        return (float(self._sum.square().sum()) - n) / (n * (n - 1)) if n > 1 else math.nan

    def values(self) -> dict[str, Any]:
        found = self.moments.result()
        cosine = {"cosine": self.cosine()} if self._directions else {}
        return {
            "type": self.kind,
            "shape": self.shape,
            "m2": float(found.m2),
            "v2": float(found.v2),
            "sigma2": float(found.sigma2),
            "fraction": float(found.fraction),
            "ratio": float(found.ratio),
            "dead": float((found.largest <= 0).mean()),
            "samples": found.samples,
        } | cosine


class _LeftOut(NamedTuple):
    """Why an output has no row, and whether a warning is enough to say so."""

    error: ValueError
    excusable: bool


class Rows:
    """The rows of a table in execution order, gathered over forward passes.

    An output that cannot have a row does not end the pass: ``left_out`` holds the reason by name,
    and the caller decides what is an error.
    """

    def __init__(self, layers: Layers, positions: str, *, directions: bool = False) -> None:
        _check.choice("positions", positions, POSITIONS)
        self.positions, self._directions = positions, directions
        self._chosen = _selection(layers)
        self._rows: dict[str, _Row] = {}
        self.left_out: dict[str, _LeftOut] = {}
        self.over_inputs: dict[str, None] = {}  # names of recurrences and attention between inputs

    def asks_for(self, module: nn.Module | None, *names: str) -> bool:
        """Whether an output with one of these names is asked for."""
        return any(self._chosen(name, module) for name in names)

    def add(
        self, name: str, module: nn.Module | None, kind: str, y: torch.Tensor, dims: Dimensions
    ) -> bool:
        """Add an output of a module or of a function to its row; False if it has none."""
        if name not in self._rows:
            directions = self._directions
            self._rows[name] = _Row(kind, y, dims, self.positions, directions=directions)
        try:
            self._rows[name].update(y)
        except ValueError as error:
            not_finite = isinstance(error, _check.NotFiniteError)
            excusable = not_finite and module is None  # scores of attention under a mask
            self.leave_out(name, type(error)(f"layer {name!r}: {error}"), excusable=excusable)
        return name in self._rows

    def leave_out(self, name: str, error: ValueError, *, excusable: bool) -> None:
        """From now on this output has no row."""
        self._rows.pop(name, None)
        self.left_out[name] = _LeftOut(error, excusable)

    def refuse(self) -> None:
        """Raise for an output without a row where a warning is not enough."""
        for left in self.left_out.values():
            if not left.excusable:
                raise left.error

    def names(self) -> set[str]:
        """Names of rows, and of outputs that were called and have none."""
        return {*self._rows, *self.left_out}

    def frame(self) -> pd.DataFrame:
        """The table; empty without rows."""
        return pd.DataFrame([{"name": name, **row.values()} for name, row in self._rows.items()])

    def warn(self, uncalled: Iterable[str] = (), *, stacklevel: int) -> None:
        """Say which outputs have no row, and why."""
        if self.over_inputs:
            text = f"{len(self.over_inputs)} modules run over the first dimension, where inputs are"
            text += " taken to lie, as over time (batch_first=False, or no dimension for a batch): "
            warnings.warn(text + _some(self.over_inputs), stacklevel=stacklevel + 1)
        reasons = {"were not called as modules": list(uncalled)}
        for name, (error, _) in self.left_out.items():
            reason = str(error)
            if isinstance(error, LostInputsError):
                reason = "have inputs along a dimension that could not be followed"
            elif isinstance(error, MergedInputsError):
                reason = "merge the inputs of a batch with their positions"
            elif isinstance(error, _check.NotFiniteError):
                reason = "are not finite"
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            if names:
                text = f"{len(names)} outputs have no row because they {reason}: {_some(names)}"
                warnings.warn(text, stacklevel=stacklevel + 1)


def _some(names: Iterable[str]) -> str:
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


class Pass:
    """One forward pass whose outputs go to rows: of weighted layers, or of everything.

    ``calls`` holds the record of the pass, if one is asked for. Everything needs a record, because
    only outputs that depend on the inputs have rows.
    """

    def __init__(self, model: nn.Module, rows: Rows, samples: int) -> None:
        self._model, self._rows, self._samples = model, rows, samples
        self._counts: Counter[str] = Counter()
        self._stack: list[tuple[str, nn.Module]] = [("", model)]
        self._units: dict[tuple[int, ...], int] = {}  # unit dimension of the latest, by shape
        self._last: torch.Tensor | None = None
        self._recorder: Recorder | None = None
        self._axes = Axes((), samples)
        self.calls: tuple[Call, ...] = ()

    @contextmanager
    def watching(self, given: Any, layers: Layers, *, record: bool) -> Iterator[None]:
        """Watch the model's next call, with these arguments."""
        everything = layers is not None
        with torch._C.DisableTorchFunction():  # other modes must not see this
            found = [x for _, x in tensors(given, objects=DEPTH)]
            self._axes = Axes(found, self._samples)
        with ExitStack() as stack:
            if everything:
                self._watch_modules(stack)
            else:
                stack.enter_context(hooked(weighted_layers(self._model), self._after_layer))
            if everything or record:
                on_call = self._after_call if everything else None
                with torch._C.DisableTorchFunction():
                    inputs = list(inputs_of(self._model, given, self._samples))
                self._recorder = Recorder(inputs, self._measure, on_call)
                stack.enter_context(self._recorder)
            over_inputs = self._rows.over_inputs
            stack.enter_context(watching_sequences(self._model, self._axes, over_inputs))
            stack.enter_context(self._axes)
            yield
        self.calls = tuple(self._recorder.calls) if self._recorder is not None else ()

    def returned(self, output: Any) -> None:
        """Take note of the model's output."""
        if self._recorder is not None:
            self._recorder.is_output(output)

    def _watch_modules(self, stack: ExitStack) -> None:
        for name, module in named_modules(self._model):
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            if module is not self._model:
                before = partial(self._before_module, name)
                stack.callback(module.register_forward_pre_hook(before).remove)
            after = partial(self._after_module, name)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)

    def _add(
        self, name: str, module: nn.Module | None, kind: str, y: torch.Tensor, called: str = ""
    ) -> None:
        """One more output of this name; ``called`` is another name by which it may be chosen."""
        self._counts[name] += 1
        row = row_name(name, self._counts[name])
        if row in self._rows.left_out or not self._rows.asks_for(module, row, name, called):
            return
        try:
            dims = self._dimensions(row, module, y)
        except ValueError as error:
            self._rows.leave_out(row, error, excusable=isinstance(error, MergedInputsError))
            return
        if not self._rows.add(row, module, kind, y, dims):
            return
        self._units[y.shape] = dims[1]
        if self._recorder is not None:
            self._recorder.name_row(y, row)
        self._last = y

    def _dimensions(self, name: str, module: nn.Module | None, y: torch.Tensor) -> Dimensions:
        unit, axis = self._units.get(y.shape), self._axes.of(y)
        return dimensions(name, module, y, self._samples, unit, axis)

    def _after_layer(self, name: str, layer: nn.Module, y: torch.Tensor) -> None:
        self._add(name, layer, type(layer).__name__, y)

    def _before_module(self, name: str, module: nn.Module, given: Any) -> None:
        self._stack.append((name, module))

    def _after_module(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        if module is not self._model:
            self._stack.pop()
        if output is None or self._recorder is None:  # where it raised, for example
            return
        with torch._C.DisableTorchFunction():
            self._recorder.passed(type(module).__name__, given, output)
            for where, y in tensors(output):
                seen = not _computes(module) and _same_entries(y, self._last)
                if self._recorder.knows(y) and self._has_row(y) and not seen:
                    self._add(name + where, module, type(module).__name__, y, name)

    def _after_call(self, function: str, y: torch.Tensor) -> None:
        name, module = self._stack[-1]
        if not _computes(module) and self._has_row(y):  # such a module has its row as a whole
            self._add(f"{name}/{function}".lstrip("/"), None, function, y)

    def _has_row(self, y: torch.Tensor) -> bool:
        if not y.is_floating_point() or y.ndim < 2 or not y.numel():
            return False
        axis = self._axes.of(y)
        return axis is None or y.shape[axis] == self._samples

    def _measure(self, y: torch.Tensor) -> Measured | None:
        if not self._has_row(y) or self._samples < 2 or self._axes.of(y) is None:
            return None
        dims = self._dimensions("", None, y)
        row = _Row("", y, dims, self._rows.positions)
        try:
            row.update(y)
        except _check.NotFiniteError:  # a mask
            return None
        found = row.moments.result()
        return Measured(float(found.sigma2), float(found.m2), float(found.mean.mean()) ** 2)


def _computes(module: nn.Module) -> bool:
    """Whether a module is one of torch's own that computes; containers only pass on."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, nn.Sequential | nn.Identity)


def _same_entries(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    if b is None:
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel())
