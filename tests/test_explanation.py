"""Theory along a model's calls against closed forms and measurements, and the diagnosis against models made to be ill."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import svlib as sv
from svlib.calls import Call
from svlib.explanation import Signal, follow, gradient_growth
from tests import models
from tests.models import gaussian

WIDTH = 1200


def kinds(model: nn.Module, batch: object) -> dict[str, str]:
    return {finding.kind: str(finding) for finding in sv.explain(sv.probe(model, batch)).findings}


def wide(*layers: nn.Module, variance: float = 2 / WIDTH) -> nn.Sequential:
    model, generator = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, variance**0.5, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def agree(explanation: sv.Explanation) -> None:
    """Within three deviations of one network: sigma^2 has the relative variance 5 l / N at layer l."""
    expected, found = explanation.theory, explanation.table
    spread = np.sqrt(5 * np.arange(1, len(found) + 1) / WIDTH)
    assert (np.abs(expected.sigma2 / found.sigma2 - 1) < 3 * spread).all()
    np.testing.assert_allclose(expected.v2_fraction, found.v2_fraction, atol=0.04)


def test_theory_of_a_relu_network_is_the_trajectory() -> None:
    model = sv.networks.mlp(100, width=50, depth=20, outputs=50, seed=0)
    theory = sv.explain(sv.probe(model, gaussian(40, 100))).theory
    assert theory.start.tolist() == ["input"] + [""] * 19
    expected = sv.theory.trajectory(19, rho0=float(theory.m2[0] / theory.sigma2[0]))
    np.testing.assert_allclose(theory.v2_fraction, expected.v2, rtol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU(inplace=True)], ids=str)
@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH)], ids=lambda x: type(x).__name__)
def test_theory_meets_a_wide_network(activation: nn.Module, norm: nn.Module) -> None:
    """Of scale, too: He's weights are too large for a leaky ReLU, and biases add up."""
    model = wide(nn.Linear(WIDTH, WIDTH), *(part for _ in range(3) for part in (norm, activation, nn.Linear(WIDTH, WIDTH))))
    generator = torch.Generator().manual_seed(1)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, 0.0, 0.3, generator=generator)
    explanation = sv.explain(sv.probe(model, gaussian(100, WIDTH, seed=9)))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)


def test_theory_of_a_norm_behind_the_activation() -> None:
    """It takes away the mean over units that ReLU has made, as well as the scale."""
    block = (nn.ReLU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    model = wide(nn.Linear(WIDTH, WIDTH), *(part for _ in range(3) for part in block))
    explanation = sv.explain(sv.probe(model, gaussian(100, WIDTH, seed=9)))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)
    assert explanation.theory.v2_fraction[1] > 0.9  # 0.68 without the norm


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
    explanation = sv.explain(sv.probe(Sums(), gaussian(100, WIDTH, seed=9)))
    assert (explanation.theory.start[1:] == "").all()
    agree(explanation)
    trunk = sv.theory.trajectory(2, residual=0.25).rho[2]  # the last branch has C of it
    assert explanation.theory.v2_fraction[3] == pytest.approx(1 - sv.theory.maps.correlation(float(trunk)), abs=0.005)


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
    explanation = sv.explain(sv.probe(Dependent(), gaussian(50, WIDTH)))
    assert explanation.theory.start.tolist() == ["input", "", "add of dependent signals"]


