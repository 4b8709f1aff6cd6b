"""Rises and falls of sigma^2 that the network does not take away."""

from __future__ import annotations

import math
from collections.abc import Iterator

from svlib.probing import operations as ops
from svlib.probing.findings import SCALE, Finding
from svlib.probing.functions import BOUNDED, ODD
from svlib.probing.graph import Graph, Node


def parts_of(graph: Graph, node: Node, column: str, start: int = -1) -> dict[str, float]:
    """Change of ln of a value by place along the way, from its last maximum or a start on."""
    way = [n for n in graph.way(node.number) if n.values is not None and n.values.sigma2 > 0]
    values = [max(getattr(n.values, column), 1e-12) for n in way]
    if start >= 0:
        first = next((i for i, n in enumerate(way) if n.number == start), 0)
    else:
        top = max(values[:-1], default=0.0)
        first = max((i for i, x in enumerate(values[:-1]) if x >= 0.9 * top), default=0)
    found: dict[str, float] = {}
    for a, b, one in zip(values[first:], values[first + 1 :], way[first + 1 :], strict=False):
        found[one.place] = found.get(one.place, 0.0) + math.log(b / a)
    return found


def scale(graph: Graph) -> Iterator[Finding]:
    """The largest rise and the largest fall of sigma^2 that the network does not take away."""
    for kind, falling in (("explosion", False), ("loss of scale", True)):
        factors: dict[int, tuple[float, int]] = {}
        starts = _starts(graph, falling=falling)
        for node in graph.judged:
            start, size = starts[node.number], _size(_effective(graph, node))
            known = _size(graph.nodes[start]) if start is not None else 0.0
            if known > 0 and size > 0 and start is not None:
                factors[node.number] = size / known, start
        beyond = {
            n: x
            for n, x in factors.items()
            if (1 / x[0] if falling else x[0]) > SCALE and _matters(graph, n, falling)
        }
        if not beyond:
            continue
        number = max(beyond, key=lambda n: abs(math.log(beyond[n][0])))
        (factor, start), place = beyond[number], graph.nodes[number].place
        node, before = _effective(graph, graph.nodes[number]), graph.nodes[start]
        parts = parts_of(graph, node, "sigma2", start)
        sign = -1 if falling else 1
        steepest = max(parts, key=lambda p: sign * parts[p], default=place)
        text = f"σ² goes from {_size(before):.2g} at {before.place!r} to "
        text += f"{_size(node):.2g} at {place!r} with no normalization between"
        alone = sign * parts.get(steepest, 0.0) > 0.5 * abs(math.log(factor))
        text += f", {math.exp(parts[steepest]):.2g} times at {steepest!r}." if alone else "."
        size = 1 / factor if falling else factor
        yield Finding(kind, steepest if alone else place, text, factor, math.log10(size / SCALE),
                      parts=parts, number=node.number, start=start)  # fmt: skip


def _starts(graph: Graph, *, falling: bool) -> list[int | None]:
    """Where the scale of each node was set last: at an input, a norm or a bounded function, of
    which those through 0 do not make good that their input is small."""
    bounds = BOUNDED - ODD if falling else BOUNDED
    found: list[int | None] = []
    for node in graph.nodes:
        sets = node.norm or node.function in bounds or isinstance(node.operation, ops.Input)
        if sets and node.values is not None:
            found.append(node.number)
            continue
        known = [n for p in node.parents if graph.nodes[p].varies and (n := found[p]) is not None]
        sizes = [(_size(graph.nodes[n]), n) for n in known]
        first = node.number if node.values is not None and graph.is_judged(node.number) else None
        found.append(max(sizes)[1] if sizes else first)
    return found


def _effective(graph: Graph, node: Node) -> Node:
    """The node behind the constants that multiply an output next."""
    while len(graph.children[node.number]) == 1:
        child = graph.nodes[graph.children[node.number][0]]
        if child.values is None or not isinstance(child.operation, ops.Affine | ops.Move):
            break
        node = child
    return node


def _size(node: Node) -> float:
    return 0.0 if node.values is None else node.values.sigma2


def _matters(graph: Graph, number: int, falling: bool) -> bool:
    """Whether a scale reaches an output."""
    seen: dict[int, bool] = {}
    bounds = BOUNDED - ODD if falling else BOUNDED

    def reaches(at: int) -> bool:
        if at not in seen:
            seen[at] = False
            behind = graph.next(at)
            last = not behind and (not falling or (graph.nodes[at].weights and at != number))
            seen[at] = last or any(map(passes, behind, [at] * len(behind)))
        return seen[at]

    def passes(child: Node, at: int) -> bool:
        size, before = _size(child), _size(_effective(graph, graph.nodes[at]))
        if child.norm:  # unless what it gets is below its eps
            gamma2 = getattr(child.operation, "gamma2", 0.0)
            return falling and size < 0.1 * gamma2
        if falling and graph.is_sum(child) and size > 2 * before:
            return False
        if any(n.function in bounds for n in _between(graph, at, child)):
            return False
        return reaches(child.number)

    return reaches(number)


def _between(graph: Graph, number: int, child: Node) -> list[Node]:
    above = graph.upstream(child.number)
    return [n for n in above if number < n.number < child.number and number in
            {u.number for u in graph.upstream(n.number)}]  # fmt: skip
