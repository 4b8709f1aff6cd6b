"""What is wrong with a model: measured places, causes by removal, cures by trial."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import pandas as pd
import torch
from torch import nn

from svlib.probing import along, cures, detectors
from svlib.probing import findings as d
from svlib.probing.batches import Batch, Caller, Masker, Reading
from svlib.probing.causes import explained
from svlib.probing.findings import Finding
from svlib.probing.models import is_weighted, mapped, structural_copy
from svlib.probing.places import Places
from svlib.probing.probe import checked, measure
from svlib.probing.removal import Trial
from svlib.probing.rows import Layers
from svlib.probing.trace import Trace

_SHOWN = 3  # findings that are printed; the rest is counted
_EXPLAINED = 3  # findings whose causes are looked for
_INPUTS = 128  # of which suspects are taken away and cures tried
_UNFOLDED = 12  # rows that a notebook shows without a click
_COLUMNS = ["name", "type", "fraction", "m2", "v2", "sigma2", "ratio", "dead"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A measurement and what was found in it; in a notebook it shows both.

    Attributes:
        table: The table of :func:`svlib.probe`, and ``cosine``, the mean cosine between two inputs
            (NaN where positions count as samples), which tells directions from lengths.
        trace: Every function on the way from inputs to outputs: ``place``, ``function``,
            ``judged``, ``m2``, ``v2``, ``sigma2``, ``fraction``, ``dead``, ``parents``.
        findings: What was found, all of it, that furthest beyond its threshold first.
        cures: What was tried, by name, and what it does; empty if nothing was found.
        not_judged: What was not looked at or could not be measured, in words.
    """

    table: pd.DataFrame
    trace: pd.DataFrame
    findings: tuple[Finding, ...]
    cures: pd.DataFrame
    not_judged: tuple[str, ...]
    _nodes: Trace
    _units: bool

    @cached_property
    def theory(self) -> pd.DataFrame:
        """What theory expects of each row, ``name``, ``m2``, ``v2``, ``sigma2``, ``fraction`` (NaN
        where it is silent), and in ``start`` why it starts from the measured values, if it does."""
        return along.theory(self._nodes, units=self._units)

    def __repr__(self) -> str:
        shown = [str(finding) for finding in self.findings[:_SHOWN]]
        if more := len(self.findings) - _SHOWN:
            shown += [f"and {more} more in .findings"] * (more > 0)
        if self.not_judged and self.findings[0].kind != "nothing found":
            shown.append(f"not judged: {'; '.join(self.not_judged)}")
        return "\n".join(shown)

    def plot(self) -> Any:
        """v^2/sigma^2 and sigma^2 along the way, with findings and removals at their places; a
        matplotlib figure."""
        from svlib.probing import report  # only here: matplotlib need not be there

        return report.figure(self)

    def _repr_html_(self) -> str:
        return self.to_html(unfolded=len(self.table) <= _UNFOLDED)

    def to_html(self, *, unfolded: bool) -> str:
        """The findings as a list, behind them the table, which folds."""
        style = ' style="white-space: pre-wrap"'  # code has lines
        told = [*map(str, self.findings), *(f"not judged: {x}" for x in self.not_judged)]
        items = "".join(f"<li{style}>{html.escape(line)}</li>" for line in told)
        table = self.table[_COLUMNS].to_html(
            index=False, border=0, float_format="{:.3g}".format, na_rep=""
        )
        head = f"<details{' open' if unfolded else ''}><summary>{len(self.table)} rows</summary>"
        return f'<ul>{items}</ul>\n{head}<div style="overflow-x: auto">{table}</div></details>'


