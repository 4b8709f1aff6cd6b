"""The operations that theory can follow, and how they are read off a torch function's arguments.

Each holds the numbers that theory needs: mean squares of weights and constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch

CONVOLUTIONS = frozenset(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
WEIGHTED = CONVOLUTIONS | {"linear", "addmm"}
NORMS = frozenset(
    {"batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "normalize"}
)
SATURATING = frozenset({"tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign", "erf"})

RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
_TURNS = frozenset({"transpose", "permute", "movedim", "contiguous", "clone", "detach", "get"})
_CASTS = frozenset({"to", "float", "double"})
MOVES = RESHAPES | _TURNS | _CASTS
SUMS = frozenset({"add", "iadd", "radd", "sub", "isub", "rsub"})
_POOLS = frozenset(f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
MEANS = _POOLS | {"mean"}
PRODUCTS = frozenset({"mul", "imul", "rmul"})
QUOTIENTS = frozenset({"div", "truediv", "itruediv"})


class Constant(NamedTuple):
    """Mean square of a constant over its entries, and the square of its mean."""

    square: float = 0.0
    mean2: float = 0.0


_NONE = Constant()


@dataclass(frozen=True)
class Measured:
    """A measurement of its parent: mean square, mean product of two inputs, squared mean."""

    sigma2: float
    m2: float
    mean2: float


@dataclass(frozen=True)
class Input:
    """An input of the model: its name, and whether it differs between the inputs of the batch.

    ``measured`` are its mean squares, if it holds floating-point numbers; ``padding`` is the
    fraction of its entries that lie in runs of one value at the ends of the inputs.
    """

    name: str = ""
    varies: bool = True
    measured: Measured | None = None
    padding: float = 0.0


@dataclass(frozen=True)
class Weights:
    """A linear or convolutional layer: ``gain`` is fan-in times mean square weight.

    ``phases`` is the number of parts of a transposed convolution's kernel; an output position sees
    one of them.
    """

    gain: float
    bias: Constant = _NONE
    phases: float = 1.0


@dataclass(frozen=True)
class Relu:
    """(Leaky) ReLU with its negative slope."""

    slope: float = 0.0


@dataclass(frozen=True)
class Activate:
    """Another activation that theory knows, by its name in ``svlib.theory.activations``."""

    name: str

    @property
    def rectifies(self) -> bool:
        """Whether negative entries become 0."""
        return self.name == "relu6"


@dataclass(frozen=True)
class Affine:
    """Multiplication by constants of mean square ``scale2``, then addition of ``shift``.

    ``pattern`` says that the constants differ from position to position.
    """

    scale2: float = 1.0
    shift: Constant = _NONE
    pattern: bool = False


@dataclass(frozen=True)
class Normalize:
    """BatchNorm in training mode, LayerNorm or RMSNorm, with mean square scale and its shift.

    ``positions`` says that BatchNorm averages over positions too.
    """

    kind: Literal["batch_norm", "layer_norm", "rms_norm"]
    gamma2: float = 1.0
    beta: Constant = _NONE
    eps: float = 0.0
    positions: bool = False


@dataclass(frozen=True)
class Dropout:
    """Dropout that keeps a fraction ``keep`` of the entries; 1 in evaluation mode."""

    keep: float


@dataclass(frozen=True)
class Sum:
    """A sum of two independent signals."""


@dataclass(frozen=True)
class Product:
    """A product of two independent signals, as in gated units."""


@dataclass(frozen=True)
class Pool:
    """The average over ``positions`` that are as different as two inputs."""

    positions: int


@dataclass(frozen=True)
class Move:
    """Entries are moved and stay what they are."""


@dataclass(frozen=True)
class Beyond:
    """Theory does not follow; ``why`` is a noun that completes "theory starts anew behind".

    ``rectifies`` says that negative entries become 0, ``joins`` that a constant is put beside the
    signal.
    """

    why: str
    rectifies: bool = False
    joins: bool = False


Operation = (
    Input | Weights | Relu | Activate | Affine | Normalize | Dropout | Sum | Product | Pool
    | Move | Measured | Beyond
)  # fmt: skip


def argument_of(args: Any, kwargs: Any, position: int, keyword: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(keyword, default)


def signal_of(name: str, args: Any, kwargs: Any) -> Any:
    return argument_of(args, kwargs, *((1, "mat1") if name == "addmm" else (0, "input")))


def weight_of(name: str, args: Any, kwargs: Any) -> torch.Tensor:
    place = (2, "mat2") if name == "addmm" else (1, "weight")
    weight: torch.Tensor = argument_of(args, kwargs, *place)
    return weight


def operation_of(name: str, args: Any, kwargs: Any) -> Operation:
    """The operation of a function of one signal, from its other arguments."""
    argument = partial(argument_of, args, kwargs)
    if name in WEIGHTED:
        return _weights(name, args, kwargs)
    if name in MOVES:
        return Move()
    if name == "relu":
        return Relu()
    if name == "leaky_relu":
        return Relu(float(argument(1, "negative_slope", 0.01)))
    if name == "dropout":
        active = argument(2, "training", True)
        return Dropout(1 - float(argument(1, "p", 0.5)) if active else 1.0)
    if name == "batch_norm":
        return _batch_norm(args, kwargs)
    if name == "layer_norm":
        eps = float(argument(4, "eps", 1e-5))
        gamma2, beta = _mean_square(argument(2, "weight"), 1.0), _constant(argument(3, "bias"))
        return Normalize("layer_norm", gamma2, beta, eps)
    if name == "rms_norm":
        eps = float(argument(3, "eps") or 0.0)
        return Normalize("rms_norm", _mean_square(argument(2, "weight"), 1.0), eps=eps)
    known = _activation(name, argument)
    return Activate(known) if known else Beyond(name, rectifies=_rectifies(name, argument))


def _activation(name: str, argument: Callable[..., Any]) -> str | None:
    """The name under which theory knows an activation, if its parameters are the usual ones."""
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}[argument(1, "approximate", "none")]
    if name in ("hardtanh", "clamp", "clip"):
        names = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        ends = argument(1, names[0], -1.0), argument(2, names[1], 1.0)
        return {(-1.0, 1.0): "hardtanh", (0.0, 6.0): "relu6"}.get(ends)
    if name in ("elu", "softplus"):
        return name if argument(1, "alpha" if name == "elu" else "beta", 1.0) == 1 else None
    plain = ("tanh", "sigmoid", "silu", "mish", "selu", "relu6", "erf")
    return name if name in plain else {"sin": "sine"}.get(name)


def _rectifies(name: str, argument: Callable[..., Any]) -> bool:
    """Whether negative entries become 0: then units that are never positive pass nothing."""
    if name == "hardtanh":
        return bool(argument(1, "min_val", -1.0) == 0)
    if name == "threshold":
        return bool(argument(2, "value") == 0 and argument(1, "threshold") >= 0)
    if name in ("clamp", "clip", "clamp_min"):
        return bool(argument(1, "min") == 0)
    if name in ("maximum", "max"):
        other = argument(1, "other")
        return isinstance(other, torch.Tensor) and not bool(other.any())
    return False


def _weights(name: str, args: Any, kwargs: Any) -> Weights:
    argument = partial(argument_of, args, kwargs)
    weight = weight_of(name, args, kwargs)
    bias = _constant(argument(0, "input") if name == "addmm" else argument(2, "bias"))
    fan_in = float(weight.shape[0] if name == "addmm" else weight[0].numel())
    if "transpose" not in name:
        return Weights(fan_in * _mean_square(weight), bias)
    stride, groups = argument(3, "stride", 1), argument(6, "groups", 1)
    tuple_given = isinstance(stride, tuple | list)
    strides = math.prod(stride) if tuple_given else stride ** (weight.ndim - 2)
    # each output position sees 1/stride of the kernel
    fan_in = weight.shape[0] // groups * math.prod(weight.shape[2:]) / strides
    return Weights(fan_in * _mean_square(weight), bias, float(strides))


def keeps_apart(name: str, args: Any, kwargs: Any) -> bool:
    """Whether no two positions of a weighted layer's output see the same position of its input."""
    if name not in CONVOLUTIONS:
        return True
    argument = partial(argument_of, args, kwargs)
    kernel = weight_of(name, args, kwargs).shape[2:]
    strides = _per_axis(argument(3, "stride", 1), len(kernel))
    tiles = all(size <= stride for size, stride in zip(kernel, strides, strict=True))
    dense = {*_per_axis(argument(5, "dilation", 1), 1)} == {1}
    return "transpose" not in name and tiles and dense and _unpadded(argument(4, "padding", 0))


