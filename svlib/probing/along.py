r"""Theory along the trace of a forward pass, in the limit of infinite width.

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
- A sum of independent signals has (q + q', r + r'). Signals are independent if random weights lie
  between them and all that they have in common.

One pair of numbers stands for all pairs of inputs and of positions. That is exact for white noise
and an approximation for data whose pairs differ. Where a call is beyond this (attention, pooling,
products), theory starts again from the measured values of the next linear or convolutional layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from svlib.probing import operations as ops
from svlib.probing.graph import Graph, Node
from svlib.probing.rows import Values
from svlib.theory import activations

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
        case ops.Sum():
            return _sum(*before)
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
        case ops.Affine(scale2, shift):
            return _affine(signal, scale2, shift)
        case ops.Normalize(positions=True) if units:
            return f"{operation.kind} over positions"
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


def theory(trace: Graph, *, units: bool) -> pd.DataFrame:
    """Follow the trace from row to row.

    Args:
        trace: Of a forward pass.
        units: Whether positions counted as units.

    Returns:
        For each row ``name``, ``m2``, ``v2``, ``sigma2``, ``fraction`` (NaN where theory is
        silent), and ``start``: empty, or why theory starts from the measured values.
    """
    signals: list[Signal | str] = []
    rows = []
    for node in trace.nodes:
        before = [signals[parent] for parent in node.parents]
        if isinstance(node.operation, ops.Sum):  # operands that no formula follows are measured
            values = [trace.nodes[parent].values for parent in node.parents]
            before = [
                x if isinstance(x, Signal) or v is None else _measured(v)
                for x, v in zip(before, values, strict=True)
            ]
        silent = next((x for x in before if isinstance(x, str)), "")
        known = [x for x in before if not isinstance(x, str)]
        signal = silent if silent else follow(node.operation, known, units=units)
        start = ""
        if isinstance(signal, str) and _has_weights(trace, node) and node.values is not None:
            weights = _moved(trace, node).operation
            bias = weights.bias.mean2 if isinstance(weights, ops.Weights) else 0.0
            start, signal = signal, _measured(node.values)._replace(u=bias)
        for name in node.rows:
            if isinstance(signal, str):
                rows.append((name, *[math.nan] * 4, "no theory"))
            else:
                q, r, *_ = signal
                rows.append((name, r, q - r, q, (q - r) / q if q else math.nan, start))
        signals.append(signal)
    return pd.DataFrame(rows, columns=["name", "m2", "v2", "sigma2", "fraction", "start"])


def _measured(values: Values) -> Signal:
    return Signal(values.sigma2, values.m2, values.mean2)


def _moved(trace: Graph, node: Node) -> Node:
    """The node of which this one only moves the entries."""
    while isinstance(node.operation, ops.Move):
        node = trace.nodes[node.parents[0]]
    return node


def _has_weights(trace: Graph, node: Node) -> bool:
    return isinstance(_moved(trace, node).operation, ops.Weights)