def explain(
    model: nn.Module,
    batches: Any,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    layers: Layers = None,
    positions: str = "samples",
    inputs: int | None = None,
    call: Caller | None = None,
    mask: Masker | None = None,
) -> Explanation:
    """Measure a model, and say what is wrong with it: where, why, and what helps.

    A finding names the place, the number beyond its threshold (:mod:`svlib.probing.findings`), what
    it becomes with suspects taken away (:mod:`svlib.probing.removal`), and code that was tried on a
    copy and made it better (:mod:`svlib.probing.cures`).

    Args:
        loss: A function of the model's output and the batch as it came, which returns a scalar: the
            loss at the start is judged, and cures are compared by the loss after fifty steps.
        model, batches, layers, positions, inputs, call, mask: As in :func:`svlib.probe`, with its
            errors; an output that is not finite is a finding.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(64, width=64, depth=20, outputs=10, seed=0)
        >>> model[8].bias.data += 5
        >>> finding = explain(model, sv.data.gaussian(100, 64, seed=1)).findings[0]
        >>> finding.kind, finding.cause
        ('collapse', "the bias of '8'")
    """
    reading = Reading(inputs, call, mask)
    raw, batches = _first(batches)
    measured = measure(model, batches, layers, positions, reading, record=True)
    trace, places, batch = measured.trace, measured.places, measured.batch
    assert trace is not None
    of_output = None if loss is None else lambda output: loss(output, raw)
    found, missing = _looked_at(model, batch, trace, places, of_output)
    many = batch.samples > _INPUTS and loss is None and places is not None
    part = (batch.cut(_INPUTS) if many else None) or batch
    worst = [i for i, x in enumerate(found) if not x.note][:_EXPLAINED]
    for i in worst:
        found[i] = explained(Trial(model, part, trace, places, positions), found[i])
    table = pd.DataFrame()
    if worst and any(map(is_weighted, model.modules())):
        table, after = cures.tried(model, part, places, positions, trace, found, of_output)
        found = [_cured(finding, table, after) for finding in found]
    not_judged = (*_not_judged(trace, model), *missing)
    if not any(not x.note for x in found):
        found = [_nothing(trace, not_judged), *found]
    frame = checked(measured.rows, model, layers, stacklevel=2, empty=layers is None)
    return Explanation(
        frame, trace.frame(), tuple(found), table, not_judged, trace, positions == "units"
    )


def assert_healthy(
    model: nn.Module, batches: Any, *, fail_on: Iterable[str] | None = None, **options: Any
) -> None:
    """Raise AssertionError with what :func:`explain` finds, for a test of a model.

    Args:
        model, batches, options: As of :func:`explain`.
        fail_on: Kinds of findings, ``None`` all but notes.
    """
    kinds = None if fail_on is None else set(fail_on)
    found = explain(model, batches, **options).findings
    bad = [x for x in found if not x.note and x.kind != "nothing found"]
    bad = [x for x in bad if kinds is None or x.kind in kinds]
    assert not bad, "\n".join(map(str, bad))


def _looked_at(
    model: nn.Module,
    batch: Batch,
    trace: Trace,
    places: Places | None,
    loss: cures.Loss | None,
) -> tuple[list[Finding], list[str]]:
    """All findings, and what could not be measured."""
    missing = [] if loss is not None else ["the outputs' scale (give loss=)"]
    try:
        if any(node.weights for node in trace.nodes):
            cures.gradients(model, batch, trace, whole=places is None)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        missing.append(f"gradients ({str(error).splitlines()[0]})")
    found = detectors.found(trace, places)
    found += [] if loss is None else _outputs(model, batch, trace, loss)
    return sorted(found, key=lambda x: (x.note, -x.decades)), missing


def _first(batches: Any) -> tuple[Any, Any]:
    """The first batch as it came, and all of them."""
    alone = isinstance(batches, torch.Tensor | dict | tuple | str) or not isinstance(
        batches, Iterable
    )
    if alone or hasattr(batches, "keys"):
        return batches, batches
    rest = iter(batches)
    first = list(zip(range(1), rest, strict=False))
    if not first:
        return None, []
    return first[0][1], chain([first[0][1]], rest)


def _outputs(model: nn.Module, batch: Batch, trace: Trace, loss: cures.Loss) -> list[Finding]:
    """Whether the loss at the start is above that of an output of 0."""
    with structural_copy(model) as copied:
        output = batch.copied(copied).run(copied)
        zero = mapped(lambda y: torch.zeros_like(y) if y.is_floating_point() else y, output)
        value, least = float(loss(output)), float(loss(zero))
    if not value > d.WORSE * least > 0:
        return []
    place = next((n.place for n in reversed(trace.nodes) if n.weights), "")
    text = f"the loss at the start is {value:.3g}; with outputs of 0 it is {least:.3g}."
    decades = math.log10(value / least / d.WORSE)
    return [Finding("output scale", place, text, value / least, decades)]


