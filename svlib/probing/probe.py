r"""Measure m^2 and v^2 in any torch model, layer by layer in execution order, and leave no trace.

Which axes mean what. The inputs of a batch lie along the first dimension. Units are the channels of
convolutions, pooling, batch and group normalization (dimension 1), and the features of linear
layers (the last dimension). Other outputs take after the last output of the same shape; without
one, those of more than three dimensions have their units along dimension 1, others along the last.
What is left are positions: pixels, tokens. With :math:`y_{aup}` the output for input a, unit u,
position p,

- ``positions="samples"`` counts positions as samples, though not as independent ones: :math:`m^2`
  is the mean over u and over pairs of different inputs of :math:`\bar y_{au}\bar y_{bu}`, where
  :math:`\bar y_{au}` is the mean over p, and :math:`v^2=\overline{y^2}-m^2`;
- ``positions="units"`` keeps them apart: every pair (u, p) is a unit, and :math:`m^2` is the mean
  of :math:`y_{aup}y_{bup}`. A pattern over positions that all inputs share then counts as mean, not
  as variance.

Without positions the two agree.
"""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from svlib import _check
from svlib._random import stream
from svlib.moments import Moments
from svlib.probing.calls import Call, Recorder, tensors

Layer = nn.Linear | _ConvNd
Layers = str | Sequence[str | type[nn.Module]] | None
OnOutput = Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None]

POSITIONS = ("samples", "units")


class Batch(NamedTuple):
    """What a model is called with, on its device, and the number of inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: int


class MergedInputsError(ValueError):
    """An output does not keep the inputs apart along its first dimension."""


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is linear with a weight (in, out), as ``transformers``' ``Conv1D`` (which is no convolution)."""
    return (
        type(layer).__name__ == "Conv1D" and getattr(getattr(layer, "weight", None), "ndim", 0) == 2
    )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, without what compiling puts between."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def weighted_layers(model: nn.Module) -> dict[str, Layer]:
    """The linear and convolutional layers of a model by name, in order of registration.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If it has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {
        name: layer
        for name, layer in named_modules(model)
        if isinstance(layer, Layer) or is_transposed(layer)
    }
    if not layers:
        raise ValueError(
            f"model must have a linear or convolutional layer, got {type(model).__name__} with none"
        )
    return cast(dict[str, Layer], layers)


def dimensions(
    name: str, layer: nn.Module | None, y: torch.Tensor, inputs: int, unit: int | None = None
) -> tuple[int, int, tuple[int, ...]]:
    """(sample, unit, position) dimensions of an output, as :func:`svlib.decompose` takes them.

    ``unit`` is that of an earlier output of this shape: what neither sets its own axes nor changes
    the shape keeps them.

    Raises:
        MergedInputsError: If the output does not have the ``inputs`` of the batch along its first
            dimension.
        ValueError: If a convolution's output has no dimension for them.
    """
    shape = tuple(y.shape)
    if isinstance(layer, _ConvNd) and y.ndim != layer.weight.ndim:
        raise ValueError(
            f"layer {name!r} must see a batch (inputs, channels, positions...), its output has shape {shape}"
        )
    if y.ndim < 2:
        raise ValueError(
            f"layer {name!r} must see a batch (inputs, features), its output has shape {shape}"
        )
    if len(y) != inputs:
        raise MergedInputsError(
            f"layer {name!r} must keep the {inputs} inputs of a batch apart, its output has shape {shape}"
        )
    pooled = "pool" in (name.split("/")[-1] if layer is None else type(layer).__name__).lower()
    images = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1
    if pooled or images or isinstance(layer, _ConvNd | _NormBase | nn.GroupNorm):
        unit = 1
    elif isinstance(layer, nn.Linear | nn.LayerNorm) or unit is None:
        unit = 1 if y.ndim > 3 and not isinstance(layer, nn.Linear | nn.LayerNorm) else y.ndim - 1
    return 0, unit, tuple(dim for dim in range(1, y.ndim) if dim != unit)


def as_batches(model: nn.Module, batches: Any) -> Iterator[Batch]:
    """What to call the model with, batch by batch, in copies. See :func:`probe` for what is accepted.

    Raises:
        TypeError: If ``batches`` is something else, or of another floating type than the model's
            first parameter.
        ValueError: If a tensor has no dimension, or the first of real numbers is not finite.
    """
    device, dtype = _place(model)
    if isinstance(batches, torch.Tensor | Mapping | tuple):
        batches = (batches,)
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise TypeError(
            f"batches must be a tensor or an iterable of tensors, tuples or dicts, got {type(batches).__name__}"
        )
    for batch in batches:
        if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
            batch = batch[0]  # the rest are labels
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        listed = (
            []
            if isinstance(batch, Mapping)
            else list(batch)
            if isinstance(batch, tuple | list)
            else [batch]
        )
        args = tuple(listed[: _positional(model)])
        found = [x for _, x in tensors((args, kwargs))]
        if not found or (args and not isinstance(args[0], torch.Tensor)):
            message = "batches must hold tensors, tuples that start with one, or dicts of them"
            raise TypeError(f"{message}, got {type(batch).__name__}")
        for x in found:
            if x.ndim == 0:
                raise ValueError(
                    "batches must have the inputs along their first dimension, got a tensor without dimensions"
                )
            if (
                x.is_floating_point()
                and dtype not in (None, x.dtype)
                and not torch.is_autocast_enabled(device.type)
            ):
                raise TypeError(f"batches must be of the model's {dtype}, got {x.dtype}")
        for x in [x for x in found if x.is_floating_point()][:1]:
            _check.floating("batches", x)  # others may be masks with infinities
        args, kwargs = mapped(
            lambda x: x.detach().to(device, copy=True), (args, kwargs)
        )  # for models that change them
        yield Batch(args, kwargs, len(found[0]))


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Device of a model and floating type of its weights, ``None`` if it has none."""
    everything = [*model.parameters(), *model.buffers()]
    if any(map(nn.parameter.is_lazy, everything)):
        raise ValueError(
            "model must have all its parameters, got lazy ones: run a batch through it first"
        )
    if any(x.is_meta for x in everything):
        raise ValueError("model must hold numbers, got parameters or buffers on the meta device")
    held = [x for x in everything if x.is_floating_point()]
    return (held[0].device, held[0].dtype) if held else (torch.device("cpu"), None)


