"""Sums over preactivations: compiled for the processor, by torch on other devices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Entries at a time: what a processor's cache holds; on CUDA 64 or 128 MB
_ENTRIES = {False: 2**18, True: 2**24}
_SMALL = 2**17


def _is_compiled(y: torch.Tensor) -> bool:
    """Whether there are compiled sums for it."""
    return y.device.type == "cpu" and y.dtype in (torch.float32, torch.float64)


def along_last(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, sum of squares about it, and largest entry, along the last dimension, in float64."""
    # below that size the import alone, of a second, costs more than a thousand calls save
    large = y.numel() > _SMALL
    return _last_on_processor(y) if large and _is_compiled(y) else _last_elsewhere(y)


def _last_on_processor(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from svlib import _kernels  # takes a second to import

    found = torch.empty(3, *y.shape[:-1], dtype=torch.float64)
    turned = y.detach().mT
    if y.ndim == 3 and y.shape[1] > 1 and turned.is_contiguous():  # units are last in memory
        single = y.dtype == torch.float32
        middle = _kernels.along_middle_single if single else _kernels.along_middle_double
        middle(turned.numpy(), found.numpy())
        return found[0], found[1], found[2]
    rows = y.detach().reshape(-1, y.shape[-1]).contiguous()
    single = y.dtype == torch.float32
    along = _kernels.along_last_single if single else _kernels.along_last_double
    along(rows.numpy(), found.view(3, -1).numpy())
    return found[0], found[1], found[2]


def _last_elsewhere(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # a shift of the size of the mean, so that digits survive where the mean is large
    shift = y[..., :1].to(torch.float64)
    sums, squares = (torch.empty_like(shift[..., 0]) for _ in range(2))
    largest = y.new_empty(y.shape[:-1])
    rows, columns = (max(1, _ENTRIES[y.is_cuda] // part.numel()) for part in (y[0], y[0, 0]))
    buffer = torch.empty_like(y[:rows, :columns], dtype=torch.float64)
    contiguous = y.stride(-1) == 1
    for row in range(0, len(y), rows):
        for column in range(0, y.shape[1], columns):
            at = slice(row, row + rows), slice(column, column + columns)
            part = y[at]
            z = buffer[: len(part), : part.shape[1]].copy_(part).sub_(shift[at])
            torch.amax(part, -1, out=largest[at])
            torch.sum(z, -1, out=sums[at])
            if contiguous:
                torch.linalg.vector_norm(z, dim=-1, out=squares[at]).square_()
            else:  # where a norm is slow
                torch.sum(z.mul_(z), -1, out=squares[at])
    means = sums / y.shape[-1]
    # the shift is one of the entries, so the square subtracted is at most as many times what is
    # left as there are entries
    return shift[..., 0] + means, (squares - sums * means).clamp_(min=0), largest.to(torch.float64)


def split_along_ray(y: torch.Tensor) -> tuple[Array, Array, Array]:
    """Of y (..., inputs, units): the squared length of the mean over inputs, and the sums of
    squares along its direction and across it of what the inputs are beside the mean."""
    return _split_on_processor(y) if _is_compiled(y) else _split_elsewhere(y)


def _split_on_processor(y: torch.Tensor) -> tuple[Array, Array, Array]:
    from svlib import _kernels  # takes a second to import

    networks = y.detach().reshape(-1, *y.shape[-2:]).contiguous().numpy()
    mean_square, squares = np.empty(len(networks)), np.empty((len(networks), 2, y.shape[-2]))
    single = y.dtype == torch.float32
    split = _kernels.split_along_ray_single if single else _kernels.split_along_ray_double
    split(networks, mean_square, squares)
    sums = squares.sum(-1)  # pairwise, so that rounding does not grow with the number of inputs
    mean, radial, angular = (x.reshape(y.shape[:-2]) for x in (mean_square, sums[:, 0], sums[:, 1]))
    return mean, radial, angular


def _split_elsewhere(y: torch.Tensor) -> tuple[Array, Array, Array]:
    mean = y.mean(-2, keepdim=True)
    length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    ray = torch.where(length > 0, mean / length, 0)
    centred = y - mean
    along = centred @ ray.mT
    across = torch.linalg.vector_norm(centred.addcmul_(along, ray, value=-1), dim=-1, keepdim=True)
    mean2, radial, angular = (
        x.double().square().sum((-2, -1)).cpu().numpy() for x in (length, along, across)
    )
    return mean2, radial, angular
