"""Faults that a measurement shows: each with its cause, its share, and advice that helps.

A row is compared with the rows that feed it, never with its neighbours in the table. A fault that
the network itself takes away again (a normalization behind a small output, a larger stream that a
branch is added to) is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pandas as pd

from svlib.probing import along
from svlib.probing import operations as ops
from svlib.probing.calls import Call
from svlib.probing.graph import Graph, Place

COLLAPSED = 0.1
"""v^2/sigma^2 below which a layer counts as collapsed."""
SCALE = 100.0
"""Factor between the sigma^2 of rows, with no normalization between them, that is reported."""
DEAD = 0.25
"""Fraction of dead units before a rectifier that is reported."""
SATURATED = 9.0
"""sigma^2 before a saturating activation that is reported."""
PADDED = 0.2
"""Fraction of padding in an input that is reported."""
LARGE = 65504.0 / 8
"""Size of preactivations, or one over it, that is reported. Float16 ends at 65504."""


_PICKS = frozenset({"getitem", "split", "chunk", "narrow", "select", "unbind"})


class Finding(NamedTuple):
    """One sentence of a diagnosis: its kind, the observation, and advice, which may be empty."""

    kind: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}{' ' + self.advice if self.advice else ''}"


@dataclass(frozen=True)
class Fault:
    """A finding, how bad it is (0 is fatal), and the number of the call where it begins."""

    severity: int
    number: int
    finding: Finding


def faults(graph: Graph, table: pd.DataFrame) -> list[Finding]:
    """All faults, the worst first, of equal ones the cause before its consequences."""
    found = [
        *_inputs(graph), *_silent(graph), *_dead(graph, table), *_collapse(graph), *_scales(graph),
        *_branches(graph), *_saturated(graph), *_absolute(graph),
    ]  # fmt: skip
    return [fault.finding for fault in sorted(found, key=lambda x: (x.severity, x.number))]


def _inputs(graph: Graph) -> Iterator[Fault]:
    inputs = {n: call.operation for n, call in enumerate(graph.calls) if not call.parents}
    known = {n: op for n, op in inputs.items() if isinstance(op, ops.Input)}
    if known and not any(op.varies for op in known.values()):
        text = "all inputs of the batch are equal, so nothing can vary over them."
        yield Fault(0, -1, Finding("equal inputs", text, "Measure on different inputs."))
    for number, op in known.items():
        if op.padding > PADDED:
            text = f"{op.padding:.0%} of the positions of {op.name!r} look like padding, and they "
            text += "count as positions."
            advice = "Give mask=, or inputs of one length."
            yield Fault(0, -1, Finding("padding", text, advice))
        if op.measured is not None and not 1 / LARGE**2 < op.measured.sigma2 < LARGE**2:
            size = math.sqrt(op.measured.sigma2)
            if size > 0:
                text = f"the input {op.name!r} has entries of size {size:.1g}."
                advice = "Standardize the inputs: mean 0 and variance 1 over the data."
                yield Fault(0, number, Finding("input scale", text, advice))


def _silent(graph: Graph) -> Iterator[Fault]:
    """The first rows of variance 0 that a way leads on from."""
    zero = [n for n, place in graph.places.items() if not place.sigma2 > 0]
    first = [n for n in zero if not set(graph.feeds(n)) & set(zero)]
    first = [n for n in first if graph.reaches(n, lambda child, at: _adds_signal(graph, child, at))]
    for number in first[:1]:
        place, others = graph.places[number], len(zero) - 1
        text = f"σ² is 0 at {place.name!r}{f' and {others} other rows' if others else ''}"
        operation = graph.calls[number].operation
        if isinstance(operation, ops.Weights) and operation.gain == 0:
            text += ": its weights are 0"
        advice = "Last layers set to 0 on purpose are no fault; others pass nothing on."
        last = graph.is_last(number)
        yield Fault(1 if last else 0, number, Finding("no signal", f"{text}.", advice))


def _adds(graph: Graph, child: int) -> bool:
    call = graph.calls[child]
    return call.function == "add" and len(call.parents) > 1


def _adds_signal(graph: Graph, child: int, at: int) -> bool:
    """Whether something that is not 0 is added to the output of a call."""
    other = graph.other(child, at)
    return _adds(graph, child) and (other is None or other.sigma2 > 0)


def _scales(graph: Graph) -> Iterator[Fault]:
    """The largest rise and the largest fall of sigma^2 that the network does not take away."""
    factors: dict[int, float] = {}
    for number, start in graph.starts.items():
        place = graph.places[number]
        if graph.varies[number] and place.sigma2 > 0 and start.scale > 0:
            factors[number] = place.scale / start.scale
    grown = {n: x for n, x in factors.items() if x > SCALE and _matters(graph, n, falling=False)}
    lost = {
        n: x
        for n, x in factors.items()
        if x < 1 / SCALE and not graph.is_last(n) and _matters(graph, n, falling=True)
    }
    for kind, found in (("explosion", grown), ("loss of scale", lost)):
        if found:
            extreme = max(found, key=lambda n: abs(math.log(found[n])))
            yield _scale(graph, kind, extreme)


def _matters(graph: Graph, number: int, *, falling: bool) -> bool:
    place = graph.places[number]

    def stops(child: int, at: int) -> bool:
        call = graph.calls[child]
        if call.function in ops.NORMS:
            eps = getattr(call.operation, "eps", 0.0)
            return not (falling and 0 < place.sigma2 < eps / 10)
        if falling and _adds(graph, child):
            other = graph.other(child, at)
            return other is None or other.sigma2 >= place.sigma2
        return False

    return graph.reaches(number, stops)


def _scale(graph: Graph, kind: str, number: int) -> Fault:
    start, last = graph.starts[number], graph.places[number]
    way = [n for n in graph.path(number) if graph.starts.get(n) is start]
    scales = [start.scale, *(graph.places[n].scale for n in way)]
    steps = [math.log(b / a) if a > 0 and b > 0 else 0.0 for a, b in pairwise(scales)]
    total = math.log(last.scale / start.scale)
    worst = max(range(len(steps)), key=lambda i: steps[i] * math.copysign(1, total))
    text = f"σ² goes from {start.scale:.2g} at {start.name} to {last.sigma2:.2g} at "
    text += f"{last.name!r}, with no normalization between. "
    alone = steps[worst] / total >= 0.6
    culprit = way[worst] if alone else way[min(1, len(way) - 1)]
    if alone:
        text += f"The change is at {graph.places[culprit].name!r}"
        text += ", by its bias." if _bias_rules(graph, culprit) else "."
    else:
        text += f"A layer multiplies it by about {math.exp(total / (len(way) - 1)):.2g}."
    judged = [graph.calls[n].operation for n in ([culprit] if alone else way)]
    gains = sorted(op.gain for op in judged if isinstance(op, ops.Weights))
    advice = "sv.init.total_ sets σ² to 1 in every layer."
    if gains:
        middle = gains[len(gains) // 2]
        words = f"Its weights have fan-in times mean square {middle:.2g}; He's rule for ReLU is 2. "
        if 1.8 < middle < 2.2:
            words += "The cause may be another activation, padding, few units or biases. "
        advice = words + advice
    return Fault(0, culprit, Finding(kind, text, advice))


def _bias_rules(graph: Graph, number: int) -> bool:
    operation = graph.calls[number].operation
    square = operation.bias.square if isinstance(operation, ops.Weights) else 0.0
    return square > 0.5 * graph.places[number].sigma2


def _branches(graph: Graph) -> Iterator[Fault]:
    """Branches that outweigh the stream that they start from and are added to."""
    for number in range(len(graph.calls)):
        if not _adds(graph, number):
            continue
        for parent in graph.calls[number].parents:
            branch = max(graph.nearest(parent), key=lambda n: graph.places[n].sigma2, default=None)
            stream = graph.other(number, parent)
            if branch is None or stream is None or not graph.varies[branch]:
                continue
            if stream.number not in graph.above[branch]:  # two signals that meet
                continue
            place = graph.places[branch]
            if place.sigma2 > SCALE**2 * stream.sigma2 > 0:
                text = f"the branch that ends at {place.name!r} has σ² = {place.sigma2:.2g} and is "
                text += f"added to a stream of {stream.sigma2:.2g} ({stream.name!r})."
                finding = Finding("explosion", text, "sv.init.total_ sets σ² to 1 in every layer.")
                yield Fault(0, branch, finding)
                return


def _collapse(graph: Graph) -> Iterator[Fault]:
    """The first row that has collapsed while no row that feeds it has."""
    low = {n for n, p in graph.places.items() if graph.varies[n] and p.fraction < COLLAPSED}
    some = [n for n in sorted(low) if graph.places[n].sigma2 > 0 and _stays(graph, n)]
    if not some:
        return
    number = next((n for n in some if not set(graph.feeds(n)) & low), some[0])
    place, way = graph.places[number], graph.path(number)
    cause, share, advice, culprit = _cause(graph, way)
    first, others = graph.places[way[0]], len(some) - 1
    if place.spread < COLLAPSED:
        text = f"v²/σ² is {max(place.spread, 0):.2g} at {place.words}"
        if first is not place:
            text += f", from {first.spread:.2g} at {first.name!r}"
    else:
        text = f"inputs point in nearly one direction at {place.words}: their mean cosine "
        text += f"is {1 - place.fraction:.3f}; with their lengths, v²/σ² is {place.spread:.2g}"
    text += f"; inputs look alike there (m/v = {place.ratio:.2g})"
    text += f", as in {others} row{'s' * (others > 1)} after it. " if others else ". "
    text += f"The cause is {cause}{f', for {share:.0%} of the fall' if share < 0.995 else ''}."
    yield Fault(0, culprit, Finding("collapse", text, advice))


def _stays(graph: Graph, number: int) -> bool:
    """Whether BatchNorm or a larger, healthy stream takes a collapse away."""
    place = graph.places[number]

    def stops(child: int, at: int) -> bool:
        if along.uses_batch_statistics(graph.calls[child]):
            return True
        other = graph.other(child, at) if _adds(graph, child) else None
        healthy = other is not None and other.fraction >= COLLAPSED
        return healthy and other is not None and other.sigma2 >= place.sigma2

    return graph.reaches(number, stops)


RELU = "ReLU"
_ADVICE = {
    RELU: "sv.init.sample_ removes the means, and so does BatchNorm; rescaling alone "
    "(sv.init.total_) does not undo the effect of ReLU.",
    "average": "sv.init.sample_ removes the means.",
    "bias": "Start with biases of 0 and weights at He's rule.",
    "mean": "Subtract the mean of the inputs over the data before anything else.",
    "constant": "Compare the scale of the constant with that of the signal beside it; "
    "sv.init.total_ brings back a signal that has faded.",
}


def _cause(graph: Graph, way: list[int]) -> tuple[str, float, str, int]:
    """What accounts for most of the fall of v^2/sigma^2 along a way: words, share, advice, call."""
    # biases of all rows are one cause; of each other kind, what has one name is
    parts: dict[tuple[str, str], list[tuple[float, int, str]]] = {}
    before = 1.0
    for number in way:
        fraction = max(graph.places[number].fraction, 1e-9)
        kind, words = _mechanism(graph, number)
        mine = parts.setdefault((kind, "" if kind == "bias" else words), [])
        mine.append((max(0.0, math.log(before / fraction)), number, words))
        before = min(before, fraction)
    falls = {key: sum(fall for fall, *_ in mine) for key, mine in parts.items()}
    key = max(falls, key=falls.__getitem__)
    kind, share = key[0], falls[key] / (sum(falls.values()) or 1.0)
    words = max(parts[key])[2]
    words += " and others" if kind == "bias" and len(parts[key]) > 1 else ""
    advice = _ADVICE.get(kind, "")
    if kind == RELU and (growth := along.gradient_growth(graph.calls)) > along.GRADIENTS:
        advice = "Add skip connections whose branches are multiplied by 1/√L (L: their number). "
        advice += "sv.init.sample_ and BatchNorm would remove the means, but squared gradients "
        advice += f"would grow some {growth:.0e} times."
    return words, share, advice, parts[key][0][1]


def _mechanism(graph: Graph, number: int) -> tuple[str, str]:
    """Why a row's fraction differs from that of the rows that feed it."""
    call, place = graph.calls[number], graph.places[number]
    between = graph.upstream(number)
    op, feeds = call.operation, graph.feeds(number)
    averaged = next((c.function for c in between if c.function in ops.MEANS), "")
    bias = op.bias.square if isinstance(op, ops.Weights) else 0.0
    largest = max((graph.places[feed].sigma2 for feed in feeds), default=0.0)
    if bias > 0.5 * max(place.m2, 1e-300) and not (averaged and bias < largest):
        return "bias", f"the bias of {place.name!r}"
    if averaged:
        words = f"the average before {place.name!r} ({averaged}), which takes differences away and "
        return "average", f"{words}leaves the means that units have"
    constant = _constant_beside(graph, number)
    if constant is not None:
        return "constant", constant
    given = [c.operation for c in between if isinstance(c.operation, ops.Input)]
    for one in given:
        m = one.measured
        if not feeds and m is not None and m.m2 > 0.5 * m.sigma2:
            return "mean", f"the mean of the input {one.name!r}"
    names = [c.function for c in between]
    if any(isinstance(c.operation, ops.Relu) or _rectifies(c) for c in between):
        return RELU, RELU
    picks = any(name in _PICKS for name in names)  # one position, a class token for example
    joined = [c for c in graph.upstream(number, far=picks) if _joins(c)]
    if joined:
        return "constant", f"the constant that {joined[0].function} puts beside the signal"
    others = [n for n in names if n not in ("input", "measured") and n not in ops.MOVES]
    if others:
        return others[-1], others[-1]
    return "weights", f"a direction that the inputs share before {place.name!r}"


