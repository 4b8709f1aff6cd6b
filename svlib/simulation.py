r"""Random fully connected networks of finite width, on any device.

:math:`y_{l+1}=W_l\,\phi(y_l)`, weights Gaussian with variance :math:`1/(N\langle\phi(z)^2\rangle)`
(He's 2/N for ReLU), no biases (Luther & Seung, arXiv:1902.04942, section 2). Every network has its
own stream of random numbers, so that its statistics do not depend on how many others are simulated
beside it.

Two methods sample the same ensemble. ``"weights"`` draws every weight matrix: :math:`N^2` normal
numbers a layer. ``"gram"`` uses that, given the activations A (S x N) of S inputs, the N units of
the next layer are independent Gaussian vectors of covariance :math:`AA^\top` (times the weight
variance). With :math:`A^\top=QR` they are :math:`R^\top z`, exactly so distributed, from N min(S,
N) normal numbers. The covariance is singular where :math:`N\le S`, and nearly so once the inputs
have become collinear. Its Cholesky factor, with the jitter that it then needs, is wrong without a
warning. R comes from A itself by Householder reflections, whose error is no more than that of
rounding A, whatever the rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from svlib import _check
from svlib._files import provenance
from svlib._random import fill_normal, stream
from svlib.moments import _split_along_ray

Array = NDArray[Any]
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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a simulation. ``record`` holds the networks that were finished."""

    def __init__(self, record: xr.Dataset, networks: int) -> None:
        super().__init__(record, networks)
        self.record, self.networks = record, networks

    def __str__(self) -> str:
        return f"interrupted after {self.record.sizes['network']} of {self.networks} networks; they are in .record"


