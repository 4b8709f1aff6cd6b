r"""Data-dependent initialization in execution order: preserve the total variance, or the sample variance.

*Total init* divides a layer's weights by one scalar, so that the mean square of its preactivations
over inputs and units is 1 (LSUV, Mishkin & Matas 2016, is of this kind). *Sample init* divides the
weights of each unit by the sample deviation of its preactivation and sets its bias so that the
sample mean is 0 (Salimans & Kingma 2016; Krähenbühl et al. 2016). Luther & Seung, arXiv:1902.04942,
compare the two.

Sample init keeps v^2 at 1 and pays in gradients: squared, they grow backwards by
:math:`\pi/(\pi-1)=1.467` per ReLU layer, as with BatchNorm.

What is set: the linear and convolutional layers (transposed, grouped ones and ``transformers``'
``Conv1D`` too), each at its first call. What is left as it is, and said so in the column ``done``:
a layer whose weight or bias is frozen (``requires_grad`` is False), or whose weight was set
already, in an earlier call or as that of another layer, or also belongs to something else, an
embedding for example. A layer without a bias has its deviation set; its sample mean stays.

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
from svlib.probing.calls import Call, tensors
from svlib.probing.explanation import GRADIENTS, gradient_growth, has_batchnorm
from svlib.probing.probe import (
    Batch,
    as_batches,
    dimensions,
    hooked,
    is_transposed,
    mapped,
    named_modules,
    probe,
    probe_gradients,
    row_name,
    same_generators,
    untouched,
    weighted_layers,
)

_TOLERANCE = 0.05  # of a model in bfloat16, too
_SET, _SET_WITHOUT_BIAS = "set", "deviation set; no bias, mean left"
# Weights that their modules do not use through linear or convolutional layers of their own
_BEYOND = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)

Parts = Callable[[Decomposition], tuple[torch.Tensor, torch.Tensor]]


def total_(
    model: nn.Module, batches: Any, *, centred: bool = False, gradients: bool = False
) -> pd.DataFrame:
    """Rescale every weighted layer, in place, to mean square 1 over inputs and units.

    Weights and bias are divided by one scalar per layer; the last layer is included. With
    ``centred``, the mean over inputs and units is taken from the biases first. Batches are joined
    to one calibration batch, and one pass sets all layers, each seeing those before it already set.
    See :mod:`svlib.probing.init` for what is set and what is left.

    Args:
        model: Any module with weighted layers.
        batches: Calibration inputs, as :func:`svlib.probe` takes them.
        centred: Subtract one mean per layer, too: another reading of what the paper compares sample
            init with.
        gradients: Measure squared gradients as well, by a backward pass before and one after.

    Returns:
        One row per call of a layer: ``name``, ``type``, ``done``, and m2, v2, ratio (on request
        gradient2, relative to the last row) before and after.

    Raises:
        TypeError: If ``model`` is not a module or ``batches`` is not as :func:`svlib.probe` takes
            it.
        ValueError: If a layer's output is 0 or merges inputs with their positions, or a layer is
            not called though not frozen, or computes with its weight before it uses it; if a module
            holds weights that are beyond this (attention, recurrent and bilinear layers of torch)
            and not frozen; or if there are fewer than two inputs. The model is then as it was.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = total_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print((table.m2_after + table.v2_after).round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """
    _check.choice("centred", centred, (True, False))
    return _initialize(model, batches, _layer if centred else _total, gradients)[0]


def sample_(model: nn.Module, batches: Any, *, gradients: bool = False) -> pd.DataFrame:
    """Give every unit of every weighted layer, in place, sample mean 0 and sample variance 1.

    Batches are joined to one calibration batch, and one pass sets all layers, each seeing those
    before it already set. The last layer is included. Squared gradients then grow backwards by
    1.467 per ReLU layer. See :mod:`svlib.probing.init` for what is set and what is left.

    Args:
        model: Any module with weighted layers.
        batches: Calibration inputs, as :func:`svlib.probe` takes them.
        gradients: Measure squared gradients as well, by a backward pass before and one after.

    Returns:
        One row per call of a layer: ``name``, ``type``, ``done``, and m2, v2, ratio (on request
        gradient2, relative to the last row) before and after.

    Raises:
        TypeError: If ``model`` is not a module or ``batches`` is not as :func:`svlib.probe` takes
            it.
        ValueError: If a unit has no variance, or for the reasons of :func:`total_`. The model is
            then as it was.

    Warns:
        UserWarning: If layers without a bias keep sample means above their deviations; or if
            squared gradients are to grow more than ``svlib.probing.explanation.GRADIENTS`` times
            through ReLU layers, along the way from input to output where least.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = sample_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print(table.v2_after.round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """
    table, calls = _initialize(model, batches, _sample, gradients)
    means_left = table[(table.done == _SET_WITHOUT_BIAS) & (table.ratio_after > 1)]
    if len(means_left) and not has_batchnorm(calls):
        worst = means_left.sort_values("ratio_after").iloc[-1]
        kept = f"{len(means_left)} layers without a bias keep sample means above their deviations"
        where = f"m/v = {worst.ratio_after:.2g} at {worst['name']!r}"
        warnings.warn(
            f"{kept} ({where}), and the decay goes on: give them a bias, set them again",
            stacklevel=2,
        )
    if (growth := gradient_growth(calls)) > GRADIENTS:
        grown = f"squared gradients grow some {growth:.0e} times from the model's output to its first layer"
        warnings.warn(
            f"with sample init {grown} (π/(π-1) = 1.467 per ReLU layer, as with BatchNorm): expect to need small learning "
            "rates, residual connections or total init",
            stacklevel=2,
        )
    return table


def _total(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(()), torch.as_tensor(found.sigma2).sqrt()


def _layer(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.as_tensor(found.mean.mean())
    return mean, (torch.as_tensor(found.sigma2) - mean.square()).sqrt()


def _sample(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(found.mean), torch.from_numpy(found.variance).sqrt()


def _initialize(
    model: nn.Module, batches: Any, parts: Parts, gradients: bool
) -> tuple[pd.DataFrame, list[Call]]:
    """Replace every layer's y by (y - shift) / scale, ``shift, scale = parts(decomposition)``. The table and the calls."""
    _check.choice("gradients", gradients, (True, False))
    layers = weighted_layers(model)
    left = _left(model, layers)
    with same_generators(model):  # a loader draws its order, and augments
        batch = _joined(as_batches(model, batches))
    parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    before = _measured(model, batch, gradients)
    calls: Counter[str] = Counter()
    done: dict[str, str] = {}
    set_as: dict[int, str] = {}  # storage of what was set, and the layer

    def on_output(name: str, layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
        weight, bias = (layer._parameters.get(part) for part in ("weight", "bias"))
        assert weight is not None
        calls[name] += 1
        row = row_name(name, calls[name])
        storages = [
            part.untyped_storage().data_ptr() for part in (weight, bias) if part is not None
        ]
        shared = [set_as[storage] for storage in storages if storage in set_as]
        if name in left or shared:
            done[row] = left.get(name) or f"left, set as {shared[0]!r}"
            return y
        sample, unit, positions = dimensions(name, layer, y, batch.inputs)
        shift, scale = (part.to(y) for part in parts(decompose(y, sample, unit, positions)))
        if bad := int((~((scale > 0) & scale.isfinite())).sum()):
            raise ValueError(
                f"layer {name!r} must have positive, finite scales to divide by, got {bad} of {scale.numel()} not so"
            )
        done[row] = _SET if bias is not None or parts is _total else _SET_WITHOUT_BIAS
        set_as.update(dict.fromkeys(storages, name))
        _divide_(layer, scale)
        if bias is None:
            shift = torch.zeros_like(shift)
        else:
            bias.copy_((bias - shift) / scale)
        torch.clear_autocast_cache()  # which holds the weights of before
        return (y - _along(shift, unit, y.ndim)) / _along(scale, unit, y.ndim)

    try:
        with untouched(model), hooked(layers, on_output):
            model(*mapped(torch.clone, batch.args), **mapped(torch.clone, batch.kwargs))
        if missed := [name for name in layers if not calls[name] and name not in left]:
            raise ValueError(
                f"layer {missed[0]!r} must be called in the model's forward pass or be frozen, got no call"
            )
        after = _measured(model, batch, gradients)
        after["done"] = after.name.map(done)
        if list(before.name) != list(after.name) or after.done.isna().any():
            raise ValueError(
                "model must call the same layers every time, got other calls in another pass"
            )
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
    return table, after.attrs["calls"]


def _verify(after: pd.DataFrame, parts: Parts) -> None:
    """Refuse what came out otherwise than it was set, as where a module computes with its weight before it uses it."""
    mine = after[after.done.isin([_SET, _SET_WITHOUT_BIAS])]
    if parts is _layer:
        mine = mine[mine.done == _SET]
    found = mine.v2 if parts is _sample else mine.sigma2
    off = mine[~((found - 1).abs() < _TOLERANCE)]
    if len(off):
        got = f"{'sample variance' if parts is _sample else 'mean square'} {found[off.index[0]]:.3g} where 1 was set"
        raise ValueError(
            f"layer {off.name.iloc[0]!r} must use its weight as it is and alike every time, got {got}"
        )


def _left(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that are not to be set, and why; refuses what cannot be."""
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        free = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, _BEYOND) and free:
            kind = type(module).__name__
            raise ValueError(
                f"module {name!r}, a {kind}, must be frozen for this call (requires_grad False): its weights cannot be set"
            )
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    left = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"layer {name!r} must hold its weight as a parameter, it computes it from others"
            )
        others = [owner for owner in owners[id(weight)] if owner not in layers]
        if others:
            left[name] = f"left, tied to {others[0]}"
        elif not all(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            left[name] = "left, frozen"
    return left


def _joined(batches: Any) -> Batch:
    """Batches as one, which everything but tensors must be alike in."""
    listed = list(batches)
    if (inputs := sum(batch.inputs for batch in listed)) < 2:
        raise ValueError(f"batches must hold at least 2 inputs, got {inputs}")
    found = [list(tensors((batch.args, batch.kwargs))) for batch in listed]
    names = [[name for name, _ in pairs] for pairs in found]
    if any(other != names[0] for other in names):
        raise ValueError(
            f"batches must hold the same tensors, got {names[0]} and {next(x for x in names if x != names[0])}"
        )
    columns = zip(*([x for _, x in pairs] for pairs in found), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    args, kwargs = mapped(lambda _: next(joined), (listed[0].args, listed[0].kwargs))
    return Batch(args, kwargs, inputs)


def _measured(model: nn.Module, batch: Batch, gradients: bool) -> pd.DataFrame:
    given = batch.kwargs or batch.args
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".* have no row"
        )  # _initialize has a say about them
        table = probe(model, [given])
    if gradients:
        table["gradient2"] = probe_gradients(model, given, seed=0).gradient2
    return table


def _divide_(layer: nn.Module, scale: torch.Tensor) -> None:
    """Divide a layer's weights by one scale per unit, or by one for all."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if scale.ndim == 0 or is_transposed(layer):
        weight /= scale
    elif isinstance(
        layer, _ConvTransposeNd
    ):  # (in, out / groups, kernel...): unit u belongs to group u // (out / groups)
        by_group = weight.view(layer.groups, -1, *weight.shape[1:])
        by_group /= scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
    else:
        weight /= _along(scale, 0, weight.ndim)


def _along(values: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    """Values per unit, or one for all, shaped to broadcast along ``dim`` of an array of ``ndim`` dimensions."""
    return (
        values if values.ndim == 0 else values.reshape([-1 if d == dim else 1 for d in range(ndim)])
    )
