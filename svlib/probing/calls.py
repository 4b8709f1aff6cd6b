"""The torch functions that a forward pass calls, and whose outputs each takes.

Hooks on modules see modules alone; this record sees every function. It holds structure: which
operation, on the outputs of which calls. :mod:`svlib.probing.along` follows it with theory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from svlib.probing import operations as ops
from svlib.probing.models import tensors


@dataclass(frozen=True)
class Call:
    """One call of a torch function on something that depends on the model's input.

    Attributes:
        function: Name of the function.
        operation: What theory needs to know of the call.
        parents: Numbers of the calls whose outputs it took.
        row: Name of the output's row in the table, if it has one.
        is_output: Whether it made the model's (first) output.
    """

    function: str
    operation: ops.Operation
    parents: tuple[int, ...] = ()
    row: str | None = None
    is_output: bool = False


class _Output(NamedTuple):
    """What is known of a call's output.

    ``measures`` says whether theory knows its mean squares. ``origins`` are the nearest weights
    (their storage) or inputs upstream; signals that share none are independent. ``units`` is their
    number, where known.
    """

    measures: bool
    origins: frozenset[int]
    units: int | None = None


class Recorder(TorchFunctionMode):
    """Record the calls of a forward pass, while active as a context manager.

    ``inputs`` are the model's arguments. ``measure`` measures the operands of a sum that no formula
    follows. ``on_call`` is called with the function's name and its output after every call that
    computed (and did not only view) it.
    """

    def __init__(
        self,
        inputs: Any,
        measure: Callable[[torch.Tensor], ops.Measured | None],
        on_call: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._measure, self._on_call = measure, on_call
        self._number = WeakTensorKeyDictionary()
        self._outputs: list[_Output] = []  # of the calls
        for number, (_, x) in enumerate(tensors(inputs)):
            self._add(Call("input", ops.Input()), x, _Output(False, frozenset({-1 - number})))

    def knows(self, output: torch.Tensor) -> bool:
        """Whether a tensor depends on the inputs, as far as was seen."""
        return output in self._number

    def name_row(self, output: torch.Tensor, row: str) -> None:
        """Say that an output has a row of this name."""
        if output in self._number:
            number = self._number[output]
            self.calls[number] = replace(self.calls[number], row=row)
            self._outputs[number] = self._outputs[number]._replace(measures=True)

    def is_output(self, output: Any) -> None:
        """Say what the model returned."""
        for _, y in tensors(output):
            if y in self._number and y.is_floating_point():
                number = self._number[y]
                self.calls[number] = replace(self.calls[number], is_output=True)
                return

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
        # most calls only ask for a shape
        given = [x for _, x in tensors((args, kwargs))] if made else []
        mine = [x for x in given if x in self._number]
        if not mine:
            return output
        inplace = any(output is x for x in given) and (
            function.__name__.endswith("_") or bool(kwargs.get("inplace"))
        )
        with torch._C.DisableTorchFunction():  # other modes must not see what follows
            call = self._call(name, mine, made[0], args, kwargs)
            known = (
                _output_of_weights(call, args, kwargs, made[0]) if name in ops.WEIGHTED else None
            )
            for y in made:
                self._add(call, y, known)
                computed = inplace or all(_storage(y) != _storage(x) for x in given)
                if self._on_call is not None and y.is_floating_point() and computed:
                    self._on_call(name, y)
        return output

    def _add(self, call: Call, output: torch.Tensor, known: _Output | None = None) -> None:
        if known is None:
            parents = [self._outputs[parent] for parent in call.parents]
            follows = not isinstance(call.operation, ops.Beyond)
            known = _Output(
                follows and all(parent.measures for parent in parents),
                frozenset[int]().union(*(parent.origins for parent in parents)),
                parents[0].units if follows else None,
            )
        self._number[output] = len(self.calls)
        self._outputs.append(known)
        self.calls.append(call)

    def _call(
        self, name: str, mine: list[torch.Tensor], output: torch.Tensor, args: Any, kwargs: Any
    ) -> Call:
        parents = tuple(self._number[x] for x in mine)
        if name in ops.SUMS | ops.PRODUCTS | ops.QUOTIENTS:
            kind = "add" if name in ops.SUMS else "mul"
            if kind == "mul" or len(mine) != 2 or "alpha" in kwargs:
                return Call(kind, ops.arithmetic_of(name, mine, args, kwargs, output), parents)
            if self._outputs[parents[0]].origins & self._outputs[parents[1]].origins:
                return Call(kind, ops.Beyond("add of dependent signals"), parents)
            known = tuple(self._followed(n, x) for n, x in zip(parents, mine, strict=True))
            return Call(kind, ops.Sum(), known)
        x = ops.argument_of(args, kwargs, *((1, "mat1") if name == "addmm" else (0, "input")))
        operation = ops.operation_of(name, args, kwargs)
        if name in ops.WEIGHTED | {"layer_norm", "rms_norm"}:
            units = self._outputs[parents[0]].units
            if len(mine) > 1 or mine[0] is not x:
                operation = ops.Beyond(f"{name} with weights from the input")
            elif units not in (None, x.shape[1 if name in ops.CONVOLUTIONS else -1]):
                operation = ops.Beyond(f"{name} over positions")
        if name in ops.RESHAPES and _merges_positions(mine[0], output):
            operation = ops.Beyond("flatten of positions")
        return Call(name, operation, parents)

    def _followed(self, number: int, x: torch.Tensor) -> int:
        """The number of a call whose mean squares are known: this one, or its measurement."""
        output = self._outputs[number]
        found = None if output.measures else self._measure(x)
        if found is None:
            return number
        self._add(Call("measured", found, (number,)), x, output._replace(measures=True))
        return len(self.calls) - 1


def _output_of_weights(call: Call, args: Any, kwargs: Any, y: torch.Tensor) -> _Output:
    origin = ops.weight_of(call.function, args, kwargs).untyped_storage().data_ptr()
    units = y.shape[1 if call.function in ops.CONVOLUTIONS else -1]
    return _Output(not isinstance(call.operation, ops.Beyond), frozenset({origin}), units)


def _merges_positions(x: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a reshape makes units of several dimensions that are not of size 1."""
    flat = output.ndim == 2 < x.ndim and len(output) == len(x)
    return flat and sum(size > 1 for size in x.shape[1:]) > 1


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)