def _positional(model: nn.Module) -> int | None:
    """How many arguments ``forward`` requires by position, at least 1: so many of a tuple are inputs, the rest are labels.
    ``None``, all of them, if it takes any number."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return max(
        1,
        sum(
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            for p in parameters
        ),
    )


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Nested lists, tuples and dictionaries with a function applied to their tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return value


@contextmanager
def same_generators(model: nn.Module) -> Iterator[None]:
    """Afterwards, also after an error, the generators of random numbers (torch's, NumPy's and Python's own) are as before."""
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients and uncompiled, on copies of its buffers; afterwards, also after an error, it has its
    own (BatchNorm's running statistics), and the generators of random numbers are as before."""
    scripted = [
        module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)
    ]  # have no dictionary
    own_values = [
        (buffer, buffer.clone()) for module in scripted for buffer in module.buffers(recurse=False)
    ]
    modules = [module for module in model.modules() if module not in scripted]
    buffers = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in modules
    ]
    copies: dict[int, torch.Tensor] = {}
    # hooks inside a compiled model do not run
    eager = (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else nullcontext()
    )
    fast = torch.backends.mha.get_fastpath_enabled()  # which would go round layers, and their hooks
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with same_generators(model), torch.no_grad(), eager:
            for module in modules:
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for buffer, value in own_values:
                buffer.copy_(value)
        for module, own, transient in buffers:
            module._buffers.clear()
            module._buffers.update(own)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)


@contextmanager
def hooked(layers: Mapping[str, nn.Module], on_output: OnOutput) -> Iterator[None]:
    """Call ``on_output(name, layer, y)`` after every call of these layers, y being the first floating tensor of the output; a
    tensor returned takes its place."""
    with ExitStack() as stack:
        for name, layer in layers.items():

            def after(layer: nn.Module, given: Any, output: Any, name: str = name) -> Any:
                with torch._C.DisableTorchFunction():  # what follows is not the model's doing
                    y = next((y for _, y in tensors(output) if y.is_floating_point()), None)
                    new = None if y is None else on_output(name, layer, y)
                return None if new is None else mapped(lambda x: new if x is y else x, output)

            stack.callback(layer.register_forward_hook(after).remove)
        yield