def _cured(finding: Finding, table: pd.DataFrame, after: dict[str, list[Finding]]) -> Finding:
    """The finding with the cure that made it, and all findings together, better by most."""
    if finding.note or "nothing" not in table.index:
        return finding

    def mine(name: str) -> float:
        same = [x.decades for x in after[name] if x.kind == finding.kind and not x.note]
        return max(same, default=-1.0)

    before = table.loc["nothing"]
    good = table[(table.decades < before.decades - 0.05) & (table.index != "nothing")]
    if finding.kind != "output scale":
        good = good[[mine(str(name)) < mine("nothing") - 0.05 for name in good.index]]
    by = "decades"
    if "loss" in table:
        good, by = table[(table.loss < 0.98 * before.loss) & (table.index != "nothing")], "loss"
    if good.empty:
        return replace(finding, cure=_price(finding, table, after, mine))
    near = good[good[by] <= (1.1 * good[by].min() if by == "loss" else good[by].min() + 0.3)]
    best = near.iloc[0]  # those that change least come first
    own = [n for n in good.index if best.name in cures.INITS and by == "decades"]
    own = [n for n in own if {*good.against[n].split(", ")} & {*finding.suspects[:1]}]
    if own and mine(str(own[0])) < mine("nothing") / 2:  # the cause before all weights
        best = good.loc[own[0]]
    told = f"v²/σ² {before['at the output']:.2g} → {best['at the output']:.2g} at the output, "
    told += f"range of σ² {before['range of σ²']:.1g} → {best['range of σ²']:.1g}, "
    told += f"gradients {before.gradients:.1g} → {best.gradients:.1g}"
    if by == "loss":
        told = f"loss after {cures.STEPS} steps {before.loss:.3g} → {best.loss:.3g}, {told}"
    fell = by == "loss" and (finding.kind == "output scale" or best.loss < before.loss / 2)
    enough = fell or mine(str(best.name)) < mine("nothing") / 2
    how = "Tried" if enough else "Tried, and not enough"
    return replace(finding, cure=f"{how}: {best.name} ({told}): {best.code}")


def _price(finding: Finding, table: pd.DataFrame, after: Any, mine: Callable[[str], float]) -> str:
    """What made this finding better and others worse."""
    names = [str(name) for name in table.index if mine(str(name)) < mine("nothing") - 0.05]
    if not names:
        return "Nothing that was tried made it better."
    best = min(names, key=mine)
    new = next((x for x in after[best] if x.kind not in (finding.kind,) and not x.note), None)
    price = f", and then {new.kind}: {new.text}" if new else ""
    return f"Nothing that was tried made it better without another finding: {best} helps{price}"


def _not_judged(trace: Trace, model: nn.Module) -> list[str]:
    found = []
    gates = [n.place for n in trace.nodes if n.weights and n.number in trace.gates]
    if gates:
        found.append(f"{len(gates)} gates or scores ({_some(gates)})")
    lost = [n.place for n in trace.nodes if (n.weights or n.norm) and n.varies and n.values is None]
    if lost:
        found.append(f"{len(lost)} outputs whose inputs are not apart ({_some(lost)})")
    inner = [
        f"{type(module).__name__} {name!r}"
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
    ]
    if inner:
        found.append(f"the inside of {_some(inner)}")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])


def _nothing(trace: Trace, not_judged: Sequence[str]) -> Finding:
    judged = [n for n in trace.judged if n.values is not None]
    signals = [n for n in trace.nodes if (n.weights or n.norm or trace.is_sum(n)) and n.varies]
    text = f"in {len(judged)} of {len(signals)} signals"
    if judged:
        low = min(judged, key=lambda n: n.values.spread if n.values and n.values.sigma2 else 2)
        assert low.values is not None
        text += f" (lowest v²/σ² {low.values.spread:.2g} at {low.place!r})"
    text += f"; not judged: {'; '.join(not_judged)}." if not_judged else "."
    return Finding("nothing found", "", text, math.nan)
