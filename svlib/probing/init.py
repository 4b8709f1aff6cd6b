r"""Data-dependent initialization in execution order: preserve the total or the sample variance.

*Total init* divides a layer's weights by one scalar, so that the mean square of its preactivations
over inputs and units is 1 (LSUV, Mishkin & Matas 2016, is of this kind). *Sample init* divides the
weights of each unit by the sample deviation of its preactivation and sets its bias so that the
sample mean is 0 (Salimans & Kingma 2016; Krähenbühl et al. 2016). Luther & Seung, arXiv:1902.04942,
compare the two.

Sample init keeps v^2 at 1 and pays in gradients: squared, they grow backwards by
:math:`\pi/(\pi-1)=1.467` per ReLU layer, as with BatchNorm.

Linear and convolutional layers are set (transposed, grouped ones and transformers' ``Conv1D`` too),
each at its first call; under weight normalization their g and bias. Others are left as they are,
and the column ``done`` says why: a layer whose weight or bias is frozen (``requires_grad`` is
False), or whose weight was set already, in an earlier call or as that of another layer, or also
belongs to something else, an embedding for example. A layer without a bias has its deviation set;
its sample mean stays.

One warning names what is left for other reasons: layers that are not called, whose output is 0 or
does not vary over the inputs (the last layer of Fixup, the second matrix of LoRA), whose inputs
cannot be told apart, whose weight another parametrization makes (spectral, orthogonal), and torch's
attention and recurrent modules. Freezing a layer (``requires_grad_(False)``) leaves it silently.

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

from svlib import _check
from svlib.moments import Decomposition, decompose
from svlib.probing.along import (
    GRADIENTS,
    GRADIENTS_FIRST,
    gradient_growth,
    uses_batch_statistics,
)
from svlib.probing.axes import Axes
from svlib.probing.batches import Batch, Caller, Masker, Reading, as_batches, counted, joined
from svlib.probing.calls import Call
from svlib.probing.models import (
    Layer,
    MaskError,
    MergedInputsError,
    hooked,
    named_modules,
    row_name,
    same_generators,
    untouched,
    weighted_layers,
)
from svlib.probing.probe import measure, probe_gradients
from svlib.probing.rows import some
from svlib.probing.scales import along, by_unit, carrier, divide_, maker

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
    mask: Masker | None = None,
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
        mask: As in :func:`svlib.probe`. Batches may then have different lengths: they are padded
            with zeros, which the model is taken to ignore where the mask is 0.

    Returns:
        One row per call of a layer: ``name``, ``type``, ``done``, and m2, v2, ratio (on request
        gradient2, relative to the last row) before and after.

    Raises:
        ValueError: If no layer can be set, one computes with its weight before it uses it, an
            output is not finite, batches cannot be joined, or there are fewer than two inputs. The
            model is then as it was.

    Warns:
        UserWarning: If layers are left, not because they are frozen or share a weight.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = total_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print((table.m2_after + table.v2_after).round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """
    _check.choice("centred", centred, (True, False))
    parts, reading = _layer if centred else _total, Reading(inputs, call, mask)
    return _initialize(model, batches, parts, gradients, reading)[0]


def sample_(
    model: nn.Module,
    batches: Any,
    *,
    gradients: bool = False,
    inputs: int | None = None,
    call: Caller | None = None,
    mask: Masker | None = None,
) -> pd.DataFrame:
    r"""Give every unit of every weighted layer, in place, sample mean 0 and sample variance 1.

    Arguments, table and errors are those of :func:`total_`. A unit that does not vary over the
    inputs is left as it is. Squared gradients then grow backwards by 1.467 per ReLU layer. S inputs
    give means and deviations that on other inputs are off by some :math:`1/\sqrt S` of a deviation.

    Warns:
        UserWarning: If layers are left as by :func:`total_`, or units;
            if layers without a bias keep sample means above their deviations; or if
            squared gradients are to grow more than ``svlib.probing.along.GRADIENTS`` times through
            ReLU layers, along the way from input to output where they grow least.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = sample_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print(table.v2_after.round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """
    table, calls = _initialize(model, batches, _sample, gradients, Reading(inputs, call, mask))
    means_left = table[(table.done == _SET_WITHOUT_BIAS) & (table.ratio_after > 1)]
    if len(means_left) and not any(map(uses_batch_statistics, calls)):
        worst = means_left.sort_values("ratio_after").iloc[-1]
        text = f"{len(means_left)} layers without a bias keep sample means above their deviations "
        text += f"(m/v = {worst.ratio_after:.2g} at {worst['name']!r}), and the decay goes on: "
        warnings.warn(f"{text}give them a bias, set them again", stacklevel=2)
    if (growth := gradient_growth(calls)) > GRADIENTS:
        text = f"with sample init squared gradients grow some {growth:.0e} times from the model's "
        text += "output to its first layer (π/(π-1) = 1.467 per ReLU layer, as with BatchNorm): "
        deep = growth > GRADIENTS_FIRST
        text += (
            "small learning rates do not mend this, " if deep else "expect small learning rates, "
        )
        text += "prefer skip connections or total init" if deep else "or use skip connections"
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
    with same_generators(model):  # a loader draws its order, and augments
        batch = joined(x.copied(model) for x in as_batches(model, batches, reading))
    setter = _Setter(layers, _left(model, layers), parts, batch)
    parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    before, _ = _measured(model, batch, gradients)
    try:
        copied = batch.copied(model)
        axes = Axes(copied.tensors(), batch.samples)
        with untouched(model), hooked(layers, setter.on_output(axes)), axes:
            copied.run(model)
        setter.finish()
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
    setter.warn(_beyond(model))
    columns = ["m2", "v2", "ratio", *["gradient2"] * gradients]
    table = before[["name", "type", *columns]].merge(
        after[["name", *columns]], on="name", suffixes=("_before", "_after")
    )
    table.insert(2, "done", after.done)
    return table, calls


