r"""How to run any model: its layers, the axes of its outputs, a pass without a trace.

The inputs of a batch lie along the first dimension. Units are the channels of convolutions,
pooling, batch and group normalization (dimension 1), and the features of linear layers (the last
dimension). Any other output inherits the unit axis of the latest output with its shape; without one
it is dimension 1 if there are more than three, else the last. The other dimensions are positions:
pixels, tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from svlib.probing.attributes import restored_attributes

Layer = nn.Linear | _ConvNd
OnOutput = Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None]
Dimensions = tuple[int, int, tuple[int, ...]]
DEPTH = 3  # of objects inside objects that a batch may hold its tensors in


class MergedInputsError(ValueError):
    """An output does not keep the inputs apart along a dimension."""


class LostInputsError(MergedInputsError):
    """Several dimensions of an output may be that of the inputs."""


class MaskError(MergedInputsError):
    """An output has other positions than the mask."""


def tensors(value: Any, name: str = "", *, objects: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested lists, tuples, mappings and dataclasses, with its place:
    "['key'][1]"; on request in the attributes of other objects, so many objects deep."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}[{index}]", objects=objects)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{name}[{key!r}]", objects=objects)
    elif _is_record(value):
        for key in _fields(value):
            yield from tensors(getattr(value, key), f"{name}.{key}", objects=objects)
    elif objects and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        for key, item in vars(value).items():
            yield from tensors(item, f"{name}.{key}", objects=objects - 1)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if _is_record(value):
        value = copy.copy(value)
        for key in _fields(value):
            object.__setattr__(value, key, mapped(function, getattr(value, key)))
    return value


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(record: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(record) if hasattr(record, field.name)]


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
    name: str,
    layer: nn.Module | None,
    y: torch.Tensor,
    samples: int,
    unit: int | None = None,
    axis: int | None = 0,
) -> Dimensions:
    """(sample, unit, position) dimensions of an output, as :func:`svlib.decompose` takes them.

    ``unit`` is the unit dimension of the latest output of this shape, ``axis`` that of the inputs,
    if it is known.

    Raises:
        MergedInputsError: If that dimension does not have the size of the batch.
        ValueError: If a convolution's output has no dimension for the inputs.
    """
    shape = tuple(y.shape)
    if isinstance(layer, _ConvNd) and y.ndim != layer.weight.ndim:
        wanted = "(inputs, channels, positions...)"
        raise ValueError(f"layer {name!r} must see a batch {wanted}, its output has shape {shape}")
    if y.ndim < 2:
        wanted = "(inputs, features)"
        raise ValueError(f"layer {name!r} must see a batch {wanted}, its output has shape {shape}")
    if axis is None:
        reason = f"must show which dimension is that of the {samples} inputs"
        raise LostInputsError(f"layer {name!r} {reason}, its output has shape {shape}")
    pooled = "pool" in (name.split("/")[-1] if layer is None else type(layer).__name__).lower()
    images = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1
    others = [dim for dim in range(y.ndim) if dim != axis]
    if pooled or images or isinstance(layer, _ConvNd | _NormBase | nn.GroupNorm):
        unit = 1
    elif isinstance(layer, nn.Linear | nn.LayerNorm):
        unit = y.ndim - 1
    elif unit in (None, axis):
        unit = others[0] if y.ndim > 3 else others[-1]
    if y.shape[axis] != samples or unit == axis:
        kept = f"must keep the {samples} inputs of a batch apart"
        raise MergedInputsError(f"layer {name!r} {kept}, its output has shape {shape}")
    return axis, unit, tuple(dim for dim in others if dim != unit)


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

    On exit, even after an error, it has its own buffers (BatchNorm's running statistics), plain
    attributes and gradients of parameters again, and random states are as before.
    """
    # modules of TorchScript have no dictionary of buffers
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    values = [(x, x.clone()) for module in scripted for x in module.buffers(recurse=False)]
    modules = [module for module in model.modules() if module not in scripted]
    own = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    copies: dict[int, torch.Tensor] = {}
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    compiling = "torch._dynamo" in sys.modules  # hooks inside a compiled model do not run
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()  # which goes round layers and their hooks
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with same_generators(model), restored_attributes(modules), torch.no_grad(), eager:
            for parameter, _ in grads:
                parameter.grad = None  # else a backward pass inside would add to it
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
        for parameter, grad in grads:
            parameter.grad = grad
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
