r"""Great depth: the exact course of ReLU's decay, scaling with depth, the tangent kernel."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from svlib import _check
from svlib.theory import maps
from svlib.theory.activations import lost
from svlib.theory.depth import trajectory

Array = NDArray[np.float64]

_RATE = math.sqrt(2) / (3 * math.pi)


def intercept(depth: int = 200_000) -> float:
    r"""The constant C of :math:`\frac1{v_l}=\frac{\sqrt2}{3\pi}\big(l+\frac32\ln l+C\big)`, 4.390.

    White inputs; what is left at layer l is of order :math:`\ln l/l`.

    Args:
        depth: The layer at which it is read off, at least 100.

    Examples:
        >>> print(f"{intercept():.2f} in the limit, {intercept(100):.2f} at layer 100")
        4.39 in the limit, 4.52 at layer 100
    """
    depth = _check.integer("depth", depth, 100)
    v = trajectory(depth).v[depth]
    return float(1 / v / _RATE - depth - 1.5 * math.log(depth))


def shaped(time: float, rho0: float = 0.0) -> float:
    r"""v^2/sigma^2 at the end of a very deep network whose bends are scaled down with its depth L.

    :math:`\frac{d\epsilon}{dt}=-\frac{\sin\theta-\theta\cos\theta}\pi`,
    :math:`\cos\theta=1-\epsilon`, up to t = c^2/2 for leaky ReLU of slope :math:`1-c/\sqrt L`, and
    to t = b for residual branches with :math:`\beta=b/L` (Li, Nica & Roy 2022, arXiv:2206.02768).

    Args:
        time: t, at least 0.
        rho0: m^2/sigma^2 at layer 0, in [-1, 1].

    Examples:
        >>> print(f"{shaped(0.5):.3f}")  # of slope 1 - 1/sqrt(L); plain ReLU has 0.0036 at L = 100
        0.859
    """
    time = _check.real("time", time, 0)
    start = 1 - _check.real("rho0", rho0, -1, 1)
    if time == 0:
        return start
    found = solve_ivp(lambda t, e: [-lost(float(e[0]))], (0, time), [start], rtol=1e-11, atol=1e-13)
    return float(found.y[0, -1])


def tangent_kernel(depth: int, rho0: float = 0.0) -> Array:
    r"""The neural tangent kernel of two inputs over that of one, by layer, (depth + 1,).

    :math:`\Theta_{l+1}=\rho_{l+1}+f'(\rho_l)\,\Theta_l`, :math:`\Theta_0=\rho_0`, for ReLU at
    He's rule (Jacot et al. 2018). It tends to 1/4 while correlations tend to 1: the kernel's
    condition number stays bounded, though v^2 dies.

    Args:
        depth: Number of weight matrices after layer 0.
        rho0: m^2/sigma^2 at layer 0.

    Examples:
        >>> print(f"{tangent_kernel(50)[50]:.4f} {tangent_kernel(5000)[5000]:.4f}")
        0.2867 0.2508
    """
    rho = trajectory(depth, rho0=rho0).rho
    found = np.empty(depth + 1)
    found[0] = rho[0]
    for layer in range(depth):
        found[layer + 1] = rho[layer + 1] + maps.correlation_slope(rho[layer]) * found[layer]
    return found / np.arange(1, depth + 2)