class _Setter:
    """Sets layers at their first call; ``done`` says of each call what was done."""

    def __init__(
        self, layers: Mapping[str, Layer], left: Mapping[str, str], parts: Parts, batch: Batch
    ) -> None:
        self._layers, self._left, self._parts = layers, dict(left), parts
        self._mask = batch.mask
        self._calls: Counter[str] = Counter()
        self._set_as: dict[int, str] = {}  # storage of what was set, and the layer
        self._unset: dict[str, list[str]] = {}  # reasons that a warning names, and layers
        self.done: dict[str, str] = {}
        for name, layer in layers.items():
            if carrier(layer) is None and name not in left:
                self._left[name] = self._leave(name, f"weight made by {maker(layer)}")

    def finish(self) -> None:
        """Note layers that were not called; raise if none was set."""
        for name in self._layers:
            if not self._calls[name] and name not in self._left:
                self._leave(name, "not called")
        if not self._set_as and self._unset:
            reason, names = next(iter(self._unset.items()))
            raise ValueError(
                f"model must have a layer to set, got {some(map(repr, names))}: {reason}"
            )

    def warn(self, beyond: list[str]) -> None:
        """Say in one warning what was left."""
        reasons = self._unset | ({"attention, recurrent or bilinear": beyond} if beyond else {})
        if reasons:
            parts = [f"{some(map(repr, names))} ({reason})" for reason, names in reasons.items()]
            text = "left as they are: " + "; ".join(parts)
            warnings.warn(f"{text}: freeze them to leave them silently", stacklevel=4)

    def _leave(self, name: str, reason: str) -> str:
        self._unset.setdefault(reason, []).append(name)
        return f"left, {reason}"

    def on_output(
        self, axes: Axes
    ) -> Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None]:
        """What to do with an output of a layer, given where the inputs lie in it."""

        def set_(name: str, layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
            self._calls[name] += 1
            row, bias = row_name(name, self._calls[name]), layer._parameters.get("bias")
            held = [part for part in (carrier(layer), bias) if part is not None]
            shared = [self._set_as[at] for part in held if (at := _place(part)) in self._set_as]
            if name in self._left or shared:
                self.done[row] = self._left.get(name) or f"left, set as {shared[0]!r}"
                return y
            try:
                found = axes.apart(name, layer, y, None)
                held_y, mask = counted(found.y, found.dims, self._mask)
            except MergedInputsError as error:
                masked = isinstance(error, MaskError)
                reason = "other positions than the mask" if masked else "inputs not apart"
                self.done[row] = self._leave(name, reason)
                return y
            statistics = decompose(held_y, *found.dims, mask=mask)
            new = self._set(name, row, layer, y, found.unit, statistics)
            if new is not y:
                self._set_as.update({_place(part): name for part in held})
                axes.replace(y, new)
            return new

        return set_

    def _set(
        self, name: str, row: str, layer: Any, y: torch.Tensor, unit: int, found: Decomposition
    ) -> torch.Tensor:
        """Set one layer and return what its output is then."""
        shift, scale = (x.to(y) for x in self._parts(found))
        if bad := int((~scale.isfinite()).sum()):
            wanted = "must have finite scales to divide by"
            raise ValueError(f"layer {name!r} {wanted}, got {bad} of {scale.numel()} not so")
        # what rounding leaves of a unit that does not vary is no variance
        still = scale <= 2 * torch.finfo(y.dtype).eps * shift.abs()
        if still.all():
            silent = not found.sigma2
            reason = "output 0 for every input" if silent else "no variation over inputs"
            self.done[row] = self._leave(name, reason)
            return y
        if scale.ndim and not by_unit(layer, len(scale)):
            self.done[row] = self._leave(name, "one scale for several units")
            return y
        bias = layer._parameters.get("bias")
        self.done[row] = _SET if bias is not None or self._parts is _total else _SET_WITHOUT_BIAS
        if still.any():
            places = [int(place) for place in still.nonzero()[:, 0]]
            self._leave(f"{name} units {some(map(str, places))}", "no variation over inputs")
            self.done[row] = f"set but for {len(places)} units without variation"
            scale, shift = torch.where(still, 1, scale), torch.where(still, 0, shift)
        divide_(layer, scale)
        if bias is None:
            shift = torch.zeros_like(shift)
        else:
            bias.copy_((bias - shift) / scale)
        torch.clear_autocast_cache()  # which holds the weights of before
        return (y - along(shift, unit, y.ndim)) / along(scale, unit, y.ndim)


def _place(parameter: torch.Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


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
    """Layers that are left because they are frozen or their weight belongs to something else."""
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name.split(".parametrizations.")[0])
    left = {}
    for name, layer in layers.items():
        others = [owner for owner in owners.get(id(carrier(layer)), []) if owner not in layers]
        if not all(parameter.requires_grad for parameter in layer.parameters()):
            left[name] = "left, frozen"
        elif others and carrier(layer) is not None:
            left[name] = f"left, tied to {others[0]}"
    return left


def _beyond(model: nn.Module) -> list[str]:
    """Modules of torch whose weights are used otherwise than through layers, unless frozen."""
    return [
        name
        for name, module in named_modules(model)
        if isinstance(module, _BEYOND)
        and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


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
