r"""One layer's step of :math:`\ln\sin^2\theta` at finite width n.

The angle :math:`\theta` is that between the ReLU activations of two inputs.

Expansions in 1/n by Jakub & Nica (2023), arXiv:2302.09712, and the exact law for vanishing angles.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import digamma, polygamma
from scipy.stats import binom

from svlib import _check
from svlib.theory.depth import Array


class Step(NamedTuple):
    """Mean of the new ln sin^2 and its variance over networks, in the shape of the angles."""

    mean: Array
    variance: Array


def _angles(theta: Any) -> Array:
    found = np.asarray(theta, dtype=np.float64)
    if not ((found > 0) & (found < math.pi)).all():
        raise ValueError(f"theta must be angles in (0, pi), got {theta!r}")
    return found


def expansion(theta: Any, width: int) -> Step:
    r"""Jakub & Nica's mean and variance of :math:`\ln\sin^2\theta'` given theta, up to O(1/n^2).

    Args:
        theta: Angles between the activations of a layer, in (0, pi), of any shape.
        width: Units n of the next, at least 2.

    Examples:
        >>> mean, variance = expansion(1e-6, 32)
        >>> print(f"{mean - math.log(1e-12):.3f} {variance:.3f}")  # far off, at so small a width
        -0.143 0.198
    """
    t, n = _angles(theta), _check.integer("width", width, 2)
    sine, cosine = np.sin(t), np.cos(t)
    j11 = (sine + (math.pi - t) * cosine) / (2 * math.pi)
    j22 = ((math.pi - t) * (2 * cosine**2 + 1) + 3 * sine * cosine) / (2 * math.pi)
    j31 = (3 * (math.pi - t) * cosine + sine * cosine**2 + 2 * sine) / (2 * math.pi)
    # 1 - 4 J11^2 = 1 - f^2 with f = cos(theta) + (sin(theta) - theta cos(theta)) / pi: from the
    # gap, as it vanishes
    gap = 2 * np.sin(t / 2) ** 2 - (sine - t * cosine) / math.pi
    b = gap * (2 - gap)
    vanishing = t < 3e-3  # there both quotients are 3/2 to O(theta), and cancel numerically
    safe = np.where(vanishing, 1, b)
    a = (8 * j11**2 * j22 - 8 * j11**4 + 4 * j11**2 - 8 * j11 * j31 + j22 + 1) / safe**2
    c = (2 * j11**2 - 4 * j11 * j31 + j22 + 1) / safe
    a, c = np.where(vanishing, 1.5, a), np.where(vanishing, 1.5, c)
    shifted = 4 * j22 - 1 + n
    mean = np.log((n - 1) * b / shifted) + 4 * (j22 + 1) * n / shifted**2 - 4 * a * n / (n - 1) ** 2
    variance = (
        8 * n * (j22 + 1) / shifted**2 + 8 * n * a / (n - 1) ** 2 - 16 * n * c / (shifted * (n - 1))
    )
    return Step(mean, variance)


def small_angle(theta: Any, width: int) -> Step:
    r"""Jakub & Nica's simplification for small angles.

    Mean :math:`\ln\sin^2\theta-\frac{2\theta}{3\pi}-\rho(n)`, variance :math:`8n/(n+5)^2`.
    Arguments and errors as :func:`expansion`.

    Examples:
        >>> mean, variance = small_angle(1e-6, 32)
        >>> print(f"{mean - math.log(1e-12):.3f} {variance:.3f}")
        -0.143 0.187
    """
    t, n = _angles(theta), _check.integer("width", width, 2)
    drift = math.log((n + 5) / (n - 1)) - 10 * n / (n + 5) ** 2 + 6 * n / (n - 1) ** 2
    return Step(
        np.log(np.sin(t) ** 2) - 2 * t / (3 * math.pi) - drift,
        np.full_like(t, 8 * n / (n + 5) ** 2),
    )


def vanishing_angle(width: int) -> Step:
    r"""Exact mean and variance of the change of :math:`\ln\sin^2\theta` as :math:`\theta\to0`.

    With k ~ Bin(n, 1/2) active units, :math:`\sin^2\theta'/\sin^2\theta` is a :math:`\chi^2_{k-1}`
    over the :math:`\chi^2_k` of the squared length. Given k of at least 2: one active unit leaves
    no angle.

    Args:
        width: Units n, at least 2.

    Examples:
        >>> print("{:.5f} {:.4f}".format(*vanishing_angle(32)))
        -0.07185 0.2879
    """
    n = _check.integer("width", width, 2)
    active = np.arange(2, n + 1)
    share = binom.pmf(active, n, 0.5)
    share = share / share.sum()
    means = digamma((active - 1) / 2) - digamma(active / 2)
    variances = polygamma(1, (active - 1) / 2) + polygamma(1, active / 2)
    mean = share @ means
    return Step(np.asarray(mean), np.asarray(share @ (variances + means**2) - mean**2))