def _per_axis(value: Any, axes: int) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value] * axes


def _unpadded(padding: Any) -> bool:
    return padding == "valid" or not any(_per_axis(padding, 1))


def pool_of(name: str, units: int | None, args: Any, kwargs: Any, y: torch.Tensor) -> Operation:
    """Average pooling whose windows tile the positions, or a mean over all of them."""
    argument = partial(argument_of, args, kwargs)
    x: torch.Tensor = argument(0, "input")
    positions = x.numel() // y.numel()
    if name == "mean":
        over = {dim % x.ndim for dim in _per_axis(argument(1, "dim", []), 1)}
        kept = math.prod(size for dim, size in enumerate(x.shape) if dim and dim not in over)
        tiles = 0 not in over and kept == units != positions  # or units might be averaged
    else:
        axes = int(name[-2])
        windows = [a / b for a, b in zip(x.shape[-axes:], y.shape[-axes:], strict=True)]
        if name.startswith("adaptive"):
            tiles = all(window % 1 == 0 for window in windows)
        else:
            kernel = _per_axis(argument(1, "kernel_size"), axes)
            strides = _per_axis(argument(2, "stride") or kernel, axes)
            tiles = windows == kernel == strides and _unpadded(argument(3, "padding", 0))
    return Pool(positions) if tiles else Beyond(name)


