r"""Finite width, to first order in 1/N: infinitely many inputs in a random network of width N.

Write the covariance from which the units of a layer are drawn as :math:`1+x_a` on its diagonal and
with correlations :math:`\rho+u_{ab}`. A layer of width N maps it to its infinite-width image plus
noise of covariance O(1/N), whose moments are averages of products of up to four activations,
:math:`[abcd]=\langle\phi_a\phi_b\phi_c\phi_d\rangle`. All inputs being alike, pairs of pairs fall
into few classes, and each class obeys a linear recursion in depth:

- lengths: the log-ratio of two lengths is a random walk. Per layer, half of its variance is
  :math:`([aaaa]-[aabb])/4N`, for ReLU :math:`(\frac32-J_{22}(\theta))/N`;
- angles: the mean :math:`\mu` of :math:`u`, :math:`U=\langle u_{ab}^2\rangle`,
  :math:`V=\langle u_{ab}u_{cd}\rangle` of disjoint pairs, :math:`C=\langle x_au_{ab}\rangle` and
  :math:`D=\langle x_au_{bc}\rangle`.

For four inputs of mutual correlation :math:`\rho`, :math:`[abcd]` is a single integral, over the
part they share: :math:`z_a=\sqrt\rho\,g+\sqrt{1-\rho}\,h_a`. The derivation is in the chapter on
finite width; it was not found in the literature.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.interpolate import barycentric_interpolate
from scipy.special import ndtr, roots_legendre

from svlib import _check
from svlib.theory import activations, angles, batchnorm, maps
from svlib.theory.depth import Array, Trajectory

_LEGENDRE, _LEGENDRE_WEIGHTS = roots_legendre(40)
_FAMILY = ("relu", "leaky_relu", "linear")


@dataclass(frozen=True, eq=False)
class FiniteWidth(Trajectory):
    r"""A trajectory with :math:`\sigma^2=1`, and the parts of which ``v2`` is the sum.

    Divide by ``m2`` for the parts of v^2/m^2. Each array has shape (depth + 1,).

    Attributes:
        angular: Over m2 the infinite-width value :math:`(1-\rho)/\rho`, which dies.
        radial: Over m2 the squared coefficient of variation of the lengths, which stays: the
            plateau.
        remainder: The rest of the first order in 1/N: the fluctuating angles, and their covariance
            with the lengths.
    """

    angular: Array
    radial: Array
    remainder: Array


class _Moments(NamedTuple):
    """Averages of products of activations of inputs of mutual correlation rho, for <phi^2> = 1."""

    aaaa: float
    aabb: float
    aaab: float
    aabc: float
    abcd: float
    ab: float  # the correlation map


def shared_part(rho: float) -> tuple[Array, float, Array]:
    r"""Nodes of :math:`\sqrt\rho\,g`, the deviation :math:`\sqrt{1-\rho}` of the rest, weights.

    Gauss-Legendre panels, split where the shared part meets the kink.
    """
    share, own = math.sqrt(rho), math.sqrt(1 - rho)
    turn = own / share if share > 0 else 9.0
    edges = np.unique(np.clip([-9, -8 * turn, -turn, 0, turn, 8 * turn, 9], -9, 9))
    half = np.diff(edges)[:, None] / 2
    g = (half * _LEGENDRE + (edges[:-1, None] + half)).ravel()
    weights = (half * _LEGENDRE_WEIGHTS).ravel() * np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
    return share * g, own, weights


def _moments(rho: float, slope: float) -> _Moments:
    """The averages by an integral over the shared part."""
    shared, own, weights = shared_part(rho)

    def positive(t: Array) -> tuple[Array, Array, Array]:
        """<z>, <z^2>, <z^3> over z > 0 for z of mean t and standard deviation own."""
        x = t / own
        above, density = ndtr(x), np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        one = t * above + own * density
        two = (t**2 + own**2) * above + t * own * density
        return one, two, (t**3 + 3 * t * own**2) * above + (t**2 + 2 * own**2) * own * density

    up, down = positive(shared), positive(-shared)
    scale = math.sqrt((1 + slope**2) / 2)
    a = (up[0] - slope * down[0]) / scale
    aa = (up[1] + slope**2 * down[1]) / scale**2
    aaa = (up[2] - slope**3 * down[2]) / scale**3
    aaaa = 6 * (1 + slope**4) / (1 + slope**2) ** 2
    products = (aa**2, aaa * a, aa * a**2, a**4, a**2)
    return _Moments(aaaa, *(float(weights @ product) for product in products))


class _Covariances(NamedTuple):
    """N times the covariances of a layer's noise, ``aa_bc``: in the square of an input's length
    and in the product of two others; for inputs of one length and correlation rho."""

    aa_aa: float
    aa_bb: float
    aa_ab: float
    aa_bc: float
    ab_cd: float
    ab_ab: float


def _covariances(rho: float, f: float, first: float, slope: float, weights: str) -> _Covariances:
    """With f and ``first``, the correlation map and its slope at rho.

    An orthogonal matrix keeps the products of all inputs. Its noise is what is left of a product of
    two activations without its projection on the products of two preactivations.
    """
    m = _moments(rho, slope)
    noise = [m.aaaa - 1, m.aabb - 1, m.aaab - f, m.aabc - f, m.abcd - f**2, m.aabb - f**2]
    if weights == "orthogonal":
        g, square = f - rho * first, rho**2  # g is the response to the square of a length
        projection = [
            2.0,
            2 * square,
            g * (1 + square) + 2 * rho * first,
            2 * square * (g + first),
            2 * square * (g + first) ** 2,
            (g**2 + first**2) * (1 + square) + 4 * rho * g * first,
        ]
        noise = [x - y for x, y in zip(noise, projection, strict=True)]
    return _Covariances(*noise)


class _FirstOrder(NamedTuple):
    """The recursion's results by layer, (depth + 1,) each."""

    gap: Array  # 1 - rho at infinite width
    lengths: Array  # N times the squared coefficient of variation of the lengths
    angles: Array  # N times the first order of the angles in v^2/sigma^2


