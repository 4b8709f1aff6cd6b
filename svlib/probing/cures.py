"""What helps, by trial: each cure is applied to a copy with weights of its own and measured.

The columns are v^2/sigma^2 at the row of the finding and at the last one, the range of sigma^2 (its
largest over its smallest value), the growth of squared gradients backwards, all decades by which
findings are beyond their thresholds and, with a loss, the loss after fifty steps of Adam.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from svlib._random import stream
from svlib.probing import init, removal
from svlib.probing import operations as ops
from svlib.probing.batches import Batch
from svlib.probing.detectors import found
from svlib.probing.findings import Finding
from svlib.probing.functions import MULTIPLYING
from svlib.probing.graph import gradient_steps
from svlib.probing.models import structural_copy, weighted_layers
from svlib.probing.places import Places
from svlib.probing.probe import measure, squared_gradients
from svlib.probing.scales import carrier
from svlib.probing.trace import Trace

Loss = Callable[[Any], torch.Tensor]  # of an output
STEPS, RATE = 50, 1e-3
INITS = ("total init", "sample init")
_ROUNDING = 1e-5  # v^2/sigma^2 at which v is made of rounding errors
_PART = 8  # inputs that gradients are measured on


class Cure(NamedTuple):
    """A change of model or batch: its name, the code that makes it, how it is made here, and the
    suspects (:mod:`svlib.probing.removal`) that it acts on."""

    name: str
    code: str
    apply: Callable[[nn.Module, Batch], Batch]
    against: str = ""


@contextmanager
def own_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A copy whose weights may be changed."""
    with structural_copy(model) as copied:
        for parameter in copied.parameters():
            parameter.data = parameter.data.clone()
        yield copied


def _changed(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module, Batch], Batch]:
    def apply(model: nn.Module, batch: Batch) -> Batch:
        change(model)
        return batch

    return apply


def _weights(factors: dict[str, float]) -> Callable[[nn.Module, Batch], Batch]:
    def change(model: nn.Module) -> None:
        for name, factor in factors.items():
            weight = carrier(model.get_submodule(name))
            if weight is not None:
                weight.data.mul_(factor)

    return _changed(change)


def _scaling(factors: dict[str, float]) -> str:
    if len(factors) == 1:
        ((name, factor),) = factors.items()
        return f"model.get_submodule({name!r}).weight.data.mul_({factor:.3g})"
    listed = ", ".join(f"{name!r}: {factor:.3g}" for name, factor in factors.items())
    loop = "model.get_submodule(name).weight.data.mul_(factor)"
    return f"for name, factor in {{{listed}}}.items(): {loop}"


def _biases(names: Sequence[str] | None) -> Cure:
    def change(model: nn.Module) -> None:
        for name, layer in weighted_layers(model).items():
            bias = layer._parameters.get("bias")
            if bias is not None and (names is None or name in names):
                bias.data.zero_()

    code = "for layer in model.modules():\n    if getattr(layer, 'bias', None) is not None: "
    code += "layer.bias.data.zero_()"
    if names is not None:
        code = "; ".join(f"model.get_submodule({n!r}).bias.data.zero_()" for n in names)
    what = "biases" if names is None else f"biases of {', '.join(map(repr, names))}"
    return Cure(f"{what} 0", code, _changed(change), "biases")


def _statistics(model: nn.Module, batch: Batch) -> Batch:
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    held = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    batch.copied(model).run(model)
    for m, momentum in zip(norms, held, strict=True):
        m.momentum = momentum
        m.eval()
    return batch


