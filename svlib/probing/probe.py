r"""Measure m^2 and v^2 in any torch model, layer by layer in execution order, without a trace.

:mod:`svlib.probing.models` says which axes of an output are inputs, units and positions,
:mod:`svlib.probing.rows` the two meanings of positions.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pandas as pd
import torch
from torch import nn

from svlib._random import stream
from svlib.probing.batches import Batch, Caller, Masker, Reading, as_batches
from svlib.probing.calls import Call
from svlib.probing.models import (
    first_floating,
    hooked,
    row_name,
    untouched,
    weighted_layers,
)
from svlib.probing.rows import Layers, Pass, Rows


def measure(
    model: nn.Module,
    batches: Any,
    layers: Layers,
    positions: str,
    reading: Reading | None = None,
    *,
    record: bool,
    directions: bool = False,
    maximum: bool = False,
) -> tuple[pd.DataFrame, tuple[Call, ...]]:
    """The table of :func:`probe` and, with ``record``, the calls of the first batch.

    With ``directions`` there is a column ``cosine``, the mean cosine of two inputs, NaN where
    positions count as samples.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    weighted = weighted_layers(model) if layers is None else {}
    listed = as_batches(model, batches, reading)
    first: list[Batch] = []
    if reading is not None and reading.mask is not None and positions == "units":
        raise ValueError("positions must be 'samples' where a mask is given, got 'units'")
    for gradients in (False, True):
        rows = Rows(layers, positions, directions=directions, maximum=maximum)
        calls: tuple[Call, ...] = ()
        samples = 0
        try:
            with untouched(model), torch.set_grad_enabled(gradients):
                for read in chain(first, listed):
                    first = first or [read]
                    batch = read.copied(model)
                    forward = Pass(model, rows, batch.samples, batch.mask)
                    given = (batch.args, batch.kwargs)
                    with forward.watching(given, layers, record=record and not calls):
                        forward.returned(batch.run(model))
                    samples += batch.samples
                    calls = calls or forward.calls
                    rows.refuse()
            break
        except RuntimeError as error:  # of a model that differentiates in its forward pass
            if gradients or samples or "does not require grad" not in str(error):
                raise
    if samples < 2:
        raise ValueError(f"batches must hold at least 2 inputs, got {samples or 'none'}")
    if not rows.names():
        wanted = "a weighted layer" if layers is None else "what layers names"
        raise ValueError(f"model must call {wanted}, got none called")
    frame = rows.frame()
    if frame.empty:
        raise next(iter(rows.left_out.values())).error
    rows.warn([name for name in weighted if name not in rows.names()], stacklevel=3)
    return frame, calls


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
    without gradients and uncompiled, in one pass and in memory that does not grow with the batches.

    Args:
        model: Any module.
        batches: A tensor of inputs, a tuple of arguments or a dictionary of them by name, or an
            iterable of such (a ``DataLoader``; a list is one of batches). Inputs lie along the
            first dimension. Of a tuple, as many items are taken as ``forward`` requires by
            position, or the first alone if it is a dictionary: the rest are labels.
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
    return measure(model, batches, layers, positions, read, record=False, maximum=maximum)[0]


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
    layers = weighted_layers(model)
    calls: Counter[str] = Counter()
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str, layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
        y = y if y.requires_grad else y.requires_grad_()
        calls[name] += 1
        outputs[row_name(name, calls[name])] = y
        return y.clone()  # an activation in place must not change what is differentiated by

    if isinstance(inputs, list) and call is None:  # of batches
        raise TypeError("inputs must be one batch: a tensor, tuple or dict, got list")
    reading = Reading() if call is None else Reading(1, call)  # their number does not matter
    (read,) = as_batches(model, [inputs], reading)
    batch = read.copied(model)
    with untouched(model), hooked(layers, record), torch.enable_grad():
        output = batch.run(model)
        y = first_floating(output)
        if y is None:
            got = f"{type(output).__name__} with none"
            raise TypeError(f"model must return a floating-point tensor, got {got}")
        if not outputs:
            raise ValueError("model must call a weighted layer, got none called")
        direction = torch.randn(y.shape, generator=generator).to(y)
        places = list(outputs.values())
        gradients = torch.autograd.grad(y, places, direction, materialize_grads=True)
    squares = pd.Series([float(gradient.double().square().mean()) for gradient in gradients])
    relative, growth = squares / squares.iloc[-1], squares / squares.shift(-1)
    return pd.DataFrame({"name": list(outputs), "gradient2": relative, "growth": growth})
