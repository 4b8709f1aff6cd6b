"""Measure m^2 and v^2 in any torch model, layer by layer in execution order, and leave no trace.

Which axes mean what: a convolution's output (inputs, channels, positions...) has its channels as units; a
linear layer's output (inputs, positions..., features) its features. Positions of one input are not
independent samples; :class:`svlib.Moments` says how m^2 stays unbiased.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from svlib import _check
from svlib._random import stream
from svlib.moments import Decomposition, Moments

Layer = nn.Linear | _ConvNd
OnOutput = Callable[[str, Layer, torch.Tensor], torch.Tensor | None]


def weighted_layers(model: nn.Module) -> dict[str, Layer]:
    """The linear and convolutional layers of a model by name, in order of registration.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If it has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}
    if not layers:
        raise ValueError(f"model must have a linear or convolutional layer, got {type(model).__name__} with none")
    return layers


def dimensions(name: str, layer: Layer, y: torch.Tensor, inputs: int) -> tuple[int, int, tuple[int, ...]]:
    """(sample, unit, position) dimensions of a layer's output, as :func:`svlib.decompose` takes them.

    Raises:
        ValueError: If the output does not have the ``inputs`` of the batch along its first dimension, or if a
            convolution's output has none.
    """
    convolution = isinstance(layer, _ConvNd)
    shape = tuple(y.shape)
    if convolution and y.ndim != layer.weight.ndim:
        raise ValueError(f"layer {name!r} must see a batch (inputs, channels, positions...), its output has shape {shape}")
    if len(y) != inputs:
        raise ValueError(f"layer {name!r} must keep the {inputs} inputs of a batch apart, its output has shape {shape}")
    unit = 1 if convolution else y.ndim - 1
    return 0, unit, tuple(dim for dim in range(1, y.ndim) if dim != unit)


def as_batches(model: nn.Module, batches: Any) -> Iterator[torch.Tensor]:
    """The input tensors, on the model's device, of a tensor or an iterable of tensors or of tuples that start with one.

    Raises:
        TypeError: If ``batches`` is something else, or of another floating type than the model's first layer.
        ValueError: If a batch has no dimension or is not finite.
    """
    weight = next(iter(weighted_layers(model).values())).weight
    if isinstance(batches, torch.Tensor):
        batches = (batches,)
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | dict):
        raise TypeError(f"batches must be a tensor or an iterable of tensors or tuples, got {type(batches).__name__}")
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"batches must hold tensors, or tuples that start with one, got {type(batch).__name__}")
        if x.ndim == 0:
            raise ValueError("batches must have the inputs along their first dimension, got a tensor without dimensions")
        if x.is_floating_point() and x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise TypeError(f"batches must be of the model's {weight.dtype}, got {x.dtype}")
        yield _check.floating("batches", x).to(weight.device)


@contextmanager
def observed(model: nn.Module, on_output: OnOutput) -> Iterator[None]:
    """Call ``on_output(name, layer, output)`` after every weighted layer; a tensor returned replaces the output.

    On leaving, also after an error, hooks are gone and buffers (BatchNorm's running statistics) and the
    generators of random numbers (dropout's, the data loader's) are as before.
    """
    layers = weighted_layers(model)
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: on_output(name, layer, output))
        for name, layer in layers.items()
    ]
    device = next(iter(layers.values())).weight.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer  # a forward pass may have put another tensor in its place
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