def _first_order(
    depth: int, rho0: float, slope: float, weights: str, start: float = 0.0
) -> _FirstOrder:
    """Chapter 3's recursion; U, V, C, D and mu are times N. U begins at ``start``."""
    decrement = activations.named("leaky_relu", slope).decrement
    gap, lengths = 1 - rho0, 0.0
    U, mu, V, C, D = start, 0.0, 0.0, 0.0, 0.0
    rows = [(gap, 0.0, 0.0)]
    for _ in range(depth):
        rho = 1 - gap
        first = maps.correlation_slope(rho, activation="leaky_relu", negative_slope=slope)
        second = (1 - slope) ** 2 / (1 + slope**2) / (math.pi * math.sqrt((1 - rho) * (1 + rho)))
        gap -= decrement(gap)
        f = 1 - gap
        n = _covariances(rho, f, first, slope, weights)
        lengths += (n.aa_aa - n.aa_bb) / 4
        mu = first * mu + second * U / 2 + f * (3 * n.aa_aa + n.aa_bb) / 4 - n.aa_ab
        U = first**2 * U + n.ab_ab - 2 * f * n.aa_ab + f**2 / 2 * (n.aa_aa + n.aa_bb)
        V = first**2 * V + n.ab_cd - 2 * f * n.aa_bc + f**2 * n.aa_bb
        C = first * C + n.aa_ab - f / 2 * (n.aa_aa + n.aa_bb)
        D = first * D + n.aa_bc - f * n.aa_bb
        # of the layer's own m^2, an average over N units: their products are kept or drawn
        drawn = 0.0 if weights == "orthogonal" else 2 * gap
        rows.append((gap, lengths, V / f**2 - (C - D + mu) / f + drawn))
    return _FirstOrder(*np.array(rows).T)


def _slope_of(activation: str, negative_slope: float) -> float:
    """The negative slope of a member of the ReLU family, after checking both arguments."""
    slope = _check.activation(activation, negative_slope, _FAMILY)
    return 1.0 if activation == "linear" else slope


