"""What is advised is judged by another measure than the one it was chosen by: by training."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from tests.models import Net, gaussian
from tests.test_diagnoses import ALL, seeded

WORSE = {
    "images of 0 to 255": "Adam does not mind the inputs, and its loss is 0.039 without the cure",
}
NOTHING = (  # is advised
    "detached", "a view that mixes inputs", "softmax over the batch", "NaN weight",
    "zero hidden layer", "tied autoencoder, large weights", "GPT-2 of range 0.5",
)  # fmt: skip
SAME = ("the same", "float16")  # other types of a case that is there
APART = ("price beside",)  # two arguments


def call(model: nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, dict):
        return model(batch).float()
    return model(**batch)["logits"].float()


def targets(batch: Any, outputs: torch.Tensor) -> torch.Tensor:
    """Classes of a linear teacher, words as they are, or classes by chance."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(batch, dict):
        return batch["input_ids"]
    if not batch.is_floating_point() or outputs.ndim != 2:
        return torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator)
    x = batch.flatten(1)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return (x @ torch.randn(x.shape[1], outputs.shape[-1], generator=generator)).argmax(-1)


def trained(model: nn.Module, batch: Any, y: torch.Tensor) -> float:
    """Cross entropy after fifty steps of Adam."""

    def loss() -> torch.Tensor:
        return F.cross_entropy(call(model, batch).flatten(0, -2), y.flatten())

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return float(loss().detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.xfail(strict=True, reason=WORSE[x])) if x in WORSE else x
        for x in ALL
        if not x.startswith(SAME + NOTHING + APART)
    ],
)
def test_the_cure_helps(name: str) -> None:
    model, batch, _, _ = seeded(ALL[name])
    found = sv.explain(model, batch)
    told = [x.cure for x in found.findings if x.cure.startswith("Tried")]
    advised = [n for n in found.cures.index if any(f": {n} (" in x for x in told)]
    assert advised
    with torch.no_grad():
        y = targets(batch, call(model, batch))
    nothing = trained(model, batch, y)
    for cure in advised:
        model, batch, _, _ = seeded(ALL[name])
        scope = {"model": model, "batch": batch, "x": batch, "sv": sv, "nn": nn}
        exec(found.cures.code[cure], scope)
        given: Any = scope["x"]
        assert trained(model, given, y) < nothing, (cure, found.cures.code[cure])


def test_a_mask_that_is_added_is_not_the_size_of_the_scores() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        scores = s.q(x) @ s.k(x).mT * 12 + torch.full((12, 12), -1e9).triu(1)
        return s.o(x + scores.softmax(-1) @ s.v(x))

    def make() -> nn.Module:
        return Net(forward, **{name: nn.Linear(32, 32) for name in "qkvo"})

    found = sv.explain(seeded(make), gaussian(40, 12, 32))
    code = found.cures.code["smaller weights in front of softmax"]
    model = seeded(make)
    before = model.q.weight.detach().clone()
    exec(code, {"model": model})
    assert (model.q.weight / before).mean() > 0.05
