"""Every combination of options: numbers, or an error that names an argument; nothing else."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svlib import simulate
from svlib.ensemble import Ensemble
from svlib.theory import finite_width, trajectory
from svlib.theory.activations import NAMES


def at_least(low: float, *more: float) -> st.SearchStrategy[float]:
    """Positive numbers over many decades, with the ends; between 1 and 1e7 quadrature is slow."""
    small, large = st.floats(-60, 0), st.floats(7, 15)
    return st.sampled_from([low, 1.0, *more]) | (small | large).map(lambda x: 10.0**x)


SLOPES: dict[str, st.SearchStrategy[Any]] = {
    "activation": st.sampled_from([*NAMES[:4], "relu6", "elu"]),
    "negative_slope": st.sampled_from([0.0, 0.0, 0.3, 1.0, -1.0, -3.0, 1000.0]),
}
COMMON: dict[str, st.SearchStrategy[Any]] = SLOPES | {
    "weight_variance": st.none() | at_least(0.0, 2.0),
    "bias_variance": st.sampled_from([0.0, 0.0, 1.0, 2.0]) | at_least(0.0),
    "normalization": st.sampled_from([None, None, "batch", "layer", "rms"]),
    "residual": st.none() | at_least(0.0),
}
TRAJECTORY = COMMON | {
    "q0": at_least(0.0, 5e-324),
    "rho0": st.sampled_from([0.0, 1.0, -1.0, 1 - 1e-15]) | st.floats(-1, 1),
}
WIDTH = SLOPES | {
    "input_cv2": at_least(0.0),
    "features": st.none() | st.integers(1, 50),
    "rho0": st.sampled_from([0.0, 0.0, 1.0, 1 - 1e-15]) | st.floats(0, 1),
    "weights": st.sampled_from(["gaussian", "orthogonal"]),
    "normalization": COMMON["normalization"],
    "samples": st.none() | st.integers(1, 40),
}
SIMULATION = COMMON | {
    "samples": st.integers(1, 6),
    "inputs": st.sampled_from([None, None, np.eye(3), np.zeros((2, 2)), 1e300 * np.eye(2)]),
    "dtype": st.sampled_from(["float32", "float64"]),
    "weights": WIDTH["weights"],
    "method": st.sampled_from(["auto", "gram", "weights"]),
}


def of(options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options."""
    return st.fixed_dictionaries({}, optional=options)


def found(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result, or None where an error names one of the arguments."""
    names = {*inspect.signature(function).parameters, *inspect.signature(Ensemble).parameters}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "depth .* beyond the law's range")
            return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        if str(error).split()[0] not in names:
            raise
    return None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(depth=st.integers(0, 12), options=of(TRAJECTORY))
def test_trajectory(depth: int, options: dict[str, Any]) -> None:
    layers = found(trajectory, depth, **options)
    if layers is None:
        return
    assert layers.sigma2.shape == layers.fraction.shape == (depth + 1,)
    assert (layers.sigma2 >= 0).all()
    known = layers.fraction[~np.isnan(layers.fraction)]
    assert ((known >= 0) & (known <= 2)).all()
    lost = np.flatnonzero(np.isnan(layers.fraction))
    if lost.size:
        assert np.isnan(layers.fraction[lost[0] :]).all()
        assert layers.sigma2[lost[0]] < 1e-250
    assert not np.isnan(layers.m[layers.sigma2 == 0]).any()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(width=st.integers(1, 300), depth=st.integers(0, 12), options=of(WIDTH))
def test_finite_width(width: int, depth: int, options: dict[str, Any]) -> None:
    law = found(finite_width, width, depth, **options)
    if law is not None:
        assert np.isfinite(law.m2).all()
        assert law.v2 == pytest.approx(law.angular + law.radial + law.remainder, rel=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(width=st.integers(1, 9), depth=st.integers(0, 6), options=of(SIMULATION))
def test_simulate(width: int, depth: int, options: dict[str, Any]) -> None:
    if "inputs" in options:
        options.pop("samples", None)
    record = found(simulate, width, depth, networks=2, seed=0, **options)
    if record is not None:
        assert dict(record.sizes) == {"network": 2, "layer": depth + 1}
        assert not np.isnan(record.log_scale).any()
        alive = record.where(~record.dead)
        assert (np.isnan(alive.fraction) == record.dead).all()
        assert (alive.v2.fillna(0) >= 0).all()


def test_weights_of_0_and_underflow() -> None:
    """A signal that underflows keeps its v^2/sigma^2; where there is none, it is not a number."""
    faint = trajectory(2000, weight_variance=1.0)
    assert faint.sigma2[2000] == 0
    assert faint.fraction == pytest.approx(trajectory(2000).fraction, rel=1e-11)
    assert faint.m2[2000] == faint.v2[2000] == 0
    for name in ("relu", "tanh"):
        dead = trajectory(2, activation=name, weight_variance=0.0)
        assert dead.sigma2.tolist() == [1, 0, 0]
        assert np.isnan(dead.fraction).tolist() == [False, True, True]
        only = trajectory(2, activation=name, weight_variance=0.0, bias_variance=0.5)
        assert only.fraction.tolist() == [1, 0, 0]
    tiny = trajectory(1, q0=1e-320, bias_variance=0.25, weight_variance=2.0)
    assert (tiny.sigma2[1], tiny.fraction[1]) == (0.25, pytest.approx(0, abs=1e-300))


def test_linear_networks_of_finite_width() -> None:
    """White inputs have m = 0 for ever; correlated ones keep v^2/m^2 on average, but for drift."""
    for options in ({"activation": "linear"}, {"activation": "leaky_relu", "negative_slope": 1.0}):
        with pytest.raises(ValueError, match="rho0 must be positive for a linear network"):
            finite_width(100, 1, **options)
        law = finite_width(10_000, 3, rho0=0.5, **options)
        assert law.v2 / law.m2 == pytest.approx(np.ones(4), rel=1e-2)
