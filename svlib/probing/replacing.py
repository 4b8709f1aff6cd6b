"""What runs instead of a function while a suspect is taken away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812, as torch's own documentation calls it

from svlib.probing import operations as ops
from svlib.probing.functions import ACTIVATIONS, AVERAGES
from svlib.probing.graph import Graph, Node
from svlib.probing.models import tensors
from svlib.probing.passes import Key

Removed = Mapping[str, frozenset[Key] | None]  # suspect: the calls of functions, None all
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"})
JOINS = frozenset({"cat", "concat", "stack"})
_MATRIX = frozenset({"matmul", "rmatmul", "bmm", "mm", "einsum"})


class Replacing:
    """Runs something else instead of the functions that are taken away."""

    def __init__(self, trace: Graph, removed: Removed) -> None:
        self._removed = removed
        self._nodes: dict[Key, Node] = {
            node.key[:4]: node for node in trace.nodes if len(node.key) == 5
        }
        self._trace = trace
        rectifies = any(node.function == "relu" for node in trace.nodes)
        self._gain = 2.0 if rectifies else 1.0

    def _away(self, kind: str, key: Key) -> bool:
        keys = self._removed.get(kind, frozenset())
        return keys is None or key in keys

    def __call__(self, key: Key, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        if not self._removed:
            return NotImplemented
        if name in ops.WEIGHTED:
            return self._weighted(key, function, name, args, kwargs)
        if name in DROPOUTS and self._away("dropout", key):
            return args[0]
        if name == "batch_norm" and self._away("statistics", key):
            return self._by_the_batch(args, kwargs)
        node = self._nodes.get(key)
        if node is None:
            return NotImplemented
        if name in ACTIVATIONS and self._away("activations", key):
            if node.number in self._trace.gates:
                return NotImplemented
            return _sized(args[0], function(*args, **kwargs))
        if name in AVERAGES and self._away("averages", key):
            return self._one_position(node, function, name, args, kwargs)
        if name in JOINS and self._away("constants", key):
            parts = [torch.zeros_like(x) if _is_constant(x) else x for x in args[0]]
            return function(parts, *args[1:], **kwargs)
        if name in ops.SUMS and len(args) == 2:
            return self._sum(node, key, function, args, kwargs)
        return NotImplemented

    def _weighted(self, key: Key, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        given = list(args)
        changed = False
        if self._away("biases", key) and (bias := ops.bias_of(name, args, kwargs)) is not None:
            at, word = (0, "input") if name == "addmm" else (2, "bias")
            zero = torch.zeros_like(bias)
            given, kwargs = _put(given, kwargs, at, word, zero)
            changed = True
        if self._away("weights", key):
            gain, _ = ops.gain_of(name, args, kwargs)
            weight = ops.weight_of(name, args, kwargs)
            at, word = (2, "mat2") if name == "addmm" else (1, "weight")
            factor = math.sqrt(self._gain / gain) if gain > 0 else 1.0
            given, kwargs = _put(given, kwargs, at, word, weight * factor)
            changed = True
        return function(*given, **kwargs) if changed else NotImplemented

    @staticmethod
    def _by_the_batch(args: Any, kwargs: Any) -> Any:
        def argument(*at: Any) -> Any:
            return ops.argument_of(args, kwargs, *at)

        x, eps = args[0], float(argument(7, "eps", 1e-5))
        if argument(5, "training", False) or x.numel() == x.shape[1]:
            return NotImplemented
        return F.batch_norm(
            x, None, None, argument(3, "weight"), argument(4, "bias"), True, 0.0, eps
        )

    def _sum(self, node: Node, key: Key, function: Any, args: Any, kwargs: Any) -> Any:
        y = None
        if self._away("constants", key) and len(node.parents) == 1:
            signal = next((x for x in args if isinstance(x, torch.Tensor)), None)
            size = 0.0 if signal is None else _rms(signal)
            given = [_without(x, size) for x in args]
            y = function(*given, **kwargs)
        if self._away("sums", key) and self._trace.is_sum(node):
            y = function(*args, **kwargs)
            largest = max((_rms(x) for x in args if isinstance(x, torch.Tensor)), default=0.0)
            y = y * (largest / max(_rms(y), 1e-30))
        return NotImplemented if y is None else y

    def _one_position(self, node: Node, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """One position instead of a function of several."""
        y = function(*args, **kwargs)
        if name == "multi_head_attention_forward":
            length = args[0].shape[0]
            others = ~torch.eye(length, dtype=torch.bool, device=args[0].device)
            alone = kwargs | {"attn_mask": others, "is_causal": False}
            return function(*args, **alone) if args[1].shape[0] == length else y
        if not isinstance(y, torch.Tensor):
            return y
        signals = [x for _, x in tensors((args, kwargs)) if x.is_floating_point()]
        if name == "scaled_dot_product_attention":
            return args[2] if args[2].shape == y.shape else y
        if name in _MATRIX or name.startswith(("index_add", "scatter")):
            same = [x for x in signals if x.shape == y.shape]
            if same:
                return _sized(same[-1], y)
        x = signals[0]
        unit = self._trace.nodes[node.parents[0]].unit if node.parents else None
        if "pool" in name and x.ndim == y.ndim:
            for dim in range(2, x.ndim):
                at = (torch.arange(y.shape[dim]) + 0.5) * x.shape[dim] / y.shape[dim]
                x = x.index_select(dim, at.long().to(x.device))
            return x
        picked = _picked(x, y, unit)
        if picked is None:
            return y
        return picked if name in ("mean", "amax", "max") else _sized(picked, y)


def _picked(x: torch.Tensor, y: torch.Tensor, unit: int | None) -> torch.Tensor | None:
    """The middle of the dimensions of x that y lacks or has at size 1; ``None`` if the inputs or
    the units are among them."""
    kept = list(x.shape)
    if x.ndim == y.ndim:
        gone = [d for d in range(x.ndim) if y.shape[d] == 1 < kept[d]]
    else:
        gone = next(
            (
                list(range(first, first + x.ndim - y.ndim))
                for first in range(1, y.ndim + 1)
                if tuple(kept[:first] + kept[first + x.ndim - y.ndim :]) == tuple(y.shape)
            ),
            [],
        )
    if not gone or 0 in gone or unit in gone or (unit is None and x.ndim - 1 in gone):
        return None
    for dim in sorted(gone, reverse=True):
        x = x.select(dim, x.shape[dim] // 2)
    return x.reshape(y.shape)


def _put(given: list[Any], kwargs: Any, at: int, word: str, value: Any) -> tuple[list[Any], Any]:
    if len(given) > at:
        return [*given[:at], value, *given[at + 1 :]], kwargs
    return given, kwargs | {word: value}


def _rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _sized(x: torch.Tensor, y: Any) -> Any:
    """x at the mean square of y."""
    if not isinstance(y, torch.Tensor) or x.shape != y.shape or not x.is_floating_point():
        return y
    return x * (_rms(y) / max(_rms(x), 1e-30))


def _is_constant(x: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return False
    return x.ndim == 0 or len(x) == 1 or bool((x == x[:1]).all())


def _without(x: Any, size: float) -> Any:
    """0 in place of a constant; masks, and small numbers that keep a divisor from 0, stay."""
    if isinstance(x, torch.Tensor):
        if x.is_floating_point() and x.numel() and bool((x < -1e3).any() & (x == 0).any()):
            return x
        return torch.zeros_like(x) if _is_constant(x) or x.ndim < 2 else x
    return 0.0 if isinstance(x, Real) and abs(float(x)) > 0.3 * size else x