class _Row:
    """What accumulates for one row of the table."""

    def __init__(
        self, kind: str, y: torch.Tensor, dims: tuple[int, int, tuple[int, ...]], positions: str
    ) -> None:
        self.kind, self.shape, self._flat = kind, tuple(y.shape[1:]), positions == "units"
        self.moments = Moments(*((0, 1, ()) if self._flat else dims))

    def update(self, y: torch.Tensor) -> None:
        self.moments.update(y.flatten(1) if self._flat else y)

    def values(self) -> dict[str, Any]:
        found = self.moments.result()
        m2, v2, sigma2 = float(found.m2), float(found.v2), float(found.sigma2)
        return {
            "type": self.kind, "shape": self.shape, "m2": m2, "v2": v2, "sigma2": sigma2,
            "v2_fraction": v2 / sigma2 if sigma2 else float("nan"), "ratio": float(found.ratio),
            "dead": float((found.largest <= 0).mean()), "inputs": found.samples,
        }  # fmt: skip


class _Table:
    """Rows in execution order, gathered over batches, and the calls of the first batch. Not ``strict``, it goes on where
    numbers are not finite, and spares itself the calls that only theory needs."""

    def __init__(
        self, model: nn.Module, layers: Layers, positions: str, *, strict: bool = True
    ) -> None:
        _check.choice("positions", positions, POSITIONS)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model, self._positions, self._strict = model, positions, strict
        self._chosen = _selection(layers)
        scripted = torch.jit.ScriptModule  # its modules take no hooks
        self._modules = {
            name: module
            for name, module in named_modules(model)
            if not isinstance(module, scripted)
        }
        self._hooked: Mapping[str, nn.Module] = (
            weighted_layers(model) if layers is None else self._modules
        )
        self._rows: dict[str, _Row] = {}
        self._calls: list[Call] = []
        self._counts: Counter[str] = Counter()
        self._stack: list[tuple[str, nn.Module]] = []
        self._last: torch.Tensor | None = None
        self._recorder: Recorder | None = None
        self._inputs = 0
        self._units: dict[
            tuple[int, ...], int
        ] = {}  # dimension of units by shape, of the last output
        self._left_out: dict[str, ValueError] = {}

    def _record(
        self, name: str, module: nn.Module | None, kind: str, y: torch.Tensor, called: str = ""
    ) -> None:
        """One more output of this name; ``called``, another name that it may be chosen by."""
        self._counts[name] += 1
        row = row_name(name, self._counts[name])
        if row in self._left_out or not any(self._chosen(x, module) for x in (row, name, called)):
            return
        try:
            dims = dimensions(row, module, y, self._inputs, self._units.get(y.shape))
            if row not in self._rows:
                self._rows[row] = _Row(kind, y, dims, self._positions)
            self._rows[row].update(y)
        except MergedInputsError as error:
            self._leave_out(row, error)
            return
        except ValueError as error:
            named = type(error)(f"layer {row!r}: {error}")
            finite = not isinstance(error, _check.NotFiniteError)
            if finite or (self._strict and module is not None):
                raise named from None
            self._leave_out(row, named)  # scores of attention under a mask, for example
            return
        self._units[y.shape] = dims[1]
        if self._recorder is not None:
            self._recorder.name_row(y, row)
        if self._hooked is self._modules:
            self._last = y

    def _leave_out(self, row: str, error: ValueError) -> None:
        self._rows.pop(row, None)
        self._left_out[row] = error

    def _after_layer(self, name: str, layer: nn.Module, y: torch.Tensor) -> None:
        self._record(name, layer, type(layer).__name__, y)

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
                seen = (
                    not _from_torch(module)
                    and self._last is not None
                    and _same_entries(y, self._last)
                )
                if self._recorder.knows(y) and self._has_row(y) and not seen:
                    self._record(name + where, module, type(module).__name__, y, name)

    def _after_call(self, function: str, y: torch.Tensor) -> None:
        name, module = self._stack[-1]
        if not _from_torch(module) and self._has_row(
            y
        ):  # a module of torch's own has its row as a whole
            self._record(f"{name}/{function}".lstrip("/"), None, function, y)

    def returned(self, output: Any) -> None:
        """Take note of what the model returned."""
        if self._recorder is not None:
            self._recorder.is_output(output)

    def _has_row(self, y: torch.Tensor) -> bool:
        return y.is_floating_point() and y.ndim > 1 and y.numel() > 0 and len(y) == self._inputs

    def _measure(self, y: torch.Tensor) -> dict[str, float] | None:
        if not self._has_row(y) or self._inputs < 2:
            return None
        row = _Row(
            "", y, dimensions("", None, y, self._inputs, self._units.get(y.shape)), self._positions
        )
        try:
            row.update(y)
        except _check.NotFiniteError:  # a mask
            return None
        found = row.moments.result()
        return {
            "m2": float(found.m2),
            "sigma2": float(found.sigma2),
            "mean2": float(found.mean.mean()) ** 2,
        }

    @contextmanager
    def watching(self, given: Any, inputs: int) -> Iterator[None]:
        """Record what a forward pass within, given this, puts out."""
        self._inputs = inputs
        self._counts.clear()
        self._stack = [("", self._model)]
        everything = self._hooked is self._modules
        try:
            with ExitStack() as stack:
                if everything:
                    for name, module in self._modules.items():
                        if module is not self._model:
                            before = module.register_forward_pre_hook(
                                partial(self._before_module, name)
                            )
                            stack.callback(before.remove)
                        after = module.register_forward_hook(
                            partial(self._after_module, name), always_call=True
                        )
                        stack.callback(after.remove)
                else:
                    stack.enter_context(hooked(self._hooked, self._after_layer))
                if everything or (self._strict and not self._calls):
                    on_call = self._after_call if everything else None
                    self._recorder = stack.enter_context(Recorder(given, self._measure, on_call))
                yield
            if self._recorder is not None and not self._calls:
                self._calls = self._recorder.calls
        finally:
            self._recorder = self._last = None

    def frame(self) -> pd.DataFrame:
        """The table.

        Raises:
            ValueError: If no inputs were seen, or nothing that was asked for was called.
        """
        if not self._inputs:
            raise ValueError("batches must hold at least 2 inputs, got none")
        if not self._rows and self._left_out and self._strict:
            raise next(iter(self._left_out.values()))
        if not self._rows and not self._left_out:
            asked = "a weighted layer" if self._hooked is not self._modules else "what layers names"
            raise ValueError(f"model must call {asked}, got none called")
        if self._hooked is not self._modules:
            seen = {*self._rows, *self._left_out}
            self._warn(
                [name for name in self._hooked if name not in seen], "were not called as modules"
            )
        merged = [
            name for name, error in self._left_out.items() if isinstance(error, MergedInputsError)
        ]
        self._warn(merged, f"merge the {self._inputs} inputs of a batch with their positions")
        self._warn([name for name in self._left_out if name not in merged], "are not finite")
        table = pd.DataFrame([{"name": name, **row.values()} for name, row in self._rows.items()])
        if len(table):
            table["v2_to_previous"] = table.v2 / table.v2.shift()
        table.attrs = {"calls": self._calls, "positions": self._positions}
        return table

    def _warn(self, names: list[str], reason: str) -> None:
        if names:
            some = f"{', '.join(names[:5])}{', ...' if names[5:] else ''}"
            warnings.warn(
                f"{len(names)} outputs have no row, for they {reason}: {some}", stacklevel=4
            )


