"""The rows of a table as the calls connect them: what feeds a row, and where a row leads.

Judged are signals: outputs of weighted layers, of normalizations, and sums of signals. Gates,
masks, scales and other helpers are measured and not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from svlib.probing import operations as ops
from svlib.probing.calls import Call

_DIRECTIONS = 16  # units below which a mean cosine says little


@dataclass(frozen=True)
class Place:
    """A judged row: the number of its call, its name and line in the table, and its values.

    ``words`` are the name and, where that is a number of its own, which row it is.

    ``scale`` is sigma^2 times the constants that multiply the output next. ``spread`` is
    v^2/sigma^2, ``fraction`` the smaller one of it and, where measured, of 1 minus the mean cosine.
    """

    number: int
    name: str
    line: int
    m2: float
    sigma2: float
    spread: float
    fraction: float
    scale: float
    ratio: float
    words: str


@dataclass(frozen=True, eq=False)
class Start:
    """Where a scale was set: the words for it, and sigma^2 there."""

    name: str
    scale: float


class Graph:
    """Judged rows by the number of their call."""

    def __init__(self, table: pd.DataFrame, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.children: list[list[int]] = [[] for _ in calls]
        for number, call in enumerate(calls):
            for parent in set(call.parents):
                self.children[parent].append(number)
        lines = {name: line for line, name in enumerate(table.name)}
        self.places: dict[int, Place] = {}
        for number, call in enumerate(calls):
            rows = [row for row in call.rows if row in lines]
            if rows and _is_signal(call):
                self.places[number] = _place(self, table, lines[rows[0]], number)

    @cached_property
    def varies(self) -> list[bool]:
        """Whether the output of each call depends on an input that differs within the batch."""
        found: list[bool] = []
        for call in self.calls:
            own = isinstance(call.operation, ops.Input) and call.operation.varies
            found.append(own or any(found[parent] for parent in call.parents))
        return found

    @cached_property
    def _nearest(self) -> list[frozenset[int]]:
        """The nearest judged calls at or above each call."""
        found: list[frozenset[int]] = []
        for number, call in enumerate(self.calls):
            above = frozenset[int]().union(*(found[parent] for parent in call.parents))
            found.append(frozenset({number}) if number in self.places else above)
        return found

    def nearest(self, number: int) -> frozenset[int]:
        """The call itself if it is judged, else the nearest judged calls above it."""
        return self._nearest[number]

    def feeds(self, number: int) -> list[int]:
        """The judged calls that feed a call, the one of the largest sigma^2 first."""
        above = frozenset[int]().union(*(self._nearest[p] for p in self.calls[number].parents))
        return sorted(above, key=lambda n: -self.places[n].sigma2)

    def upstream(self, number: int, *, far: bool = False) -> list[Call]:
        """The calls that a call depends on, up to judged ones; with ``far``, beyond them too."""
        found, open_ = set[int](), list(self.calls[number].parents)
        while open_:
            at = open_.pop()
            if at not in found and (far or at not in self.places):
                found.add(at)
                open_ += self.calls[at].parents
        return [self.calls[at] for at in sorted(found)]

    def path(self, number: int) -> list[int]:
        """From the first judged call to this one, along the feeds of the largest sigma^2."""
        way = [number]
        while feeds := self.feeds(way[0]):
            way.insert(0, feeds[0])
        return way

    @cached_property
    def starts(self) -> dict[int, Start]:
        """For each judged call, where its scale was set last: by a normalization or a first row."""
        start: list[Start | None] = []
        found: dict[int, Start] = {}
        for number, call in enumerate(self.calls):
            known = [start[p] for p in call.parents if self.varies[p]]
            at = max((s for s in known if s is not None), key=lambda s: s.scale, default=None)
            operation = call.operation
            if call.function in ops.NORMS:
                at = None
                if isinstance(operation, ops.Normalize):
                    at = Start(call.function, operation.gamma2 + operation.beta.square)
            if number in self.places:
                place = self.places[number]
                at = Start(repr(place.name), place.scale) if at is None else at
                found[number] = at
            start.append(at)
        return found

    def reaches(self, number: int, stops: Callable[[int, int], bool]) -> bool:
        """Whether a way leads on from a call to an output of the model.

        ``stops(child, number)`` says that the way ends at a child: it takes the fault away.
        """
        marked = any(call.is_output for call in self.calls)
        seen, open_ = {number}, [number]
        while open_:
            at = open_.pop()
            if self.calls[at].is_output or (not marked and not self.children[at]):
                return True
            for child in self.children[at]:
                if child not in seen and not stops(child, at):
                    seen.add(child)
                    open_.append(child)
        return False

    def is_last(self, number: int) -> bool:
        """Whether no judged call comes behind this one."""
        return not any(number in above for n, above in enumerate(self.above) if n in self.places)

    @cached_property
    def above(self) -> list[frozenset[int]]:
        """All judged calls above each call."""
        found: list[frozenset[int]] = []
        for call in self.calls:
            own = {parent for parent in call.parents if parent in self.places}
            found.append(frozenset(own).union(*(found[parent] for parent in call.parents)))
        return found

    def other(self, child: int, number: int) -> Place | None:
        """The largest row that a sum adds to what comes from a call."""
        parents = [p for p in self.calls[child].parents if p != number]
        found = [self.places[n] for p in parents for n in self._nearest[p] if n != number]
        return max(found, key=lambda place: place.sigma2, default=None)


def _is_signal(call: Call) -> bool:
    sums = call.function == "add" and len(call.parents) > 1
    return sums or call.function in ops.WEIGHTED or call.function in ops.NORMS


def _place(graph: Graph, table: pd.DataFrame, line: int, number: int) -> Place:
    row = table.iloc[line]
    fraction = spread = float(row.fraction)
    wide = math.prod(row["shape"]) >= _DIRECTIONS
    if wide and "cosine" in table and math.isfinite(row.cosine):
        fraction = min(fraction, 1 - float(row.cosine))
    sigma2 = float(row.sigma2)
    scale, at = sigma2, number
    while len(graph.children[at]) == 1:
        (at,) = graph.children[at]
        operation = graph.calls[at].operation
        if not isinstance(operation, ops.Affine | ops.Move):
            break
        scale *= operation.scale2 if isinstance(operation, ops.Affine) else 1.0
    name = str(row["name"])
    words = repr(name) + (f" (row {line + 1} of {len(table)})" if name.isdigit() else "")
    m2, ratio = float(row.m2), float(row.ratio)
    return Place(number, name, line, m2, sigma2, spread, fraction, scale, ratio, words)
