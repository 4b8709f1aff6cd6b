r"""An ensemble of random fully connected networks of finite width, on any device.

:math:`y_{l+1}=W_l\,\phi(y_l)+b_l`; by default ReLU, Gaussian weights of He's variance 2/N and no
biases (Luther & Seung, arXiv:1902.04942, section 2). Every network has its
own stream of random numbers, so that its statistics do not depend on how many others are simulated
beside it. Layers are drawn by one of two methods of one distribution: :mod:`svlib.gram`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Required, TypedDict

import torch

from svlib import _check, gram, layers
from svlib._random import Normals

METHODS = ("auto", "gram", "weights")
WEIGHTS = ("gaussian", "orthogonal")


class Options(TypedDict, total=False):
    """The arguments of :class:`Ensemble` but for the width, for type checkers."""

    samples: int | None
    inputs: Any
    seed: Required[int]
    device: str | torch.device
    dtype: str | torch.dtype
    activation: str
    negative_slope: float
    weight_variance: float | None
    bias_variance: float
    weights: str
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
        activation: A name of ``svlib.layers.ACTIVATIONS``, the same as in
            :func:`svlib.theory.trajectory`.
        negative_slope: The slope of leaky ReLU.
        weight_variance: N times the variance of a weight after layer 0; ``None``: He's rule,
            (1 - bias_variance)/<phi(z)^2>.
        bias_variance: Variance of a bias.
        weights: "gaussian" or "orthogonal", of the same variance.
        normalization: ``None``, ``"batch"`` (over the S inputs), ``"layer"`` or ``"rms"`` (over
            units), applied to preactivations before the activation; the statistics reported are
            those before it. BatchNorm and tanh amplify rounding: float32 keeps averages only.
        residual: :math:`\beta` in :math:`y'=y+\sqrt\beta\,(W\phi(y)+b)`, or ``None``.
        method: "weights" draws weight matrices, "gram" the preactivations of S inputs directly,
            from the same distribution, if weights are Gaussian and inputs differ. "auto": the
            cheaper one; the record says which.
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
    weight_variance: float | None = None
    bias_variance: float = 0.0
    weights: str = "gaussian"
    normalization: str | None = None
    residual: float | None = None
    method: str = "auto"
    memory: float = 2**27
    block_size: int = field(init=False)  #: networks at a time

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        slope = _check.activation(self.activation, self.negative_slope, layers.ACTIVATIONS)
        put("negative_slope", slope)
        _check.choice("weights", self.weights, WEIGHTS)
        he = self.weight_variance is None
        put("bias_variance", _check.real("bias_variance", self.bias_variance, 0, 1 if he else 1e12))
        given = (
            (1 - self.bias_variance) / layers.second_moment(self.activation, slope)
            if he
            else self.weight_variance
        )
        put("weight_variance", _check.real("weight_variance", given, 0, 1e12))
        _check.choice("normalization", self.normalization, _check.NORMALIZATIONS)
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
        orthogonal = self.weights == "orthogonal"
        # rounding by the gram method would tell equal inputs apart, and chaos amplify that
        if _check.choice("method", self.method, METHODS) == "gram" and (equal or orthogonal):
            why = "with orthogonal weights" if orthogonal else "where rows of inputs are equal"
            raise ValueError(f"method must be 'weights' or 'auto' {why}, got 'gram'")
        if self.method != "auto":
            return self.method
        pays = gram.pays(self.width, self.samples) and not (equal or orthogonal)
        return "gram" if pays else "weights"

    @property
    def rescaled(self) -> bool:
        """Whether the scale may be taken out of each layer: it must pass through unchanged."""
        passes = self.activation in layers.HOMOGENEOUS and self.bias_variance == 0
        return passes and self.normalization is None

    def attributes(self) -> dict[str, str | float]:
        """The configuration, as the attributes of a record hold it."""
        texts = ("dtype", "method", "activation", "weights", "normalization", "residual")
        numbers = ["width", "samples", "seed", "negative_slope", "block_size"]
        numbers += ["weight_variance", "bias_variance"]
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


def propagate(
    ensemble: Ensemble, depth: int, networks: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (y, log_scale), layer by layer.

    The preactivations are y, of mean square 1, (networks, samples, width), multiplied by
    exp(log_scale), (networks,). The next step overwrites y.
    """
    normals = Normals(ensemble.seed, "network", networks, ensemble.device)
    size = (len(networks), ensemble.samples, ensemble.width)
    y = torch.empty(size, device=ensemble.device, dtype=ensemble.dtype)
    method = "orthogonal" if ensemble.weights == "orthogonal" else ensemble.method
    linear = gram.Linear(method, normals, like=y)
    bias = y.new_empty(len(networks), 1, ensemble.width)
    log_scale = y.new_zeros(len(networks), dtype=torch.float64)
    if ensemble.inputs is None:
        normals.fill(y)
    else:
        peak = ensemble.inputs.abs().max()
        within = ensemble.inputs.expand(len(networks), -1, -1) / torch.where(peak > 0, peak, 1)
        y = linear(within, 1.0, out=y) * (1 if ensemble.rescaled else peak)
        log_scale += peak.double().log() if ensemble.rescaled else 0
    for layer in range(depth + 1):
        if layer > 0:
            normal = layers.normalized(y, ensemble.normalization)
            a = layers.activated(normal, ensemble.activation, ensemble.negative_slope)
            plain = ensemble.residual is None
            variance = ensemble.weight_variance or 0.0
            branch = linear(a, variance, out=y if plain else torch.empty_like(y))
            if ensemble.bias_variance > 0:
                normals.fill(bias)
                branch += math.sqrt(ensemble.bias_variance) * bias
            y = branch if plain else y + math.sqrt(ensemble.residual or 0) * branch
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
