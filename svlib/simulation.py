r"""Random fully connected networks of finite width, on any device.

:math:`y_{l+1}=W_l\,\phi(y_l)`, weights Gaussian with variance :math:`1/(N\langle\phi(z)^2\rangle)` (He's 2/N for ReLU),
no biases (Luther & Seung, arXiv:1902.04942, section 2). Every network has its own stream of random numbers,
so that its statistics do not depend on how many others are simulated beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from svlib import _check
from svlib._random import stream
from svlib._record import provenance
from svlib.moments import decompose

NORMALIZATIONS = (None, "batch", "layer")
_BLOCK_NUMBERS = 2**22  # weights or preactivations drawn at a time; with all copies about 200 MB

# activation -> (function, <phi(z)^2> for a standard Gaussian z)
_ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], Callable[[float], float]]] = {
    "relu": (lambda y, a: torch.relu(y), lambda a: 0.5),
    "leaky_relu": (torch.nn.functional.leaky_relu, lambda a: (1 + a**2) / 2),
    "linear": (lambda y, a: y, lambda a: 1.0),
    "tanh": (lambda y, a: torch.tanh(y), lambda a: 0.3942944903978),
}


@dataclass(frozen=True)
class _Network:
    """What is the same for all networks of one call."""

    width: int
    samples: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    activation: str
    negative_slope: float
    normalization: str | None
    residual: float | None
    inputs: torch.Tensor | None

    @property
    def rescaled(self) -> bool:
        """Whether the scale may be taken out of each layer: it must pass through unchanged."""
        return self.activation != "tanh" and self.normalization is None

    def attributes(self) -> dict[str, str | float]:
        """The configuration, as the attributes of a record hold it."""
        text = {name: str(getattr(self, name)) for name in ("dtype", "activation", "normalization", "residual")}
        numbers = {name: getattr(self, name) for name in ("width", "samples", "seed", "negative_slope")}
        return text | numbers | {"inputs": "white" if self.inputs is None else "given"}

    def block_size(self) -> int:
        features = self.width if self.inputs is None else max(self.width, self.inputs.shape[1])
        weights = 0 if self.samples == 1 else self.width * features
        return max(1, _BLOCK_NUMBERS // max(weights, self.samples * self.width))

    def normalized(self, y: torch.Tensor) -> torch.Tensor:
        """BatchNorm over inputs or LayerNorm over units, without affine part and without epsilon.

        What differs by no more than rounding counts as equal and becomes 0.
        """
        if self.normalization is None:
            return y
        dim = 1 if self.normalization == "batch" else 2
        centred = y - y.mean(dim, keepdim=True)
        scale = centred.square().mean(dim, keepdim=True).sqrt()
        rounding = torch.finfo(y.dtype).eps * y.abs().amax(dim, keepdim=True)
        return torch.where(scale > rounding, centred / scale, torch.zeros_like(centred))

    def linear(self, a: torch.Tensor, second_moment: float, generators: list[torch.Generator]) -> torch.Tensor:
        """Preactivations of a new random layer for activations ``a`` (networks, samples, features)."""
        features = a.shape[-1]
        scale = 1 / math.sqrt(features * second_moment)
        if self.samples == 1:  # W a is Gaussian with variance |a|^2 times the weights': no W is needed
            noise = self.normal((1, self.width), generators)
            norm: torch.Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
            return noise * norm * scale
        return torch.bmm(a, self.normal((features, self.width), generators)) * scale

    def normal(self, shape: tuple[int, int], generators: list[torch.Generator]) -> torch.Tensor:
        out = torch.empty(len(generators), *shape, device=self.device, dtype=self.dtype)
        for slot, generator in zip(out, generators, strict=True):
            slot.normal_(generator=generator)
        return out

    def propagate(self, depth: int, networks: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield, layer by layer, preactivations (networks, samples, width) and the logarithm of the
        scale (networks,) by which they are to be multiplied."""
        generators = [stream(self.seed, "network", network, self.device) for network in networks]
        function, second_moment = _ACTIVATIONS[self.activation]
        log_scale = torch.zeros(len(networks), dtype=torch.float64, device=self.device)
        if self.inputs is None:
            y = self.normal((self.samples, self.width), generators)
        else:
            y = self.linear(self.inputs.expand(len(networks), -1, -1), 1.0, generators)
        for layer in range(depth + 1):
            if layer > 0:
                a = function(self.normalized(y), self.negative_slope)
                branch = self.linear(a, second_moment(self.negative_slope), generators)
                y = branch if self.residual is None else y + math.sqrt(self.residual) * branch
            if self.rescaled:
                scale = torch.linalg.vector_norm(y, dim=(1, 2), dtype=torch.float64) / math.sqrt(y[0].numel())
                log_scale = log_scale + scale.log()
                y = y / torch.where(scale > 0, scale, 1).to(self.dtype)[:, None, None]
            yield y, log_scale


