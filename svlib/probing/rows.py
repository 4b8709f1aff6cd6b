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
from svlib.probing.batches import counted
from svlib.probing.calls import Call, Recorder, inputs_of
from svlib.probing.models import (
    DEPTH,
    Dimensions,
    LostInputsError,
    MaskError,
    MergedInputsError,
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
        maximum: bool = False,
    ) -> None:
        self.kind, self._flat, self._maximum = kind, positions == "units", maximum
        self.shape = tuple(size for dim, size in enumerate(y.shape) if dim != dims[0])
        self.moments = Moments(0, 1, () if self._flat else (2,))
        self._directions = directions and (self._flat or not dims[2])
        self._sum, self._count = torch.zeros((), dtype=torch.float64), 0  # of unit vectors
        self._peak = 0.0

    def update(self, y: torch.Tensor, dims: Dimensions, mask: torch.Tensor | None = None) -> None:
        y, mask = counted(y, dims, mask)
        if not y.shape[dims[0]]:
            return
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

    def cosine(self) -> float:
        """Mean cosine between two different inputs, of those that are not 0."""
        n = self._count
        return (float(self._sum.square().sum()) - n) / (n * (n - 1)) if n > 1 else math.nan

    def values(self) -> dict[str, Any]:
        found = self.moments.result()
        more = {"maximum": self._peak} if self._maximum else {}
        more |= {"cosine": self.cosine()} if self._directions else {}
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
        } | more


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
        self._chosen = _selection(layers)
        self._rows: dict[str, _Row] = {}
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
    ) -> bool:
        """Add an output of a module or of a function to its row; False if it has none."""
        if name not in self._rows:
            self._rows[name] = _Row(kind, y, dims, self.positions, **self._options)
        try:
            self._rows[name].update(y, dims, mask)
        except ValueError as error:
            not_finite = isinstance(error, _check.NotFiniteError)
            # scores of attention under a mask; what has fewer positions than the mask
            excusable = (not_finite and module is None) or isinstance(error, MaskError)
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
            warnings.warn(text + some(self.over_inputs), stacklevel=stacklevel + 1)
        reasons = {"were not called as modules": list(uncalled)}
        for name, (error, _) in self.left_out.items():
            reason = str(error)
            if isinstance(error, LostInputsError):
                reason = "have inputs along a dimension that could not be followed"
            elif isinstance(error, MaskError):
                reason = "have other positions than the mask"
            elif isinstance(error, MergedInputsError):
                reason = "merge the inputs of a batch with their positions"
            elif isinstance(error, _check.NotFiniteError):
                reason = "are not finite"
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            if names:
                text = f"{len(names)} outputs have no row because they {reason}: {some(names)}"
                warnings.warn(text, stacklevel=stacklevel + 1)


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


class Pass:
    """One forward pass whose outputs go to rows: of weighted layers, or of everything.

    ``calls`` holds the record of the pass, if one is asked for. Everything needs a record, because
    only outputs that depend on the inputs have rows.
    """

    def __init__(
        self, model: nn.Module, rows: Rows, samples: int, mask: torch.Tensor | None = None
    ) -> None:
        self._model, self._rows, self._samples, self._mask = model, rows, samples, mask
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
            found = self._axes.apart(row, module, y, self._units.get(y.shape))
        except ValueError as error:
            self._rows.leave_out(row, error, excusable=isinstance(error, MergedInputsError))
            return
        if not self._rows.add(row, module, kind, found.y, found.dims, self._mask):
            return
        self._units[y.shape] = found.unit
        if self._recorder is not None:
            self._recorder.name_row(y, row)
        self._last = y

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
        return axis is None or y.shape[axis] == self._samples or self._axes.merges(y)

    def _measure(self, y: torch.Tensor) -> Measured | None:
        if not self._has_row(y) or self._samples < 2 or self._axes.of(y) is None:
            return None
        found = self._axes.apart("", None, y, self._units.get(y.shape))
        row = _Row("", found.y, found.dims, self._rows.positions)
        try:
            row.update(found.y, found.dims, self._mask)
        except (_check.NotFiniteError, MaskError):  # a mask, or what has other positions
            return None
        result = row.moments.result()
        return Measured(float(result.sigma2), float(result.m2), float(result.mean.mean()) ** 2)


def _computes(module: nn.Module) -> bool:
    """Whether a module is one of torch's own that computes; containers only pass on."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, nn.Sequential | nn.Identity)


def _same_entries(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    if b is None:
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel())
