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

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from svlib import _check
from svlib._random import stream
from svlib.moments import Decomposition, decompose
from svlib.probing.batches import Batch, Caller, Masker, Reading, counted
from svlib.probing.models import (
    MaskError,
    MergedInputsError,
    first_floating,
    named_modules,
    row_name,
    same_generators,
    storage,
    structural_copy,
    unit_dimension,
    weighted_layers,
)
from svlib.probing.passes import Output, Watch
from svlib.probing.places import Places, read_batches
from svlib.probing.probe import growth_between, measure, squared_gradients
from svlib.probing.rows import Pass, Rows, some, watched
from svlib.probing.scales import along, by_unit, carrier, divide_, like, maker

GRADIENTS = 100.0
"""Growth of squared gradients, from output to input, that sample init warns of: a dozen ReLU
layers. Chapter 6 has training runs of more."""
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
    r"""Rescale every weighted layer, in place, to mean square 1 over inputs and units.

    Weights and bias are divided by one scalar per layer; the last layer is included. The first
    batch is the calibration batch, and one pass sets all layers, each seeing those before it
    already set. See :mod:`svlib.probing.init` for the layers that are set and those that are left.

    Args:
        model: Any module with weighted layers.
        batches: The calibration batch, as :func:`svlib.probe` takes it; of a ``DataLoader`` the
            first. S inputs give means and deviations that on others are off by some
            :math:`1/\sqrt S` of a deviation.
        centred: Subtract one mean per layer from the biases first, in another reading of what the
            paper compares sample init with.
        gradients: Measure squared gradients as well, by a backward pass before and one after.
        inputs, call, mask: As in :func:`svlib.probe`.

    Returns:
        One row per call of a layer: ``name``, ``type``, ``done``, and m2, v2, ratio (on request
        gradient2, relative to the last row) before and after.

    Raises:
        ValueError: If no layer can be set, an output is not finite, there are fewer than two
            inputs, or a list of several batches. The model is then as it was.

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
    return _initialize(model, batches, parts, gradients, reading)


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
    inputs is left as it is. Squared gradients then grow backwards by 1.467 per ReLU layer.

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
    table = _initialize(model, batches, _sample, gradients, Reading(inputs, call, mask))
    means_left = table[(table.done == _SET_WITHOUT_BIAS) & (table.ratio_after > 1)]
    normalizes = any(isinstance(x, _BatchNorm) and x.training for x in model.modules())
    if len(means_left) and not normalizes:
        worst = means_left.sort_values("ratio_after").iloc[-1]
        text = f"{len(means_left)} layers without a bias keep sample means above their deviations "
        text += f"(m/v = {worst.ratio_after:.2g} at {worst['name']!r}), and the decay goes on: "
        warnings.warn(f"{text}give them a bias, set them again", stacklevel=2)
    if (growth := table.attrs.pop("growth")) > GRADIENTS:
        text = (
            f"squared gradients now grow {growth:.0e} times backwards through layers of one size "
        )
        text += "(π/(π-1) = 1.467 per ReLU layer, as with BatchNorm): skip connections or "
        warnings.warn(f"{text}sv.init.total_ avoid it", stacklevel=2)
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
) -> pd.DataFrame:
    """Replace every layer's y by (y - shift) / scale, ``shift, scale = parts(decomposition)``."""
    _check.choice("gradients", gradients, (True, False))
    weighted_layers(model)
    if isinstance(batches, list) and len(batches) > 1:
        got = f"a list of {len(batches)}"
        raise ValueError(f"batches must be one calibration batch, got {got}: join them")
    with same_generators(model):  # a loader draws its order, and augments
        batch = next(read_batches(model, batches, reading), None)
    if batch is None or batch.samples < 2:
        got = 0 if batch is None else batch.samples
        raise ValueError(f"batches must hold at least 2 inputs, got {got}")
    places = Places.find(model, batch, watched(model))
    parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    before = _measured(model, batch, places)
    squares = (
        squared_gradients(model, batch, stream(0, "direction"), every=True)[0] if gradients else {}
    )
    try:
        setter = _set(model, batch, parts, places)
        after = _measured(model, batch, places)
    except BaseException:
        with torch.no_grad():
            for parameter, value in parameters:
                parameter.copy_(value)
        torch.clear_autocast_cache()
        raise
    setter.verify(after)
    setter.warn(_beyond(model))
    names = before.name.map(lambda name: setter.done.get(name, "not called when layers were set"))
    before.insert(2, "done", names)
    if gradients or parts is _sample:
        then, shapes = squared_gradients(model, batch, stream(0, "direction"), every=True)
        before.attrs["growth"] = growth_between(list(then.values()), list(shapes.values()))
    if gradients:
        for frame, found in ((before, squares), (after, then)):
            relative = frame.name.map(found) / next(reversed(found.values()), math.nan)
            frame["gradient2"] = relative
    columns = ["m2", "v2", "ratio", *["gradient2"] * gradients]
    table = before[["name", "type", "done", *columns]].merge(
        after[["name", *columns]], "left", "name", suffixes=("_before", "_after")
    )
    table.attrs = before.attrs
    return table


def _set(model: nn.Module, batch: Batch, parts: Parts, places: Places | None) -> _Setter:
    """Set all layers in one pass; once more with gradients if the model differentiates."""
    for enabled in (False, True):
        with structural_copy(model, writable=True) as copied, torch.set_grad_enabled(enabled):
            setter = _Setter(copied, parts, batch.mask)
            read = batch.copied(copied)
            running = Pass(copied, Rows(None, "samples"), batch.samples, batch.mask, places)
            try:
                watch = Watch(copied, setter.on_output(running), setter.layers)
                setter.watch = watch
                with watch.watching():
                    read.run(copied)
            except RuntimeError as error:
                if enabled or setter.done or "grad" not in str(error):
                    raise
                continue
        break
    setter.finish()
    return setter


