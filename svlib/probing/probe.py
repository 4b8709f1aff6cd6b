r"""Measure m^2 and v^2 in any torch model, layer by layer in execution order, without a trace.

:mod:`svlib.probing.models` says which axes of an output are units and positions,
:mod:`svlib.probing.places` which is that of the inputs, :mod:`svlib.probing.rows` the two meanings
of positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from svlib._random import stream
from svlib.probing.batches import Batch, Caller, Masker, Reading, as_batches
from svlib.probing.forward import Pass, watched
from svlib.probing.models import (
    DEPTH,
    first_floating,
    hooked,
    row_name,
    same_generators,
    structural_copy,
    tensors,
    weighted_layers,
)
from svlib.probing.places import Guess, Places, read_batches
from svlib.probing.rows import COLUMNS, Layers, Rows
from svlib.probing.trace import Trace

_ALWAYS = 40  # inputs from which two passes of 3 and 2 cost little


class Measurement(NamedTuple):
    """Rows, the trace of the first batch, where its inputs lie, and the batch."""

    rows: Rows
    trace: Trace | None
    places: Places | None
    batch: Batch


def measure(
    model: nn.Module,
    batches: Any,
    layers: Layers,
    positions: str,
    reading: Reading | None = None,
    *,
    record: bool = False,
    maximum: bool = False,
    places: Places | None = None,
) -> Measurement:
    """What :func:`probe` measures and, with ``record``, the trace of the first batch.

    ``places`` are known where the inputs lie already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if layers is None and not record:
        weighted_layers(model)
    listed = read_batches(model, batches, reading)
    if reading is not None and reading.mask is not None and positions == "units":
        raise ValueError("positions must be 'samples' where a mask is given, got 'units'")
    with same_generators(model):  # a loader draws its order, and augments
        return _measured(model, listed, layers, positions, reading, record, maximum, places)


def _measured(
    model: nn.Module,
    listed: Iterable[Batch],
    layers: Layers,
    positions: str,
    reading: Reading | None,
    record: bool,
    maximum: bool,
    places: Places | None,
) -> Measurement:
    rows, trace, first = Rows(layers, positions, directions=record, maximum=maximum), None, None
    samples, gradients, modules = 0, False, watched(model)
    for read in listed:
        if first is None:
            first = read
            places = places or _places(model, read, reading, layers, record=record)
        while True:
            mine = rows.empty()
            seen = layers is not None or (record and trace is None)
            try:
                found, unsure = _pass(model, read, mine, places, positions, seen, gradients)
            except RuntimeError as error:  # of a model that differentiates in its forward pass
                if gradients or samples or "grad" not in str(error):
                    raise
                gradients = True
                continue
            if places is None and unsure:
                places = Places.find(model, read, modules if layers is None else None)
                if places is not None and not places.agree(unsure, read.samples):
                    continue
            break
        samples, trace = samples + read.samples, trace or found
        rows.merge(mine)
        if not record:
            rows.refuse()
    if first is None or samples < 2:
        raise ValueError(f"batches must hold at least 2 inputs, got {samples or 'none'}")
    return Measurement(rows, trace, places, first)


def _pass(
    model: nn.Module,
    read: Batch,
    rows: Rows,
    places: Places | None,
    positions: str,
    seen: bool,
    gradients: bool,
) -> tuple[Trace | None, list[Guess]]:
    """One forward pass: its trace, if all functions are seen, and where it guessed."""
    with structural_copy(model) as copied, torch.set_grad_enabled(gradients):
        batch = read.copied(copied)
        given = (batch.args, batch.kwargs)
        masked = batch.mask is not None
        trace = Trace(copied, given, batch.samples, positions, masked=masked) if seen else None
        running = Pass(copied, rows, batch.samples, batch.mask, places, trace)
        with running.watch():
            output = batch.run(copied)
        if trace is not None:
            trace.is_output(output)
            trace.finish()
    return trace, running.guesses


def _places(
    model: nn.Module, batch: Batch, reading: Reading | None, layers: Layers, *, record: bool
) -> Places | None:
    told = reading is not None and (reading.inputs or reading.call)
    if batch.samples < 2 or not (record or told or batch.samples >= _ALWAYS):
        return None
    return Places.find(model, batch, None if record or layers else watched(model))


def checked(
    rows: Rows, model: nn.Module, layers: Layers, *, stacklevel: int, empty: bool = False
) -> pd.DataFrame:
    """The table of rows, which may be empty if that is said; warns of outputs that have none."""
    if empty and rows.frame().empty:
        return pd.DataFrame(columns=["name", "type", *COLUMNS, "cosine"])
    if not rows.names():
        wanted = "a weighted layer" if layers is None else "what layers names"
        raise ValueError(f"model must call {wanted}, got none called")
    frame = rows.frame()
    if frame.empty:
        raise next(iter(rows.left_out.values())).error
    weighted = weighted_layers(model) if layers is None else {}
    uncalled = [name for name in weighted if name not in rows.names()]
    rows.warn(uncalled, stacklevel=stacklevel + 1)
    return frame


