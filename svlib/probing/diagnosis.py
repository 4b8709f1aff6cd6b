"""A diagnosis in words: the measurement, with theory beside it, read for what is wrong."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from svlib.probing import along
from svlib.probing import operations as ops
from svlib.probing.along import GRADIENTS
from svlib.probing.batches import Caller, Masker, Reading
from svlib.probing.calls import Call
from svlib.probing.faults import COLLAPSED, SCALE, Finding, faults
from svlib.probing.graph import Graph
from svlib.probing.probe import measure
from svlib.probing.rows import Layers

CENTRED = 0.05
"""m^2/sigma^2, in the median of rows, below which sample means count as removed."""
DEVIATION = 0.1
"""Difference in v^2/sigma^2 between theory and measurement that is reported."""

_FINDINGS = 3  # the worst faults and notes, the last of them on theory
_UNFOLDED = 12  # rows that a notebook shows without a click
_SHOWN = ["name", "type", "fraction", "theory", "m2", "v2", "sigma2", "ratio", "dead"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A measurement with its theory and its diagnosis; in a notebook it shows all three.

    Attributes:
        table: The table of :func:`svlib.probe`, and ``cosine``, the mean cosine between two inputs
            (NaN where positions count as samples), which tells directions from lengths.
        theory: For each of its rows ``name``, ``m2``, ``v2``, ``sigma2`` and ``fraction`` expected
            (NaN where theory is silent), and ``start``: empty, or why theory starts from the
            measured values at this row.
        findings: The diagnosis.
        calls: The functions that the forward pass called.
    """

    table: pd.DataFrame
    theory: pd.DataFrame
    findings: tuple[Finding, ...]
    calls: tuple[Call, ...]

    def __repr__(self) -> str:
        return "\n".join(map(str, self.findings))

    def layers(self) -> pd.DataFrame:
        """The table with the fraction that theory expects of each layer, except where it starts."""
        expected = self.theory.fraction.where(self.theory.start == "")
        return self.table.assign(theory=expected)[_SHOWN]

    def _repr_html_(self) -> str:
        return self.to_html(unfolded=len(self.table) <= _UNFOLDED)

    def to_html(self, *, unfolded: bool) -> str:
        """The diagnosis as a list, and behind it :meth:`layers` as a table that folds."""
        escaped = ([html.escape(part) for part in finding] for finding in self.findings)
        items = "".join(
            f"<li><b>{kind}</b>: {text} <i>{advice}</i></li>" for kind, text, advice in escaped
        )
        table = self.layers().to_html(
            index=False, border=0, float_format="{:.3g}".format, na_rep=""
        )
        head = f"<details{' open' if unfolded else ''}><summary>{len(self.table)} rows</summary>"
        return f'<ul>{items}</ul>\n{head}<div style="overflow-x: auto">{table}</div></details>'


def explain(
    model: nn.Module,
    batches: Any,
    *,
    layers: Layers = None,
    positions: str = "samples",
    inputs: int | None = None,
    call: Caller | None = None,
    mask: Masker | None = None,
) -> Explanation:
    """Measure a model, follow it with theory, and say in words what is wrong, with numbers.

    Thresholds are the constants of :mod:`svlib.probing.diagnosis`. Arguments and errors are those
    of :func:`svlib.probe`; theory follows the first batch.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(256, width=256, depth=30, outputs=256, seed=0)
        >>> explanation = explain(model, sv.data.gaussian(200, 256, seed=1))
        >>> print([finding.kind for finding in explanation.findings])
        ['collapse', 'dead units', 'theory']
        >>> print(explanation.theory.fraction.round(2).iloc[[0, 1, 29]].tolist())
        [1.0, 0.68, 0.03]
    """
    reading = Reading(inputs, call, mask)
    table, calls = measure(model, batches, layers, positions, reading, record=True, directions=True)
    theory = along.theory(table, calls, units=positions == "units")
    graph = Graph(table, calls)
    wrong = faults(graph, table)
    if not any(finding.kind != "absolute scale" for finding in wrong):
        wrong = [*wrong, _sound(graph, calls)]
    notes = [*_dropout(calls), *_batchnorm(table, calls)]
    growing, first = _gradients(table, calls)
    findings = [*growing, *wrong, *notes] if first else [*wrong, *growing, *notes]
    findings = findings[: _FINDINGS - 1]
    return Explanation(table, theory, (*findings, _agreement(table, theory)), calls)


