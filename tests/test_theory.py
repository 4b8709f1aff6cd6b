"""Correlation maps and trajectories against quadrature, 40 digits, and the paper's values."""

import math
import time
from functools import partial

import mpmath
import numpy as np
import pytest
from scipy import integrate, special

from svlib import simulate
from svlib.theory import maps, trajectory

FAMILY = [("relu", 0.0), ("leaky_relu", 0.3), ("leaky_relu", -0.5), ("linear", 0.0), ("tanh", 0.0)]
FUNCTIONS = {
    "relu": lambda z, a: np.maximum(z, 0),
    "leaky_relu": lambda z, a: np.where(z > 0, z, a * z),
    "linear": lambda z, a: z,
    "tanh": lambda z, a: np.tanh(z),
}


def by_quadrature(rho: float, activation: str, slope: float) -> float:
    """C by Gauss-Legendre panels in both variables, split where the activation has its kink."""
    phi = FUNCTIONS[activation]
    nodes, weights = special.roots_legendre(60)

    def panel(function: object, low: float, high: float) -> float:
        z = (high - low) / 2 * nodes + (high + low) / 2
        return float((high - low) / 2 * weights @ function(z))  # type: ignore[operator]

    def density(z: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))

    def inner(first: float) -> float:
        side = math.sqrt(1 - rho**2)
        kink = min(max(-rho * first / side, -11), 11)
        function = lambda z: phi(rho * first + side * z, slope) * density(z)  # noqa: E731
        return panel(function, -11, kink) + panel(function, kink, 11)

    outer = lambda z: phi(z, slope) * density(z) * np.array([inner(x) for x in z])  # noqa: E731
    product = panel(outer, -11, 0) + panel(outer, 0, 11)
    second = panel(lambda z: phi(z, slope) ** 2 * density(z), -11, 0) + panel(
        lambda z: phi(z, slope) ** 2 * density(z), 0, 11
    )
    return product / second


@pytest.mark.parametrize(("activation", "slope"), FAMILY)
@pytest.mark.parametrize("rho", [-0.9, -0.3, 0.0, 0.5, 0.95])
def test_map_equals_quadrature(rho: float, activation: str, slope: float) -> None:
    found = maps.correlation(rho, activation=activation, negative_slope=slope)
    assert found == pytest.approx(by_quadrature(rho, activation, slope), abs=1e-11)


@pytest.mark.parametrize(("activation", "slope"), FAMILY)
@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.5, 0.95])
def test_slope_is_the_derivative(rho: float, activation: str, slope: float) -> None:
    options = {"activation": activation, "negative_slope": slope}
    h = 1e-5
    difference = maps.correlation(rho + h, **options) - maps.correlation(rho - h, **options)  # type: ignore[arg-type]
    found = maps.correlation_slope(rho, **options)  # type: ignore[arg-type]
    assert found == pytest.approx(difference / (2 * h), abs=1e-8)


def test_the_formula_as_printed_and_the_one_that_keeps_digits_agree() -> None:
    for rho in np.linspace(-1, 1, 41).tolist():
        assert maps.f(rho) == pytest.approx(
            maps.correlation(rho), abs=1e-15 if rho < 0.99 else 1e-8
        )
    assert maps.f(1 - 1e-20) == 1  # the next keeps what this loses
    assert 0 < 1e-20 - maps.gap_decrement(1e-20) < 1e-20
    rho = 0.0
    for found in trajectory(49).rho.tolist():
        assert found == pytest.approx(rho, abs=1e-13)
        rho = maps.f(rho)


def test_special_cases() -> None:
    for rho in (-1.0, -0.2, 0.0, 0.7, 1.0):
        assert maps.correlation(
            rho, activation="leaky_relu", negative_slope=0.0
        ) == maps.correlation(rho)
        assert maps.correlation(rho, activation="leaky_relu", negative_slope=1.0) == pytest.approx(
            rho, abs=1e-15
        )
        assert maps.correlation(rho, activation="linear") == rho
    for activation, slope in FAMILY:
        assert maps.correlation(1.0, activation=activation, negative_slope=slope) == pytest.approx(
            1, abs=1e-14
        )
    assert maps.correlation(-1.0) == pytest.approx(0, abs=1e-15)
    branch_only = trajectory(1, residual=1e12, rho0=0.3).rho[1]
    assert branch_only == pytest.approx(maps.correlation(0.3), rel=1e-11)


@pytest.mark.parametrize("epsilon", [2.0, 1.0, 0.3, 0.1224, 0.1225, 1e-3, 1e-8, 1e-14, 1e-30])
def test_decrement_keeps_its_digits(epsilon: float) -> None:
    with mpmath.workdps(60):
        theta = mpmath.acos(1 - mpmath.mpf(epsilon))
        exact = (mpmath.sin(theta) - theta * mpmath.cos(theta)) / mpmath.pi
        assert abs(maps.gap_decrement(epsilon) / exact - 1) < 1e-15 * 5


