r"""Data-dependent initialization in execution order: preserve the total or the sample variance.

*Total init* divides a layer's weights by one scalar, so that the mean square of its preactivations
over inputs and units is 1 (LSUV, Mishkin & Matas 2016, is of this kind). *Sample init* divides the
weights of each unit by the sample deviation of its preactivation and sets its bias so that the
sample mean is 0 (Salimans & Kingma 2016; Krähenbühl et al. 2016). Luther & Seung, arXiv:1902.04942,
compare the two.

Sample init keeps v^2 at 1 and pays in gradients: squared, they grow backwards by
:math:`\pi/(\pi-1)=1.467` per ReLU layer, as with BatchNorm.

Linear and convolutional layers are set (transposed, grouped ones and transformers' ``Conv1D`` too),
each at its first call. Others are left as they are, and the column ``done`` says why: a layer whose
weight or bias is frozen (``requires_grad`` is False), or whose weight was set already, in an
earlier call or as that of another layer, or also belongs to something else, an embedding for
example. A layer without a bias has its deviation set; its sample mean stays.

Normalization is neither touched nor folded in: the model runs in the mode it is in. In training
mode a BatchNorm behind a layer takes away what is set; in evaluation mode, with running statistics
not yet set, it passes everything on.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from svlib import _check
from svlib.moments import Decomposition, decompose
from svlib.probing.along import GRADIENTS, gradient_growth, uses_batch_statistics
from svlib.probing.axes import Axes
from svlib.probing.batches import Batch, Caller, Reading, as_batches
from svlib.probing.calls import Call
from svlib.probing.models import (
    dimensions,
    hooked,
    is_transposed,
    named_modules,
    row_name,
    same_generators,
    untouched,
    weighted_layers,
)
from svlib.probing.probe import measure, probe_gradients

_TOLERANCE = 0.05  # of a model in bfloat16, too
_SET, _SET_WITHOUT_BIAS = "set", "deviation set; no bias, mean left"
# Modules whose weights are not used through linear or convolutional layers of their own
_BEYOND = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)

Parts = Callable[[Decomposition], tuple[torch.Tensor, torch.Tensor]]


def total_(
    model: nn.Module,
    batches: Any,
    *,
    centred: bool = False,
    gradients: bool = False,
    inputs: int | None = None,
    call: Caller | None = None,
) -> pd.DataFrame:
    """Rescale every weighted layer, in place, to mean square 1 over inputs and units.

    Weights and bias are divided by one scalar per layer; the last layer is included. Batches are
    joined to one calibration batch, and one pass sets all layers, each seeing those before it
    already set. See :mod:`svlib.probing.init` for the layers that are set and those that are left.

    Args:
        model: Any module with weighted layers.
        batches: Calibration inputs, as :func:`svlib.probe` takes them.
        centred: Subtract one mean per layer from the biases first, in another reading of what the
            paper compares sample init with.
        gradients: Measure squared gradients as well, by a backward pass before and one after.
        inputs: As in :func:`svlib.probe`.
        call: As in :func:`svlib.probe`.

    Returns:
        One row per call of a layer: ``name``, ``type``, ``done``, and m2, v2, ratio (on request
        gradient2, relative to the last row) before and after.

    Raises:
        ValueError: If a layer's output is 0 or merges inputs with their positions, or a layer is
            not called though not frozen, or computes with its weight before it uses it; if
            attention, recurrent or bilinear layers of torch are not frozen; or if there are fewer
            than two inputs. The model is then as it was.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = total_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print((table.m2_after + table.v2_after).round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """
    _check.choice("centred", centred, (True, False))
    parts, reading = _layer if centred else _total, Reading(inputs, call)
    return _initialize(model, batches, parts, gradients, reading)[0]


def sample_(
    model: nn.Module,
    batches: Any,
    *,
    gradients: bool = False,
    inputs: int | None = None,
    call: Caller | None = None,
) -> pd.DataFrame:
    """Give every unit of every weighted layer, in place, sample mean 0 and sample variance 1.

    Arguments, table and errors are those of :func:`total_`; a unit without variance is an error
    too. Squared gradients then grow backwards by 1.467 per ReLU layer.

    Warns:
        UserWarning: If layers without a bias keep sample means above their deviations; or if
            squared gradients are to grow more than ``svlib.probing.along.GRADIENTS`` times through
            ReLU layers, along the way from input to output where they grow least.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = sample_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print(table.v2_after.round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """
    table, calls = _initialize(model, batches, _sample, gradients, Reading(inputs, call))
    means_left = table[(table.done == _SET_WITHOUT_BIAS) & (table.ratio_after > 1)]
    if len(means_left) and not any(map(uses_batch_statistics, calls)):
        worst = means_left.sort_values("ratio_after").iloc[-1]
        text = f"{len(means_left)} layers without a bias keep sample means above their deviations "
        text += f"(m/v = {worst.ratio_after:.2g} at {worst['name']!r}), and the decay goes on: "
        warnings.warn(f"{text}give them a bias, set them again", stacklevel=2)
    if (growth := gradient_growth(calls)) > GRADIENTS:
        text = f"with sample init squared gradients grow some {growth:.0e} times from the model's "
        text += "output to its first layer (π/(π-1) = 1.467 per ReLU layer, as with BatchNorm): "
        text += "expect to need small learning rates, residual connections or total init"
        warnings.warn(text, stacklevel=2)
    return table


def _total(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(()), torch.as_tensor(found.sigma2).sqrt()


def _layer(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.as_tensor(found.mean.mean())
    return mean, (torch.as_tensor(found.sigma2) - mean.square()).sqrt()


def _sample(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(found.mean), torch.from_numpy(found.variance).sqrt()


def _initialize(
    model: nn.Module, batches: Any, parts: Parts, gradients: bool, reading: Reading
) -> tuple[pd.DataFrame, tuple[Call, ...]]:
    """Replace every layer's y by (y - shift) / scale, ``shift, scale = parts(decomposition)``."""
    _check.choice("gradients", gradients, (True, False))
    layers = weighted_layers(model)
    setter = _Setter(layers, _left(model, layers), parts)
    with same_generators(model):  # a loader draws its order, and augments
        batch = _joined(x.copied(model) for x in as_batches(model, batches, reading))
    parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    before, _ = _measured(model, batch, gradients)
    try:
        copied = batch.copied(model)
        axes = Axes(copied.tensors(), batch.samples)
        with untouched(model), hooked(layers, setter.on_output(batch.samples, axes)), axes:
            copied.run(model)
        if missed := setter.missed():
            wanted = "must be called in the model's forward pass or be frozen"
            raise ValueError(f"layer {missed[0]!r} {wanted}, got no call")
        after, calls = _measured(model, batch, gradients)
        after["done"] = after.name.map(setter.done)
        if list(before.name) != list(after.name) or after.done.isna().any():
            got = "got other calls in another pass"
            raise ValueError(f"model must call the same layers every time, {got}")
        _verify(after, parts)
    except BaseException:
        with torch.no_grad():
            for parameter, value in parameters:
                parameter.copy_(value)
        torch.clear_autocast_cache()
        raise
    columns = ["m2", "v2", "ratio", *["gradient2"] * gradients]
    table = before[["name", "type", *columns]].merge(
        after[["name", *columns]], on="name", suffixes=("_before", "_after")
    )
    table.insert(2, "done", after.done)
    return table, calls


class _Setter:
    """Sets layers at their first call; ``done`` says of each call what was done."""

    def __init__(
        self, layers: Mapping[str, nn.Module], left: Mapping[str, str], parts: Parts
    ) -> None:
        self._layers, self._left, self._parts = layers, left, parts
        self._calls: Counter[str] = Counter()
        self._set_as: dict[int, str] = {}  # storage of what was set, and the layer
        self.done: dict[str, str] = {}

    def missed(self) -> list[str]:
        """Layers that should have been set and were not called."""
        return [name for name in self._layers if not self._calls[name] and name not in self._left]

    def on_output(
        self, samples: int, axes: Axes
    ) -> Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None]:
        """What to do with an output of a layer, given the number of inputs and where they lie."""

        def set_(name: str, layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
            weight, bias = (layer._parameters.get(part) for part in ("weight", "bias"))
            held = [part for part in (weight, bias) if part is not None]
            storages = [part.untyped_storage().data_ptr() for part in held]
            shared = [self._set_as[place] for place in storages if place in self._set_as]
            self._calls[name] += 1
            row = row_name(name, self._calls[name])
            if name in self._left or shared:
                self.done[row] = self._left.get(name) or f"left, set as {shared[0]!r}"
                return y
            sample, unit, positions = dimensions(name, layer, y, samples, axis=axes.of(y))
            shift, scale = self._parts(decompose(y, sample, unit, positions))
            shift, scale = shift.to(y), scale.to(y)
            if bad := int((~((scale > 0) & scale.isfinite())).sum()):
                wanted = "must have positive, finite scales to divide by"
                raise ValueError(f"layer {name!r} {wanted}, got {bad} of {scale.numel()} not so")
            whole = bias is not None or self._parts is _total
            self.done[row] = _SET if whole else _SET_WITHOUT_BIAS
            self._set_as.update(dict.fromkeys(storages, name))
            _divide_(layer, scale)
            if bias is None:
                shift = torch.zeros_like(shift)
            else:
                bias.copy_((bias - shift) / scale)
            torch.clear_autocast_cache()  # which holds the weights of before
            new = (y - _along(shift, unit, y.ndim)) / _along(scale, unit, y.ndim)
            axes.replace(y, new)
            return new

        return set_


def _verify(after: pd.DataFrame, parts: Parts) -> None:
    """Raise if a layer's statistics are not those that were set, e.g. because it transforms its
    weight."""
    mine = after[after.done.isin([_SET] if parts is _layer else [_SET, _SET_WITHOUT_BIAS])]
    found = mine.v2 if parts is _sample else mine.sigma2
    off = mine[~((found - 1).abs() < _TOLERANCE)]
    if len(off):
        kind = "sample variance" if parts is _sample else "mean square"
        got = f"{kind} {found[off.index[0]]:.3g} where 1 was set"
        wanted = "must use its weight as it is and alike every time"
        raise ValueError(f"layer {off.name.iloc[0]!r} {wanted}, got {got}")


def _left(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that are not to be set, and why; refuses what cannot be."""
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        free = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, _BEYOND) and free:
            kind = type(module).__name__
            reason = "must be frozen for this call (requires_grad False): its weights cannot be set"
            raise ValueError(f"module {name!r}, a {kind}, {reason}")
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    left = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None:
            got = "it computes it from others"
            raise ValueError(f"layer {name!r} must hold its weight as a parameter, {got}")
        others = [owner for owner in owners[id(weight)] if owner not in layers]
        if others:
            left[name] = f"left, tied to {others[0]}"
        elif not all(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            left[name] = "left, frozen"
    return left


def _joined(batches: Any) -> Batch:
    """Join batches that are alike in everything but their tensors."""
    listed = list(batches)
    if (samples := sum(batch.samples for batch in listed)) < 2:
        raise ValueError(f"batches must hold at least 2 inputs, got {samples}")
    names = [batch.names() for batch in listed]
    if any(other != names[0] for other in names):
        other = next(x for x in names if x != names[0])
        raise ValueError(f"batches must hold the same tensors, got {names[0]} and {other}")
    columns = zip(*(batch.tensors() for batch in listed), strict=True)
    joined = {id(x[0]): _column(name, x, listed) for name, x in zip(names[0], columns, strict=True)}
    whole: Batch = listed[0].replaced(lambda x: joined[id(x)])
    return whole._replace(samples=samples)


def _column(name: str, found: tuple[torch.Tensor, ...], batches: list[Batch]) -> torch.Tensor:
    """One tensor of all batches: joined where it holds inputs, the same in all otherwise."""
    if all(x.ndim and len(x) == batch.samples for x, batch in zip(found, batches, strict=True)):
        return torch.cat(found)
    if all(x.shape == found[0].shape and bool((x == found[0]).all()) for x in found):
        return found[0]
    got = f"{name or 'a tensor'} of shape {tuple(found[0].shape)} in the first: give one batch"
    raise ValueError(f"batches must have inputs along first dimensions to be joined, got {got}")


def _measured(
    model: nn.Module, batch: Batch, gradients: bool
) -> tuple[pd.DataFrame, tuple[Call, ...]]:
    with warnings.catch_warnings():
        # _initialize raises, or says of the layer that it is left
        warnings.filterwarnings("ignore", message=".* have no row")
        table, calls = measure(model, [batch], None, "samples", record=True)
    if gradients:
        table["gradient2"] = probe_gradients(model, batch, seed=0).gradient2
    return table, calls


def _divide_(layer: nn.Module, scale: torch.Tensor) -> None:
    """Divide a layer's weights by one scale per unit, or by one for all."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if scale.ndim == 0 or is_transposed(layer):
        weight /= scale
    elif isinstance(layer, _ConvTransposeNd):
        # (in, out / groups, kernel...): unit u belongs to group u // (out / groups)
        by_group = weight.view(layer.groups, -1, *weight.shape[1:])
        by_group /= scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
    else:
        weight /= _along(scale, 0, weight.ndim)


def _along(values: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    """Values per unit, or one for all, shaped to broadcast along ``dim`` of ``ndim`` dimensions."""
    return (
        values if values.ndim == 0 else values.reshape([-1 if d == dim else 1 for d in range(ndim)])
    )
