"""The band: parts of the law by sampling, quadrature and networks; its constants and errors."""

import math
from functools import cache

import numpy as np
import pytest
from scipy.special import ndtr

import svlib as sv
from svlib.theory import band_plateau, finite_width, fluctuations, maps, trajectory
from svlib.theory.fluctuations import _layers, _noise
from svlib.theory.width import _moments


@pytest.mark.parametrize("rho", [0.05, 0.4, 0.9])
def test_noise_by_sampling(rho: float) -> None:
    """Products over inputs of one unit, instead of moments given what they share."""
    draws, generator = 400_000, np.random.default_rng(0)
    f = float(maps.correlation(rho))
    shared = math.sqrt(rho) * generator.normal(size=(1, draws))
    z = shared + math.sqrt(1 - rho) * generator.normal(size=(8, draws))
    on, y = math.sqrt(2) * (z > 0), math.sqrt(2) * np.maximum(z, 0)
    a, b, c, d = y[:4]
    s = float(4 * (1.5 - _j22(rho)))

    def h(i: int) -> np.ndarray:
        return np.asarray(y[i] * y[i + 1] - f * (y[i] ** 2 + y[i + 1] ** 2) / 2)

    def hat(i: int) -> np.ndarray:
        gap = (y[i] ** 2 - y[i + 1] ** 2) ** 2 / 2
        return np.asarray(gap - s * (y[i] ** 2 + y[i + 1] ** 2) + s)

    def omega(i: int) -> np.ndarray:
        """A difference of two inputs with a third."""
        by = (y[i] ** 2 - y[i + 1] ** 2) * (y[i] - y[i + 1]) / 2
        return np.asarray(by - s * y[i + 2] / 2)

    products = {
        "hh": h(0) * h(2),
        "h_s": h(0) * hat(2),
        "ss": hat(0) * hat(2),
        "s": hat(0) + s * (a**2 + b**2) - s,
        "a_tau": c * (a**2 - b**2) * (a - b) / 2,
        "omega": omega(0) * omega(3),
        "pair": ((a - b) ** 2 / 2) * ((c - d) ** 2 / 2),
        "own": (a * c - f / 2 * a**2 - b * c + f / 2 * b**2)
        * (a * d - f / 2 * a**2 - b * d + f / 2 * b**2)
        / 2,
        "u_length": a * b * on[2] / math.sqrt(2),
        "y_length": 3 * math.sqrt(2) * on[0] * b**2
        - on[0] * on[1] * c**2
        - math.sqrt(8) * a * b * on[2],
    }
    found = _noise(rho, f)._asdict()
    assert set(products) == set(found)
    for name, values in products.items():
        error = values.std() / math.sqrt(draws)
        assert abs(values.mean() - found[name]) < 4.5 * error, name
    # Price's theorem: the response to correlations is the average of derivatives
    low, high = (_moments(rho + step, 0) for step in (-1e-4, 1e-4))
    response = (high.aaab - high.aabc - low.aaab + low.aabc) / 2e-4
    assert response == pytest.approx(found["y_length"] - 4 * found["u_length"], rel=1e-5)


def _j22(rho: float) -> float:
    theta = math.acos(rho)
    return ((math.pi - theta) * (2 * rho**2 + 1) + 3 * math.sin(theta) * rho) / (2 * math.pi)


@cache
def halves(width: int, depth: int, networks: int, samples: int) -> np.ndarray:
    """u and R of networks from two halves of the inputs: (layer, quantity, half, network).

    Scalar products of activations alone, so that no unit of the layer itself is drawn.
    """
    generator = np.random.default_rng(width)
    found = np.zeros((depth, 2, 2, networks))
    for network in range(networks):
        product = np.eye(samples)
        for layer in range(depth):
            root = np.linalg.cholesky(product + 1e-9 * np.eye(samples))
            y = np.maximum(root @ generator.standard_normal((samples, width)), 0)
            product = 2 * y @ y.T / width
            length = product.diagonal()
            product /= length.mean()
            r = product / np.sqrt(np.outer(product.diagonal(), product.diagonal()))
            size = samples // 2
            for k in range(2):
                part = slice(k * size, (k + 1) * size)
                mean = (r[part, part].sum() - size) / (size * (size - 1))
                spread = np.log(length[part]).var(ddof=1) / 4
                found[layer, :, k, network] = mean, spread
    return found