def _joins(call: Call) -> bool:
    return isinstance(call.operation, ops.Beyond) and call.operation.joins


def _constant_beside(graph: Graph, number: int) -> str | None:
    """A constant that outweighs the signal where both meet, in front of a row or in it."""
    call, place = graph.calls[number], graph.places[number]
    feeds = graph.feeds(number)
    if feeds and not graph.varies[feeds[0]]:
        return f"{graph.places[feeds[0]].name!r}, which depends on no input that varies"
    gain = call.operation.gain if isinstance(call.operation, ops.Weights) else 1.0
    for other in graph.upstream(number):
        op = other.operation
        if isinstance(op, ops.Affine) and gain * op.shift.square > 0.5 * max(place.m2, 1e-300):
            return f"a constant that is added before {place.name!r}"
    return None


def _rectifies(call: Call) -> bool:
    if isinstance(call.operation, ops.Relu):
        return call.operation.slope == 0
    return isinstance(call.operation, ops.Beyond | ops.Activate) and call.operation.rectifies


def _dead(graph: Graph, table: pd.DataFrame) -> Iterator[Fault]:
    feeding = set[int]()
    for call in graph.calls:
        if _rectifies(call):
            source = call.parents[0]
            while source not in graph.places and _keeps_signs(graph, source):
                source = graph.calls[source].parents[0]
            feeding.add(source)
    dead = {n: float(table.dead.iloc[graph.places[n].line]) for n in feeding if n in graph.places}
    many = {n: x for n, x in dead.items() if x > DEAD and graph.places[n].sigma2 > 0}
    if not many:
        return
    worst = max(many, key=many.__getitem__)
    words, more = graph.places[worst].words, f"{len(many)} layer{'s' * (len(many) > 1)}"
    text = f"{many[worst]:.0%} of the units of {words} are positive for no input, and the "
    text += f"rectifier after them passes nothing ({more} above {DEAD:.0%})."
    op = graph.calls[worst].operation
    advice = ""
    if along.gradient_growth(graph.calls) <= along.GRADIENTS:
        advice = "With sv.init.sample_ every unit of a layer with a bias has inputs on "
        advice += "either side of 0."
    if isinstance(op, ops.Weights) and op.bias.square > 0.5 * graph.places[worst].sigma2:
        text += " Its bias is larger than its product of weights and inputs."
        advice = "Start with biases of 0."
    yield Fault(0 if many[worst] > 0.9 else 2, worst, Finding("dead units", text, advice))


