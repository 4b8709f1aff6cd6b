"""Faults that a trace shows: each is one measured quantity with a threshold.

A finding says how many decades its number is beyond the threshold; findings are ordered by that.
What the network itself takes away again (a normalization behind a small output, a larger stream
that a branch is added to), and what is so by design (last layers that start at 0), is no finding or
a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from svlib.probing import operations as ops
from svlib.probing.places import Places
from svlib.probing.trace import BOUNDED, Node, Trace

COLLAPSED = 0.1
"""v^2/sigma^2 below which an output counts as collapsed."""
SCALE = 100.0
"""Factor between the sigma^2 of outputs, with no normalization between them, that is reported."""
DEAD = 0.25
"""Fraction of units that a rectifier lets nothing through of, for no input, that is reported."""
SATURATED = 0.5
"""Fraction of an activation's outputs within 1 % of its ends that is reported."""
SHARP = 0.9
"""Mean largest weight of a softmax that is reported."""
FOREIGN = 10.0
"""Mean square of a batch in units of BatchNorm's running statistics, or 1 over it."""
OFF = 3.0
"""Root mean square of the means of an input's columns, over that of their deviations."""
APART = 30.0
"""Deviation of a column of an input, over the median of its columns."""
SIZE = 10.0
"""Size of an input, or 1 over it."""
GROWTH = 1000.0
"""Growth of squared gradients backwards through layers of one size, or 1 over it."""
WORSE = 1.5
"""Loss at the start over that of an output of 0."""
PADDED = 0.2
"""Fraction of padding in an input."""
_BEYOND_ALL = 16.0  # decades of what is exactly 0
_NOTHING_PASSES = 14.0


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        kind: "collapse", "explosion", "loss of scale", "dead units", "no signal", "saturation",
            "statistics", "inputs", "output scale", "mixing", "gradients", "not finite", or
            "nothing found".
        place: The layer, or the function in a module, where it is.
        text: The observation in words.
        value: The number that is beyond its threshold.
        decades: How far, in powers of ten.
        note: Whether it seldom hurts.
        cause: What removing helped most, in words.
        removed: The number with suspects taken away, one after the other, by words.
        cure: Code that was tried and made it better.
        parts: Change of the logarithm of v^2/sigma^2 (or sigma^2) by place along the way; they add
            up to that of the text.
    """

    kind: str
    place: str
    text: str
    value: float
    decades: float = 0.0
    note: bool = False
    cause: str = ""
    removed: Mapping[str, float] = field(default_factory=dict)
    cure: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    number: int = -1  # of the node at which causes are looked for
    start: int = -1

    def __str__(self) -> str:
        words = f"{'note, ' * self.note}{self.kind}: {self.text}"
        if self.removed:
            told = [f"{value:.2g} {words}" for words, value in self.removed.items()]
            words += f" {'; then '.join(told)}."
        return f"{words} {self.cure}".strip()


def found(trace: Trace, places: Places | None = None) -> list[Finding]:
    """All findings of a trace, those furthest beyond their thresholds first, then the notes."""
    detectors: tuple[Callable[[Trace], Iterator[Finding]], ...] = (
        _not_finite, _inputs, _statistics, _saturation, _dead, _no_signal, _collapse, _scale,
        _gradients,
    )  # fmt: skip
    listed = [finding for detector in detectors for finding in detector(trace)]
    if places is not None and places.mixing:
        listed.append(_mixing(places.mixing))
    return sorted(listed, key=lambda x: (x.note, -x.decades, x.number))


def _mixing(place: str) -> Finding:
    text = f"the output of {place!r} for one input changes with the other inputs of the batch "
    text += "(evaluation mode, 3 inputs against 2)."
    return Finding("mixing", place, text, math.nan, 2.0)


def _not_finite(trace: Trace) -> Iterator[Finding]:
    bad = [node for node in trace.nodes if not node.finite]
    for node in bad[:1]:
        if node.weights or node.norm or trace.next(node.number) or node.is_output:
            masked = node.function in ("add", "masked_fill", "where") and not node.weights
            children = [trace.nodes[n] for n in trace.children[node.number]]
            if masked and any(child.finite for child in children):
                continue  # scores under a mask, before softmax
            text = f"the output of {node.place!r} holds NaN or infinite entries."
            yield Finding("not finite", node.place, text, math.nan, math.inf, number=node.number)


def _inputs(trace: Trace) -> Iterator[Finding]:
    inputs = [node for node in trace.nodes if isinstance(node.operation, ops.Input)]
    if inputs and not any(node.varies for node in inputs):
        text = "all inputs of the batch are equal, so nothing can vary over them."
        yield Finding("inputs", inputs[0].place, text, 0.0, _BEYOND_ALL)
    for node in inputs:
        padded = node.extra.get("padding", 0.0)
        if padded > PADDED:
            text = f"{padded:.0%} of the positions of {node.place!r} look like padding, and count "
            text += "as positions: give mask=, or inputs of one length."
            yield Finding("inputs", node.place, text, padded, math.log10(padded / PADDED))
        if "rms" not in node.extra or not _is_weighed(trace, node):
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
            text = f"the input {node.place!r} is not standardized: {', and '.join(told)}."
            worst = max(beyond)[0]
            yield Finding("inputs", node.place, text, worst, math.log10(worst), number=node.number)


def _is_weighed(trace: Trace, node: Node) -> bool:
    """Whether weights take an input as it is, or moved."""
    for child in trace.children[node.number]:
        one = trace.nodes[child]
        if one.function in ops.WEIGHTED:
            return True
        if isinstance(one.operation, ops.Move) and _is_weighed(trace, one):
            return True
    return False


def _statistics(trace: Trace) -> Iterator[Finding]:
    worst: dict[str, tuple[float, Node]] = {}
    for node in trace.nodes:
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
    untrained = node.extra.get("updates") == 0 and size < FOREIGN**4
    if node.extra.get("updates") == 0:
        text += " It has never been trained."
    yield Finding("statistics", node.place, text, ratio, math.log10(size / FOREIGN), untrained,
                  number=node.number)  # fmt: skip


def _saturation(trace: Trace) -> Iterator[Finding]:
    for name, limit, words in (
        ("sharpness", SHARP, "the largest weight of softmax {!r} is {:.2g} in the mean: one entry "
         "takes all"),
        ("saturated", SATURATED, "{!r} has {:.0%} of its outputs at its ends, where it is flat"),
    ):  # fmt: skip
        held = [n for n in trace.nodes if n.extra.get(name, 0.0) > limit and n.varies]
        if name == "sharpness":
            held = [n for n in held if trace.children[n.number] or n.function != "softmax"]
        if held:
            node = max(held, key=lambda n: n.extra[name])
            value = node.extra[name]
            text = words.format(node.place, value)
            text += f" ({len(held)} such)." if len(held) > 1 else "."
            beyond = (1 - limit) / max(1 - value, 1e-6)
            yield Finding("saturation", node.place, text, value, math.log10(beyond),
                          number=node.number)  # fmt: skip
    for node in trace.nodes:
        for gate, value in node.extra.items():
            if gate.endswith(" gate") and not 0.02 < value < 0.98:
                ends = min(value, 1 - value)
                text = f"the {gate} of {node.place!r} is {value:.2g} in the mean."
                yield Finding("saturation", node.place, text, value,
                              math.log10(0.02 / max(ends, 1e-9)), number=node.number)  # fmt: skip


def _dead(trace: Trace) -> Iterator[Finding]:
    held = [n for n in trace.nodes if n.extra.get("dead", 0.0) > DEAD and n.varies]
    held = [n for n in held if _signal_in(trace, n) > 0 and n.number not in trace.gates]
    if not held:
        return
    node = max(held, key=lambda n: (n.extra["dead"], -n.number))
    share = node.extra["dead"]
    feed = feeding(trace, node)
    text = (
        f"{share:.0%} of the units of {feed.place!r} pass nothing through {node.function} for any "
    )
    text += f"input{f' ({len(held)} such layers)' if len(held) > 1 else ''}."
    decades = _NOTHING_PASSES if share == 1 else math.log10(share / DEAD)
    yield Finding("dead units", feed.place, text, share, decades, number=node.number)


def _signal_in(trace: Trace, node: Node) -> float:
    values = trace.nodes[node.parents[0]].values
    return 0.0 if values is None else values.sigma2


def feeding(trace: Trace, node: Node) -> Node:
    """The nearest weighted layer in front of a node, or the node."""
    for one in reversed(trace.way(node.number)):
        if one.weights:
            return one
    return node


def _no_signal(trace: Trace) -> Iterator[Finding]:
    zero = [n for n in trace.judged if n.values is not None and n.values.sigma2 == 0]
    for node in zero[:1]:
        behind = trace.next(node.number)
        added = [n for n in behind if n.values is not None and n.values.sigma2 > 0]
        blocked = any(n.extra.get("dead") == 1 for n in trace.upstream(node.number))
        if added or blocked:  # to a signal; by what is found already
            continue
        last = not behind
        text = f"the output of {node.place!r} is 0 for every input"
        if isinstance(node.operation, ops.Weights) and node.operation.gain == 0:
            text += ": its weights are 0"
        text += ", as a last layer may be on purpose." if last else ", and so is what follows."
        yield Finding("no signal", node.place, text, 0.0, 0.0 if last else _BEYOND_ALL, last,
                      number=node.number)  # fmt: skip


def _collapse(trace: Trace) -> Iterator[Finding]:
    """The output that tells inputs apart least, of those that no later one makes good."""
    low = {n.number for n in trace.judged if collapsed(n)}
    stays: dict[int, bool] = {}  # to an output
    for n in sorted(low, reverse=True):
        behind = trace.next(n)
        stays[n] = not behind or any(stays.get(b.number, False) for b in behind)
    faulty = [trace.nodes[n] for n in sorted(low) if stays[n]]
    if not faulty:
        return
    first = faulty[0]
    family = {n.number for n in faulty} & {
        n.number
        for n in trace.nodes
        if first.number in {u.number for u in trace.upstream(n.number)}
    }
    node = min((trace.nodes[n] for n in family), key=lambda n: n.values.fraction if n.values else 1)
    values = node.values
    assert values is not None
    column = "fraction" if values.fraction < COLLAPSED else "spread"
    parts = _parts(trace, node, column)
    steepest = min(parts, key=parts.__getitem__, default=node.place)
    spread = max(getattr(values, column), 0.0)
    if values.fraction < COLLAPSED:
        text = f"v²/σ² is {spread:.2g} at {node.place!r}"
    else:
        text = f"inputs point in nearly one direction at {node.place!r}: 1 minus their mean cosine "
        text += f"is {spread:.2g}"
    if parts and parts[steepest] < 0.5 * sum(parts.values()):
        text += f", and falls most at {steepest!r}, {math.exp(parts[steepest]):.2g} times"
    elif first is not node:
        text += f", and below {COLLAPSED} from {first.place!r} on"
    decades = math.log10(COLLAPSED / max(spread, 1e-12))
    place = steepest if parts and parts[steepest] < 0.5 * sum(parts.values()) else first.place
    yield Finding("collapse", place, f"{text}.", spread, decades, parts=parts, number=node.number)


def collapsed(node: Node) -> bool:
    """Whether v^2/sigma^2 is below the threshold by more than its sampling."""
    values = node.values
    if values is None or not values.sigma2 > 0:
        return False
    return values.spread * (1 + math.sqrt(2 / (values.samples - 1))) < COLLAPSED


def _parts(trace: Trace, node: Node, column: str, start: int = -1) -> dict[str, float]:
    """Change of ln of a value by place along the way, from its last maximum or a start on."""
    way = [n for n in trace.way(node.number) if n.values is not None and n.values.sigma2 > 0]
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


def _scale(trace: Trace) -> Iterator[Finding]:
    """The largest rise and the largest fall of sigma^2 that the network does not take away."""
    factors: dict[int, tuple[float, int]] = {}
    starts = _starts(trace)
    for node in trace.judged:
        start, size = starts[node.number], _effective(trace, node)
        known = trace.nodes[start].values if start is not None else None
        if known is not None and known.sigma2 > 0 and size > 0 and start is not None:
            factors[node.number] = size / known.sigma2, start
    for kind, falling in (("explosion", False), ("loss of scale", True)):
        beyond = {
            n: x
            for n, x in factors.items()
            if (1 / x[0] if falling else x[0]) > SCALE and _matters(trace, n, falling)
        }
        if not beyond:
            continue
        number = max(beyond, key=lambda n: abs(math.log(beyond[n][0])))
        node, (factor, start) = trace.nodes[number], beyond[number]
        before, values = trace.nodes[start], node.values
        assert values is not None
        assert before.values is not None
        parts = _parts(trace, node, "sigma2", start)
        sign = -1 if falling else 1
        place = max(parts, key=lambda p: sign * parts[p], default=node.place)
        text = f"σ² goes from {before.values.sigma2:.2g} at {before.place!r} to "
        text += f"{values.sigma2:.2g} at {node.place!r} with no normalization between"
        alone = sign * parts.get(place, 0.0) > 0.5 * abs(math.log(factor))
        text += f", {math.exp(parts[place]):.2g} times at {place!r}." if alone else "."
        size = 1 / factor if falling else factor
        yield Finding(kind, place if alone else node.place, text, factor, math.log10(size / SCALE),
                      parts=parts, number=number, start=start)  # fmt: skip


def _starts(trace: Trace) -> list[int | None]:
    """Where the scale of each node was set last: at an input, a norm or a bounded function."""
    found: list[int | None] = []
    for node in trace.nodes:
        sets = node.norm or node.function in BOUNDED or isinstance(node.operation, ops.Input)
        if sets and node.values is not None:
            found.append(node.number)
            continue
        known = [n for p in node.parents if trace.nodes[p].varies and (n := found[p]) is not None]
        sizes = [(v.sigma2 if (v := trace.nodes[n].values) else 0.0, n) for n in known]
        first = node.number if node.values is not None and trace.is_judged(node.number) else None
        found.append(max(sizes)[1] if sizes else first)
    return found


def _effective(trace: Trace, node: Node) -> float:
    """sigma^2 behind the constants that multiply an output next."""
    while len(trace.children[node.number]) == 1:
        child = trace.nodes[trace.children[node.number][0]]
        if child.values is None or not isinstance(child.operation, ops.Affine | ops.Move):
            break
        node = child
    return 0.0 if node.values is None else node.values.sigma2


def _matters(trace: Trace, number: int, falling: bool) -> bool:
    """Whether a scale reaches an output."""
    seen: dict[int, bool] = {}

    def reaches(at: int) -> bool:
        if at not in seen:
            seen[at] = False
            behind = trace.next(at)
            last = not behind and (not falling or (trace.nodes[at].weights and at != number))
            seen[at] = last or any(map(passes, behind, [at] * len(behind)))
        return seen[at]

    def passes(child: Node, at: int) -> bool:
        values, before = child.values, _effective(trace, trace.nodes[at])
        assert values is not None
        if child.norm:  # unless what it gets is below its eps
            gamma2 = getattr(child.operation, "gamma2", 0.0)
            return falling and values.sigma2 < 0.1 * gamma2
        if falling and trace.is_sum(child) and values.sigma2 > 2 * before:
            return False
        if any(n.function in BOUNDED for n in _between(trace, at, child)):
            return False
        return reaches(child.number)

    return reaches(number)


def _between(trace: Trace, number: int, child: Node) -> list[Node]:
    above = trace.upstream(child.number)
    return [n for n in above if number < n.number < child.number and number in
            {u.number for u in trace.upstream(n.number)}]  # fmt: skip


def _gradients(trace: Trace) -> Iterator[Finding]:
    held = [n for n in trace.judged if n.weights and not math.isnan(n.gradient2)]
    zero = [n for n in held if n.gradient2 == 0 and n.values is not None and n.values.sigma2 > 0]
    blocked = any(n.extra.get("dead") == 1 for n in trace.nodes)  # which says why
    if any(n.gradient2 > 0 for n in held) and zero and not blocked:
        node = zero[-1]
        behind = [n for n in trace.next(node.number) if n.weights and n.values is not None]
        silent = [n for n in behind if getattr(n.operation, "gain", 1.0) == 0]
        if behind and len(silent) == len(behind):
            pass  # a branch that starts at 0
        elif behind and all(n.values is not None and n.values.v2 <= 1e-12 for n in behind):
            text = (
                f"100% of the units of {node.place!r} pass nothing on: no gradient comes back to "
            )
            text += f"it, and the output of {behind[0].place!r} does not vary."
            yield Finding("dead units", node.place, text, 1.0, _NOTHING_PASSES,
                          number=behind[0].number)  # fmt: skip
        else:
            text = f"no gradient comes back to {node.place!r} ({len(zero)} of {len(held)} layers)."
            yield Finding("gradients", node.place, text, 0.0, _BEYOND_ALL, number=node.number)
    steps = trace.gradient_steps()
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
