r"""Any activation between Gaussian preactivations: the averages that infinite width needs.

With :math:`u_1,u_2` Gaussian of variance q and correlation :math:`1-\epsilon`, a layer wants
:math:`\langle\phi(u)^2\rangle` and the mean square difference
:math:`\frac12\langle(\phi(u_1)-\phi(u_2))^2\rangle`, which is what is left of v^2. Computed as the
difference of two averages it would lose its digits; here the difference is formed first. The
integrals over the sum and the difference of :math:`u_1,u_2` are split where either meets a kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import roots_legendre

from svlib import _check
from svlib._activations import ACTIVATIONS, HOMOGENEOUS

Array = NDArray[np.float64]
Function = Callable[[Array], Array]
NAMES = tuple(ACTIVATIONS)

_X, _W = roots_legendre(16)
_INNER, _INNER_W = roots_legendre(6)
_RANGE = 9.0  # standard deviations; what is beyond is below 1e-18
_PANEL = 2.0  # longest panel, in units of the preactivation
_WIDEST = 1e6  # variance up to which panels so short are affordable
_NEAR = 0.05  # half difference below which the derivative is integrated
# (sin t - t cos t) / t^3 = 1/3 - t^2/30 + t^4/840 - ..., 2k / (2k + 1)! in general; last first
_SERIES = tuple(1 / (math.factorial(2 * k + 1) / (2 * k)) for k in range(7, 0, -1))


def _angle(epsilon: float) -> float:
    return 2 * math.atan2(math.sqrt(epsilon), math.sqrt(2 - epsilon))


def lost(epsilon: float) -> float:
    r""":math:`(\sin\theta-\theta\cos\theta)/\pi`, :math:`\cos\theta=1-\epsilon`, which ReLU takes
    from the gap; for small angles by the Taylor series, where the difference would cancel."""
    theta = _angle(epsilon)
    if theta > 0.5:
        return (math.sin(theta) - theta * math.cos(theta)) / math.pi
    square, series = theta * theta, 0.0
    for coefficient in _SERIES:
        series = coefficient - square * series
    return theta * square * series / math.pi


@dataclass(frozen=True)
class Activation:
    """A function with its derivative and the points where that jumps.

    Without a derivative the difference of two values is taken, which loses digits where it is
    small: relative to v^2/sigma^2 it is good to 1e-10 down to 1e-10.
    """

    function: Function
    derivative: Function | None
    kinks: tuple[float, ...] = ()
    slope: float | None = None  # negative slope of a member of the ReLU family

    def second_moment(self, q: float) -> float:
        """<phi(u)^2> for u of variance q."""
        if self.slope is not None:
            return q * (1 + self.slope**2) / 2
        return self._average(lambda a, h: self.function(a) ** 2, q, 0.0)

    def mean(self, q: float) -> float:
        """<phi(u)> for u of variance q."""
        if self.slope is not None:
            return math.sqrt(q / (2 * math.pi)) * (1 - self.slope)
        return self._average(lambda a, h: self.function(a), q, 0.0)

    def difference(self, q: float, epsilon: float) -> float:
        """Half the mean square of phi(u_1) - phi(u_2) for a correlation of 1 - epsilon."""
        if self.slope is not None:
            return self.second_moment(q) * (epsilon - self.decrement(epsilon))
        return self._average(lambda a, h: self._step(a, h) ** 2 / 2, q, epsilon)

    def decrement(self, epsilon: float) -> float:
        """What a layer at He's rule takes from the gap at variance 1."""
        if self.slope is not None:
            return (1 - self.slope) ** 2 / (1 + self.slope**2) * lost(epsilon)
        return epsilon - self.difference(1.0, epsilon) / self.second_moment(1.0)

    def gradient(self, q: float, epsilon: float = 0.0) -> float:
        """<phi'(u_1) phi'(u_2)>; times the weight variance, a layer's factor of squared gradients
        and, for two inputs, of the product of their gradients."""
        if self.slope is not None:
            bent = (1 - self.slope) ** 2 * _angle(epsilon) / math.pi
            return (1 + self.slope**2 - bent) / 2
        derivative = self.derivative
        if derivative is None:  # of <phi phi> to q rho
            width = 1e-4 * (1 if epsilon == 0 else min(epsilon, 2 - epsilon))
            low, high = max(0.0, epsilon - width), epsilon + width
            return (self.difference(q, high) - self.difference(q, low)) / (q * (high - low))
        return self._average(lambda a, h: derivative(a + h) * derivative(a - h), q, epsilon)

    def _step(self, a: Array, h: Array) -> Array:
        """phi(a + h) - phi(a - h), accurate for small h away from kinks."""
        plain = self.function(a + h) - self.function(a - h)
        if self.derivative is None or float(h.min()) > _NEAR:
            return plain
        points = a[..., None] + h[..., None] * _INNER
        smooth = h * (self.derivative(points) @ _INNER_W)
        crossed = np.zeros(a.shape, dtype=bool)
        for kink in self.kinks:
            crossed |= np.abs(a - kink) < h
        return np.where(crossed | (h > _NEAR), plain, smooth)

    def _average(self, integrand: Callable[[Array, Array], Array], q: float, eps: float) -> float:
        """Over a = (u_1 + u_2)/2 and h = |u_1 - u_2|/2."""
        if q > _WIDEST:
            family = "activation must be of the ReLU family"
            raise ValueError(f"{family} where sigma^2 exceeds {_WIDEST:.0e}, got {q:.3g}")
        middle, half = math.sqrt(q * (1 - eps / 2)), math.sqrt(q * eps / 2)
        outer, weights = _outer(half, self.kinks) if half > 0 else (np.zeros(1), np.ones(1))
        h = half * outer[:, None]
        size = max(middle, 1e-150)
        step = min(1.5 * size, _PANEL)
        count = math.ceil(2 * _RANGE * size / step)
        edges = np.broadcast_to(np.linspace(-_RANGE, _RANGE, count + 1) * size, (len(h), count + 1))
        kinks = [kink + sign * h for kink in self.kinks for sign in (-1, 1)]
        edges = np.sort(np.clip(np.hstack([edges, *kinks]), -_RANGE * size, _RANGE * size), axis=1)
        width = np.diff(edges)[..., None] / 2
        a = edges[:, :-1, None] + width * (1 + _X)
        density = np.exp(-((a / size) ** 2) / 2) / (size * math.sqrt(2 * math.pi))
        values = integrand(a, np.broadcast_to(h[..., None], a.shape))
        return float(weights @ (values * density * width * _W).sum((1, 2)))