def _gram_pays(width: int, samples: int) -> bool:
    """Whether the gram method is the cheaper one, by nanoseconds per layer as measured on two cores (``benchmarks``)."""
    return samples * (2 + samples / 23) < width * (2 + samples / 100)


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
    method: str
    block_size: int

    @property
    def rescaled(self) -> bool:
        """Whether the scale may be taken out of each layer: it must pass through unchanged."""
        return self.activation != "tanh" and self.normalization is None

    def attributes(self) -> dict[str, str | float]:
        """The configuration, as the attributes of a record hold it."""
        text = {
            name: str(getattr(self, name))
            for name in ("dtype", "method", "activation", "normalization", "residual")
        }
        numbers = {
            name: getattr(self, name)
            for name in ("width", "samples", "seed", "negative_slope", "block_size")
        }
        return text | numbers | {"inputs": "white" if self.inputs is None else "given"}

    def normalized(self, y: torch.Tensor) -> torch.Tensor:
        """BatchNorm over inputs or LayerNorm over units, without affine part and without epsilon.

        What differs by no more than rounding counts as equal and becomes 0.
        """
        if self.normalization is None:
            return y
        dim = 1 if self.normalization == "batch" else 2
        centred = y - y.mean(dim, keepdim=True)
        peak = centred.abs().amax(dim, keepdim=True)
        centred = centred / peak  # its square cannot overflow
        rounding = 16 * torch.finfo(y.dtype).eps * y.abs().amax(dim, keepdim=True)
        return torch.where(
            peak > rounding, centred / centred.square().mean(dim, keepdim=True).sqrt(), 0
        )

    def propagate(self, depth: int, networks: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield, layer by layer, preactivations (networks, samples, width) of mean square 1, to be read before the next
        layer overwrites them, and the logarithm (networks,) of the scale by which they are to be multiplied."""
        generators = [stream(self.seed, "network", network, self.device) for network in networks]
        linear = _Linear(self.method, self.width, generators, self.device, self.dtype)
        function, second_moment = _ACTIVATIONS[self.activation]
        log_scale = torch.zeros(len(networks), dtype=torch.float64, device=self.device)
        y = torch.empty(
            len(networks), self.samples, self.width, device=self.device, dtype=self.dtype
        )
        if self.inputs is None:
            fill_normal(y, generators)
        else:
            peak = self.inputs.abs().max()
            linear(
                self.inputs.expand(len(networks), -1, -1) / torch.where(peak > 0, peak, 1),
                1.0,
                out=y,
            )
            if self.rescaled:
                log_scale = log_scale + peak.double().log()
            else:
                y = y * peak
        for layer in range(depth + 1):
            if layer > 0:
                a = function(self.normalized(y), self.negative_slope)
                if self.residual is None:
                    linear(a, second_moment(self.negative_slope), out=y)
                else:
                    branch = linear(a, second_moment(self.negative_slope), out=torch.empty_like(y))
                    y = y + math.sqrt(self.residual) * branch
            # squares of what is not rescaled may overflow; a float64 norm costs a copy
            lengths = torch.linalg.vector_norm(
                y, dim=2, dtype=None if self.rescaled else torch.float64
            ).double()
            scale = torch.linalg.vector_norm(lengths, dim=1) / math.sqrt(y[0].numel())
            divisor = torch.where(scale > 0, scale, 1).to(self.dtype)[:, None, None]
            if self.rescaled:
                log_scale = log_scale + scale.log()
                yield y.div_(divisor), log_scale
            else:
                yield y / divisor, scale.log()


class _Linear:
    """A random layer without biases, by either method. It keeps the memory of its random numbers from call to call."""

    def __init__(
        self,
        method: str,
        width: int,
        generators: list[torch.Generator],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.method, self.width, self.generators = method, width, generators
        self.noise = torch.empty(len(generators), 0, width, device=device, dtype=dtype)

    def __call__(self, a: torch.Tensor, second_moment: float, out: torch.Tensor) -> torch.Tensor:
        """Write the preactivations for ``a`` (networks, samples, features) into ``out`` (networks, samples, width)."""
        scale = 1 / math.sqrt(a.shape[-1] * second_moment)
        factors = (factor(a) if self.method == "gram" else a) * scale
        if self.noise.shape[1] != factors.shape[2]:
            self.noise = self.noise.new_empty(len(self.generators), factors.shape[2], self.width)
        fill_normal(self.noise, self.generators)
        if self.method == "weights":
            return torch.bmm(factors, self.noise, out=out)
        half = out.shape[1] // 2  # the factor is 0 above its diagonal
        torch.bmm(factors[:, :half, :half], self.noise[:, :half], out=out[:, :half])
        torch.bmm(factors[:, half:], self.noise, out=out[:, half:])
        return out


def factor(a: torch.Tensor) -> torch.Tensor:
    r"""Lower triangular L with :math:`LL^\top=AA^\top`, as accurate as A itself whatever the rank of A.

    Cholesky's factor of the product where that is well-conditioned, which is about twice as fast;
    else R of :math:`A^\top=QR`, by Householder reflections of A. Both are the same L, decided for
    each network alone.

    Args:
        a: (networks, samples, features), of a mean square near 1.

    Returns:
        (networks, samples, min(samples, features)), with a diagonal of at least 0, which makes it
        unique where A has full rank.

    Examples:
        >>> factor(torch.tensor([[[3.0, 4.0], [6.0, 8.0]]])).abs().round().tolist()  # collinear inputs
        [[[5.0, 0.0], [10.0, 0.0]]]
    """
    samples, features = a.shape[1:]
    if features <= samples:  # the product has no inverse
        return _triangular(a)
    half = samples // 2  # only the lower triangle is needed: three of four blocks
    product = torch.zeros(len(a), samples, samples, device=a.device, dtype=a.dtype)
    product[:, :half, :half] = torch.bmm(a[:, :half], a[:, :half].mT)
    product[:, half:] = torch.bmm(a[:, half:], a.mT)
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(product)
    # what share of an input's square is left when those before it are known
    squares, number = product.diagonal(dim1=1, dim2=2), torch.finfo(a.dtype)
    left = lower.diagonal(dim1=1, dim2=2).square() / squares
    ill = (
        (failed != 0)
        | ~(left.amin(1) > math.sqrt(number.eps))
        | (squares.amin(1) < number.tiny / number.eps)
    )
    if ill.any():
        lower[ill] = _triangular(a[ill])
    return lower


def _triangular(a: torch.Tensor) -> torch.Tensor:
    upper = torch.linalg.qr(a.mT, mode="r").R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)
    lower: torch.Tensor = (upper * sign[..., None]).mT
    return lower


def _configure(
    width: Any,
    minimum_samples: int,
    *,
    samples: Any,
    inputs: Any,
    device: Any,
    dtype: Any,
    **options: Any,
) -> _Network:
    """Check what :func:`simulate` and :func:`sample_preactivations` have in common."""
    slope = _check.activation(options["activation"], options["negative_slope"], _ACTIVATIONS)
    normalization = _check.choice("normalization", options["normalization"], NORMALIZATIONS)
    residual = options["residual"]
    dtype = _check.precision(dtype)
    found = _check.device(device)
    width = _check.integer("width", width)
    if inputs is not None:
        inputs = _check.floating("inputs", inputs).to(found, dtype)
        if inputs.ndim != 2 or inputs.shape[1] == 0:
            raise ValueError(
                f"inputs must have shape (samples, features), got {tuple(inputs.shape)}"
            )
        if not torch.isfinite(inputs).all():
            raise ValueError(f"inputs must be finite as {dtype}, got values beyond its range")
        if samples is not None and _check.integer("samples", samples) != len(inputs):
            raise ValueError(
                f"samples must be None or the {len(inputs)} rows of inputs, got {samples!r}"
            )
        samples = len(inputs)
    samples = _check.integer("samples", samples, minimum_samples)
    method = _check.choice("method", options["method"], METHODS)
    equal = inputs is not None and len(torch.unique(inputs, dim=0)) < samples
    if (
        method == "gram" and equal
    ):  # its rounding would tell them apart, and a chaotic network amplify that
        raise ValueError(
            "method must be 'weights' or 'auto' where rows of inputs are equal, got 'gram'"
        )
    if method == "auto":
        method = "gram" if _gram_pays(width, samples) and not equal else "weights"
    features = width if inputs is None else max(width, inputs.shape[1])
    numbers = 8 * samples * features + (
        0 if method == "gram" else features * width
    )  # with all copies, as measured
    block_size = int(_check.real("memory", options["memory"], 0)) // (numbers * dtype.itemsize)
    if block_size == 0:
        raise ValueError(
            f"memory must be at least {numbers * dtype.itemsize} bytes for one network, got {options['memory']}"
        )
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
        residual=None
        if residual is None
        else _check.real("residual", residual, 0, 1e12, open_low=True),
        inputs=inputs,
        method=method,
        block_size=block_size,
    )


def _blocks(networks: Any, size: int) -> list[range]:
    """Cut ``networks``, a number or a range, into ranges of at most ``size``."""
    if not isinstance(networks, range):
        networks = range(_check.integer("networks", networks))
    elif len(networks) == 0 or networks.step != 1 or networks.start < 0:
        raise ValueError(
            f"networks must be a number or a range of step 1 that is not empty, got {networks}"
        )
    return [networks[start : start + size] for start in range(0, len(networks), size)]


def simulate(
    width: int,
    depth: int,
    *,
    networks: int | range,
    samples: int | None = None,
    seed: int,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    method: str = "auto",
    memory: float = 2**27,
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
        networks: Number of networks, or a range of them: ``range(40, 60)`` gives networks 40 to 59
            of the ensemble.
        samples: Number of inputs S, at least 2; with ``inputs`` it follows from them.
        seed: Seed of the ensemble; network k has the stream (seed, k). The numbers depend on the
            device type, the dtype and the method, and in their last digits on the number of threads
            and of networks at a time.
        device: Where to compute.
        dtype: ``torch.float32`` or ``torch.float64``, or its name. Float32 preactivations do not
            resolve v^2/sigma^2 below about 1e-9; deep networks with LayerNorm get there.
        method: "weights" draws weight matrices, "gram" the preactivations of S inputs directly,
            from the same distribution, if no two are equal. "auto" takes the cheaper for this width
            and S; the record says which.
        memory: Bytes that the networks simulated at a time may take.
        activation: "relu", "leaky_relu", "linear" or "tanh".
        negative_slope: The slope of leaky ReLU.
        normalization: ``None``, ``"batch"`` (over the S inputs) or ``"layer"`` (over units),
            applied to preactivations before the activation; the statistics reported are those
            before it. Networks with BatchNorm or tanh are chaotic: they amplify rounding, so that
            float32 reproduces their averages only.
        residual: :math:`\beta` in :math:`y'=y+\sqrt\beta\,W\phi(y)`, or ``None``.
        inputs: (samples, features). A first weight matrix of variance 1/features makes layer 0 of
            them. ``None``: layer 0 is iid N(0, 1), drawn anew for every network, as in the paper.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Returns:
        Dataset with dimensions ``network`` and ``layer`` (depth + 1, layer 0 the first
        preactivation): ``m2`` and ``v2``, unbiased in the number of inputs, averaged over units,
        infinite where float64 overflows; ``angular`` and ``radial``, the two parts of v2
        (:func:`svlib.moments.split_along_ray`); ``ratio``, m/v (biased; 0 where ``m2`` is negative,
        infinite where ``v2`` is 0, NaN in a dead network); ``log_scale``, ln(sigma), exact where m2
        and v2 underflow (-inf in a dead network); ``dead``, whether all preactivations are 0.
        ``attrs`` hold configuration, versions, device, method and wall time.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a name unknown, the device not there, or the
            memory too small.
        Interrupted: On Ctrl-C, with the finished networks as its ``record``.

    Examples:
        >>> record = simulate(64, 10, networks=20, samples=50, seed=0)
        >>> dict(record.sizes), bool(record.ratio.mean("network")[10] > 1.5)
        ({'network': 20, 'layer': 11}, True)
    """
    started = time.perf_counter()
    depth = _check.integer("depth", depth, 0)
    network = _configure(
        width, 2, samples=samples, inputs=inputs, device=device, dtype=dtype, seed=seed, activation=activation, method=method,
        memory=memory, negative_slope=negative_slope, normalization=normalization, residual=residual,
    )  # fmt: skip
    blocks = _blocks(networks, network.block_size)
    every = range(blocks[0].start, blocks[-1].stop)
    finished: list[dict[str, Array]] = []

    def record() -> xr.Dataset:
        data = {
            name: (("network", "layer"), np.concatenate([part[name] for part in finished]))
            for name in finished[0]
        }
        count = len(data["m2"][1])
        return xr.Dataset(
            data,
            coords={"network": list(every[:count]), "layer": np.arange(depth + 1)},
            attrs=provenance(network.device, started)
            | network.attributes()
            | {"depth": depth, "networks": count},
        )

    with tqdm(
        total=len(every) * (depth + 1),
        disable=None if progress is None else not progress,
        unit="layer",
    ) as bar:
        try:
            for block in blocks:
                layers = []
                for y, log_scale in network.propagate(depth, block):
                    layers.append(_statistics(y, log_scale.cpu().numpy()))
                    bar.update(len(block))
                finished.append(
                    {
                        name: np.stack([layer[name] for layer in layers], axis=1)
                        for name in layers[0]
                    }
                )
        except KeyboardInterrupt as stop:
            if not finished:
                raise
            raise Interrupted(record(), len(every)) from stop
    return record()


def _statistics(y: torch.Tensor, log_scale: Array) -> dict[str, Array]:
    """What a record holds of one layer: arrays (networks,) from preactivations of mean square 1 and their scale."""
    split = _split_along_ray(y)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        power = np.exp(2 * log_scale)
        absolute = {name: getattr(split, name) for name in ("m2", "v2", "angular", "radial")}
        found = {name: np.where(x == 0, 0, x * power) for name, x in absolute.items()}
        ratio = np.sqrt(np.maximum(split.m2, 0) / split.v2)
    return found | {"ratio": ratio, "log_scale": log_scale, "dead": np.isneginf(log_scale)}


def summarize(record: xr.Dataset) -> xr.Dataset:
    """Average a record over its networks, without the dead ones.

    Args:
        record: Of :func:`simulate` or :func:`svlib.simulate_angles`; any Dataset with a dimension
            ``network``.

    Returns:
        Dataset with the same variables, in which a dimension ``statistic`` ("mean"; "deviation",
        the standard deviation over networks; "error", the standard error of the mean) stands for
        ``network``, and ``alive``, the number of networks that live. What is not finite in a
        network, an m/v for example, is left out of that average.

    Raises:
        ValueError: If the record has no dimension ``network``.

    Examples:
        >>> record = simulate(64, 10, networks=20, samples=50, seed=0)
        >>> summary = summarize(record)
        >>> bool(summary.ratio.sel(layer=10, statistic="error") < 0.1), int(summary.alive[10])
        (True, 20)
    """
    if "network" not in record.dims:
        raise ValueError(f"record must have a dimension 'network', got {list(record.dims)}")
    living = record.drop_vars("dead") if "dead" in record else record
    finite = living.where(np.isfinite(living))
    if "dead" in record:
        finite = finite.where(~record.dead)
    counts = finite.notnull().sum("network")
    alive = (~record.dead).sum("network") if "dead" in record else counts[next(iter(counts))]
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = finite.std("network", ddof=1)
        statistics = [finite.mean("network"), deviation, deviation / np.sqrt(counts)]
    joined = xr.concat(statistics, pd.Index(["mean", "deviation", "error"], name="statistic"))
    return joined.assign(alive=alive).assign_attrs(record.attrs)


def sample_preactivations(
    width: int,
    layers: Sequence[int],
    *,
    networks: int | range,
    samples: int | None = None,
    units: int,
    seed: int,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    method: str = "auto",
    memory: float = 2**27,
    activation: str = "relu",
    negative_slope: float = 0.0,
    normalization: str | None = None,
    residual: float | None = None,
    inputs: Any = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Return raw preactivations of random networks, for histograms.

    Args:
        layers: Layers to keep, counted from 0, increasing.
        samples: Number of inputs, at least 1.
        units: How many units of each layer to keep, the first ones.
        width, networks, seed, device, dtype, method, memory, progress: As in :func:`simulate`.
        activation, negative_slope, normalization, residual, inputs: As in :func:`simulate`.

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
    network = _configure(
        width, 1, samples=samples, inputs=inputs, device=device, dtype=dtype, seed=seed, activation=activation, method=method,
        memory=memory, negative_slope=negative_slope, normalization=normalization, residual=residual,
    )  # fmt: skip
    blocks = _blocks(networks, network.block_size)
    every = range(blocks[0].start, blocks[-1].stop)
    units = _check.integer("units", units)
    if units > network.width:
        raise ValueError(f"units must be at most the width {network.width}, got {units}")
    kept = torch.empty(len(every), len(wanted), network.samples, units, dtype=network.dtype)
    with tqdm(
        total=len(every) * (wanted[-1] + 1),
        disable=None if progress is None else not progress,
        unit="layer",
    ) as bar:
        for block in blocks:
            rows = slice(block.start - every.start, block.stop - every.start)
            for layer, (y, log_scale) in enumerate(network.propagate(wanted[-1], block)):
                if layer in wanted:
                    scale = log_scale.exp()[:, None, None]
                    kept[rows, wanted.index(layer)] = (y[..., :units] * scale).cpu()
                bar.update(len(block))
    return xr.DataArray(
        kept.numpy(),
        dims=("network", "layer", "sample", "unit"),
        coords={"network": list(every), "layer": wanted},
        attrs=provenance(network.device, started) | network.attributes(),
    )
