"""Random networks against a slow reference, theory, and themselves in other blocks."""

import math
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import ks_2samp

import svlib as sv
from svlib import gram, simulation
from svlib._random import Normals, stream
from svlib.simulation import Interrupted, sample_preactivations, simulate, summarize
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
    method: str = "weights",
) -> list[np.ndarray]:
    """One network, layer by layer, with the same random numbers and no scale taken out.

    The gram method takes the Cholesky factor of the covariance of the inputs here, which is good
    enough in float64 for few inputs and layers.
    """
    normals = Normals(seed, "network", range(network, network + 1), "cpu")

    def normal(rows: int) -> np.ndarray:
        return normals.fill(torch.empty(1, rows, width, dtype=torch.float64))[0].numpy()

    def linear(a: np.ndarray) -> np.ndarray:
        if method == "weights":
            return np.asarray(a @ normal(a.shape[1]) / math.sqrt(a.shape[1]))
        return np.asarray(np.linalg.cholesky(a @ a.T / a.shape[1]) @ normal(len(a)))

    y = normal(samples) if inputs is None else linear(inputs)
    layers = [y]
    for _ in range(depth):
        z = y
        if normalization is not None:
            axis = 0 if normalization == "batch" else 1
            z = (y - y.mean(axis, keepdims=True)) / y.std(axis, keepdims=True)
        branch = linear(FUNCTIONS[activation](z)) / math.sqrt(SECOND_MOMENTS[activation])
        y = branch if residual is None else y + math.sqrt(residual) * branch
        layers.append(y)
    return layers