def finite_width(
    width: int,
    depth: int,
    *,
    input_cv2: float = 0.0,
    features: int | None = None,
    rho0: float = 0.0,
    activation: str = "relu",
    negative_slope: float = 0.0,
    weights: str = "gaussian",
    normalization: str | None = None,
    samples: int | None = None,
) -> FiniteWidth:
    r"""m^2 and v^2 of networks of width N, as the average of v^2/m^2 to first order in 1/N.

    .. math:: \Big\langle\frac{v_l^2}{m_l^2}\Big\rangle\approx\frac{1-\rho_l}{\rho_l}
        +\mathrm{CV}_0^2+\frac1N\sum_{k<l}\Big(\frac32-J_{22}(\theta_k)\Big)+\frac{r_l}N,

    for ReLU, :math:`\cos\theta_k=\rho_k`; for depths well below N times a few; beyond, the angles
    die faster, but hardly count. Orthogonal weights take :math:`\frac12\sin^2\theta_k` from each
    term and have an r_l of their own. Normalized networks are of ReLU with white inputs: "layer"
    and "rms" are a typical network's, whose m/v grows as :math:`e^{l/N}`; "batch" is that of
    :mod:`svlib.theory.batchnorm`, with a warning beyond its range.

    Args:
        width, depth: Units N of every layer, weight matrices after layer 0.
        input_cv2: Squared coefficient of variation of layer 0's lengths over inputs: 0 for unit
            norm and white noise; 1/(2 width) for white noise that orthogonal weights keep.
        features: White noise in so many dimensions goes through a first weight matrix.
        rho0: Correlation of two inputs, in [0, 1), the same for all pairs.
        activation, negative_slope: "relu", "leaky_relu" and its slope, or "linear", which wants a
            ``rho0`` above 0: without one m is 0 on average for ever, and v^2/m^2 has no average.
        weights: "gaussian" or "orthogonal".
        normalization: ``None``, "batch", "layer" or "rms".
        samples: Inputs of a batch under BatchNorm; ``None``: very many.

    Returns:
        ``m2`` and ``v2`` in the proportion of that average, with the parts of v2.

    Examples:
        >>> law = finite_width(100, 49)
        >>> infinite = (law.m2[49] / law.angular[49]) ** 0.5
        >>> print(f"{law.ratio[49]:.2f}, at infinite width {infinite:.2f}")
        3.08, at infinite width 8.87
    """
    width, depth = _check.integer("width", width), _check.integer("depth", depth, 0)
    slope = _slope_of(activation, negative_slope)
    if normalization is not None:
        options = (activation, rho0, input_cv2, features, weights)
        plain = options == ("relu", 0.0, 0.0, None, "gaussian")
        return _normalized(width, depth, normalization, samples, plain)
    if samples is not None:
        raise ValueError(f"samples must be None without normalization='batch', got {samples!r}")
    _check.choice("weights", weights, ("gaussian", "orthogonal"))
    cv2 = _check.real("input_cv2", input_cv2, 0)
    inputs = math.inf if features is None else _check.integer("features", features)
    found = _first_order(depth, _correlation(rho0, slope), slope, weights, width / inputs)
    spread = cv2 + 1 / (2 * inputs) + found.lengths / width
    return _with_lengths(found.gap, spread, found.angles / width)


def _correlation(rho0: float, slope: float) -> float:
    rho = _check.real("rho0", rho0, 0, 1)
    if slope == 1 and 1 - (1 - rho) == 0:  # below 1e-16 it is not kept
        raise ValueError(f"rho0 must be positive for a linear network, got {rho0}")
    if rho == 1:
        raise ValueError("rho0 must be below 1, where inputs have no angle between them, got 1.0")
    return rho


def _with_lengths(gap: Array, spread: Array, remainder: Array) -> FiniteWidth:
    """The law, from the lengths' squared coefficient of variation and the rest of the first order,
    both over m2."""
    parts = gap, (1 - gap) * spread, gap * spread + remainder  # in units of m2/rho
    total = 1 + parts[1] + parts[2]
    shares = parts[0] / total, parts[1] / total, parts[2] / total
    return FiniteWidth(sum(shares, np.zeros(len(gap))), np.ones(len(gap)), *shares)


