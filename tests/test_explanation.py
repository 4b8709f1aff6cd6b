"""What explain says of models made to be ill, and what it leaves behind."""

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import svlib as sv
from tests import models
from tests.models import gaussian, wide


def kinds(model: nn.Module, batch: object, **options: Any) -> dict[str, str]:
    """The text of the findings by kind."""
    found = sv.explain(model, batch, **options).findings
    return {finding.kind: str(finding) for finding in found}


def put_(model: nn.Module, name: str, *, bias: float = 0.0, weight: float = 1.0) -> None:
    """Add to the biases of a layer, multiply its weights."""
    layer: Any = model.get_submodule(name)
    with torch.no_grad():
        layer.bias += bias
        layer.weight *= weight


def test_the_parts_of_a_fall_add_up_to_it() -> None:
    model, x = sv.networks.mlp(100, width=300, depth=30, outputs=10, seed=0), gaussian(200, 100)
    found = sv.explain(model, x)
    collapse = next(finding for finding in found.findings if finding.kind == "collapse")
    ratio = collapse.value / found.trace.fraction.max()
    assert math.exp(sum(collapse.parts.values())) == pytest.approx(ratio, rel=0.05)


def test_what_is_removed_is_measured() -> None:
    """Against networks in which it is away from the start."""
    x = gaussian(200, 100)
    model = sv.networks.mlp(100, width=200, depth=12, outputs=10, seed=0)
    put_(model, "8", bias=5)
    collapse = sv.explain(model, x[:128]).findings[0]
    assert (collapse.kind, collapse.place, collapse.cause) == ("collapse", "8", "the bias of '8'")
    words, value = next(iter(collapse.removed.items()))
    assert words == "without the bias of '8'"
    put_(model, "8", bias=-5)
    row = "22"
    without = sv.probe(model, x[:128]).set_index("name").fraction[row]
    assert value == pytest.approx(without, rel=1e-4)


def test_a_cure_is_what_its_code_does() -> None:
    x = gaussian(100, 64)
    model = sv.networks.mlp(64, width=100, depth=8, outputs=10, seed=0)
    put_(model, "6", weight=1e-3)
    found = sv.explain(model, x)
    assert found.findings[0].kind == "loss of scale"
    name = "weights of '6' at He's rule"
    row: Any = found.cures.loc[name]
    exec(row.code, {"model": model, "nn": nn, "sv": sv})  # as a reader would
    table = sv.probe(model, x)
    assert table.fraction.iloc[-1] == pytest.approx(row["at the output"], rel=1e-4)
    assert table.sigma2.max() / table.sigma2.min() == pytest.approx(row["range of σ²"], rel=1e-2)
    assert name in str(found.findings[0])


def test_a_loss_decides() -> None:
    x, y = gaussian(64, 20), torch.arange(64) % 5
    model = sv.networks.mlp(20, width=60, depth=6, outputs=5, seed=0)
    put_(model, "10", weight=30)
    found = sv.explain(model, (x, y), loss=lambda output, batch: nn.functional.cross_entropy(
        output, batch[1]))  # fmt: skip
    scale = next(f for f in found.findings if f.kind == "output scale")
    start = float(nn.functional.cross_entropy(model(x), y).detach())
    assert scale.value == pytest.approx(start / math.log(5), rel=1e-4)
    best = str(found.cures.loss.idxmin())
    assert ("Nothing" if best == "nothing" else best) in scale.cure


def test_nothing_is_advised_that_made_it_worse() -> None:
    model, x = sv.networks.mlp(100, width=300, depth=40, outputs=10, seed=0), gaussian(200, 100)
    found = sv.explain(model, x)
    for finding in found.findings:
        if finding.cure.startswith("Tried: "):
            name = next(n for n in found.cures.index if finding.cure.startswith(f"Tried: {n} "))
            assert found.cures.decades[name] < found.cures.decades["nothing"]
    assert "gradients" in next(f.cure for f in found.findings if f.kind == "collapse")


