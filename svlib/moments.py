"""The decomposition sigma^2 = m^2 + v^2 of preactivations, unbiased in a finite number of inputs.

For one fixed network and one unit, m is the mean and v^2 the variance of the unit's preactivation
over inputs. The paper (Luther & Seung, arXiv:1902.04942, section 2) calls them sample mean and
sample variance, and averages both squares over units and networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from svlib import _check, _sums

Array = NDArray[np.float64]


def _divide(numerator: Array, denominator: Array) -> Array:
    """Quotient with 0/0 defined as NaN and x/0 as infinity, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(numerator, denominator))


class Squares:
    """sigma^2, m, v, m/v and v^2/sigma^2 of a class that has ``m2`` and ``v2``."""

    if TYPE_CHECKING:

        @property
        def m2(self) -> Array: ...

        @property
        def v2(self) -> Array: ...

    @property
    def sigma2(self) -> Array:
        """sigma^2 = m^2 + v^2, which is exactly the mean square of the preactivations."""
        return np.asarray(self.m2 + self.v2)

    @property
    def m(self) -> Array:
        """m = sqrt(max(m^2, 0)); biased, because of the root and the clipping."""
        return np.asarray(np.sqrt(np.maximum(self.m2, 0)))

    @property
    def v(self) -> Array:
        """v; biased, because of the root."""
        return np.asarray(np.sqrt(self.v2))

    @property
    def ratio(self) -> Array:
        """m/v; biased. NaN where both are 0."""
        return _divide(self.m, self.v)

    @property
    def fraction(self) -> Array:
        """v^2/sigma^2, the fraction of the variance that tells inputs apart; NaN for 0/0."""
        return _divide(self.v2, self.sigma2)


@dataclass(frozen=True, eq=False)
class Decomposition(Squares):
    """Sample mean and sample variance of every unit, and their averages over units.

    All arrays are NumPy float64. ``mean``, ``squared_mean``, ``variance`` and ``largest`` have the
    kept dimensions of the input followed by the units; the averages have the kept dimensions only
    (none gives 0-d).

    Attributes:
        mean: Sample mean of each unit.
        squared_mean: Unbiased estimate of each unit's squared sample mean. It can be negative.
        variance: Unbiased sample variance of each unit.
        largest: Largest preactivation of each unit. Where it is not positive, a ReLU behind the
            unit passes nothing.
        samples: Number of inputs S.
    """

    mean: Array
    squared_mean: Array
    variance: Array
    largest: Array
    samples: int

    @cached_property
    def m2(self) -> Array:
        """m^2, unbiased, so possibly negative; never clipped."""
        return np.asarray(self.squared_mean.mean(-1))

    @cached_property
    def v2(self) -> Array:
        """v^2, unbiased."""
        return np.asarray(self.variance.mean(-1))