def probe(model: nn.Module, batches: Any) -> pd.DataFrame:
    """Measure the decomposition of the output of every weighted layer, in execution order.

    The model runs in the mode it is in (BatchNorm in training mode normalizes by the batch), without
    gradients, one pass over the batches, in memory that does not grow with their number.

    Args:
        model: Any module with linear or convolutional layers.
        batches: A tensor of inputs, or an iterable of tensors or of tuples whose first item is the input
            (a ``DataLoader``). Each is moved to the model's device.

    Returns:
        One row per call of a weighted layer: ``name`` (a second call of a layer has " (2)" behind it), ``type``,
        ``shape`` of one input's output, ``m2``, ``v2``, ``sigma2``, ``v2_fraction`` = v^2/sigma^2, ``ratio`` = m/v,
        ``dead`` (fraction of units never positive on the data: a ReLU after them passes nothing) and ``inputs``.

    Raises:
        TypeError: If ``model`` is not a module or ``batches`` holds no tensors.
        ValueError: If there are fewer than two inputs, no weighted layer is called, or a layer's output is not finite or
            does not keep the inputs apart along its first dimension (the layer is named).

    Examples:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
        >>> table = probe(model, torch.randn(100, 20, generator=generator))
        >>> list(table.name), list(table.inputs)
        (['0', '2'], [100, 100])
    """
    moments: dict[str, Moments] = {}
    alive: dict[str, torch.Tensor] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    calls: Counter[str] = Counter()

    def record(name: str, layer: Layer, y: torch.Tensor) -> None:
        row = _row_name(name, calls)
        sample, unit, positions = dimensions(row, layer, y, inputs)
        try:
            moments.setdefault(row, Moments(sample, unit, positions)).update(y)
        except ValueError as error:
            raise type(error)(f"layer {row!r}: {error}") from None
        positive = (y > 0).movedim(unit, 0).flatten(1).any(1)
        alive[row] = alive[row] | positive if row in alive else positive
        kinds[row] = type(layer).__name__, tuple(y.shape[1:])

    inputs = 0
    with observed(model, record):
        for x in as_batches(model, batches):
            calls.clear()
            inputs = len(x)
            model(x)
    if not moments:
        missing = "batches must hold at least 2 inputs, got none"
        raise ValueError("model must call a weighted layer, got none called" if inputs else missing)
    return pd.DataFrame([_row(row, *kinds[row], found.result(), alive[row]) for row, found in moments.items()])


def _row_name(name: str, calls: Counter[str]) -> str:
    """Count a call of a layer and name its row."""
    calls[name] += 1
    return name if calls[name] == 1 else f"{name} ({calls[name]})"


def _row(name: str, kind: str, shape: tuple[int, ...], found: Decomposition, alive: torch.Tensor) -> dict[str, Any]:
    m2, v2, sigma2 = float(found.m2), float(found.v2), float(found.sigma2)
    return {
        "name": name, "type": kind, "shape": shape, "m2": m2, "v2": v2, "sigma2": sigma2,
        "v2_fraction": v2 / sigma2 if sigma2 else float("nan"), "ratio": float(found.ratio),
        "dead": 1 - float(alive.double().mean()), "inputs": found.inputs,
    }  # fmt: skip


def probe_gradients(model: nn.Module, inputs: torch.Tensor, *, seed: int) -> pd.DataFrame:
    """Mean square of the gradient at the output of every weighted layer, in execution order.

    A Gaussian vector is sent backwards from the model's output. Parameters get no gradient.

    Args:
        model: Any module with linear or convolutional layers and a tensor as output.
        inputs: A batch of inputs.
        seed: Seed of the vector at the output.

    Returns:
        ``name``, ``gradient2`` (relative to the last row), ``growth`` (factor from the next row to this one, NaN in the last).

    Raises:
        TypeError: If ``model`` is not a module, ``inputs`` not a tensor or the output not a tensor.
        ValueError: If ``seed`` is negative or ``inputs`` not finite.

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
    calls: Counter[str] = Counter()
    outputs: list[tuple[str, torch.Tensor]] = []

    def record(name: str, layer: Layer, y: torch.Tensor) -> torch.Tensor:
        y = y if y.requires_grad else y.requires_grad_()
        outputs.append((_row_name(name, calls), y))
        return y.clone()  # an activation in place must not change what is differentiated by

    if not isinstance(inputs, torch.Tensor):
        raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}")
    (x,) = as_batches(model, inputs)
    with observed(model, record), torch.enable_grad():
        y = model(x)
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"model must return a tensor, got {type(y).__name__}")
        direction = torch.randn(y.shape, generator=generator).to(y)
        gradients = torch.autograd.grad(y, [output for _, output in outputs], direction, materialize_grads=True)
    squares = pd.Series([float(gradient.double().square().mean()) for gradient in gradients])
    growth = squares / squares.shift(-1)
    return pd.DataFrame({"name": [name for name, _ in outputs], "gradient2": squares / squares.iloc[-1], "growth": growth})