def _batch_norm(args: Any, kwargs: Any) -> Operation:
    argument = partial(argument_of, args, kwargs)
    gamma, beta, eps = argument(3, "weight"), argument(4, "bias"), float(argument(7, "eps", 1e-5))
    if argument(5, "training", False):
        positions = argument(0, "input").ndim > 2
        return Normalize("batch_norm", _mean_square(gamma, 1.0), _constant(beta), eps, positions)
    mean, variance = argument(1, "running_mean").float(), argument(2, "running_var").float()
    scale = (1.0 if gamma is None else gamma.float()) / (variance + eps).sqrt()
    shift = (0.0 if beta is None else beta.float()) - mean * scale
    return Affine(_mean_square(scale), _constant(shift))


def arithmetic_of(
    name: str, mine: list[torch.Tensor], args: Any, kwargs: Any, output: torch.Tensor
) -> Operation:
    """Addition of a constant, or multiplication or division by one."""
    kind = "add" if name in SUMS else "mul"
    if "alpha" in kwargs or "rounding_mode" in kwargs:
        return Beyond(f"{kind} with options")
    if len(mine) == 2:
        masked = any(x.dtype == torch.bool for x in mine)  # as in y * (y > 0)
        return Beyond(f"{kind} of two signals", rectifies=masked and kind == "mul")
    others = [x for x in (*args, *kwargs.values()) if x is not mine[0]]
    constant = others[0] if others else None
    inverse = name in QUOTIENTS and constant is args[0]
    if inverse or not isinstance(constant, Real | torch.Tensor):
        return Beyond("division by a signal" if inverse else kind)
    value = torch.as_tensor(constant)
    sizes = [1] * (output.ndim - value.ndim) + list(value.shape)
    if sizes and sizes[0] > 1:  # noise, for example
        return Beyond(f"{kind} of constants that differ from input to input")
    value = 1 / value if name in QUOTIENTS else value
    if not bool(value.isfinite().all()):
        return Beyond(f"{kind} of constants that are not finite")
    pattern = sum(size > 1 for size in sizes) > 1
    if kind == "add":
        return Affine(shift=_constant(value), pattern=pattern)
    return Affine(_mean_square(value), pattern=pattern)


def _constant(value: torch.Tensor | None) -> Constant:
    mean = 0.0 if value is None else float(value.detach().float().mean())
    return Constant(_mean_square(value), mean**2)


def _mean_square(value: torch.Tensor | None, default: float = 0.0) -> float:
    if value is None:
        return default
    flat = value.detach().float().flatten()
    return float(flat.dot(flat)) / max(1, len(flat))
