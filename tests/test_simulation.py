"""Random networks against a slow reference, against theory, and against themselves in other blocks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import svlib as sv
from svlib import simulation
from svlib._random import stream
from svlib.simulation import sample_preactivations, simulate
from svlib.theory import trajectory

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda y: np.maximum(y, 0),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.3 * y),
    "linear": lambda y: y,
    "tanh": np.tanh,
}
SECOND_MOMENTS = {"relu": 0.5, "leaky_relu": (1 + 0.09) / 2, "linear": 1.0, "tanh": 0.3942944903978}


def reference(
    width: int,
    depth: int,
    samples: int,
    seed: int,
    network: int,
    activation: str = "relu",
    normalization: str | None = None,
    residual: float | None = None,
    inputs: np.ndarray | None = None,
) -> list[np.ndarray]:
    """One network, one weight matrix after the other, no scale taken out; the same random numbers."""
    generator = stream(seed, "network", network)

    def normal(rows: int) -> np.ndarray:
        return torch.empty(rows, width, dtype=torch.float64).normal_(generator=generator).numpy()

    y = normal(samples) if inputs is None else inputs @ normal(inputs.shape[1]) / math.sqrt(inputs.shape[1])
    layers = [y]
    for _ in range(depth):
        z = y
        if normalization is not None:
            axis = 0 if normalization == "batch" else 1
            z = (y - y.mean(axis, keepdims=True)) / y.std(axis, keepdims=True)
        branch = FUNCTIONS[activation](z) @ normal(width) / math.sqrt(width * SECOND_MOMENTS[activation])
        y = branch if residual is None else y + math.sqrt(residual) * branch
        layers.append(y)
    return layers


@pytest.mark.parametrize("activation", list(FUNCTIONS))
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("residual", [None, 0.5])
def test_equals_the_slow_reference(activation: str, normalization: str | None, residual: float | None) -> None:
    slope = 0.3 if activation == "leaky_relu" else 0.0
    record = simulate(7, 6, networks=3, samples=5, seed=4, dtype=torch.float64, activation=activation,
                      negative_slope=slope, normalization=normalization, residual=residual)  # fmt: skip
    for network in range(3):
        for layer, y in enumerate(reference(7, 6, 5, 4, network, activation, normalization, residual)):
            m2 = ((y.sum(0) ** 2 - (y**2).sum(0)) / 20).mean()
            found = record.sel(network=network, layer=layer)
            np.testing.assert_allclose(found.m2, m2, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.v2, y.var(0, ddof=1).mean(), rtol=1e-9)
            np.testing.assert_allclose(found.log_scale, np.log((y**2).mean()) / 2, atol=1e-9)
            np.testing.assert_allclose(found.ratio, np.sqrt(max(m2, 0) / found.v2), rtol=1e-6, atol=1e-6)


def test_given_inputs_and_raw_preactivations() -> None:
    inputs = np.random.default_rng(0).normal(size=(5, 11))
    y = sample_preactivations(7, [0, 2], networks=2, inputs=inputs, units=4, seed=1, dtype=torch.float64)
    for network in range(2):
        layers = reference(7, 2, 5, 1, network, inputs=inputs)
        np.testing.assert_allclose(y[network, 0], layers[0][:, :4], rtol=1e-10)
        np.testing.assert_allclose(y.sel(layer=2)[network], layers[2][:, :4], rtol=1e-10)
    record = simulate(7, 2, networks=2, inputs=inputs, seed=1, dtype=torch.float64)
    whole = sample_preactivations(7, [2], networks=2, inputs=inputs, units=7, seed=1, dtype=torch.float64)
    np.testing.assert_allclose(record.m2[:, 2], sv.decompose(whole[:, 0].values, 1, 2).m2, rtol=1e-9)


CASES = [
    {},
    {"activation": "leaky_relu", "negative_slope": 0.3},
    {"activation": "linear"},
    {"activation": "tanh"},
    {"residual": 1.0},
    {"normalization": "layer"},
    {"normalization": "batch"},
    {"normalization": "batch", "residual": 0.5},
    {"normalization": "layer", "residual": 0.5},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_wide_networks_follow_the_theory(options: dict[str, object]) -> None:
    """m^2/sigma^2 at layers 1 to 4 of width 600: within four standard errors and a 1/N correction."""
    record = simulate(600, 4, networks=10, samples=60, seed=1, **options)  # type: ignore[arg-type]
    theory = trajectory(4, **options)  # type: ignore[arg-type]
    share = record.m2 / (record.m2 + record.v2)
    error = share.std("network", ddof=1) / np.sqrt(10)
    finite = 0.01 if options.get("normalization") == "batch" else 0.004  # O(1/B) and O(1/N)
    assert (abs(share.mean("network") - theory.rho) < 4 * error + finite).all()


def test_total_variance_is_preserved_on_average() -> None:
    for options in ({}, {"activation": "leaky_relu", "negative_slope": 0.3}, {"activation": "linear"}):
        record = simulate(50, 5, networks=600, samples=2, seed=2, **options)
        total = record.m2 + record.v2
        error = total.std("network", ddof=1) / np.sqrt(600)
        assert (abs(total.mean("network") - 1) < 4 * error).all()


def test_one_input_without_weight_matrix_has_the_same_distribution() -> None:
    x = np.ones((2, 16))
    direct = sample_preactivations(16, [1, 3], networks=4000, inputs=x[:1], units=1, seed=3)[:, :, 0, 0]
    through = sample_preactivations(16, [1, 3], networks=4000, inputs=x, units=1, seed=4)[:, :, 0, 0]
    for power in (2, 4):
        a, b = direct**power, through**power
        error = np.sqrt((a.var("network") + b.var("network")) / 4000)
        assert (abs(a.mean("network") - b.mean("network")) < 4 * error).all()


def test_networks_do_not_depend_on_their_neighbours() -> None:
    many = simulate(40, 10, networks=9, samples=6, seed=5)
    few = simulate(40, 10, networks=4, samples=6, seed=5)
    one_by_one = simulate(40, 10, networks=9, samples=6, seed=5, memory=14000)
    np.testing.assert_allclose(many.v2[:4], few.v2, rtol=1e-5)
    np.testing.assert_allclose(many.v2, one_by_one.v2, rtol=1e-5)
    assert not np.allclose(many.v2[0], many.v2[1])
    assert not np.allclose(many.v2, simulate(40, 10, networks=9, samples=6, seed=6).v2)


def test_deep_networks_keep_their_numbers() -> None:
    """At width 16 and layer 2000 sigma^2 is about e^-310, below what float32 can hold."""
    record = simulate(16, 2000, networks=8, samples=10, seed=0)
    alive = ~record.dead[:, -1].values
    assert alive.sum() >= 6  # a layer dies with probability 2^-16
    assert np.isfinite(record.ratio[alive]).all()
    assert (record.log_scale[alive][:, -1] < -80).all()


def test_dead_networks_are_named() -> None:
    record = simulate(2, 60, networks=30, samples=4, seed=0)
    dead = record.dead[:, -1].values
    assert 0 < dead.sum() <= 30
    assert (record.m2[:, -1].values[dead] == 0).all()
    assert np.isneginf(record.log_scale[:, -1].values[dead]).all()
    assert np.isnan(record.ratio[:, -1].values[dead]).all()
    assert np.isfinite(record.ratio[:, -1].values[~dead]).all()


def test_record_says_how_it_was_made() -> None:
    record = simulate(4, 1, networks=1, samples=2, seed=7)
    assert {"svlib", "torch", "numpy", "python", "device", "wall_time", "seed", "width", "samples"} <= set(record.attrs)
    assert record.attrs["seed"] == 7
    assert record.m2.dtype == np.float64


def test_no_global_generator_is_touched() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    simulate(8, 2, networks=2, samples=3, seed=0)
    sample_preactivations(8, [1], networks=1, samples=1, units=1, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state(legacy=False)["state"]["key"])


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    simulate(4, 1, networks=1, samples=2, seed=0)
    assert capfd.readouterr().err == ""
    simulate(4, 1, networks=1, samples=2, seed=0, progress=True)
    assert "100%" in capfd.readouterr().err


GOOD: dict[str, object] = {"width": 4, "depth": 2, "networks": 2, "samples": 3, "seed": 0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"width": 4.0}, TypeError, r"width must be an integer, got 4\.0"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"networks": 0}, ValueError, "networks must be at least 1, got 0"),
        ({"samples": 1}, ValueError, "samples must be at least 2, got 1"),
        ({"samples": None}, TypeError, "samples must be an integer, got None"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": "1"}, TypeError, "seed must be an integer, got '1'"),
        ({"device": "cuda:99"}, ValueError, "device must be one of .* got 'cuda:99'"),
        ({"device": "toaster"}, ValueError, "device must be one of"),
        ({"dtype": torch.float16}, ValueError, "dtype must be one of"),
        ({"dtype": float}, ValueError, "dtype must be one of"),
        ({"activation": "gelu"}, ValueError, "activation must be one of .*'relu'.* got 'gelu'"),
        ({"activation": ["relu"]}, ValueError, "activation must be one of"),
        ({"negative_slope": 0.1}, ValueError, "negative_slope must be 0 unless"),
        ({"normalization": "group"}, ValueError, "normalization must be one of .* got 'group'"),
        ({"residual": 0}, ValueError, "residual must be a finite number"),
        ({"residual": math.nan}, ValueError, "residual must be a finite number"),
        ({"inputs": np.ones(3)}, ValueError, r"inputs must have shape \(samples, features\), got \(3,\)"),
        ({"inputs": np.full((3, 2), np.nan)}, ValueError, "inputs must be finite, got 6 NaN"),
        ({"inputs": np.ones((4, 2))}, ValueError, "samples must be None or the 4 rows of inputs, got 3"),
        ({"inputs": "x"}, TypeError, "inputs must be an array"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(**(GOOD | change))  # type: ignore[arg-type]


def test_bad_layers_and_units() -> None:
    for layers in ([], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="layers must be increasing and not empty"):
            sample_preactivations(4, layers, networks=1, samples=2, units=1, seed=0)
    with pytest.raises(ValueError, match="units must be at most the width 4, got 5"):
        sample_preactivations(4, [0], networks=1, samples=2, units=5, seed=0)
    with pytest.raises(ValueError, match="samples must be at least 2 with normalization='batch', got 1"):
        sample_preactivations(4, [0], networks=1, samples=1, units=1, seed=0, normalization="batch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_ensemble_agrees_with_cpu() -> None:
    ratios = [simulate(100, 20, networks=100, samples=50, seed=0, device=device).ratio[:, 20] for device in ("cpu", "cuda")]
    error = math.hypot(*(float(ratio.std(ddof=1)) / 10 for ratio in ratios))
    assert abs(float(ratios[0].mean() - ratios[1].mean())) < 4 * error


def test_uses_of_one_seed_share_no_numbers() -> None:
    data = sv.data.gaussian(500, 64, seed=0).flatten()
    weights = next(sv.networks.mlp(64, width=500, depth=2, outputs=3, seed=0).parameters()).detach().flatten()
    assert abs(np.corrcoef(data, weights)[0, 1]) < 0.03
    with pytest.raises(ValueError, match="seed must be at least 0"):
        stream(-1, "data")
    assert sv.data.gaussian(2, 2, seed=2**100).shape == (2, 2)


def test_scales_beyond_the_range_of_squares() -> None:
    for scale in (1e-25, 1e25):
        record = simulate(16, 2, networks=2, inputs=scale * np.eye(3, 5), seed=0)
        assert not record.dead.any()
        np.testing.assert_allclose(record.log_scale[:, 0], math.log(scale) + 0.5 * math.log(1 / 5), atol=1)
    with pytest.raises(ValueError, match=r"inputs must be finite as torch\.float32"):
        simulate(16, 2, networks=2, inputs=np.full((3, 5), 1e300), seed=0)


def test_equal_inputs_have_no_variance_for_batchnorm_to_amplify() -> None:
    record = simulate(8, 3, networks=2, inputs=np.ones((7, 5)), seed=0, normalization="batch")
    assert (record.v2 < 1e-12).all()
    assert (record.m2[:, 1:] == 0).all()
