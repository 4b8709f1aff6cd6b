"""Laws beyond the plain map: BatchNorm's drift, orthogonal weights, norms, depth, kernels."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import integrate

import svlib as sv
from svlib.theory import batchnorm, finite_width, limits, maps, plateau, trajectory
from svlib.theory.width import _moments, _odd


def relu_kernel(covariance: np.ndarray) -> np.ndarray:
    """<relu relu> of Gaussian preactivations, times 2."""
    lengths = np.sqrt(covariance.diagonal())
    rho = np.clip(covariance / np.outer(lengths, lengths), -1, 1)
    f = (np.sqrt(1 - rho**2) + rho * (math.pi - np.arccos(rho))) / math.pi
    np.fill_diagonal(f, 1)
    return np.asarray(np.outer(lengths, lengths) * f)


def test_batchnorm_of_a_batch_is_exact() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((6, 9)) * np.array([1, 1, 2, 3, 1, 0.5])[:, None]
    covariance = a @ a.T / 9
    y = np.linalg.cholesky(covariance) @ generator.standard_normal((6, 400_000))
    y = (y - y.mean(0)) / y.std(0)
    products = y[:, None] * y[None, :]
    mean, error = products.mean(2), products.std(2) / math.sqrt(400_000)
    found = batchnorm.normalized(covariance)
    assert (np.abs(found - mean) < 5 * error).all()
    assert found.trace() == pytest.approx(6, rel=1e-12)
    # two eigenvalues: <x^2/(x^2 + y^2)> of Gaussian x, y is their deviations' share
    basis, _ = np.linalg.qr(np.array([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]).T)
    two = basis @ np.diag([0.0, 1.0, 4.0]) @ basis.T
    assert np.linalg.eigvalsh(batchnorm.normalized(two)) == pytest.approx([0, 1, 2], abs=1e-12)
    # equal inputs: all correlations are -1/(B - 1), and ReLU takes them where the docs say
    equal = batchnorm.normalized(np.eye(7))
    assert equal == pytest.approx(np.eye(7) * 7 / 6 - 1 / 6, abs=1e-12)
    after = relu_kernel(equal)
    assert after[0, 1] / after[0, 0] == pytest.approx(maps.batchnorm_correlation(7), rel=1e-12)


def bump(size: int, height: float) -> np.ndarray:
    """How the length of one input of a batch, longer by so much, goes on for three layers."""
    stretch = np.append(np.ones(size - 1), math.sqrt(1 + height))
    before = relu_kernel(batchnorm.normalized(np.eye(size)))
    after, found = batchnorm.normalized(before * np.outer(stretch, stretch)), []
    for _ in range(3):
        found.append(after[-1, -1] - 1)
        after = batchnorm.normalized(relu_kernel(after))
    return np.array(found)


def test_constants_of_the_drift() -> None:
    """By differences of the exact map, extrapolated to a large batch, and by integrals."""
    h, found = 0.01, []
    for size in (400, 800):
        up, down, same = (bump(size, s * h) for s in (1, -1, 0))
        slopes, bends = (up - down) / (2 * h), (up + down - 2 * same) / (2 * h**2)
        found.append((size * (1 - slopes[2] / slopes[1]), bends[2] - bends[1]))
    (k, kappa), (k_large, kappa_large) = found
    assert 2 * k_large - k == pytest.approx(batchnorm.DAMPING, rel=0.003)
    assert 2 * kappa_large - kappa == pytest.approx(batchnorm.KAPPA, rel=0.005)

    def unit(power: int) -> float:  # centred, divided by its variance
        def integrand(z: float) -> float:
            centred = (max(z, 0) - 1 / math.sqrt(2 * math.pi)) ** 2 / (0.5 - 1 / (2 * math.pi))
            return float(centred**power * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))

        low, high = (integrate.quad(integrand, *ends)[0] for ends in ((-12, 0), (0, 12)))
        return float(low + high)

    assert unit(1) == pytest.approx(1, rel=1e-9)
    assert pytest.approx(unit(2) - 1, rel=1e-9) == batchnorm.TAU2
    assert pytest.approx(maps.batchnorm_slope(0.0), rel=1e-12) == batchnorm.SLOPE
    n = 1e6 / (batchnorm.KAPPA**2 * batchnorm.TAU2)
    assert batchnorm.onset(round(n)) == pytest.approx(
        (round(n) / batchnorm.KAPPA**2 / batchnorm.TAU2) ** (1 / 3), rel=1e-12
    )
    assert batchnorm.onset(8000) == pytest.approx(2 * batchnorm.onset(1000), rel=1e-12)


@pytest.mark.parametrize("samples", [64, None])
def test_first_order_of_the_drift(samples: int | None) -> None:
    """The sums in closed form, and what averages of functions of lengths and correlations give."""
    layer, width = 20, 500
    decay = 1 - batchnorm.DAMPING / samples if samples else 1 - 1e-9
    rho = -1 / (samples - 1) if samples else 0.0
    M = batchnorm.TAU2 / width * (1 - decay ** (2 * layer - 2)) / (1 - decay**2)
    slope = maps.batchnorm_slope(0.0)
    U = (1 - slope ** (2 * layer - 2)) / (1 - slope**2) / width
    # <sqrt(q)>^2 = 1 - M/4, <f> = f + f'' U/2
    h = 1e-3
    bend = (maps.correlation(h) + maps.correlation(-h) - 2 * maps.correlation(0.0)) / h**2
    expected = maps.correlation(rho) - maps.correlation(0.0) * M / 4 + bend * U / 2
    with warnings.catch_warnings(action="ignore"):
        law = finite_width(width, layer, normalization="batch", samples=samples)
    assert law.m2[layer] == pytest.approx(expected, rel=1e-6)
    assert law.radial[layer] == pytest.approx(M / 4 / math.pi, rel=1e-6)
    assert law.m2[0] == 0
    assert law.m2[1] == pytest.approx(maps.correlation(rho), rel=1e-12)


def test_drift_against_networks() -> None:
    """A batch that holds the lengths: the law; one that does not: the reduced model, and a word."""
    options = {"networks": 150, "normalization": "batch", "dtype": "float64", "seed": 4}
    held = sv.simulate(256, 10, samples=24, **options)  # type: ignore[arg-type]
    found, error = mean_and_error(held.m2[:, 10] / held.sigma2[:, 10])
    with warnings.catch_warnings(action="error"):
        law = finite_width(256, 10, normalization="batch", samples=24)
        finite_width(256, 200, normalization="batch", samples=24)
    assert abs(found - law.m2[10]) < 4 * error < 0.01
    options["networks"] = 40
    runs = sv.simulate(400, 40, samples=150, **options)  # type: ignore[arg-type]
    found, error = mean_and_error(runs.m2[:, 40] / runs.sigma2[:, 40])
    with pytest.warns(UserWarning, match="depth 40 is beyond the law's range, 19 layers at width"):
        law = finite_width(400, 40, normalization="batch", samples=150)
    model = batchnorm.random_lengths(400, 40, 150, networks=20, seed=0)[:, 40]
    assert law.m2[40] - found > 5 * error
    assert abs(model.mean() - found) < 4 * math.hypot(error, model.std() / math.sqrt(20))


def mean_and_error(values) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def test_orthogonal_weights() -> None:
    """The gain in lengths by regression: Gaussian units given all their products of two inputs."""
    assert plateau(weights="orthogonal") == pytest.approx(5.553688, abs=2e-6)
    generator, rho = np.random.default_rng(1), float(trajectory(3).rho[3])
    z = generator.standard_normal((2, 2_000_000))
    first, second = z[0], rho * z[0] + math.sqrt(1 - rho**2) * z[1]
    contrast = np.maximum(first, 0) ** 2 - np.maximum(second, 0) ** 2  # of squared lengths
    given = np.stack([first**2, second**2, first * second, np.ones_like(first)])
    left = contrast - np.linalg.lstsq(given.T, contrast, rcond=None)[0] @ given
    gain = left.var() / 2  # half of a quarter of the variance of the log-ratio, of mean square 1/2
    law = finite_width(1000, 4, weights="orthogonal")
    steps = np.diff(1000 * law.radial[1:] / law.m2[1:])
    assert steps[2] == pytest.approx(gain, rel=0.01)
    record = sv.simulate(
        96, 60, networks=300, samples=48, seed=2, weights="orthogonal", dtype="float64"
    )
    found, error = mean_and_error(record.v2_over_m2[:, 60].values)
    deep = finite_width(96, 60, weights="orthogonal")
    # at width 48, eight runs of 300 networks had (46 +- 2)/48^2 more than the law
    assert abs(found - deep.v2[60] / deep.m2[60]) < 4 * error + 46 / 96**2


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_units_take_the_plateau_away(kind: str) -> None:
    """ln(v^2/m^2) falls by 2/N a layer; what is left of lengths is one layer's."""
    record = sv.simulate(
        48, 80, networks=300, samples=24, seed=3, normalization=kind, dtype="float64"
    )
    logs = np.log(record.v2_over_m2.values[:, [40, 80]])
    found, error = mean_and_error((logs[:, 1] - logs[:, 0]) / 40)
    law = finite_width(48, 80, normalization=kind)
    change = np.log(law.v2[1:] / law.m2[1:])
    expected = (change[79] - change[39]) / 40
    assert abs(found - expected) < 4 * error < 0.02
    # far down only the exact law of vanishing angles is left
    deep = finite_width(100, 3000, normalization=kind)
    last = math.log(deep.v2[3000] / deep.v2[2999])
    assert last == pytest.approx(float(sv.theory.angles.vanishing_angle(100).mean), rel=1e-3)
    # layer 1: inputs independent, y|y| has variance 3 and no covariance
    first = finite_width(100, 1, normalization=kind)
    assert first.radial[1] / first.m2[1] == pytest.approx(3 / 4 / 100, rel=1e-9)
    # at any layer: the gain without a norm, less that of y^2, whose sum is fixed
    for rho in (0.2, 0.9):
        gain = (6 - _moments(rho, 0.0).aabb) / 4 - (1 - rho**2) / 2
        assert _odd(1 - rho) / 2 == pytest.approx(gain, rel=1e-10)