def _configure(
    width: Any, minimum_samples: int, *, samples: Any, inputs: Any, device: Any, dtype: Any, **options: Any
) -> _Network:
    """Check what :func:`simulate` and :func:`sample_preactivations` have in common."""
    slope = _check.activation(options["activation"], options["negative_slope"], _ACTIVATIONS)
    normalization = _check.choice("normalization", options["normalization"], NORMALIZATIONS)
    residual = options["residual"]
    _check.choice("dtype", dtype, (torch.float32, torch.float64))
    found = _check.device(device)
    width = _check.integer("width", width)
    if inputs is not None:
        inputs = _check.floating("inputs", inputs).to(found, dtype)
        if inputs.ndim != 2 or inputs.shape[1] == 0:
            raise ValueError(f"inputs must have shape (samples, features), got {tuple(inputs.shape)}")
        if not torch.isfinite(inputs).all():
            raise ValueError(f"inputs must be finite as {dtype}, got values beyond its range")
        if samples is not None and _check.integer("samples", samples) != len(inputs):
            raise ValueError(f"samples must be None or the {len(inputs)} rows of inputs, got {samples!r}")
        samples = len(inputs)
    samples = _check.integer("samples", samples, minimum_samples)
    if normalization == "batch" and samples < 2:
        raise ValueError(f"samples must be at least 2 with normalization='batch', got {samples}")
    if normalization == "layer" and width < 2:
        raise ValueError(f"width must be at least 2 with normalization='layer', got {width}")
    return _Network(
        width=width,
        samples=samples,
        seed=_check.integer("seed", options["seed"], 0),
        device=found,
        dtype=dtype,
        activation=options["activation"],
        negative_slope=slope,
        normalization=normalization,
        residual=None if residual is None else _check.real("residual", residual, 0, open_low=True),
        inputs=inputs,
    )


def _blocks(networks: int, size: int) -> Iterator[range]:
    for start in range(0, networks, size):
        yield range(start, min(start + size, networks))