@pytest.mark.slow
def test_parts_by_networks() -> None:
    """V, Q, Z by the covariance of halves, which share the network and not the inputs."""
    width, networks = 100, 1500
    found, law = halves(width, 20, networks, 64), _layers(20)
    for layer in (2, 5, 10, 20):
        (u1, u2), (r1, r2) = found[layer - 1] - found[layer - 1].mean(-1, keepdims=True)
        for power, values, expected in (
            (1, u1 * u2, law.V[layer]),
            (2, (u1 * r2 + u2 * r1) / 2, law.Q[layer]),
            (3, r1 * r2, law.Z[layer]),
        ):
            mean, error = (width**power * x for x in (values.mean(), values.std()))
            error /= math.sqrt(networks)
            # the next order: up to 40/N, of -Q at layers 2 and 5
            assert abs(mean - expected) < 4 * error + 40 / width * abs(expected)
            assert abs(mean) > 3 * error or layer < 10  # else 0 would pass, too


def by_other_means(depth: int) -> np.ndarray:
    """Z by layer: as printed in the appendix, with a trapezoidal rule in asinh of the kink."""
    gaps = trajectory(depth).fraction
    V, Q, Z, G, Y, D2, found = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, [0.0]
    for gap in gaps[:-1]:
        rho, own = 1 - gap, math.sqrt(gap)
        share, width = math.sqrt(rho), own / max(math.sqrt(rho), 0.1)
        s = np.linspace(-1, 1, 601) * math.asinh(10 / width)
        g = width * np.sinh(s)
        weight = np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi) * width * np.cosh(s) * (s[1] - s[0])
        t = share * g
        P, p = ndtr(t / own), own * np.exp(-((t / own) ** 2) / 2) / math.sqrt(2 * math.pi)
        A, B = math.sqrt(2) * (t * P + p), 2 * ((t**2 + gap) * P + t * p)
        third = math.sqrt(8) * ((t**3 + 3 * t * gap) * P + (t**2 + 2 * gap) * p)
        fourth = 4 * ((t**4 + 6 * t**2 * gap + 3 * gap**2) * P + (t**3 + 5 * t * gap) * p)
        tau, S, D = third - A * B, fourth - B**2, B - A**2
        theta = 2 * math.asin(math.sqrt(gap / 2))
        f = (math.sin(theta) + (math.pi - theta) * rho) / math.pi
        f1, f2 = 1 - theta / math.pi, 1 / (math.pi * math.sin(theta))
        mean = weight @ S
        h, hat, w = A**2 - f * B, S - 2 * mean * B + mean, tau - mean * A / 2
        response = weight @ (6 * P * B - 2 * B * P**2 - 4 * A**2 * P) - f1 * mean / 2
        V, Q, Z, G, Y, D2 = (
            f1**2 * V + weight @ h**2,
            f1 * (Q - 2 * f * V) + 4 * (weight @ (A**2 * P) - f**2) * G + weight @ (h * hat) / 4,
            Z - 4 * f * Q + 4 * f**2 * V + 2 * f * Y + 2 * f1 * G**2
            + 4 * (weight @ (A * tau) - mean * f) * G + 8 * f**2 * D2 + weight @ hat**2 / 16,
            f1 * G + weight @ (w * A),
            f1 * Y + f2 * G**2 + 2 * G * response + 8 * f * f1 * D2 + weight @ w**2,
            f1**2 * D2 + weight @ D**2,
        )  # fmt: skip
        found.append(Z)
    return np.array(found)


