"""The torch functions that a forward pass calls, and whose outputs each takes: what hooks on modules do not see.

A record of calls is structure alone (which function, on what, and sizes of its constants);
:mod:`svlib.probing.explanation` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CONVOLUTIONS = frozenset(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
WEIGHTED = CONVOLUTIONS | {"linear", "addmm"}
# What moves entries and leaves them as they are
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
MOVES = _RESHAPES | {
    "transpose",
    "permute",
    "movedim",
    "contiguous",
    "clone",
    "detach",
    "to",
    "float",
    "double",
    "get",
}
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
        options: What a theory needs of its other arguments, mean squares (ending in ``2``) and
            squared means (in ``_mean2``) of constants: of a weighted layer ``gain`` = fan-in times
            mean square weight, and the bias; of a normalization gamma, beta and ``eps``, or its
            ``scale2`` and shift where it uses constants; of what is added or multiplied by, with
            ``pattern`` if it differs from position to position; the ``slope`` of leaky ReLU; what
            dropout keeps; m2, sigma2 and the squared mean over all where they were measured.
        row: Name of the output's row in the table, if it has one.
        is_output: Whether it made the model's (first) output.
    """

    function: str
    parents: tuple[int, ...] = ()
    options: dict[str, float] = field(default_factory=dict)
    row: str | None = None
    is_output: bool = False


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
        measure: m2, sigma2 and the squared mean over all, mean2, of a tensor, or ``None``. Asked
            for the operands of a sum that no formula follows.
        on_call: Told the function's name, its output and whether it was computed (not only viewed),
            after every call.
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
        # Weights (their storage) and inputs that a signal comes from, with none between: without a
        # common one, signals are independent
        self._origins: list[frozenset[int]] = []
        self._units: list[int | None] = []
        for number, (_, x) in enumerate(tensors(inputs)):
            self._add(Call("input"), x, known=False, origins=frozenset({-1 - number}))

    def _add(
        self,
        call: Call,
        output: torch.Tensor,
        *,
        known: bool,
        origins: frozenset[int] | None = None,
        units: int | None = None,
    ) -> None:
        self._number[output] = len(self.calls)
        inherited = frozenset[int]().union(*(self._origins[parent] for parent in call.parents))
        self._origins.append(inherited if origins is None else origins)
        if call.function in FOLLOWED and call.parents and units is None:
            units = self._units[call.parents[0]]
        self._units.append(units)
        self.calls.append(call)
        self._known.append(known)

    def knows(self, output: torch.Tensor) -> bool:
        """Whether a tensor depends on the inputs, as far as was seen."""
        return output in self._number

    def name_row(self, output: torch.Tensor, row: str) -> None:
        """Say that an output has a row of this name."""
        if output in self._number:
            number = self._number[output]
            self.calls[number].row = row
            self._known[number] = True

    def is_output(self, output: Any) -> None:
        """Say what the model returned."""
        for _, y in tensors(output):
            if y in self._number and y.is_floating_point():
                self.calls[self._number[y]].is_output = True
                return

    def passed(self, module: str, given: Any, output: Any) -> None:
        """Say that a module made this of that, where no function was seen that did (custom autograd functions)."""
        parents = tuple(self._number[x] for _, x in tensors(given) if x in self._number)
        for _, y in tensors(output):
            if parents and y not in self._number:
                self._add(Call(module, parents), y, known=False)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", type(function).__name__).strip("_")
        made = [args[0]] if name == "setitem" else [y for _, y in tensors(output)]
        given = (
            [x for _, x in tensors((args, kwargs))] if made else []
        )  # most calls only ask for a shape
        mine = [x for x in given if x in self._number]
        if mine:
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
        call = self._call(name, mine, made[0], args, kwargs)
        known = call.function in WEIGHTED or (
            call.function in FOLLOWED and all(self._known[n] for n in call.parents)
        )
        origins, units = None, None
        if name in WEIGHTED:
            weight = _argument(args, kwargs, *((2, "mat2") if name == "addmm" else (1, "weight")))
            origins = frozenset({weight.untyped_storage().data_ptr()})
            units = made[0].shape[1 if name in CONVOLUTIONS else -1]
        for y in made:
            self._add(call, y, known=known, origins=origins, units=units)
            if self._on_call is not None and y.is_floating_point():
                storage = _storage(y)
                if inplace or all(_storage(x) != storage for x in given):
                    self._on_call(name, y)

    def _call(
        self, name: str, mine: list[torch.Tensor], output: torch.Tensor, args: Any, kwargs: Any
    ) -> Call:
        parents = tuple(self._number[x] for x in mine)
        beyond = ""
        options: dict[str, float] | None
        if name in _SUMS | _PRODUCTS | _QUOTIENTS:
            options = _constant(name, mine, args, kwargs, output)
            name = "add" if name in _SUMS else "mul"
            if (
                name == "add"
                and len(mine) == 2
                and self._origins[parents[0]] & self._origins[parents[1]]
            ):
                beyond = "add of dependent signals"
            elif name == "add" and len(mine) == 2:
                parents = tuple(
                    self._followed(number, x) for number, x in zip(parents, mine, strict=True)
                )
        else:
            options = _options(name, args, kwargs)
        if name in WEIGHTED | {"layer_norm", "rms_norm"}:
            x = _argument(args, kwargs, *((1, "mat1") if name == "addmm" else (0, "input")))
            if len(mine) > 1 or mine[0] is not x:
                beyond = f"{name} with weights from the input"
            elif self._units[parents[0]] not in (None, x.shape[1 if name in CONVOLUTIONS else -1]):
                beyond = f"{name} over positions"
        merges = (
            name in _RESHAPES and output.ndim == 2 < mine[0].ndim and len(output) == len(mine[0])
        )
        if merges and sum(size > 1 for size in mine[0].shape[1:]) > 1:
            beyond = "flatten of positions"
        if beyond or options is None:
            return Call(beyond or f"{name}*", parents)
        return Call(name, parents, options)

    def _followed(self, number: int, x: torch.Tensor) -> int:
        """The number of a call whose m2 and sigma2 are known: this one, or its measurement."""
        found = None if self._known[number] else self._measure(x)
        if found is not None:
            measured = Call("measured", (number,), found)
            self._add(measured, x, known=True)
            return len(self.calls) - 1
        return number