def _keeps_signs(graph: Graph, number: int) -> bool:
    call = graph.calls[number]
    kept = isinstance(call.operation, ops.Move | ops.Dropout) or call.function in _PICKS
    return bool(call.parents) and (kept or call.function.startswith("max_pool"))


def _saturated(graph: Graph) -> Iterator[Fault]:
    found: dict[int, Place] = {}
    for number, call in enumerate(graph.calls):
        if call.function in ops.SATURATING and call.parents:
            for feed in graph.nearest(call.parents[0]):
                if graph.places[feed].scale > SATURATED and _only_moves(graph, number, feed):
                    found[feed] = graph.places[feed]
    for number, place in list(found.items())[:1]:
        text = f"{len(found)} layers such as {place.name!r} (σ² = {place.sigma2:.2g}) feed an "
        text += "activation that is flat there: gradients vanish or turn chaotic."
        advice = "Smaller weights; sv.init.total_ sets σ² to 1."
        yield Fault(1, number, Finding("saturation", text, advice))


def _only_moves(graph: Graph, number: int, feed: int) -> bool:
    at = graph.calls[number].parents[0]
    while at != feed:
        call = graph.calls[at]
        if not isinstance(call.operation, ops.Move | ops.Affine):
            return False
        at = call.parents[0]
    return True


def _absolute(graph: Graph) -> Iterator[Fault]:
    sizes = {n: math.sqrt(place.sigma2) for n, place in graph.places.items() if place.sigma2 > 0}
    off = {n: x for n, x in sizes.items() if not 1 / LARGE < x < LARGE and graph.varies[n]}
    for number in sorted(off)[:1]:
        text = f"preactivations of {graph.places[number].name!r} have the size {off[number]:.1g}; "
        text += "float16 ends at 65504 and loses digits below 6e-5."
        yield Fault(2, number, Finding("absolute scale", text))
