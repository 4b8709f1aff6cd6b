r"""How to run any model: its layers, its inputs, the axes of its outputs, a pass without a trace.

The inputs of a batch lie along the first dimension. Units are the channels of convolutions,
pooling, batch and group normalization (dimension 1), and the features of linear layers (the last
dimension). Any other output inherits the unit axis of the latest output with its shape; without one
it is dimension 1 if there are more than three, else the last. The other dimensions are positions:
pixels, tokens.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from svlib import _check

Layer = nn.Linear | _ConvNd
OnOutput = Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None]
Dimensions = tuple[int, int, tuple[int, ...]]


class Batch(NamedTuple):
    """The arguments of one call of a model, on its device, and the number of inputs in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int


class MergedInputsError(ValueError):
    """An output does not keep the inputs apart along its first dimension."""


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested lists, tuples and dictionaries, with its place: "['key'][1]"."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}[{key!r}]")


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return value


def first_floating(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in nested lists, tuples and dictionaries."""
    return next((y for _, y in tensors(value) if y.is_floating_point()), None)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer has a weight (in, out), such as transformers' ``Conv1D``, which is not
    a convolution."""
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and getattr(weight, "ndim", 0) == 2


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, without the part that compiling inserts."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def weighted_layers(model: nn.Module) -> dict[str, Layer]:
    """The linear and convolutional layers of a model by name, in order of registration.

    Raises:
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
        kind = type(model).__name__
        raise ValueError(f"model must have a linear or convolutional layer, got {kind} with none")
    return cast(dict[str, Layer], layers)


def row_name(name: str, call: int) -> str:
    """Name of the row of a layer's first, second... call."""
    return name if call == 1 else f"{name} ({call})"


def dimensions(
    name: str, layer: nn.Module | None, y: torch.Tensor, samples: int, unit: int | None = None
) -> Dimensions:
    """(sample, unit, position) dimensions of an output, as :func:`svlib.decompose` takes them.

    ``unit`` is the unit dimension of the latest output of this shape.

    Raises:
        MergedInputsError: If the first dimension does not have the size of the batch.
        ValueError: If a convolution's output has no dimension for the inputs.
    """
    shape = tuple(y.shape)
    if isinstance(layer, _ConvNd) and y.ndim != layer.weight.ndim:
        wanted = "(inputs, channels, positions...)"
        raise ValueError(f"layer {name!r} must see a batch {wanted}, its output has shape {shape}")
    if y.ndim < 2:
        wanted = "(inputs, features)"
        raise ValueError(f"layer {name!r} must see a batch {wanted}, its output has shape {shape}")
    if len(y) != samples:
        kept = f"must keep the {samples} inputs of a batch apart"
        raise MergedInputsError(f"layer {name!r} {kept}, its output has shape {shape}")
    pooled = "pool" in (name.split("/")[-1] if layer is None else type(layer).__name__).lower()
    images = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1
    if pooled or images or isinstance(layer, _ConvNd | _NormBase | nn.GroupNorm):
        unit = 1
    elif isinstance(layer, nn.Linear | nn.LayerNorm):
        unit = y.ndim - 1
    elif unit is None:
        unit = 1 if y.ndim > 3 else y.ndim - 1
    return 0, unit, tuple(dim for dim in range(1, y.ndim) if dim != unit)


def as_batches(model: nn.Module, batches: Any) -> Iterator[Batch]:
    """Yield the arguments of each call, in copies. See :func:`svlib.probe` for what is accepted.

    Raises:
        TypeError: If ``batches`` is something else, or of another floating type than the model's
            first parameter.
        ValueError: If a tensor has no dimension, or the first one of real numbers is not finite.
    """
    device, dtype = _place(model)
    if isinstance(batches, torch.Tensor | Mapping | tuple):
        batches = (batches,)
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        wanted = "a tensor or an iterable of tensors, tuples or dicts"
        raise TypeError(f"batches must be {wanted}, got {type(batches).__name__}")
    for batch in batches:
        if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
            batch = batch[0]  # the rest are labels
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        listed: list[Any] = [] if isinstance(batch, Mapping) else [batch]
        if isinstance(batch, tuple | list):
            listed = list(batch)
        args = tuple(listed[: _positional(model)])
        found = [x for _, x in tensors((args, kwargs))]
        if not found or (args and not isinstance(args[0], torch.Tensor)):
            wanted = "tensors, tuples that start with one, or dicts of them"
            raise TypeError(f"batches must hold {wanted}, got {type(batch).__name__}")
        cast_by_torch = dtype is None or torch.is_autocast_enabled(device.type)
        for x in found:
            if x.ndim == 0:
                where = "along their first dimension, got a tensor without dimensions"
                raise ValueError(f"batches must have the inputs {where}")
            if x.is_floating_point() and x.dtype != dtype and not cast_by_torch:
                raise TypeError(f"batches must be of the model's {dtype}, got {x.dtype}")
        if (numbers := first_floating(found)) is not None:
            _check.floating("batches", numbers)  # others may be masks with infinities
        # copies, because a model may change its arguments
        args, kwargs = mapped(lambda x: x.detach().to(device, copy=True), (args, kwargs))
        yield Batch(args, kwargs, len(found[0]))


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Device of a model and floating type of its weights, ``None`` if it has none."""
    everything = [*model.parameters(), *model.buffers()]
    if any(map(nn.parameter.is_lazy, everything)):
        got = "got lazy ones: run a batch through it first"
        raise ValueError(f"model must have all its parameters, {got}")
    if any(x.is_meta for x in everything):
        raise ValueError("model must hold numbers, got parameters or buffers on the meta device")
    held = [x for x in everything if x.is_floating_point()]
    return (held[0].device, held[0].dtype) if held else (torch.device("cpu"), None)


def _positional(model: nn.Module) -> int | None:
    """How many arguments ``forward`` requires by position, at least 1: the rest of a tuple are
    labels. ``None``, all of them, if it takes any number."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))


@contextmanager
def same_generators(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python on exit, even after an error."""
    held = (*model.parameters(), *model.buffers())
    devices = {x.device for x in held if x.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model uncompiled, without gradients and on copies of its buffers.

    On exit, even after an error, it has its own buffers (BatchNorm's running statistics) again, and
    random states are as before.
    """
    # modules of TorchScript have no dictionary of buffers
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    values = [(x, x.clone()) for module in scripted for x in module.buffers(recurse=False)]
    modules = [module for module in model.modules() if module not in scripted]
    own = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    copies: dict[int, torch.Tensor] = {}
    compiling = "torch._dynamo" in sys.modules  # hooks inside a compiled model do not run
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()  # which goes round layers and their hooks
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
            for buffer, value in values:
                buffer.copy_(value)
        for module, buffers, transient in own:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)


@contextmanager
def hooked(layers: Mapping[str, nn.Module], on_output: OnOutput) -> Iterator[None]:
    """Call ``on_output(name, layer, y)`` after every call of these layers.

    y is the first floating-point tensor of the output; a tensor that is returned takes its place.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():

            def after(layer: nn.Module, given: Any, output: Any, name: str = name) -> Any:
                with torch._C.DisableTorchFunction():  # the model did not call what follows
                    y = first_floating(output)
                    new = None if y is None else on_output(name, layer, y)
                return None if new is None else mapped(lambda x: new if x is y else x, output)

            stack.callback(layer.register_forward_hook(after).remove)
        yield