def probe(
    model: nn.Module,
    batches: Any,
    *,
    layers: Layers = None,
    positions: str = "samples",
    inputs: int | None = None,
    call: Caller | None = None,
    mask: Masker | None = None,
    maximum: bool = False,
) -> pd.DataFrame:
    """Measure the decomposition of a model's outputs, in execution order.

    The model runs in the mode it is in (in training mode the noise of dropout counts as variance),
    in memory that does not grow with the batches.

    Args:
        model: Any module.
        batches: A tensor of inputs, a tuple of arguments, a dictionary of them by name or as the
            argument, or an iterable of such (a ``DataLoader``, a list). Inputs lie along the first
            dimension. Of a tuple, what ``forward`` does not require by position are labels.
        layers: ``None``: the outputs of linear and convolutional layers. "all": those of every
            module and of every torch function called in modules not of torch's own, as far as they
            keep the inputs apart; views have no row. A list selects of these by name, "*" being a
            wildcard, or by module type.
        positions: "samples" or "units", see :mod:`svlib.probing.rows`.
        inputs: Number of inputs in each batch, where it is not the size of the first dimension of
            the first tensor in it (a list of images, a graph).
        call: A function ``call(model, batch)`` that returns the model's output, for whatever else a
            batch may be; it gets a copy of each.
        mask: Which positions count, (inputs, positions...), 0 or False for padding: a key of the
            batch ("attention_mask") or a function of it. Every input then weighs the same (see
            :meth:`svlib.Moments.update`); outputs with other positions have no row.
        maximum: Add a column ``maximum``, the largest absolute value.

    Returns:
        One row per call: ``name`` (a second call has " (2)" behind it; the function called, behind
        a slash), ``type``, ``shape`` of one input's output, ``m2``, ``v2``, ``sigma2``,
        ``fraction`` = v^2/sigma^2, ``ratio`` = m/v, ``dead`` (fraction of units that are positive
        for no input) and ``samples``, the number of inputs.

    Raises:
        ValueError: If there are fewer than two inputs, nothing that is asked for is called, an
            output is not finite (the layer is named) or none keeps the inputs apart.

    Warns:
        UserWarning: If layers have no row, because they are not called as modules, merge inputs
            with positions, or (functions) are not finite.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(20, width=50, depth=2, outputs=2, seed=0)
        >>> list(probe(model, sv.data.gaussian(100, 20, seed=1)).name)
        ['0', '2']
        >>> list(probe(model, sv.data.gaussian(100, 20, seed=1), layers="all").type)
        ['Linear', 'ReLU', 'Linear']
    """
    read = Reading(inputs, call, mask)
    rows = measure(model, batches, layers, positions, read, maximum=maximum).rows
    return checked(rows, model, layers, stacklevel=2)


def probe_gradients(
    model: nn.Module, inputs: Any, *, seed: int, call: Caller | None = None
) -> pd.DataFrame:
    """Mean square of the gradient at the output of every weighted layer, in execution order.

    A Gaussian vector is sent backwards from the model's output. Parameters get no gradient.

    Args:
        model: Any module with linear or convolutional layers.
        inputs: One batch, as :func:`probe` takes it.
        seed: Seed of the vector at the output (the first floating-point tensor in it).
        call: As in :func:`probe`.

    Returns:
        ``name``, ``gradient2`` (relative to the last row), ``growth`` (factor from the next row to
        this one, NaN in the last).

    Raises:
        TypeError: If ``inputs`` is not one batch or the output holds no floating-point tensor.
        ValueError: If no weighted layer is called.

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
    weighted_layers(model)
    if isinstance(inputs, list) and call is None:  # of batches
        raise TypeError("inputs must be one batch: a tensor, tuple or dict, got list")
    reading = Reading() if call is None else Reading(1, call)  # their number does not matter
    (read,) = as_batches(model, [inputs], reading)
    squares, _ = squared_gradients(model, read, generator)
    found = pd.Series(squares.values(), dtype=float)
    relative, growth = found / found.iloc[-1], found / found.shift(-1)
    return pd.DataFrame({"name": list(squares), "gradient2": relative, "growth": growth})


def squared_gradients(
    model: nn.Module, read: Batch, generator: torch.Generator, *, every: bool = False
) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """Mean squares of the gradients at the outputs of weighted layers, and the shapes, by row.

    A Gaussian vector is sent backwards from the first output or, if asked for, from every one.
    Parameters need no gradient and get none, and no gradient is kept: each is squared as it comes.
    """
    calls: Counter[str] = Counter()
    squares: dict[str, float] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, layer: nn.Module, y: torch.Tensor) -> torch.Tensor | None:
        new = None
        if not y.requires_grad:  # an activation in place must not change a leaf
            y.requires_grad_()
            new = y.clone()
        calls[name] += 1
        row = row_name(name, calls[name])
        squares[row], shapes[row] = 0.0, tuple(y.shape)

        def square(gradient: torch.Tensor) -> None:
            squares[row] = float(gradient.detach().double().square().mean())

        y.register_hook(square)  # type: ignore[no-untyped-call]
        return new

    with structural_copy(model) as copied, torch.enable_grad():
        batch = read.copied(copied)
        copied.requires_grad_(requires_grad=False)
        with hooked(weighted_layers(copied), record):
            output = batch.run(copied)
        first = first_floating(output)
        if first is None and not every:
            got = f"{type(output).__name__} with none"
            raise TypeError(f"model must return a floating-point tensor, got {got}")
        if not squares:
            raise ValueError("model must call a weighted layer, got none called")
        ends = [x for _, x in tensors(output, objects=DEPTH)] if every or first is None else [first]
        ends = [x for x in ends if x.requires_grad and x.is_floating_point()]
        if ends:
            directions = [torch.randn(x.shape, generator=generator).to(x) for x in ends]
            torch.autograd.backward(ends, directions)
    return squares, shapes


def growth_between(squares: Iterable[float], shapes: Iterable[tuple[int, ...]]) -> float:
    """Growth of squared gradients backwards, over neighbouring rows of one shape.

    Between other rows a pool or another number of units changes them too.
    """
    pairs = list(zip(squares, shapes, strict=True))
    total = 0.0
    for (a, shape), (b, behind) in pairwise(pairs):
        if shape == behind and a > 0 and b > 0:
            total += math.log(a / b)
    return math.exp(min(700.0, total))
