"""Theory along the trace of a model against closed forms and measurements."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from svlib.probing import operations as ops
from svlib.probing.along import Signal, follow
from tests import models
from tests.models import WIDTH, gaussian, wide


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
    "add of what differs from input to input, noise": lambda: Between(
        lambda y: y + torch.randn(y.shape)
    ),
    "mul of what differs from input to input": lambda: Between(
        lambda y: y * (torch.rand(len(y), 1) < 0.5)
    ),
    "add of dependent signals": lambda: Between(
        lambda y, layer: layer(y) + layer(y), layer=nn.Linear(WIDTH, WIDTH)
    ),
    "setitem": lambda: Between(zero_half),
    "addmm with weights from the input": lambda: Between(
        lambda y: torch.addmm(y, y, torch.eye(WIDTH))
    ),
    "add of what differs from input to input": lambda: Between(
        lambda y: torch.add(y, torch.ones(WIDTH), alpha=2.0)
    ),
}


def zero_half(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[:, : WIDTH // 2] = 0
    return y


@pytest.mark.parametrize("cause", SILENT)
def test_theory_is_silent_where_it_would_be_wrong(cause: str) -> None:
    theory = sv.explain(SILENT[cause](), gaussian(50, WIDTH, seed=9)).theory
    assert theory.start.iloc[-1] == cause.split(", ")[0]


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
        "flatten of positions": (
            Images(lambda y, mix: mix(y.flatten(1)), mix=nn.Linear(4800, 16)),
            noise,
            "samples",
        ),
    }
    for cause, (model, x, positions) in cases.items():
        assert sv.explain(model, x, positions=positions).theory.start.iloc[-1] == cause
