"""Why a number is what it is, by removal: one suspect is taken away, and it is measured again.

Suspects are biases, the mean and scale of inputs, activations, averages over positions or inputs,
constants that are added or put beside the signal, BatchNorm's running statistics, the size of
weights, of sums and of branches, and dropout. The strongest is taken away first, then, with it
away, the strongest of the rest, until the number is sound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812, as torch's own documentation calls it

from svlib.probing import operations as ops
from svlib.probing.batches import Batch
from svlib.probing.models import structural_copy, tensors
from svlib.probing.passes import Key, Output, Watch
from svlib.probing.places import Places
from svlib.probing.rows import Pass, Row, Rows, Values
from svlib.probing.trace import ACTIVATIONS, AVERAGES, Node, Trace

Removed = Mapping[str, frozenset[Key] | None]  # suspect: the calls of functions, None all
_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"})
_JOINS = frozenset({"cat", "concat", "stack"})
_MATRIX = frozenset({"matmul", "rmatmul", "bmm", "mm", "einsum"})


class _Measured(Exception):  # noqa: N818, ends a pass early
    pass


@dataclass(frozen=True)
class Trial:
    """A batch, and the model on which suspects are taken away."""

    model: nn.Module
    batch: Batch
    trace: Trace
    places: Places | None
    positions: str

    def measure(self, targets: Mapping[str, Node], removed: Removed) -> dict[str, Values] | None:
        """Values at nodes with suspects taken away; ``None`` if the model then fails."""
        keys = {node.key: name for name, node in targets.items()}
        found: dict[str, Values] = {}
        with structural_copy(self.model) as copied:
            batch = _inputs_changed(self.batch.copied(copied), removed)
            running = Pass(
                copied, Rows(None, self.positions), batch.samples, batch.mask, self.places
            )

            def note(made: Output) -> None:
                running.units(made)
                if (name := keys.get(made.key)) is not None:
                    y, dims = running.apart(made, targets[name].place)
                    row = Row("", y, dims, self.positions, directions=True)
                    found[name] = row.update(y, dims, batch.mask).values()
                    if len(found) == len(keys):
                        raise _Measured

            watch = Watch(copied, note, None, _Replacing(self.trace, removed))
            try:
                with watch.watching():
                    batch.run(copied)
            except _Measured:
                return found
            except Exception:  # what is left is no network
                return None
        return found if len(found) == len(keys) else None


def present(trace: Trace, number: int) -> dict[str, list[Node]]:
    """The suspects on the way to a node, with the nodes at which they are."""
    found: dict[str, list[Node]] = {}

    def add(kind: str, node: Node) -> None:
        found.setdefault(kind, []).append(node)

    for node in trace.upstream(number):
        op, values = node.operation, node.values
        parents = [trace.nodes[p] for p in node.parents]
        if isinstance(op, ops.Input):
            if values is not None and values.m2 > 0.05 * values.sigma2:
                add("input mean", node)
            if node.extra.get("columns", 1.0) > 10 or not 0.1 < node.extra.get("rms", 1.0) < 10:
                add("input scale", node)
        if isinstance(op, ops.Weights):
            if op.bias.square > 0:
                add("biases", node)
            if not 1.6 < op.gain < 2.4:
                add("weights", node)
        if node.function in ACTIVATIONS and node.number not in trace.gates:
            add("activations", node)
        if node.function in AVERAGES and (not node.function.startswith("max") or len(node.parents)):
            add("averages", node)
        if node.function in _JOINS or (node.function in ops.SUMS and len(parents) == 1):
            add("constants", node)
        if "statistics" in node.extra:
            add("statistics", node)
        if isinstance(op, ops.Dropout) and op.keep < 1:
            add("dropout", node)
        if trace.is_sum(node):
            add("sums", node)
    return found


class _Replacing:
    """Runs something else instead of the functions that are taken away."""

    def __init__(self, trace: Trace, removed: Removed) -> None:
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
        if name in _DROPOUTS and self._away("dropout", key):
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
        if name in _JOINS and self._away("constants", key):
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
    """0 in place of a constant; small numbers that keep a divisor from 0 stay."""
    if isinstance(x, torch.Tensor):
        return torch.zeros_like(x) if _is_constant(x) or x.ndim < 2 else x
    return 0.0 if isinstance(x, Real) and abs(float(x)) > 0.3 * size else x


def _inputs_changed(batch: Batch, removed: Removed) -> Batch:
    scaled = "input scale" in removed
    if not scaled and "input mean" not in removed:
        return batch
    return batch.replaced(lambda x: standardized(x, batch.samples, scale=scaled))


def standardized(x: torch.Tensor, samples: int, *, scale: bool = True) -> torch.Tensor:
    """An argument without its mean over inputs and positions, and divided by its deviation, column
    by column or channel by channel; anything but floating-point inputs as it is."""
    if not x.is_floating_point() or x.ndim < 2 or len(x) != samples:
        return x
    unit = 1 if x.ndim > 3 else x.ndim - 1
    dims = [dim for dim in range(x.ndim) if dim != unit]
    centred = x - x.mean(dims, keepdim=True)
    if not scale:
        return centred
    deviation = centred.square().mean(dims, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)


@dataclass(frozen=True)
class Cause:
    """A suspect that was taken away, in words, and the number then."""

    kind: str
    noun: str
    words: str
    value: float
    node: Node | None


def causes(
    trial: Trial,
    number: int,
    targets: Mapping[str, Node],
    value: Callable[[dict[str, Values]], float],
    sound: Callable[[float], bool],
    better: Callable[[float, float], float],
    suspects: Callable[[str], bool] = lambda kind: True,
) -> list[Cause]:
    """What was taken away, in order, until the number is sound.

    ``better(new, old)`` is the gain of a number over another, a logarithm: above 0 where it is
    sounder.
    """
    before = trial.measure(targets, {})
    if before is None:
        return []
    now = first = value(before)
    there = {kind: at for kind, at in present(trial.trace, number).items() if suspects(kind)}
    removed: dict[str, frozenset[Key] | None] = {}
    found: list[Cause] = []
    while not sound(now) and len(found) < 3:
        tried: dict[str, float] = {}
        for kind in there.keys() - removed.keys():
            measured = trial.measure(targets, {**removed, kind: None})
            if measured is not None and math.isfinite(new := value(measured)):
                tried[kind] = new
        gains = {kind: better(new, now) for kind, new in tried.items()}
        kind = max(sorted(gains), key=gains.__getitem__, default="")
        if not kind or gains[kind] < math.log(1.25):
            break
        if kind == "input scale" and gains.get("input mean", 0.0) > 0.8 * gains[kind]:
            kind = "input mean"
        keys, node = _alone(
            trial, targets, removed, kind, there[kind], value, better, now, gains[kind]
        )
        removed[kind] = keys
        now = tried[kind]
        found.append(_cause(kind, now, node, there[kind]))
    del first
    return found


def _alone(
    trial: Trial,
    targets: Mapping[str, Node],
    removed: Removed,
    kind: str,
    nodes: list[Node],
    value: Callable[[dict[str, Values]], float],
    better: Callable[[float, float], float],
    now: float,
    gain: float,
) -> tuple[frozenset[Key] | None, Node | None]:
    """The one place whose removal does most of it, if there is one."""
    if kind.startswith("input"):
        return None, None
    if len(nodes) == 1:
        return None, nodes[0]
    falls = {node.number: abs(trial.trace.change(node)) for node in nodes}
    for node in sorted(nodes, key=lambda node: -falls[node.number])[:2]:
        keys = frozenset({node.key[:4]})
        measured = trial.measure(targets, {**removed, kind: keys})
        if measured is not None and better(value(measured), now) > 0.7 * gain:
            return None, node
    return None, None


_NAMES = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "leaky_relu": "leaky ReLU", "elu": "ELU"}


def _cause(kind: str, value: float, node: Node | None, nodes: list[Node]) -> Cause:
    functions = [x.function for x in nodes]
    function = max(sorted(set(functions)), key=functions.count)
    name = _NAMES.get(function, function)
    at = "" if node is None else f" of {node.place!r}"
    here = "" if node is None else f" at {node.place!r}"
    nouns = {
        "biases": ("biases" if node is None else f"the bias{at}", ""),
        "input mean": ("the mean of the inputs", "with centred inputs"),
        "input scale": ("the scale of the inputs", "with standardized inputs"),
        "activations": (name if node is None else f"{name}{here}", ""),
        "averages": (
            "averages over positions" if node is None else f"the average{here}",
            f"with one position instead of {'averages' if node is None else f'the average{here}'}",
        ),
        "constants": ("constants" if node is None else f"the constant{here}", ""),
        "statistics": (
            f"the running statistics of BatchNorm{here}", "with the batch's statistics in BatchNorm"
        ),
        "weights": (
            f"the size of the weights{at}", f"with weights{at} at He's rule"
        ),
        "dropout": ("dropout", ""),
        "sums": ("sums of branches", "with sums at the size of their larger part"),
    }  # fmt: skip
    noun, words = nouns[kind]
    return Cause(kind, noun, words or f"without {noun}", value, node)
