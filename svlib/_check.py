"""Checks of arguments, so that every error names the argument, what came and what is accepted."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from numbers import Real
from typing import Any

import numpy as np
import torch

NORMALIZATIONS = (None, "batch", "layer", "rms")


class NotFiniteError(ValueError):
    """A number is NaN, infinite or too large to be squared."""


def integer(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` as an ``int`` of at least ``minimum``."""
    try:
        if isinstance(value, bool | np.bool | torch.Tensor):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> float:
    """Return ``value`` as a finite ``float`` in [low, high], or (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, Real | np.floating | np.integer):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be a finite number in {bracket}{low}, {high}], got {number}")
    return number


def choice(name: str, value: Any, accepted: Collection[Any]) -> Any:
    """Return the one of ``accepted`` that ``value`` is."""
    for option in accepted:
        if value is option or (
            isinstance(option, str) and isinstance(value, str) and value == option
        ):
            return option
    raise ValueError(f"{name} must be one of {list(accepted)}, got {value!r}")


def activation(name: Any, negative_slope: Any, accepted: Collection[str]) -> float:
    """Return ``negative_slope`` as a float if it and the activation's name go together."""
    choice("activation", name, accepted)
    slope = real("negative_slope", negative_slope, -1000, 1000)
    if slope != 0 and name != "leaky_relu":
        raise ValueError(
            f"negative_slope must be 0 unless activation is 'leaky_relu', got {slope} with {name!r}"
        )
    return slope


def device(value: Any) -> torch.device:
    """Return a torch device that is there and has a generator of random numbers."""
    try:
        found = torch.device(value)
        torch.Generator(found)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        reason = str(error).splitlines()[0].split(". ")[0]  # torch explains at length
        raise ValueError(f"device must be one of {there} here, got {value!r} ({reason})") from None
    return found


def precision(value: Any) -> torch.dtype:
    """Return float32 or float64, given as a torch dtype or by name."""
    accepted = {"float32": torch.float32, "float64": torch.float64}
    for name, dtype in accepted.items():
        if value is dtype or (isinstance(value, str) and value == name):
            return dtype
    raise ValueError(f"dtype must be one of {list(accepted)}, got {value!r}")


def numbers(name: str, value: Any) -> torch.Tensor:
    """Return an array or tensor of real numbers as a detached tensor; arrays are copied."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        real_numbers = tensor.dtype != torch.bool and not tensor.is_complex()
        kind = str(tensor.dtype)
    else:
        try:
            array = np.asarray(value)
        except (TypeError, ValueError) as error:
            kind = f"{type(value).__name__}: {error}"
            raise TypeError(
                f"{name} must be an array or tensor of real numbers, got {kind}"
            ) from None
        real_numbers, kind = array.dtype.kind in "iuf", f"{type(value).__name__} of {array.dtype}"
        if real_numbers:
            single = array.dtype == np.float32
            tensor = torch.from_numpy(
                np.array(array, dtype=np.float32 if single else np.float64, order="C")
            )
    if not real_numbers:
        raise TypeError(f"{name} must be an array or tensor of real numbers, got {kind}")
    return tensor


def floating(name: str, value: Any) -> torch.Tensor:
    """Return what :func:`numbers` returns, if all of it is finite."""
    tensor = numbers(name, value)
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise NotFiniteError(
            f"{name} must be finite, got {bad} NaN or infinite of {tensor.numel()} entries"
        )
    return tensor