def simulate(
    width: int,
    depth: int,
    *,
    networks: int,
    samples: int | None = None,
    seed: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
    negative_slope: float = 0.0,
    normalization: str | None = None,
    residual: float | None = None,
    inputs: Any = None,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Measure m^2 and v^2 at every layer of an ensemble of random networks.

    Args:
        width: Units N of every layer.
        depth: Number of weight matrices after layer 0, at least 0.
        networks: Number of networks.
        samples: Number of inputs S, at least 2; with ``inputs`` it follows from them.
        seed: Seed of the ensemble; network k has the stream (seed, k). The numbers depend on the device type.
        device: Where to compute.
        dtype: ``torch.float32`` or ``torch.float64``. Moments are float64 in any case, but float32 preactivations
            do not resolve v^2/sigma^2 below about 1e-9; deep networks with LayerNorm get there.
        activation: "relu", "leaky_relu", "linear" or "tanh".
        negative_slope: The slope of leaky ReLU.
        normalization: ``None``, ``"batch"`` (over the S inputs) or ``"layer"`` (over units), applied to
            preactivations before the activation; the statistics reported are those before it.
        residual: :math:`\beta` in :math:`y'=y+\sqrt\beta\,W\phi(y)`, or ``None``.
        inputs: (samples, features). A first weight matrix of variance 1/features makes layer 0 of them.
            ``None``: layer 0 is iid N(0, 1), drawn anew for every network, as in the paper.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Returns:
        Dataset with dimensions ``network`` and ``layer`` (depth + 1, layer 0 the first preactivation):
        ``m2`` and ``v2``, unbiased in the number of inputs, averaged over units, infinite where float64 overflows;
        ``ratio``, m/v (biased; 0 where ``m2`` is negative, NaN in a dead network); ``log_scale``, ln(sigma), exact
        where m2 and v2 underflow (-inf in a dead network); ``dead``, whether all preactivations are 0.
        ``attrs`` hold configuration, versions, device and wall time.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a name unknown or the device not there.

    Examples:
        >>> record = simulate(64, 10, networks=20, samples=50, seed=0)
        >>> dict(record.sizes), bool(record.ratio.mean("network")[10] > 1.5)
        ({'network': 20, 'layer': 11}, True)
    """
    started = time.perf_counter()
    depth = _check.integer("depth", depth, 0)
    networks = _check.integer("networks", networks)
    network = _configure(
        width, 2, samples=samples, inputs=inputs, device=device, dtype=dtype, seed=seed, activation=activation,
        negative_slope=negative_slope, normalization=normalization, residual=residual,
    )  # fmt: skip
    shape = (networks, depth + 1)
    m2, v2, ratio, log_scale = (np.empty(shape) for _ in range(4))
    with tqdm(total=networks * (depth + 1), disable=None if progress is None else not progress, unit="layer") as bar:
        for block in _blocks(networks, network.block_size()):
            rows = slice(block.start, block.stop)
            for layer, (y, log) in enumerate(network.propagate(depth, block)):
                result = decompose(y, sample_dim=1, unit_dim=2)
                ratio[rows, layer] = result.ratio
                with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                    power = np.exp(2 * log.cpu().numpy())
                    m2[rows, layer], v2[rows, layer] = (np.where(x == 0, 0, x * power) for x in (result.m2, result.v2))
                    log_scale[rows, layer] = log.cpu().numpy() + (0 if network.rescaled else np.log(result.sigma2) / 2)
                bar.update(len(block))
    dims = ("network", "layer")
    return xr.Dataset(
        {
            "m2": (dims, m2),
            "v2": (dims, v2),
            "ratio": (dims, ratio),
            "log_scale": (dims, log_scale),
            "dead": (dims, np.isneginf(log_scale)),
        },
        coords={"network": np.arange(networks), "layer": np.arange(depth + 1)},
        attrs=provenance(network.device, started) | network.attributes() | {"depth": depth, "networks": networks},
    )


def sample_preactivations(
    width: int,
    layers: Sequence[int],
    *,
    networks: int,
    samples: int | None = None,
    units: int,
    seed: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
    negative_slope: float = 0.0,
    normalization: str | None = None,
    residual: float | None = None,
    inputs: Any = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Return raw preactivations of random networks, for histograms.

    With one input per network no weight matrix is drawn: given the activations a, the next layer is
    N independent Gaussian numbers of variance 2|a|^2/N (for ReLU), the same distribution.

    Args:
        layers: Layers to keep, counted from 0, increasing.
        samples: Number of inputs, at least 1.
        units: How many units of each layer to keep, the first ones.
        width, networks, seed, device, dtype, activation, negative_slope, normalization, residual, inputs, progress:
            As in :func:`simulate`.

    Returns:
        Array with dimensions ``network``, ``layer``, ``sample`` and ``unit``, of the given dtype.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a name unknown or the device not there.

    Examples:
        >>> y = sample_preactivations(64, [0, 4], networks=3, samples=5, units=2, seed=0)
        >>> dict(y.sizes)
        {'network': 3, 'layer': 2, 'sample': 5, 'unit': 2}
    """
    started = time.perf_counter()
    if not isinstance(layers, list | tuple | range | np.ndarray):
        raise TypeError(f"layers must be a sequence of integers, got {layers!r}")
    wanted = [_check.integer("layers", layer, 0) for layer in layers]
    if not wanted or sorted(set(wanted)) != wanted:
        raise ValueError(f"layers must be increasing and not empty, got {wanted}")
    networks = _check.integer("networks", networks)
    network = _configure(
        width, 1, samples=samples, inputs=inputs, device=device, dtype=dtype, seed=seed, activation=activation,
        negative_slope=negative_slope, normalization=normalization, residual=residual,
    )  # fmt: skip
    units = _check.integer("units", units)
    if units > network.width:
        raise ValueError(f"units must be at most the width {network.width}, got {units}")
    kept = torch.empty(networks, len(wanted), network.samples, units, dtype=dtype)
    with tqdm(total=networks * (wanted[-1] + 1), disable=None if progress is None else not progress, unit="layer") as bar:
        for block in _blocks(networks, network.block_size()):
            for layer, (y, log) in enumerate(network.propagate(wanted[-1], block)):
                if layer in wanted:
                    kept[block.start : block.stop, wanted.index(layer)] = (y[..., :units] * log.exp()[:, None, None]).cpu()
                bar.update(len(block))
    return xr.DataArray(
        kept.numpy(),
        dims=("network", "layer", "sample", "unit"),
        coords={"layer": wanted},
        attrs=provenance(network.device, started) | network.attributes(),
    )
