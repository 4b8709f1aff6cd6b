"""The torch functions that a forward pass calls, and whose outputs each takes.

Hooks on modules see modules alone; this record sees every function. It holds structure: which
operation, on the outputs of which calls. :mod:`svlib.probing.along` follows it with theory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from svlib.probing import operations as ops
from svlib.probing.models import DEPTH, tensors
from svlib.probing.norms import Note, note


@dataclass(frozen=True)
class Call:
    """One call of a torch function on something that depends on the model's input.

    Attributes:
        function: Name of the function.
        operation: What theory needs to know of the call.
        parents: Numbers of the calls whose outputs it took.
        rows: Names of the output's rows in the table: a tensor that is returned again has several.
        is_output: Whether it made an output of the model.
    """

    function: str
    operation: ops.Operation
    parents: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    is_output: bool = False


class _Output(NamedTuple):
    """What is known of a call's output.

    ``measures`` says whether theory knows its mean squares. ``origins`` are the nearest weights
    (their storage) or inputs upstream; signals that share none are independent. ``units`` is their
    number, where known; ``note`` says which step of a normalization the output is. ``apart`` says
    whether positions are independent, ``None`` of what no weights have met.
    """

    measures: bool
    origins: frozenset[int]
    units: int | None
    note: Note
    apart: bool | None


class Recorder(TorchFunctionMode):
    """Record the calls of a forward pass, while active as a context manager.

    ``measure`` measures the operands of a sum that no formula follows. ``on_call`` is called with
    the function's name and its output after every call that computed (and did not only view) it.
    """

    def __init__(
        self,
        inputs: Iterable[tuple[ops.Input, torch.Tensor]],
        measure: Callable[[torch.Tensor], ops.Measured | None],
        on_call: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._measure, self._on_call = measure, on_call
        self._number = WeakTensorKeyDictionary()
        self._outputs: list[_Output] = []  # of the calls
        for number, (described, x) in enumerate(inputs):
            known = _Output(False, frozenset({-1 - number}), None, Note("itself", number), None)
            self._add(Call("input", described), x, known)

    def knows(self, output: torch.Tensor) -> bool:
        """Whether a tensor depends on the inputs, as far as was seen."""
        return output in self._number

    def name_row(self, output: torch.Tensor, row: str) -> None:
        """Say that an output has a row of this name."""
        if output in self._number:
            number = self._number[output]
            rows = (*self.calls[number].rows, row)
            self.calls[number] = replace(self.calls[number], rows=rows)
            self._outputs[number] = self._outputs[number]._replace(measures=True)

    def is_output(self, output: Any) -> None:
        """Say what the model returned."""
        for _, y in tensors(output):
            if y in self._number and y.is_floating_point():
                number = self._number[y]
                self.calls[number] = replace(self.calls[number], is_output=True)

    def passed(self, module: str, given: Any, output: Any) -> None:
        """Say what a module took and returned: functions of autograd are not seen as calls."""
        parents = tuple(self._number[x] for _, x in tensors(given) if x in self._number)
        for _, y in tensors(output):
            if parents and y not in self._number:
                self._add(Call(module, ops.Beyond(module), parents), y)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", type(function).__name__).strip("_")
        made = [args[0]] if name == "setitem" else [y for _, y in tensors(output)]
        given = [x for _, x in tensors((args, kwargs))] if made else []  # most ask for a shape
        mine = [x for x in given if x in self._number]
        if not mine:
            return output
        inplace = any(output is x for x in given) and (
            function.__name__.endswith("_") or bool(kwargs.get("inplace"))
        )
        with torch._C.DisableTorchFunction():  # other modes must not see what follows
            self._note(name, mine, given, made, args, kwargs, inplace=inplace)
        return output

    def _note(
        self,
        name: str,
        mine: list[torch.Tensor],
        given: list[torch.Tensor],
        made: list[torch.Tensor],
        args: Any,
        kwargs: Any,
        *,
        inplace: bool,
    ) -> None:
        numbers = [self._number[x] for x in mine]
        parents = [self._outputs[number] for number in numbers]
        call, step = _call(name, mine, numbers, parents, made[0], args, kwargs)
        if isinstance(call.operation, ops.Sum | ops.Product):
            call = replace(call, parents=tuple(map(self._followed, numbers, mine)))
        known = None
        if name in ops.WEIGHTED:
            known = _of_weights(call, len(self.calls), parents[0], args, kwargs, made[0])
        for y in made:
            self._add(call, y, known, step)
            computed = inplace or all(_storage(y) != _storage(x) for x in given)
            if self._on_call is not None and y.is_floating_point() and computed:
                self._on_call(name, y)

    def _add(
        self,
        call: Call,
        output: torch.Tensor,
        known: _Output | None = None,
        step: Note | None = None,
    ) -> None:
        if known is None:
            parents = [self._outputs[parent] for parent in call.parents]
            known = _without_weights(call, len(self.calls), parents, step)
        self._number[output] = len(self.calls)
        self._outputs.append(known)
        self.calls.append(call)

    def _followed(self, number: int, x: torch.Tensor) -> int:
        """The number of a call whose mean squares are known: this one, or its measurement."""
        output = self._outputs[number]
        found = None if output.measures else self._measure(x)
        if found is None:
            return number
        self._add(Call("measured", found, (number,)), x, output._replace(measures=True))
        return len(self.calls) - 1


def _call(
    name: str,
    mine: list[torch.Tensor],
    numbers: list[int],
    parents: list[_Output],
    output: torch.Tensor,
    args: Any,
    kwargs: Any,
) -> tuple[Call, Note | None]:
    """A call on signals, and the step of a normalization that its output is."""
    step = note(name, [parent.note for parent in parents], args, kwargs, output)
    if isinstance(step, ops.Normalize):  # written out by hand
        return Call(step.kind, step, (parents[0].note.base,)), None
    function = "add" if name in ops.SUMS else name
    function = "mul" if name in ops.PRODUCTS | ops.QUOTIENTS else function
    operation = _read(name, mine, parents, output, args, kwargs)
    return Call(function, operation, tuple(numbers)), step


def _of_weights(
    call: Call, number: int, parent: _Output, args: Any, kwargs: Any, y: torch.Tensor
) -> _Output:
    name = call.function
    origin = ops.weight_of(name, args, kwargs).untyped_storage().data_ptr()
    units = 1 if name in ops.CONVOLUTIONS else -1
    follows = not isinstance(call.operation, ops.Beyond)
    apart = parent.apart
    if apart is None:
        apart = _independent(ops.signal_of(name, args, kwargs), units)
    apart = follows and apart and ops.keeps_apart(name, args, kwargs)
    known = y.shape[units]
    return _Output(follows, frozenset({origin}), known, Note("itself", number), apart)


def _independent(x: torch.Tensor, units: int) -> bool:
    """Whether means over the positions of an input vary as those of as many inputs would."""
    if x.ndim < 3 or len(x) < 2:
        return False  # a view may make positions of what has none
    z = x.detach().double().movedim(units, 1).flatten(2)  # (inputs, units, positions)
    samples, width, positions = z.shape
    found = positions * z.mean(2).var(0).mean() / (z - z.mean((0, 2), keepdim=True)).square().mean()
    return bool(abs(found - 1) < 4 * math.sqrt(2 / (width * (samples - 1))))


def _without_weights(call: Call, number: int, parents: list[_Output], step: Note | None) -> _Output:
    follows = not isinstance(call.operation, ops.Beyond)
    moved = isinstance(call.operation, ops.Move | ops.Measured)
    return _Output(
        follows and all(parent.measures for parent in parents),
        frozenset[int]().union(*(parent.origins for parent in parents)),
        parents[0].units if follows else None,
        step or (parents[0].note if moved else Note("itself", number)),
        _apart(call.operation, parents),
    )


def _apart(operation: ops.Operation, parents: list[_Output]) -> bool | None:
    """Whether positions are independent behind an operation without weights."""
    before = [parent.apart for parent in parents]
    pattern = isinstance(operation, ops.Affine) and operation.pattern
    if pattern or isinstance(operation, ops.Beyond) or False in before:
        return False
    return None if None in before else True


def _read(
    name: str,
    mine: list[torch.Tensor],
    parents: list[_Output],
    output: torch.Tensor,
    args: Any,
    kwargs: Any,
) -> ops.Operation:
    """The operation of a call on signals from outputs of which this is known."""
    if name in ops.SUMS | ops.PRODUCTS | ops.QUOTIENTS:
        real = all(x.is_floating_point() and x.shape == output.shape for x in mine)
        if name in ops.QUOTIENTS or len(mine) != 2 or not real or "alpha" in kwargs:
            return ops.arithmetic_of(name, mine, args, kwargs, output)
        dependent = parents[0].origins & parents[1].origins
        if dependent:
            kind = "add" if name in ops.SUMS else "mul"
            return ops.Beyond(f"{kind} of dependent signals")
        return ops.Sum() if name in ops.SUMS else ops.Product()
    x = ops.signal_of(name, args, kwargs)
    if name in ops.WEIGHTED | {"layer_norm", "rms_norm"}:
        if len(mine) > 1 or mine[0] is not x:
            return ops.Beyond(f"{name} with weights from the input")
        if parents[0].units not in (None, x.shape[1 if name in ops.CONVOLUTIONS else -1]):
            return ops.Beyond(f"{name} over positions")
    if name in ops.RESHAPES and _merges_positions(mine[0], output):
        return ops.Beyond("flatten of positions")
    if name in ops.MEANS and parents[0].apart:
        return ops.pool_of(name, parents[0].units, args, kwargs, output)
    if name in ("cat", "concat", "stack"):
        joins = len(list(tensors((args, kwargs)))) > len(mine)
        return ops.Beyond(f"{name} with a constant" if joins else name, joins=joins)
    return ops.operation_of(name, args, kwargs)


def inputs_of(
    model: nn.Module, given: Any, samples: int
) -> Iterator[tuple[ops.Input, torch.Tensor]]:
    """Every tensor among a model's arguments (args, kwargs), described for a record."""
    args, kwargs = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = [parameter.name for parameter in parameters if parameter.kind in kinds]
    except (TypeError, ValueError):
        named = []
    args = args if isinstance(args, list | tuple) else (args,)
    names = [*named[: len(args)], *(f"argument {n}" for n in range(len(named), len(args)))]
    for name, value in (*zip(names, args, strict=False), *dict(kwargs).items()):
        for where, x in tensors(value, objects=DEPTH):
            yield _described(f"{name}{where}", x, samples), x