@pytest.mark.parametrize("activation", list(FUNCTIONS))
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("residual", [None, 0.5])
@pytest.mark.parametrize("method", ["weights", "gram"])
def test_equals_the_slow_reference(
    activation: str, normalization: str | None, residual: float | None, method: str
) -> None:
    slope = 0.3 if activation == "leaky_relu" else 0.0
    record = simulate(
        24,
        4,
        networks=3,
        samples=5,
        seed=4,
        dtype=torch.float64,
        activation=activation,
        method=method,
        negative_slope=slope,
        normalization=normalization,
        residual=residual,
    )
    # BatchNorm makes the five inputs dependent: their covariance has no inverse where nothing bends
    # it
    rounding = 1e-6 if normalization == "batch" and method == "gram" else 1e-9
    if rounding > 1e-9 and activation == "linear":
        pytest.skip("the reference has no Cholesky factor")
    for network in range(3):
        for layer, y in enumerate(
            reference(24, 4, 5, 4, network, activation, normalization, residual, method=method)
        ):
            m2 = ((y.sum(0) ** 2 - (y**2).sum(0)) / 20).mean()
            mean = y.mean(0)
            radial = ((y - mean) @ (mean / np.linalg.norm(mean))).var(ddof=1) / 24
            found = record.sel(network=network, layer=layer)
            np.testing.assert_allclose(found.m2, m2, rtol=rounding, atol=1e-10)
            np.testing.assert_allclose(found.v2, y.var(0, ddof=1).mean(), rtol=rounding)
            np.testing.assert_allclose(found.log_scale, np.log((y**2).mean()) / 2, atol=rounding)
            np.testing.assert_allclose(
                found.ratio, np.sqrt(max(m2, 0) / found.v2), rtol=1e-6, atol=1e-5
            )
            np.testing.assert_allclose(found.angular + found.radial, found.v2, rtol=1e-12)
            np.testing.assert_allclose(found.sigma2, (y**2).mean(), rtol=rounding)
            np.testing.assert_allclose(found.fraction, found.v2 / found.sigma2, rtol=1e-12)
            for name in ("v2", "angular", "radial"):
                over = found[name] / found.m2
                np.testing.assert_allclose(found[f"{name}_over_m2"], over, rtol=1e-12)
            if normalization != "batch":  # where the mean is rounding there is no ray
                np.testing.assert_allclose(found.radial, radial, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("method", ["weights", "gram"])
def test_given_inputs_and_raw_preactivations(method: str) -> None:
    inputs = np.random.default_rng(0).normal(size=(5, 11))
    y = sample_preactivations(
        16, [0, 2], networks=2, inputs=inputs, units=4, seed=1, dtype=torch.float64, method=method
    )
    for network in range(2):
        layers = reference(16, 2, 5, 1, network, inputs=inputs, method=method)
        np.testing.assert_allclose(y[network, 0], layers[0][:, :4], rtol=1e-10)
        np.testing.assert_allclose(y.sel(layer=2)[network], layers[2][:, :4], rtol=1e-8)
    record = simulate(16, 2, networks=2, inputs=inputs, seed=1, dtype=torch.float64, method=method)
    whole = sample_preactivations(
        16, [2], networks=2, inputs=inputs, units=16, seed=1, dtype=torch.float64, method=method
    )
    np.testing.assert_allclose(
        record.m2[:, 2], sv.decompose(whole[:, 0].values, 1, 2).m2, rtol=1e-9
    )


def differences(first: xr.Dataset, second: xr.Dataset, layer: int) -> dict[str, float]:
    """p-values of two-sample Kolmogorov-Smirnov tests of the networks of two records."""
    names = ("m2", "v2", "ratio", "angular", "radial")
    return {
        name: float(ks_2samp(first[name][:, layer], second[name][:, layer]).pvalue)
        for name in names
    }


@pytest.mark.parametrize(
    ("width", "samples", "layer"),
    [(30, 8, 20), (30, 40, 49), (100, 10, 1), (100, 60, 20), (60, 100, 30), (300, 20, 20)],
)
def test_methods_sample_one_distribution(width: int, samples: int, layer: int) -> None:
    """Two-sample tests with fixed seeds, so that this cannot fail by chance."""
    options = {"networks": 300, "samples": samples}
    weights = simulate(width, layer, seed=1, method="weights", **options)  # type: ignore[arg-type]
    gram = simulate(width, layer, seed=2, method="gram", **options)  # type: ignore[arg-type]
    assert min(differences(weights, gram, layer).values()) > 1e-3
    narrower = simulate(width // 2, layer, seed=2, method="gram", **options)  # type: ignore[arg-type]
    assert min(differences(weights, narrower, layer).values()) < 1e-3


def jittered(a: torch.Tensor) -> torch.Tensor:
    """What the gram method must not do: a Cholesky factor with as little jitter as it takes."""
    covariance = a @ a.mT
    jitter = (
        1e-6
        * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        * torch.eye(a.shape[-2])
    )
    while True:
        factor, info = torch.linalg.cholesky_ex(covariance + jitter)
        if not info.any():
            return factor
        jitter = 10 * jitter


@pytest.mark.parametrize(
    ("width", "samples", "layer", "options"),
    [(30, 60, 300, {}), (60, 60, 300, {}), (40, 30, 300, {"normalization": "layer"})],
)
def test_jitter_would_show(
    width: int,
    samples: int,
    layer: int,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Jitter holds collinear inputs apart: v^2 across their ray stops falling, as does v/m."""
    call = partial(simulate, width, layer, networks=40, samples=samples, **options)  # type: ignore[arg-type]
    weights, right = call(seed=1, method="weights"), call(seed=2, method="gram")
    monkeypatch.setattr(gram, "factor", jittered)
    wrong = call(seed=2, method="gram")
    name = "ratio" if options else "angular"
    assert differences(weights, right, layer)[name] > 1e-3
    assert differences(weights, wrong, layer)[name] < 1e-6


def test_factor_is_as_accurate_as_the_activations() -> None:
    """Inputs collinear to 1e-9, more than features, equal, zero and huge."""
    torch_generator = stream(0, "test")
    a = torch.randn(50, 20, generator=torch_generator, dtype=torch.float64)
    nearly = torch.ones(9, 1, dtype=torch.float64) * a[:1] + 1e-9 * a[:9]
    for rows in (a, a[:7], nearly, a[:1].expand(4, -1), torch.zeros(3, 20), 1e200 * a[:5], a[:1]):
        lower = gram.factor(rows[None])[0]
        assert lower.shape == (len(rows), min(len(rows), 20))
        assert torch.equal(lower, lower.tril())
        difference, lower_difference = (x - x[:1] for x in (rows, lower))
        scale = rows.abs().max().clamp(min=1e-300)
        norms, found = (
            torch.linalg.vector_norm(x / scale, dim=1) for x in (difference, lower_difference)
        )
        np.testing.assert_allclose(found, norms, rtol=1e-6, atol=1e-14)


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
    """m^2/sigma^2 at layers 1 to 4 of width 600, to four standard errors and a 1/N correction."""
    record = simulate(600, 4, networks=10, samples=60, seed=1, **options)  # type: ignore[arg-type]
    theory = trajectory(4, **options)  # type: ignore[arg-type]
    share = record.m2 / (record.m2 + record.v2)
    error = share.std("network", ddof=1) / np.sqrt(10)
    finite = 0.01 if options.get("normalization") == "batch" else 0.004  # O(1/B) and O(1/N)
    assert (abs(share.mean("network") - theory.rho) < 4 * error + finite).all()


def test_total_variance_is_preserved_on_average() -> None:
    for options in (
        {},
        {"activation": "leaky_relu", "negative_slope": 0.3},
        {"activation": "linear"},
    ):
        record = simulate(50, 5, networks=600, samples=2, seed=2, **options)
        total = record.m2 + record.v2
        error = total.std("network", ddof=1) / np.sqrt(600)
        assert (abs(total.mean("network") - 1) < 4 * error).all()


def test_one_input_without_weight_matrix_has_the_same_distribution() -> None:
    x = np.ones((2, 16))
    direct = sample_preactivations(16, [1, 3], networks=4000, inputs=x[:1], units=1, seed=3)[
        :, :, 0, 0
    ]
    through = sample_preactivations(16, [1, 3], networks=4000, inputs=x, units=1, seed=4)[
        :, :, 0, 0
    ]
    for power in (2, 4):
        a, b = direct**power, through**power
        error = np.sqrt((a.var("network") + b.var("network")) / 4000)
        assert (abs(a.mean("network") - b.mean("network")) < 4 * error).all()


@pytest.mark.parametrize(
    "options", [*CASES, {"method": "gram"}, {"method": "gram", "activation": "tanh"}], ids=str
)
def test_networks_do_not_depend_on_their_neighbours(options: dict[str, object]) -> None:
    chaotic = options.get("normalization") == "batch"  # amplifies rounding
    dtype = torch.float64 if chaotic else torch.float32
    call = partial(simulate, 40, 30, samples=6, seed=5, dtype=dtype, **options)  # type: ignore[arg-type]
    many = call(networks=9)
    for other in (
        call(networks=range(4)),
        call(networks=range(3, 9)),
        call(networks=9, memory=60_000),
    ):
        same = many.sel(network=other.network)
        for name in ("m2", "v2", "radial"):
            np.testing.assert_allclose(
                other[name], same[name], rtol=1e-5, atol=1e-6 * float(many.v2.min())
            )
    assert call(networks=9, memory=60_000).attrs["block_size"] < 9
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call(networks=9)
        torch.set_num_threads(2)
        again = call(networks=9)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(alone.v2, again.v2, rtol=1e-5)
    assert call(networks=9).m2.values.tobytes() == many.m2.values.tobytes()
    assert not np.allclose(many.v2[0], many.v2[1])
    assert not np.allclose(many.v2, simulate(40, 30, networks=9, samples=6, seed=6).v2)


def test_auto_takes_the_cheaper_method() -> None:
    found = {
        (width, samples): simulate(width, 0, networks=1, samples=samples, seed=0).attrs["method"]
        for width, samples in [
            (30, 256),
            (100, 256),
            (300, 256),
            (1000, 256),
            (3000, 256),
            (300, 100),
            (300, 2),
            (30, 100),
        ]
    }
    assert [key for key, method in found.items() if method == "gram"] == [
        (1000, 256),
        (3000, 256),
        (300, 100),
        (300, 2),
    ]


def test_interrupt_leaves_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupt(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    original = simulation._statistics
    whole = simulate(20, 3, networks=6, samples=4, seed=0, memory=5000)
    monkeypatch.setattr(simulation, "_statistics", interrupt)
    with pytest.raises(Interrupted, match="after 2 of 6 networks") as caught:
        simulate(20, 3, networks=6, samples=4, seed=0, memory=5000)
    assert caught.value.record.attrs["networks"] == 2
    np.testing.assert_array_equal(caught.value.record.v2, whole.v2[:2])
    calls = 8
    with pytest.raises(KeyboardInterrupt) as bare:
        simulate(20, 3, networks=6, samples=4, seed=0)
    assert bare.type is KeyboardInterrupt


def test_summary_leaves_the_dead_out() -> None:
    record = simulate(2, 4, networks=200, samples=4, seed=0)
    summary = summarize(record)
    alive = (~record.dead).sum("network")
    assert 0 < int(alive[-1]) < 200
    np.testing.assert_array_equal(summary.alive, alive)
    kept = record.ratio[:, -1].values[~record.dead[:, -1].values]
    expected = [kept.mean(), kept.std(ddof=1), kept.std(ddof=1) / np.sqrt(len(kept))]
    np.testing.assert_allclose(summary.ratio.sel(layer=4), expected)
    with pytest.raises(ValueError, match="record must have a dimension 'network'"):
        summarize(summary)


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
    assert {
        "svlib",
        "torch",
        "numpy",
        "python",
        "device",
        "wall_time",
        "seed",
        "width",
        "samples",
    } <= set(record.attrs)
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
        ({"activation": "geglu"}, ValueError, "activation must be one of .*'relu'.* got 'geglu'"),
        ({"activation": ["relu"]}, ValueError, "activation must be one of"),
        ({"negative_slope": 0.1}, ValueError, "negative_slope must be 0 unless"),
        ({"normalization": "group"}, ValueError, "normalization must be one of .* got 'group'"),
        ({"residual": 0}, ValueError, "residual must be a finite number"),
        ({"residual": math.nan}, ValueError, "residual must be a finite number"),
        (
            {"inputs": np.ones(3)},
            ValueError,
            r"inputs must have shape \(samples, features\), got \(3,\)",
        ),
        ({"inputs": np.full((3, 2), np.nan)}, ValueError, "inputs must be finite, got 6 NaN"),
        (
            {"inputs": np.ones((4, 2))},
            ValueError,
            "samples must be None or the 4 rows of inputs, got 3",
        ),
        ({"inputs": "x"}, TypeError, "inputs must be an array"),
        ({"method": "cholesky"}, ValueError, "method must be one of .*'gram'.* got 'cholesky'"),
        ({"memory": 100}, ValueError, "memory must be at least 448 bytes for one network, got 100"),
        ({"memory": "1G"}, TypeError, "memory must be a real number"),
        (
            {"networks": range(0)},
            ValueError,
            r"networks must be a number or a range of step 1 that is not empty, got range\(0, 0\)",
        ),
        (
            {"networks": range(0, 4, 2)},
            ValueError,
            "networks must be a number or a range of step 1",
        ),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(**(GOOD | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 3, "seed": 0}, "unexpected keyword argument 'sample'"),
        ({"samples": 3}, "missing 1 required keyword-only argument: 'seed'"),
        ({"samples": 3, "seed": 0, "block_size": 2}, "unexpected keyword argument 'block_size'"),
    ],
)
def test_unknown_and_missing_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        simulate(4, 2, networks=1, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message):
        sample_preactivations(4, [0], networks=1, units=1, **options)  # type: ignore[arg-type]


def test_bad_layers_and_units() -> None:
    for layers in ([], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="layers must be increasing and not empty"):
            sample_preactivations(4, layers, networks=1, samples=2, units=1, seed=0)
    with pytest.raises(ValueError, match="units must be at most the width 4, got 5"):
        sample_preactivations(4, [0], networks=1, samples=2, units=5, seed=0)
    with pytest.raises(
        ValueError, match="samples must be at least 2 with normalization='batch', got 1"
    ):
        sample_preactivations(4, [0], networks=1, samples=1, units=1, seed=0, normalization="batch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["gram", "weights"])
def test_gpu_ensemble_agrees_with_cpu(method: str) -> None:
    call = partial(simulate, 100, 20, networks=200, samples=50, seed=0, method=method)
    assert min(differences(call(device="cpu"), call(device="cuda"), 20).values()) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_figure_and_angles_on_a_gpu() -> None:
    record = simulate(3000, 49, networks=20, samples=256, seed=0, device="cuda", memory=4e9)
    assert record.attrs["device"].startswith("cuda")
    assert abs(float(record.ratio[:, 49].mean()) - 7.97) < 0.6
    angles = [
        sv.simulate_angles(64, 10, angle=0.5, networks=1000, seed=0, device=d).ln_sin2[:, 10]
        for d in ("cpu", "cuda")
    ]
    assert ks_2samp(*angles).pvalue > 1e-3


def test_uses_of_one_seed_share_no_numbers() -> None:
    data = sv.data.gaussian(500, 64, seed=0).flatten()
    weights = (
        next(sv.networks.mlp(64, width=500, depth=2, outputs=3, seed=0).parameters())
        .detach()
        .flatten()
    )
    assert abs(np.corrcoef(data, weights)[0, 1]) < 0.03
    with pytest.raises(ValueError, match="seed must be at least 0"):
        stream(-1, "data")
    assert sv.data.gaussian(2, 2, seed=2**100).shape == (2, 2)


def test_scales_beyond_the_range_of_squares() -> None:
    for scale in (1e-25, 1e25):
        record = simulate(16, 2, networks=2, inputs=scale * np.eye(3, 5), seed=0)
        assert not record.dead.any()
        np.testing.assert_allclose(
            record.log_scale[:, 0], math.log(scale) + 0.5 * math.log(1 / 5), atol=1
        )
    with pytest.raises(ValueError, match=r"inputs must be finite as torch\.float32"):
        simulate(16, 2, networks=2, inputs=np.full((3, 5), 1e300), seed=0)


def test_equal_inputs_have_no_variance_for_batchnorm_to_amplify() -> None:
    record = simulate(8, 3, networks=2, inputs=np.ones((7, 5)), seed=0, normalization="batch")
    assert (record.v2 < 1e-12).all()
    assert (record.m2[:, 1:] == 0).all()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("normalization", [None, "batch"])
def test_equal_inputs_stay_equal(activation: str, normalization: str | None) -> None:
    """Also where the network is chaotic: the gram method would round them differently."""
    inputs = np.random.default_rng(0).normal(size=(8, 20))
    inputs[7] = inputs[0]
    options = {
        "inputs": inputs,
        "networks": 2,
        "activation": activation,
        "normalization": normalization,
        "seed": 0,
    }
    y = sample_preactivations(100, [100], units=100, **options)  # type: ignore[arg-type]
    assert y.attrs["method"] == "weights"
    np.testing.assert_array_equal(y[:, 0, 0], y[:, 0, 7])
    with pytest.raises(
        ValueError, match="method must be 'weights' or 'auto' where rows of inputs are equal"
    ):
        simulate(100, 2, method="gram", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalization", ["batch", "layer"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_normalization_takes_any_scale(normalization: str, scale: float) -> None:
    inputs = np.random.default_rng(0).normal(size=(5, 7))
    records = [
        simulate(16, 3, networks=2, inputs=x, seed=0, normalization=normalization)
        for x in (inputs, scale * inputs)
    ]
    np.testing.assert_allclose(records[1].v2[:, 1:], records[0].v2[:, 1:], rtol=1e-3)


def test_a_network_that_overflows_is_left_out_of_the_averages() -> None:
    options = {"weight_variance": 100.0, "bias_variance": 1.0}
    record = simulate(16, 60, networks=3, samples=4, seed=0, **options)  # type: ignore[arg-type]
    assert not np.isfinite(record.m2[:, 60]).any()
    assert np.isnan(summarize(record).m2.sel(statistic="mean", layer=60))


@pytest.mark.parametrize("method", ["gram", "weights"])
def test_blocks_of_rows_equal_the_slow_reference(method: str) -> None:
    found = sample_preactivations(
        400, [0, 1], networks=1, samples=300, units=400, seed=5, method=method, dtype="float64"
    )
    expected = reference(400, 1, 300, 5, 0, method=method)
    for layer in range(2):
        np.testing.assert_allclose(found[0, layer], expected[layer], rtol=1e-8, atol=1e-9)


def test_interrupted_travels_between_processes() -> None:
    caught = pickle.loads(
        pickle.dumps(Interrupted(simulate(4, 1, networks=2, samples=2, seed=0), 5))
    )
    assert "after 2 of 5 networks" in str(caught)
