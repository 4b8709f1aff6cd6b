"""Faults that a graph shows: each is one measured quantity with a threshold.

A finding says how many decades its number is beyond the threshold; findings are ordered by that.
What the network itself takes away again (a normalization behind a small output, a larger stream
that a branch is added to), and what is so by design (last layers that start at 0), is no finding or
a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from svlib.probing import operations as ops
from svlib.probing.findings import (
    APART,
    BEYOND_ALL,
    COLLAPSED,
    DEAD,
    FOREIGN,
    GROWTH,
    NOTHING_PASSES,
    OFF,
    PADDED,
    SATURATED,
    SHARP,
    SIZE,
    Finding,
)
from svlib.probing.functions import SMOOTH
from svlib.probing.graph import Graph, Node, gradient_steps
from svlib.probing.places import Places
from svlib.probing.scaling import parts_of, scale

_MASKS = frozenset({"add", "masked_fill", "where"})
_JOINED = frozenset({"cat", "concat", "concatenate"})


def found(graph: Graph, places: Places | None = None) -> list[Finding]:
    """All findings of a graph, those furthest beyond their thresholds first, then the notes."""
    detectors: tuple[Callable[[Graph], Iterator[Finding]], ...] = (
        _not_finite, _inputs, _statistics, _saturation, _dead, _no_signal, _collapse, scale,
        _gradients,
    )  # fmt: skip
    listed = [finding for detector in detectors for finding in detector(graph)]
    if places is not None and places.mixing:
        listed.append(_mixing(places.mixing))
    return sorted(listed, key=lambda x: (x.note, -x.decades, x.number))


def _mixing(place: str) -> Finding:
    text = f"the output of {place!r} for one input changes with the other inputs of the batch "
    text += "(evaluation mode, 3 inputs against 2)."
    return Finding("mixing", place, text, math.nan, 2.0)


def _not_finite(graph: Graph) -> Iterator[Finding]:
    """The first output that is not finite and makes one that counts so; scores under a mask, which
    softmax makes finite, do not."""
    lasts: set[int] = set()
    for node in reversed(graph.nodes):
        behind = [n for n in graph.children[node.number] if n in lasts]
        if not node.finite and (behind or node.weights or node.norm or node.is_output):
            lasts.add(node.number)
            if behind and node.function in _MASKS and not node.weights:
                lasts.discard(node.number)  # what follows is named
    for number in sorted(lasts)[:1]:
        place = graph.nodes[number].place
        text = f"the output of {place!r} holds NaN or infinite entries."
        yield Finding("not finite", place, text, math.nan, math.inf, number=number)


def _inputs(graph: Graph) -> Iterator[Finding]:
    inputs = [(x, x.operation) for x in graph.nodes if isinstance(x.operation, ops.Input)]
    if inputs and not any(node.varies for node, _ in inputs):
        text = "all inputs of the batch are equal, so nothing can vary over them."
        yield Finding("inputs", inputs[0][1].name, text, 0.0, BEYOND_ALL)
    for node, operation in inputs:
        padded, name = node.extra.get("padding", 0.0), operation.name
        if padded > PADDED:
            text = f"{padded:.0%} of the positions of {name!r} look like padding, and count "
            text += "as positions: give mask=, or inputs of one length."
            yield Finding("inputs", name, text, padded, math.log10(padded / PADDED))
        if "rms" not in node.extra or not _is_weighed(graph, node):
            continue
        extra = node.extra
        size, off, apart = (extra.get(name, 1.0) for name in ("rms", "off", "columns"))
        large, wide = extra.get("column", 0), extra.get("largest", 0)
        size = max(size, 1 / size if size else 1.0)
        beyond = [
            (size / SIZE, f"its entries have size {extra['rms']:.2g}"),
            (off / OFF, f"its mean is {off:.2g} deviations, most in column {large:.0f}"),
            (apart / APART, f"column {wide:.0f} has {apart:.2g} times the median deviation"),
        ]
        told = [words for ratio, words in sorted(beyond, reverse=True) if ratio > 1]
        if told:
            text = f"the input {name!r} is not standardized: {', and '.join(told)}."
            worst = max(beyond)[0]
            yield Finding("inputs", name, text, worst, math.log10(worst), number=node.number)


def _is_weighed(graph: Graph, node: Node) -> bool:
    """Whether weights take an input as it is, moved, or beside others."""
    for child in graph.children[node.number]:
        one = graph.nodes[child]
        if one.function in ops.WEIGHTED:
            return True
        moved = isinstance(one.operation, ops.Move) or one.function in _JOINED
        if moved and _is_weighed(graph, one):
            return True
    return False


def _statistics(graph: Graph) -> Iterator[Finding]:
    worst: dict[str, tuple[float, Node]] = {}
    for node in graph.nodes:
        ratio = node.extra.get("statistics", 1.0)
        if node.varies and max(ratio, 1 / max(ratio, 1e-30)) > FOREIGN:
            worst[node.place] = ratio, node
    if not worst:
        return
    ratio, node = max(worst.values(), key=lambda x: abs(math.log(max(x[0], 1e-30))))
    size = max(ratio, 1 / max(ratio, 1e-30))
    text = (
        f"BatchNorm {node.place!r} runs with statistics that are not the batch's: in their units "
    )
    text += f"the batch has mean square {ratio:.2g} instead of 1"
    text += f" ({len(worst)} such)." if len(worst) > 1 else "."
    untrained = node.extra.get("updates") == 0  # a network as it starts
    if untrained:
        text += " It has never been trained."
    yield Finding("statistics", node.place, text, ratio, math.log10(size / FOREIGN), untrained,
                  number=node.number)  # fmt: skip


def _saturation(graph: Graph) -> Iterator[Finding]:
    for name, limit, words in (
        ("sharpness", SHARP, "the largest weight of softmax {!r} is {:.2g} in the mean: one entry "
         "takes all"),
        ("saturated", SATURATED, "{!r} has {:.0%} of its outputs at its ends, where it is flat"),
    ):  # fmt: skip
        held = [n for n in graph.nodes if n.extra.get(name, 0.0) > limit and n.varies]
        held = [n for n in held if not _opens_itself(graph, n)]
        if name == "sharpness":
            held = [n for n in held if graph.children[n.number] or n.function != "softmax"]
        if held:
            node = max(held, key=lambda n: n.extra[name])
            value = node.extra[name]
            text = words.format(node.place, value)
            text += f" ({len(held)} such)." if len(held) > 1 else "."
            beyond = (1 - limit) / max(1 - value, 1e-6)
            yield Finding("saturation", node.place, text, value, math.log10(beyond),
                          number=node.number)  # fmt: skip
    for node in graph.nodes:
        for gate, value in node.extra.items():
            if gate.endswith(" gate") and not 0.02 < value < 0.98:
                ends = min(value, 1 - value)
                text = f"the {gate} of {node.place!r} is {value:.2g} in the mean."
                yield Finding("saturation", node.place, text, value,
                              math.log10(0.02 / max(ends, 1e-9)), number=node.number)  # fmt: skip


def _opens_itself(graph: Graph, node: Node) -> bool:
    """Whether a function is the gate of what it was computed from, as in GELU written out."""
    own, at = _ways_to(graph, node.number) - {node.number}, node
    while len(graph.children[at.number]) == 1:
        before, at = at, graph.nodes[graph.children[at.number][0]]
        if at.function in ops.PRODUCTS and len(at.parents) > 1:
            others = {n for p in at.parents if p != before.number for n in _ways_to(graph, p)}
            return bool(others & own)
        if len(at.parents) > 1 or at.weights:
            break
    return False


def _ways_to(graph: Graph, number: int) -> set[int]:
    """A node and those in front of it, back to the first weighted layer."""
    found, open_ = set[int](), [number]
    while open_:
        at = graph.nodes[open_.pop()]
        found.add(at.number)
        open_ += () if at.weights else at.parents
    return found


def _dead(graph: Graph) -> Iterator[Finding]:
    held = [n for n in graph.nodes if n.extra.get("dead", 0.0) > DEAD and n.varies]
    held = [n for n in held if _signal_in(graph, n) > 0 and n.number not in graph.gates]
    held = [n for n in held if n.extra["dead"] > DEAD + _missed(graph, n)]
    if not held:
        return
    node = max(held, key=lambda n: (n.extra["dead"], -n.number))
    share = node.extra["dead"]
    feed = feeding(graph, node)
    text = (
        f"{share:.0%} of the units of {feed.place!r} pass nothing through {node.function} for any "
    )
    text += f"input{f' ({len(held)} such layers)' if len(held) > 1 else ''}."
    limit = DEAD + _missed(graph, node)
    decades = NOTHING_PASSES if share == 1 else math.log10(share / limit)
    yield Finding("dead units", feed.place, text, share, decades, number=node.number)


def _missed(graph: Graph, node: Node) -> float:
    """Fraction of a rectifier's units that so few inputs leave dead and a hundred would not, if
    preactivations are Gaussian with the measured m and v."""
    values = graph.nodes[node.parents[0]].values
    if values is None or values.samples >= 100 or node.function in SMOOTH or not values.v2 > 0:
        return 0.0
    z, weights = np.polynomial.hermite_e.hermegauss(60)
    negative = 0.5 * (1 + torch.erf(torch.tensor(z * values.ratio / math.sqrt(2))).numpy())
    few, many = ((negative**n) @ weights / weights.sum() for n in (values.samples, 100))
    return float(few - many)


def _signal_in(graph: Graph, node: Node) -> float:
    values = graph.nodes[node.parents[0]].values
    return 0.0 if values is None else values.sigma2


def feeding(graph: Graph, node: Node) -> Node:
    """The nearest weighted layer in front of a node, or the node."""
    for one in reversed(graph.way(node.number)):
        if one.weights:
            return one
    return node


def _no_signal(graph: Graph) -> Iterator[Finding]:
    zero = [n for n in graph.judged if n.values is not None and n.values.sigma2 == 0]
    for node in zero[:1]:
        behind = graph.next(node.number)
        added = [n for n in behind if n.values is not None and n.values.sigma2 > 0]
        blocked = any(n.extra.get("dead") == 1 for n in graph.upstream(node.number))
        if added or blocked:  # to a signal; by what is found already
            continue
        last = not behind
        text = f"the output of {node.place!r} is 0 for every input"
        if isinstance(node.operation, ops.Weights) and node.operation.gain == 0:
            text += ": its weights are 0"
        text += ", as a last layer may be on purpose." if last else ", and so is what follows."
        yield Finding("no signal", node.place, text, 0.0, 0.0 if last else BEYOND_ALL, last,
                      number=node.number)  # fmt: skip


def _collapse(graph: Graph) -> Iterator[Finding]:
    """The output that tells inputs apart least, of those that no later one makes good."""
    low = {n.number for n in graph.judged if collapsed(n)}
    stays: dict[int, bool] = {}  # to an output
    for n in sorted(low, reverse=True):
        behind = graph.next(n)
        stays[n] = not behind or any(stays.get(b.number, False) for b in behind)
    faulty = [graph.nodes[n] for n in sorted(low) if stays[n]]
    if not faulty:
        return
    first = faulty[0]
    family = {n.number for n in faulty} & {
        n.number
        for n in graph.nodes
        if first.number in {u.number for u in graph.upstream(n.number)}
    }
    node = min((graph.nodes[n] for n in family), key=lambda n: n.values.fraction if n.values else 1)
    values = node.values
    assert values is not None
    column = "fraction" if values.fraction < COLLAPSED else "spread"
    parts = parts_of(graph, node, column)
    steepest = min(parts, key=parts.__getitem__, default=node.place)
    alone = bool(parts) and parts[steepest] < min(0.5 * sum(parts.values()), -math.log(2))
    spread = max(getattr(values, column), 0.0)
    first = next(n for n in faulty if n.values and getattr(n.values, column) < COLLAPSED)
    if values.fraction < COLLAPSED:
        text = f"v²/σ² is {spread:.2g} at {node.place!r}"
    else:
        text = f"inputs point in nearly one direction at {node.place!r}: 1 minus their mean cosine "
        text += f"is {spread:.2g}"
    if alone:
        text += f", and falls most at {steepest!r}, {math.exp(-parts[steepest]):.2g} times"
    elif first is not node:
        text += f", and below {COLLAPSED} from {first.place!r} on"
    decades = math.log10(COLLAPSED / max(spread, 1e-12))
    place = steepest if alone else first.place
    yield Finding("collapse", place, f"{text}.", spread, decades, parts=parts, number=node.number)


def collapsed(node: Node) -> bool:
    """Whether v^2/sigma^2 is below the threshold by more than its sampling."""
    values = node.values
    if values is None or not values.sigma2 > 0:
        return False
    return values.spread * (1 + math.sqrt(2 / (values.samples - 1))) < COLLAPSED


def _starts_at_0(graph: Graph, node: Node) -> bool:
    """Whether a node is in branches that end in 0 before they are added to anything."""
    open_, seen = [*graph.children[node.number]], set[int]()
    while open_:
        at = graph.nodes[open_.pop()]
        if at.number in seen or (at.values is not None and at.values.sigma2 == 0):
            continue
        if at.is_output or graph.is_sum(at):
            return False
        seen.add(at.number)
        open_ += graph.children[at.number]
    return True


def _gradients(graph: Graph) -> Iterator[Finding]:
    held = [n for n in graph.judged if n.weights and not math.isnan(n.gradient2)]
    zero = [n for n in held if n.gradient2 == 0 and n.values is not None and n.values.sigma2 > 0]
    blocked = any(n.extra.get("dead") == 1 for n in graph.nodes)  # which says why
    if any(n.gradient2 > 0 for n in held) and zero and not blocked:
        node = zero[-1]
        behind = [n for n in graph.next(node.number) if n.weights and n.values is not None]
        if _starts_at_0(graph, node):
            pass
        elif behind and all(n.values is not None and n.values.v2 <= 1e-12 for n in behind):
            text = (
                f"100% of the units of {node.place!r} pass nothing on: no gradient comes back to "
            )
            text += f"it, and the output of {behind[0].place!r} does not vary."
            yield Finding("dead units", node.place, text, 1.0, NOTHING_PASSES,
                          number=behind[0].number)  # fmt: skip
        else:
            text = f"no gradient comes back to {node.place!r} ({len(zero)} of {len(held)} layers)."
            yield Finding("gradients", node.place, text, 0.0, BEYOND_ALL, number=node.number)
    steps = gradient_steps(graph)
    total = sum(steps.values())
    if abs(total) < math.log(GROWTH):
        return
    growth = math.exp(max(-700.0, min(700.0, total)))
    sign = 1 if total > 0 else -1
    steepest = max(steps, key=lambda pair: sign * steps[pair])
    first, last = next(iter(steps))[0], list(steps)[-1][1]
    words = "grow" if total > 0 else "shrink"
    text = f"squared gradients {words} {growth:.1g} times backwards from {last!r} to {first!r}"
    place = first
    if sign * steps[steepest] > 0.5 * abs(total):
        text, place = f"{text}, most of it from {steepest[1]!r} to {steepest[0]!r}", steepest[0]
    decades = (abs(total) - math.log(GROWTH)) / math.log(10)
    yield Finding("gradients", place, f"{text}.", growth, decades)
