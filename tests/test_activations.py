"""Any activation: averages, trajectories and the edge of chaos against 40 digits and sampling."""

import math
from collections.abc import Callable
from functools import cache

import mpmath
import numpy as np
import pytest
import torch

from svlib.theory import edge_of_chaos, maps, trajectory
from svlib.theory.activations import NAMES, named

mp = mpmath.mp.clone()
mp.dps = 40
F = torch.nn.functional
TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda u: u.clamp(min=0),  # of slope 0
    "linear": lambda u: u,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "mish": F.mish,
    "sine": torch.sin,
    "elu": F.elu,
    "selu": F.selu,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
}
ANALYTIC = {
    "tanh": mp.tanh,
    "erf": mp.erf,
    "sigmoid": lambda u: 1 / (1 + mp.exp(-u)),
    "gelu": lambda u: u * mp.ncdf(u),
    "gelu_tanh": lambda u: u / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (u + mp.mpf("0.044715") * u**3))),
    "silu": lambda u: u / (1 + mp.exp(-u)),
    "softplus": lambda u: mp.log1p(mp.exp(u)),
    "mish": lambda u: u * mp.tanh(mp.log1p(mp.exp(u))),
    "sine": mp.sin,
}
BENT = ("elu", "selu", "hardtanh", "relu6")


@cache
def hermite(name: str, count: int = 400) -> list[mpmath.mpf]:
    """Squared coefficients of the activation in normalized Hermite polynomials: C(rho) is their
    power series. By the trapezoidal rule, which converges exponentially."""
    step = mp.mpf("0.02")
    nodes = [step * k for k in range(-700, 701)]
    values = [ANALYTIC[name](u) * mp.exp(-(u**2) / 2) * step / mp.sqrt(2 * mp.pi) for u in nodes]
    before, here = [mp.mpf(0)] * len(nodes), [mp.mpf(1)] * len(nodes)
    found = []
    for k in range(count):
        found.append(sum(v * h for v, h in zip(values, here, strict=True)) ** 2)
        root, less = mp.sqrt(k + 1), mp.sqrt(k)
        here, before = (
            [(u * h - less * b) / root for u, h, b in zip(nodes, here, before, strict=True)],
            here,
        )
    return found
