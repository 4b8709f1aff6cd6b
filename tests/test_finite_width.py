"""The first order in 1/width: averages in closed form and sampled, the sum against networks."""

import math

import mpmath
import numpy as np
import pytest

import svlib as sv
from svlib.theory import angles, finite_width, maps, plateau, trajectory
from svlib.theory.width import _covariances, _moments


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6])
def test_averages_by_closed_form(rho: float) -> None:
    """Jakub & Nica (2023), J22 and J31; the correlation map."""
    theta = math.acos(rho)
    j22 = ((math.pi - theta) * (2 * rho**2 + 1) + 3 * math.sin(theta) * rho) / (2 * math.pi)
    j31 = (3 * (math.pi - theta) * rho + math.sin(theta) * rho**2 + 2 * math.sin(theta)) / (
        2 * math.pi
    )
    found = _moments(rho, 0.0)
    np.testing.assert_allclose(
        [found.aabb, found.aaab, found.aaaa], [4 * j22, 4 * j31, 6], rtol=1e-12
    )
    for slope in (0.0, 0.3, -0.5, 1.0):
        expected = maps.correlation(rho, activation="leaky_relu", negative_slope=slope)
        assert _moments(rho, slope).ab == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_averages_by_sampling(slope: float) -> None:
    rho, draws = 0.4, 400_000
    generator = np.random.default_rng(0)
    z = math.sqrt(rho) * generator.normal(size=(1, draws)) + math.sqrt(1 - rho) * generator.normal(
        size=(4, draws)
    )
    a, b, c, d = np.where(z > 0, z, slope * z) / math.sqrt((1 + slope**2) / 2)
    found = _moments(rho, slope)
    for values, expected in (
        (a**4, found.aaaa), (a**2 * b**2, found.aabb), (a**3 * b, found.aaab),
        (a**2 * b * c, found.aabc), (a * b * c * d, found.abcd), (a * b, found.ab),
    ):  # fmt: skip
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(draws)


def test_linear_networks_by_hand() -> None:
    """For a linear network all averages follow from Wick's theorem."""
    found = _moments(0.3, 1.0)
    expected = [3, 1 + 2 * 0.09, 0.9, 0.3 + 2 * 0.09, 3 * 0.09]
    np.testing.assert_allclose(
        [found.aaaa, found.aabb, found.aaab, found.aabc, found.abcd], expected, rtol=1e-12
    )


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.9])
def test_noise_of_orthogonal_weights_by_regression(rho: float) -> None:
    """Gaussian units, products of two activations less their regression on those of two units."""
    generator, draws = np.random.default_rng(3), 400_000
    z = math.sqrt(rho) * generator.normal(size=(1, draws))
    z = z + math.sqrt(1 - rho) * generator.normal(size=(4, draws))
    given = np.stack([np.ones(draws), *(z[i] * z[j] for i in range(4) for j in range(i, 4))])
    a, b, c, d = math.sqrt(2) * np.maximum(z, 0)
    products = np.stack([a * a, b * b, a * b, b * c, c * d])
    aa, bb, ab, bc, cd = products - np.linalg.lstsq(given.T, products.T)[0].T @ given
    f, first = float(maps.correlation(rho)), float(maps.correlation_slope(rho))
    found = _covariances(rho, f, first, 0.0, "orthogonal")
    pairs = (aa * aa, aa * bb, aa * ab, aa * bc, ab * cd, ab * ab)
    for values, expected in zip(pairs, found, strict=True):
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(draws)


@pytest.mark.parametrize("rho", [0.1, 0.4, 0.9])
def test_projection_of_orthogonal_weights_by_quadrature(rho: float) -> None:
    """The regression on products of two of four units, of what an angle's integral gives."""
    theta, pairs = math.acos(rho), [(i, j) for i in range(4) for j in range(i, 4)]
    kinks = np.sort(np.array([-math.pi, -math.pi / 2, theta - math.pi / 2, math.pi / 2, math.pi]))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    half = np.diff(kinks)[:, None] / 2
    angle = (half * nodes + kinks[:-1, None] + half).ravel()
    units = np.stack([np.cos(angle), np.cos(angle - theta)])
    density = (half * weights).ravel() / (2 * math.pi)
    relu = np.maximum(units, 0)
    covariance = np.full((4, 4), rho) + (1 - rho) * np.eye(4)
    gram = np.array([
        [covariance[i, k] * covariance[j, m] + covariance[i, m] * covariance[j, k]
         for k, m in pairs]
        for i, j in pairs
    ])  # fmt: skip

    def coefficients(a: int, b: int) -> np.ndarray:
        """Of the regression of 2 relu(z_a) relu(z_b), on products of z_a and z_b alone."""
        one = [(a, a), (a, b), (b, b)] if a != b else [(a, a)]
        unit = {a: units[0], b: units[0] if a == b else units[1]}
        product = 2 * relu[0] * (relu[0] if a == b else relu[1]) * density
        # <r^4> = 8, <r^2> = 2
        moments = [
            8 * (product * unit[i] * unit[j]).sum() - 2 * product.sum() * covariance[i, j]
            for i, j in one
        ]
        at = [pairs.index((min(pair), max(pair))) for pair in one]
        found = np.zeros(len(pairs))
        found[at] = np.linalg.solve(gram[np.ix_(at, at)], moments)
        return found

    f, first = float(maps.correlation(rho)), float(maps.correlation_slope(rho))
    drawn, kept = (_covariances(rho, f, first, 0.0, kind) for kind in ("gaussian", "orthogonal"))
    of = [((0, 0), (0, 0)), ((0, 0), (1, 1)), ((0, 0), (0, 1)), ((0, 0), (1, 2)), ((0, 1), (2, 3)),
          ((0, 1), (0, 1))]  # fmt: skip
    expected = [coefficients(*x) @ gram @ coefficients(*y) for x, y in of]
    np.testing.assert_allclose(np.subtract(drawn, kept), expected, rtol=1e-10)