def test_first_weight_matrix() -> None:
    """White noise in 20 dimensions: lengths and angles of layer 0 fluctuate."""
    generator, ratios = torch.Generator().manual_seed(0), []
    for seed in range(16):  # other inputs have other lengths
        inputs = torch.randn(200, 20, generator=generator)
        record = sv.simulate(400, 5, networks=100, inputs=inputs, seed=seed)
        ratios.append(float(record.v2_over_m2[:, 5].mean()))
    found, error = mean_and_error(np.array(ratios))
    law, without = finite_width(400, 5, features=20), finite_width(400, 5, input_cv2=1 / 40)
    ours, other = law.v2[5] / law.m2[5], without.v2[5] / without.m2[5]
    assert abs(found - ours) < 3 * error < abs(ours - other)
    assert finite_width(50, 3, features=10**12).v2[3] == pytest.approx(finite_width(50, 3).v2[3])
    # layer 1 of a wide network, to first order in 1/n: what lengths take from m^2/sigma^2 = 1/pi,
    # <sqrt q>^2 = 1 - 1/2n, the angles give back, f''(0)/2n = 1/(2 pi n)
    wide = finite_width(10**12, 1, features=100)
    assert wide.v2[1] / wide.m2[1] == pytest.approx(math.pi - 1, abs=1e-9)