def test_scale_and_dead_units() -> None:
    x = gaussian(200, 100)
    for deviation, kind in ((0.05, "loss of scale"), (0.5, "explosion")):
        layers = [part for _ in range(6) for part in (nn.Linear(100, 100), nn.ReLU())]
        found = kinds(wide(*layers, nn.Linear(100, 3), variance=deviation**2), x)
        assert "with weights at He's rule" in found[kind]
    first = nn.Linear(100, 50)
    dying = nn.Sequential(first, nn.ReLU(), nn.Linear(50, 5))
    with torch.no_grad():
        first.bias[:25] = -100.0
        first.bias[25:] = 0.0
    assert "50% of the units of '0' pass nothing" in kinds(dying, x)["dead units"]
    assert "without the bias of '0'" in kinds(dying, x)["dead units"]
    dying[1] = nn.Tanh()
    assert "dead units" not in kinds(dying, x)


def test_scale_is_judged_between_normalizations() -> None:
    x = gaussian(200, 100)
    wild = [part for _ in range(8) for part in (nn.Linear(100, 100), nn.ReLU())]
    for layers in ((*wild, nn.Linear(100, 5)), (nn.LayerNorm(100), *wild, nn.Linear(100, 5))):
        assert "σ² goes from" in kinds(wide(*layers, variance=1.0), x)["explosion"]
    normalized = [
        part for _ in range(3) for part in (nn.Linear(100, 100), nn.LayerNorm(100), nn.ReLU())
    ]
    found = kinds(wide(*normalized, nn.Linear(100, 5), variance=0.02), x)
    assert list(found) == ["nothing found"]
    head = nn.Linear(100, 5)
    behind = wide(nn.Linear(100, 100), nn.LayerNorm(100), head, variance=1.0)
    with torch.no_grad():
        head.weight.mul_(1e-3)
    assert list(kinds(behind, x)) == ["nothing found"]  # a small head is no fault


def test_outputs_without_a_signal() -> None:
    x = gaussian(50, 20)
    last = sv.networks.mlp(20, width=20, depth=3, outputs=2, seed=0)
    for parameter in last[4].parameters():
        nn.init.zeros_(parameter)
    found = sv.explain(last, x).findings
    assert found[-1].kind == "no signal"
    assert found[-1].note
    for parameter in last[0].parameters():
        nn.init.zeros_(parameter)
    worst = sv.explain(last, x).findings[0]
    assert (worst.kind, worst.place, worst.note) == ("no signal", "0", False)


def test_units_that_only_seem_dead() -> None:
    first = nn.Linear(20, 30)
    nn.init.constant_(first.bias, -100.0)
    for between in (nn.BatchNorm1d(30), Negated()):
        model = nn.Sequential(first, between, nn.ReLU(), nn.Linear(30, 3))
        assert "dead units" not in kinds(model, gaussian(50, 20))
    pooled = nn.Sequential(first, nn.MaxPool1d(2), nn.ReLU(), nn.Linear(15, 3))
    assert "dead units" in kinds(pooled, gaussian(50, 20))


class Negated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


def test_what_is_not_judged_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    found = sv.explain(Recurrent(), gaussian(60, 5, 8))
    assert "the inside of LSTM 'lstm'" in found.not_judged
    assert "sound" not in str(found)


def test_tables_are_plain_and_equal_those_of_probe() -> None:
    model, x = sv.networks.mlp(20, width=30, depth=6, outputs=5, seed=0), gaussian(50, 20)
    found = sv.explain(model, [x[:20], x[20:]])
    assert found.table.attrs == {}
    plain = sv.probe(model, [x[:20], x[20:]])
    pd.testing.assert_frame_equal(found.table.drop(columns="cosine"), plain)
    assert found.trace.function.tolist() == ["input", *["linear", "relu"] * 5, "linear"]
    some = sv.explain(model, x, layers=["4", "8"])
    assert some.table.name.tolist() == ["4", "8"]


@pytest.mark.parametrize("name", models.MODELS)
def test_any_model_is_explained(name: str) -> None:
    model, batch = models.MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = sv.explain(model, batch)
    worst = next(x for x in found.findings if not x.note)
    ill = ("MLP", "residual", "VGG-like", "ViT (transformers)")  # its class token outweighs
    assert worst.kind == "nothing found" or name in ill, found
    assert found._repr_html_().count("<tr") == len(found.table) + 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_healthy_or_not() -> None:
    x = gaussian(100, 64)
    model = sv.networks.mlp(64, width=100, depth=4, outputs=10, seed=0)
    sv.assert_healthy(model, x)
    put_(model, "2", bias=100)
    with pytest.raises(AssertionError, match="collapse: "):
        sv.assert_healthy(model, x)
    sv.assert_healthy(model, x, fail_on=["gradients"])
