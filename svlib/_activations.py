"""Activations by name: torch's functions, and the points where their derivatives jump."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

_TORCH = torch.nn.functional
HOMOGENEOUS = ("relu", "leaky_relu", "linear")
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[float, ...]]] = {
    "relu": (torch.relu, (0.0,)),
    "leaky_relu": (_TORCH.leaky_relu, (0.0,)),
    "linear": (lambda y: y, ()),
    "tanh": (torch.tanh, ()),
    "erf": (torch.erf, ()),
    "sigmoid": (torch.sigmoid, ()),
    "gelu": (_TORCH.gelu, ()),
    "gelu_tanh": (partial(_TORCH.gelu, approximate="tanh"), ()),
    "silu": (_TORCH.silu, ()),
    "softplus": (partial(_TORCH.softplus, threshold=40), ()),  # by default it is cut off at 20
    "mish": (_TORCH.mish, ()),
    "sine": (torch.sin, ()),
    "elu": (_TORCH.elu, (0.0,)),
    "selu": (_TORCH.selu, (0.0,)),
    "hardtanh": (_TORCH.hardtanh, (-1.0, 1.0)),
    "relu6": (_TORCH.relu6, (0.0, 6.0)),
}
