"""Any activation: averages, trajectories and the edge of chaos against 30 digits and sampling."""

import math
from collections.abc import Callable
from functools import cache

import mpmath
import numpy as np
import pytest
import torch

import svlib as sv
from svlib import layers
from svlib.theory import edge_of_chaos, maps, trajectory
from svlib.theory.activations import NAMES, Function, named

mp = mpmath.mp.clone()
mp.dps = 34
ANALYTIC = {
    "tanh": mp.tanh,
    "erf": mp.erf,
    "sigmoid": lambda u: 1 / (1 + mp.exp(-u)),
    "gelu": lambda u: u * mp.ncdf(u),
    "gelu_tanh": lambda u: (
        u / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (u + mp.mpf("0.044715") * u**3)))
    ),
    "silu": lambda u: u / (1 + mp.exp(-u)),
    "softplus": lambda u: mp.log1p(mp.exp(u)),
    "mish": lambda u: u * mp.tanh(mp.log1p(mp.exp(u))),
    "sine": mp.sin,
}
BENT = ("elu", "selu", "hardtanh", "relu6")


@cache
def hermite(name: str, count: int = 300) -> list[mpmath.mpf]:
    """Squared coefficients of the activation in normalized Hermite polynomials: C(rho) is their
    power series. By the trapezoidal rule, which converges exponentially."""
    step = mp.mpf("0.05")
    nodes = [step * k for k in range(-280, 281)]
    values = [ANALYTIC[name](u) * mp.exp(-(u**2) / 2) * step / mp.sqrt(2 * mp.pi) for u in nodes]
    before, here = [mp.mpf(0)] * len(nodes), [mp.mpf(1)] * len(nodes)
    found = []
    for k in range(count):
        found.append(sum(v * h for v, h in zip(values, here, strict=True)) ** 2)
        root, less = mp.sqrt(k + 1), mp.sqrt(k)
        here, before = (
            [(u * h - less * b) / root for u, h, b in zip(nodes, here, before, strict=True)],
            here,
        )
    return found


def bent_gap(name: str) -> Callable[[mpmath.mpf], mpmath.mpf]:
    """1 - C(1 - gap) of an activation with kinks, from Price's theorem: the second derivative of
    <phi phi> to rho is <phi'' phi''>, closed where phi'' is a sum of jumps and exponentials."""
    root = mp.sqrt(2 * mp.pi)

    def integral(function: Callable[..., mpmath.mpf], gap: mpmath.mpf) -> mpmath.mpf:
        """Over r from 1 - gap to 1, of function(r - 1 + gap, r, sqrt(1 - r^2)); r = cos t takes the
        singularity at 1."""
        end = 2 * mp.asin(mp.sqrt(gap / 2))

        def along(t: mpmath.mpf) -> mpmath.mpf:
            above = 2 * mp.sin((end - t) / 2) * mp.sin((end + t) / 2)
            return function(above, mp.cos(t), mp.sin(t)) * mp.sin(t)

        return mp.quadgl(along, [mp.mpf(0), end])

    if name in ("hardtanh", "relu6"):
        low, high = (-1, 1) if name == "hardtanh" else (0, 6)
        inside = mp.ncdf(high) - mp.ncdf(low)
        middle = inside + low * mp.npdf(low) - high * mp.npdf(high)
        second = middle + low**2 * mp.ncdf(low) + high**2 * mp.ncdf(-high)

        def corners(above: mpmath.mpf, r: mpmath.mpf, s: mpmath.mpf) -> mpmath.mpf:
            same = mp.exp(-(low**2) / (1 + r)) + mp.exp(-(high**2) / (1 + r))
            both = 2 * mp.exp(-(low**2 + high**2 - 2 * r * low * high) / (2 * s**2))
            return above * (same - both) / (2 * mp.pi * s)

        return lambda gap: (gap * inside - integral(corners, gap)) / second
    alpha = mp.mpf("1.6732632423543772") if name == "selu" else mp.mpf(1)
    half = mp.exp(2) * mp.ncdf(-2)  # <e^(2u)> over u < 0
    slope = mp.mpf(1) / 2 + alpha**2 * half
    second = 1 / mp.mpf(2) + alpha**2 * (half - 2 * mp.exp(0.5) * mp.ncdf(-1) + 1 / mp.mpf(2))

    def side(s: mpmath.mpf) -> mpmath.mpf:  # <delta(u_1) e^(u_2)> over u_2 < 0
        return mp.exp(s**2 / 2) * mp.ncdf(-s) / root

    def smooth(above: mpmath.mpf, r: mpmath.mpf, s: mpmath.mpf) -> mpmath.mpf:
        return (above + mp.expm1(-above)) * (1 / (2 * mp.pi * s) - 2 * side(s))

    def jump(above: mpmath.mpf, r: mpmath.mpf, s: mpmath.mpf) -> mpmath.mpf:
        return above * (1 - alpha) * (2 * alpha * side(s) + (1 - alpha) / (2 * mp.pi * s))

    def gap_of(gap: mpmath.mpf) -> mpmath.mpf:
        # a(r) = <e^(u_1 + u_2)> over both negative: a' = a - 2 side + delta, a(1) = half
        a = half * (gap + mp.expm1(-gap)) - integral(smooth, gap)
        rest = integral(jump, gap) if alpha != 1 else 0
        return (gap * slope - alpha**2 * a - rest) / second

    return gap_of