def _normalized(width: int, depth: int, kind: str, samples: int | None, plain: bool) -> FiniteWidth:
    _check.choice("normalization", kind, ("batch", "layer", "rms"))
    if not plain:
        raise ValueError(f"normalization must be None for other than plain ReLU, got {kind!r}")
    if kind != "batch":
        if samples is not None:
            raise ValueError(f"samples must be None unless normalization='batch', got {samples!r}")
        return _without_lengths(width, depth)
    held = samples is not None and batchnorm.is_held(width, samples)
    if depth > (limit := batchnorm.onset(width)) and not held:
        range_ = f"{limit:.0f} layers at width {width}: theory.batchnorm.random_lengths goes on"
        warnings.warn(f"depth {depth} is beyond the law's range, {range_}", stacklevel=3)
    parts = batchnorm.first_order(width, depth, samples)
    return FiniteWidth(sum(parts, np.zeros(depth + 1)), np.ones(depth + 1), *parts)


def _odd(gap: float) -> float:
    """(3 - <y|y| y'|y'|>)/2: of 2 relu(y)^2 = y^2 + y|y| a norm fixes the sum of the first part."""
    sine, cosine = math.sqrt(gap * (2 - gap)), 1 - gap
    theta = math.atan2(sine, cosine)
    return sine**2 + (theta * (2 * cosine**2 + 1) - 3 * sine * cosine) / math.pi


def _without_lengths(width: int, depth: int) -> FiniteWidth:
    r"""RMSNorm or LayerNorm, in a typical network (the median).

    Lengths are made equal in every layer; one layer's are left. Angles shrink faster than at
    infinite width, :math:`\ln\epsilon` by :func:`svlib.theory.angles.vanishing_angle`, about 2/N a
    layer, so that m/v grows as :math:`e^{l/N}`.
    """
    shrink = math.exp(float(angles.vanishing_angle(width).mean))
    decrement = activations.named("relu").decrement
    gap, gaps, radial = 1.0, [1.0], [0.0]
    for _ in range(depth):
        radial.append(_odd(gap) / 2 / width)  # their squared coefficient of variation
        gap = (gap - decrement(gap)) * shrink
        gaps.append(gap)
    found = np.array(gaps)
    return _with_lengths(found, np.array(radial), -found * np.array(radial))


def plateau(
    *, activation: str = "relu", negative_slope: float = 0.0, weights: str = "gaussian"
) -> float:
    r"""The limit of N v^2/m^2 at great depth, inputs of equal lengths: 10.65055 for ReLU.

    :math:`\sum_k(\frac32-J_{22}(\theta_k))` over all layers from :math:`\theta_0=\pi/2` on. The sum
    from a layer on is a power series in its angle, so that partial sums are extrapolated to angle
    0.

    Args:
        activation: "relu" or "leaky_relu".
        negative_slope: The slope a of leaky ReLU, not between 0.5 and 2: near 1, where angles stop
            vanishing, the sum comes too slowly near its limit.
        weights: "gaussian" or "orthogonal", which halves it nearly.

    Examples:
        >>> print(f"{plateau():.6f} {plateau(weights='orthogonal'):.6f}")
        10.650545 5.553688
    """
    _check.choice("activation", activation, ("relu", "leaky_relu"))
    _check.choice("weights", weights, ("gaussian", "orthogonal"))
    slope = _slope_of(activation, negative_slope)
    if 0.5 < slope < 2:
        raise ValueError(f"negative_slope must be outside (0.5, 2), got {slope}")
    layers = [250, 354, 500, 707, 1000, 1414, 2000]
    found = _first_order(layers[-1], 0.0, slope, weights)
    theta = 2 * np.arcsin(np.sqrt(found.gap[layers] / 2))
    return float(barycentric_interpolate(theta, found.lengths[layers], 0.0))
