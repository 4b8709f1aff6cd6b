"""Why a number is what it is, by removal: one suspect is taken away, and it is measured again.

Suspects are biases, the mean and scale of inputs, activations, averages over positions or inputs,
constants that are added or put beside the signal, BatchNorm's running statistics, the size of
weights, of sums and of branches, and dropout. The strongest is taken away first, then, with it
away, the strongest of the rest, until the number is sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from svlib.probing import operations as ops
from svlib.probing.batches import Batch
from svlib.probing.extras import extras
from svlib.probing.forward import Pass
from svlib.probing.functions import ACTIVATIONS, AVERAGES
from svlib.probing.graph import Graph, Node
from svlib.probing.models import structural_copy
from svlib.probing.passes import Output, Watch
from svlib.probing.places import Places
from svlib.probing.replacing import JOINS, Removed, Replacing
from svlib.probing.rows import Row, Rows, Values


class Measured(NamedTuple):
    """What was measured of an output: its values, and shares such as how far it is saturated."""

    values: Values
    extra: Mapping[str, float]


class _End(Exception):  # noqa: N818, ends a pass early
    pass


@dataclass(frozen=True)
class Trial:
    """A batch, and the model on which suspects are taken away."""

    model: nn.Module
    batch: Batch
    trace: Graph
    places: Places | None
    positions: str

    def measure(self, targets: Mapping[str, Node], removed: Removed) -> dict[str, Measured] | None:
        """Values at nodes with suspects taken away; ``None`` if the model then fails."""
        keys = {node.key: name for name, node in targets.items()}
        found: dict[str, Measured] = {}
        with structural_copy(self.model) as copied:
            batch = _inputs_changed(self.batch.copied(copied), removed)
            running = Pass(
                copied, Rows(None, self.positions), batch.samples, batch.mask, self.places
            )

            def note(made: Output) -> None:
                running.units(made)
                if (name := keys.get(made.key)) is not None:
                    y, dims = running.apart(made, targets[name].place)
                    row = Row("", y, dims, self.positions, directions=True)
                    values = row.update(y, dims, batch.mask).values()
                    found[name] = Measured(values, extras(made, values, None))
                    if len(found) == len(keys):
                        raise _End

            watch = Watch(copied, note, None, Replacing(self.trace, removed))
            try:
                with watch.watching():
                    batch.run(copied)
            except _End:
                return found
            except Exception:  # what is left is no network
                return None
        return found if len(found) == len(keys) else None


def present(trace: Graph, number: int) -> dict[str, list[Node]]:
    """The suspects on the way to a node, with the nodes at which they are."""
    found: dict[str, list[Node]] = {}

    def add(kind: str, node: Node) -> None:
        found.setdefault(kind, []).append(node)

    for node in trace.upstream(number):
        op, values = node.operation, node.values
        parents = [trace.nodes[p] for p in node.parents]
        if isinstance(op, ops.Input):
            if values is not None and values.m2 > 0.05 * values.sigma2:
                add("input mean", node)
            if node.extra.get("columns", 1.0) > 10 or not 0.1 < node.extra.get("rms", 1.0) < 10:
                add("input scale", node)
        if isinstance(op, ops.Weights):
            if op.bias.square > 0:
                add("biases", node)
            if not 1.6 < op.gain < 2.4:
                add("weights", node)
        if node.function in ACTIVATIONS and node.number not in trace.gates:
            add("activations", node)
        if node.function in AVERAGES and (not node.function.startswith("max") or len(node.parents)):
            add("averages", node)
        if node.function in JOINS or (node.function in ops.SUMS and len(parents) == 1):
            add("constants", node)
        if "statistics" in node.extra:
            add("statistics", node)
        if isinstance(op, ops.Dropout) and op.keep < 1:
            add("dropout", node)
        if trace.is_sum(node):
            add("sums", node)
    return found


def _inputs_changed(batch: Batch, removed: Removed) -> Batch:
    scaled = "input scale" in removed
    if not scaled and "input mean" not in removed:
        return batch
    return batch.replaced(lambda x: standardized(x, batch.samples, scale=scaled))


def standardized(x: torch.Tensor, samples: int, *, scale: bool = True) -> torch.Tensor:
    """An argument without its mean over inputs and positions, and divided by its deviation, column
    by column or channel by channel; anything but floating-point inputs as it is."""
    if not x.is_floating_point() or x.ndim < 2 or len(x) != samples:
        return x
    unit = 1 if x.ndim > 3 else x.ndim - 1
    dims = [dim for dim in range(x.ndim) if dim != unit]
    centred = x - x.mean(dims, keepdim=True)
    if not scale:
        return centred
    deviation = centred.square().mean(dims, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)
