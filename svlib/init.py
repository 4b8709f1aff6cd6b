r"""Data-dependent initialization in execution order: preserve the total variance, or the sample variance.

*Total init* divides a layer's weights by one scalar, so that the mean square of its preactivations over inputs and
units is 1 (LSUV, Mishkin & Matas 2016, is of this kind). *Sample init* divides the weights of each unit by the
sample deviation of its preactivation and sets its bias so that the sample mean is 0 (Salimans & Kingma 2016;
Krähenbühl et al. 2016). Luther & Seung, arXiv:1902.04942, compare the two.

Sample init keeps v^2 at 1 and pays in gradients: squared, they grow backwards by :math:`\pi/(\pi-1)=1.467` per ReLU
layer, as with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from svlib.moments import Decomposition, decompose
from svlib.probing import Layer, as_batches, dimensions, observed, probe, weighted_layers

Transform = Callable[[str, Layer, Decomposition], tuple[torch.Tensor, torch.Tensor]]


def total_(model: nn.Module, batches: Any) -> pd.DataFrame:
    """Rescale every weighted layer, in place, to mean square 1 over inputs and units.

    Weights and bias are divided by one scalar per layer; the last layer is included. Batches are joined to
    one calibration batch, and one pass sets all layers, each seeing those before it already set.

    Args:
        model: Any module whose weighted layers are each called once.
        batches: Calibration inputs, as :func:`svlib.probe` takes them.

    Returns:
        One row per layer: ``name``, ``type`` and m2, v2, ratio before and after.

    Raises:
        TypeError: If ``model`` is not a module or ``batches`` holds no tensors.
        ValueError: If a layer's output is 0, it is not called exactly once, shares its weight or computes it from
            other parameters, or if there are fewer than two inputs. The model is then as it was.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = total_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print((table.m2_after + table.v2_after).round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """

    def transform(name: str, layer: Layer, found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(()), torch.as_tensor(found.sigma2).sqrt()

    return _initialize(model, batches, transform)


def sample_(model: nn.Module, batches: Any) -> pd.DataFrame:
    """Give every unit of every weighted layer, in place, sample mean 0 and sample variance 1.

    Batches are joined to one calibration batch, and one pass sets all layers, each seeing those before it
    already set. The last layer is included. Squared gradients then grow backwards by 1.467 per ReLU layer.

    Args:
        model: Any module whose weighted layers are each called once and have a bias.
        batches: Calibration inputs, as :func:`svlib.probe` takes them.

    Returns:
        One row per layer: ``name``, ``type`` and m2, v2, ratio before and after.

    Raises:
        TypeError: If ``model`` is not a module or ``batches`` holds no tensors.
        ValueError: If a unit has no variance, a layer has no bias, is not called exactly once, shares its weight or
            computes it from other parameters, is a grouped transposed convolution, or if there are fewer than two
            inputs. The model is then as it was.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
        >>> table = sample_(model, sv.data.gaussian(200, 64, seed=1))
        >>> print(table.v2_after.round(4).tolist())
        [1.0, 1.0, 1.0, 1.0]
    """

    def transform(name: str, layer: Layer, found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
        if layer.bias is None:
            raise ValueError(f"layer {name!r} must have a bias: sample_ sets its sample mean to 0 by it")
        if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
            raise ValueError(f"layer {name!r} must have groups=1 as a transposed convolution, got {layer.groups}")
        return torch.from_numpy(found.mean), torch.from_numpy(found.variance).sqrt()

    return _initialize(model, batches, transform)


def _initialize(model: nn.Module, batches: Any, transform: Transform) -> pd.DataFrame:
    """Replace every layer's y by (y - shift) / scale, with ``shift, scale = transform(name, layer, decomposition)``."""
    layers = weighted_layers(model)
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    if computed := [name for name, weight in weights.items() if weight is None]:
        raise ValueError(f"layer {computed[0]!r} must hold its weight as a parameter, it computes it from others")
    if len({id(weight) for weight in weights.values()}) < len(layers):
        raise ValueError("model must not share weights between layers: rescaling one would change the other")
    with torch.random.fork_rng([]):  # a shuffled loader draws its order
        calibration = list(as_batches(model, batches))
    inputs = sum(map(len, calibration))
    if inputs < 2:
        raise ValueError(f"batches must hold at least 2 inputs, got {inputs}")
    x = torch.cat(calibration)
    before = probe(model, x)
    parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    seen: set[str] = set()

    def on_output(name: str, layer: Layer, y: torch.Tensor) -> torch.Tensor:
        if name in seen:
            raise ValueError(f"layer {name!r} must be called once, got a second call")
        seen.add(name)
        sample, unit, positions = dimensions(name, layer, y, inputs)
        shift, scale = (part.to(y) for part in transform(name, layer, decompose(y, sample, unit, positions)))
        if bad := int((~((scale > 0) & scale.isfinite())).sum()):
            raise ValueError(
                f"layer {name!r} must have positive, finite scales to divide by, got {bad} of {scale.numel()} not so"
            )
        weight_unit = 1 if isinstance(layer, _ConvTransposeNd) else 0
        layer.weight /= _along(scale, weight_unit, layer.weight.ndim)
        if layer.bias is not None:
            layer.bias.copy_((layer.bias - shift) / scale)
        return (y - _along(shift, unit, y.ndim)) / _along(scale, unit, y.ndim)

    try:
        with observed(model, on_output):
            model(x)
        if missed := layers.keys() - seen:
            raise ValueError(f"layer {min(missed)!r} must be called in the model's forward pass, got no call")
        after = probe(model, x)
    except BaseException:
        with torch.no_grad():
            for parameter, value in parameters:
                parameter.copy_(value)
        raise
    columns = ["m2", "v2", "ratio"]
    return before[["name", "type", *columns]].merge(after[["name", *columns]], on="name", suffixes=("_before", "_after"))


def _along(values: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    """Values per unit, or one for all, shaped to broadcast along ``dim`` of an array of ``ndim`` dimensions."""
    return values if values.ndim == 0 else values.reshape([-1 if d == dim else 1 for d in range(ndim)])
