"""Theory along a model's calls against closed forms and measurements, and the diagnosis against
models made to be ill."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from svlib.probing import operations as ops
from svlib.probing.along import Signal, follow, gradient_growth
from svlib.probing.calls import Call
from tests import models
from tests.models import gaussian

WIDTH = 1200


def kinds(model: nn.Module, batch: object) -> dict[str, str]:
    return {finding.kind: str(finding) for finding in sv.explain(model, batch).findings}


def wide(*layers: nn.Module, variance: float = 2 / WIDTH) -> nn.Sequential:
    model, generator = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, variance**0.5, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def agree(explanation: sv.Explanation) -> None:
    """Within three deviations of one network: sigma^2 has relative variance 5 l / N at layer l."""
    expected, found = explanation.theory, explanation.table
    spread = np.sqrt(5 * np.arange(1, len(found) + 1) / WIDTH)
    assert (np.abs(expected.sigma2 / found.sigma2 - 1) < 3 * spread).all()
    np.testing.assert_allclose(expected.fraction, found.fraction, atol=0.04)


def test_theory_of_a_relu_network_is_the_trajectory() -> None:
    model = sv.networks.mlp(100, width=50, depth=20, outputs=50, seed=0)
    theory = sv.explain(model, gaussian(40, 100)).theory
    assert theory.start.tolist() == ["input"] + [""] * 19
    expected = sv.theory.trajectory(19, rho0=float(theory.m2[0] / theory.sigma2[0]))
    np.testing.assert_allclose(theory.fraction, expected.v2, rtol=1e-5)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.LeakyReLU(0.2),
        nn.ReLU(inplace=True),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(),
        nn.ELU(),
        nn.Softplus(),
        nn.Tanh(),
        nn.Hardtanh(),
        nn.Mish(),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "norm",
    [nn.Identity(), nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH)],
    ids=lambda x: type(x).__name__,
)
def test_theory_meets_a_wide_network(activation: nn.Module, norm: nn.Module) -> None:
    """Of scale, too: He's weights are too large for a leaky ReLU, and biases add up."""
    model = wide(
        nn.Linear(WIDTH, WIDTH),
        *(part for _ in range(3) for part in (norm, activation, nn.Linear(WIDTH, WIDTH))),
    )
    generator = torch.Generator().manual_seed(1)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, 0.0, 0.3, generator=generator)
    explanation = sv.explain(model, gaussian(100, WIDTH, seed=9))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = wide(*(nn.Linear(WIDTH, WIDTH) for _ in range(7)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers[0](x)
        for k in (1, 4):
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)  # RMSNorm, by hand
            y = self.layers[k + 2](F.silu(self.layers[k](y)) * self.layers[k + 1](y))
        return y


def test_theory_of_gated_units() -> None:
    """As in Llama: the gate and the value have weights of their own, and are independent."""
    explanation = sv.explain(Gated(), gaussian(100, WIDTH, seed=9))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)
    slanted = Between(lambda y: F.silu(y) * y)  # of itself
    assert "mul of dependent signals" in set(sv.explain(slanted, gaussian(50, WIDTH)).theory.start)


def test_parameters_of_activations_are_read() -> None:
    for between in (nn.ELU(0.5), nn.Softplus(beta=2.0), nn.Hardtanh(-2, 2)):
        start = sv.explain(Between(between), gaussian(50, WIDTH)).theory.start
        assert start.iloc[-1] == type(between).__name__.lower()


def test_theory_of_a_norm_behind_the_activation() -> None:
    """It takes away the mean over units that ReLU has made, as well as the scale."""
    block = (nn.ReLU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    model = wide(nn.Linear(WIDTH, WIDTH), *(part for _ in range(3) for part in block))
    explanation = sv.explain(model, gaussian(100, WIDTH, seed=9))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)
    assert explanation.theory.fraction[1] > 0.9  # 0.68 without the norm


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = wide(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self.layers
        y: torch.Tensor = first(x)
        for layer in rest:
            y += 0.5 * layer(torch.relu(y))
        return y


def test_theory_of_residual_sums() -> None:
    explanation = sv.explain(Sums(), gaussian(100, WIDTH, seed=9))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)
    trunk = sv.theory.trajectory(2, residual=0.25).rho[2]  # the last branch has C of it
    assert explanation.theory.fraction[3] == pytest.approx(
        1 - sv.theory.maps.correlation(float(trunk)), abs=0.005
    )


