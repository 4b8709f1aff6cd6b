r"""Correlation maps: how one layer of infinite width changes the correlation of two inputs.

A layer takes preactivations of variance 1 and correlation :math:`\rho` over networks to
preactivations of correlation
:math:`C(\rho)=\langle\phi(z_1)\phi(z_2)\rangle/\langle\phi(z)^2\rangle`, :math:`z` standard
Gaussian. Weights have variance :math:`1/(N\langle\phi^2\rangle)`, He's rule, so that the variance
stays 1.

Near :math:`\rho=1` the interesting quantity is the gap :math:`\epsilon=1-\rho=v^2/\sigma^2`.
Computed as 1 - C it loses its digits, so :func:`gap_decrement` gives its loss in a layer instead.
"""

from __future__ import annotations

import math

from svlib import _check
from svlib.theory import activations


def f(rho: float) -> float:
    r"""The paper's map, as printed: one layer of ReLU takes the correlation rho to f(rho).

    .. math:: f(\rho)=\frac{\sqrt{1-\rho^2}+\rho\,(\pi-\arccos\rho)}\pi

    (Cho & Saul 2009, order 1). Near 1 its error is some 1e-14, more than small gaps 1 - f(rho) are;
    :func:`correlation` is rounded once, and :func:`gap_decrement` keeps their digits.

    Args:
        rho: Correlation of two preactivations over networks, in [-1, 1].

    Examples:
        >>> rho = 0.0
        >>> for layer in range(49):
        ...     rho = f(rho)
        >>> print(f"m/v = {math.sqrt(rho / (1 - rho)):.4f} at layer 49")
        m/v = 8.8664 at layer 49
    """
    return (math.sqrt(1 - rho**2) + rho * (math.pi - math.acos(rho))) / math.pi


def gap_decrement(
    epsilon: float, *, activation: str = "relu", negative_slope: float = 0.0
) -> float:
    r"""The gap's loss in a layer: :math:`\epsilon-\epsilon'`, :math:`\epsilon'=1-C(1-\epsilon)`.

    For ReLU, with :math:`\cos\theta=1-\epsilon`, it is :math:`(\sin\theta-\theta\cos\theta)/\pi`
    (Cho & Saul 2009, order 1, rearranged), and for leaky ReLU of slope a that times
    :math:`(1-a)^2/(1+a^2)`. Relative accuracy is full for every gap in the ReLU family.

    Args:
        epsilon: The gap, in [0, 2].
        activation: A name of ``svlib.theory.activations.NAMES``.
        negative_slope: The slope a of leaky ReLU.

    Examples:
        >>> import math
        >>> print(f"{gap_decrement(1.0) * math.pi:.12f}")
        1.000000000000
        >>> print(f"{gap_decrement(1e-20) / 1e-30 / (2 * math.sqrt(2) / (3 * math.pi)):.12f}")
        1.000000000000
    """
    phi = activations.named(activation, negative_slope)
    return phi.decrement(_check.real("epsilon", epsilon, 0, 2))


def correlation(rho: float, *, activation: str = "relu", negative_slope: float = 0.0) -> float:
    r"""The correlation map C.

    ReLU: :func:`f`, without its loss of digits near 1, by :func:`gap_decrement`.
    Leaky ReLU: :math:`((1-a)^2f(\rho)+2a\rho)/(1+a^2)`. Others: by
    quadrature.

    Args:
        rho: Correlation of two preactivations over networks, in [-1, 1].
        activation, negative_slope: As in :func:`gap_decrement`.

    Examples:
        >>> import math
        >>> print(f"{correlation(0.0) * math.pi:.12f}")
        1.000000000000
    """
    rho = _check.real("rho", rho, -1, 1)
    return rho + gap_decrement(1 - rho, activation=activation, negative_slope=negative_slope)


def correlation_slope(
    rho: float, *, activation: str = "relu", negative_slope: float = 0.0
) -> float:
    r"""The derivative C'. For ReLU :math:`f'(\rho)=1-\arccos(\rho)/\pi`.

    It is also the factor by which a layer of infinite width multiplies the correlation of the
    gradients of two inputs (Schoenholz et al. 2017). Arguments as :func:`correlation`.

    Examples:
        >>> correlation_slope(0.0), correlation_slope(1.0)
        (0.5, 1.0)
    """
    phi = activations.named(activation, negative_slope)
    rho = _check.real("rho", rho, -1, 1)
    return phi.gradient(1.0, 1 - rho) / phi.second_moment(1.0)


def batchnorm(rho: float, *, activation: str = "relu", negative_slope: float = 0.0) -> float:
    r"""The map of a large batch's BatchNorm: :math:`(C(\rho)-C(0))/(1-C(0))`.

    BatchNorm stands behind the activation and a linear layer, and rho is the correlation of two
    inputs of the batch after it. Arguments as :func:`correlation`. ReLU: slope 0.733 at 0, stable;
    1.467 at 1, unstable (Yang et al. 2019).

    Examples:
        >>> batchnorm(0.0), batchnorm(1.0)
        (0.0, 1.0)
    """
    base = correlation(0.0, activation=activation, negative_slope=negative_slope)
    after = correlation(rho, activation=activation, negative_slope=negative_slope)
    return (after - base) / (1 - base)


def batchnorm_slope(rho: float, *, activation: str = "relu", negative_slope: float = 0.0) -> float:
    r"""The derivative of :func:`batchnorm`; at 1 also the growth of squared gradients, large batch.

    Examples:
        >>> print(f"{batchnorm_slope(0.0):.3f} {batchnorm_slope(1.0):.3f}")
        0.733 1.467
    """
    base = correlation(0.0, activation=activation, negative_slope=negative_slope)
    return correlation_slope(rho, activation=activation, negative_slope=negative_slope) / (1 - base)


def batchnorm_correlation(batch: int) -> float:
    r""":math:`m^2/\sigma^2` of ReLU preactivations before BatchNorm, for a batch of B inputs.

    After BatchNorm two inputs of a batch have correlation -1/(B-1); a ReLU layer takes that to
    :math:`f(-1/(B-1))` (Yang et al. 2019). It is exact at infinite width for every B, because ReLU
    is homogeneous and the law of the batch invariant under rotation.

    Args:
        batch: Number of inputs B, at least 2.

    Examples:
        >>> [round(batchnorm_correlation(batch), 4) for batch in (8, 32, 128)]
        [0.2501, 0.3023, 0.3144]
    """
    return correlation(-1 / (_check.integer("batch", batch, 2) - 1))


def batchnorm_gradient_growth(batch: int | None = None) -> float:
    r"""Factor per layer by which squared gradients grow backwards through BatchNorm and ReLU.

    Large batch: :math:`\pi/(\pi-1)`. Batch of B inputs, with :math:`r=-1/(B-1)` (Yang et al. 2019):

    .. math:: \frac{f'(r)+(B-1)}{(B-3)(1-f(r))}-\frac1{B-3} .

    Args:
        batch: Number of inputs B, at least 4 (below, the expectation does not exist); ``None`` for
            the limit of a large batch.

    Examples:
        >>> [round(batchnorm_gradient_growth(batch), 3) for batch in (8, 32, 128, None)]
        [1.788, 1.522, 1.48, 1.467]
    """
    if batch is None:
        return batchnorm_slope(1.0)
    size = _check.integer("batch", batch, 4)
    rho = -1 / (size - 1)
    whole = (correlation_slope(rho) + size - 1) / ((size - 3) * (1 - correlation(rho)))
    return whole - 1 / (size - 3)
