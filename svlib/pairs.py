r"""Two inputs through random networks of finite width: their angle, accurate however small.

Given the activations of two inputs, only their lengths and their angle matter for the next layer.
With standard normal vectors :math:`g_1,g_2` of N units the next are :math:`\phi(g_1)` and
:math:`\phi(g_1\cos\theta+g_2\sin\theta)`, each times a length. This is the gram method for S = 2.
The part of the second beside :math:`\cos\theta\,\phi(g_1)` is formed in units of
:math:`\sin\theta`, so that no digit of a small angle is lost. Jakub & Nica (2023),
arXiv:2302.09712, study the same ensemble: weights Gaussian, no biases; the scale of the weights
does not matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import xarray as xr

from svlib import _check, _threads
from svlib._activations import HOMOGENEOUS
from svlib._files import provenance
from svlib._random import Normals

_NETWORKS_AT_A_TIME = 512


def simulate_angles(
    width: int,
    depth: int,
    *,
    angle: float,
    networks: int,
    seed: int,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    activation: str = "relu",
    negative_slope: float = 0.0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Follow the angle between the activations of two inputs through random networks.

    Args:
        width: Units n of every layer.
        depth: Number of layers (weight matrix and activation).
        angle: Angle between the two inputs, in radians, in (0, pi].
        networks: Number of networks; network k has the stream (seed, k).
        activation: "relu", "leaky_relu" or "linear".
        seed, device, dtype, negative_slope, progress: As in :func:`svlib.simulate`.

    Returns:
        Dataset by ``network`` and ``layer`` (depth + 1; layer 0 the inputs, layer l the activations
        after l layers): ``ln_sin2``, :math:`\ln\sin^2\theta`, minus infinity once fewer than two
        units tell the inputs apart; ``cosine``; ``log_ratio``, ln of the ratio of the two lengths
        over that of the inputs; ``dead``, activations of one input are all 0 (the others are NaN).

    Examples:
        >>> record = simulate_angles(256, 8, angle=0.1, networks=100, seed=0)
        >>> bool(record.ln_sin2.mean("network")[8] < record.ln_sin2.mean("network")[0] - 0.2)
        True
    """
    started = time.perf_counter()
    width, depth = _check.integer("width", width), _check.integer("depth", depth, 0)
    networks, seed = _check.integer("networks", networks), _check.integer("seed", seed, 0)
    angle = _check.real("angle", angle, 0, math.pi, open_low=True)
    found, dtype = _check.device(device), _check.precision(dtype)
    slope = _check.activation(activation, negative_slope, HOMOGENEOUS)
    results = np.full((4, networks, depth + 1), np.nan)
    kind = 1.0 if activation == "linear" else slope

    def start(rows: slice) -> _Pair:
        block = range(rows.start, rows.stop)
        numbers = torch.empty(len(block), 2, width, device=found, dtype=dtype)
        return _Pair(Normals(seed, "pair", block, found), numbers, angle, kind)

    _fill(results, start, _threads.available(found), progress)
    made = {"width": width, "depth": depth, "networks": networks, "seed": seed, "angle": angle}
    about = {"dtype": str(dtype), "activation": activation, "negative_slope": slope}
    names, arrays = ("ln_sin2", "cosine", "log_ratio", "dead"), [*results[:3], results[3] == 1]
    return xr.Dataset(
        {name: (("network", "layer"), array) for name, array in zip(names, arrays, strict=True)},
        {"network": np.arange(networks), "layer": np.arange(depth + 1)},
        provenance(found, started) | made | about,
    )


def _fill(
    results: np.ndarray, start: Callable[[slice], _Pair], threads: int, progress: bool | None
) -> None:
    """Follow all networks and write their statistics into ``results``, (statistics, networks,
    layers)."""
    _, networks, layers = results.shape
    size = _NETWORKS_AT_A_TIME

    def work(rows: slice) -> Iterator[None]:
        pair = start(rows)
        for layer in range(layers):
            if layer > 0:
                pair.advance()
            results[:, rows, layer] = pair.statistics()
            yield

    threads = min(threads, -(-networks // size))
    for _ in _threads.blocks(threads, networks, size, layers, work, progress):
        pass


class _Pair:
    """Length ratio and angle of two activations in a block of networks; float64, (networks, 1)."""

    def __init__(self, normals: Normals, numbers: torch.Tensor, angle: float, slope: float) -> None:
        self.normals, self.numbers, self.slope = normals, numbers, slope
        start = numbers.new_zeros(len(numbers), 1, dtype=torch.float64)
        self.cosine = start + math.cos(angle)
        self.log_sine = start + math.log(math.sin(angle))
        self.log_ratio = start

    def advance(self) -> None:
        g1, g2 = self.normals.fill(self.numbers).unbind(1)  # each (networks, width)
        # (phi(c g1 + s g2) - c phi(g1)) / s without cancellation: for ReLU, with t = -c / s, it is
        # max(g2, t g1) - t min(g1, 0)
        turn = (
            torch.exp(-self.log_sine).mul_(-self.cosine).clamp_(-1e30, 1e30).to(self.numbers.dtype)
        )
        beside = torch.maximum(g2, turn * g1).sub_(g1.clamp(max=0).mul_(turn))
        first = torch.relu(g1)
        if self.slope != 0:
            beside = self.slope * g2 + (1 - self.slope) * beside
            first = self.slope * g1 + (1 - self.slope) * first
        square = torch.linalg.vecdot(first, first)[:, None]
        along = torch.linalg.vecdot(first, beside)[:, None] / square
        beside.addcmul_(along, first, value=-1)
        across = torch.linalg.vector_norm(beside, dim=1, keepdim=True) / square.sqrt()
        # one active unit leaves no angle, none leaves nothing
        rounding = 16 * torch.finfo(self.numbers.dtype).eps
        across = torch.where(across > rounding * along.abs(), across, 0).double()
        along = self.cosine + self.log_sine.exp() * along
        along = torch.where(along.abs() > rounding * self.cosine.abs(), along, 0)
        log_across = self.log_sine + across.log()
        log_norm = torch.hypot(along, log_across.exp()).log()
        self.cosine, self.log_sine = along / log_norm.exp(), log_across - log_norm
        self.log_ratio = self.log_ratio + log_norm

    def statistics(self) -> np.ndarray:
        dead = ~torch.isfinite(self.log_ratio)
        values = torch.stack([2 * self.log_sine, self.cosine, self.log_ratio])
        values = torch.where(dead, torch.nan, values)
        return torch.cat([values, dead[None].double()]).squeeze(-1).cpu().numpy()
