"""The causes of a finding: the strongest suspect is taken away, then the strongest of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from svlib.probing import detectors
from svlib.probing import findings as d
from svlib.probing.findings import Finding
from svlib.probing.functions import SMOOTH
from svlib.probing.graph import Graph, Node
from svlib.probing.passes import Key
from svlib.probing.removal import Measured, Trial, present
from svlib.probing.replacing import Removed


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
    value: Callable[[dict[str, Measured]], float],
    sound: Callable[[float], bool],
    better: Callable[[float, float], float],
    suspects: Callable[[str], bool],
    ideal: float,
) -> list[Cause]:
    """What was taken away, in order, until the number is sound.

    A first suspect whose removal leaves more than nine tenths of the way to ``ideal`` is none.

    ``better(new, old)`` is the gain of a number over another, a logarithm: above 0 where it is
    sounder.
    """
    before = trial.measure(targets, {})
    if before is None:
        return []
    now = value(before)
    if not math.isfinite(now):
        return []
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
        least = max(math.log(1.25), 0.0 if found else 0.1 * better(ideal, now))
        if not kind or gains[kind] < least:
            break
        if kind == "input scale" and gains.get("input mean", 0.0) > 0.8 * gains[kind]:
            kind = "input mean"
        keys, node = _alone(
            trial, targets, removed, kind, there[kind], value, better, now, gains[kind]
        )
        removed[kind] = keys
        now = tried[kind]
        found.append(_cause(kind, now, node, there[kind]))
    return found


def _alone(
    trial: Trial,
    targets: Mapping[str, Node],
    removed: Removed,
    kind: str,
    nodes: list[Node],
    value: Callable[[dict[str, Measured]], float],
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
    pool = "maxim" if "max" in function else "average"
    pools = f"{pool}{'a' if pool == 'maxim' else 's'} over positions"
    pool += "um" * (pool == "maxim")
    at = "" if node is None else f" of {node.place!r}"
    here = "" if node is None else f" at {node.place!r}"
    nouns = {
        "biases": ("biases" if node is None else f"the bias{at}", ""),
        "input mean": ("the mean of the inputs", "with centred inputs"),
        "input scale": ("the scale of the inputs", "with standardized inputs"),
        "activations": (name if node is None else f"{name}{here}", ""),
        "averages": (
            pools if node is None else f"the {pool}{here}",
            f"with one position instead of {pools if node is None else f'the {pool}{here}'}",
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


def explained(trial: Trial, finding: Finding) -> Finding:
    """The finding with what removal shows."""
    trace, number = trial.trace, finding.number
    if number < 0 or not trace.nodes[number].key:
        return finding
    node = trace.nodes[number]

    def log(new: float, old: float) -> float:
        return math.log(max(new, 1e-12) / max(old, 1e-12))

    targets, suspects = {"row": node}, lambda kind: True
    ideal = 1.0 if finding.kind in ("collapse", "explosion", "loss of scale") else 0.0
    if finding.kind == "collapse":
        column = "fraction" if node.values and node.values.fraction < d.COLLAPSED else "spread"

        def value(at: dict[str, Measured]) -> float:
            return float(getattr(at["row"].values, column))

        sound, better = (lambda x: x >= d.COLLAPSED), log
    elif finding.kind in ("explosion", "loss of scale"):
        start = trace.nodes[finding.start]
        fixed = 1.0 if start.values is None else start.values.sigma2
        if start.key and start is not node:
            targets["start"] = start

        def value(at: dict[str, Measured]) -> float:
            return at["row"].values.sigma2 / max(
                at["start"].values.sigma2 if "start" in at else fixed, 1e-300
            )

        sound = lambda x: 1 / d.SCALE < x < d.SCALE  # noqa: E731
        better = lambda new, old: abs(log(old, 1.0)) - abs(log(new, 1.0))  # noqa: E731
        suspects = lambda kind: not kind.startswith("input") or bool(start.key)  # noqa: E731
    elif finding.kind == "saturation":
        share, limit = next(
            ((x, y) for x, y in (("sharpness", d.SHARP), ("saturated", d.SATURATED))
             if node.extra.get(x, 0.0) > y),
            ("", 0.0),
        )  # fmt: skip
        if not share:  # of gates inside a module
            return finding
        value = lambda at: at["row"].extra.get(share, math.nan)  # noqa: E731
        sound, better = (lambda x: x <= limit), (lambda new, old: log(1 - new, 1 - old))
        suspects = lambda kind: kind not in ("activations", "averages")  # noqa: E731
    elif finding.kind == "dead units":
        sound, better = (lambda x: x <= d.DEAD), (lambda new, old: log(old + 0.01, new + 0.01))
        if "dead" not in node.extra:  # what is behind does not vary
            value, sound = (lambda at: float(at["row"].values.v2 <= 1e-12)), (lambda x: x == 0)
        elif node.function in SMOOTH:
            targets = {"row": trace.nodes[node.parents[0]]}
            value = lambda at: at["row"].values.deep  # noqa: E731
        else:
            value = lambda at: at["row"].values.dead  # noqa: E731
        suspects = lambda kind: kind not in ("activations", "averages")  # noqa: E731
        if not targets["row"].key:
            return finding
    else:
        return finding
    found = causes(trial, number, targets, value, sound, better, suspects, ideal)
    return _told(trace, finding, node, found) if found else finding


def _told(trace: Graph, finding: Finding, node: Node, found: list[Cause]) -> Finding:
    """The finding with its causes."""
    number, first, place = finding.number, found[0], finding.place
    if first.node is not None and first.kind in ("biases", "weights", "constants", "statistics"):
        place = first.node.place
    words = {cause.words: cause.value for cause in found}
    # a head that starts with a prior for its bias
    head = finding.kind == "collapse" and not trace.next(number) and node.number == first_low(trace)
    note = head and first.kind == "biases" and first.node is node
    return replace(finding, cause=first.noun, removed=words, place=place, note=note,
                   suspects=tuple(cause.kind for cause in found))  # fmt: skip


def first_low(trace: Graph) -> int:
    """The first node that has collapsed."""
    return next((n.number for n in trace.judged if detectors.collapsed(n)), -1)
