r"""An ensemble of random fully connected networks of finite width, on any device.

:math:`y_{l+1}=W_l\,\phi(y_l)`, weights Gaussian with variance :math:`1/(N\langle\phi(z)^2\rangle)`
(He's 2/N for ReLU), no biases (Luther & Seung, arXiv:1902.04942, section 2). Every network has its
own stream of random numbers, so that its statistics do not depend on how many others are simulated
beside it. Layers are drawn by one of two methods of one distribution: :mod:`svlib.gram`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Required, TypedDict

import torch

from svlib import _check, gram
from svlib._random import fill_normal, stream

METHODS = ("auto", "gram", "weights")
NORMALIZATIONS = (None, "batch", "layer")

# activation -> (function, <phi(z)^2> for a standard Gaussian z)
_ACTIVATIONS: dict[
    str, tuple[Callable[[torch.Tensor, float], torch.Tensor], Callable[[float], float]]
] = {
    "relu": (lambda y, a: torch.relu(y), lambda a: 0.5),
    "leaky_relu": (torch.nn.functional.leaky_relu, lambda a: (1 + a**2) / 2),
    "linear": (lambda y, a: y, lambda a: 1.0),
    "tanh": (lambda y, a: torch.tanh(y), lambda a: 0.3942944903978),
}


class Options(TypedDict, total=False):
    """The arguments of :class:`Ensemble` but for the width, for type checkers."""

    samples: int | None
    inputs: Any
    seed: Required[int]
    device: str | torch.device
    dtype: str | torch.dtype
    activation: str
    negative_slope: float
    normalization: str | None
    residual: float | None
    method: str
    memory: float


@dataclass(frozen=True, eq=False)
class Ensemble:
    r"""Random networks of one kind, with all arguments checked: :func:`simulate` follows them.

    Args:
        width: Units N of every layer.
        samples: Number of inputs S; with ``inputs`` it follows from them.
        inputs: (samples, features). A first weight matrix of variance 1/features makes layer 0 of
            them. ``None``: layer 0 is iid N(0, 1), drawn anew for every network, as in the paper.
        seed: Seed of the ensemble; network k has the stream (seed, k). The numbers depend on the
            device type, the dtype and the method, and in their last digits on the number of threads
            and of networks at a time.
        device: Where to compute.
        dtype: ``torch.float32`` or ``torch.float64``, or its name. Float32 preactivations do not
            resolve v^2/sigma^2 below about 1e-9; deep networks with LayerNorm get there.
        activation: "relu", "leaky_relu", "linear" or "tanh".
        negative_slope: The slope of leaky ReLU.
        normalization: ``None``, ``"batch"`` (over the S inputs) or ``"layer"`` (over units),
            applied to preactivations before the activation; the statistics reported are those
            before it. Networks with BatchNorm or tanh are chaotic: they amplify rounding, so that
            float32 reproduces their averages only.
        residual: :math:`\beta` in :math:`y'=y+\sqrt\beta\,W\phi(y)`, or ``None``.
        method: "weights" draws weight matrices, "gram" the preactivations of S inputs directly,
            from the same distribution, if no two are equal. "auto" takes the cheaper for this width
            and S; the record says which.
        memory: Bytes that the networks simulated at a time may take.

    Examples:
        >>> Ensemble(1000, samples=100, seed=0).method
        'gram'
    """

    width: int
    _: KW_ONLY
    samples: Any = None
    inputs: Any = None
    seed: int
    device: Any = "cpu"
    dtype: Any = torch.float32
    activation: str = "relu"
    negative_slope: float = 0.0
    normalization: str | None = None
    residual: float | None = None
    method: str = "auto"
    memory: float = 2**27
    block_size: int = field(init=False)  #: networks at a time

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        slope = _check.activation(self.activation, self.negative_slope, _ACTIVATIONS)
        put("negative_slope", slope)
        _check.choice("normalization", self.normalization, NORMALIZATIONS)
        if self.residual is not None:
            put("residual", _check.real("residual", self.residual, 0, 1e12, open_low=True))
        put("dtype", _check.precision(self.dtype))
        put("device", _check.device(self.device))
        put("width", _check.integer("width", self.width))
        if self.inputs is not None:
            put("inputs", _given(self.inputs, self.samples, self.device, self.dtype))
            put("samples", len(self.inputs))
        put("samples", _check.integer("samples", self.samples))
        put("seed", _check.integer("seed", self.seed, 0))
        for kind, name, least in (("batch", "samples", 2), ("layer", "width", 2)):
            if self.normalization == kind and getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least} with normalization={kind!r}, "
                    f"got {getattr(self, name)}"
                )
        put("method", self._method())
        # numbers of one network with all copies, as measured
        features = self.width if self.inputs is None else max(self.width, self.inputs.shape[1])
        matrix = 0 if self.method == "gram" else features * self.width
        needed = (8 * self.samples * features + matrix) * self.dtype.itemsize
        put("block_size", int(_check.real("memory", self.memory, 0)) // needed)
        if self.block_size == 0:
            raise ValueError(
                f"memory must be at least {needed} bytes for one network, got {self.memory}"
            )

    def _method(self) -> str:
        equal = self.inputs is not None and len(torch.unique(self.inputs, dim=0)) < self.samples
        # rounding by the gram method would tell equal inputs apart, and chaos amplify that
        if _check.choice("method", self.method, METHODS) == "gram" and equal:
            raise ValueError(
                "method must be 'weights' or 'auto' where rows of inputs are equal, got 'gram'"
            )
        if self.method != "auto":
            return self.method
        return "gram" if gram.pays(self.width, self.samples) and not equal else "weights"

    @property
    def rescaled(self) -> bool:
        """Whether the scale may be taken out of each layer: it must pass through unchanged."""
        return self.activation != "tanh" and self.normalization is None

    def attributes(self) -> dict[str, str | float]:
        """The configuration, as the attributes of a record hold it."""
        texts = ("dtype", "method", "activation", "normalization", "residual")
        numbers = ("width", "samples", "seed", "negative_slope", "block_size")
        found: dict[str, str | float] = {name: str(getattr(self, name)) for name in texts}
        found |= {name: getattr(self, name) for name in numbers}
        return found | {"inputs": "white" if self.inputs is None else "given"}


def _given(inputs: Any, samples: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Inputs as a tensor, with their number checked."""
    inputs = _check.floating("inputs", inputs).to(device, dtype)
    if inputs.ndim != 2 or inputs.shape[1] == 0:
        raise ValueError(f"inputs must have shape (samples, features), got {tuple(inputs.shape)}")
    if not torch.isfinite(inputs).all():
        raise ValueError(f"inputs must be finite as {dtype}, got values beyond its range")
    if samples is not None and _check.integer("samples", samples) != len(inputs):
        raise ValueError(
            f"samples must be None or the {len(inputs)} rows of inputs, got {samples!r}"
        )
    checked: torch.Tensor = inputs
    return checked