def _sound(graph: Graph, calls: Sequence[Call]) -> Finding:
    """What was looked at and found right; nothing is said of the rest."""
    varying = [place for n, place in graph.places.items() if graph.varies[n] and place.sigma2 > 0]
    # what has collapsed and is no fault is taken away behind: by BatchNorm, or a larger stream
    standing = [place for place in varying if place.fraction >= COLLAPSED]
    if not standing:
        return Finding("no verdict", "no row that could be judged depends on an input that varies.")
    lowest = min(standing, key=lambda place: place.fraction)
    between = " between normalizations" if _normalized(calls) else ""
    text = f"v²/σ² is nowhere below {lowest.fraction:.3g} ({lowest.name!r}) on a way to the "
    text += f"output, and σ² changes less than {SCALE:g} times{between}. "
    measure = "sv.probe_gradients(model, batch, seed=0) does"
    return Finding("sound", f"{text}Gradients were not measured ({measure}).")


def _normalized(calls: Sequence[Call]) -> bool:
    return any(call.function in ops.NORMS for call in calls)


def _dropout(calls: Sequence[Call]) -> list[Finding]:
    kept = [call.operation.keep for call in calls if isinstance(call.operation, ops.Dropout)]
    if min(kept, default=1.0) == 1:
        return []
    text = "is active, and its noise counts as variance over inputs."
    return [Finding("dropout", text, "Measure in evaluation mode as well.")]


def _batchnorm(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    if not any(map(along.uses_batch_statistics, calls)) or len(table) < 2:
        return []
    median = table.ratio.iloc[1:].median()
    relu = any(isinstance(call.operation, ops.Relu) for call in calls)
    stops = "it stops the decay: " if relu and (table.fraction >= COLLAPSED).all() else ""
    text = f"in training mode, {stops}m/v is {median:.2g} in the median of rows"
    expected = math.sqrt(1 / (math.pi - 1))
    text += f"; behind BatchNorm and ReLU theory has {expected:.3f}." if relu else "."
    return [Finding("BatchNorm", text)]


def _gradients(table: pd.DataFrame, calls: Sequence[Call]) -> tuple[list[Finding], bool]:
    """The finding that gradients will grow, if so, and whether so much that it comes first."""
    centred = table.m2.iloc[1:].abs().median() < CENTRED * table.sigma2.iloc[1:].median()
    growth = along.gradient_growth(calls, batchnorm=not centred)
    if growth < GRADIENTS:
        return [], False
    first = growth > along.GRADIENTS_FIRST
    means = "sample means of 0" if centred else "BatchNorm"
    text = f"with {means} squared gradients are expected to grow backwards from ReLU layer to ReLU "
    text += f"layer, some {growth:.0e} times in all (theory; nothing was measured)."
    advice = "Skip connections or smaller learning rates help."
    if first:
        advice = "Small learning rates do not mend this: prefer skip connections whose branches "
        advice += "are multiplied by 1/√L, or sv.init.total_ instead of sample init."
    return [Finding("gradients", text, advice)], first


def _agreement(table: pd.DataFrame, theory: pd.DataFrame) -> Finding:
    starts = Counter(why for why in theory.start if why not in ("", "input", "no theory"))
    causes = ", ".join(f"{why} ({count})" for why, count in starts.most_common(4))
    followed = (theory.start == "") & (table.sigma2 > 0)
    if not followed.any():
        return Finding("theory", f"covers no row; it stops at {causes or 'the first'}.")
    compared = table[["name", "fraction"]].assign(expected=theory.fraction)[followed]
    compared["difference"] = (compared.expected - compared.fraction).abs()
    last, worst = compared.iloc[-1], compared.sort_values("difference").iloc[-1]
    anew = f"; it starts anew behind {causes}" if causes else ""
    text = f"covers {len(compared)} of {len(table)} rows{anew}. At {last['name']!r} it expects "
    text += f"v²/σ² = {_told(last.expected)}, measured {_told(last.fraction)}."
    if worst.difference <= DEVIATION:
        return Finding("theory", text)
    if worst["name"] != last["name"]:
        text += f" They differ most at {worst['name']!r}: expected {_told(worst.expected)}, "
        text += f"measured {_told(worst.fraction)}."
    reasons = "Theory knows wide layers, random weights and one correlation for all pairs of "
    reasons += "inputs and positions; narrow layers, trained or calibrated weights and structured "
    return Finding("theory", text, f"{reasons}data depart from it.")


def _told(fraction: float) -> str:
    return f"{fraction:.2g}" if abs(fraction) > 1e-9 else "0"  # rounding is no variance
