"""What is so by design, and sound networks that look ill: nothing above a note is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from tests.ailing import SOUND, Case, X, lenet, smooth
from tests.models import Net, gaussian, he_
from tests.test_diagnoses import Tied, seeded


def sound_residual() -> Case:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        for a, b in zip(s.a, s.b, strict=True):
            x = x + b(torch.relu(a(x)))
        return s.o(x)

    lists = {n: nn.ModuleList(nn.Linear(64, 64) for _ in range(4)) for n in "ab"}
    model = he_(Net(forward, o=nn.Linear(64, 9), **lists))
    for layer in model.get_submodule("b").children():
        nn.init.zeros_(next(layer.parameters()))
    return model, X, set(), ()


def prior() -> Case:
    model = he_(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9)))
    nn.init.normal_(model[2].weight, std=0.01)  # type: ignore[index]
    nn.init.constant_(model[2].bias, -4.6)  # type: ignore[index]
    return model, X, set(), ()


@pytest.mark.parametrize("case", [sound_residual, prior], ids=["zero branches", "prior bias"])
def test_what_is_so_by_design_is_at_most_a_note(case: Callable[[], Case]) -> None:
    model, batch, _, _ = seeded(case)
    found = sv.explain(model, batch).findings
    assert found[0].kind == "nothing found", found
    assert all(finding.note for finding in found[1:])


def test_padding_is_named_unless_there_is_a_mask() -> None:
    model = seeded(lambda: Tied(100, 32))
    ids = torch.randint(3, 100, (40, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.arange(40)[:, None] % 8 + 4
    batch = {"ids": ids * mask}
    assert any("padding" in finding.text for finding in sv.explain(model, batch).findings)
    masked = sv.explain(model, batch, mask=lambda batch: mask)
    assert not any("padding" in finding.text for finding in masked.findings)


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_what_is_sound(name: str) -> None:
    model, batch, _, _ = seeded(SOUND[name])
    found = sv.explain(model, batch).findings
    assert found[0].kind == "nothing found", found
    assert all(finding.note for finding in found[1:])


def test_targets_that_are_far_away_are_no_fault_of_the_network() -> None:
    model = sv.networks.mlp(64, width=100, depth=4, outputs=1, seed=0)
    y = 3e6 + 1e5 * gaussian(100, 1, seed=5)
    found = sv.explain(model, X, loss=lambda output, _: F.mse_loss(output, y)).findings
    assert [finding.kind for finding in found] == ["nothing found"]


def test_of_lenet_true_numbers_are_said() -> None:
    model, x = seeded(lenet), smooth(64, 1, 28)
    first = sv.explain(model, x).findings[0]
    assert first.kind == "collapse"
    with torch.no_grad():
        y = model(x)
    fraction = float(y.var(0).mean() / y.square().mean())
    assert first.value == pytest.approx(fraction, rel=1e-5)


def test_a_loss_may_read_attributes_of_the_output() -> None:
    model, batch, _, _ = seeded(SOUND["GPT-2"])
    labels = batch["input_ids"].flatten()
    found = sv.explain(
        model, batch, loss=lambda y, _: F.cross_entropy(y.logits.flatten(0, 1), labels)
    )
    assert found.findings[0].kind == "nothing found"
