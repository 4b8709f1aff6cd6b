"""The torch functions that a forward pass calls, and whose outputs each takes: what hooks on modules do not see.

A record of calls is structure alone (which function, on what, and sizes of its constants); :mod:`svlib.explanation` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CONVOLUTIONS = frozenset(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
WEIGHTED = CONVOLUTIONS | {"linear", "addmm"}
# What moves entries and leaves them as they are
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
MOVES = _RESHAPES | {"transpose", "permute", "movedim", "contiguous", "clone", "detach", "to", "float", "double", "get"}
NORMS = frozenset({"batch_norm", "layer_norm", "rms_norm"})
FOLLOWED = WEIGHTED | MOVES | NORMS | {"relu", "leaky_relu", "dropout", "add", "mul"}

_SUMS = frozenset({"add", "iadd", "radd", "sub", "isub", "rsub"})
_PRODUCTS = frozenset({"mul", "imul", "rmul"})
_QUOTIENTS = frozenset({"div", "truediv", "itruediv"})


@dataclass
class Call:
    """One call of a torch function on something that depends on the network's input.

    Attributes:
        function: Name; "input" for an input, with "add" and "mul" for their relatives.
        parents: Numbers of the calls whose outputs it took.
        options: What a theory needs of its other arguments: of a weighted layer ``gain`` = fan-in times mean square weight,
            ``bias2`` = mean square bias; of a normalization ``gamma2`` and ``beta2``, and ``mean2`` and ``variance`` where they
            are constants; ``constant2``, the mean square of what is added or multiplied by; the ``slope`` of leaky ReLU;
            ``m2``, ``sigma2`` and ``mean2`` where they were measured.
        row: Name of the output's row in the table, if it has one.
    """

    function: str
    parents: tuple[int, ...] = ()
    options: dict[str, float] = field(default_factory=dict)
    row: str = ""


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested lists, tuples and dictionaries, with where it is: "", "[0]", "['key'][1]"."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}[{key!r}]")


class Recorder(TorchFunctionMode):
    """Record the calls of a forward pass, while active as a context manager.

    Args:
        inputs: What the model is given; tensors anywhere in it.
        measure: m2, sigma2 and the squared mean over all, mean2, of a tensor, or ``None``. Asked for
            the operands of a sum that no formula follows.
        on_call: Told the function's name, its output and whether it was computed (not only viewed), after every call.
    """

    def __init__(
        self,
        inputs: Any,
        measure: Callable[[torch.Tensor], dict[str, float] | None],
        on_call: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._measure, self._on_call = measure, on_call
        self._number = WeakTensorKeyDictionary()
        self._known: list[bool] = []
        # Inputs and weighted layers that a signal comes from, with none between: signals without a common one are independent
        self._origins: list[frozenset[int]] = []
        for _, x in tensors(inputs):
            self._add(Call("input"), x, known=False)

    def _add(self, call: Call, output: torch.Tensor, *, known: bool) -> None:
        self._number[output] = len(self.calls)
        if call.function in WEIGHTED | {"input"}:
            self._origins.append(frozenset({len(self.calls)}))
        else:
            self._origins.append(frozenset[int]().union(*(self._origins[parent] for parent in call.parents)))
        self.calls.append(call)
        self._known.append(known)

    def name_row(self, output: torch.Tensor, row: str) -> None:
        """Say that an output has a row of this name."""
        if output in self._number:
            number = self._number[output]
            self.calls[number].row = row
            self._known[number] = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        made = [y for _, y in tensors(output)]
        given = [x for _, x in tensors((args, kwargs))] if made else []  # most calls only ask for a shape
        mine = [x for x in given if x in self._number]
        if not mine:
            return output
        name = getattr(function, "__name__", type(function).__name__).strip("_")
        inplace = any(output is x for x in given) and (function.__name__.endswith("_") or bool(kwargs.get("inplace")))
        parents = [self._number[x] for x in mine]
        call = self._call(name, parents, mine, args, kwargs, output)
        known = call.function in WEIGHTED or (call.function in FOLLOWED and all(self._known[n] for n in call.parents))
        for y in made:
            self._add(call, y, known=known)
            if self._on_call is not None and y.is_floating_point():
                storage = y.untyped_storage().data_ptr()
                if inplace or all(x.untyped_storage().data_ptr() != storage for x in given):
                    self._on_call(name, y)
        return output

    def _call(self, name: str, parents: list[int], mine: list[torch.Tensor], args: Any, kwargs: Any, output: Any) -> Call:
        if name in _SUMS | _PRODUCTS | _QUOTIENTS:
            options = _constant(name, mine, args, kwargs)
            name = "add" if name in _SUMS else "mul"
            if name == "add" and len(mine) == 2:
                if self._origins[parents[0]] & self._origins[parents[1]]:
                    return Call("add of dependent signals", tuple(parents))
                parents = [self._followed(number, x) for number, x in zip(parents, mine, strict=True)]
        else:
            options = _options(name, args, kwargs)
        merges = name in _RESHAPES and output.ndim == 2 < mine[0].ndim and len(output) == len(mine[0])
        if options is None or (merges and sum(size > 1 for size in mine[0].shape[1:]) > 1):
            name, options = ("flatten of positions" if merges else f"{name}*"), {}
        return Call(name, tuple(parents), options)

    def _followed(self, number: int, x: torch.Tensor) -> int:
        """The number of a call whose m2 and sigma2 are known: this one, or its measurement."""
        found = None if self._known[number] else self._measure(x)
        if found is not None:
            measured = Call("measured", (number,), found)
            self._add(measured, x, known=True)
            return len(self.calls) - 1
        return number


def _options(name: str, args: Any, kwargs: Any) -> dict[str, float] | None:
    """What theory needs of a call's arguments; ``None`` where the call is beyond it."""

    def argument(position: int, keyword: str, default: Any = None) -> Any:
        return args[position] if len(args) > position else kwargs.get(keyword, default)

    if name in WEIGHTED:
        weight = argument(2, "mat2") if name == "addmm" else argument(1, "weight")
        bias = argument(0, "input") if name == "addmm" else argument(2, "bias")
        fan_in = weight.shape[0] if name == "addmm" else weight[0].numel()
        if "transpose" in name:  # each output position sees 1/stride of the kernel
            stride, groups = argument(3, "stride", 1), argument(6, "groups", 1)
            strides = math.prod(stride) if isinstance(stride, tuple | list) else stride ** (weight.ndim - 2)
            fan_in = weight.shape[0] // groups * math.prod(weight.shape[2:]) / strides
            return {"gain": fan_in * _mean_square(weight, 0.0), "bias2": _mean_square(bias, 0.0), "phases": float(strides)}
        return {"gain": fan_in * _mean_square(weight, 0.0), "bias2": _mean_square(bias, 0.0)}
    if name == "leaky_relu":
        return {"slope": float(argument(1, "negative_slope", 0.01))}
    if name == "dropout":
        return {"keep": 1 - float(argument(1, "p", 0.5)) if argument(2, "training", True) else 1.0}
    if name in NORMS:
        batch = name == "batch_norm"
        gamma, beta = argument(3 if batch else 2, "weight"), argument(4, "bias") if batch else argument(3, "bias")
        options = {"gamma2": _mean_square(gamma, 1.0), "beta2": 0.0 if name == "rms_norm" else _mean_square(beta, 0.0)}
        if batch and not argument(5, "training", False):  # an affine map with the running statistics
            mean, variance = argument(1, "running_mean"), argument(2, "running_var")
            options |= {"mean2": _mean_square(mean, 0.0), "variance": float(variance.double().mean())}
        return options
    return {}


def _constant(name: str, mine: list[torch.Tensor], args: Any, kwargs: Any) -> dict[str, float] | None:
    """Mean square of what is added or multiplied by; nothing where two signals are added; ``None`` where it has none."""
    if "alpha" in kwargs or "rounding_mode" in kwargs:
        return None
    if len(mine) == 2:
        return {} if name in _SUMS else None
    (constant,) = [x for x in (*args, *kwargs.values()) if x is not mine[0]][:1] or [None]
    if isinstance(constant, Real | torch.Tensor):
        square = _mean_square(torch.as_tensor(constant), 0.0)
        if name not in _QUOTIENTS:
            return {"constant2": square}
        if constant is not args[0] and square > 0:
            return {"constant2": 1 / square}
    return None


def _mean_square(value: torch.Tensor | None, default: float) -> float:
    if value is None:
        return default
    flat = value.detach().float().flatten()
    return float(flat.dot(flat)) / max(1, len(flat))