def test_theory_of_every_call() -> None:
    q, r, u = 3.0, 1.0, 0.0
    for call, expected in (
        (Call("linear", (0,), {"gain": 2.0, "bias2": 0.5}), (6.5, 2.5, 0.0)),
        (Call("conv_transpose2d", (0,), {"gain": 2.0, "bias2": 0.5, "phases": 4.0}), (6.5, 1.0, 0.0)),
        (Call("batch_norm", (0,), {"gamma2": 4.0, "beta2": 1.0}), (5.0, 1.0, 0.0)),
        (Call("batch_norm", (0,), {"gamma2": 4.0, "beta2": 1.0, "mean2": 0.0, "variance": 2.0}), (7.0, 3.0, 0.0)),
        (Call("layer_norm", (0,), {"gamma2": 1.0, "beta2": 0.0}), (1.0, 1 / 3, 0.0)),
        (Call("dropout", (0,), {"keep": 0.5}), (6.0, 1.0, 0.0)),
        (Call("mul", (0,), {"constant2": 4.0}), (12.0, 4.0, 0.0)),
        (Call("add", (0,), {"constant2": 4.0}), (7.0, 5.0, 0.0)),
        (Call("view", (0,)), (q, r, u)),
        (Call("leaky_relu", (0,), {"slope": 1.0}), (q, r, 0.0)),
    ):
        assert follow(call, [Signal(q, r, u)]) == pytest.approx(expected), call
    layer_norm = Call("layer_norm", (0,), {"gamma2": 1.0, "beta2": 0.0})
    assert follow(layer_norm, [Signal(3.0, 1.0, 0.5)]) == pytest.approx((1.0, 0.2, 0.0))
    rms_norm = Call("rms_norm", (0,), {"gamma2": 1.0, "beta2": 0.0})
    assert follow(rms_norm, [Signal(3.0, 1.0, 0.5)]) == pytest.approx((1.0, 1 / 3, 0.0))
    assert follow(Call("relu", (0,)), [Signal(2.0, 0.0, 0.0)]) == pytest.approx((1.0, 1 / math.pi, 1 / math.pi))
    assert follow(Call("add", (0, 1)), [Signal(q, r, u), Signal(1.0, 0.5, 0.2)]) == pytest.approx((4.0, 1.5, 0.2))
    beyond: list[tuple[Call, list[Signal | None]]] = [
        (Call("relu", (0,)), [Signal(3.0, 1.0, 1.0)]),  # no Gaussian
        (Call("softmax", (0,)), [Signal(q, r, u)]),
        (Call("relu", (0,)), [None]),
        (Call("add of dependent signals", (0, 1)), [Signal(q, r, u), Signal(q, r, u)]),
        (Call("batch_norm", (0,), {"gamma2": 4.0, "beta2": 1.0, "mean2": 0.1, "variance": 2.0}), [Signal(q, r, u)]),
    ]
    for call, signals in beyond:
        assert follow(call, signals) is None


def test_diagnoses_of_a_deep_network() -> None:
    x = gaussian(200, 100)
    deep = sv.networks.mlp(100, width=100, depth=30, outputs=10, seed=0)
    found = kinds(deep, x)
    assert {"collapse", "theory"} <= found.keys()
    assert "sample_ removes the means" in found["collapse"]
    assert "at the first layer" in kinds(deep, x * 0.01 + 1)["collapse"]
    sv.init.total_(deep, x)
    assert "collapse" in kinds(deep, x)  # which total init cannot help
    with pytest.warns(UserWarning, match="squared gradients grow some"):
        sv.init.sample_(deep, x)
    repaired = kinds(deep, x)
    assert {"sound", "gradients"} <= repaired.keys()
    assert "collapse" not in repaired
    assert "calibrated weights" in repaired["theory"]
    normalized = kinds(sv.networks.mlp(100, width=300, depth=20, outputs=10, batchnorm=True, seed=0), x)
    assert "theory has 0.683 behind ReLU" in normalized["BatchNorm"]
    assert {"gradients", "sound"} <= normalized.keys()


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
    assert "50% of the units of '0', before a ReLU" in kinds(dying, x)["dead units"]
    dying[1] = nn.Tanh()
    assert "dead units" not in kinds(dying, x)