class Moments:
    r"""Accumulate a decomposition in one pass, in chunks of any size, in float64.

    Where an input has several positions (pixels, tokens), they are not independent samples. With
    :math:`\bar y_a` the mean over the positions of input a,

    .. math::
        m^2 = \frac{1}{S(S-1)}\sum_{a\ne b}\bar y_a\bar y_b, \qquad v^2 = \overline{y^2} - m^2 .

    With one position this is the familiar :math:`m^2=\bar y^2-v^2/S` with the divisor S - 1 in v^2.

    Args:
        sample_dim: Dimension of ``y`` that runs over inputs.
        unit_dim: Dimension that runs over units (channels).
        position_dims: Dimensions that run over positions. Any other dimension is kept.

    Examples:
        >>> import numpy as np
        >>> y = np.random.default_rng(0).normal(3.0, 2.0, (10_000, 5))
        >>> first = Moments().update(y[:7])
        >>> result = first.merge(Moments().update(y[7:])).result()
        >>> print(round(float(result.m2), 1), round(float(result.v2), 1))
        9.0 4.0
    """

    def __init__(
        self, sample_dim: int = 0, unit_dim: int = -1, position_dims: tuple[int, ...] = ()
    ) -> None:
        if not isinstance(position_dims, tuple | list):
            raise TypeError(f"position_dims must be a tuple of integers, got {position_dims!r}")
        names = ["sample_dim", "unit_dim", *["position_dims"] * len(position_dims)]
        dims = (sample_dim, unit_dim, *position_dims)
        self._dims = tuple(
            _check.integer(name, dim, -64) for name, dim in zip(names, dims, strict=True)
        )
        self._samples = 0
        self._mean: torch.Tensor  # (*kept, units), mean over inputs of the position means
        self._within: torch.Tensor  # sum over inputs of the position mean of (y - mean)^2
        self._between: torch.Tensor  # sum over inputs of (position mean - mean)^2
        self._largest: torch.Tensor

    def update(self, y: Any, mask: Any = None) -> Moments:
        r"""Add a chunk of inputs.

        Args:
            y: Array or tensor of real numbers, with the dimensions named at construction.
            mask: Which positions of which inputs count, (inputs, positions...), boolean. Each input
                then weighs the same however many of its positions count, as if it had come alone
                and without padding; an input of which none counts is left out.

        Raises:
            ValueError: If a shape is wrong, an entry is not finite, or ``mask`` leaves nothing.

        Examples:
            >>> tokens = torch.tensor([[[1.0], [3.0]], [[4.0], [99.0]]])  # the 99 is padding
            >>> mask = torch.tensor([[True, True], [True, False]])
            >>> float(Moments(0, 2, (1,)).update(tokens, mask).result().m2)  # mean 2 times mean 4
            8.0
        """
        y = _check.numbers("y", y)
        y, places = _arranged(y, self._dims)
        samples, positions = len(y), y.shape[-1]
        over_inputs = mask is None and positions == 1  # the sums below run over inputs
        if mask is not None:
            means, within, largest = _where(y, _checked_mask(mask, places))
            samples = len(means)
        else:
            y = y[..., 0].movedim(0, -1)[None] if over_inputs else y
            means, squares, largest = _sums.along_last(y)
            within = squares.sum(0) / positions
        chunk = Moments(self._dims[0], self._dims[1], self._dims[2:])
        chunk._samples, chunk._mean, chunk._largest = samples, means.mean(0), largest.amax(0)
        chunk._between = within if over_inputs else (means - chunk._mean).square_().sum(0)
        chunk._within = within if over_inputs else within + chunk._between
        if not torch.isfinite(chunk._within + chunk._mean.square()).all():
            peak = float(_check.floating("y", y).abs().max())  # NaN or infinity has its own message
            raise _check.NotFiniteError(
                f"y must have squares that float64 can hold, got entries up to {peak:.3g}"
            )
        return self.merge(chunk)

    def merge(self, other: Moments) -> Moments:
        """Add the inputs that ``other`` has seen, by the pairwise update of Chan et al. (1979)."""
        if not isinstance(other, Moments):
            raise TypeError(f"other must be a Moments, got {type(other).__name__}")
        if other._dims != self._dims:
            raise ValueError(f"other must have the dimensions {self._dims}, got {other._dims}")
        if other._samples == 0:
            return self
        if self._samples == 0:
            self.__dict__.update(other.__dict__)
            return self
        if self._mean.shape != other._mean.shape:
            raise ValueError(
                f"every chunk must have units of shape {tuple(self._mean.shape)}, "
                f"got {tuple(other._mean.shape)}"
            )
        samples = self._samples + other._samples
        step = other._mean - self._mean
        shift = step.square() * (self._samples * other._samples / samples)
        self._mean = self._mean + step * (other._samples / samples)
        self._within = self._within + other._within + shift
        self._between = self._between + other._between + shift
        self._largest = self._largest.maximum(other._largest)
        self._samples = samples
        return self

    def result(self) -> Decomposition:
        """Return the decomposition of all inputs seen so far, two at least."""
        if self._samples < 2:
            raise ValueError(f"y must hold at least 2 inputs, got {self._samples}")
        variance_of_mean = self._between / (self._samples * (self._samples - 1))
        return Decomposition(
            mean=self._mean.cpu().numpy(),
            squared_mean=(self._mean.square() - variance_of_mean).cpu().numpy(),
            variance=(self._within / self._samples + variance_of_mean).cpu().numpy(),
            largest=self._largest.cpu().numpy(),
            samples=self._samples,
        )


def _arranged(y: torch.Tensor, named: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """y as (inputs, *kept, units, positions), and its sizes along inputs and positions."""
    dims = [dim + y.ndim if dim < 0 else dim for dim in named]
    if not all(0 <= dim < y.ndim for dim in dims) or len(set(dims)) < len(dims):
        wanted = f"distinct dimensions {named} (sample, unit, positions)"
        raise ValueError(f"y must have {wanted}, got shape {tuple(y.shape)}")
    if y.numel() == 0:
        raise ValueError(f"y must not be empty, got shape {tuple(y.shape)}")
    kept = [dim for dim in range(y.ndim) if dim not in dims]
    y = y.permute(dims[0], *kept, dims[1], *dims[2:])
    behind = len(kept) + 2
    return y.reshape(*y.shape[:behind], -1), (len(y), *y.shape[behind:])


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> torch.Tensor:
    mask = torch.as_tensor(mask)
    if mask.dtype is not torch.bool or mask.shape != shape:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"mask must be boolean of shape (inputs, *positions) {shape}, got {got}")
    if not mask.any():
        raise ValueError("mask must leave an entry, got False everywhere")
    flat: torch.Tensor = mask.flatten(1) if mask.ndim > 1 else mask[:, None]
    return flat


