r"""What a layer does to its preactivations before the weights: normalization and activation."""

from __future__ import annotations

import math

import torch

from svlib import _activations
from svlib._activations import HOMOGENEOUS as HOMOGENEOUS

ACTIVATIONS = {name: function for name, (function, _) in _activations.ACTIVATIONS.items()}


def activated(y: torch.Tensor, activation: str, negative_slope: float = 0.0) -> torch.Tensor:
    """The activation of preactivations of any shape."""
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(y, negative_slope)
    return ACTIVATIONS[activation](y)


def second_moment(activation: str, negative_slope: float = 0.0) -> float:
    """<phi(z)^2> for a standard Gaussian z, which He's rule divides by.

    Examples:
        >>> second_moment("relu"), round(second_moment("tanh"), 10)
        (0.5, 0.3942944904)
    """
    if activation in HOMOGENEOUS:
        slope = 1.0 if activation == "linear" else negative_slope
        return (1 + slope**2) / 2
    z = torch.arange(-10_000, 10_001, dtype=torch.float64) * 1e-3  # a point at every kink
    density = torch.exp(-(z**2) / 2) * 1e-3 / math.sqrt(2 * math.pi)
    return float(activated(z, activation) ** 2 @ density)


def normalized(y: torch.Tensor, kind: str | None) -> torch.Tensor:
    """BatchNorm over inputs, LayerNorm or RMSNorm over units, without affine part and epsilon.

    A difference that is no more than rounding becomes 0.
    """
    if kind is None:
        return y
    if kind == "rms":
        peak = y.abs().amax(2, keepdim=True)
        within = y / torch.where(peak > 0, peak, 1)
        length = within.square().mean(2, keepdim=True).sqrt()
        return within / torch.where(length > 0, length, 1)
    dim = 1 if kind == "batch" else 2
    centred = y - y.mean(dim, keepdim=True)
    peak = centred.abs().amax(dim, keepdim=True)
    centred = centred / peak  # its square cannot overflow
    rounding = 16 * torch.finfo(y.dtype).eps * y.abs().amax(dim, keepdim=True)
    deviation = centred.square().mean(dim, keepdim=True).sqrt()
    return torch.where(peak > rounding, centred / deviation, 0)
