"""The questions that are asked of a trace: what feeds a node, what is judged, where a way leads.

What is judged follows from modules and graph: outputs of weighted layers, of normalizations, and
sums of two signals, unless they open a gate (all ways on lead through a bounded or positive
function into a product) or do not depend on inputs that vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd

from svlib.probing import operations as ops
from svlib.probing.functions import (
    ATTENTION,
    AVERAGES,
    HALF_OPENING,
    MULTIPLYING,
    OPENING,
    PASSING,
    POOLS,
)
from svlib.probing.passes import Key
from svlib.probing.rows import Values


@dataclass(eq=False)
class Node:
    """An output of a function (of a module, where no function was seen) on the way of the inputs.

    Attributes:
        place: Where it is: name of the layer, or of the module and the function called in it.
        parents: Numbers of the nodes whose outputs it took.
        values: What was measured, ``None`` if the inputs are not apart in it or it holds no real
            numbers. A view has those of what it views.
        varies: Whether it depends on an input that differs within the batch.
        weights: Whether it is the output of a weighted layer.
        finite: Whether all entries are.
        gradient2: Mean square of the gradient, where it was measured.
    """

    number: int
    function: str
    place: str
    operation: ops.Operation
    parents: tuple[int, ...] = ()
    values: Values | None = None
    varies: bool = True
    weights: bool = False
    norm: bool = False
    finite: bool = True
    is_output: bool = False
    view: bool = False
    key: Key = ()
    rows: tuple[str, ...] = ()
    origins: frozenset[int] = frozenset()
    shape: tuple[int, ...] = ()
    unit: int | None = None
    gradient2: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)  # parameters and mean squares


class Graph:
    """The nodes of a pass, and how they are connected."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    @cached_property
    def gates(self) -> frozenset[int]:
        """Nodes whose every way on leads through a bounded or positive function to a product."""
        return gates_of(self)

    @cached_property
    def children(self) -> list[list[int]]:
        """Numbers of the nodes that took each node's output."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for parent in node.parents:
                found[parent].append(node.number)
        return found

    def is_sum(self, node: Node) -> bool:
        """Whether a node adds two signals that vary."""
        varying = [p for p in node.parents if self.nodes[p].varies and self.nodes[p].values]
        return node.function in ops.SUMS and len(varying) > 1

    @cached_property
    def judged(self) -> list[Node]:
        """Nodes that are judged, in execution order."""
        return [
            node
            for node in self.nodes
            if (node.weights or node.norm or self.is_sum(node))
            and node.varies
            and node.values is not None
            and node.number not in self.gates
        ]

    @cached_property
    def _judged(self) -> frozenset[int]:
        return frozenset(node.number for node in self.judged)

    def is_judged(self, number: int) -> bool:
        """Whether a node is judged."""
        return number in self._judged

    def way(self, number: int) -> list[Node]:
        """From an input to a node, along the parents of largest sigma^2 that vary."""
        way = [self.nodes[number]]
        while parents := [self.nodes[p] for p in way[0].parents if self.nodes[p].varies]:
            held = [node for node in parents if node.values is not None] or parents
            sizes = [-1.0 if node.values is None else node.values.sigma2 for node in held]
            way.insert(0, held[sizes.index(max(sizes))])
        return way

    def next(self, number: int) -> list[Node]:
        """The nearest judged nodes behind a node."""
        found, open_, seen = [], [*self.children[number]], {number}
        while open_:
            at = open_.pop(0)
            if at not in seen:
                seen.add(at)
                if at in self._judged:
                    found.append(self.nodes[at])
                else:
                    open_ += self.children[at]
        return found

    def leaves(self, number: int) -> bool:
        """Whether a node reaches an output with no judged node behind."""
        return not self.next(number)

    def upstream(self, number: int) -> list[Node]:
        """The nodes that a node depends on, and itself, in execution order."""
        found, open_ = {number}, [number]
        while open_:
            for parent in self.nodes[open_.pop()].parents:
                if parent not in found:
                    found.add(parent)
                    open_.append(parent)
        return [self.nodes[at] for at in sorted(found)]

    def change(self, node: Node, column: str = "spread") -> float:
        """Change of the logarithm of v^2/sigma^2 (or another value) from the largest of its parents
        to a node."""
        parents = [self.nodes[p] for p in node.parents if self.nodes[p].varies]
        held = [p for p in parents if p.values is not None]
        if node.values is None or not held:
            return 0.0
        before = max(held, key=lambda p: -1.0 if p.values is None else p.values.sigma2)
        a, b = getattr(before.values, column), getattr(node.values, column)
        return math.log(max(b, 1e-12) / max(a, 1e-12))

    def frame(self) -> pd.DataFrame:
        """The nodes as a table: place, function, whether judged, sigma2, m2, v2 and fraction."""
        return pd.DataFrame(
            {
                "place": node.place,
                "function": node.function,
                "judged": node.number in self._judged,
                **{
                    name: math.nan if node.values is None else getattr(node.values, name)
                    for name in ("m2", "v2", "sigma2", "fraction", "dead")
                },
                "parents": node.parents,
            }
            for node in self.nodes
        )


def gates_of(graph: Graph) -> frozenset[int]:
    """Nodes whose every way on leads through a bounded or positive function to a product.

    What leads through one that small entries pass (ReLU, SiLU, tanh) is the gate unless the other
    factor comes through one that is bounded and positive.
    """
    ways: dict[tuple[int, int], bool] = {}

    def opened(number: int) -> int:
        """What the nearest function in front of a factor makes of it: 2 a gate, 1 half of one."""
        node = graph.nodes[number]
        while node.parents and node.function not in OPENING | HALF_OPENING | ops.WEIGHTED:
            node = graph.nodes[node.parents[0]]
        return 2 if node.function in OPENING else int(node.function in HALF_OPENING)

    def opens(number: int, bounded: int) -> bool:
        if (number, bounded) in ways:
            return ways[number, bounded]
        ways[number, bounded] = False
        children = [graph.nodes[child] for child in graph.children[number]]
        found = bool(children) and not graph.nodes[number].is_output
        for child in children:
            several = len(child.parents) > 1
            if child.function in ATTENTION:
                found &= child.parents[-1] != number or len(child.parents) == 1
            elif child.function in MULTIPLYING and several:
                scores = child.function in MULTIPLYING - ops.PRODUCTS
                others = [opened(p) for p in child.parents if p != number]
                found &= bounded > min(1, max(others)) or (scores and opens(child.number, 0))
            elif child.function in ops.SUMS and not several:
                found &= opens(child.number, 2)  # 1 + x
            elif child.function in OPENING:
                found &= opens(child.number, 2)
            elif child.function in HALF_OPENING:
                found &= opens(child.number, max(1, bounded))
            elif child.function in ops.WEIGHTED | POOLS:  # squeeze and excitation
                found &= opens(child.number, 0)
            elif child.function in PASSING | ops.PRODUCTS | ops.QUOTIENTS | ops.NORMS:
                found &= opens(child.number, bounded)
            else:
                found = False
        ways[number, bounded] = found
        return found

    return frozenset(node.number for node in graph.nodes if opens(node.number, 0))


def _relative(node: Node) -> float:
    """g² v² of a layer that tells inputs apart, else 0."""
    held = node.values is not None and node.values.fraction > 1e-9
    return node.gradient2 * node.values.v2 if held and node.values is not None else 0.0


def gradient_steps(graph: Graph) -> dict[tuple[str, str], float]:
    """Change of ln(g² v²), which is the gradient by a relative change, from a weighted layer
    back to the one before, along the chain of layers in which it changes most. They have one
    shape, and no sum, average or fork between: those change it too."""
    chains: dict[int, dict[tuple[str, str], float]] = {}
    for b in (n for n in graph.judged if n.weights and n.gradient2 > 0):
        way = graph.way(b.number)[:-1]
        before = next((i for i in reversed(range(len(way))) if way[i].weights), None)
        chains[b.number] = {}
        if before is None:
            continue
        a, between = way[before], way[before + 1 :]
        averages = any(n.function in AVERAGES or graph.is_sum(n) for n in between)
        if averages or a.shape != b.shape or not a.gradient2 > 0 or _forks(graph, a, b):
            continue
        sizes = [_relative(x) for x in (a, b)]
        if not min(sizes) > 0:
            continue
        step = math.log(sizes[0] / sizes[1])
        chains[b.number] = {**chains.get(a.number, {}), (a.place, b.place): step}
    return max(chains.values(), key=lambda x: abs(sum(x.values())), default={})


def _forks(graph: Graph, a: Node, b: Node) -> bool:
    """Whether a way leads on from a to a sum, other weights or an output, and not through b."""
    open_, seen = [*graph.children[a.number]], set[int]()
    while open_:
        at = open_.pop()
        if at in seen or at == b.number:
            continue
        seen.add(at)
        node = graph.nodes[at]
        if node.is_output or node.weights or graph.is_sum(node):
            return True
        open_ += graph.children[at]
    return False