def test_tanh_gap_keeps_its_digits() -> None:
    slope = maps.correlation_slope(1.0, activation="tanh")
    for epsilon in (1e-6, 1e-12, 1e-20):
        gap = epsilon - maps.gap_decrement(epsilon, activation="tanh")
        assert gap / epsilon == pytest.approx(slope, rel=3e-6)


PAPER = {  # m, v, m/v at infinite width
    0: (0, 1, 0),
    1: (0.564189583547756, 0.825645271176556, 0.683331696121481),
    2: (0.702660010389357, 0.711525761866447, 0.987539802559174),
    5: (0.857873155325212, 0.513861507969184, 1.669463740756896),
    10: (0.933560665421117, 0.358419424666803, 2.604659795682056),
    50: (0.993912443295357, 0.110172841765358, 9.021392453615336),
}


def test_values_of_the_paper() -> None:
    layers = trajectory(50)
    for layer, (m, v, ratio) in PAPER.items():
        assert layers.m[layer] == pytest.approx(m, rel=1e-14)
        assert layers.v[layer] == pytest.approx(v, rel=1e-14)
        assert layers.ratio[layer] == pytest.approx(ratio, rel=2e-14)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_accuracy_and_speed_at_100_000_layers(scale: float) -> None:
    """Against 40 digits; scale is the share of a residual branch."""
    residual = None if scale == 1 else scale / (1 - scale)
    started = time.process_time()
    layers = trajectory(100_000, residual=residual)
    assert time.process_time() - started < 1
    with mpmath.workdps(40):
        gap, worst = mpmath.mpf(1), mpmath.mpf(0)
        for found in layers.fraction.tolist():
            worst = max(worst, abs(found / gap - 1))
            theta = 2 * mpmath.asin(mpmath.sqrt(gap / 2))
            gap -= mpmath.mpf(scale) * (mpmath.sin(theta) - theta * mpmath.cos(theta)) / mpmath.pi
    assert worst < 1e-12


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1.0),
        ({"activation": "leaky_relu", "negative_slope": 0.3}, (1 + 0.09) ** 2 / 0.7**4),
        ({"residual": 0.5}, (1.5 / 0.5) ** 2),
        ({"residual": 0.5, "normalization": None, "rho0": 0.9}, (1.5 / 0.5) ** 2),
    ],
)
def test_asymptotic_law(options: dict[str, object], factor: float) -> None:
    layers = trajectory(200_000, **options)  # type: ignore[arg-type]
    assert layers.fraction[-1] * 200_000**2 / (9 * math.pi**2 / 2 * factor) == pytest.approx(
        1, rel=0.003
    )


def test_slow_approach_of_the_law() -> None:
    layers = trajectory(100_000)
    found = [
        layers.v2[depth] * depth**2 / (9 * math.pi**2 / 2)
        for depth in (10, 100, 1000, 10_000, 100_000)
    ]
    assert found == pytest.approx([0.289, 0.805, 0.9711, 0.99637, 0.999567], rel=1e-3)


def test_trajectory_is_the_iterated_map() -> None:
    for activation, slope in FAMILY:
        step = partial(maps.correlation, activation=activation, negative_slope=slope)
        rho = [0.2]
        for _ in range(20):
            rho.append(step(rho[-1]))
        found = trajectory(20, activation=activation, negative_slope=slope, rho0=0.2)
        np.testing.assert_allclose(found.rho, rho, rtol=1e-12)
    rho = [0.2]
    for _ in range(20):  # y + sqrt(beta) W phi(y)
        rho.append((rho[-1] + 0.3 * maps.correlation(rho[-1])) / 1.3)
    np.testing.assert_allclose(trajectory(20, residual=0.3, rho0=0.2).rho, rho, rtol=1e-13)


def test_normalization() -> None:
    batch = trajectory(5, normalization="batch", rho0=0.4)
    assert batch.m2[0] == pytest.approx(0.4)
    np.testing.assert_allclose(batch.m2[1:], 1 / math.pi, rtol=1e-14)
    np.testing.assert_allclose(batch.ratio[1:], 1 / math.sqrt(math.pi - 1), rtol=1e-14)
    np.testing.assert_array_equal(trajectory(9, normalization="layer").v2, trajectory(9).v2)
    both = trajectory(3, normalization="batch", residual=2.0)
    np.testing.assert_allclose(both.m2, 2 / math.pi * np.arange(4), rtol=1e-13)
    np.testing.assert_allclose(both.sigma2, [1, 3, 5, 7])


def test_residual_scale_may_be_infinite() -> None:
    layers = trajectory(5000, residual=1.0)
    assert np.isinf(layers.sigma2[-1])
    assert np.isfinite(layers.fraction).all()
    assert np.isfinite(layers.ratio).all()
    assert layers.fraction[-1] > 0
    linear = trajectory(5000, residual=1.0, activation="linear")
    np.testing.assert_array_equal([linear.m2[-1], linear.v2[-1]], [0, np.inf])
    equal = trajectory(5000, residual=1.0, rho0=1.0)
    np.testing.assert_array_equal([equal.m2[-1], equal.v2[-1]], [np.inf, 0])