@pytest.mark.parametrize("name", models.MODELS)
def test_any_model_is_explained(name: str) -> None:
    model, batch = models.MODELS[name]()
    explanation = sv.explain(sv.probe(model, batch))
    assert explanation.findings[-1].kind == "theory"
    assert len(explanation.theory) == len(explanation.table)
    followed = explanation.theory.start == ""
    assert followed.any()
    assert np.isfinite(explanation.theory.v2[followed]).all()
    assert explanation._repr_html_().count("<tr") == len(explanation.table) + 1
    print(f"{name}: theory follows {followed.sum()} of {len(followed)} rows; {explanation}")


def test_a_table_without_calls_and_bad_ones() -> None:
    table = sv.probe(nn.Linear(4, 3), gaussian(10, 4))
    plain = pd.DataFrame(table.to_dict("list"))
    assert "no record of the network's calls" in str(sv.explain(plain))
    assert sv.explain(plain).theory.v2.isna().all()
    with pytest.raises(TypeError, match=r"table must be a DataFrame of svlib\.probe, got list"):
        sv.explain([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"table must have the columns of svlib.probe, got none named \['m2'\]"):
        sv.explain(table.drop(columns="m2"))
    with pytest.raises(ValueError, match="table must have rows, got none"):
        sv.explain(table.iloc[:0])


def test_report_refuses_what_is_no_explanation() -> None:
    with pytest.raises(TypeError, match=r"explanation must be an Explanation of svlib\.explain, got str"):
        sv.report.page("text", title="x", provenance={})  # type: ignore[arg-type]
    explanation = sv.explain(sv.probe(nn.Linear(4, 3), gaussian(10, 4)))
    with pytest.raises(TypeError, match="provenance must be a mapping of names to values, got list"):
        sv.report.page(explanation, title="x", provenance=[])  # type: ignore[arg-type]
    page = sv.report.page(explanation, title="<b>", provenance={"<i>": "&"})
    assert "<h1>&lt;b&gt;</h1>" in page
    assert "<dt>&lt;i&gt;</dt><dd>&amp;</dd>" in page


def test_gradient_growth_takes_the_way_of_least_growth() -> None:
    growth = math.pi / (math.pi - 1)
    plain = [Call(name, (n - 1,) if n else ()) for n, name in enumerate(["input", "linear", "relu", "view", "conv2d", "relu"])]
    assert gradient_growth(plain) == pytest.approx(growth)
    longer = [*plain, Call("linear", (5,)), Call("linear", (6,))]  # the second follows no ReLU
    assert gradient_growth(longer) == pytest.approx(growth**2)
    names = ["input", "linear", "relu", "linear", "add", "relu", "linear"]
    ways = [(), (0,), (1,), (2,), (1, 3), (4,), (5,)]
    residual = [Call(name, parents) for name, parents in zip(names, ways, strict=True)]
    assert gradient_growth(residual) == pytest.approx(growth)  # the skip goes round the first ReLU
    assert gradient_growth([]) == 1


def test_gradient_growth_against_measured_gradients() -> None:
    """Sample init: as predicted without skips. With them the trunk's variance is 1 + l before block l, and a block's part of
    the gradient is divided by it: the growth is a power of the depth."""
    x = gaussian(200, 100)
    plain = sv.networks.mlp(100, width=100, depth=15, outputs=100, seed=0)
    with pytest.warns(UserWarning, match="squared gradients grow some"):
        table = sv.init.sample_(plain, x, gradients=True)
    assert float(table.gradient2_after[0]) == pytest.approx(gradient_growth(sv.probe(plain, x).attrs["calls"]), rel=0.5)
    skips = models.Residual(width=100, depth=12, normalized=False)
    table = sv.init.sample_(skips, gaussian(200, 20), gradients=True)
    product = math.prod(1 + math.pi / (math.pi - 1) / (1 + block) for block in range(12))
    assert float(table.gradient2_after[0]) == pytest.approx(product, rel=0.25)
    assert gradient_growth(sv.probe(skips, gaussian(200, 20)).attrs["calls"]) == 1