@cache
def exact_gap(name: str) -> Callable[[mpmath.mpf], mpmath.mpf]:
    """1 - C(1 - gap) to 30 digits."""
    if name in BENT:
        return bent_gap(name)
    squares = hermite(name)
    total = sum(squares)

    def gap_of(gap: mpmath.mpf) -> mpmath.mpf:
        rho, lost, found = 1 - gap, mp.mpf(0), mp.mpf(0)
        for square in squares:
            found += square * lost
            lost = gap + rho * lost  # 1 - rho^k, without a difference
        return found / total

    return gap_of


@pytest.mark.parametrize("name", [*ANALYTIC, *BENT])
@pytest.mark.parametrize("gap", [1.9, 1.0, 0.3, 1e-3, 1e-8, 1e-12])
def test_gap_keeps_its_digits(name: str, gap: float) -> None:
    phi = named(name)
    found = phi.difference(1.0, gap) / phi.second_moment(1.0)
    assert found == pytest.approx(float(exact_gap(name)(mp.mpf(gap))), rel=1e-13)
    assert phi.decrement(gap) == pytest.approx(gap - found, rel=1e-13, abs=1e-16 * gap)


def worst(name: str, depths: list[int]) -> list[float]:
    """Relative errors of v^2/sigma^2 at these layers at He's rule, against 30 digits."""
    gap, gap_of = mp.mpf(1), exact_gap(name)
    exact: list[mpmath.mpf] = []
    while len(exact) < max(depths):
        before, gap = gap, gap_of(gap)
        exact.append(gap)
        if abs(gap / before - 1) < 1e-25:  # where it stays
            exact += [gap] * (max(depths) - len(exact))
    found = trajectory(max(depths), activation=name).fraction
    # float64 ends at 1e-308, where networks of sigmoid are after some 400 layers
    ends = [layer for layer in depths if exact[layer - 1] > 1e-290]
    assert all(found[layer] < 1e-280 for layer in depths if layer not in ends)
    return [abs(float(found[layer] / exact[layer - 1] - 1)) for layer in ends]


@pytest.mark.parametrize("name", [*ANALYTIC, *BENT])
def test_trajectory_keeps_its_digits(name: str) -> None:
    assert max(worst(name, [10, 100])) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ANALYTIC, *BENT])
def test_deep_trajectory_keeps_its_digits(name: str) -> None:
    errors = worst(name, [10, 100, 1000])
    print(f"{name:12}" + "".join(f"{error:10.1e}" for error in errors))
    assert max(errors) < 1e-10


