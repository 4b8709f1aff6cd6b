"""The parameter that carries the scale of a layer's weights, and how it is divided.

That is the weight itself or, under weight normalization (Salimans & Kingma 2016, in both of torch's
forms), its length g. Other parametrizations (spectral, orthogonal) fix the scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm

from svlib.probing.models import is_transposed


def carrier(layer: nn.Module) -> nn.Parameter | None:
    """The parameter to divide, ``None`` if the weight is made otherwise."""
    held = layer._parameters
    if (weight := held.get("weight")) is not None:
        return weight
    if "weight_v" in held:  # torch.nn.utils.weight_norm
        return held["weight_g"]
    made = _parametrizations(layer)
    if len(made) == 1 and isinstance(made[0], _WeightNorm):
        length = getattr(made, "original0", None)
        return length if isinstance(length, nn.Parameter) else None
    return None


def maker(layer: nn.Module) -> str:
    """Of a layer without a carrier, a name of what makes its weight."""
    names = [type(x).__name__.strip("_") for x in _parametrizations(layer)]
    return " and ".join(names) or "other parameters"


def by_unit(layer: nn.Module, units: int) -> bool:
    """Whether the carrier has a scale for each unit."""
    weight = carrier(layer)
    if weight is None or weight is layer._parameters.get("weight"):
        return weight is not None
    grouped = isinstance(layer, _ConvTransposeNd) and layer.groups > 1
    return not grouped and weight.ndim > 0 and weight.shape[_unit_dim(layer)] == units


def divide_(layer: nn.Module, scale: torch.Tensor) -> None:
    """Divide a layer's weights by one scale per unit, or by one for all (0-d)."""
    weight: torch.Tensor | None = carrier(layer)
    assert weight is not None
    if scale.ndim == 0 or is_transposed(layer):
        weight /= like(scale, weight)
    elif isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
        # (in, out / groups, kernel...): unit u belongs to group u // (out / groups)
        by_group = weight.view(layer.groups, -1, *weight.shape[1:])
        by_group /= scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
    else:
        weight /= like(along(scale, _unit_dim(layer), weight.ndim), weight)


def like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The values as they can be combined with a parameter: spread over devices, if that is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(parameter.dtype), mesh)


def along(values: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    """Values per unit, or one for all, shaped to broadcast along ``dim`` of ``ndim`` dimensions."""
    if values.ndim == 0:
        return values
    return values.reshape([-1 if d == dim else 1 for d in range(ndim)])


def _parametrizations(layer: nn.Module) -> Any:
    return getattr(getattr(layer, "parametrizations", None), "weight", ())


def _unit_dim(layer: nn.Module) -> int:
    return int(isinstance(layer, _ConvTransposeNd))
