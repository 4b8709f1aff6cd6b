r"""Theory along the calls of a forward pass, in the limit of infinite width.

It follows three numbers: the mean square q of a signal, its mean product r for two different
inputs, and its squared mean u over units. Of preactivations :math:`q=\sigma^2`, :math:`r=m^2`,
u = 0.

- Weights of fan-in n and mean square s, random and independent of the data, and biases of mean
  square b take (q, r) to (n s q + b, n s r + b), and u to the squared mean of the biases.
- Positions of a transposed convolution of stride s see one of s x s parts of the kernel: where
  positions count as samples, r is divided by the number of parts.
- (Leaky) ReLU of slope a, on a Gaussian signal, takes q to :math:`\frac{1+a^2}2q` and r/q to
  C(r/q), the correlation map.
- Another activation on a Gaussian signal takes them to the averages of
  :mod:`svlib.theory.activations`; what comes out is not Gaussian, until weights follow.
- BatchNorm in training mode, on a large batch, gives (1, 0); LayerNorm (1, (r - u)/(q - u)), before
  their scale and shift.
- A sum of independent signals has (q + q', r + r'), a product (q q', r r'). Signals are independent
  if random weights lie between them and all that they have in common.
- An average over k positions that are independent (no kernel overlaps another, and positions of the
  data vary as inputs do) has (r + (q - r)/k, r).

One pair of numbers stands for all pairs of inputs and of positions. That is exact for white noise
and an approximation for data whose pairs differ. Where a call is beyond this (attention, pooling of
what overlaps), theory starts again from the measured values of the next linear or convolutional
layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from svlib.probing import operations as ops
from svlib.probing.calls import Call
from svlib.theory import activations, maps

GRADIENTS = 100.0
"""Growth of squared gradients, from output to input, that is reported, and beyond which sample init
and BatchNorm are not advised, which is a dozen ReLU layers. Chapter 6 has training runs of more."""
GRADIENTS_FIRST = 1000.0
"""Growth that comes first among the findings, which is some twenty ReLU layers."""

_GAUSSIAN = 0.01  # squared mean over units, as a part of q, that theory neglects


class Signal(NamedTuple):
    """Mean square, mean product of two inputs, squared mean over units; whether it is Gaussian."""

    q: float
    r: float
    u: float
    gaussian: bool = True


_UNKNOWN = Signal(math.nan, math.nan, math.nan)


def follow(
    operation: ops.Operation, before: Sequence[Signal], *, units: bool = False
) -> Signal | str:
    """The signal that an operation makes of its parents' signals.

    Args:
        operation: What is done.
        before: The parents' signals.
        units: Whether positions count as units.

    Returns:
        The signal, or in words why theory is silent.
    """
    match operation:
        case ops.Input():
            return "input"
        case ops.Beyond(why):
            return why
        case ops.Measured(sigma2, m2, mean2):
            return Signal(sigma2, m2, mean2)
        case ops.Sum():
            return _sum(*before)
        case ops.Product():
            q, r, u = (a * b for a, b in zip(before[0][:3], before[1][:3], strict=True))
            return Signal(q, r, u, gaussian=False)
    signal = before[0]
    q, r, u, gaussian = signal
    match operation:
        case ops.Move():
            return signal
        case ops.Weights(gain, bias, phases):
            # where positions count as units, no two parts of a transposed kernel meet
            shared = gain * r if units else gain * r / phases
            return Signal(gain * q + bias.square, shared + bias.square, bias.mean2)
        case ops.Relu(slope):
            return _activate("leaky_relu", signal, slope)
        case ops.Activate(name):
            return _activate(name, signal)
        case ops.Dropout(keep):
            return Signal(q / keep, r, u, gaussian) if keep > 0 else "dropout of everything"
        case ops.Affine(pattern=True) if not units:
            return "a pattern over positions"
        case ops.Affine(scale2, shift):
            return _affine(signal, scale2, shift)
        case ops.Normalize(positions=True) | ops.Pool() if units:
            return f"{getattr(operation, 'kind', 'average')} over positions"
        case ops.Pool(positions):
            return Signal(r + (q - r) / positions, r, u, gaussian)
        case ops.Normalize():
            return _normalize(signal, operation)


def _sum(first: Signal, second: Signal) -> Signal | str:
    q, r, u = (a + b for a, b in zip(first[:3], second[:3], strict=True))
    meet = math.sqrt(first.u * second.u) > _GAUSSIAN * q
    both = first.gaussian and second.gaussian
    return "add of two signals with a mean" if meet else Signal(q, r, u, both)


def _activate(name: str, signal: Signal, slope: float = 0.0) -> Signal | str:
    q, r, u, gaussian = signal
    if q <= 0 or u > _GAUSSIAN * q or not gaussian:
        return f"{'relu' if name == 'leaky_relu' else name} of a signal that is not Gaussian"
    phi = activations.named(name, slope)
    second = phi.second_moment(q)
    apart = phi.difference(q, min(2.0, max(0.0, 1 - r / q)))
    return Signal(second, second - apart, phi.mean(q) ** 2, gaussian=slope == 1)


def _affine(signal: Signal, scale2: float, shift: ops.Constant) -> Signal | str:
    """Scale and shift units; silent if both have a mean, because the cross term remains."""
    q, r, u = (scale2 * part for part in signal[:3])
    if math.sqrt(u * shift.mean2) > _GAUSSIAN * (q + shift.square):
        return "add of a constant to a signal with a mean"
    return Signal(q + shift.square, r + shift.square, u + shift.mean2, signal.gaussian)


def _normalize(signal: Signal, norm: ops.Normalize) -> Signal | str:
    q, r, u, gaussian = signal
    removed = {"batch_norm": r, "layer_norm": u, "rms_norm": 0.0}[norm.kind]
    left = q - removed + norm.eps
    if left <= 0:
        return f"{norm.kind} of a constant"
    normal = Signal(
        (q - removed) / left, (r - removed) / left, max(0.0, u - removed) / left, gaussian
    )
    return _affine(normal, norm.gamma2, norm.beta)


def theory(table: pd.DataFrame, calls: Iterable[Call], *, units: bool) -> pd.DataFrame:
    """Follow the calls from row to row.

    Args:
        table: Of :func:`svlib.probe`.
        calls: Of the same forward pass.
        units: Whether positions counted as units.

    Returns:
        For each row of the table ``name``, ``m2``, ``v2``, ``sigma2``, ``fraction`` (NaN where
        theory is silent), and ``start``: empty, or why theory starts from the measured values.
    """
    measured = table.set_index("name")[["sigma2", "m2"]].astype(float).T.to_dict("list")
    listed = list(calls)
    signals: list[Signal | str] = []
    expected: dict[str, tuple[Signal, str]] = {}
    for call in listed:
        before = [signals[parent] for parent in call.parents]
        silent = next((parent for parent in before if isinstance(parent, str)), "")
        known = [parent for parent in before if not isinstance(parent, str)]
        asks_parents = not isinstance(call.operation, ops.Measured)
        signal = silent if silent and asks_parents else follow(call.operation, known, units=units)
        for row in (row for row in call.rows if row in measured):
            weights = _weights(call, listed)
            if isinstance(signal, Signal):
                expected[row] = signal, ""
            elif weights is not None:
                bias = getattr(weights.operation, "bias", ops.Constant())
                sigma2, m2 = measured[row]
                start, signal = signal, Signal(sigma2, m2, bias.mean2)
                expected[row] = signal, start
        signals.append(signal)
    rows = []
    for name in table.name:
        (q, r, *_), start = expected.get(name, (_UNKNOWN, "no theory"))
        rows.append((name, r, q - r, q, (q - r) / q if q else math.nan, start))
    return pd.DataFrame(rows, columns=["name", "m2", "v2", "sigma2", "fraction", "start"])


def _weights(call: Call, calls: Sequence[Call]) -> Call | None:
    """The call of a weighted layer that this is, or whose output it moves."""
    while isinstance(call.operation, ops.Move):
        call = calls[call.parents[0]]
    return call if call.function in ops.WEIGHTED else None


def uses_batch_statistics(call: Call) -> bool:
    """Whether a call is BatchNorm in training mode."""
    operation = call.operation
    return isinstance(operation, ops.Normalize) and operation.kind == "batch_norm"


def gradient_growth(calls: Iterable[Call], *, batchnorm: bool = False) -> float:
    r"""Growth of squared gradients from output to input where every unit has sample mean 0 and
    variance 1.

    A ReLU and the weighted layer behind it contribute a factor :math:`\pi/(\pi-1)` (for a slope,
    :func:`svlib.theory.maps.batchnorm_slope` at 1). The factors are multiplied along the way from
    input to output where the product is least: skip connections without weights do not count.

    Args:
        calls: Of a forward pass.
        batchnorm: Count a layer only if BatchNorm in training mode follows it.
    """
    listed = list(calls)
    # growth; the factor of a ReLU that no weights have followed yet; of one that no norm has
    ways: list[tuple[float, float, float]] = []
    for call in listed:
        way = min((ways[parent] for parent in call.parents), default=(1.0, 1.0, 1.0))
        growth, behind_relu, behind_weights = way
        if isinstance(call.operation, ops.Relu):
            slope = call.operation.slope
            behind_relu = maps.batchnorm_slope(1.0, activation="leaky_relu", negative_slope=slope)
        elif call.function in ops.WEIGHTED:
            behind_relu, behind_weights = 1.0, behind_relu
        if behind_weights > 1 and (not batchnorm or uses_batch_statistics(call)):
            growth, behind_weights = growth * behind_weights, 1.0
        ways.append((growth, behind_relu, behind_weights))
    outputs = [way for way, call in zip(ways, listed, strict=True) if call.is_output] or ways[-1:]
    return max(way[0] for way in outputs) if outputs else 1.0
