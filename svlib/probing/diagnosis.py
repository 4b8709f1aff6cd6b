"""A diagnosis in words: the measurement, with theory beside it, read for what is wrong."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from svlib.probing import along
from svlib.probing import operations as ops
from svlib.probing.along import GRADIENTS
from svlib.probing.calls import Call
from svlib.probing.probe import measure
from svlib.probing.rows import Layers

COLLAPSED = 0.1
"""v^2/sigma^2 below which a layer counts as collapsed."""
SCALE = 100.0
"""Factor between the sigma^2 of rows, with no normalization between them, that is reported."""
CENTRED = 0.05
"""m^2/sigma^2, in the median of rows, below which sample means count as removed."""
BIAS = 0.5
"""Part of a collapsed first row's m^2 that its bias accounts for, from which the bias is named."""
DEAD = 0.25
"""Fraction of dead units before a ReLU that is reported."""
DEVIATION = 0.1
"""Difference in v^2/sigma^2 between theory and measurement that is reported."""

_UNFOLDED = 12  # rows that a notebook shows without a click
_SHOWN = ["name", "type", "fraction", "theory", "m2", "v2", "sigma2", "ratio", "dead"]


class Finding(NamedTuple):
    """One sentence of a diagnosis: its kind, what was found, what to do about it (may be empty)."""

    kind: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}{' ' + self.advice if self.advice else ''}"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A measurement with its theory and its diagnosis; in a notebook it shows all three.

    Attributes:
        table: The table of :func:`svlib.probe`.
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
    model: nn.Module, batches: Any, *, layers: Layers = None, positions: str = "samples"
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
    table, calls = measure(model, batches, layers, positions, record=True)
    theory = along.theory(table, calls, units=positions == "units")
    some = table[table.sigma2 > 0].reset_index(drop=True)
    findings = _zero(table)
    if len(some):
        for part in (_scale, _collapse, _dead):
            findings += part(some, calls)
        if not findings:
            lowest = int(some.fraction.to_numpy().argmin())
            between = " between normalizations" if _normalized(calls) else ""
            text = f"v²/σ² is nowhere below {some.fraction[lowest]:.3g} ({some.name[lowest]!r}), "
            findings.append(
                Finding("sound", f"{text}and σ² changes less than {SCALE:g} times{between}.")
            )
        for part in (_dropout, _batchnorm, _gradients):
            findings += part(some, calls)
    return Explanation(table, theory, (*findings, *_agreement(table, theory)), calls)


def _normalized(calls: Sequence[Call]) -> bool:
    return any(call.function in ops.NORMS for call in calls)


def _zero(table: pd.DataFrame) -> list[Finding]:
    names = table.name[~(table.sigma2 > 0)].tolist()
    if not names:
        return []
    others = f" and {len(names) - 1} other rows" if names[1:] else ""
    advice = "Last layers set to 0 on purpose are no fault; others pass nothing on."
    return [Finding("no signal", f"σ² is 0 at {names[0]!r}{others}.", advice)]