def _argument(args: Any, kwargs: Any, position: int, keyword: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(keyword, default)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)


def _options(name: str, args: Any, kwargs: Any) -> dict[str, float] | None:
    """What theory needs of a call's arguments; ``None`` where the call is beyond it."""
    argument = partial(_argument, args, kwargs)
    if name in WEIGHTED:
        weight = argument(2, "mat2") if name == "addmm" else argument(1, "weight")
        bias = argument(0, "input") if name == "addmm" else argument(2, "bias")
        fan_in = weight.shape[0] if name == "addmm" else weight[0].numel()
        phases: dict[str, float] = {}
        if "transpose" in name:  # each output position sees 1/stride of the kernel
            stride, groups = argument(3, "stride", 1), argument(6, "groups", 1)
            strides = (
                math.prod(stride)
                if isinstance(stride, tuple | list)
                else stride ** (weight.ndim - 2)
            )
            fan_in = weight.shape[0] // groups * math.prod(weight.shape[2:]) / strides
            phases["phases"] = float(strides)
        return {"gain": fan_in * _mean_square(weight)} | _moments("bias", bias) | phases
    if name == "leaky_relu":
        return {"slope": float(argument(1, "negative_slope", 0.01))}
    if name == "dropout":
        return {"keep": 1 - float(argument(1, "p", 0.5)) if argument(2, "training", True) else 1.0}
    if name == "batch_norm":
        mean, variance = argument(1, "running_mean"), argument(2, "running_var")
        gamma, beta, eps = (
            argument(3, "weight"),
            argument(4, "bias"),
            float(argument(7, "eps", 1e-5)),
        )
        if argument(5, "training", False):
            positions = {"positions": 1.0} if argument(0, "input").ndim > 2 else {}
            return (
                {"gamma2": _mean_square(gamma, 1.0), "eps": eps}
                | _moments("beta", beta)
                | positions
            )
        scale = (1.0 if gamma is None else gamma.float()) / (variance.float() + eps).sqrt()
        shift = (0.0 if beta is None else beta.float()) - mean.float() * scale
        return {"scale2": _mean_square(scale)} | _moments("shift", shift)
    if name in NORMS:
        gamma, beta = argument(2, "weight"), argument(3, "bias") if name == "layer_norm" else None
        eps = argument(
            4 if name == "layer_norm" else 3, "eps", 1e-5 if name == "layer_norm" else None
        )
        return {"gamma2": _mean_square(gamma, 1.0), "eps": float(eps or 0.0)} | _moments(
            "beta", beta
        )
    return {}


def _constant(
    name: str, mine: list[torch.Tensor], args: Any, kwargs: Any, output: torch.Tensor
) -> dict[str, float] | None:
    """Of what is added or multiplied by; nothing where two signals are added; ``None`` where theory is silent."""
    if "alpha" in kwargs or "rounding_mode" in kwargs:
        return None
    if len(mine) == 2:
        return {} if name in _SUMS else None
    (constant,) = [x for x in (*args, *kwargs.values()) if x is not mine[0]][:1] or [None]
    if not isinstance(constant, Real | torch.Tensor) or (
        name in _QUOTIENTS and constant is args[0]
    ):
        return None
    value = torch.as_tensor(constant)
    sizes = [1] * (output.ndim - value.ndim) + list(value.shape)
    if sizes and sizes[0] > 1:  # noise, for example, differs from input to input
        return None
    if name in _QUOTIENTS:
        value = 1 / value
    pattern = {"pattern": 1.0} if sum(size > 1 for size in sizes) > 1 else {}
    return _moments("constant", value) | pattern if bool(value.isfinite().all()) else None


def _moments(name: str, value: torch.Tensor | None) -> dict[str, float]:
    """Mean square and squared mean of a constant."""
    mean = 0.0 if value is None else float(value.detach().float().mean())
    return {f"{name}2": _mean_square(value), f"{name}_mean2": mean**2}


def _mean_square(value: torch.Tensor | None, default: float = 0.0) -> float:
    if value is None:
        return default
    flat = value.detach().float().flatten()
    return float(flat.dot(flat)) / max(1, len(flat))