def sampled(name: str, q: float) -> tuple[float, float]:
    """<phi^2> and <phi'^2> with torch's function and its gradient, by a fine trapezoidal rule whose
    points avoid the kinks."""
    u = (torch.arange(-400_000, 400_000, dtype=torch.float64) + 0.5) * 1e-4
    density = torch.exp(-(u**2) / (2 * q)) / math.sqrt(2 * math.pi * q) * 1e-4
    y = layers.activated(u.requires_grad_(), name)
    (slope,) = torch.autograd.grad(y.sum(), u)
    squares = (density * y.detach() ** 2).sum(), (density * slope.detach() ** 2).sum()
    return float(squares[0]), float(squares[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("q", [0.01, 1.0, 9.0])
def test_moments_equal_those_of_torch(name: str, q: float) -> None:
    phi = named(name)
    second, gradient = sampled(name, q)
    assert phi.second_moment(q) == pytest.approx(second, rel=1e-8)
    assert phi.gradient(q) == pytest.approx(gradient, rel=1e-7)


@pytest.mark.parametrize("name", [*ANALYTIC, *BENT, "relu"])
def test_gradients_correlate_as_the_map_is_steep(name: str) -> None:
    """C' = <phi' phi'>/<phi^2>, by differences of C."""
    for rho in (-0.5, 0.0, 0.7):
        above, below = (maps.correlation(rho + h, activation=name) for h in (1e-4, -1e-4))
        slope = maps.correlation_slope(rho, activation=name)
        assert slope == pytest.approx((above - below) / 2e-4, rel=1e-6)


def test_weights_and_biases_of_any_variance() -> None:
    """Closed forms: <erf erf> = (2/pi) arcsin(2c/(1 + 2q)), <sin sin> = exp(-q) sinh(c)."""
    closed = {
        "erf": lambda q, c: 2 / math.pi * math.asin(2 * c / (1 + 2 * q)),
        "sine": lambda q, c: math.exp(-q) * math.sinh(c),
    }
    for name, product in closed.items():
        q, c = 3.0, 0.6
        found = trajectory(
            6, activation=name, weight_variance=1.7, bias_variance=0.2, q0=q, rho0=c / q
        )
        for step in range(7):
            assert found.sigma2[step] == pytest.approx(q, rel=1e-13)
            assert found.m2[step] == pytest.approx(c, rel=1e-13)
            q, c = (1.7 * product(q, x) + 0.2 for x in (q, c))


def test_he_rule_with_biases_keeps_the_variance() -> None:
    for name in ("gelu", "relu", "tanh"):
        found = trajectory(40, activation=name, bias_variance=0.3)
        assert found.sigma2 == pytest.approx(np.ones(41), abs=1e-12), name


def test_biases_make_the_collapse_exponential() -> None:
    """epsilon' = (1 - b)(epsilon - ...) for ReLU; torch's own nn.Linear loses a factor near six."""
    found = trajectory(60, bias_variance=0.3).fraction
    for step in (10, 30, 50):
        expected = 0.7 * (found[step] - maps.gap_decrement(found[step]))
        assert found[step + 1] == pytest.approx(expected, rel=1e-12)
    # torch's weights and biases are uniform in +-1/sqrt(N), of variances 1/3N; layer 0 is its first
    # layer on white inputs
    q0, shared = 1 / 3 + 1 / 300, 1 / 300
    default = trajectory(
        11, weight_variance=1 / 3, bias_variance=1 / 300, q0=q0, rho0=shared / q0
    ).fraction
    assert default[11] / default[10] == pytest.approx(1 / 6, rel=0.01)
    torch.manual_seed(0)
    ratios = []
    for _ in range(10):
        linear = [torch.nn.Linear(100, 100, dtype=torch.float64) for _ in range(12)]
        y = torch.randn(40, 100, dtype=torch.float64)
        with torch.no_grad():
            y = linear[0](y)
            for layer in linear[1:]:
                y = layer(torch.relu(y))
        ratios.append(float(sv.decompose(y).v2 / sv.decompose(y).sigma2))
    mean, error = np.mean(ratios), np.std(ratios, ddof=1) / math.sqrt(10)
    assert abs(mean - default[11]) < 4 * error < 1e-7


def test_a_function_with_its_kinks_is_followed() -> None:
    followed: list[tuple[str, Function, tuple[float, ...]]] = [
        ("tanh", np.tanh, ()),
        ("relu6", lambda u: np.clip(u, 0, 6), (0, 6)),
        ("relu", lambda u: np.maximum(u, 0), (0,)),
    ]
    for name, function, kinks in followed:
        expected = trajectory(100, activation=name).fraction
        found = trajectory(100, activation=function, kinks=kinks).fraction
        assert found == pytest.approx(expected, rel=1e-10), name
    bent = trajectory(100, activation=lambda u: np.maximum(u, 0)).fraction  # the kink not named
    assert abs(bent[100] / trajectory(100).fraction[100] - 1) > 1e-10
    slope = named(np.tanh).gradient(0.8, 0.3)
    assert slope == pytest.approx(named("tanh").gradient(0.8, 0.3), rel=1e-6)


EDGES = [(name, 0.05) for name in (*ANALYTIC, *BENT) if name != "softplus"] + [("sigmoid", 0.0)]


@pytest.mark.parametrize(("name", "bias"), EDGES)
def test_edge_of_chaos(name: str, bias: float) -> None:
    """A fixed point where squared gradients are kept, and the law of the gap there."""
    edge = edge_of_chaos(name, bias)
    second, gradient = sampled(name, edge.q)
    assert edge.weight_variance * second + bias == pytest.approx(edge.q, rel=1e-6)
    assert edge.weight_variance * gradient == pytest.approx(1, rel=1e-6)
    assert edge.power == (2 if name in ("selu", "hardtanh", "relu6") else 1)
    start = 1e-9 if edge.power == 2 else 1e-5
    found = trajectory(
        40, activation=name, q0=edge.q, rho0=1 - start, bias_variance=bias,
        weight_variance=edge.weight_variance,
    ).fraction  # fmt: skip
    rate = edge.constant ** (-1 / edge.power)  # of epsilon^(-1/p) a layer
    roots = found ** (-1 / edge.power)
    assert (roots[40] - roots[0]) / 40 == pytest.approx(rate, rel=0.01)


def test_edge_of_chaos_in_closed_form() -> None:
    """Of sine q* and the weights are elementary; of ReLU the constant is the paper's."""
    edge = edge_of_chaos("sine", 0.05)
    assert edge.weight_variance == pytest.approx(2 / (1 + math.exp(-2 * edge.q)), rel=1e-12)
    # C''(1) = weights q <sin''^2>, and sin'' = -sin, whose mean square the fixed point knows
    assert edge.constant == pytest.approx(2 / edge.q / (edge.q - 0.05), rel=1e-5)
    assert edge_of_chaos("relu").constant == pytest.approx(4.5 * math.pi**2, rel=1e-9)
    leaky = edge_of_chaos("leaky_relu", negative_slope=0.3)
    assert leaky.constant == pytest.approx(4.5 * math.pi**2 * (1.09 / 0.49) ** 2, rel=1e-9)
    assert leaky.weight_variance == pytest.approx(2 / 1.09, rel=1e-12)


def test_edge_refuses_what_has_none() -> None:
    for name, bias, words in [
        ("tanh", 0.0, "bias_variance must be positive"),
        ("softplus", 0.05, "activation must have an edge of chaos"),
        ("relu", 0.05, "activation must bend"),
        ("linear", 0.0, "activation must bend"),
    ]:
        with pytest.raises(ValueError, match=words):
            edge_of_chaos(name, bias)
    with pytest.raises(ValueError, match="kinks must be empty unless"):
        trajectory(3, activation="relu6", kinks=[0.0])
    with pytest.raises(ValueError, match="bias_variance must be at most 1"):
        trajectory(3, bias_variance=1.5)


def test_softplus_deviates_from_infinite_width_as_the_inverse_width() -> None:
    """What chapter 7 says of its table: twice the deviation at half the width."""
    exact = trajectory(30, activation="softplus").fraction[30]
    excess, errors = [], []
    for width in (64, 128):
        record = sv.simulate(
            width,
            30,
            networks=800,
            samples=64,
            seed=17,
            activation="softplus",
            dtype="float64",
        )
        values = record.fraction[:, 30].values / exact
        excess.append(values.mean() - 1)
        errors.append(values.std(ddof=1) / 800**0.5)
    assert abs(excess[0] - 2 * excess[1]) < 4 * np.hypot(errors[0], 2 * errors[1])
    assert excess[1] > 6 * errors[1]
