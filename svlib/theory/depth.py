"""Depth: m^2 and v^2 at every layer of a network of infinite width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from svlib import _check
from svlib.theory import activations

Array = NDArray[np.float64]
_FAINT = 1e-250  # sigma^2 below which the squares of an activation's values lose digits
_variance = partial(_check.real, low=0, high=1e12)  # as in the simulation


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Statistics at layers 0 (the first preactivation) to depth; each array has shape (depth + 1,).

    Attributes:
        fraction: v^2/sigma^2, accurate to the last digits however small; NaN once nothing is left
            of the signal: ``sigma2`` is 0 because weights and biases are, or, of an activation
            outside the ReLU family, below 1e-250.
        sigma2: Total variance; 1 without a residual connection. It may become 0 or infinite.
    """

    fraction: Array
    sigma2: Array

    @property
    def rho(self) -> Array:
        """Correlation of two inputs over networks, m^2/sigma^2."""
        return 1 - self.fraction

    @property
    def m2(self) -> Array:
        """Squared sample mean."""
        return _part(self.rho, self.sigma2)

    @property
    def v2(self) -> Array:
        """Sample variance."""
        return _part(self.fraction, self.sigma2)

    @property
    def m(self) -> Array:
        """Root of ``m2``; 0 where a pair of inputs is anticorrelated."""
        return np.asarray(np.sqrt(np.maximum(self.m2, 0)))

    @property
    def v(self) -> Array:
        """Root of ``v2``."""
        return np.asarray(np.sqrt(self.v2))

    @property
    def ratio(self) -> Array:
        """m/v; infinite where v is 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.sqrt(np.maximum(self.rho, 0)) / np.sqrt(self.fraction))


def _part(share: Array, total: Array) -> Array:
    """Their product, with 0 times anything defined as 0."""
    return np.multiply(share, total, out=np.zeros_like(share), where=(share != 0) & (total != 0))


def trajectory(
    depth: int,
    *,
    activation: str | activations.Function = "relu",
    negative_slope: float = 0.0,
    kinks: Sequence[float] = (),
    weight_variance: float | None = None,
    bias_variance: float = 0.0,
    q0: float = 1.0,
    rho0: float = 0.0,
    normalization: str | None = None,
    residual: float | None = None,
) -> Trajectory:
    r"""Follow m^2 and v^2 through ``depth`` layers of infinite width (the paper's exact recursion).

    Preactivations are :math:`y'=W\phi(y)+b`, or :math:`y'=y+\sqrt\beta\,(W\phi(y)+b)`. For ReLU at
    He's rule the gap :math:`\epsilon_l=v_l^2/\sigma_l^2` loses
    :func:`svlib.theory.maps.gap_decrement` at each layer, times the share of the branch in the new
    variance: 1 without residual connection, :math:`\beta/(1+\beta)` with one.

    Args:
        depth: Number of weight matrices after layer 0, at least 0.
        activation: A name of ``svlib.theory.activations.NAMES``, or a function of arrays; outside
            the ReLU family for sigma^2 up to 1e6.
        negative_slope: The slope a of leaky ReLU.
        kinks: Where the derivative of a function jumps.
        weight_variance: N times the variance of a weight; ``None``: He's rule,
            (1 - bias_variance)/<phi(z)^2>, which keeps sigma^2 = 1.
        bias_variance: Variance of a bias.
        q0: sigma^2 of layer 0.
        rho0: :math:`m_0^2/\sigma_0^2`, in [-1, 1]: 0 for white inputs, the cosine for a pair at an
            angle.
        normalization: Applied to preactivations before the activation. ``"batch"``: the batch is
            large and the statistics are those before BatchNorm. ``"layer"``, ``"rms"``: the
            statistics of a wide layer are the network's, so they only fix the scale.
        residual: :math:`\beta`, positive, or ``None``. ``sigma2`` may become infinite; ``fraction``
            does not. He's rule then holds at sigma^2 = 1.

    Examples:
        >>> layers = trajectory(50)
        >>> print(f"{layers.m[50]:.6f} {layers.v[50]:.6f} {layers.ratio[50]:.6f}")
        0.993912 0.110173 9.021392
    """
    depth = _check.integer("depth", depth, 0)
    _check.choice("normalization", normalization, _check.NORMALIZATIONS)
    rho0, bias = _check.real("rho0", rho0, -1, 1), _variance("bias_variance", bias_variance)
    q0 = _variance("q0", q0, open_low=True)
    beta = None if residual is None else _variance("residual", residual, open_low=True)
    phi = activations.named(activation, negative_slope, kinks)
    if weight_variance is None and bias == 0 and q0 == 1 and phi.slope is not None:
        return _at_he(depth, phi.decrement, normalization, beta, 1 - rho0)
    weights = he_variance(phi, bias) if weight_variance is None else weight_variance
    weights = _variance("weight_variance", weights)
    kept = weight_variance is None and q0 == 1 and beta is None
    states = [(q0, 1 - rho0)]
    for _ in range(depth):
        q, gap = _step(phi, weights, bias, normalization, beta, *states[-1])
        # sigma^2 = 1 is unstable for some activations: rounding would grow into another scale
        states.append((1.0 if kept else q, gap))
    return Trajectory(*np.array(states).T[::-1])


def he_variance(phi: activations.Activation, bias_variance: float = 0.0) -> float:
    """N times the variance of a weight that keeps sigma^2 = 1: He's rule for the activation."""
    if bias_variance > 1:
        raise ValueError(f"bias_variance must be at most 1 at He's rule, got {bias_variance}")
    return (1 - bias_variance) / phi.second_moment(1.0)


def _step(
    phi: activations.Activation,
    weights: float,
    bias: float,
    normalization: str | None,
    beta: float | None,
    q: float,
    gap: float,
) -> tuple[float, float]:
    """sigma^2 and v^2/sigma^2 of the next layer."""
    kept, share = (0.0, 1.0) if beta is None else (1.0, beta)
    if normalization is None and phi.slope is not None:  # relative to q: it may be 0 or infinite
        added = bias / q if bias > 0 else 0.0
        if math.isinf(added):
            return share * bias, kept * gap * (q / bias / share)
        total = kept + share * (weights * phi.second_moment(1.0) + added)
        left = kept * gap + share * weights * phi.difference(1.0, gap)
        return q * total, left / total if total > 0 else math.nan
    inside = q if normalization is None else 1.0
    apart = 1.0 if normalization == "batch" else gap  # BatchNorm's output has m = 0
    total = kept * q + share * (weights * phi.second_moment(inside) + bias)
    if total < _FAINT or math.isnan(gap):
        return total, math.nan
    left = kept * gap * q + share * weights * phi.difference(inside, apart)
    return total, min(left / total, 2.0)  # rounding, where inputs are opposite


def _at_he(
    depth: int,
    decrement: Callable[[float], float],
    normalization: str | None,
    beta: float | None,
    gap: float,
) -> Trajectory:
    """At He's rule only the gap changes, by what :mod:`svlib.theory.maps` knows in closed form."""
    base = decrement(1.0)  # the correlation of two independent inputs one layer on
    sigma2, shares = _shares(depth, beta, normalization)
    fraction = np.empty(depth + 1)
    fraction[0] = gap
    lost = 0.0  # Kahan's compensation, or 100,000 small steps would add up 100,000 roundings
    for layer, share in enumerate(shares.tolist(), start=1):
        # BatchNorm's output has m = 0, whatever came in
        step = share * (gap - (1 - base) if normalization == "batch" else decrement(gap))
        new = gap - (step - lost)
        lost = (gap - new) - (step - lost)
        fraction[layer] = gap = new
    return Trajectory(fraction, sigma2)


def _shares(depth: int, beta: float | None, normalization: str | None) -> tuple[Array, Array]:
    """sigma^2 of every layer, and the branch's share of the variance after every step."""
    layers = np.arange(depth + 1.0)
    if beta is None:
        return np.ones_like(layers), np.ones(depth)
    if normalization is None:
        with np.errstate(over="ignore"):
            return np.power(1.0 + beta, layers), np.full(depth, beta / (1 + beta))
    sigma2 = 1 + beta * layers
    return sigma2, beta / sigma2[1:]
