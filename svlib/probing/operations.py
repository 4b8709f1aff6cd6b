"""What theory needs to know of a torch function's call: mean squares of weights and constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from svlib.probing.places import PICKS, RESHAPES, TURNS

CONVOLUTIONS = frozenset(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
WEIGHTED = CONVOLUTIONS | {"linear", "addmm"}
NORMS = frozenset(
    {"batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "normalize"}
)
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "view_as"})
MOVES = RESHAPES | TURNS | _CASTS | {"contiguous", "clone", "detach", "get", "expand", "expand_as"}
MOVES |= {"reshape_as", "requires_grad"}
SUMS = frozenset({"add", "iadd", "radd", "sub", "isub", "rsub"})
PRODUCTS = frozenset({"mul", "imul", "rmul"})
QUOTIENTS = frozenset({"div", "truediv", "itruediv", "rtruediv"})
LENDS = _CASTS | {"expand_as", "reshape_as", "masked_fill", "index_select", "gather", "getitem"}
"""Functions of which the first argument alone is the signal; others lend type, shape or index."""


class Constant(NamedTuple):
    """Mean square of a constant over its entries, and the square of its mean."""

    square: float = 0.0
    mean2: float = 0.0


_NONE = Constant()


@dataclass(frozen=True)
class Input:
    """An input of the model: its name, and whether it differs between the inputs of the batch."""

    name: str = ""
    varies: bool = True


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


@dataclass(frozen=True)
class Affine:
    """Multiplication by constants of mean square ``scale2``, then addition of ``shift``."""

    scale2: float = 1.0
    shift: Constant = _NONE


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
class Move:
    """Entries are moved and stay what they are."""


@dataclass(frozen=True)
class Beyond:
    """Theory does not follow; ``why`` is a noun that completes "theory starts anew behind"."""

    why: str


Operation = Input | Weights | Relu | Activate | Affine | Normalize | Dropout | Sum | Move | Beyond


def argument_of(args: Any, kwargs: Any, position: int, keyword: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return args[position] if len(args) > position else kwargs.get(keyword, default)


def weight_of(name: str, args: Any, kwargs: Any) -> torch.Tensor:
    """The weight of a call of one of ``WEIGHTED``."""
    weight: torch.Tensor = argument_of(
        args, kwargs, *((2, "mat2") if name == "addmm" else (1, "weight"))
    )
    return weight


def bias_of(name: str, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The bias of a call of one of ``WEIGHTED``."""
    found = argument_of(args, kwargs, *((0, "input") if name == "addmm" else (2, "bias")))
    return found if isinstance(found, torch.Tensor) else None


def gain_of(name: str, args: Any, kwargs: Any) -> tuple[float, float]:
    """Fan-in times mean square weight, and the number of parts of a transposed kernel."""
    weight, argument = weight_of(name, args, kwargs), partial(argument_of, args, kwargs)
    fan_in = float(weight.shape[0] if name == "addmm" else weight[0].numel())
    phases = 1.0
    if "transpose" in name:  # each output position sees 1/stride of the kernel
        stride, groups = argument(3, "stride", 1), argument(6, "groups", 1)
        several = isinstance(stride, tuple | list)
        phases = float(math.prod(stride) if several else stride ** (weight.ndim - 2))
        fan_in = weight.shape[0] // groups * math.prod(weight.shape[2:]) / phases
    return fan_in * mean_square(weight), phases


def operation_of(name: str, args: Any, kwargs: Any, output: torch.Tensor) -> Operation:
    """The operation of a function on one signal, from its other arguments."""
    argument = partial(argument_of, args, kwargs)
    if name in WEIGHTED:
        gain, phases = gain_of(name, args, kwargs)
        return Weights(gain, constant_of(bias_of(name, args, kwargs)), phases)
    if name in PICKS or name in MOVES:
        return Beyond(name) if name in PICKS - {"get"} else Move()
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
        gamma2, beta = mean_square(argument(2, "weight"), 1.0), constant_of(argument(3, "bias"))
        return Normalize("layer_norm", gamma2, beta, eps)
    if name == "rms_norm":
        eps = float(argument(3, "eps") or 0.0)
        return Normalize("rms_norm", mean_square(argument(2, "weight"), 1.0), eps=eps)
    if name in SUMS | PRODUCTS | QUOTIENTS:
        return _arithmetic(name, args, kwargs, output)
    known = _activation(name, argument)
    return Activate(known) if known else Beyond(name)