class Dependent(nn.Module):
    """y + relu(y) in one block, and y + W relu(y) in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = wide(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = y + self.branch(torch.relu(y))
        y = y + torch.relu(y)
        return self.last(y)


def test_dependent_signals_are_no_sum_of_independent_ones() -> None:
    explanation = sv.explain(Dependent(), gaussian(50, WIDTH))
    assert explanation.theory.start.tolist() == ["input", "", "add of dependent signals"]


SIGNAL = Signal(3.0, 1.0, 0.0)
BEHIND_RELU = Signal(3.0, 1.0, 0.5)
SHIFT = ops.Constant(1.0, 0.2)
FOUR = ops.Constant(4.0, 4.0)
BIASED = ops.Weights(2.0, ops.Constant(0.5, 0.1))


@pytest.mark.parametrize(
    ("operation", "before", "expected"),
    [
        (BIASED, [SIGNAL], (6.5, 2.5, 0.1)),
        (replace(BIASED, phases=4.0), [SIGNAL], (6.5, 1.0, 0.1)),
        (ops.Normalize("batch_norm", 4.0, SHIFT), [SIGNAL], (5.0, 1.0, 0.2)),
        (ops.Affine(2.0, SHIFT), [SIGNAL], (7.0, 3.0, 0.2)),
        (ops.Normalize("layer_norm", 4.0), [SIGNAL], (4.0, 4 / 3, 0.0)),
        (ops.Normalize("layer_norm", 4.0, eps=1.0), [SIGNAL], (3.0, 1.0, 0.0)),
        (ops.Dropout(0.5), [SIGNAL], (6.0, 1.0, 0.0)),
        (ops.Affine(4.0), [SIGNAL], (12.0, 4.0, 0.0)),
        (ops.Affine(shift=FOUR), [SIGNAL], (7.0, 5.0, 4.0)),
        (ops.Move(), [SIGNAL], SIGNAL),
        (ops.Relu(1.0), [SIGNAL], SIGNAL),
        (ops.Normalize("layer_norm"), [BEHIND_RELU], (1.0, 0.2, 0.0)),
        (ops.Normalize("rms_norm"), [BEHIND_RELU], (1.0, 1 / 3, 1 / 6)),
        (ops.Relu(), [Signal(2.0, 0.0, 0.0)], (1.0, 1 / math.pi, 1 / math.pi)),
        (ops.Sum(), [SIGNAL, Signal(1.0, 0.5, 0.2)], (4.0, 1.5, 0.2)),
        (ops.Product(), [SIGNAL, Signal(2.0, 0.5, 0.2)], (6.0, 0.5, 0.0)),
        # <erf erf> = (2/pi) arcsin(2r/(1 + 2q)); <silu> is a half of <u tanh(u/2)>
        (
            ops.Activate("erf"),
            [SIGNAL],
            (2 / math.pi * math.asin(6 / 7), 2 / math.pi * math.asin(2 / 7), 0.0),
        ),
        (
            ops.Activate("relu6"),
            [Signal(0.01, 0.0, 0.0)],
            (0.005, 0.005 / math.pi, 0.005 / math.pi),
        ),
        (ops.Measured(2.0, 1.0, 0.5), [], (2.0, 1.0, 0.5)),
    ],
    ids=str,
)
def test_theory_of_every_operation(
    operation: ops.Operation, before: list[Signal], expected: tuple[float, ...]
) -> None:
    found = follow(operation, before)
    assert isinstance(found, Signal)
    assert found[:3] == pytest.approx(expected[:3])


@pytest.mark.parametrize(
    ("operation", "before", "why"),
    [
        (ops.Relu(), [Signal(3.0, 1.0, 1.0)], "relu of a signal that is not Gaussian"),
        (ops.Activate("tanh"), [SIGNAL._replace(gaussian=False)], "tanh of a signal that is not"),
        (ops.Beyond("softmax"), [SIGNAL], "softmax"),
        (ops.Input(), [], "input"),
        (ops.Sum(), [BEHIND_RELU, BEHIND_RELU], "add of two signals with a mean"),
        (ops.Affine(shift=FOUR), [BEHIND_RELU], "add of a constant to a signal with a mean"),
        (ops.Normalize("batch_norm"), [Signal(1.0, 1.0, 0.0)], "batch_norm of a constant"),
        (ops.Affine(2.0, pattern=True), [SIGNAL], "a pattern over positions"),
        (ops.Dropout(0.0), [SIGNAL], "dropout of everything"),
    ],
    ids=str,
)
def test_theory_says_why_it_is_silent(
    operation: ops.Operation, before: list[Signal], why: str
) -> None:
    found = follow(operation, before)
    assert isinstance(found, str)
    assert found.startswith(why)


def test_positions_as_units() -> None:
    transposed = replace(BIASED, phases=4.0)
    assert follow(transposed, [SIGNAL], units=True) == follow(BIASED, [SIGNAL])
    pattern = ops.Affine(4.0, pattern=True)
    assert follow(pattern, [SIGNAL], units=True) == pytest.approx((12.0, 4.0, 0.0, True))
    norm = ops.Normalize("batch_norm", positions=True)
    assert follow(norm, [SIGNAL], units=True) == "batch_norm over positions"
    assert follow(norm, [SIGNAL]) == pytest.approx((1.0, 0.0, 0.0, True))


class Between(nn.Module):
    """Something between two wide linear layers."""

    def __init__(
        self, between: Callable[..., torch.Tensor], width: int = WIDTH, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.last = wide(nn.Linear(WIDTH, WIDTH), nn.Linear(width, WIDTH))
        self.between = between
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.between(self.first(x), *self.parts.values()))
        return y


def evaluated(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """With running statistics and scales that spread."""
    with torch.no_grad():
        assert norm.running_var is not None
        norm.running_var.copy_(gaussian(WIDTH, seed=3).exp())
        norm.weight.copy_(gaussian(WIDTH, seed=4))
    return norm.eval()


def positive(*shape: int) -> torch.Tensor:
    return gaussian(*shape, seed=5).exp()


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Between(lambda y: F.dropout(torch.relu(y), 0.5)),
    "dropout, evaluation": lambda: Between(lambda y: F.dropout(torch.relu(y), 0.5, training=False)),
    "divided by a number": lambda: Between(lambda y: torch.relu(y) / 3.0),
    "divided by a vector": lambda: Between(lambda y: y / positive(WIDTH)),
    "times a vector": lambda: Between(lambda y: y * positive(WIDTH)),
    "plus a number": lambda: Between(lambda y: y + 2.0),
    "plus a vector": lambda: Between(lambda y: torch.relu(y + gaussian(WIDTH, seed=6))),
    "BatchNorm, evaluation": lambda: Between(
        lambda y, norm: norm(y), norm=evaluated(nn.BatchNorm1d(WIDTH))
    ),
    "LayerNorm of little": lambda: Between(
        lambda y, norm: norm(1e-3 * y), norm=nn.LayerNorm(WIDTH)
    ),
    "LeakyReLU, 0.5": lambda: Between(lambda y, relu: relu(y), relu=nn.LeakyReLU(0.5)),
    "RMSNorm": lambda: Between(lambda y, norm: norm(torch.relu(y)), norm=nn.RMSNorm(WIDTH)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_theory_follows_from_the_probe_to_the_measurement(name: str) -> None:
    explanation = sv.explain(FOLLOWED[name](), gaussian(100, WIDTH, seed=9))
    assert explanation.theory.start.tolist() == ["input", ""]
    agree(explanation)


SILENT: dict[str, Callable[[], nn.Module]] = {
    "relu of a signal that is not Gaussian": lambda: Between(lambda y: torch.relu(y + 3)),
    "add of a constant to a signal with a mean": lambda: Between(lambda y: torch.relu(y) - 0.8),
    "add of constants that differ from input to input": lambda: Between(
        lambda y: y + torch.randn(y.shape)
    ),
    "mul of constants that differ from input to input": lambda: Between(
        lambda y: y * (torch.rand(len(y), 1) < 0.5)
    ),
    "add of dependent signals": lambda: Between(
        lambda y, layer: layer(y) + layer(y), layer=nn.Linear(WIDTH, WIDTH)
    ),
    "setitem": lambda: Between(zero_half),
    "addmm with weights from the input": lambda: Between(
        lambda y: torch.addmm(y, y, torch.eye(WIDTH))
    ),
    "add with options": lambda: Between(lambda y: torch.add(y, torch.ones(WIDTH), alpha=2.0)),
}


def zero_half(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[:, : WIDTH // 2] = 0
    return y


@pytest.mark.parametrize("cause", SILENT)
def test_theory_is_silent_where_it_would_be_wrong(cause: str) -> None:
    theory = sv.explain(SILENT[cause](), gaussian(50, WIDTH, seed=9)).theory
    assert theory.start.iloc[-1] == cause


def test_theory_of_biases_and_shifts_with_a_mean() -> None:
    for model in (
        wide(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
        wide(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
    ):
        for module in list(model)[:2]:
            if isinstance(module, nn.Linear | nn.BatchNorm1d):
                nn.init.constant_(module.bias, 2.0)
        theory = sv.explain(model, gaussian(50, WIDTH)).theory
        assert theory.start.iloc[-1] == "relu of a signal that is not Gaussian"


class Images(nn.Module):
    """Convolutions, and something on the positions between them."""

    def __init__(self, between: Callable[..., torch.Tensor], **parts: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            self.first = models.he_(nn.Conv2d(300, 300, 1))
        self.between = between
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self.first(x), *self.parts.values())


def test_theory_of_positions() -> None:
    noise = gaussian(60, 300, 4, 4, seed=2)
    up = models.he_(nn.ConvTranspose2d(300, 300, 2, stride=2))
    transposed = Images(lambda y, up: up(torch.relu(y)), up=up)
    for positions, r in (("samples", 1 / math.pi / 4), ("units", 1 / math.pi)):
        found = sv.explain(transposed, noise, positions=positions)
        assert found.theory.fraction.iloc[-1] == pytest.approx(1 - r, abs=0.01)
        assert found.table.fraction.iloc[-1] == pytest.approx(1 - r, abs=0.06)
        expected = pytest.approx(found.table.sigma2.iloc[-1], rel=0.1)
        assert found.theory.sigma2.iloc[-1] == expected
    pattern = gaussian(300, 4, 4, seed=3)
    norm, conv = nn.BatchNorm2d(300), models.he_(nn.Conv2d(300, 300, 1))
    cases = {
        "a pattern over positions": (
            Images(lambda y, conv: conv(y * pattern + pattern), conv=conv),
            noise,
            "samples",
        ),
        "batch_norm over positions": (
            Images(lambda y, norm, conv: conv(norm(y)), norm=norm, conv=conv),
            noise,
            "units",
        ),
        "linear over positions": (
            Images(lambda y, mix: mix(y.flatten(2)), mix=nn.Linear(16, 16)),
            noise,
            "samples",
        ),
    }
    for cause, (model, x, positions) in cases.items():
        assert sv.explain(model, x, positions=positions).theory.start.iloc[-1] == cause
    model, x, _ = cases["a pattern over positions"]
    explanation = sv.explain(model, x, positions="units")
    assert explanation.theory.start.iloc[-1] == ""
    assert explanation.theory.fraction.iloc[-1] == pytest.approx(
        explanation.table.fraction.iloc[-1], abs=0.05
    )


def test_theory_of_averages_over_independent_positions() -> None:
    """(r + (q - r) / k, r) of k positions, in convolutions and in a network on sets of points."""
    noise, conv = gaussian(60, 300, 4, 4, seed=2), models.he_(nn.Conv2d(300, 299, 1))
    pools: dict[Callable[..., torch.Tensor], int] = {
        lambda y: F.avg_pool2d(y, 2): 4,
        lambda y: F.adaptive_avg_pool2d(y, (2, 4)): 2,
        lambda y: y.mean((-1, -2), keepdim=True): 16,
    }
    for pool, count in pools.items():
        model = Images(lambda y, conv: conv(pool(torch.relu(y))), conv=conv)  # noqa: B023
        found = sv.explain(model, noise)
        once = (1 - 1 / math.pi) / count
        assert found.theory.start.tolist() == ["input", ""]
        assert found.theory.fraction.iloc[-1] == pytest.approx(
            once / (1 / math.pi + once), abs=0.01
        )
        for column, tolerance in (("v2", 0.03), ("m2", 3 * math.sqrt(2 / 300))):
            expected = pytest.approx(found.table[column].iloc[-1], rel=tolerance)
            assert found.theory[column].iloc[-1] == expected
    points = Between(lambda y: torch.relu(y).mean(1))
    found = sv.explain(points, gaussian(50, 8, WIDTH, seed=9))
    assert found.theory.start.tolist() == ["input", ""]
    agree(found)


def test_averages_over_positions_that_are_not_independent() -> None:
    noise, conv = gaussian(60, 300, 6, 6, seed=2), models.he_(nn.Conv2d(300, 300, 1))
    smooth = F.avg_pool2d(noise, 3, stride=1, padding=1)
    pattern = gaussian(36, seed=3).view(6, 6)
    between: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
        ("avg_pool2d", nn.Sequential(nn.Conv2d(300, 300, 2), nn.AvgPool2d(5))),
        ("avg_pool2d", nn.Sequential(nn.Conv2d(300, 300, 1, padding=1), nn.AvgPool2d(2))),
        ("avg_pool2d", lambda y: F.avg_pool2d(conv(y * pattern), 2)),
        ("avg_pool2d", lambda y: F.avg_pool2d(y, 3, stride=2)),
        ("avg_pool2d", lambda y: F.avg_pool2d(y, 3, padding=1)),
        ("adaptive_avg_pool2d", lambda y: F.adaptive_avg_pool2d(y, 4)),
        ("mean", lambda y: y.mean(1, keepdim=True).expand_as(y)),
    ]
    cases = [(cause, way, noise, "samples") for cause, way in between]
    cases += [("avg_pool2d", nn.AvgPool2d(2), smooth, "samples")]
    cases += [("average over positions", nn.AvgPool2d(2), noise, "units")]
    for cause, way, x, positions in cases:
        model = Images(lambda y, conv: conv(way(y)), conv=conv)  # noqa: B023
        assert sv.explain(model, x, positions=positions).theory.start.iloc[-1] == cause


def test_diagnoses_of_a_deep_network() -> None:
    x = gaussian(200, 100)
    deep = sv.networks.mlp(100, width=100, depth=30, outputs=10, seed=0)
    found = kinds(deep, x)
    assert {"collapse", "theory"} <= found.keys()
    # thirty layers: what the usual repair costs in gradients, and what does without
    assert "multiplied by 1/√L" in found["collapse"]
    assert "grow some 7e+04 times" in found["collapse"]
    short = sv.networks.mlp(100, width=300, depth=12, outputs=300, seed=0)
    alike = 0.8 * x + 0.6 * x[:1]  # so that a dozen layers are enough
    assert "sample_ removes the means" in kinds(short, alike)["collapse"]
    assert "the mean of the input 'input'" in kinds(deep, x * 0.01 + 1)["collapse"]
    sv.init.total_(deep, x)
    assert "collapse" in kinds(deep, x)  # which total init cannot help
    with pytest.warns(UserWarning, match="squared gradients grow some"):
        sv.init.sample_(deep, x)
    repaired = kinds(deep, x)
    assert {"sound", "gradients"} <= repaired.keys()
    assert next(iter(repaired)) == "gradients"  # first, for they rule at this depth
    assert "Small learning rates do not mend this" in repaired["gradients"]
    assert "collapse" not in repaired
    assert "calibrated weights" in repaired["theory"]
    normalized = kinds(
        sv.networks.mlp(100, width=300, depth=20, outputs=10, batchnorm=True, seed=0), x
    )
    assert {"gradients", "sound"} <= normalized.keys()
    shallow = sv.networks.mlp(100, width=300, depth=6, outputs=10, batchnorm=True, seed=0)
    assert "it stops the decay" in kinds(shallow, x)["BatchNorm"]
    assert "theory has 0.683" in kinds(shallow, x)["BatchNorm"]


def test_diagnoses_of_scale_and_dead_units() -> None:
    x = gaussian(200, 100)
    for deviation, kind in ((0.05, "loss of scale"), (0.5, "explosion")):
        layers = [part for _ in range(6) for part in (nn.Linear(100, 100), nn.ReLU())]
        found = kinds(wide(*layers, nn.Linear(100, 3), variance=deviation**2), x)
        assert "total_ sets σ²" in found[kind]
    first = nn.Linear(100, 50)
    dying = nn.Sequential(first, nn.ReLU(), nn.Linear(50, 5))
    with torch.no_grad():
        first.bias[:25] = -100.0
        first.bias[25:] = 0.0
    half = kinds(dying, x)["dead units"]
    assert "50% of the units of '0' (row 1 of 2) are positive for no input" in half
    dying[1] = nn.Tanh()
    assert "dead units" not in kinds(dying, x)


def test_scale_is_judged_between_normalizations() -> None:
    """And said to be kept only there."""
    x = gaussian(200, 100)
    wild = [part for _ in range(8) for part in (nn.Linear(100, 100), nn.ReLU())]
    for layers in ((*wild, nn.Linear(100, 5)), (nn.LayerNorm(100), *wild, nn.Linear(100, 5))):
        assert "σ² goes from" in kinds(wide(*layers, variance=1.0), x)["explosion"]
    normalized = [
        part for _ in range(3) for part in (nn.Linear(100, 100), nn.LayerNorm(100), nn.ReLU())
    ]
    found = kinds(wide(*normalized, nn.Linear(100, 5), variance=1.0), x)
    assert "between normalizations" in found["sound"]
    assert "explosion" not in found
    head = nn.Linear(100, 5)
    behind = wide(nn.Linear(100, 100), nn.LayerNorm(100), head, variance=1.0)
    with torch.no_grad():
        head.weight.mul_(1e-3)
    assert "sound" in kinds(behind, x)  # the norm lies between


def test_rows_without_a_signal() -> None:
    x = gaussian(50, 20)
    last = sv.networks.mlp(20, width=20, depth=3, outputs=2, seed=0)
    for parameter in last[4].parameters():
        nn.init.zeros_(parameter)
    found = kinds(last, x)
    assert "σ² is 0 at '4': its weights are 0." in found["no signal"]
    assert "nan" not in " ".join(found.values())
    for parameter in last[0].parameters():
        nn.init.zeros_(parameter)
    found = kinds(last, x)
    assert "σ² is 0 at '0' and 2 other rows" in found["no signal"]
    assert found.keys() == {"no signal", "theory"}
    single = kinds(nn.Sequential(nn.Linear(20, 5), nn.BatchNorm1d(5)), x)
    assert "nan" not in " ".join(single.values())


def test_one_batchnorm_is_not_said_to_stop_what_it_does_not() -> None:
    model = wide(
        nn.BatchNorm1d(200),
        *(part for _ in range(25) for part in (nn.Linear(200, 200), nn.ReLU())),
        variance=0.01,
    )
    found = kinds(model, gaussian(100, 200))
    assert "collapse" in found
    assert "stops" not in " ".join(found.values())
    assert "gradients" not in found


def test_units_that_only_seem_dead() -> None:
    first = nn.Linear(20, 30)
    nn.init.constant_(first.bias, -100.0)
    for between in (nn.BatchNorm1d(30), Negated()):
        assert "dead units" not in kinds(
            nn.Sequential(first, between, nn.ReLU(), nn.Linear(30, 3)), gaussian(50, 20)
        )
    pooled = nn.Sequential(first, nn.MaxPool1d(2), nn.ReLU(), nn.Linear(15, 3))
    assert "dead units" in kinds(pooled, gaussian(50, 20))


class Negated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


def test_a_bias_is_not_blamed_on_the_inputs() -> None:
    layer = nn.Linear(20, 30)
    nn.init.constant_(layer.bias, 10.0)
    assert "The cause is the bias of ''" in kinds(layer, gaussian(50, 20))["collapse"]


def test_dropout_is_named() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Dropout(0.3), nn.ReLU(), nn.Linear(30, 3))
    assert "counts as variance over inputs" in kinds(model, gaussian(50, 20))["dropout"]
    assert "dropout" not in kinds(model.eval(), gaussian(50, 20))


def test_growth_is_that_of_the_model_s_output() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sv.networks.mlp(50, width=50, depth=20, outputs=5, seed=0)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.body(x), x.square().mean(1, keepdim=True)

    with pytest.warns(UserWarning, match="squared gradients grow some 1e"):
        sv.init.sample_(Beside(), gaussian(200, 50))
    leaky = chain(ops.Weights(2.0), ops.Relu(0.5), ops.Weights(2.0))
    assert gradient_growth(leaky) == pytest.approx(
        sv.theory.maps.batchnorm_slope(1.0, activation="leaky_relu", negative_slope=0.5)
    )


def test_tables_are_plain_and_their_calls_are_a_part_of_the_explanation() -> None:
    model, x = sv.networks.mlp(20, width=30, depth=6, outputs=5, seed=0), gaussian(50, 20)
    explanation = sv.explain(model, [x[:20], x[20:]])
    assert explanation.table.attrs == {}
    plain = sv.probe(model, [x[:20], x[20:]])
    pd.testing.assert_frame_equal(explanation.table.drop(columns="cosine"), plain)
    functions = [call.function for call in explanation.calls]
    assert functions == ["input", *["linear", "relu"] * 5, "linear"]
    rows = [row for call in explanation.calls for row in call.rows]
    assert rows == explanation.table.name.tolist()
    assert [call.is_output for call in explanation.calls] == [False] * 11 + [True]
    some = sv.explain(model, x, layers=["4", "8"])
    assert some.table.name.tolist() == ["4", "8"]
    # theory has no measurement to start from before the first row that is chosen
    assert some.theory.start.tolist() == ["input", ""]


@pytest.mark.parametrize("name", models.MODELS)
def test_any_model_is_explained(name: str) -> None:
    model, batch = models.MODELS[name]()
    explanation = sv.explain(model, batch)
    assert explanation.findings[-1].kind == "theory"
    assert len(explanation.theory) == len(explanation.table)
    followed = explanation.theory.start == ""
    assert followed.any()
    assert np.isfinite(explanation.theory.v2[followed]).all()
    assert explanation._repr_html_().count("<tr") == len(explanation.table) + 1
    print(f"{name}: theory follows {followed.sum()} of {len(followed)} rows; {explanation}")


def test_report_refuses_other_things_than_an_explanation() -> None:
    with pytest.raises(TypeError, match="explanation must be of type Explanation, got str"):
        sv.report.page("text", title="x", provenance={})  # type: ignore[arg-type]
    explanation = sv.explain(nn.Linear(4, 3), gaussian(10, 4))
    with pytest.raises(TypeError, match="provenance must be of type Mapping, got list"):
        sv.report.page(explanation, title="x", provenance=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="title must be of type str, got int"):
        sv.report.page(explanation, title=3, provenance={})  # type: ignore[arg-type]
    page = sv.report.page(explanation, title="<b>", provenance={"<i>": "&"})
    assert "<h1>&lt;b&gt;</h1>" in page
    assert "<dt>&lt;i&gt;</dt><dd>&amp;</dd>" in page


def chain(*operations: ops.Operation) -> list[Call]:
    """Calls one after the other, the first of them an input."""
    names = {ops.Weights: "linear", ops.Relu: "relu", ops.Move: "view"}
    made = [Call(names[type(part)], part, (n,)) for n, part in enumerate(operations)]
    return [Call("input", ops.Input()), *made]


def test_gradient_growth_takes_the_way_of_least_growth() -> None:
    growth = math.pi / (math.pi - 1)
    weights, relu = ops.Weights(2.0), ops.Relu()
    plain = chain(weights, relu, ops.Move(), weights, relu)
    assert gradient_growth(plain) == pytest.approx(growth)
    longer = [*plain, Call("linear", weights, (5,)), Call("conv2d", weights, (6,))]
    # the second follows no ReLU
    assert gradient_growth(longer) == pytest.approx(growth**2)
    skip = [Call("add", ops.Sum(), (1, 3)), Call("relu", relu, (4,)), Call("linear", weights, (5,))]
    residual = [*chain(weights, relu, weights), *skip]
    assert gradient_growth(residual) == pytest.approx(growth)  # the skip goes round the first ReLU
    assert gradient_growth([]) == 1


def test_gradient_growth_against_measured_gradients() -> None:
    """Sample init: as predicted without skips. With them the trunk's variance is 1 + l before block
    l, and a block's part of the gradient is divided by it: the growth is a power of the depth."""
    x = gaussian(200, 100)
    plain = sv.networks.mlp(100, width=100, depth=15, outputs=100, seed=0)
    with pytest.warns(UserWarning, match="squared gradients grow some"):
        table = sv.init.sample_(plain, x, gradients=True)
    assert float(table.gradient2_after[0]) == pytest.approx(
        gradient_growth(sv.explain(plain, x).calls), rel=0.5
    )
    skips = models.Residual(width=100, depth=12, normalized=False)
    table = sv.init.sample_(skips, gaussian(200, 20), gradients=True)
    product = math.prod(1 + math.pi / (math.pi - 1) / (1 + block) for block in range(12))
    assert float(table.gradient2_after[0]) == pytest.approx(product, rel=0.25)
    assert gradient_growth(sv.explain(skips, gaussian(200, 20)).calls) == 1
