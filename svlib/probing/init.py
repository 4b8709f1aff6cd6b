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
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from svlib import _check
from svlib._random import stream
from svlib.probing.batches import Batch, Caller, Masker, Reading
from svlib.probing.forward import Pass, watched
from svlib.probing.models import (
    named_modules,
    same_generators,
    structural_copy,
    weighted_layers,
)
from svlib.probing.passes import Watch
from svlib.probing.places import Places, read_batches
from svlib.probing.probe import growth_between, measure, squared_gradients
from svlib.probing.rows import Rows
from svlib.probing.setter import (
    SET_WITHOUT_BIAS,
    Parts,
    Setter,
    layer_parts,
    sample_parts,
    total_parts,
    unlike,
)

GRADIENTS = 100.0
"""Growth of squared gradients, from output to input, that sample init warns of: a dozen ReLU
layers. Chapter 6 has training runs of more."""


# Modules whose weights are not used through linear or convolutional layers of their own
_BEYOND = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


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
    parts, reading = layer_parts if centred else total_parts, Reading(inputs, call, mask)
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
    reading = Reading(inputs, call, mask)
    table, growth = _initialize(model, batches, sample_parts, gradients, reading)
    means_left = table[(table.done == SET_WITHOUT_BIAS) & (table.ratio_after > 1)]
    normalizes = any(isinstance(x, _BatchNorm) and x.training for x in model.modules())
    if len(means_left) and not normalizes:
        worst = means_left.sort_values("ratio_after").iloc[-1]
        text = f"{len(means_left)} layers without a bias keep sample means above their deviations "
        text += f"(m/v = {worst.ratio_after:.2g} at {worst['name']!r}), and the decay goes on: "
        warnings.warn(f"{text}give them a bias, set them again", stacklevel=2)
    if growth > GRADIENTS:
        text = (
            f"squared gradients now grow {growth:.0e} times backwards through layers of one size "
        )
        text += "(π/(π-1) = 1.467 per ReLU layer, as with BatchNorm): skip connections or "
        warnings.warn(f"{text}sv.init.total_ avoid it", stacklevel=2)
    return table


def _initialize(
    model: nn.Module, batches: Any, parts: Parts, gradients: bool, reading: Reading
) -> tuple[pd.DataFrame, float]:
    """Replace every layer's y by (y - shift) / scale, ``shift, scale = parts(decomposition)``;
    the table, and the growth of squared gradients after it."""
    _check.choice("gradients", gradients, (True, False))
    weighted_layers(model)
    if isinstance(batches, list) and len(batches) > 1:
        got = f"a list of {len(batches)}"
        raise ValueError(f"batches must be one calibration batch, got {got}: join them")
    with same_generators(model):  # a loader draws its order, and augments
        batch = next(read_batches(model, batches, reading), None)
    if batch is None or batch.samples < 2:
        count = 0 if batch is None else batch.samples
        raise ValueError(f"batches must hold at least 2 inputs, got {count}")
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
    for name, reason in unlike(after, setter.done, parts).items():
        setter.leave(name, reason)
    setter.warn(_beyond(model))
    names = before.name.map(lambda name: setter.done.get(name, "not called when layers were set"))
    before.insert(2, "done", names)
    growth = 1.0
    if gradients or parts is sample_parts:
        then, shapes = squared_gradients(model, batch, stream(0, "direction"), every=True)
        growth = growth_between(list(then.values()), list(shapes.values()))
    if gradients:
        for frame, found in ((before, squares), (after, then)):
            relative = frame.name.map(found) / next(reversed(found.values()), math.nan)
            frame["gradient2"] = relative
    columns = ["m2", "v2", "ratio", *["gradient2"] * gradients]
    table = before[["name", "type", "done", *columns]].merge(
        after[["name", *columns]], "left", "name", suffixes=("_before", "_after")
    )
    return table, growth


def _set(model: nn.Module, batch: Batch, parts: Parts, places: Places | None) -> Setter:
    """Set all layers in one pass; once more with gradients if the model differentiates."""
    for enabled in (False, True):
        with structural_copy(model, writable=True) as copied, torch.set_grad_enabled(enabled):
            setter = Setter(copied, parts, batch.mask)
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