CASES = [
    (128, {}),
    (100, {"activation": "leaky_relu", "negative_slope": 0.3}),
    # white noise, which orthogonal weights keep, is that behind a first matrix
    (128, {"weights": "orthogonal", "features": 128}),
]


@pytest.mark.parametrize(("width", "options"), CASES, ids=str)
def test_law_against_networks(width: int, options: dict[str, object]) -> None:
    """To four standard errors and a second order of 20/N^2; the remainder alone is larger."""
    drawn = {name: x for name, x in options.items() if name != "features"}
    networks = 800 if drawn.get("weights") else 3000
    record = sv.simulate(width, 10, networks=networks, samples=48, seed=2, **drawn)  # type: ignore[arg-type]
    law = finite_width(width, 10, **options)  # type: ignore[arg-type]
    found = sv.summarize(record).v2_over_m2
    for layer in (2, 5, 10):
        mean, error = (float(found.sel(layer=layer, statistic=name)) for name in ("mean", "error"))
        whole, remainder = law.v2[layer] / law.m2[layer], law.remainder[layer] / law.m2[layer]
        assert abs(mean - whole) < 4 * error + 20 / width**2
        if not options and layer == 5:
            assert abs(mean - (whole - remainder)) > 4 * error + 20 / width**2


def test_given_norms_and_correlation() -> None:
    """Inputs of two lengths at one angle: the spread of norms rules."""
    shared, own = np.eye(33)[:1], np.eye(33)[1:]
    lengths = np.where(np.arange(32) % 2, 1.0, 2.0)[:, None]
    inputs = lengths * (math.sqrt(0.6) * shared + math.sqrt(0.4) * own)
    cv2 = float(lengths.var(ddof=1) / lengths.mean() ** 2)
    record = sv.simulate(300, 20, networks=400, inputs=inputs, seed=1)
    law = finite_width(300, 20, rho0=0.6, input_cv2=cv2)
    found = sv.summarize(record).v2_over_m2.sel(layer=20)
    assert (
        abs(float(found.sel(statistic="mean")) - law.v2[20] / law.m2[20])
        < 4 * float(found.sel(statistic="error")) + 0.002
    )


def test_infinite_width_is_the_limit() -> None:
    wide, limit = finite_width(10**9, 30), trajectory(30)
    np.testing.assert_allclose(wide.m2, limit.m2, rtol=1e-6)
    assert finite_width(50, 30).m2[0] == 0
    assert finite_width(50, 0, rho0=0.5, input_cv2=1.0).m2[0] == pytest.approx(0.25)


def test_parts_are_absolute_and_sum_to_v2() -> None:
    """As in a record; over m2 they are the terms of the formula."""
    law, gap = finite_width(50, 30, input_cv2=0.1), trajectory(30).fraction
    np.testing.assert_array_equal(law.sigma2, 1)
    np.testing.assert_array_equal(law.v2, law.angular + law.radial + law.remainder)
    np.testing.assert_array_equal(law.v2, law.fraction)
    np.testing.assert_allclose(law.m2 + law.v2, 1, rtol=1e-15)
    over = law.angular[1:] / law.m2[1:]
    np.testing.assert_allclose(over, gap[1:] / (1 - gap[1:]), rtol=1e-10)
    # the first step of the walk of lengths, from independent inputs: 3/2 - J22 = 5/4
    assert law.radial[1] / law.m2[1] == pytest.approx(0.1 + 1.25 / 50)
    with np.errstate(all="raise"):  # at layer 0 all of m2 is missing, and nothing is divided by it
        assert finite_width(50, 1, input_cv2=0.1).fraction[0] == pytest.approx(1)