def test_scaling_with_depth_keeps_the_variance() -> None:
    """Two families that share a limit; errors halve with the depth."""
    for time in (0.5, 2.0):
        found = []
        for depth in (4000, 16000):
            bent = trajectory(
                depth, activation="leaky_relu", negative_slope=1 - math.sqrt(2 * time / depth)
            )
            residual = trajectory(depth, residual=time / depth)
            found.append((bent.fraction[depth], residual.fraction[depth]))
        limit = limits.shaped(time)
        for near, far in zip(*reversed(found), strict=True):
            assert abs(near - limit) < 0.6 * abs(far - limit) + 1e-9
        assert found[1][0] == pytest.approx(limit, rel=0.01)
        assert found[1][1] == pytest.approx(limit, rel=1e-3)
    assert limits.shaped(0.0, 0.3) == 0.7


def test_exact_course_of_the_decay() -> None:
    assert limits.intercept() == pytest.approx(4.390, abs=0.002)
    rate, layer = math.sqrt(2) / (3 * math.pi), 1000
    series = rate * (layer + 1.5 * math.log(layer) + 4.390)
    assert 1 / trajectory(layer).v[layer] == pytest.approx(series, rel=2e-5)


def test_tangent_kernel_of_networks() -> None:
    """Gradients of one output by all weights, two inputs at a right angle, five weight matrices."""
    torch.manual_seed(3)
    width, depth, ratios = 256, 4, []
    for _ in range(40):
        weights = [torch.randn(width, width, dtype=torch.float64) for _ in range(depth)]
        weights = [w.requires_grad_() for w in [*weights, torch.randn(1, width).double()]]
        rows = []
        for axis in (0, 1):
            y = torch.zeros(width, dtype=torch.float64)
            y[axis] = math.sqrt(width)
            y = weights[0] @ y / math.sqrt(width)
            for w in weights[1:]:
                y = w @ torch.relu(y) * math.sqrt(2 / width)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(y.sum(), weights)]))
        kernel = torch.stack(rows) @ torch.stack(rows).T
        ratios.append(float(2 * kernel[0, 1] / kernel.trace()))
    mean, error = mean_and_error(np.array(ratios))
    assert abs(mean - limits.tangent_kernel(depth)[depth]) < 4 * error < 0.05
    assert limits.tangent_kernel(50)[50] == pytest.approx(0.2867, abs=5e-5)
    exact = 0.0
    for rho in trajectory(30).rho[:30]:
        exact = maps.correlation(rho) + (1 - math.acos(rho) / math.pi) * exact
    assert limits.tangent_kernel(30)[30] == pytest.approx(exact / 31, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "group"}, "normalization must be one of"),
        ({"normalization": "rms", "negative_slope": 0.5, "activation": "leaky_relu"}, "plain ReLU"),
        ({"normalization": "rms", "samples": 5}, "samples must be None unless"),
        ({"samples": 5}, "samples must be None without"),
        ({"weights": "sparse"}, "weights must be one of"),
        ({"features": 0}, "features must be at least 1"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finite_width(10, 5, **options)  # type: ignore[arg-type]
