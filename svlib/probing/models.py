r"""How to run any model without a trace: a copy that shares its weights, its layers, their axes.

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
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

Layer = nn.Linear | _ConvNd
OnOutput = Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None]
Dimensions = tuple[int, int, tuple[int, ...]]
DEPTH = 3  # of objects inside objects that a batch may hold its tensors in
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class MergedInputsError(ValueError):
    """An output does not keep the inputs apart along a dimension."""


class LostInputsError(MergedInputsError):
    """Which dimension of an output is that of the inputs cannot be told."""


class MaskError(MergedInputsError):
    """An output has other positions than the mask."""


def tensors(value: Any, name: str = "", *, objects: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested lists, tuples, mappings and dataclasses as (path, tensor), a
    path being like "['key'][1]". With ``objects=n`` also those in the attributes of other objects,
    n levels deep."""
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
    if _is_record(value):
        changed = {key: mapped(function, getattr(value, key)) for key in _fields(value)}
        value = copy.copy(value)
        for key, item in changed.items():
            setattr_ = type(value).__setattr__ if isinstance(value, Mapping) else object.__setattr__
            setattr_(value, key, item)
        return value
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    return value


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(record: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(record) if hasattr(record, field.name)]


def first_floating(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in nested lists, tuples and dictionaries."""
    return next((y for _, y in tensors(value) if y.is_floating_point()), None)


def storage(x: torch.Tensor) -> int:
    """What tells whether two tensors share their entries; of subclasses without a storage of their
    own, such as DTensor, whether they are the same object."""
    try:
        return x.untyped_storage().data_ptr() or id(x)
    except RuntimeError:
        return id(x)


def has_numbers(x: torch.Tensor) -> bool:
    """Whether the entries of a tensor can be read: not of fake or meta tensors, nor inside vmap,
    jvp or a compiler."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    fake = type(x).__name__ in ("FakeTensor", "FunctionalTensor")
    return not (wrapped or fake or x.is_meta or torch.compiler.is_compiling())


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer has a weight (in, out), such as transformers' ``Conv1D``, which is not
    a convolution."""
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and getattr(weight, "ndim", 0) == 2


def is_weighted(module: nn.Module | None) -> bool:
    """Whether a module is a linear or convolutional layer."""
    return isinstance(module, Layer) or (module is not None and is_transposed(module))


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
    layers = {name: layer for name, layer in named_modules(model) if is_weighted(layer)}
    if not layers:
        kind = type(model).__name__
        text = f"model must have a linear or convolutional layer, got {kind} with none"
        raise ValueError(f"{text}; layers='all' measures every function")
    return cast(dict[str, Layer], layers)


def row_name(name: str, call: int) -> str:
    """Name of the row of a layer's first, second... call."""
    return name if call == 1 else f"{name} ({call})"


def unit_dimension(name: str, module: nn.Module | None, y: torch.Tensor) -> int | None:
    """The unit dimension that a module or a function gives its output, ``None`` if it inherits."""
    function = name.split("/")[-1].split(" ")[0]
    kind = (function if module is None else type(module).__name__).lower()
    images = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1
    channels = module is None and kind.startswith(("conv", "batch_norm", "group_norm", "instance"))
    if "pool" in kind or images or channels or isinstance(module, _ConvNd | _NormBase):
        return 1
    if isinstance(module, nn.GroupNorm):
        return 1
    features = module is None and kind in ("linear", "addmm", "layer_norm", "rms_norm", "embedding")
    if features or isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
        return y.ndim - 1
    return y.ndim - 1 if module is not None and is_transposed(module) else None


def dimensions(
    name: str,
    module: nn.Module | None,
    y: torch.Tensor,
    samples: int,
    unit: int | None = None,
    axis: int = 0,
) -> Dimensions:
    """(sample, unit, position) dimensions of an output, as :func:`svlib.decompose` takes them.

    ``unit`` is the unit dimension of the latest output of this shape, ``axis`` that of the inputs.

    Raises:
        MergedInputsError: If there are fewer than two dimensions, or that of the inputs does not
            have the size of the batch.
    """
    shape = tuple(y.shape)
    convolution = isinstance(module, _ConvNd) and y.ndim != module.weight.ndim
    if convolution or y.ndim < 2:
        wanted = "(inputs, channels, positions...)" if convolution else "(inputs, features)"
        text = f"layer {name!r} must see a batch {wanted}, its output has shape {shape}"
        raise MergedInputsError(text)
    others = [dim for dim in range(y.ndim) if dim != axis]
    own = unit_dimension(name, module, y)
    if own is not None:
        unit = own
    elif unit in (None, axis):
        unit = others[0] if y.ndim > 3 else others[-1]
    if y.shape[axis] != samples or unit == axis:
        kept = f"must keep the {samples} inputs of a batch apart"
        text = f"layer {name!r} {kept}, its output has shape {shape}"
        raise MergedInputsError(f"{text} (inputs= says how many there are in a batch)")
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
def structural_copy(model: nn.Module, *, writable: bool = False) -> Iterator[nn.Module]:
    """Yield a copy to run, uncompiled and without gradients: modules, buffers, attributes and
    caches are copied, parameters are new ones that share the entries.

    What the copy's forward pass does to it ends with it. A parameter whose entries it writes to is
    put back on exit, even after an error, and random states are as before. ``writable`` keeps what
    others than the forward pass write.

    Warns:
        UserWarning: If attributes cannot be copied: they are shared, or the model itself runs.
    """
    compiling = "torch._dynamo" in sys.modules  # hooks inside a compiled model do not run
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()  # which goes round layers and their hooks
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with same_generators(model), torch.no_grad(), eager, ExitStack() as stack:
            copied = _copied(model, stack, writable)
            with _Kept(copied):
                yield copied
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Wrapped(nn.Module):
    """In place of a wrapper for several devices, which cannot be copied."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _copied(model: nn.Module, stack: ExitStack, writable: bool) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    wrapped = isinstance(model, _WRAPPERS)
    inner: Any = model.module if wrapped else model
    memo: dict[int, Any] = {}
    for parameter in inner.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for module in inner.modules():
        # a module has a dozen empty ones, which deepcopy takes long for
        empty = (x for x in vars(module).values() if type(x) in (dict, OrderedDict) and not x)
        memo |= {id(x): type(x)() for x in empty}
        for _, x in tensors({k: v for k, v in vars(module).items() if not k.startswith("_")}):
            if x.grad_fn is not None:  # torch copies leaves only
                memo[id(x)] = x.detach().clone()
    try:
        copied: nn.Module = copy.deepcopy(inner, dict(memo))
    except Exception:
        shared = [x for module in inner.modules() for x in _shared(module, memo)]
        try:
            copied = copy.deepcopy(inner, dict(memo))
        except Exception as error:
            warnings.warn(f"the model itself runs, it cannot be copied: {error}", stacklevel=6)
            copied = inner
            for x in (*inner.buffers(), *(() if writable else inner.parameters())):
                stack.callback(x.copy_, x.detach().clone())
        else:
            names = ", ".join(dict.fromkeys(shared))
            warnings.warn(f"attributes that cannot be copied are shared: {names}", stacklevel=6)
    return _Wrapped(copied).train(model.training) if wrapped else copied


def _shared(module: nn.Module, memo: dict[int, Any]) -> Iterator[str]:
    """Names of a module's plain attributes that cannot be copied; the memo maps them to
    themselves."""
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                memo[id(value)] = value
                yield name


class _Kept(TorchFunctionMode):
    """Saves a parameter before a function writes to its entries, and puts it back on exit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._held = {storage(x): x for x in model.parameters()}
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        renormalizes = name == "embedding" and (kwargs.get("max_norm") or any(args[3:4]))
        inplace = name[-1:] == "_" or "out" in kwargs or renormalizes
        if inplace and (name[-2:] != "__" or name[:3] == "__i" or name == "__setitem__"):
            with torch._C.DisableTorchFunction():
                for _, x in tensors((args[:2], kwargs.get("out"))):
                    if (at := storage(x)) in self._held and at not in self._saved:
                        entries = self._held[at].detach()
                        self._saved[at] = entries, entries.clone()
        return function(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for entries, value in self._saved.values():
                entries.copy_(value)


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
