r"""How much v^2/m^2 differs from one ReLU network of width N to the next: the band of the figure.

With infinitely many inputs, :math:`X=v^2/m^2` of one network is :math:`(1+R)/(\rho+u)-1`: u is
what its own mean correlation has beyond the infinite-width :math:`\rho`, of order
:math:`N^{-1/2}`, and R a quarter of the variance over inputs of the logarithm of their squared
lengths, whose mean is of order 1/N and which fluctuates by :math:`N^{-3/2}`. To leading order of
each,

.. math:: \mathrm{Var}\,X=\frac{V+2\rho^2(1-\rho)^2}{N\rho^4}-\frac{2Q}{N^2\rho^3}
    +\frac{Z}{N^3\rho^2},\quad V=N\langle u^2\rangle,\;Q=N^2\langle uR\rangle,\;
    Z=N^3\,\mathrm{Var}\,R.

The part of u of one input is w_a, that of a pair d_ab. They come in by
:math:`G=N\langle x_aw_a\rangle`, :math:`Y=N^2\langle x_ax_bu_{ab}\rangle`,
:math:`D_2=N\langle d_{ab}^2\rangle`, :math:`W=N\langle w_a^2\rangle`, where x is the logarithm of a
squared length less its mean over inputs. The tests hold every part
against a second witness; the law was not found in the literature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from svlib import _check
from svlib.theory import activations, maps
from svlib.theory.depth import Array
from svlib.theory.width import finite_width, plateau, shared_part


@dataclass(frozen=True, eq=False)
class Fluctuations:
    """Over networks, by layer from 0 on; NaN at layer 0, where m is 0. Each has shape (depth + 1,).

    Attributes:
        v2_over_m2: Standard deviation of v^2/m^2.
        ratio: Of m/v, by the slope of X^(-1/2) at the mean of X.
        ln_ratio: Of ln(m/v), likewise.
        angles, covariance, lengths: Parts of the variance of v^2/m^2: of the mean correlation, of
            its covariance with the spread of lengths, of that spread.
        sampling: The part of a finite number of inputs, 0 without ``samples``.
    """

    v2_over_m2: Array
    ratio: Array
    ln_ratio: Array
    angles: Array
    covariance: Array
    lengths: Array
    sampling: Array


class _State(NamedTuple):
    """One layer's moments, all times their power of N; ``mean`` is N times the mean of R.

    Numbers, or in :func:`_layers` arrays by layer.
    """

    gap: Any
    mean: Any = 0.0
    V: Any = 0.0
    Q: Any = 0.0
    Z: Any = 0.0
    G: Any = 0.0
    Y: Any = 0.0
    D2: Any = 0.0
    W: Any = 0.0


class _Noise(NamedTuple):
    """Averages over g, the part of a unit that inputs share, of what its activations add."""

    hh: float  # h = A^2 - f B, the noise of u
    h_s: float  # its covariance with S^ = S - 2 <S> B, the noise of R
    ss: float  # the variance of S^
    s: float  # <S>, 4(3/2 - J22)
    a_tau: float
    omega: float  # omega^2, for omega = tau - <S> A/2, one input's noise
    pair: float  # D^2
    own: float  # of w: the variance over inputs of phi A - f/2 phi^2
    u_length: float  # <A^2 P>: how noise of u goes with that of a length
    y_length: float  # <6PB - 2BP^2 - 4A^2 P>


def _noise(rho: float, f: float) -> _Noise:
    """With f the correlation map at rho, phi = sqrt(2) relu, A, B, ... its moments given g."""
    t, own, weights = shared_part(rho)
    x = t / own
    P, density = ndtr(x), own * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    one = t * P + density  # <z^k> over z > 0, by parts
    two = t * one + own**2 * P
    three = t * two + 2 * own**2 * one
    four = t * three + 3 * own**2 * two
    A, B = math.sqrt(2) * one, 2 * two
    tau, S, D = math.sqrt(8) * three - A * B, 4 * four - B**2, B - A**2
    s = float(weights @ S)
    h, hat, omega = A**2 - f * B, S - 2 * s * B + s, tau - s * A / 2
    spread = A**2 * D - f * A * tau + f**2 / 4 * S
    u_length = A**2 * P
    y_length = 6 * P * B - 2 * B * P**2 - 4 * u_length
    averaged = (h**2, h * hat, hat**2, S, A * tau, omega**2, D**2, spread, u_length, y_length)
    return _Noise(*(float(weights @ values) for values in averaged))


def _step(x: _State) -> _State:
    """The moments of the next layer, from the noise of N independent units."""
    rho = 1 - x.gap
    gap = x.gap - activations.named("relu").decrement(x.gap)
    f, first = 1 - gap, float(maps.correlation_slope(rho))
    second = 1 / (math.pi * math.sqrt(x.gap * (1 + rho)))
    n = _noise(rho, f)
    return _State(
        gap,
        mean=x.mean + n.s / 4,
        V=first**2 * x.V + n.hh,
        Q=first * (x.Q - 2 * f * x.V) + 4 * (n.u_length - f**2) * x.G + n.h_s / 4,
        Z=x.Z - 4 * f * x.Q + 4 * f**2 * x.V + 2 * f * x.Y + 2 * first * x.G**2
        + 4 * (n.a_tau - n.s * f) * x.G + 8 * f**2 * x.D2 + n.ss / 16,
        G=first * x.G + n.a_tau - n.s * f / 2,
        Y=first * x.Y + second * x.G**2 + 2 * x.G * (n.y_length - first * n.s / 2)
        + 8 * f * first * x.D2 + n.omega,
        D2=first**2 * x.D2 + n.pair,
        W=first**2 * x.W + n.own,
    )  # fmt: skip


def _layers(depth: int) -> _State:
    """All layers from white noise on: each field has shape (depth + 1,)."""
    rows = [_State(1.0)]
    for _ in range(depth):
        rows.append(_step(rows[-1]))
    return _State(*np.array(rows).T)


def fluctuations(
    width: int, depth: int, *, samples: int | None = None, activation: str = "relu"
) -> Fluctuations:
    r"""Standard deviation over networks of v^2/m^2, m/v and ln(m/v), with its parts.

    For white noise as layer 0 and He's rule. What is left out is of relative order 1/N. At great
    depth the deviation of m/v tends to 0.463 in networks of any width, after a maximum that grows
    as :math:`N^{1/4}`: its layer is ``ratio[1:].argmax() + 1``, if ``depth`` is beyond it. With S
    inputs, and m^2, v^2 estimated without bias, their sampling adds

    .. math:: \frac{4(W+\rho(1-\rho)^2(1-\rho/2))}{N\rho^4S}+\frac{2(D_2+(1-\rho)^2)}
        {N\rho^4S(S-1)}+\frac{2\langle R^2\rangle}{\rho^2(S-1)}.

    Args:
        width, depth: Units N of every layer, weight matrices after layer 0.
        samples: Inputs S of each network, at least 2; ``None``: very many.
        activation: "relu", the only one with a law.

    Raises:
        ValueError: For another activation.

    Examples:
        >>> law = fluctuations(1000, 300)
        >>> layer = law.ratio[1:].argmax() + 1
        >>> print(f"at most {law.ratio[layer]:.2f} at layer {layer}")
        at most 0.59 at layer 69
    """
    width, depth = _check.integer("width", width), _check.integer("depth", depth, 0)
    _check.choice("activation", activation, ("relu",))
    x, mean = _layers(depth), finite_width(width, depth)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(np.arange(depth + 1) > 0, 1 - x.gap, np.nan)
        angles = (x.V + 2 * rho**2 * x.gap**2) / (width * rho**4)
        covariance = -2 * x.Q / (width**2 * rho**3)
        lengths = x.Z / (width**3 * rho**2)
        sampling = np.zeros(depth + 1)
        if samples is not None:
            s = _check.integer("samples", samples, 2)
            one = x.W + rho * x.gap**2 * (1 - rho / 2)
            sampling = (4 * one + 2 * (x.D2 + x.gap**2) / (s - 1)) / (width * rho**4 * s)
            sampling += 2 * (x.mean**2 + x.Z / width) / (width**2 * rho**2 * (s - 1))
        deviation = np.sqrt(angles + covariance + lengths + sampling)
        ln_ratio = deviation / (mean.v2 / mean.m2) / 2
    ratio = ln_ratio * mean.ratio
    return Fluctuations(deviation, ratio, ln_ratio, angles, covariance, lengths, sampling)


def band_plateau() -> tuple[float, float]:
    r"""The limits at great depth of :math:`N^3\mathrm{Var}(v^2/m^2)` and of the deviation of m/v.

    The first is that of Z, a series in powers of the last layer's angle and, from the square on,
    its logarithm: the constant of a fit. Without logarithms it would be 0.006 lower. The second is
    :math:`\frac12Z^{1/2}P^{-3/2}` with the plateau P, whatever the width.

    Examples:
        >>> print("{:.3f} {:.6f}".format(*band_plateau()))
        1034.417 0.462658
    """
    layers = np.geomspace(250, 2000, 40).astype(int)
    found = _layers(2000)
    theta = 2 * np.arcsin(np.sqrt(found.gap[layers] / 2))[:, None]
    terms = np.hstack([theta ** np.arange(6), theta ** np.arange(2, 5) * np.log(theta)])
    scale = terms.max(0) - terms.min(0) + (np.arange(9) == 0)
    limit = float(np.linalg.lstsq(terms / scale, found.Z[layers], rcond=None)[0][0])
    return limit, math.sqrt(limit) / (2 * plateau() ** 1.5)
