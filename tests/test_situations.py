"""Situations in which people's networks train badly or tools for hooks fail, rebuilt small."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import svlib as sv
from tests.models import Net, gaussian

Case = tuple[nn.Module, Any]


def linear(inputs: int, outputs: int, *, gain: float = 2.0, seed: int = 0) -> nn.Linear:
    layer, generator = nn.Linear(inputs, outputs), torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, 0, math.sqrt(gain / inputs), generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make()


def kinds(case: Case, **options: Any) -> list[str]:
    found = sv.explain(*case, **options).findings
    return [finding.kind for finding in found if not finding.note]


def behind(change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Case:
    """Two ReLU layers at He's rule that see a function of the input."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        return s.c(torch.relu(s.b(torch.relu(s.a(change(x))))))

    return Net(forward, a=linear(20, 64), b=linear(64, 64, seed=1), c=linear(64, 5)), x


def attention(*hidden: int) -> Case:
    """One head over 16 positions of 64 units; hidden inputs have all positions masked."""
    mask = torch.zeros(40, 16, dtype=torch.bool)
    mask[:, 12:] = mask[list(hidden)] = True

    def forward(s: Any, x: torch.Tensor) -> Any:
        scores = s.q(x) @ s.k(x).transpose(1, 2) / 8
        scores = scores.masked_fill(mask[: len(x), None], -torch.inf)
        return s.o(x + scores.softmax(-1) @ s.v(x))

    names = {name: linear(64, 64, gain=1, seed=n) for n, name in enumerate("qkvo")}
    return Net(forward, **names), gaussian(40, 16, 64)


def broken(case: Case, name: str) -> Case:
    with torch.no_grad():
        case[0].get_parameter(name)[0] = math.nan
    return case


def couplings(scale: Callable[[torch.Tensor], torch.Tensor], gain: float) -> Case:
    """Six affine couplings of a flow."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        a, b = x.chunk(2, 1)
        for first, second in zip(s.first, s.second, strict=True):
            log_scale, shift = second(torch.relu(first(a))).chunk(2, 1)
            a, b = b * scale(log_scale) + shift, a
        return torch.cat([a, b], 1)

    first = [linear(16, 64, seed=n) for n in range(6)]
    second = [linear(64, 32, gain=gain, seed=n) for n in range(6)]
    return Net(forward, first=nn.ModuleList(first), second=nn.ModuleList(second)), gaussian(100, 32)


def sines(frequency: float) -> Case:
    """Weights for a frequency of 30 in the hidden layers, as their authors set them."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        x = torch.sin(30 * s.first(x))
        for layer in s.hidden:
            x = torch.sin(frequency * layer(x))
        return s.last(x)

    hidden = nn.ModuleList(linear(64, 64, gain=2 / 900, seed=n) for n in range(3))
    first, last = linear(2, 64, gain=1 / 6), linear(64, 1, gain=2 / 900)
    return Net(forward, first=first, hidden=hidden, last=last), 0.577 * gaussian(300, 2)


def recurrent(change: Callable[[nn.Module], Any], *, named: bool = False) -> Case:
    rnn = seeded(lambda: nn.LSTM(16, 32, batch_first=True))
    change(rnn)

    def forward(s: Any, x: torch.Tensor) -> Any:
        return s.head((s.rnn(input=x) if named else s.rnn(x))[0][:, -1])

    return Net(forward, rnn=rnn, head=linear(32, 5)).eval(), gaussian(60, 8, 16)


def test_a_mask_that_leaves_some_positions() -> None:
    assert kinds(attention()) == ["nothing found"]


@pytest.mark.parametrize(
    "case",
    [
        lambda: attention(3),
        lambda: broken(attention(), "o.weight"),
        lambda: behind(lambda x: torch.log(torch.relu(x)), gaussian(100, 20)),
        lambda: couplings(torch.exp, 2.0),
    ],
    ids=["all masked", "behind a mask", "log", "overflow"],
)
@pytest.mark.filterwarnings("ignore:.*not finite")
def test_an_output_that_is_not_finite(case: Callable[[], Case]) -> None:
    assert "not finite" in kinds(case())


def test_couplings_that_hold_their_scale() -> None:
    assert kinds(couplings(lambda x: torch.sigmoid(x + 2), 0.0)) == ["nothing found"]


def test_sines_as_their_authors_set_them() -> None:
    assert kinds(sines(30)) == ["nothing found"]


def test_sines_whose_frequency_was_forgotten() -> None:
    assert kinds(sines(1))[0] == "loss of scale"


@pytest.mark.parametrize("x", [255 * gaussian(100, 20), 255 * gaussian(100, 20) + 100])
def test_an_input_standardized_by_the_model(x: torch.Tensor) -> None:
    mean, deviation = x.mean(), x.std()
    assert kinds(behind(lambda x: (x - mean) / deviation, x)) == ["nothing found"]


@pytest.mark.parametrize(
    ("change", "x"),
    [
        (lambda x: x.double().float(), 255 * gaussian(100, 20)),
        (lambda x: x.float(), (255 * gaussian(100, 20)).long()),
        (lambda x: x - 100, 255 * gaussian(100, 20)),
    ],
    ids=["cast", "whole numbers", "shifted"],
)  # fmt: skip
def test_an_input_that_nobody_standardizes(change: Any, x: torch.Tensor) -> None:
    assert kinds(behind(change, x))[0] == "inputs"


@pytest.mark.parametrize(
    "case",
    [
        lambda: recurrent(lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")),
        lambda: recurrent(lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.3)),
        lambda: recurrent(lambda m: None, named=True),
    ],
    ids=["weight norm", "pruned", "called by name"],
)
def test_recurrent_layers_with_other_weights(case: Callable[[], Case]) -> None:
    assert kinds(case()) == ["nothing found"]


@pytest.mark.filterwarnings("ignore:.*called as modules")
def test_attention_over_the_batch_for_want_of_batch_first() -> None:
    def taken(*, first: bool) -> Case:
        encoder = seeded(lambda: nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=first))
        model = Net(lambda s, x: s.out(s.encoder(x).mean(1)), encoder=encoder, out=linear(32, 4))
        return model, gaussian(30, 10, 32)

    assert kinds(taken(first=True)) == ["nothing found"]
    with pytest.warns(UserWarning, match="run over the first dimension"):
        assert kinds(taken(first=False))[0] == "mixing"


def test_graph_layers_that_average_neighbours() -> None:
    near = (gaussian(60, 60) > 1).float()
    near = ((near + near.T + torch.eye(60)) > 0).float()
    near /= near.sum(1, keepdim=True)

    def forward(s: Any, x: torch.Tensor) -> Any:
        for layer in s.layers:
            x = torch.relu(layer(near @ x))
        return x

    model = Net(forward, layers=nn.ModuleList(linear(32, 32, seed=n) for n in range(8)))
    finding = sv.explain(model, gaussian(60, 32)).findings[0]
    assert (finding.kind, finding.cause) == ("collapse", "averages over positions")
