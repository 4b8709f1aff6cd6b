r"""Random layers, by drawing their weights or, exactly so distributed, their preactivations.

``"weights"`` draws every weight matrix: :math:`N^2` normal numbers a layer. ``"gram"`` uses that,
given the activations A (S x N) of S inputs, the N units of the next layer are independent Gaussian
vectors of covariance :math:`AA^\top` (times the weight variance). With :math:`A^\top=QR` they are
:math:`R^\top z`, from N min(S, N) normal numbers. The covariance is singular where :math:`N\le S`,
and nearly so once the inputs have become collinear. Its Cholesky factor, with the jitter that it
then needs, is wrong without a warning. R comes from A itself by Householder reflections, whose
error is no more than that of rounding A, whatever the rank.
"""

from __future__ import annotations

import itertools
import math

import torch

from svlib._random import Normals


def pays(width: int, samples: int) -> bool:
    """Whether the gram method is the cheaper one, as measured on two cores (``benchmarks``)."""
    return width > 80 + 1.5 * samples


class Linear:
    """A random layer without biases, by either method, or with "orthogonal" weights; keeps its
    memory from call to call."""

    def __init__(self, method: str, normals: Normals, like: torch.Tensor) -> None:
        self.method, self.normals = method, normals
        self.noise = like.new_empty(len(like), 0, like.shape[2])

    def __call__(self, a: torch.Tensor, variance: float, out: torch.Tensor) -> torch.Tensor:
        """Write preactivations for ``a`` into ``out`` (networks, samples, width).

        Args:
            a: Activations (networks, samples, features).
            variance: Features times the variance of a weight.
            out: Where to write.
        """
        scale = math.sqrt(variance / a.shape[-1])
        factors = (factor(a) if self.method == "gram" else a) * scale
        if self.noise.shape[1] != factors.shape[2]:
            self.noise = out.new_empty(len(out), factors.shape[2], out.shape[2])
        self.normals.fill(self.noise)
        if self.method == "orthogonal":
            return torch.bmm(factors, _orthogonal(self.noise), out=out)
        if self.method == "weights":
            return torch.bmm(factors, self.noise, out=out)
        for rows, before in _row_blocks(out.shape[1]):  # the factor is 0 above its diagonal
            torch.bmm(factors[:, rows, before], self.noise[:, before], out=out[:, rows])
        return out


def _row_blocks(samples: int) -> list[tuple[slice, slice]]:
    """Blocks of rows of a triangle, each with the columns up to its last row."""
    count = max(1, round(samples / 64))  # as measured
    ends = [samples * k // count for k in range(count + 1)]
    return [(slice(a, b), slice(0, b)) for a, b in itertools.pairwise(ends)]


def _orthogonal(noise: torch.Tensor) -> torch.Tensor:
    """Uniformly distributed matrices with orthonormal columns, or rows if there are fewer, scaled
    to entries of variance 1, from Gaussian ones (networks, features, width)."""
    wide = noise.shape[1] < noise.shape[2]
    columns, upper = torch.linalg.qr(noise.mT if wide else noise)
    columns = columns * upper.diagonal(dim1=1, dim2=2).sign()[:, None]  # or it is not uniform
    columns = columns * math.sqrt(max(noise.shape[1:]))
    found: torch.Tensor = columns.mT if wide else columns
    return found


def factor(a: torch.Tensor) -> torch.Tensor:
    r"""Lower triangular L with :math:`LL^\top=AA^\top`, as accurate as A whatever its rank.

    Cholesky's factor of the product where that is well-conditioned, which is about twice as fast;
    else R of :math:`A^\top=QR`, by Householder reflections of A. Both are the same L, decided for
    each network alone.

    Args:
        a: (networks, samples, features), of a mean square near 1.

    Returns:
        (networks, samples, min(samples, features)), with a diagonal of at least 0, which makes it
        unique where A has full rank.

    Examples:
        >>> collinear = torch.tensor([[[3.0, 4.0], [6.0, 8.0]]])
        >>> factor(collinear).abs().round().tolist()
        [[[5.0, 0.0], [10.0, 0.0]]]
    """
    samples, features = a.shape[1:]
    if features <= samples:  # the product has no inverse
        return _triangular(a)
    product = torch.zeros(len(a), samples, samples, device=a.device, dtype=a.dtype)
    for rows, before in _row_blocks(samples):  # only the lower triangle is needed
        product[:, rows, before] = torch.bmm(a[:, rows], a[:, before].mT)
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(product)
    # the share of an input's square that is left when those before it are known
    squares, number = product.diagonal(dim1=1, dim2=2), torch.finfo(a.dtype)
    left = lower.diagonal(dim1=1, dim2=2).square() / squares
    tiny = squares.amin(1) < number.tiny / number.eps
    ill = (failed != 0) | ~(left.amin(1) > math.sqrt(number.eps)) | tiny
    if ill.any():
        lower[ill] = _triangular(a[ill])
    return lower


def _triangular(a: torch.Tensor) -> torch.Tensor:
    upper = torch.linalg.qr(a.mT, mode="r").R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)
    lower: torch.Tensor = (upper * sign[..., None]).mT
    return lower