def norm_of(module: nn.Module) -> Normalize | None:
    """The normalization that a module is by its name and its weight, in whatever library."""
    kind: Literal["layer_norm", "rms_norm"] | None = None
    name = type(module).__name__.lower()
    if name.endswith("layernorm"):
        kind = "layer_norm"
    elif name.endswith("rmsnorm"):
        kind = "rms_norm"
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if kind is None or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    eps = next((x for k, x in vars(module).items() if "eps" in k and isinstance(x, float)), 0.0)
    shift = bias if isinstance(bias, torch.Tensor) else None
    return Normalize(kind, mean_square(weight), constant_of(shift), eps)


def _activation(name: str, argument: Callable[..., Any]) -> str | None:
    """The name under which theory knows an activation, if its parameters are the usual ones."""
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}[argument(1, "approximate", "none")]
    if name in ("hardtanh", "clamp", "clip"):
        names = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        ends = argument(1, names[0], -1.0), argument(2, names[1], 1.0)
        if not all(isinstance(end, Real) for end in ends):
            return None
        return {(-1.0, 1.0): "hardtanh", (0.0, 6.0): "relu6"}.get(ends)
    if name in ("elu", "softplus"):
        return name if argument(1, "alpha" if name == "elu" else "beta", 1.0) == 1 else None
    plain = ("tanh", "sigmoid", "silu", "mish", "selu", "relu6", "erf")
    return name if name in plain else {"sin": "sine"}.get(name)


def _batch_norm(args: Any, kwargs: Any) -> Operation:
    argument = partial(argument_of, args, kwargs)
    gamma, beta, eps = argument(3, "weight"), argument(4, "bias"), float(argument(7, "eps", 1e-5))
    if argument(5, "training", False):
        positions = argument(0, "input").ndim > 2
        return Normalize("batch_norm", mean_square(gamma, 1.0), constant_of(beta), eps, positions)
    mean, variance = argument(1, "running_mean").float(), argument(2, "running_var").float()
    scale = (1.0 if gamma is None else gamma.float()) / (variance + eps).sqrt()
    shift = (0.0 if beta is None else beta.float()) - mean * scale
    return Affine(mean_square(scale), constant_of(shift))


def _arithmetic(name: str, args: Any, kwargs: Any, output: torch.Tensor) -> Operation:
    """Addition of a constant, or multiplication or division by one, to the only signal."""
    kind = "add" if name in SUMS else "mul"
    others = [
        x for x in (*args, *kwargs.values()) if isinstance(x, Real) or _is_constant(x, output)
    ]
    if "alpha" in kwargs or "rounding_mode" in kwargs or len(args) != 2 or len(others) != 1:
        return Beyond(f"{kind} of what differs from input to input")
    if name in QUOTIENTS and others[0] is args[0]:
        return Beyond("division by a signal")
    value = torch.as_tensor(others[0])
    sizes = [1] * (output.ndim - value.ndim) + list(value.shape)
    value = 1 / value if name in QUOTIENTS else value
    if sum(size > 1 for size in sizes) > 1:
        return Beyond("a pattern over positions")
    if not bool(value.isfinite().all()):
        return Beyond(f"{kind} of constants that are not finite")
    if kind == "add":
        return Affine(shift=constant_of(value))
    return Affine(mean_square(value))


def _is_constant(x: Any, output: torch.Tensor) -> bool:
    """Whether a tensor is the same for all inputs, which lie first in the output."""
    return isinstance(x, torch.Tensor) and (x.ndim < output.ndim or x.shape[:1] == (1,))


def constant_of(value: torch.Tensor | None) -> Constant:
    """Mean square and squared mean of a constant."""
    mean = 0.0 if value is None else float(value.detach().float().mean())
    return Constant(mean_square(value), mean**2)


def mean_square(value: torch.Tensor | None, default: float = 0.0) -> float:
    """Mean square of the entries."""
    if value is None:
        return default
    flat = value.detach().float().flatten()
    return float(flat.dot(flat)) / max(1, len(flat))
