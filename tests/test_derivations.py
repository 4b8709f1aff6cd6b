"""SymPy's derivations joined with the numbers and with sampling that shares no code with either."""

import doctest
import sys
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
from scipy import integrate, stats

from svlib.pairs import simulate_angles
from svlib.theory import finite_width, maps, plateau, trajectory

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
import derivations as symbolic


def test_decomposition_and_bias() -> None:
    assert symbolic.decomposition().difference == 0
    bias = symbolic.squared_mean_bias()
    assert bias.difference == 0
    m, v, inputs = sp.symbols("m v S", positive=True)
    assert sp.simplify(bias.left - m**2 - v**2 / inputs) == 0


def test_moments_by_quadrature() -> None:
    for power, symbol in zip((1, 2), symbolic.gaussian_relu_moments(), strict=True):
        number, _ = integrate.quad(lambda z, power=power: z**power * stats.norm.pdf(z), 0, 12)
        assert float(symbol) == pytest.approx(number, rel=1e-10)


def test_product_by_sampling() -> None:
    generator = np.random.default_rng(3)
    for theta in (0.3, 1.2, 2.5):
        z, w = generator.normal(size=(2, 400_000))
        products = np.maximum(z, 0) * np.maximum(np.cos(theta) * z + np.sin(theta) * w, 0)
        error = products.std() / np.sqrt(len(products))
        assert (
            abs(
                float(symbolic.gaussian_relu_product().subs(symbolic.theta, theta))
                - products.mean()
            )
            < 4 * error
        )


@pytest.mark.parametrize("rho", [-0.99, -0.5, 0.0, 0.5, 0.99])
def test_map_and_slope_equal_the_numbers(rho: float) -> None:
    assert float(symbolic.relu_map().subs(symbolic.rho, rho)) == pytest.approx(
        maps.correlation(rho), abs=1e-14
    )
    assert float(symbolic.relu_map_slope().subs(symbolic.rho, rho)) == pytest.approx(
        maps.correlation_slope(rho), abs=1e-14
    )


def test_fixed_point() -> None:
    fixed = symbolic.fixed_point()
    assert (fixed.value, fixed.slope) == (1, 1)
    assert all(fixed.curvature.subs(symbolic.rho, rho) > 0 for rho in (-0.9, 0, 0.9))
    assert all(maps.correlation(rho) > rho for rho in np.linspace(-1, 0.999, 50))


def test_expansion_of_the_gap() -> None:
    expansion = sp.lambdify(symbolic.epsilon, symbolic.gap_expansion(3))
    for epsilon, tolerance in ((1e-2, 1e-8), (1e-3, 1e-11)):
        assert expansion(epsilon) == pytest.approx(
            epsilon - maps.gap_decrement(epsilon), rel=tolerance
        )
    leading = symbolic.gap_expansion(1).coeff(symbolic.epsilon ** sp.Rational(3, 2))
    assert leading == -2 * sp.sqrt(2) / (3 * sp.pi)


def test_decay_constant_is_where_the_trajectory_goes() -> None:
    constant = symbolic.decay_constant()
    assert sp.simplify(constant - 9 * sp.pi**2 / 2) == 0
    assert trajectory(100_000).v2[-1] * 1e10 == pytest.approx(float(constant), rel=1e-3)


def test_batchnorm_constants() -> None:
    constants = symbolic.batchnorm()
    numbers = trajectory(1, normalization="batch")
    assert float(constants.m2) == pytest.approx(numbers.m2[1], rel=1e-14)
    assert float(constants.v2) == pytest.approx(numbers.v2[1], rel=1e-14)
    assert float(constants.ratio) == pytest.approx(numbers.ratio[1], rel=1e-14)
    assert float(constants.slope_at_0) == pytest.approx(maps.batchnorm_slope(0.0), rel=1e-14)
    assert float(constants.slope_at_1) == pytest.approx(maps.batchnorm_slope(1.0), rel=1e-14)
    z = np.random.default_rng(4).normal(size=1_000_000)
    relu = np.maximum(z, 0)
    assert relu.mean() ** 2 / (relu**2).mean() == pytest.approx(float(constants.m2), rel=5e-3)


def test_moments_of_jakub_and_nica() -> None:
    theta = symbolic.theta
    j22 = ((sp.pi - theta) * (2 * sp.cos(theta) ** 2 + 1) + 3 * sp.sin(theta) * sp.cos(theta)) / (
        2 * sp.pi
    )
    j31 = (
        3 * (sp.pi - theta) * sp.cos(theta) + sp.sin(theta) * sp.cos(theta) ** 2 + 2 * sp.sin(theta)
    ) / (2 * sp.pi)
    assert sp.simplify(symbolic.gaussian_relu_product(2, 2) - j22) == 0
    assert sp.simplify(symbolic.gaussian_relu_product(3, 1) - j31) == 0
    assert sp.simplify(symbolic.length_gain() - (sp.Rational(3, 2) - j22)) == 0
    with pytest.raises(ValueError, match="powers must be at least 1, got 0 and 1"):
        symbolic.gaussian_relu_product(0)


def test_length_gain_by_sampling() -> None:
    """The variance over networks of the log-ratio of two lengths after one wide layer."""
    record = simulate_angles(400, 1, angle=1.3, networks=20_000, seed=4)
    x = record.log_ratio[:, 1].values
    gain = float(symbolic.length_gain().subs(symbolic.theta, 1.3))
    assert abs(x.var() / 2 * 400 - gain) < 4 * gain * np.sqrt(2 / 20_000) + 0.02


def test_plateau_constant_from_the_series() -> None:
    """Partial sums with the series of the tail, from two layers, and the extrapolation."""
    law = finite_width(1, 1000)
    tail = sp.lambdify(symbolic.theta, symbolic.plateau_tail(3))
    angles = 2 * np.arcsin(np.sqrt(trajectory(1000).fraction[1:] / 2))
    sums = law.radial[1:] / law.m2[1:] + tail(angles)
    assert sums[999] == pytest.approx(plateau(), abs=1e-9)
    assert sums[499] == pytest.approx(plateau(), abs=2e-8)
    assert f"{plateau():.8f}" == "10.65054549"


def test_examples() -> None:
    assert doctest.testmod(symbolic).failed == 0