@pytest.mark.parametrize("normalization", [None, "layer"])
def test_squares_of_residual_networks_are_absolute(normalization: str | None) -> None:
    """Against the recursion of m^2 and v^2 themselves, and against networks."""
    beta, depth = 0.5, 6
    layers = trajectory(depth, residual=beta, normalization=normalization)
    m2, v2 = [0.0], [1.0]
    for _ in range(depth):
        sigma2 = m2[-1] + v2[-1]
        branch = beta * (sigma2 if normalization is None else 1.0)
        passed = maps.correlation(m2[-1] / sigma2)
        m2.append(m2[-1] + branch * passed)
        v2.append(v2[-1] + branch * (1 - passed))
    for found, expected in ((layers.m2, m2), (layers.v2, v2)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(layers.fraction, layers.v2 / layers.sigma2, rtol=1e-14)
    np.testing.assert_allclose(layers.m2 + layers.v2, layers.sigma2, rtol=1e-14)
    np.testing.assert_allclose(layers.ratio, layers.m / layers.v, rtol=1e-14)
    np.testing.assert_allclose(layers.rho, layers.m2 / layers.sigma2, rtol=1e-14)
    record = simulate(
        200, depth, networks=40, samples=30, seed=0, residual=beta, normalization=normalization
    )
    for name in ("m2", "v2", "sigma2", "fraction"):
        error = 4 * record[name].std("network") / math.sqrt(40) + 0.02
        difference = record[name].mean("network") - getattr(layers, name)
        assert (abs(difference) < error).all()


def test_batchnorm_constants() -> None:
    assert maps.batchnorm_slope(0.0) == pytest.approx(1 / (2 * (1 - 1 / math.pi)), rel=1e-14)
    assert maps.batchnorm_slope(1.0) == pytest.approx(math.pi / (math.pi - 1), rel=1e-14)
    assert maps.batchnorm(0.5) == pytest.approx(
        (maps.correlation(0.5) - 1 / math.pi) / (1 - 1 / math.pi), rel=1e-14
    )
    growth = [maps.batchnorm_gradient_growth(batch) for batch in (8, 16, 32, 64, 128, None)]
    assert growth == pytest.approx([1.788, 1.590, 1.522, 1.493, 1.480, 1.467], abs=6e-4)
    assert [maps.batchnorm_correlation(b) for b in (8, 32, 128)] == pytest.approx(
        [0.2501, 0.3023, 0.3144], abs=6e-5
    )
    assert maps.batchnorm_gradient_growth(10**7) == pytest.approx(math.pi / (math.pi - 1), rel=1e-6)


def test_relu_product_by_adaptive_quadrature() -> None:
    value, _ = integrate.dblquad(
        lambda y, x: (
            x * y * math.exp(-(x * x - 1.2 * x * y + y * y) / (2 * 0.64)) / (2 * math.pi * 0.8)
        ),
        0,
        9,
        0,
        9,
    )
    assert maps.correlation(0.6) == pytest.approx(2 * value, abs=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trajectory(-1), ValueError, "depth must be at least 0, got -1"),
        (lambda: trajectory(2.5), TypeError, "depth must be an integer, got 2.5"),  # type: ignore[arg-type]
        (lambda: trajectory(True), TypeError, "depth must be an integer"),
        (lambda: trajectory(3, activation="geglu"), ValueError, r"activation must be one of"),
        (lambda: trajectory(3, negative_slope=0.1), ValueError, "negative_slope must be 0 unless"),
        (
            lambda: trajectory(3, activation="leaky_relu", negative_slope=math.nan),
            ValueError,
            "negative_slope must be",
        ),
        (lambda: trajectory(3, normalization="group"), ValueError, "normalization must be one of"),
        (lambda: trajectory(3, residual=0.0), ValueError, r"residual must be a finite number"),
        (lambda: trajectory(3, residual=-1.0), ValueError, "residual"),
        (lambda: trajectory(3, residual="1"), TypeError, "residual must be a real number, got '1'"),  # type: ignore[arg-type]
        (lambda: trajectory(3, rho0=1.1), ValueError, r"rho0 must be a finite number in \[-1"),
        (lambda: trajectory(3, rho0=math.nan), ValueError, "rho0"),
        (lambda: maps.correlation(2.0), ValueError, "rho must be a finite number"),
        (lambda: maps.correlation(None), TypeError, "rho must be a real number, got None"),  # type: ignore[arg-type]
        (lambda: maps.gap_decrement(-0.1), ValueError, "epsilon must be"),
        (lambda: maps.batchnorm_correlation(1), ValueError, "batch must be at least 2, got 1"),
        (lambda: maps.batchnorm_gradient_growth(3), ValueError, "batch must be at least 4, got 3"),
    ],
)  # fmt: skip
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
