"""The trace of a forward pass: every function on the way from inputs to outputs, measured."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from svlib import _check
from svlib.probing import operations as ops
from svlib.probing.extras import extras, gates, padding
from svlib.probing.forward import Pass
from svlib.probing.functions import ATTENTION
from svlib.probing.graph import Graph, Node
from svlib.probing.models import (
    DEPTH,
    has_numbers,
    is_weighted,
    named_modules,
    row_name,
    storage,
    tensors,
)
from svlib.probing.passes import Output
from svlib.probing.places import RESHAPES
from svlib.probing.rows import Row


class Trace(Graph):
    """The nodes of one pass, and the questions that are asked of their graph."""

    def __init__(
        self,
        model: nn.Module,
        given: Any,
        samples: int,
        positions: str = "samples",
        *,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self._number = WeakTensorKeyDictionary()
        self._counts: Counter[str] = Counter()
        self._held: list[torch.Tensor] = []  # weights: an address may not be used again
        self._positions = positions
        with torch._C.DisableTorchFunction():  # other modes must not see what follows
            modules = dict(named_modules(model))
            self._parameters = {storage(x): name for name, x in model.named_parameters()}
            self._weighted = {name for name, module in modules.items() if is_weighted(module)}
            for name, x in named_inputs(model, given):
                node = _input(len(self.nodes), name, x, samples, positions, masked=masked)
                self._number[x] = node.number
                self.nodes.append(node)

    def observe(self, made: Output, running: Pass) -> bool:
        """Add an output; whether it is one that may have a row among all."""
        if made.module is not None:
            return self._of_module(made, running)
        given = made.given[:1] if made.function in ops.LENDS else made.given
        given = given[:3] if made.function in ATTENTION else given
        given = given[1:] if made.function == "where" else given
        parents = tuple(dict.fromkeys(self._number[x] for x in given if x in self._number))
        if not parents:
            return False
        nodes = [self.nodes[parent] for parent in parents]
        operation = _operation(made, nodes, lambda x: x in self._number)
        node = self._add(made, operation, parents, running)
        node.weights = made.function in ops.WEIGHTED and made.key[0] not in self._weighted
        owner = running.modules.get(str(made.key[0]))
        inside = owner is not None and computes(owner)
        return made.computed and not inside and may_have_row(made.y)

    def _of_module(self, made: Output, running: Pass) -> bool:
        y, module = made.y, made.module
        known = y in self._number
        if not known:  # functions of autograd are not seen as calls
            parents = tuple(dict.fromkeys(self._number[x] for x in made.given if x in self._number))
            if parents:
                self._add(made, ops.Beyond(made.function), parents, running)
        if y not in self._number or module is None:
            return False
        node = self.nodes[self._number[y]]
        if isinstance(count := getattr(module, "num_batches_tracked", None), torch.Tensor):
            node.extra["updates"] = float(count)
        if made.key[-1] == "[0]":
            node.extra |= gates(module, made.call, (y,))
        norm = None if node.function in ops.NORMS else ops.norm_of(module)
        if norm is not None:
            parents = tuple(self._number[x] for x in made.given if x in self._number)
            node.operation, node.norm, node.parents = norm, True, parents[:1] or node.parents
            node.function = norm.kind
        weighted = is_weighted(module) and y.is_floating_point()
        base = _viewed(self, node)
        fresh = not base.rows or computes(module) or weighted
        if weighted or (fresh and computes(module)):
            node.place = row_name(str(made.key[0] if weighted else made.name), int(made.key[1]))
            node.weights |= weighted
            if weighted and node.values is None and node.finite:
                _measure(node, made, running, self._positions)
        return may_have_row(y) and fresh

    def _add(
        self, made: Output, operation: ops.Operation, parents: tuple[int, ...], running: Pass
    ) -> Node:
        self._counts[made.name] += 1
        place = row_name(made.name, self._counts[made.name])
        if made.function in ops.WEIGHTED and made.key[0] in self._weighted:
            place = row_name(str(made.key[0]), int(made.key[1]))
        node = Node(len(self.nodes), made.function, place, operation, parents)
        node.key, node.norm = made.key, made.function in ops.NORMS
        node.varies = any(self.nodes[parent].varies for parent in parents)
        node.shape = tuple(made.y.shape)
        if made.function in ops.WEIGHTED:
            weight = ops.weight_of(made.function, *made.call)
            self._held.append(weight)
            node.origins = frozenset({storage(weight)})
        else:
            node.origins = frozenset[int]().union(*(self.nodes[p].origins for p in parents))
        if made.function in ops.SUMS | {"cat", "concat", "stack"}:
            held = [(self._parameters.get(storage(x)), x) for x in made.given]
            node.constants = {name: ops.mean_square(x) for name, x in held if name is not None}
        self._number[made.y] = node.number
        self.nodes.append(node)
        seen = self.nodes[parents[0]]
        _fill(node, seen, made, running, self._positions)
        return node

    def name_row(self, y: torch.Tensor, row: str) -> None:
        """Say that an output has a row of this name."""
        if y in self._number:
            node = self.nodes[self._number[y]]
            node.rows = (*node.rows, row)

    def is_output(self, output: Any) -> None:
        """Say what the model returned."""
        for _, y in tensors(output, objects=DEPTH):
            if y in self._number and y.is_floating_point():
                self.nodes[self._number[y]].is_output = True

    def finish(self) -> Trace:
        """Forget the tensors."""
        self._number, self._held = WeakTensorKeyDictionary(), []
        return self


def _viewed(graph: Graph, node: Node) -> Node:
    while node.view:
        node = graph.nodes[node.parents[0]]
    return node


def _fill(node: Node, seen: Node, made: Output, running: Pass, positions: str) -> None:
    """Measure an output whose first signal is that of another node."""
    if made.computed or made.function not in ops.MOVES:
        _measure(node, made, running, positions)
    else:
        node.values, node.finite, node.view = seen.values, seen.finite, True
    alike = isinstance(node.operation, ops.Affine | ops.Move) and made.y.shape == seen.shape
    if isinstance(seen.operation, ops.Input) and alike and not node.norm:
        node.operation = seen.operation  # an input that the model standardizes
        _describe(node, made.y, running.samples, positions)
    if has_numbers(made.y):
        node.extra |= extras(made, node.values, seen.values)


def _measure(node: Node, made: Output, running: Pass, positions: str) -> None:
    y = made.y
    if not (y.is_floating_point() and y.ndim > 1 and y.numel()):
        return
    try:
        y, dims = running.apart(made, node.place)
        node.unit = dims[1] if y is made.y else None
        row = Row(made.function, y, dims, positions, directions=True)
        node.values = row.update(y, dims, running.mask).values()
    except _check.NotFiniteError:
        node.finite = False
    except (ValueError, RuntimeError):  # not apart, fewer than two inputs, another mask
        return


def _operation(
    made: Output, nodes: list[Node], known: Callable[[torch.Tensor], bool]
) -> ops.Operation:
    """What theory needs to know of a function of the outputs of these nodes."""
    name, (args, kwargs) = made.function, made.call
    if name in ops.WEIGHTED:
        held = ops.weight_of(name, args, kwargs), ops.bias_of(name, args, kwargs)
        if any(x is not None and known(x) for x in held):
            return ops.Beyond(f"{name} with weights from the input")
    if name in ops.SUMS and len(nodes) == 2:
        if nodes[0].origins & nodes[1].origins:
            return ops.Beyond("add of dependent signals")
        return ops.Sum() if nodes[0].shape == nodes[1].shape else ops.Beyond("add")
    if len(nodes) > 1:
        return ops.Beyond(f"{name} of several signals")
    moved = name in RESHAPES and made.y.ndim == 2 < len(nodes[0].shape)
    if moved and sum(size > 1 for size in nodes[0].shape[1:]) > 1:
        return ops.Beyond("flatten of positions")
    try:
        return ops.operation_of(name, args, kwargs, made.y)
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError):
        return ops.Beyond(name)


def _input(
    number: int, name: str, x: torch.Tensor, samples: int, positions: str, *, masked: bool
) -> Node:
    """The node of an argument."""
    holds = x.ndim > 0 and len(x) == samples and x.layout is torch.strided
    varies = x.ndim > 0 and not (holds and samples > 1 and bool((x == x[:1]).all()))
    node = Node(number, "input", name, ops.Input(name, varies), varies=varies)
    node.origins, node.shape = frozenset({-1 - number}), tuple(x.shape)
    if varies and holds and not masked:
        node.extra["padding"] = padding(x)
    _describe(node, x, samples, positions)
    return node


def _describe(node: Node, x: torch.Tensor, samples: int, positions: str) -> None:
    """Measure an input: its values, its size, and how far its columns or channels are off 0."""
    known = x.is_floating_point() and x.layout is torch.strided and has_numbers(x)
    if not (known and x.ndim and len(x) == samples > 1 and bool(x.isfinite().all())):
        return
    x = x.detach()[:, None] if x.ndim == 1 else x.detach()
    unit = 1 if x.ndim > 3 else x.ndim - 1
    dims = 0, unit, tuple(dim for dim in range(1, x.ndim) if dim != unit)
    node.values, node.unit = Row("input", x, dims, positions).update(x, dims).values(), unit
    flat = x.movedim(unit, -1).flatten(0, -2).double()
    mean, deviation = flat.mean(0), flat.std(0)
    node.extra["rms"] = float(flat.square().mean().sqrt())
    varying = deviation[deviation > 0]
    if len(varying):
        node.extra["off"] = float((mean.square().mean() / deviation.square().mean()).sqrt())
        node.extra["column"] = float(mean.abs().argmax())
        node.extra["columns"] = float(deviation.max() / varying.median())
        node.extra["largest"] = float(deviation.argmax())


def computes(module: nn.Module) -> bool:
    """Whether a module is one of torch's own that computes; containers only pass on."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, nn.Sequential | nn.Identity)


def may_have_row(y: torch.Tensor) -> bool:
    """Whether an output may have a row among all."""
    return y.is_floating_point() and y.ndim > 1 and y.numel() > 0


def named_inputs(model: nn.Module, given: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor among a model's arguments (args, kwargs), with the name of its argument."""
    args, kwargs = given
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = [parameter.name for parameter in parameters if parameter.kind in kinds]
    except (TypeError, ValueError):
        named = []
    names: Iterable[str] = [
        *named[: len(args)],
        *(f"argument {n}" for n in range(len(named), len(args))),
    ]
    for name, value in (*zip(names, args, strict=False), *dict(kwargs).items()):
        for where, x in tensors(value, objects=DEPTH):
            yield f"{name}{where}", x