def _scale(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    """Rows are compared with the first of those that have as many normalizations before them."""
    norms: list[int] = []
    for call in calls:
        before = max((norms[parent] for parent in call.parents), default=0)
        norms.append(before + _normalized([call]))
    passed = {call.row: count for call, count in zip(calls, norms, strict=True)}
    sigma2 = table.sigma2.to_numpy()
    start: dict[int, int] = {}
    first = [start.setdefault(passed.get(name, 0), row) for row, name in enumerate(table.name)]
    factors = sigma2 / sigma2[first]
    extremes = {
        "explosion": (int(factors.argmax()), factors.max()),
        "loss of scale": (int(factors.argmin()), 1 / factors.min()),
    }
    between = ", with no normalization between" if _normalized(calls) else ""
    found = []
    for kind, (row, factor) in extremes.items():
        if factor > SCALE:
            begin = first[row]
            text = f"σ² goes from {sigma2[begin]:.2g} at {table.name[begin]!r} "
            text += f"to {sigma2[row]:.2g} at {table.name[row]!r}{between}."
            found.append(Finding(kind, text, "sv.init.total_ sets σ² to 1 in every layer."))
    return found


def _collapse(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    names, fractions = table.name.tolist(), table.fraction.to_numpy()
    below = [row for row, fraction in enumerate(fractions) if fraction < COLLAPSED]
    if not below:
        return []
    row = below[0]
    if row == 0:
        return [_collapsed_start(table, calls)]
    text = f"v²/σ² falls from {fractions[0]:.2g} at {names[0]!r} to {fractions[row]:.2g} "
    text += f"at {names[row]!r} (row {row + 1} of {len(names)})"
    lowest = int(fractions.argmin())
    text += f", lowest {fractions[lowest]:.2g} at {names[lowest]!r}. " if lowest != row else ". "
    if fractions[-1] < COLLAPSED:
        text += f"The last row has {fractions[-1]:.2g}, m/v = {table.ratio.iloc[-1]:.2g}: "
        text += "the sample mean takes over, inputs look alike."
    else:
        text += f"In all {len(below)} rows are below {COLLAPSED}; "
        text += f"the last is not ({fractions[-1]:.2g})."
    advice = "sv.init.sample_ removes the means; so does BatchNorm. "
    advice += "Rescaling alone (sv.init.total_) does not undo the effect of ReLU; "
    advice += "it helps where biases or tokens outweigh a signal that has faded."
    return [Finding("collapse", text, advice)]


def _collapsed_start(table: pd.DataFrame, calls: Sequence[Call]) -> Finding:
    text = f"at the first layer v²/σ² is {table.fraction[0]:.2g}"
    first = next((call.operation for call in calls if call.row == table.name[0]), None)
    if isinstance(first, ops.Weights) and first.bias.square > BIAS * table.m2[0]:
        text += ": its bias is larger than its product of weights and inputs."
        return Finding("collapse", text, "Start with biases of 0.")
    text += ": the inputs are nearly alike, or have a large mean."
    advice = "Subtract the mean of the inputs over the data before anything else."
    return Finding("collapse", text, advice)


def _dead(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    feeds = set()
    for call in calls:
        if call.operation == ops.Relu():
            source = calls[call.parents[0]]
            while source.row is None and _keeps_signs(source):
                source = calls[source.parents[0]]
            feeds.add(source.row)
    fractions = dict(zip(table.name, table.dead.astype(float), strict=True))
    many = {name: dead for name, dead in fractions.items() if name in feeds and dead > DEAD}
    if not many:
        return []
    worst = max(many, key=many.__getitem__)
    text = f"{many[worst]:.0%} of the units of {worst!r}, before a ReLU, are positive for no input"
    text += f" ({len(many)} of {len(table)} layers above {DEAD:.0%})."
    advice = "They pass nothing on. With sv.init.sample_ every unit of a layer with a bias has "
    advice += "inputs on either side of 0."
    return [Finding("dead units", text, advice)]


def _keeps_signs(call: Call) -> bool:
    kept = isinstance(call.operation, ops.Move | ops.Dropout)
    return kept or call.function.startswith("max_pool")


def _dropout(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    kept = [call.operation.keep for call in calls if isinstance(call.operation, ops.Dropout)]
    if min(kept, default=1.0) == 1:
        return []
    text = "is active, and its noise counts as variance over inputs."
    return [Finding("dropout", text, "Measure in evaluation mode as well.")]


def _batchnorm(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    if not any(map(along.uses_batch_statistics, calls)) or len(table) < 2:
        return []
    median = table.ratio.iloc[1:].median()
    stops = "it stops the decay: " if (table.fraction >= COLLAPSED).all() else ""
    text = f"in training mode, {stops}m/v is {median:.2g} in the median of rows; "
    text += f"behind BatchNorm and ReLU theory has {math.sqrt(1 / (math.pi - 1)):.3f}."
    return [Finding("BatchNorm", text)]


def _gradients(table: pd.DataFrame, calls: Sequence[Call]) -> list[Finding]:
    centred = table.m2.iloc[1:].abs().median() < CENTRED * table.sigma2.iloc[1:].median()
    growth = along.gradient_growth(calls, batchnorm=not centred)
    if growth < GRADIENTS:
        return []
    means = "sample means of 0" if centred else "BatchNorm"
    text = f"with {means} squared gradients grow backwards from ReLU layer to ReLU layer, "
    text += f"here some {growth:.0e} times in all."
    advice = "Residual connections or smaller learning rates help; see sv.probe_gradients."
    return [Finding("gradients", text, advice)]


def _agreement(table: pd.DataFrame, theory: pd.DataFrame) -> list[Finding]:
    starts = Counter(why for why in theory.start if why not in ("", "input", "no theory"))
    causes = ", ".join(f"{why} ({count})" for why, count in starts.most_common(4))
    followed = (theory.start == "") & (table.sigma2 > 0)
    if not followed.any():
        return [Finding("theory", f"follows no row; it stops at {causes or 'the first'}.")]
    compared = table[["name", "fraction"]].assign(expected=theory.fraction)[followed]
    compared["difference"] = (compared.expected - compared.fraction).abs()
    last, worst = compared.iloc[-1], compared.sort_values("difference").iloc[-1]
    anew = f"; it starts anew behind {causes}" if causes else ""
    text = f"follows {len(compared)} of {len(table)} rows{anew}. At {last['name']!r} it expects "
    text += f"v²/σ² = {last.expected:.2g}, measured {last.fraction:.2g}."
    if worst.difference <= DEVIATION:
        return [Finding("theory", text)]
    text += f" They differ most at {worst['name']!r}: expected {worst.expected:.2g}, "
    text += f"measured {worst.fraction:.2g}."
    reasons = "Theory knows wide layers, random weights and one correlation for all pairs of "
    reasons += "inputs and positions; narrow layers, trained or calibrated weights and structured "
    return [Finding("theory", text, f"{reasons}data depart from it.")]
