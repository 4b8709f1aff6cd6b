"""SymPy derivations: the decomposition, the ReLU map, its fixed point, the decay, BatchNorm.

Each function starts from a definition (an average, a Gaussian density, a differential equation) and
lets SymPy reach the result; none starts from the answer. No function here calls the numerical code
or is called by it, so that comparing the two tests both.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import sympy as sp

rho = sp.Symbol("rho", real=True)  #: correlation of two preactivations
theta = sp.Symbol(
    "theta", positive=True
)  #: their angle, cos(theta) = rho
epsilon = sp.Symbol(
    "epsilon", positive=True
)  #: the gap 1 - rho = v^2 / sigma^2


class Identity(NamedTuple):
    """Two expressions that were derived apart, and their simplified difference."""

    left: sp.Expr
    right: sp.Expr
    difference: sp.Expr


def decomposition() -> Identity:
    """Sample variance = total mean square - squared sample mean, for one unit of one network.

    The average over inputs is linear, so it acts on the expanded polynomial (y - m)^2 term by term:
    <1> = 1, <y> = m, <y^2> = sigma^2. Averaging over networks and units keeps the identity.

    Examples:
        >>> decomposition()
        Identity(left=-m**2 + sigma**2, right=-m**2 + sigma**2, difference=0)
    """
    y, m, sigma = sp.symbols("y m sigma", real=True)
    averages = {0: sp.Integer(1), 1: m, 2: sigma**2}
    terms = sp.Poly(sp.expand((y - m) ** 2), y).terms()
    left = sp.Add(
        *(
            coefficient * averages[power]
            for (power,), coefficient in terms
        )
    )
    right = sigma**2 - m**2
    return Identity(left, right, sp.simplify(left - right))


def squared_mean_bias() -> Identity:
    """Expectation of the squared mean of S independent inputs: m^2 + v^2/S, so v^2/S is subtracted.

    The square of a sum of S terms has S equal pairs, each with expectation m^2 + v^2, and S(S - 1)
    pairs of different inputs, each with expectation m^2.

    Examples:
        >>> squared_mean_bias().difference
        0
    """
    m, v, inputs, a, b = sp.symbols("m v S a b", positive=True)
    equal = sp.Sum(m**2 + v**2, (a, 1, inputs)).doit()
    different = sp.Sum(
        sp.Sum(m**2, (b, 1, inputs - 1)), (a, 1, inputs)
    ).doit()
    left, right = (
        sp.expand((equal + different) / inputs**2),
        m**2 + v**2 / inputs,
    )
    return Identity(left, right, sp.simplify(left - right))


def gaussian_relu_moments() -> tuple[sp.Expr, sp.Expr]:
    """<relu(z)> and <relu(z)^2> for a standard Gaussian z, by integrating its density.

    Examples:
        >>> gaussian_relu_moments()
        (sqrt(2)/(2*sqrt(pi)), 1/2)
    """
    z = sp.Symbol("z", real=True)
    density = sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi)
    first, second = (
        sp.integrate(z**power * density, (z, 0, sp.oo))
        for power in (1, 2)
    )
    return first, second


@cache
def gaussian_relu_product(first: int = 1, second: int = 1) -> sp.Expr:
    r"""<relu(z1)^first relu(z2)^second> for Gaussians of correlation cos(theta), by their density.

    In the coordinates z1 = r cos(phi), z2 = r cos(phi - theta) the exponent of the density becomes
    -r^2/2, and both preactivations are positive for theta - pi/2 < phi < pi/2 (0 < theta < pi).
    Powers 2 and 2 give J22 of Jakub & Nica (2023), powers 3 and 1 J31.

    Args:
        first: Power of the first, at least 1.
        second: Power of the second, at least 1.

    Examples:
        >>> gaussian_relu_product()
        ((pi - theta)*cos(theta) + sin(theta))/(2*pi)
        >>> gaussian_relu_product(2, 2).subs(theta, sp.pi / 2)
        1/4
    """
    if min(first, second) < 1:
        raise ValueError(
            f"powers must be at least 1, got {first} and {second}"
        )
    r = sp.Symbol("r", positive=True)
    phi, z1, z2 = sp.symbols("phi z1 z2", real=True)
    quadratic_form = (
        z1**2 - 2 * sp.cos(theta) * z1 * z2 + z2**2
    ) / sp.sin(theta) ** 2
    density = sp.exp(-quadratic_form / 2) / (2 * sp.pi * sp.sin(theta))
    polar = {z1: r * sp.cos(phi), z2: r * sp.cos(phi - theta)}
    jacobian = sp.simplify(
        sp.Matrix([polar[z1], polar[z2]]).jacobian([r, phi]).det()
    )
    weighted = z1**first * z2**second * density
    integrand = sp.simplify(
        weighted.subs(polar, simultaneous=True) * jacobian
    )
    over_radius = sp.expand_trig(sp.integrate(integrand, (r, 0, sp.oo)))
    product = sp.integrate(
        over_radius, (phi, theta - sp.pi / 2, sp.pi / 2)
    )
    return sp.collect(
        sp.expand(2 * sp.pi * sp.simplify(product)), sp.cos(theta)
    ) / (2 * sp.pi)


def relu_map() -> sp.Expr:
    """The correlation map of ReLU: <relu(z1) relu(z2)> / <relu(z)^2> with theta = acos(rho).

    Examples:
        >>> sp.simplify(relu_map().subs(rho, 0))
        1/pi
    """
    _, second = gaussian_relu_moments()
    return sp.simplify(
        (gaussian_relu_product() / second).subs(theta, sp.acos(rho))
    )


def relu_map_slope() -> sp.Expr:
    """The derivative of the map, 1 - acos(rho)/pi.

    Examples:
        >>> sp.simplify(relu_map_slope() - (1 - sp.acos(rho) / sp.pi))
        0
    """
    return sp.simplify(sp.diff(relu_map(), rho))


class FixedPoint(NamedTuple):
    """Value and slope of the map at 1, and its curvature: there is no other fixed point."""

    value: sp.Expr
    slope: sp.Expr
    curvature: sp.Expr


def fixed_point() -> FixedPoint:
    """rho = 1 is a fixed point, with slope 1: marginally stable.

    The curvature f'' is positive on (-1, 1), so f' < f'(1) = 1 there and f(rho) - rho falls to its
    value 0 at 1: f(rho) > rho before, and every start is drawn to 1.

    Examples:
        >>> fixed_point()
        FixedPoint(value=1, slope=1, curvature=1/(pi*sqrt(1 - rho**2)))
    """
    f = relu_map()
    slope = relu_map_slope()
    value, slope_there = (
        sp.simplify(x.subs(rho, 1)) for x in (f, slope)
    )
    return FixedPoint(
        value, slope_there, sp.simplify(sp.diff(slope, rho))
    )


def gap_expansion(terms: int = 2) -> sp.Expr:
    """The map of the gap, expanded about 0 in powers of sqrt(epsilon).

    With epsilon = 1 - cos(theta) = 2 sin(theta/2)^2 both gaps are power series in s = sqrt(epsilon)
    through theta = 2 asin(s / sqrt(2)).

    Args:
        terms: Number of terms after epsilon itself, at least 1.

    Examples:
        >>> gap_expansion(1)
        -2*sqrt(2)*epsilon**(3/2)/(3*pi) + epsilon
    """
    if terms < 1:
        raise ValueError(f"terms must be at least 1, got {terms}")
    s = sp.Symbol("s", positive=True)
    _, second = gaussian_relu_moments()
    # f(rho) - rho, the loss of the gap
    decrement = gaussian_relu_product() / second - sp.cos(theta)
    order = 2 * terms + 2  # odd powers of s only: s^3, s^5, ...
    in_theta = sp.series(decrement, theta, 0, order).removeO()
    theta_in_s = sp.series(
        2 * sp.asin(s / sp.sqrt(2)), s, 0, order
    ).removeO()
    in_s = sp.series(
        sp.expand(in_theta.subs(theta, theta_in_s)), s, 0, order
    ).removeO()
    return sp.expand(epsilon - in_s.subs(s, sp.sqrt(epsilon)))


def decay_constant() -> sp.Expr:
    """The limit of v^2 l^2 / sigma^2, from the leading step -c epsilon^(3/2) as a derivative.

    Examples:
        >>> decay_constant()
        9*pi**2/2
    """
    layer = sp.Symbol("l", positive=True)
    start = sp.Symbol("C1")
    gap = sp.Function("epsilon", positive=True)
    step = (gap_expansion(1) - epsilon).subs(epsilon, gap(layer))
    # int d epsilon / step = l + C1
    separated = sp.integrate(1 / (gap_expansion(1) - epsilon), epsilon)
    solution = sp.solve(sp.Eq(separated, layer + start), epsilon)[0]
    residue = sp.diff(solution, layer) - step.subs(gap(layer), solution)
    if sp.simplify(residue.subs(start, 0)) != 0:
        raise ArithmeticError(
            "the solution does not satisfy its differential equation"
        )
    return sp.limit(solution.subs(start, 0) * layer**2, layer, sp.oo)


def length_gain() -> sp.Expr:
    r"""The contribution of a layer's lengths to N v^2/m^2, 3/2 - J22(theta).

    Given two inputs at angle theta, the squared lengths are means over N units of 2 relu(z)^2, of
    expectation 1. So the logarithm of their ratio gains the variance <(2 relu(z1)^2 - 2
    relu(z2)^2)^2> / N, that of the lengths a quarter of it. Half the variance of a small log-ratio
    is the squared coefficient of variation over inputs.

    Examples:
        >>> length_gain().subs(theta, sp.pi / 2)
        5/4
        >>> sp.series(length_gain(), theta, 0, 4)
        theta**2 + O(theta**4)
    """
    z = sp.Symbol("z", real=True)
    fourth = sp.integrate(
        z**4 * sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi), (z, 0, sp.oo)
    )
    # <(a - b)^2> = <a^2> + <b^2> - 2 <ab>
    variance_of_squares = 4 * (
        2 * fourth - 2 * gaussian_relu_product(2, 2)
    )
    return sp.expand(variance_of_squares / 4 / 2)


def plateau_tail(terms: int = 4) -> sp.Expr:
    r"""The sum of :func:`length_gain` over all layers from angle theta on, a power series in theta.

    The tail T obeys T(theta) - T(theta') = length_gain(theta), theta' being the angle one layer on,
    cos(theta') = f(cos theta).

    Args:
        terms: Number of terms, at least 1.

    Examples:
        >>> plateau_tail(1)
        3*pi*theta
    """
    if terms < 1:
        raise ValueError(f"terms must be at least 1, got {terms}")
    order = terms + 2
    _, second = gaussian_relu_moments()
    cosine = sp.series(
        gaussian_relu_product() / second, theta, 0, order + 3
    ).removeO()
    half_sine = sp.series(
        sp.sqrt((1 - cosine) / 2), theta, 0, order + 1
    ).removeO()
    step = sp.series(
        2 * sp.asin(half_sine), theta, 0, order + 1
    ).removeO()
    coefficients = sp.symbols(f"c1:{terms + 1}")
    tail = sum(
        c * theta**k for k, c in enumerate(coefficients, start=1)
    )
    gain = sp.series(length_gain(), theta, 0, order).removeO()
    difference = sp.expand(tail - tail.subs(theta, step) - gain)
    vanishing = [difference.coeff(theta, k) for k in range(2, order)]
    return sp.expand(
        tail.subs(sp.solve(vanishing, coefficients, dict=True)[0])
    )


class BatchNorm(NamedTuple):
    """Large-batch constants of a ReLU network with BatchNorm."""

    m2: sp.Expr
    v2: sp.Expr
    ratio: sp.Expr
    slope_at_0: sp.Expr
    slope_at_1: sp.Expr


def batchnorm() -> BatchNorm:
    """Statistics before BatchNorm, and slopes of its correlation map, from the Gaussian integrals.

    Before BatchNorm sits the linear layer of relu(z), z standard Gaussian over inputs: m^2 and
    sigma^2 are in the ratio <relu>^2 : <relu^2>. BatchNorm takes off the mean, the value of the map
    at 0, and divides by the rest.

    Examples:
        >>> batchnorm().m2, batchnorm().slope_at_0
        (1/pi, pi/(2*(-1 + pi)))
    """
    first, second = gaussian_relu_moments()
    m2 = sp.simplify(first**2 / second)
    f = relu_map()
    slope = sp.diff(
        (f - f.subs(rho, 0)) / (f.subs(rho, 1) - f.subs(rho, 0)), rho
    )
    slopes = (sp.simplify(slope.subs(rho, at)) for at in (0, 1))
    return BatchNorm(
        m2, 1 - m2, sp.simplify(sp.sqrt(m2 / (1 - m2))), *slopes
    )
