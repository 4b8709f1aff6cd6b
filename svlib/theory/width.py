r"""Finite width, to first order in 1/N: what infinitely many inputs do in a random network of width N.

Write the Gram matrix of the activations of layer l as 1 + x_a on its diagonal and with correlations
:math:`\rho_{ab}`. A layer of width N maps it to its infinite-width image plus noise of covariance
O(1/N), whose moments are averages of products of up to four activations. All inputs being alike,
pairs of pairs fall into few classes, and each class obeys a linear recursion in depth:

- lengths: the log-ratio of two lengths is a random walk. Per layer, half of its variance is
  :math:`(\langle\phi_a^4\rangle-\langle\phi_a^2\phi_b^2\rangle)/4N`, for ReLU
  :math:`(\frac32-J_{22}(\theta))/N`;
- angles: mean :math:`\mu` and variance U of the deviation of a correlation, the covariance G of
  those of two disjoint pairs, and the covariances C, D of a correlation with the length of an input
  of the pair and of another.

:math:`\langle\phi_a\phi_b\phi_c\phi_d\rangle` for four inputs of mutual correlation :math:`\rho` is
a single integral, over what they share: :math:`z_a=\sqrt\rho\,g+\sqrt{1-\rho}\,h_a`. The derivation
is in the chapter on finite width; it was not found in the literature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import barycentric_interpolate
from scipy.special import ndtr, roots_legendre

from svlib import _check
from svlib.theory import maps
from svlib.theory.depth import Array, Trajectory

_LEGENDRE, _LEGENDRE_WEIGHTS = roots_legendre(40)
_FAMILY = ("relu", "leaky_relu", "linear")


@dataclass(frozen=True, eq=False)
class FiniteWidth(Trajectory):
    r"""A trajectory, and the parts of v^2/m^2 it is made of; each array has shape (depth + 1,).

    Attributes:
        angular: The infinite-width value :math:`(1-\rho)/\rho`, which dies.
        radial: The squared coefficient of variation of the lengths, which stays: the plateau.
        remainder: The rest of the first order in 1/N: the fluctuating angles, and their covariance
            with the lengths.
    """

    angular: Array
    radial: Array
    remainder: Array


@dataclass(frozen=True)
class _Moments:
    """Averages of products of activations of inputs of mutual correlation rho, for <phi^2> = 1."""

    fourth: float  # <phi_a^4>
    squares: float  # <phi_a^2 phi_b^2>
    cubic: float  # <phi_a^3 phi_b>
    three: float  # <phi_a^2 phi_b phi_c>
    four: float  # <phi_a phi_b phi_c phi_d>
    product: float  # <phi_a phi_b>, the correlation map


def _moments(rho: float, slope: float) -> _Moments:
    """The averages by Gauss-Legendre panels over the shared part, split where it meets the kink."""
    share, own = math.sqrt(rho), math.sqrt(1 - rho)
    turn = own / share if share > 0 else 9.0
    edges = np.unique(np.clip([-9, -8 * turn, -turn, 0, turn, 8 * turn, 9], -9, 9))
    half = np.diff(edges)[:, None] / 2
    g = (half * _LEGENDRE + (edges[:-1, None] + half)).ravel()
    weights = (half * _LEGENDRE_WEIGHTS).ravel() * np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)

    def positive(t: Array) -> tuple[Array, Array, Array]:
        """<z>, <z^2>, <z^3> over z > 0 for z of mean t and standard deviation own."""
        x = t / own
        above, density = ndtr(x), np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        one = t * above + own * density
        two = (t**2 + own**2) * above + t * own * density
        return one, two, (t**3 + 3 * t * own**2) * above + (t**2 + 2 * own**2) * own * density

    up, down = positive(share * g), positive(-share * g)
    scale = math.sqrt((1 + slope**2) / 2)
    one = (up[0] - slope * down[0]) / scale
    two = (up[1] + slope**2 * down[1]) / scale**2
    three = (up[2] - slope**3 * down[2]) / scale**3
    fourth = 6 * (1 + slope**4) / (1 + slope**2) ** 2
    averages = (
        float(weights @ values) for values in (two**2, three * one, two * one**2, one**4, one**2)
    )
    return _Moments(fourth, *averages)


def finite_width(
    width: int,
    depth: int,
    *,
    input_cv2: float = 0.0,
    rho0: float = 0.0,
    activation: str = "relu",
    negative_slope: float = 0.0,
) -> FiniteWidth:
    r"""m^2 and v^2 of networks of width N as averages over networks of v^2/m^2, to first order in 1/N.

    .. math:: \Big\langle\frac{v_l^2}{m_l^2}\Big\rangle\approx\frac{1-\rho_l}{\rho_l}
        +\mathrm{CV}_0^2+\frac1N\sum_{k<l}\Big(\frac32-J_{22}(\theta_k)\Big)+\frac{r_l}N,\qquad\cos\theta_k=\rho_k,

    for ReLU. Valid for depths well below N times a few; beyond, the angles die faster than at
    infinite width, but they hardly count then.

    Args:
        width: Units N of every layer.
        depth: Number of weight matrices after layer 0, at least 0.
        input_cv2: Squared coefficient of variation of the lengths of layer 0 over inputs: 0 for
            white noise as layer 0 and for inputs of unit norm, 1/(2 n) for white noise in n
            dimensions through a first weight matrix, which adds fluctuating angles too, left out
            here.
        rho0: Correlation of two inputs, in [0, 1), the same for all pairs.
        activation: "relu", "leaky_relu" or "linear".
        negative_slope: The slope of leaky ReLU.

    Returns:
        ``m2`` and ``v2`` relative to their sum, in the proportion of that average, and its parts.

    Raises:
        TypeError: If a number is not a number, or ``width`` or ``depth`` not an integer.
        ValueError: If an argument is out of range or the activation unknown.

    Examples:
        >>> law = finite_width(100, 49)
        >>> print(f"{law.ratio[49]:.2f}, at infinite width {1 / law.angular[49] ** 0.5:.2f}")
        3.08, at infinite width 8.87
    """
    width, depth = _check.integer("width", width), _check.integer("depth", depth, 0)
    _check.choice("activation", activation, _FAMILY)
    slope = maps._slope_of(activation, negative_slope)
    rho = _check.real("rho0", rho0, 0, 1)
    if rho == 1:
        raise ValueError("rho0 must be below 1, where inputs have no angle between them, got 1.0")
    cv2 = _check.real("input_cv2", input_cv2, 0)

    gap = 1 - rho
    lengths = mean = variance = disjoint = own = other = 0.0  # times N: lengths, mu, U, G, C, D
    rows = []
    for layer in range(depth + 1):
        rho = 1 - gap
        rest = 0.0
        if layer > 0:
            rest = disjoint / rho**2 - (own - other + mean) / rho + 2 * gap
        rows.append((gap, lengths, rest))
        if layer == depth:
            break
        found = _moments(rho, slope)
        gap -= maps.gap_decrement(gap, activation=activation, negative_slope=negative_slope)
        f, four, squares = 1 - gap, found.fourth, found.squares
        first = maps.correlation_slope(rho, activation=activation, negative_slope=negative_slope)
        second = (1 - slope) ** 2 / (1 + slope**2) / (math.pi * math.sqrt((1 - rho) * (1 + rho)))

        lengths += (four - squares) / 4
        mean = (
            first * mean
            + second * variance / 2
            + f * (0.75 * (four - 1) + 0.25 * (squares - 1))
            - (found.cubic - f)
        )
        variance = (
            first**2 * variance
            + squares
            - f**2
            - 2 * f * (found.cubic - f)
            + f**2 / 2 * (four + squares - 2)
        )
        own = first * own + found.cubic - f - f / 2 * (four + squares - 2)
        other = first * other + found.three - f * squares
        disjoint = first**2 * disjoint + found.four - 2 * f * found.three + f**2 * squares

    gaps, radial, rest = np.array(rows).T
    radial = cv2 + radial / width
    with np.errstate(divide="ignore", invalid="ignore"):
        angular = gaps / (1 - gaps)
        remainder = np.where(gaps < 1, radial * angular + rest / (1 - gaps) / width, 0)
    m2 = 1 / (1 + angular + radial + remainder)
    return FiniteWidth(
        m2=m2,
        v2=1 - m2,
        sigma2=np.ones(depth + 1),
        angular=angular,
        radial=radial,
        remainder=remainder,
    )


def plateau(*, activation: str = "relu", negative_slope: float = 0.0) -> float:
    r"""The limit of N v^2/m^2 at great depth, inputs of equal lengths: 10.65055 for ReLU.

    :math:`\sum_k(\frac32-J_{22}(\theta_k))` over all layers from :math:`\theta_0=\pi/2` on. The sum
    from a layer on is a power series in its angle, so that partial sums are extrapolated to angle
    0.

    Args:
        activation: "relu" or "leaky_relu".
        negative_slope: The slope a of leaky ReLU, at a distance from 1, where the angles stop
            vanishing.

    Raises:
        TypeError: If ``negative_slope`` is not a number.
        ValueError: If the activation is unknown, or the slope between 0.5 and 2: the sum then has
            not come near its limit.

    Examples:
        >>> print(f"{plateau():.9f}")
        10.650545486
    """
    _check.choice("activation", activation, ("relu", "leaky_relu"))
    slope = maps._slope_of(activation, negative_slope)
    if 0.5 < slope < 2:
        raise ValueError(f"negative_slope must be outside (0.5, 2), got {slope}")
    layers = [250, 354, 500, 707, 1000, 1414, 2000]
    law = finite_width(1, layers[-1], activation=activation, negative_slope=negative_slope)
    angles = 2 * np.arcsin(np.sqrt((1 - 1 / (1 + law.angular)) / 2))
    return float(barycentric_interpolate(angles[layers], law.radial[layers], 0.0))
