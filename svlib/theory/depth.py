"""Depth: m^2 and v^2 at every layer of a network of infinite width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svlib import _check
from svlib.theory import maps

Array = NDArray[np.float64]
NORMALIZATIONS = (None, "batch", "layer")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Statistics at layers 0 (the first preactivation) to depth; each array has shape (depth + 1,).

    Attributes:
        fraction: v^2/sigma^2, accurate to the last digits however small.
        sigma2: Total variance; 1 without a residual connection.
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
    """Their product, with 0 times infinity defined as 0."""
    return np.multiply(share, total, out=np.zeros_like(share), where=share != 0)


def trajectory(
    depth: int,
    *,
    activation: str = "relu",
    negative_slope: float = 0.0,
    normalization: str | None = None,
    residual: float | None = None,
    rho0: float = 0.0,
) -> Trajectory:
    r"""Follow m^2 and v^2 through ``depth`` layers of infinite width (the paper's exact recursion).

    Without normalization the gap :math:`\epsilon_l=v_l^2/\sigma_l^2` obeys
    :math:`\epsilon_{l+1}=\epsilon_l-w_l\,d(\epsilon_l)`, d being
    :func:`svlib.theory.maps.gap_decrement` and :math:`w_l` the share of the branch in the new
    variance: 1 without residual connection, :math:`\beta/(1+\beta)` with
    :math:`y'=y+\sqrt\beta\,W\phi(y)`.

    Args:
        depth: Number of weight matrices after layer 0, at least 0.
        activation: "relu", "leaky_relu", "linear" or "tanh".
        negative_slope: The slope a of leaky ReLU.
        normalization: Applied to preactivations before the activation. ``"batch"``: the batch is
            large and the statistics are those before BatchNorm. ``"layer"``: the statistics of a
            wide layer are the network's, so LayerNorm only fixes the scale.
        residual: :math:`\beta`, positive, or ``None``. ``sigma2`` grows as :math:`(1+\beta)^l`, or
            :math:`1+\beta l` with normalization, and may become infinite; ``fraction`` does not.
            Not with tanh, unless normalized: the variance then grows, and tanh is not homogeneous.
        rho0: :math:`m_0^2/\sigma_0^2`, in [-1, 1]: 0 for white inputs, the cosine for a pair at an
            angle.

    Examples:
        >>> layers = trajectory(50)
        >>> print(f"{layers.m[50]:.6f} {layers.v[50]:.6f} {layers.ratio[50]:.6f}")
        0.993912 0.110173 9.021392
    """
    depth = _check.integer("depth", depth, 0)
    _check.choice("normalization", normalization, NORMALIZATIONS)
    rho0 = _check.real("rho0", rho0, -1, 1)
    beta = None if residual is None else _check.real("residual", residual, 0, open_low=True)
    decrement = maps._decrement(activation, maps._slope_of(activation, negative_slope))
    base = decrement(1.0)  # the correlation of two independent inputs one layer on
    if activation == "tanh" and beta is not None and normalization is None:
        raise ValueError(
            "activation must be homogeneous ('relu', 'leaky_relu', 'linear') with residual, "
            f"got {activation!r}"
        )
    sigma2, shares = _shares(depth, beta, normalization)
    fraction = np.empty(depth + 1)
    fraction[0] = gap = 1 - rho0
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