def _outer(half: float, kinks: Sequence[float]) -> tuple[Array, Array]:
    """Nodes and weights of |t| for standard Gaussian t, split where two kinks' panels meet."""
    meets = [abs(a - b) / 2 / half for a in kinks for b in kinks if a != b]
    edges = np.unique(np.clip([0.0, 0.5, 1.0, 2.0, 3.5, 5.5, _RANGE, *meets], 0.0, _RANGE))
    width = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + width * (1 + _X)).ravel()
    density = 2 * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    return t, (width * _W).ravel() * density


@cache
def _known(name: str) -> Activation:
    """By torch, in float64, and its derivative by automatic differentiation."""
    function, kinks = ACTIVATIONS[name]

    def value(u: Array) -> Array:
        return np.asarray(function(torch.tensor(u, dtype=torch.float64, device="cpu")))

    def slope(u: Array) -> Array:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.tensor(u, dtype=torch.float64, device="cpu", requires_grad=True)
            return np.asarray(torch.autograd.grad(function(x).sum(), x)[0])

    return Activation(value, slope, kinks)


def named(activation: Any, negative_slope: float = 0.0, kinks: Sequence[float] = ()) -> Activation:
    """The activation of a name, or of a function of arrays whose derivative jumps at ``kinks``.

    Examples:
        >>> print(f"{named('tanh').second_moment(1.0):.10f}")
        0.3942944904
        >>> print(f"{named('relu').difference(1.0, 1.0) * 2 * math.pi:.6f}")  # pi - 1
        2.141593
    """
    if callable(activation):
        points = tuple(_check.real("kinks", kink) for kink in kinks)
        return Activation(activation, None, points)
    if len(tuple(kinks)):
        raise ValueError(f"kinks must be empty unless activation is a function, got {kinks!r}")
    slope = _check.activation(activation, negative_slope, NAMES)
    if activation not in HOMOGENEOUS:
        return _known(activation)
    slope = 1.0 if activation == "linear" else slope
    return Activation(lambda u: np.where(u > 0, u, slope * u), None, (0.0,), slope)