def _selection(layers: Layers) -> Callable[[str, nn.Module | None], bool]:
    """Whether a row is asked for, by its name and its module."""
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return lambda name, module: True
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(
            f"layers must be None, 'all' or a list of names and module types, got {layers!r}"
        )
    listed = list(layers)
    wrong = [
        x
        for x in listed
        if not isinstance(x, str) and not (isinstance(x, type) and issubclass(x, nn.Module))
    ]
    if wrong or not listed:
        raise TypeError(
            f"layers must hold names (with * as a wildcard) or module types, got {wrong or listed}"
        )
    patterns = [x for x in listed if isinstance(x, str)]
    types = tuple(x for x in listed if isinstance(x, type))

    def chosen(name: str, module: nn.Module | None) -> bool:
        return isinstance(module, types) or any(
            name == x or (name and fnmatchcase(name, x)) for x in patterns
        )

    return chosen


def _from_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own that computes; containers only pass on."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, nn.Sequential | nn.Identity)


def _same_entries(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel())


def probe(
    model: nn.Module, batches: Any, *, layers: Layers = None, positions: str = "samples"
) -> pd.DataFrame:
    """Measure the decomposition of a model's outputs, in execution order.

    The model runs in the mode it is in (in training mode BatchNorm normalizes by the batch, and the
    noise of dropout counts as variance), without gradients, one pass over the batches, in memory
    that does not grow with their number. A compiled model is run uncompiled.

    Args:
        model: Any module.
        batches: A tensor of inputs, a tuple of arguments or a dictionary of them by name, or an
            iterable of such (a ``DataLoader``; a list is one of batches). Of a tuple, as many items
            are taken as ``forward`` requires by position, at least the first, or the first alone if
            it is a dictionary: the rest are labels. Each is moved to the model's device; inputs lie
            along the first dimension (set ``batch_first`` where a module asks). Padding counts as
            positions.
        layers: ``None``: the outputs of linear and convolutional layers (``transformers``'
            ``Conv1D`` too). "all": those of every module and of every torch function called in
            modules not of torch's own (``torch.relu``, ``+``), as far as they keep the inputs
            apart; views have no row. A list selects of these by name, "*" being a wildcard, or by
            module type.
        positions: "samples" or "units": what positions count as, see :mod:`svlib.probing.probe`.

    Returns:
        One row per call: ``name`` (a second call has " (2)" behind it; the function called, behind
        a slash), ``type``, ``shape`` of one input's output, ``m2``, ``v2``, ``sigma2``,
        ``v2_fraction`` = v^2/sigma^2, ``ratio`` = m/v, ``dead`` (fraction of units never positive
        on the data: a ReLU after them passes nothing), ``inputs`` and ``v2_to_previous`` = v^2 over
        that of the row before. In ``attrs["calls"]``, what :func:`svlib.explain` reads.

    Raises:
        TypeError: If ``model`` is not a module, ``batches`` holds no tensors or of another floating
            type, or ``layers`` is not as above.
        ValueError: If there are fewer than two inputs, nothing that is asked for is called, an
            output is not finite (the layer is named) or none keeps the inputs apart along its first
            dimension.

    Warns:
        UserWarning: If weighted layers have no row, for they are not called as modules, or merge
            inputs with their positions (the windows of a Swin transformer), or if a function's
            output has none, for it is not finite (masked scores).

    Examples:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
        >>> table = probe(model, torch.randn(100, 20, generator=generator))
        >>> list(table.name), list(table.inputs)
        (['0', '2'], [100, 100])
        >>> list(probe(model, torch.randn(100, 20, generator=generator), layers="all").type)
        ['Linear', 'ReLU', 'Linear']
    """
    table = _Table(model, layers, positions)
    with untouched(model):
        for batch in as_batches(model, batches):
            with table.watching((batch.args, batch.kwargs), batch.inputs):
                table.returned(model(*batch.args, **batch.kwargs))
    return table.frame()