@pytest.mark.parametrize("width", [128, 256])
def test_angle_steps_against_networks(width: int) -> None:
    """Mean and variance of one step: expansions to O(1/n^2), vanishing angles exactly."""
    for theta, law in (
        (0.5, angles.expansion(0.5, width)),
        (1e-5, angles.vanishing_angle(width)),
        (0.05, angles.small_angle(0.05, width)),
    ):
        steps = (
            sv.simulate_angles(width, 1, angle=theta, networks=20_000, seed=1).ln_sin2[:, 1].values
        )
        mean = law.mean + (math.log(math.sin(theta) ** 2) if theta == 1e-5 else 0)
        error = steps.std() / math.sqrt(20_000)
        second_order = (
            0 if theta == 1e-5 else 60 / width**2 + (0.1 * theta**2 if theta == 0.05 else 0)
        )
        assert abs(steps.mean() - mean) < 4 * error + second_order
        assert abs(steps.var() / law.variance - 1) < 4 * math.sqrt(3 / 20_000) + 16 * second_order


def test_expansion_in_forty_digits() -> None:
    for theta in (2.0, 0.1, 0.004, 1e-5):
        with mpmath.workdps(40):
            t, n = mpmath.mpf(theta), 32
            s, c, pi = mpmath.sin(t), mpmath.cos(t), mpmath.pi
            j11 = (s + (pi - t) * c) / (2 * pi)
            j22 = ((pi - t) * (2 * c**2 + 1) + 3 * s * c) / (2 * pi)
            j31 = (3 * (pi - t) * c + s * c**2 + 2 * s) / (2 * pi)
            a = 8 * j11**2 * j22 - 8 * j11**4 + 4 * j11**2 - 8 * j11 * j31 + j22 + 1
            b, d = 1 - 4 * j11**2, 4 * j22 - 1 + n
            mean = (
                mpmath.log((n - 1) * b / d)
                + 4 * (j22 + 1) * n / d**2
                - 4 * a * n / (n - 1) ** 2 / b**2
            )
            variance = 8 * n * (j22 + 1) / d**2 + 8 * n * a / (n - 1) ** 2 / b**2
            variance -= 16 * n * (2 * j11**2 - 4 * j11 * j31 + j22 + 1) / (d * (n - 1) * b)
        found = angles.expansion(theta, 32)
        np.testing.assert_allclose(
            [found.mean, found.variance], [float(mean), float(variance)], atol=1e-5
        )


def test_small_angles_are_the_limit_of_the_expansion() -> None:
    for width in (32, 1000):
        for theta in (1e-3, 1e-6):
            whole, small = angles.expansion(theta, width), angles.small_angle(theta, width)
            assert whole.mean == pytest.approx(float(small.mean), abs=0.1 * theta)
            assert whole.variance == pytest.approx(float(small.variance), abs=theta + 12 / width**2)
    with pytest.raises(ValueError, match=r"theta must be angles in \(0, pi\), got 0"):
        angles.expansion(0, 32)
    with pytest.raises(ValueError, match="width must be at least 2, got 1"):
        angles.vanishing_angle(1)


def test_exact_law_of_vanishing_angles_at_six_units() -> None:
    """Two active units count: 15 of 57 cases with an angle left."""
    steps = np.diff(
        sv.simulate_angles(6, 1, angle=1e-6, networks=40_000, seed=0).ln_sin2.values, axis=1
    )
    steps = steps[np.isfinite(steps)]
    law = angles.vanishing_angle(6)
    assert abs(steps.mean() - law.mean) < 4 * steps.std() / math.sqrt(len(steps))
    fourth = ((steps - steps.mean()) ** 4).mean()
    assert abs(steps.var() - law.variance) < 4 * math.sqrt((fourth - law.variance**2) / len(steps))


def test_leaky_plateau() -> None:
    assert plateau(activation="leaky_relu", negative_slope=0.0) == pytest.approx(
        plateau(), rel=1e-12
    )
    law = finite_width(1, 4000, activation="leaky_relu", negative_slope=0.2)
    collected = law.radial[4000] / law.m2[4000]
    assert collected < plateau(activation="leaky_relu", negative_slope=0.2) < collected * 1.02


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"rho0": 1.0}, ValueError, r"rho0 must be below 1"),
        ({"rho0": -0.1}, ValueError, r"rho0 must be a finite number in \[0, 1\], got -0\.1"),
        ({"input_cv2": -1.0}, ValueError, "input_cv2 must be a finite number"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"negative_slope": 0.2}, ValueError, "negative_slope must be 0 unless"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        finite_width(**({"width": 8, "depth": 2} | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative_slope must be outside"):
        plateau(activation="leaky_relu", negative_slope=0.9)