def _where(y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means over the positions that count, sum over inputs of their mean squares about them, and
    largest entries; (inputs, *kept, units), (*kept, units), (inputs, *kept, units), float64."""
    held = mask.any(1)
    y, mask = y[held].to(torch.float64), mask[held].to(y.device)
    mask = mask.reshape(len(mask), *[1] * (y.ndim - 2), -1)
    count = mask.sum(-1)
    means = torch.where(mask, y, 0).sum(-1) / count
    squares = torch.where(mask, y - means[..., None], 0).square_().sum(-1) / count
    return means, squares.sum(0), torch.where(mask, y, -torch.inf).amax(-1)


def by_definition(y: Any) -> tuple[float, float]:
    """m^2 and v^2 of one network as the paper defines them: :func:`svlib.decompose` in plain lines.

    Args:
        y: Array (inputs, units), at least 2 inputs.

    Examples:
        >>> by_definition([[0.0, 5.0], [2.0, 5.0]])
        (12.5, 1.0)
    """
    y = np.asarray(y, dtype=np.float64)
    inputs, units = y.shape
    mean = y.sum(0) / inputs  # of each unit
    variance = ((y - mean) ** 2).sum(0) / (inputs - 1)
    squared_mean = mean**2 - variance / inputs  # without bias: mean^2 alone averages to m^2 + v^2/S
    return float(squared_mean.sum() / units), float(variance.sum() / units)


def decompose(
    y: Any,
    sample_dim: int = 0,
    unit_dim: int = -1,
    position_dims: tuple[int, ...] = (),
    *,
    mask: Any = None,
) -> Decomposition:
    """Split the mean square of preactivations into m^2 and v^2 (the paper's equation for sigma^2).

    The same as :func:`svlib.moments.by_definition`, unit by unit, without its loss of digits.

    Args:
        y: Array or tensor of real numbers, by default (inputs, units); at least two inputs.
        sample_dim: Dimension that runs over inputs.
        unit_dim: Dimension that runs over units (channels).
        position_dims: Dimensions that run over positions (see :class:`Moments`). Other dimensions,
            networks for example, are kept.
        mask: Which positions of which inputs count (see :meth:`Moments.update`), as of padded
            sentences; without positions, which inputs.

    Examples:
        >>> result = decompose([[0.0, 5.0], [2.0, 5.0]])
        >>> result.mean, result.variance
        (array([1., 5.]), array([2., 0.]))
        >>> print(result.m2, result.v2, result.sigma2, round(float(result.fraction), 3))
        12.5 1.0 13.5 0.074
    """
    return Moments(sample_dim, unit_dim, position_dims).update(y, mask).result()


@dataclass(frozen=True, eq=False)
class RaySplit(Squares):
    """m^2 and the two parts of v^2; arrays of the kept dimensions, NumPy float64.

    Attributes:
        m2: Unbiased squared sample mean, as in :class:`Decomposition`, but 0 where it is no more
            than rounding.
        angular: Sample variance across the mean direction: inputs point in different directions.
        radial: Sample variance along the mean direction: inputs have different lengths.
    """

    m2: Array
    angular: Array
    radial: Array

    @property
    def v2(self) -> Array:
        """v^2, the sum of its two parts."""
        return np.asarray(self.angular + self.radial)


def split_along_ray(y: Any) -> RaySplit:
    r"""Split v^2 into a part across and a part along the common ray of the inputs.

    The ray is the direction :math:`u` of the sample mean, a vector over units. With :math:`S`
    inputs and :math:`N` units

    .. math::
        v^2_\mathrm{radial}=\frac{1}{N(S-1)}\sum_a\big((y_a-\bar y)\cdot u\big)^2,
        \qquad v^2_\mathrm{angular}=v^2-v^2_\mathrm{radial},

    the latter computed from the remainders, so that it keeps its digits where it is small.
    Arithmetic has the precision of ``y``, sums over inputs are float64. Where the mean is 0 there
    is no ray and all of v^2 is angular.

    Args:
        y: Array or tensor (..., inputs, units), at least 2 inputs.

    Examples:
        >>> bool(split_along_ray([[1.0, 2.0], [3.0, 6.0]]).angular < 1e-12)  # two inputs on one ray
        True
    """
    y = _check.floating("y", y)
    if y.ndim < 2 or y.shape[-2] < 2 or y.numel() == 0:
        raise ValueError(
            f"y must have shape (..., inputs, units) with at least 2 inputs, got {tuple(y.shape)}"
        )
    peak = y.abs().max()  # squares might overflow otherwise
    unit = _split_along_ray(y / torch.where(peak > 0, peak, 1))
    return RaySplit(*(x * float(peak) ** 2 for x in (unit.m2, unit.angular, unit.radial)))


def _split_along_ray(y: torch.Tensor) -> RaySplit:
    samples, units = y.shape[-2:]
    mean, radial, angular = _sums.split_along_ray(y)
    radial, angular = radial / (units * (samples - 1)), angular / (units * (samples - 1))
    m2 = mean / units - (radial + angular) / samples
    # where it is 0, as with all inputs dead but one, rounding must not make v2/m2 a huge number
    rounding = np.abs(m2) <= 64 * torch.finfo(y.dtype).eps * mean / units
    return RaySplit(np.where(rounding, 0, m2), angular, radial)