class Probe:
    """Probe a model inside a training loop, every few steps, from the batches that it trains on.

    A step is a call of the model with gradients on; calls under ``no_grad`` (evaluation) are not
    counted. Between the steps that are measured the model runs as if nothing were there. A batch of
    one input is not measured, and outputs that are not finite have no row and a warning: a run that
    diverges goes on.

    Args:
        model: Any module, neither compiled nor called through a compiled wrapper.
        every: Measure steps 0, ``every``, 2 ``every``...
        layers: As in :func:`probe`.
        positions: As in :func:`probe`.

    Raises:
        TypeError: If ``model`` is not a module or is compiled, ``every`` is not an integer or
            ``layers`` is not as in :func:`probe`.
        ValueError: If ``every`` is below 1, ``positions`` is unknown, or ``layers`` is None and
            there is no weighted layer.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(8, 4)
        >>> with Probe(model, every=10) as probe:
        ...     for step in range(21):
        ...         _ = model(torch.ones(16, 8) * torch.arange(16)[:, None])
        >>> probe.table.step.tolist(), probe.table.inputs.tolist()
        ([0, 10, 20], [16, 16, 16])
    """

    def __init__(
        self, model: nn.Module, *, every: int = 1, layers: Layers = None, positions: str = "samples"
    ) -> None:
        self._every = _check.integer("every", every)
        layers = (
            list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
        )
        self._new = partial(_Table, model, layers, positions, strict=False)
        self._new()  # what is wrong shows now
        if any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
            for module in model.modules()
        ):
            raise TypeError(
                f"model must not be compiled, or hooks inside do not run, got {type(model).__name__}"
            )
        self._model, self._steps = model, 0
        self._frames: list[pd.DataFrame] = []
        self._hooks = ExitStack()
        self._measuring = ExitStack()

    def __enter__(self) -> Probe:
        self._hooks.callback(
            self._model.register_forward_pre_hook(self._before, with_kwargs=True).remove
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._measuring.close()  # open still where the forward pass was interrupted
        self._hooks.close()

    @property
    def table(self) -> pd.DataFrame:
        """The rows of :func:`probe` for every step that was measured, with its number in front as ``step``."""
        return pd.concat(self._frames, ignore_index=True) if self._frames else pd.DataFrame()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        step, self._steps = self._steps, self._steps + 1
        inputs = next((len(x) for _, x in tensors((args, kwargs)) if x.ndim), 0)
        if step % self._every or inputs < 2:
            return
        table = self._new()

        def keep(model: nn.Module, args: Any, output: Any) -> None:
            frame = table.frame()
            frame.insert(0, "step", step)
            frame.attrs = {}
            self._frames.append(frame)

        def close(model: nn.Module, args: Any, output: Any) -> None:
            self._measuring.close()

        self._measuring.close()
        self._measuring.enter_context(table.watching((args, kwargs), inputs))
        for hook, always in (
            (keep, False),
            (close, True),
        ):  # the last hooks of the model, the second also where it raises
            self._measuring.callback(model.register_forward_hook(hook, always_call=always).remove)


def probe_gradients(model: nn.Module, inputs: Any, *, seed: int) -> pd.DataFrame:
    """Mean square of the gradient at the output of every weighted layer, in execution order.

    A Gaussian vector is sent backwards from the model's output. Parameters get no gradient.

    Args:
        model: Any module with linear or convolutional layers.
        inputs: One batch, as :func:`probe` takes it.
        seed: Seed of the vector at the output (the first floating-point tensor in it, if there are
            several).

    Returns:
        ``name``, ``gradient2`` (relative to the last row), ``growth`` (factor from the next row to
        this one, NaN in the last).

    Raises:
        TypeError: If ``model`` is not a module, ``inputs`` not a batch or the output holds no
            floating-point tensor.
        ValueError: If ``seed`` is negative, ``inputs`` not finite or no weighted layer is called.

    Examples:
        >>> import torch
        >>> layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(3)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.orthogonal_(layer.weight)
        >>> table = probe_gradients(torch.nn.Sequential(*layers), torch.ones(4, 8), seed=0)
        >>> [round(growth, 5) for growth in table.growth[:2]]
        [1.0, 1.0]
    """
    generator = stream(seed, "direction")
    layers = weighted_layers(model)
    calls: Counter[str] = Counter()
    outputs: list[tuple[str, torch.Tensor]] = []

    def record(name: str, layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
        y = y if y.requires_grad else y.requires_grad_()
        calls[name] += 1
        outputs.append((row_name(name, calls[name]), y))
        return y.clone()  # an activation in place must not change what is differentiated by

    if isinstance(inputs, list):  # of batches, which one pass does not take
        raise TypeError("inputs must be one batch: a tensor, tuple or dict, got list")
    (batch,) = as_batches(model, [inputs])
    with untouched(model), hooked(layers, record), torch.enable_grad():
        output = model(*batch.args, **batch.kwargs)
        y = next((y for _, y in tensors(output) if y.is_floating_point()), None)
        if y is None:
            raise TypeError(
                f"model must return a floating-point tensor, got {type(output).__name__} with none"
            )
        if not outputs:
            raise ValueError("model must call a weighted layer, got none called")
        direction = torch.randn(y.shape, generator=generator).to(y)
        places = [output for _, output in outputs]
        gradients = torch.autograd.grad(y, places, direction, materialize_grads=True)
    squares = pd.Series([float(gradient.double().square().mean()) for gradient in gradients])
    growth = squares / squares.shift(-1)
    return pd.DataFrame(
        {
            "name": [name for name, _ in outputs],
            "gradient2": squares / squares.iloc[-1],
            "growth": growth,
        }
    )


def row_name(name: str, call: int) -> str:
    """Name of the row of a layer's first, second... call."""
    return name if call == 1 else f"{name} ({call})"