def _normalized(y: torch.Tensor, kind: str | None) -> torch.Tensor:
    """BatchNorm over inputs or LayerNorm over units, without affine part and without epsilon.

    A difference that is no more than rounding becomes 0.
    """
    if kind is None:
        return y
    dim = 1 if kind == "batch" else 2
    centred = y - y.mean(dim, keepdim=True)
    peak = centred.abs().amax(dim, keepdim=True)
    centred = centred / peak  # its square cannot overflow
    rounding = 16 * torch.finfo(y.dtype).eps * y.abs().amax(dim, keepdim=True)
    deviation = centred.square().mean(dim, keepdim=True).sqrt()
    return torch.where(peak > rounding, centred / deviation, 0)


def propagate(
    ensemble: Ensemble, depth: int, networks: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (y, log_scale), layer by layer.

    The preactivations are y, of mean square 1, (networks, samples, width), multiplied by
    exp(log_scale), (networks,). The next step overwrites y.
    """
    generators = [stream(ensemble.seed, "network", k, ensemble.device) for k in networks]
    size = (len(networks), ensemble.samples, ensemble.width)
    y = torch.empty(size, device=ensemble.device, dtype=ensemble.dtype)
    linear = gram.Linear(ensemble.method, generators, ensemble.width, like=y)
    function, second_moment_of = _ACTIVATIONS[ensemble.activation]
    second_moment = second_moment_of(ensemble.negative_slope)
    log_scale = y.new_zeros(len(networks), dtype=torch.float64)
    if ensemble.inputs is None:
        fill_normal(y, generators)
    else:
        peak = ensemble.inputs.abs().max()
        within = ensemble.inputs.expand(len(networks), -1, -1) / torch.where(peak > 0, peak, 1)
        linear(within, 1.0, out=y)
        if ensemble.rescaled:
            log_scale = log_scale + peak.double().log()
        else:
            y = y * peak
    for layer in range(depth + 1):
        if layer > 0:
            a = function(_normalized(y, ensemble.normalization), ensemble.negative_slope)
            if ensemble.residual is None:
                linear(a, second_moment, out=y)
            else:
                branch = linear(a, second_moment, out=torch.empty_like(y))
                y = y + math.sqrt(ensemble.residual) * branch
        # squares may overflow where the scale stays in; a float64 norm costs a copy
        precision = None if ensemble.rescaled else torch.float64
        lengths = torch.linalg.vector_norm(y, dim=2, dtype=precision).double()
        scale = torch.linalg.vector_norm(lengths, dim=1) / math.sqrt(y[0].numel())
        divisor = torch.where(scale > 0, scale, 1).to(ensemble.dtype)[:, None, None]
        if ensemble.rescaled:
            log_scale = log_scale + scale.log()
            yield y.div_(divisor), log_scale
        else:
            yield y / divisor, scale.log()