def _described(name: str, x: torch.Tensor, samples: int) -> ops.Input:
    plain = x.layout is torch.strided and not x.is_nested and not x.is_complex()
    if not plain or x.ndim == 0 or len(x) != samples:
        return ops.Input(name, varies=x.ndim > 0)
    varies = samples < 2 or not bool((x == x[:1]).all())
    padding = _padding(x) if varies and x.ndim in (2, 3) and x.shape[1] > 3 else 0.0
    measured = None
    if x.is_floating_point() and samples > 1 and bool(x.isfinite().all()):
        z = x.flatten(1).double()
        sigma2, mean = float(z.square().mean()), float(z.mean().square())
        variance = float(z.var(0).mean())
        measured = ops.Measured(sigma2, sigma2 - variance, mean)
    return ops.Input(name, varies, measured, padding)


def _padding(x: torch.Tensor) -> float:
    """Fraction of positions in runs of one value, the same for all inputs, at one of their ends.

    Of tokens (inputs, positions), or of features (inputs, positions, features) that are 0.
    """
    if x.ndim == 2 and x.is_floating_point():
        return 0.0
    found = []
    for ends in (x, x.flip(1)):
        value = ends[:, -1:].flatten().mode().values if x.ndim == 2 else 0
        same = ends == value if x.ndim == 2 else (ends == 0).all(2)
        found.append(float(same.flip(1).cummin(1).values.double().mean()))
    return max(found)


def _merges_positions(x: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a reshape makes units of several dimensions that are not of size 1."""
    flat = output.ndim == 2 < x.ndim and len(output) == len(x)
    return flat and sum(size > 1 for size in x.shape[1:]) > 1


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)