class _Setter:
    """Sets layers at their first call; ``done`` says of each call what was done."""

    watch: Watch

    def __init__(self, model: nn.Module, parts: Parts, mask: torch.Tensor | None) -> None:
        self.layers = weighted_layers(model)
        self._left, self._parts, self._mask = _left(model, self.layers), parts, mask
        self._calls: Counter[str] = Counter()
        self._set_as: dict[int, str] = {}  # storage of what was set, and the layer
        self._unset: dict[str, list[str]] = {}  # reasons that a warning names, and layers
        self.done: dict[str, str] = {}
        for name, layer in self.layers.items():
            if carrier(layer) is None and name not in self._left:
                self._left[name] = self._leave(name, f"weight made by {maker(layer)}")

    def finish(self) -> None:
        """Note layers that were not called; raise if none was set."""
        for name in self.layers:
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

    def verify(self, after: pd.DataFrame) -> None:
        """Note the layers whose statistics, in another pass, are not those that were set."""
        set_ = [_SET] if self._parts is _layer else [_SET, _SET_WITHOUT_BIAS]
        mine = after[after.name.map(self.done).isin(set_)]
        found = mine.v2 if self._parts is _sample else mine.sigma2
        for name, value in zip(mine.name, found, strict=True):
            if not abs(value - 1) < _TOLERANCE:
                kind = "sample variance" if self._parts is _sample else "mean square"
                self._leave(name, f"set, but {kind} {value:.3g} in another pass")

    def on_output(self, running: Pass) -> Callable[[Output], torch.Tensor | None]:
        """What to do with an output of a layer."""

        def set_(made: Output) -> torch.Tensor | None:
            layer, name, y = made.module, str(made.key[0]), made.y
            assert layer is not None
            if not y.is_floating_point() or made.key[1] == self._calls[name]:
                return None
            self._calls[name] += 1
            row, bias = row_name(name, self._calls[name]), layer._parameters.get("bias")
            held: list[torch.Tensor] = [x for x in (carrier(layer), bias) if x is not None]
            shared = [self._set_as[at] for part in held if (at := storage(part)) in self._set_as]
            if name in self._left or shared:
                self.done[row] = self._left.get(name) or f"left, set as {shared[0]!r}"
                return None
            try:
                apart, dims = running.apart(made, name)
                counted_y, mask = counted(apart, dims, self._mask)
            except MergedInputsError as error:
                masked = isinstance(error, MaskError)
                reason = "other positions than the mask" if masked else "inputs not apart"
                self.done[row] = self._leave(name, reason)
                return None
            new = self._set(row, made, decompose(counted_y, *dims, mask=mask), held)
            if new is not None:
                self._set_as.update({storage(part): name for part in held})
            return new

        return set_

    def _set(
        self, row: str, made: Output, found: Decomposition, held: list[torch.Tensor]
    ) -> torch.Tensor | None:
        """Set one layer and return what its output is then; ``None`` if it is left."""
        layer: Any = made.module
        name, y = str(made.key[0]), made.y
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
            return None
        if scale.ndim and not by_unit(layer, len(scale)):
            self.done[row] = self._leave(name, "one scale for several units")
            return None
        bias = layer._parameters.get("bias")
        done = _SET if bias is not None or self._parts is _total else _SET_WITHOUT_BIAS
        places = [int(place) for place in still.nonzero()[:, 0]] if still.ndim else []
        if places:
            done = f"set but for {len(places)} units without variation"
            scale, shift = torch.where(still, 1, scale), torch.where(still, 0, shift)
        shift = torch.zeros_like(shift) if bias is None else shift
        kept = [part.detach().clone() for part in held]
        unit = unit_dimension(name, layer, y)
        assert unit is not None
        expected = (y.detach() - along(shift, unit, y.ndim)) / along(scale, unit, y.ndim)
        try:
            with torch.no_grad():
                divide_(layer, scale)
                if bias is not None:
                    bias.copy_((bias - like(shift, bias)) / like(scale, bias))
            torch.clear_autocast_cache()  # which holds the weights of before
            self.watch.paused = True
            again = first_floating(layer(*made.call[0], **made.call[1]))
            off = again is None or not _close(again.detach(), expected)
            reason = "its weight is not used as it is and alike every time"
        except (RuntimeError, NotImplementedError) as error:
            off, again, reason = True, None, str(error).splitlines()[0]
        finally:
            self.watch.paused = False
        if off:
            with torch.no_grad():
                for part, value in zip(held, kept, strict=True):
                    part.copy_(value)
            self.done[row] = self._leave(name, reason)
            return None
        if places:
            self._leave(f"{name} units {some(map(str, places))}", "no variation over inputs")
        self.done[row] = done
        return again


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    size = expected.double().square().mean().sqrt()
    off = (found.double() - expected.double()).square().mean().sqrt()
    return bool(off <= _TOLERANCE * size)


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


def _measured(model: nn.Module, batch: Batch, places: Places | None) -> pd.DataFrame:
    found = measure(model, [batch], None, "samples", places=places).rows.frame()
    columns = ["name", "type", "m2", "v2", "sigma2", "ratio"]
    return found if len(found) else pd.DataFrame(columns=columns)
