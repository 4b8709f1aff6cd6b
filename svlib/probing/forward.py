"""One forward pass whose outputs go to rows of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from svlib.probing.models import (
    Dimensions,
    LostInputsError,
    MergedInputsError,
    dimensions,
    has_numbers,
    is_weighted,
    named_modules,
    row_name,
    unit_dimension,
)
from svlib.probing.passes import Key, Output, Watch
from svlib.probing.places import Guess, Place, Places
from svlib.probing.rows import Rows, UnreadError

_SEQUENCES = (nn.RNNBase, nn.MultiheadAttention)


class Observer(Protocol):
    """What looks at every output of a pass: :class:`svlib.probing.trace.Trace`."""

    def observe(self, made: Output, running: Pass) -> bool:
        """Take note; whether it is one that may have a row among all."""

    def name_row(self, y: torch.Tensor, row: str) -> None:
        """Say that an output has a row of this name."""


class Pass:
    """One forward pass whose outputs go to rows.

    Attributes:
        samples: Number of inputs in the batch.
        guesses: Where sizes alone did not tell where the inputs lie, and nothing else did.

    Args:
        model: The model that is called.
        rows: Where the outputs go.
        samples: Number of inputs in the batch.
        mask: Which positions count.
        places: Where the inputs lie; ``None`` takes the first dimension.
        trace: Sees all modules and functions; without one, only weighted layers are looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        samples: int,
        mask: torch.Tensor | None = None,
        places: Places | None = None,
        trace: Observer | None = None,
    ) -> None:
        self._model, self._rows, self.samples, self.mask = model, rows, samples, mask
        self._places, self._trace = places, trace
        self.modules = dict(named_modules(model))
        self._units: dict[torch.Size, int] = {}  # unit dimension of the latest, by shape
        self._counts: Counter[str] = Counter()
        self._seen: set[Key] = set()
        self.guesses: list[Guess] = []

    def watch(self) -> AbstractContextManager[None]:
        """Watch the model's next call."""
        modules = None if self._trace is not None else watched(self._model)
        return Watch(self._model, self.note, modules).watching()

    def note(self, made: Output) -> None:
        """Add an output to its row, if it has one."""
        if isinstance(made.module, _SEQUENCES) and _runs_over_inputs(self, made):
            self._rows.over_inputs[str(made.key[0])] = None
        wanted = self._trace is not None and self._trace.observe(made, self)
        if not self._rows.everything:  # the first output of a weighted layer that has numbers
            call = made.key[:2]
            floating = made.y.is_floating_point() or made.y.is_complex()
            wanted = is_weighted(made.module) and floating and call not in self._seen
            self._seen.add(call) if wanted else None
            made = made._replace(name=str(made.key[0]))
        if wanted:
            self._add(made)

    def _add(self, made: Output) -> None:
        if not is_weighted(made.module) and not self._holds_inputs(made):
            return
        self._counts[made.name] += 1
        row = row_name(made.name, self._counts[made.name])
        names = (row, made.name, str(made.key[0]) if made.module is not None else made.name)
        if row in self._rows.left_out or not self._rows.asks_for(made.module, *names):
            return
        try:
            y, dims = self.apart(made, row)
        except ValueError as error:
            self._rows.leave_out(row, error, excusable=isinstance(error, MergedInputsError))
            return
        self._rows.add(row, made.module, made.function, y, dims, self.mask)
        if self._trace is not None:
            self._trace.name_row(made.y, row)

    def _holds_inputs(self, made: Output) -> bool:
        try:
            return self.place(made) is not None
        except LostInputsError:
            return True

    def units(self, made: Output) -> None:
        """Take note of where the units lie in an output, for others of its shape."""
        own = unit_dimension(made.name, made.module, made.y)
        if own is not None:
            self._units[made.y.shape] = own

    def place(self, made: Output) -> Place | None:
        """Where the inputs lie in an output."""
        y, samples = made.y, self.samples
        if self._places is not None:
            return self._places.of(made.key, y.shape, samples)
        place = Place(0) if y.shape[:1] == (samples,) else None
        if place is None or y.shape.count(samples) > 1:
            self.guesses.append(Guess(made.key, y.shape, place))
        return place

    def apart(self, made: Output, name: str) -> tuple[torch.Tensor, Dimensions]:
        """An output with its inputs in a dimension of their own, and its dimensions.

        Raises:
            MergedInputsError: If the inputs are not kept apart.
        """
        y = made.y
        if y.is_complex():
            raise UnreadError("are complex")
        if not has_numbers(y):
            raise UnreadError("were made where no numbers can be read (torch.func, a compiler)")
        place, samples = self.place(made), self.samples
        size = samples if place is None else y.shape[place.dim]
        axis = 0 if place is None else place.dim
        axis, unit, positions = dimensions(
            name, made.module, y, size, self._units.get(y.shape), axis
        )
        self._units[y.shape] = unit
        if place is None or (merged := size // samples) == 1:
            return y, (axis, unit, positions)
        outer = merged if place.outer == -1 else place.outer
        sizes = [x for x in (outer, samples, merged // outer) if x > 1]
        here = axis + (outer > 1)
        added = [dim for dim in range(axis, axis + len(sizes)) if dim != here]
        later = [dim + (len(sizes) - 1) * (dim > axis) for dim in (unit, *positions)]
        y = y.reshape(*y.shape[:axis], *sizes, *y.shape[axis + 1 :])
        return y, (here, later[0], (*added, *later[1:]))


def _runs_over_inputs(running: Pass, made: Output) -> bool:
    """Whether a sequence takes the inputs of the batch for time."""
    if made.key[-1] not in ("", "[0]") or not made.y.is_floating_point():
        return False
    try:
        place = running.place(made)
    except LostInputsError:
        return False
    batched = made.y.ndim > 2 and getattr(made.module, "batch_first", False)
    return place is not None and place.dim == 0 and not batched


def watched(model: nn.Module) -> Mapping[str, nn.Module]:
    """The modules whose outputs are looked at where functions are not: weighted layers, and
    sequences, which may run over the inputs."""
    return {
        name: module
        for name, module in named_modules(model)
        if is_weighted(module) or isinstance(module, _SEQUENCES)
    }