def test_constants_by_other_means() -> None:
    """Another rule, and a fit in 1/layer (the angle is 3 pi/l with logarithms)."""
    limit, ratio = band_plateau()
    layers, Z = np.array([600, 800, 1100, 1500, 2100, 3000]), by_other_means(3000)
    logs = np.log(layers)
    terms = [layers**0.0, 1 / layers, logs / layers**2, layers**-2.0, logs**2 / layers**3]
    fit = np.linalg.lstsq(np.stack(terms, 1), Z[layers], rcond=None)[0]
    assert fit[0] == pytest.approx(limit, abs=0.002)
    assert limit == pytest.approx(1034.4174, abs=1e-4)
    assert ratio == pytest.approx(0.462658, abs=5e-7)
    assert Z[:50] == pytest.approx(_layers(49).Z, rel=1e-9)


def test_layer_by_layer_values() -> None:
    """V, Q, Z as computed by code written apart from the library."""
    law = _layers(49)
    expected = {
        2: (0.0666, -0.091, 1.21), 5: (0.192, -0.36, 19.8), 10: (0.155, -0.86, 86.3),
        20: (0.065, -1.10, 238), 49: (0.0106, -0.65, 518),
    }  # fmt: skip
    for layer, values in expected.items():
        found = law.V[layer], law.Q[layer], law.Z[layer]
        assert found == pytest.approx(values, rel=1.2e-2)
    assert law.D2[1] == pytest.approx(1 - 2 / math.pi + 1 / math.pi**2)  # (1 - 1/pi)^2


@pytest.mark.parametrize("samples", [8, 40])
def test_law_against_networks(samples: int) -> None:
    """Within four standard errors and a next order that falls as 1/N (16/N of the deviation)."""
    width, networks = 150, 1000
    record = sv.simulate(width, 10, networks=networks, samples=samples, seed=7)
    law = fluctuations(width, 10, samples=samples)
    for layer in (3, 5, 10):
        for name in ("v2_over_m2", "ratio"):
            x = record[name][:, layer].values
            found = x.std(ddof=1)
            error = ((x - x.mean()) ** 2).std() / math.sqrt(networks) / (2 * found)
            assert abs(found - getattr(law, name)[layer]) < 4 * error + 25 / width * found
    infinite = fluctuations(width, 10)
    assert (law.v2_over_m2[1:] > infinite.v2_over_m2[1:]).all()


def test_limits_and_maximum() -> None:
    for width in (100,):
        law, limit = fluctuations(width, 3000), band_plateau()
        assert law.lengths[-1] * width**3 == pytest.approx(limit[0], rel=0.02)
        ends = law.ratio[-1] * (finite_width(width, 3000).ratio[-1] ** -3) * 2
        assert ends == pytest.approx(law.v2_over_m2[-1])
    at = [fluctuations(n, 300).ratio[1:] for n in (300, 1000, 3000, 10_000)]
    assert [int(x.argmax()) + 1 for x in at] == [43, 69, 115, 206]
    assert [float(x.max()) for x in at] == pytest.approx([0.469, 0.589, 0.736, 0.954], abs=1e-3)
    # sampling of S inputs: 2/S of the square at the plateau
    many, few = fluctuations(50, 2000), fluctuations(50, 2000, samples=101)
    mean = finite_width(50, 2000)
    share = few.sampling[-1] / (mean.v2[-1] / mean.m2[-1]) ** 2
    cv2 = many.lengths[-1] / (mean.v2[-1] / mean.m2[-1]) ** 2
    assert share == pytest.approx(0.02 * (1 + cv2), rel=0.02)
    assert np.isnan(many.ratio[0])
    assert not many.sampling.any()


def test_errors() -> None:
    with pytest.raises(ValueError, match="activation"):
        fluctuations(100, 5, activation="leaky_relu")
    with pytest.raises(ValueError, match="samples"):
        fluctuations(100, 5, samples=1)
    with pytest.raises(ValueError, match="width"):
        fluctuations(0, 5)