def _recurrent(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    parameter.data.zero_()


def _undropped(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def candidates(model: nn.Module, trace: Trace, findings: Sequence[Finding]) -> Iterator[Cure]:
    """Cures that fit what was found."""
    layers = weighted_layers(model)
    kinds = {finding.kind for finding in findings}
    causes = " ".join(finding.cause for finding in findings)
    yield from _of_layers(trace, layers, findings)
    if "inputs" in kinds or "inputs" in causes:
        named = [f.place for f in findings if f.kind == "inputs" and f.place.isidentifier()]
        named = [name for name in named if name != "input"] or ["x"]  # torch's own is no variable
        code = "; ".join(f"{x} = ({x} - {x}.mean(0)) / {x}.std(0)" for x in named)
        code += "  # column by column, or channel by channel"
        yield Cure("inputs standardized", code, lambda model, batch: batch.replaced(
            lambda x: removal.standardized(x, batch.samples)),
            "input mean, input scale")  # fmt: skip
    if any("statistics" in node.extra for node in trace.nodes):
        code = "model.train(); model(batch); model.eval()  # with momentum=None, over the data"
        yield Cure("BatchNorm's statistics from data", code, _statistics, "statistics")
    if constants := _constants(trace):
        names = {n: r for n, r in constants.items() if r < 0.5}
        code = "; ".join(f"model.get_parameter({n!r}).data.mul_({r:.2g})" for n, r in names.items())

        def shrink(model: nn.Module) -> None:
            for name, ratio in names.items():
                model.get_parameter(name).data.mul_(ratio)

        if names:
            yield Cure(
                "constants at the size of the signal",
                code,
                _changed(shrink),
                "constants",
            )
    ends = _branch_ends(trace, layers)
    if len(ends) > 1:
        factors = dict.fromkeys(ends, len(ends) ** -0.5)
        yield Cure("branches multiplied by 1/√L", _scaling(factors), _weights(factors), "sums")
    if sharp := _in_front_of_softmax(trace, layers):
        yield Cure("smaller weights in front of softmax", _scaling(sharp), _weights(sharp))
    if any(gate.endswith(" gate") for node in trace.nodes for gate in node.extra):
        code = (
            "for name, bias in model.named_parameters():\n    if 'bias_' in name: bias.data.zero_()"
        )
        yield Cure("biases of gates 0", code, _changed(_recurrent))
    if "dropout" in causes:
        yield Cure(
            "no dropout",
            "model.eval()  # or a smaller p",
            _changed(_undropped),
            "dropout",
        )
    yield Cure(INITS[0], "sv.init.total_(model, batch)", _initialized(init.total_))
    told = [n.values.fraction for n in trace.judged if n.values is not None]
    if min(told, default=1.0) > _ROUNDING:  # it divides by v
        yield Cure(INITS[1], "sv.init.sample_(model, batch)", _initialized(init.sample_))


def _of_layers(trace: Trace, layers: Any, findings: Sequence[Finding]) -> Iterator[Cure]:
    """Other sizes of weights, and no biases."""
    causes = " ".join(finding.cause for finding in findings)
    gains = {
        name: node.operation.gain
        for node in trace.nodes
        if isinstance(node.operation, ops.Weights) and (name := _layer(trace, node, layers))
    }
    right = 2.0 if any(node.function == "relu" for node in trace.nodes) else 1.0
    off = {n: math.sqrt(right / g) for n, g in gains.items() if g > 0 and not 0.7 < g / right < 1.4}
    if off:
        size = "weights"
        for place in {finding.place for finding in findings} & off.keys():
            one = {place: off[place]}
            yield Cure(f"weights of {place!r} at He's rule", _scaling(one), _weights(one), size)
        code = (
            _scaling(off) if len(off) < 6 else "for layer in model.modules():\n    if isinstance("
        )
        if len(off) >= 6:
            code += "layer, (nn.Linear, nn.Conv2d)): nn.init.kaiming_normal_(layer.weight, "
            code += "nonlinearity='relu')"
        yield Cure("weights at He's rule", code, _weights(off), size)
    steps = gradient_steps(trace)
    factors = {b: math.exp(-0.5 * step) for (_, b), step in steps.items() if b in layers}
    if factors and any(finding.kind == "gradients" for finding in findings):
        yield Cure(
            "weights at which gradients keep their size", _scaling(factors), _weights(factors)
        )
    if any(isinstance(n.operation, ops.Weights) and n.operation.bias.square for n in trace.nodes):
        named = list(dict.fromkeys(f.place for f in findings if f.place in layers))
        if "bias" in causes and named:
            yield _biases(named)
        yield _biases(None)


def _initialized(initialize: Callable[..., Any]) -> Callable[[nn.Module, Batch], Batch]:
    def apply(model: nn.Module, batch: Batch) -> Batch:
        with warnings.catch_warnings(action="ignore"):
            initialize(model, [batch])
        return batch

    return apply


def _layer(trace: Trace, node: Any, layers: Any) -> str:
    name = str(node.key[0])
    return name if name in layers else ""


def _constants(trace: Trace) -> dict[str, float]:
    """Parameters beside or in a sum with a signal, and factors that give them its size."""
    found: dict[str, float] = {}
    for node in trace.nodes:
        for name, square in node.constants.items():
            values = trace.nodes[node.parents[0]].values
            if values is not None and square > 0:
                found[name] = math.sqrt(values.sigma2 / square)
    return found


def _branch_ends(trace: Trace, layers: Any) -> list[str]:
    """Weighted layers at the end of branches that are added to what they started from."""
    found = []
    for node in trace.nodes:
        if trace.is_sum(node) and len(node.parents) == 2:
            a, b = node.parents
            for branch, stream in ((a, b), (b, a)):
                feed = next((n for n in reversed(trace.way(branch)) if n.weights), None)
                above = {n.number for n in trace.upstream(branch)}
                if feed is not None and stream in above and feed.number > stream:
                    found.append(str(feed.key[0]))
    return [name for name in dict.fromkeys(found) if name in layers]


def _in_front_of_softmax(trace: Trace, layers: Any) -> dict[str, float]:
    """Factors for the layers whose products are the scores of a sharp softmax."""
    factors: dict[str, float] = {}
    for node in trace.nodes:
        if node.extra.get("sharpness", 0.0) > 0.5 and node.parents:
            way = [n for n in trace.way(node.number) if n.function in MULTIPLYING and n is not node]
            scores = way[-1].values if way else None  # not of a mask that is added
            size = 9.0 if scores is None or not scores.sigma2 > 1 else scores.sigma2
            for one in trace.upstream(node.number):
                name = str(one.key[0]) if one.key else ""
                if name in layers and one.number in trace.gates and one.weights:
                    factors[name] = min(1.0, size**-0.25)
    return factors


def tried(
    model: nn.Module,
    batch: Batch,
    places: Places | None,
    positions: str,
    trace: Trace,
    findings: Sequence[Finding],
    loss: Loss | None,
) -> tuple[pd.DataFrame, dict[str, list[Finding]]]:
    """The table of cures, "nothing" in its first row, and what is found after each."""
    rows: list[dict[str, Any]] = []
    after: dict[str, list[Finding]] = {}
    nothing = Cure("nothing", "", lambda model, batch: batch)
    place = findings[0].number
    name = trace.nodes[place].place if place >= 0 else ""
    for cure in (nothing, *candidates(model, trace, findings)):
        try:
            with own_copy(model) as copied, warnings.catch_warnings(action="ignore"):
                changed = cure.apply(copied, batch)
                new = measure(copied, [changed], None, positions, record=True, places=places).trace
                assert new is not None
                gradients(copied, changed, new, whole=places is None)
                ended = math.nan if loss is None else _trained(copied, changed, loss)
        except (RuntimeError, ValueError, AttributeError, TypeError):
            continue  # it cannot be had of this model
        after[cure.name] = found(new)
        judged = [n.values for n in new.judged if n.values is not None and n.values.sigma2 > 0]
        sizes = [values.sigma2 for values in judged]
        here = next((n.values for n in new.nodes if n.place == name and n.values), None)
        decades = sum(min(x.decades, 20.0) for x in after[cure.name] if not x.note)
        rows.append(
            {
                "cure": cure.name,
                "at the row": here.fraction if here else math.nan,
                "at the output": judged[-1].fraction if judged else math.nan,
                "range of σ²": max(sizes) / min(sizes) if sizes else math.nan,
                "gradients": math.exp(min(700.0, sum(gradient_steps(new).values()))),
                "decades": decades,
                **({} if loss is None else {"loss": ended}),
                "against": cure.against,
                "code": cure.code,
            }
        )
    frame = pd.DataFrame(rows)
    return (frame.set_index("cure") if rows else frame), after


def gradients(model: nn.Module, batch: Batch, trace: Trace, *, whole: bool) -> None:
    """Measure squared gradients of a part of a batch, or of the whole, and put them into the
    trace."""
    part = None if whole else batch.cut(min(_PART, max(2, batch.samples // 2)))
    part = part or batch
    squares, _ = squared_gradients(model, part, stream(0, "direction"), every=True)
    for node in trace.nodes:
        if node.weights and node.place in squares:
            node.gradient2 = squares[node.place]


def _trained(model: nn.Module, batch: Batch, loss: Loss) -> float:
    """The loss after some steps of Adam on one batch."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, RATE)
    value = math.nan
    with torch.enable_grad():
        for _ in range(STEPS + 1):
            step = loss(batch.copied(model).run(model))
            value = float(step.detach())
            optimizer.zero_grad()
            step.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return value
