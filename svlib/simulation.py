"""Statistics of random networks at every layer: simulated, summarized, or raw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from svlib import _check, _threads
from svlib._files import provenance
from svlib.ensemble import METHODS as METHODS
from svlib.ensemble import Ensemble, Options, propagate
from svlib.moments import _divide, _split_along_ray

Array = NDArray[Any]
Use = Callable[[slice, int, torch.Tensor, torch.Tensor], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a simulation. ``record`` holds the networks that were finished."""

    def __init__(self, record: xr.Dataset, networks: int) -> None:
        super().__init__(record, networks)
        self.record, self.networks = record, networks

    def __str__(self) -> str:
        finished = self.record.sizes["network"]
        return f"interrupted after {finished} of {self.networks} networks; they are in .record"


def _indices(networks: Any) -> range:
    """``networks``, a number or a range, as a range."""
    if not isinstance(networks, range):
        return range(_check.integer("networks", networks))
    if len(networks) == 0 or networks.step != 1 or networks.start < 0:
        raise ValueError(
            f"networks must be a number or a range of step 1 that is not empty, got {networks}"
        )
    return networks


def _run(
    ensemble: Ensemble,
    networks: range,
    depth: int,
    progress: bool | None,
    use: Use,
) -> Iterator[int]:
    """Call ``use(rows, layer, y, log_scale)`` for every block and layer, a block in each thread;
    yield how many of the first networks are finished, again and again."""
    threads = min(_threads.available(ensemble.device), ensemble.block_size, len(networks))
    # the bound on memory is one for all threads
    size = min(ensemble.block_size // threads, -(-len(networks) // threads))

    def work(rows: slice) -> Iterator[None]:
        for layer, (y, log_scale) in enumerate(propagate(ensemble, depth, networks[rows])):
            use(rows, layer, y, log_scale)
            yield

    return _threads.blocks(threads, len(networks), size, depth + 1, work, progress)


def simulate(
    width: int,
    depth: int,
    *,
    networks: int | range,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> xr.Dataset:
    r"""Measure m^2 and v^2 at every layer of an ensemble of random networks.

    Args:
        width: Units N of every layer.
        depth: Number of weight matrices after layer 0, at least 0.
        networks: Number of networks, or a range: ``range(40, 60)`` gives those 40 to 59.
        progress: Show a progress bar; ``None`` shows it on a terminal only.
        options: ``seed``, ``samples`` (at least 2) or ``inputs``, and any other argument of
            :class:`svlib.Ensemble`.

    Returns:
        Dataset with dimensions ``network`` and ``layer`` (depth + 1, layer 0 the first
        preactivation), averages over units:

        - ``m2`` (0 where it is no more than rounding), ``v2``, ``sigma2``, unbiased, infinite where
          float64 overflows; ``angular`` and ``radial``, the parts of v2
          (:func:`svlib.moments.split_along_ray`);
        - ``fraction``, v^2/sigma^2; ``ratio``, m/v (biased; 0 where ``m2`` is negative); v2 and its
          parts over m2 as ``v2_over_m2``, ...; all NaN in a dead network;
        - ``log_scale``, ln(sigma), exact where m2 and v2 underflow, -inf in a dead network;
          ``dead``, whether all preactivations are 0.

        ``attrs`` hold configuration, versions, device, method and wall time.

    Raises:
        Interrupted: On Ctrl-C, with the finished networks as its ``record``.

    Examples:
        >>> record = simulate(64, 10, networks=20, samples=50, seed=0)
        >>> dict(record.sizes), bool(record.ratio.mean("network")[10] > 1.5)
        ({'network': 20, 'layer': 11}, True)
    """
    started = time.perf_counter()
    depth = _check.integer("depth", depth, 0)
    ensemble, every = Ensemble(width, **options), _indices(networks)
    _check.integer("samples", ensemble.samples, 2)
    data, finished = dict[str, Array](), 0
    made = {"depth": depth} | ensemble.attributes()
    try:
        for count in _run(ensemble, every, depth, progress, _into(data, len(every), depth)):
            finished = count
    except KeyboardInterrupt as stop:
        if finished == 0:
            raise
        made |= provenance(ensemble.device, started)
        raise Interrupted(_record(data, every[:finished], made), len(every)) from stop
    return _record(data, every, made | provenance(ensemble.device, started))


def _into(data: dict[str, Array], networks: int, depth: int) -> Use:
    """What writes the statistics of a block and layer into ``data``, from any thread."""
    lock = threading.Lock()

    def keep(rows: slice, layer: int, y: torch.Tensor, log_scale: torch.Tensor) -> None:
        for name, found in _statistics(y, log_scale.cpu().numpy()).items():
            with lock:
                if name not in data:
                    data[name] = np.empty((networks, depth + 1), found.dtype)
            data[name][rows, layer] = found

    return keep


def _record(data: dict[str, Array], networks: range, made: dict[str, Any]) -> xr.Dataset:
    """The record of the first of the networks, as many as there are in ``networks``."""
    dims, count, layers = ("network", "layer"), len(networks), data["m2"].shape[1]
    return xr.Dataset(
        {name: (dims, array[:count]) for name, array in data.items()},
        coords={"network": list(networks), "layer": np.arange(layers)},
        attrs=made | {"networks": count},
    )


def _statistics(y: torch.Tensor, log_scale: Array) -> dict[str, Array]:
    """The variables of a record at one layer, (networks,), as :func:`propagate` yields it."""
    split = _split_along_ray(y)
    squares = {name: getattr(split, name) for name in ("m2", "v2", "sigma2", "angular", "radial")}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        power = np.exp(2 * log_scale)
        found = {name: np.where(x == 0, 0, x * power) for name, x in squares.items()}
        found["ratio"] = np.sqrt(np.maximum(split.m2, 0) / split.v2)
    for name in ("v2", "angular", "radial"):
        found[f"{name}_over_m2"] = _divide(squares[name], split.m2)
    dead = np.isneginf(log_scale)
    return found | {"fraction": split.fraction, "log_scale": log_scale, "dead": dead}


def summarize(record: xr.Dataset) -> xr.Dataset:
    """Average a record over its networks, without the dead ones.

    Args:
        record: Of :func:`simulate` or :func:`svlib.simulate_angles`; any Dataset with a dimension
            ``network``.

    Returns:
        Dataset with the same variables, in which a dimension ``statistic`` ("mean"; "deviation",
        the standard deviation over networks; "error", the standard error of the mean) stands for
        ``network``, and ``alive``, the number of networks that live. A value that is not finite in
        a network, an m/v for example, is left out of that average.

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
    units: int,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> xr.DataArray:
    """Return raw preactivations of random networks, for histograms.

    Args:
        width: Units N of every layer.
        layers: Layers to keep, counted from 0, increasing.
        networks: Number of networks, or a range of them.
        units: How many units of each layer to keep, the first ones.
        progress: Show a progress bar; ``None`` shows it on a terminal only.
        options: As in :func:`simulate`; one input is enough.

    Returns:
        Array with dimensions ``network``, ``layer``, ``sample`` and ``unit``, of the given dtype.

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
    ensemble, every = Ensemble(width, **options), _indices(networks)
    units = _check.integer("units", units)
    if units > ensemble.width:
        raise ValueError(f"units must be at most the width {ensemble.width}, got {units}")
    kept = torch.empty(len(every), len(wanted), ensemble.samples, units, dtype=ensemble.dtype)

    def keep(rows: slice, layer: int, y: torch.Tensor, log_scale: torch.Tensor) -> None:
        if layer in wanted:
            scale = log_scale.exp()[:, None, None]
            kept[rows, wanted.index(layer)] = (y[..., :units] * scale).cpu()

    for _ in _run(ensemble, every, wanted[-1], progress, keep):
        pass
    return xr.DataArray(
        kept.numpy(),
        dims=("network", "layer", "sample", "unit"),
        coords={"network": list(every), "layer": wanted},
        attrs=provenance(ensemble.device, started) | ensemble.attributes(),
    )
