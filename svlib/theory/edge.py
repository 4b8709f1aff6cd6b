r"""The edge of chaos: weights and biases at which neither v^2 nor gradients change by a factor.

At a fixed point :math:`q^*` of :math:`q'=\sigma_w^2\langle\phi^2\rangle+\sigma_b^2`, the
correlation map has slope :math:`\chi=\sigma_w^2\langle\phi'^2\rangle` at 1, which is also the
factor of squared gradients (Schoenholz et al. 2017). On the edge :math:`\chi=1`, and the gap falls
as a power of depth: as :math:`2/(C''(1)\,l)` where :math:`\phi'` is continuous (Hayou et al. 2019).
Where it jumps by :math:`J_k` at :math:`u_k`, a layer takes :math:`\kappa\epsilon^{3/2}`,
:math:`\kappa=\frac{\sqrt2\,\sigma_w^2}{3\pi}\sum_kJ_k^2e^{-u_k^2/2q^*}`, and the gap falls as
:math:`4/\kappa^2l^2`, for ReLU :math:`9\pi^2/2l^2`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq

from svlib import _check
from svlib.theory.activations import Activation, Function, named

_SMALL = 1e-6  # gap at which the curvature is read off, distance over which a jump is
_SCALES = np.logspace(-6, 4, 61)


@dataclass(frozen=True)
class Edge:
    r"""A point of the edge of chaos, and the law :math:`\epsilon_l\sim c\,l^{-p}` of the gap there.

    Attributes:
        weight_variance: N times the variance of a weight.
        bias_variance: Variance of a bias.
        q: The fixed point of sigma^2; 1 for ReLU, where every scale is one.
        constant: The constant c.
        power: The power p: 1, or 2 where the derivative jumps.
    """

    weight_variance: float
    bias_variance: float
    q: float
    constant: float
    power: int


def edge_of_chaos(
    activation: str | Function,
    bias_variance: float = 0.0,
    *,
    negative_slope: float = 0.0,
    kinks: Sequence[float] = (),
) -> Edge:
    """The weight variance that is critical together with a bias variance.

    Args:
        activation, negative_slope, kinks: As in :func:`svlib.theory.trajectory`.
        bias_variance: Variance of a bias; 0 for ReLU and its relatives, positive for the others
            that vanish at 0.

    Raises:
        ValueError: If there is no such point.

    Examples:
        >>> edge = edge_of_chaos("tanh", 0.05)
        >>> print(f"{edge.weight_variance:.4f} {edge.q:.4f} {edge.constant:.3f}/l^{edge.power}")
        1.7610 0.5700 6.171/l^1
        >>> edge_of_chaos("relu").weight_variance
        2.0
    """
    phi = named(activation, negative_slope, kinks)
    bias = _check.real("bias_variance", bias_variance, 0)
    if phi.slope is not None:
        if bias > 0 or phi.slope == 1:
            got = f"{activation!r} with a bias variance of {bias} and a slope of {phi.slope}"
            raise ValueError(f"activation must bend, or be without a bias if it is ReLU, got {got}")
        return _edge(phi, 1 / phi.gradient(1.0), 0.0, 1.0)
    if bias == 0 and phi.second_moment(1e-12) < 1e-11:
        raise ValueError("bias_variance must be positive, or sigma^2 falls to 0 on the edge, got 0")

    def excess(q: float) -> float:  # of the bias variance that the edge asks for at q
        return q - phi.second_moment(q) / phi.gradient(q) - bias

    for low, high in pairwise(_SCALES):
        if excess(low) < 0 <= excess(high):
            q = float(brentq(excess, low, high, xtol=1e-14, rtol=1e-13))
            return _edge(phi, 1 / phi.gradient(q), bias, q)
    raise ValueError(
        f"activation must have an edge of chaos at bias_variance {bias}, got {activation!r} with "
        f"none for sigma^2 from {_SCALES[0]:.0e} to {_SCALES[-1]:.0e}"
    )


def _edge(phi: Activation, weights: float, bias: float, q: float) -> Edge:
    kinks = np.array(phi.kinks)
    sides = phi.function(kinks + _SMALL) + phi.function(kinks - _SMALL)
    jumps = (sides - 2 * phi.function(kinks)) / _SMALL
    if (np.abs(jumps) > 1e-4).any():
        lost = math.sqrt(2) * weights / (3 * math.pi) * jumps**2 @ np.exp(-(kinks**2) / (2 * q))
        return Edge(weights, bias, q, 4 / float(lost) ** 2, 2)

    def curvature(gap: float) -> float:
        return 2 * (gap - weights * phi.difference(q, gap) / q) / gap**2

    # the next order is the root of the gap where the second derivative jumps
    return Edge(weights, bias, q, 2 / (2 * curvature(_SMALL / 4) - curvature(_SMALL)), 1)
