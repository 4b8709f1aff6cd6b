"""Normalizations that are written out by hand, recognized by their steps.

``x * rsqrt(mean(x**2) + eps)``, as in Llama, is RMSNorm, and ``(x - mean(x)) / sqrt(var(x) + eps)``
is LayerNorm, in whatever library the lines stand. Every output carries a note on what it is of a
base signal; a product or a quotient of the base with the right note is the normalization.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch

from svlib.probing.operations import Normalize, argument_of

_MULTIPLY = frozenset({"mul", "imul", "rmul"})
_DIVIDE = frozenset({"div", "truediv", "itruediv"})
_ADD = frozenset({"add", "iadd", "radd"})
_SUBTRACT = frozenset({"sub", "isub"})

Step = Literal["itself", "mean", "centred", "square", "mean square", "rms", "1 / rms"]


@dataclass(frozen=True)
class Note:
    """An output is this step of the base signal, the call of that number.

    ``squares`` says whether a square is of the centred base, ``eps`` was added to its mean.
    """

    step: Step
    base: int
    centred: bool = False
    eps: float = 0.0

    def then(self, step: Step, **changes: Any) -> Note:
        return replace(self, step=step, **changes)


def note(
    name: str, given: list[Note], args: Any, kwargs: Any, output: torch.Tensor
) -> Note | Normalize | None:
    """The note of an output, or the normalization that it completes, from those of its parents."""
    if len(given) == 2:
        return _of_two(name, *given)
    if len(given) != 1:
        return None
    (one,) = given
    if name in ("pow", "square") and one.step in ("itself", "centred"):
        squared = name == "square" or argument_of(args, kwargs, 1, "exponent") == 2
        return one.then("square", centred=one.step == "centred") if squared else None
    if name in ("mean", "var") and _over_units(output):
        if name == "var" and one.step in ("itself", "centred"):
            return one.then("mean square", centred=True)
        if name == "mean" and one.step in ("itself", "square"):
            return one.then("mean" if one.step == "itself" else "mean square")
    if name in _ADD and one.step == "mean square":
        return one.then("mean square", eps=one.eps + _number(args))
    if name == "sqrt" and one.step == "mean square":
        return one.then("rms")
    if name == "rsqrt" and one.step == "mean square":
        return one.then("1 / rms")
    if name == "pow" and one.step == "mean square":
        exponents: dict[Any, Step] = {0.5: "rms", -0.5: "1 / rms"}
        step = exponents.get(argument_of(args, kwargs, 1, "exponent"))
        return one.then(step) if step else None
    if name in _ADD and one.step == "rms":
        return one
    return None


def _of_two(name: str, a: Note, b: Note) -> Note | Normalize | None:
    if a.base != b.base:
        return None
    if name in _MULTIPLY:
        if a.step == b.step and a.step in ("itself", "centred"):
            return a.then("square", centred=a.step == "centred")
        signal, other = (a, b) if a.step in ("itself", "centred") else (b, a)
        return _completed(signal, other) if other.step == "1 / rms" else None
    if name in _DIVIDE and b.step == "rms":
        return _completed(a, b)
    if name in _SUBTRACT and (a.step, b.step) == ("itself", "mean"):
        return a.then("centred")
    return None


def _completed(signal: Note, norm: Note) -> Normalize | None:
    if signal.step == "itself" and not norm.centred:
        return Normalize("rms_norm", eps=norm.eps)
    if signal.step == "centred" and norm.centred:
        return Normalize("layer_norm", eps=norm.eps)
    return None


def _over_units(output: torch.Tensor) -> bool:
    """Whether a mean was taken over the last dimension and kept it."""
    return output.ndim > 1 and output.shape[-1] == 1


def _number(args: Any) -> float:
    return next((float(x) for x in args if isinstance(x, Real)), 0.0)
