"""What is measured of single functions beside m^2 and v^2: how far softmax, gates and activations
are at their ends, how foreign BatchNorm's running statistics are, what a rectifier lets through."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from svlib.probing.operations import argument_of
from svlib.probing.passes import Output
from svlib.probing.rows import Values

SATURATING = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "hardtanh": (-1.0, 1.0)}
SATURATING |= {"hardsigmoid": (0.0, 1.0), "erf": (-1.0, 1.0), "softsign": (-1.0, 1.0)}
_END = 0.01  # of the range, from its ends: there an activation is flat
_INPUTS = 4  # of which attention is looked at


def extras(made: Output, values: Values | None, parent: Values | None) -> dict[str, float]:
    """Numbers by name; empty of other functions, and where arguments are odd."""
    try:
        return _extras(made, values, parent)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return {}


def _extras(made: Output, values: Values | None, parent: Values | None) -> dict[str, float]:
    name, (args, kwargs), y = made.function, made.call, made.y
    argument = partial(argument_of, args, kwargs)
    if name in ("relu", "relu6") or _clips_at_0(name, argument):
        return {} if values is None else {"dead": values.dead}
    if name in ("gelu", "silu", "mish", "hardswish"):
        return {} if parent is None else {"dead": parent.deep}
    if name in SATURATING and y.is_floating_point() and y.numel():
        low, high = SATURATING[name]
        near = (y - low).abs().minimum((y - high).abs()) < _END * (high - low)
        return {"saturated": float(near.double().mean())}
    if name == "softmax" and y.ndim > 1:
        dim = argument(1, "dim", -1)
        return _sharpness(y.movedim(-1 if dim is None else dim, -1))
    if name == "scaled_dot_product_attention":
        return _sharpness(_weights(args, kwargs))
    if name == "multi_head_attention_forward":
        asked = kwargs | {"need_weights": True, "average_attn_weights": False}
        with torch.random.fork_rng(devices=[]):
            found = nn.functional.multi_head_attention_forward(*args, **asked)[1]
        return {} if found is None else _sharpness(found)
    if name == "batch_norm" and not argument(5, "training", False):
        return _foreign(args[0], argument(1, "running_mean"), argument(2, "running_var"))
    return {}


def _clips_at_0(name: str, argument: Any) -> bool:
    """Whether negative entries become 0."""
    if name == "hardtanh":
        return bool(argument(1, "min_val", -1.0) == 0)
    if name == "threshold":
        return bool(argument(2, "value") == 0 and argument(1, "threshold") >= 0)
    if name in ("clamp", "clip", "clamp_min"):
        low = argument(1, "min")
        return not isinstance(low, torch.Tensor) and low == 0
    if name == "maximum":
        other = argument(1, "other")
        return isinstance(other, torch.Tensor) and not bool(other.any())
    if name == "mul":  # y * (y > 0)
        return any(isinstance(argument(n, ""), torch.Tensor) and argument(n, "").dtype == torch.bool
                   for n in (0, 1))  # fmt: skip
    return False


def _sharpness(weights: torch.Tensor) -> dict[str, float]:
    """Mean largest weight, of queries that look at three positions or more."""
    held = (weights > 0).sum(-1) if bool((weights == 0).any()) else None
    wide = torch.ones(weights.shape[:-1], dtype=torch.bool, device=weights.device)
    if weights.shape[-1] < 3:
        return {}
    if held is not None:
        wide = torch.arange(weights.shape[-2], device=weights.device).expand(wide.shape) >= 2
    largest = weights.amax(-1)[wide].double()
    return {"sharpness": float(largest.mean())} if largest.numel() else {}


def _weights(args: Any, kwargs: Any) -> torch.Tensor:
    """The weights of attention of the first inputs."""
    argument = partial(argument_of, args, kwargs)
    q, k = (x[:_INPUTS].float() for x in args[:2])
    scale = argument(6, "scale") or 1 / math.sqrt(q.shape[-1])
    if k.shape[-3:-2] != q.shape[-3:-2]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.mT * scale
    mask = argument(3, "attn_mask")
    if isinstance(mask, torch.Tensor):
        mask = mask[:_INPUTS] if mask.ndim == q.ndim and len(mask) > 1 else mask
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if argument(5, "is_causal", False):
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    weights: torch.Tensor = scores.softmax(-1).nan_to_num(0.0)
    return weights


def _foreign(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> dict[str, float]:
    """Mean square of a batch's deviations from running statistics, 1 for its own, and the factor of
    the variance alone, in the channel where each is largest."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    x = x.detach().double()
    own, square = x.mean(dims), x.var(dims, correction=0)
    held = variance.double().clamp_min(1e-12)
    found = (square + (own - mean).square()) / held
    return {"statistics": float(found.mean()), "channel": float(found.log().abs().argmax())}


def padding(x: torch.Tensor) -> float:
    """Fraction of positions in runs of one value, the same for all inputs, at one of their ends.

    Of tokens (inputs, positions), or of features (inputs, positions, features) that are 0.
    """
    if x.ndim not in (2, 3) or x.shape[1] < 4 or (x.ndim == 2 and x.is_floating_point()):
        return 0.0
    found = []
    for ends in (x, x.flip(1)):
        value = ends[:, -1:].flatten().mode().values if x.ndim == 2 else 0
        same = ends == value if x.ndim == 2 else (ends == 0).all(2)
        found.append(float(same.flip(1).cummin(1).values.double().mean()))
    return max(found)


def gates(module: nn.Module, given: Any, output: Any) -> dict[str, float]:
    """Means of the gates of an LSTM or GRU of one layer over inputs and steps, by name."""
    if not isinstance(module, nn.LSTM | nn.GRU) or module.num_layers > 1 or module.proj_size:
        return {}
    args, kwargs = given
    x = argument_of(args, kwargs, 0, "input")
    if not isinstance(x, torch.Tensor) or x.ndim != 3:
        return {}
    x = x if module.batch_first else x.transpose(0, 1)
    y = output[0] if module.batch_first else output[0].transpose(0, 1)
    hidden = torch.nn.functional.pad(y[:, :-1, : module.hidden_size], (0, 0, 1, 0))
    held: Callable[[str], torch.Tensor] = partial(getattr, module)  # parameters, or made of some
    parts = x @ held("weight_ih_l0").mT + hidden @ held("weight_hh_l0").mT
    if module.bias:
        parts = parts + held("bias_ih_l0") + held("bias_hh_l0")
    names: tuple[str, ...] = ("input gate", "forget gate", "", "output gate")
    names = names if isinstance(module, nn.LSTM) else ("reset gate", "update gate", "")
    named = zip(names, parts.chunk(len(names), -1), strict=True)
    return {name: float(part.sigmoid().mean()) for name, part in named if name}
