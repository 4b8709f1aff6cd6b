r"""The drift of ReLU networks with BatchNorm at finite width: lengths that nothing holds.

BatchNorm fixes each unit's sum of squares over the batch and leaves open how the inputs share it.
Let :math:`1+\epsilon_a` be the mean square of input a over units after BatchNorm. A layer takes
it to

.. math:: \epsilon'=\lambda\epsilon+\kappa(\epsilon^2-M)+\frac{\tau}{\sqrt N}\,\xi,\qquad
    M=\langle\epsilon^2\rangle,\quad\lambda=1-\frac kB:

a random walk in a large batch, which the square drives apart once it beats the noise, beyond
:func:`onset`; a small batch holds it back before. The constants are derived in the appendix on the
drift under BatchNorm; the runaway was seen, underived, by Nachum et al. (2024), arXiv:2412.02843.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import roots_legendre

from svlib import _check
from svlib.theory import maps

Array = NDArray[np.float64]

_LEFT = 1 - 1 / math.pi  # v^2/sigma^2 before BatchNorm, which it divides by
KAPPA = 1 / (4 * (math.pi - 1))
TAU2 = (5 - 8 / math.pi - 4 / math.pi**2) / _LEFT**2
DAMPING = 1 + (1.5 * math.pi - 2) / (math.pi - 1)  # the k above
SLOPE = 1 / (2 * _LEFT)  # of the map of correlations at 0

_X, _W = roots_legendre(40)


def onset(width: int) -> float:
    r"""The depth :math:`(N/\kappa^2\tau^2)^{1/3}=2.55\,N^{1/3}` at which the lengths run away.

    A batch much smaller than k times that holds them.

    Examples:
        >>> print(f"{onset(1024):.1f}")
        25.7
    """
    return float((_check.integer("width", width) / (KAPPA**2 * TAU2)) ** (1 / 3))


def is_held(width: int, samples: int) -> bool:
    """Whether a batch damps the lengths before they run away: B below k times the onset.

    Examples:
        >>> is_held(1024, 32), is_held(1024, 256)
        (True, False)
    """
    return _check.integer("samples", samples, 2) < DAMPING * onset(width)


def first_order(width: int, depth: int, samples: int | None) -> tuple[Array, Array, Array]:
    r"""Three parts of :math:`v^2/\sigma^2` before BatchNorm, (depth + 1,) each, of white inputs.

    .. math:: \frac{m_l^2}{\sigma_l^2}=f\Big(\frac{-1}{B-1}\Big)-\frac{M_l}{4\pi}+\frac{U_l}{2\pi},
        \quad M_l=\frac{\tau^2}N\frac{1-\lambda^{2(l-1)}}{1-\lambda^2},
        \quad U_l=\frac1N\frac{1-\lambda_c^{2(l-1)}}{1-\lambda_c^2}.

    The first is that of infinite width, the second is due to the lengths, the third to the
    fluctuating correlations, of slope :math:`\lambda_c=\pi/2(\pi-1)` in a layer.

    Args:
        width: Units N.
        depth: Number of weight matrices after layer 0.
        samples: Inputs B of a batch; ``None``: very many.
    """
    decay = 1.0 if samples is None else 1 - DAMPING / samples
    base = maps.correlation(0.0 if samples is None else -1 / (samples - 1))
    infinite, lengths, correlations = np.full(depth + 1, 1 - base), *np.zeros((2, depth + 1))
    infinite[0] = 1.0
    M = U = 0.0
    for layer in range(2, depth + 1):
        M, U = decay**2 * M + TAU2 / width, SLOPE**2 * U + 1 / width
        lengths[layer], correlations[layer] = M / (4 * math.pi), -U / (2 * math.pi)
    return infinite, lengths, correlations


def normalized(covariance: Array) -> Array:
    r"""Covariance after BatchNorm of a batch whose preactivations are Gaussian over units, exactly.

    With :math:`\tilde K=U\Lambda U^\top` the covariance about the batch's mean, unit by unit
    divided by the batch's variance, the new eigenvalues are proportional to
    :math:`\lambda_k\int_0^\infty\frac{dt}{1+2\lambda_kt}\prod_j(1+2\lambda_jt)^{-1/2}`, and their
    sum is B (Yang et al. 2019).

    Args:
        covariance: (samples, samples), not constant.

    Examples:
        >>> after = normalized(np.diag([1.0, 2.0, 4.0]))
        >>> bool(np.allclose(after.sum(0), 0)), round(float(after.trace()), 12)
        (True, 3.0)
    """
    centred = covariance - covariance.mean(0) - covariance.mean(1)[:, None] + covariance.mean()
    values, vectors = np.linalg.eigh(centred)
    values = np.maximum(values, 0)
    u = (_X + 1) / 2
    t = 3 / values.sum() * u / (1 - u)
    weight = _W / (1 - u) ** 2
    product = np.exp(-np.log1p(2 * np.outer(values, t)).sum(0) / 2)
    new = values * (weight * product / (1 + 2 * np.outer(values, t))).sum(1)
    return np.asarray((vectors * new * (len(new) / new.sum())) @ vectors.T)


def random_lengths(width: int, depth: int, samples: int, *, networks: int, seed: int) -> Array:
    r""":math:`m^2/\sigma^2` before BatchNorm by a reduced model that goes on beyond the onset.

    The batch's covariance follows the exact map of infinite width; of the fluctuations in 1/N only
    those of the lengths are drawn, :math:`\tau^2/N` in every layer. It is an approximation.

    Args:
        width: Units N.
        depth: Number of weight matrices after layer 0.
        samples: Inputs B of a batch, at least 3.
        networks: How many to follow.
        seed: Of the lengths.

    Returns:
        (networks, depth + 1); 0 at layer 0.

    Examples:
        >>> found = random_lengths(512, 20, 32, networks=2, seed=0)
        >>> found.shape, bool(abs(found[:, 20].mean() - maps.batchnorm_correlation(32)) < 0.01)
        ((2, 21), True)
    """
    width, depth = _check.integer("width", width), _check.integer("depth", depth, 0)
    samples, networks = _check.integer("samples", samples, 3), _check.integer("networks", networks)
    generator = np.random.default_rng(_check.integer("seed", seed, 0))
    found = np.zeros((networks, depth + 1))
    for network in range(networks):
        after = normalized(np.eye(samples))
        for layer in range(1, depth + 1):
            lengths = np.sqrt(after.diagonal())
            rho = np.clip(after / np.outer(lengths, lengths), -1, 1)
            relu = np.sqrt(1 - rho**2) + rho * (math.pi - np.arccos(rho))
            before = np.outer(lengths, lengths) * relu / math.pi
            np.fill_diagonal(before, lengths**2)
            others = (before.sum() - before.trace()) / (samples - 1)
            found[network, layer] = others / before.trace()
            noise = 1 + math.sqrt(TAU2 / width) * generator.standard_normal(samples)
            spread = np.sqrt(np.maximum(noise, 0.02))
            after = normalized(before * np.outer(spread, spread))
    return found
