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


def dimensions(layer: Layer, y: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """(sample, unit, position) dimensions of a layer's output, as :func:`svlib.decompose` takes them."""
    unit = 1 if isinstance(layer, _ConvNd) else y.ndim - 1
    return 0, unit, tuple(dim for dim in range(1, y.ndim) if dim != unit)


def as_batches(batches: Any) -> Iterator[torch.Tensor]:
    """The input tensors of a tensor, or of an iterable of tensors or of tuples whose first is the input.

    Raises:
        TypeError: If ``batches`` is something else.
    """
    if isinstance(batches, torch.Tensor):
        batches = (batches,)
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise TypeError(f"batches must be a tensor or an iterable of tensors or tuples, got {type(batches).__name__}")
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"batches must hold tensors, or tuples that start with one, got {type(batch).__name__}")
        yield x


@contextmanager
def observed(model: nn.Module, on_output: OnOutput) -> Iterator[None]:
    """Call ``on_output(name, layer, output)`` after every weighted layer; a tensor returned replaces the output.

    On leaving, also after an error, hooks are gone and buffers (BatchNorm's running statistics) and the
    generators of random numbers (dropout's) are as before.
    """
    layers = weighted_layers(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: on_output(name, layer, output))
        for name, layer in layers.items()
    ]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _device(model: nn.Module) -> torch.device:
    return next(iter(weighted_layers(model).values())).weight.device


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
        ValueError: If there are fewer than two inputs, or a layer's output is not finite (it is named).

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
        calls[name] += 1
        row = name if calls[name] == 1 else f"{name} ({calls[name]})"
        sample, unit, positions = dimensions(layer, y)
        try:
            moments.setdefault(row, Moments(sample, unit, positions)).update(y)
        except ValueError as error:
            raise ValueError(f"layer {row!r}: {error}") from None
        positive = (y > 0).movedim(unit, 0).flatten(1).any(1)
        alive[row] = alive[row] | positive if row in alive else positive
        kinds[row] = type(layer).__name__, tuple(y.shape[1:])

    device = _device(model)
    with observed(model, record):
        for x in as_batches(batches):
            calls.clear()
            model(x.to(device))
    if not moments:
        raise ValueError("batches must hold at least 2 inputs, got none")
    return pd.DataFrame([_row(row, *kinds[row], found.result(), alive[row]) for row, found in moments.items()])


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
        ValueError: If ``seed`` is negative.

    Examples:
        >>> import torch
        >>> layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(3)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.orthogonal_(layer.weight)
        >>> table = probe_gradients(torch.nn.Sequential(*layers), torch.ones(4, 8), seed=0)
        >>> [round(growth, 5) for growth in table.growth[:2]]
        [1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(_check.integer("seed", seed, 0))
    outputs: list[tuple[str, torch.Tensor]] = []

    def record(name: str, layer: Layer, y: torch.Tensor) -> torch.Tensor:
        y = y if y.requires_grad else y.requires_grad_()
        outputs.append((name, y))
        return y

    (x,) = as_batches((inputs,))
    with observed(model, record), torch.enable_grad():
        y = model(x.to(_device(model)))
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"model must return a tensor, got {type(y).__name__}")
        direction = torch.randn(y.shape, generator=generator).to(y)
        gradients = torch.autograd.grad(y, [output for _, output in outputs], direction)
    squares = pd.Series([float(gradient.double().square().mean()) for gradient in gradients])
    growth = squares / squares.shift(-1)
    return pd.DataFrame({"name": [name for name, _ in outputs], "gradient2": squares / squares.iloc[-1], "growth": growth})
