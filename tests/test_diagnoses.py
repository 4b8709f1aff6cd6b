"""Networks as they go wrong in practice: the first finding names what is wrong with each.

Rebuilt from descriptions of networks whose fault was known.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import svlib as sv
from tests.ailing import AILING, Case
from tests.models import Net, gaussian, he_


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make()


def plain(gain: float, depth: int = 40) -> nn.Module:
    model = sv.networks.mlp(64, width=128, depth=depth, outputs=10, seed=0)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= math.sqrt(gain / 2)
    return model


def cnn() -> nn.Module:
    parts = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
    )
    return nn.Sequential(*parts, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64),
                         nn.ReLU(), nn.Linear(64, 10))  # fmt: skip


def attention(scale: float) -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.e(x)
        weights = (s.q(x) @ s.k(x).mT * scale).softmax(-1)
        return s.o((x + s.p(weights @ s.v(x))).mean(1))

    layers = {name: nn.Linear(32, 32) for name in "qkvp"}
    return he_(Net(forward, e=nn.Linear(8, 32), o=nn.Linear(32, 16), **layers))


def unet(change: Callable[[Any], Any]) -> nn.Module:
    model = sv.networks.UNet(8, levels=2, batchnorm=True, seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model(gaussian(24, 1, 16, 16, seed=7))  # trained statistics
    change(norms)
    return model.eval()


class Token(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.c, self.e = nn.Parameter(torch.randn(1, 1, 32) * size), nn.Linear(12, 32)
        self.b = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.o = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.cat([self.c.expand(len(x), -1, -1), self.e(x)], 1)
        return self.o(self.b(z)[:, 0])


class GCN(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        a = (torch.rand(60, 60) < 0.2).float() + torch.eye(60)
        self.a = a / a.sum(1, keepdim=True)
        self.l = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.l:
            x = torch.relu(layer(self.a @ x))
        return x


class Recurrent(nn.Module):
    def __init__(self, forget: float) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 8)
        biases = dict(self.r.named_parameters())
        nn.init.constant_(biases["bias_hh_l0"][32:64], forget)
        nn.init.zeros_(biases["bias_ih_l0"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.r(x)[0][:, -1])


class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 0.01


def mlp(depth: int = 8, outputs: int = 10) -> Any:
    return sv.networks.mlp(64, width=100, depth=depth, outputs=outputs, seed=0)


def changed(change: Callable[[Any], Any], depth: int = 8) -> nn.Module:
    model = mlp(depth)
    with torch.no_grad():
        change(model)
    return model


def residual() -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in s.blocks:
            x = x + layer(torch.relu(x))
        return s.o(x)

    return he_(
        Net(forward, blocks=nn.ModuleList(nn.Linear(64, 64) for _ in range(50)), o=nn.Linear(64, 5))
    )


X, P = gaussian(100, 64), gaussian(48, 3, 16, 16)
CASES: dict[str, Callable[[], Case]] = {
    "gain 1": lambda: (plain(1), X, {"loss of scale"}, ("He's rule",)),
    "gain 4": lambda: (plain(4), X, {"explosion"}, ("He's rule",)),
    "images of 0 to 255": lambda: (
        cnn(),
        torch.rand(64, 3, 16, 16) * 255,
        {"inputs"},
        ("standardized",),
    ),
    "attention times root d": lambda: (
        attention(32**0.5),
        gaussian(40, 12, 8),
        {"saturation"},
        ("softmax",),
    ),
    "last layer before tanh x 30": lambda: (
        nn.Sequential(
            he_(nn.Linear(64, 64)), nn.ReLU(), changed_weight(nn.Linear(64, 64), 30), nn.Tanh()
        ),
        X,
        {"saturation"},
        ("weights", "'2'"),
    ),
    "running variance 1e-6": lambda: (
        unet(lambda norms: norms[2].running_var.fill_(1e-6)),
        gaussian(24, 1, 16, 16),
        {"explosion", "statistics"},
        ("statistics",),
    ),
    "running mean off by 30": lambda: (
        unet(lambda norms: norms[2].running_mean.add_(30)),
        gaussian(24, 1, 16, 16),
        {"dead units", "statistics"},
        ("statistics",),
    ),
    "running variances x 1e4": lambda: (
        unet(lambda norms: [n.running_var.mul_(1e4) for n in norms]),
        gaussian(24, 1, 16, 16),
        {"collapse", "loss of scale", "statistics"},
        ("statistics",),
    ),
    "forget bias -6": lambda: (
        Recurrent(-6.0),
        gaussian(60, 9, 8),
        {"saturation"},
        ("forget gate",),
    ),
    "a raw time stamp": lambda: (
        mlp(),
        torch.cat([X[:, :63], 7e8 + 1e6 * X[:, 63:]], 1),
        {"inputs", "explosion"},
        ("standardized",),
    ),
    "token x 30": lambda: (Token(30.0), gaussian(100, 16, 12), {"collapse"}, ("constant",)),
    "backward x 0.01": lambda: (
        nn.Sequential(*[x for _ in range(5) for x in (he_(nn.Linear(64, 64)), Apply())]),
        X,
        {"gradients"},
        ("shrink",),
    ),
    "detached": lambda: (
        Net(
            lambda s, x: s.b(torch.relu(s.a(x).detach())),
            a=he_(nn.Linear(64, 64)),
            b=he_(nn.Linear(64, 9)),
        ),
        X,
        {"gradients"},
        ("'a'",),
    ),
    "over-smoothing": lambda: (
        GCN(8),
        gaussian(60, 32),
        {"collapse", "loss of scale"},
        ("average",),
    ),
    "a view that mixes inputs": lambda: (
        Net(
            lambda s, x: s.b(torch.relu(s.a(x)).view(50, len(x)).t().reshape(len(x), 50)),
            a=he_(nn.Linear(64, 50)),
            b=he_(nn.Linear(50, 9)),
        ),
        X,
        {"mixing"},
        ("view", "other inputs"),
    ),
    "softmax over the batch": lambda: (
        Net(lambda s, x: s.b(torch.softmax(s.a(x), 0)), a=nn.Linear(64, 50), b=nn.Linear(50, 9)),
        X,
        {"mixing", "collapse"},
        ("softmax",),
    ),
    "softmax over features": lambda: (
        Net(
            lambda s, x: s.b(torch.softmax(0.1 * s.a(x), -1)),
            a=nn.Linear(64, 50),
            b=nn.Linear(50, 9),
        ),
        X,
        {"collapse"},
        ("softmax",),
    ),
    "bias -5 in one layer": lambda: (
        changed(lambda m: m[4].bias.sub_(5)),
        X,
        {"dead units", "collapse", "loss of scale"},
        ("'4'",),
    ),
    "one feature x 500": lambda: (
        mlp(),
        torch.cat([500 * X[:, :1], X[:, 1:]], 1),
        {"inputs"},
        ("column 0",),
    ),
    "NaN weight": lambda: (
        changed(lambda m: m[6].weight[0, 0].fill_(torch.nan)),
        X,
        {"not finite"},
        ("'6'",),
    ),
    "branches without a factor": lambda: (residual(), X, {"explosion"}, ("sums of branches",)),
    "embedding of deviation 1, tied": lambda: (
        seeded(lambda: Tied(100, 256)),
        torch.randint(100, (40, 8), generator=torch.Generator().manual_seed(0)),
        {"explosion", "output scale"},
        ("'h'", "scale"),
    ),
    "dropout 0.5 in every layer": lambda: (
        nn.Sequential(
            *[x for _ in range(16) for x in (he_(nn.Linear(64, 64)), nn.ReLU(), nn.Dropout())]
        ),
        X,
        {"explosion"},
        ("dropout",),
    ),
    "mean over tokens": lambda: (
        he_(
            Net(
                lambda s, x: s.b(torch.relu(s.a(x)).mean(1)),
                a=nn.Linear(16, 64),
                b=nn.Linear(64, 9),
            )
        ),
        gaussian(200, 60, 16),
        {"collapse"},
        ("average", "ReLU"),
    ),
    "zero hidden layer": lambda: (
        changed(lambda m: m[4].weight.zero_()),
        X,
        {"no signal"},
        ("'4'",),
    ),
}


def changed_weight(layer: nn.Linear, factor: float) -> nn.Linear:
    with torch.no_grad():
        layer.weight *= factor
    return layer


class Apply(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(Back.apply(x))


class Tied(nn.Module):
    """The output multiplies by the embedding, of deviation 1."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.e, self.m = nn.Embedding(words, width), nn.Linear(width, width)
        self.h = nn.Linear(width, words, bias=False)
        self.h.weight = self.e.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.e(ids)
        return self.h(x + torch.relu(self.m(x)))


ALL = {**CASES, **AILING}


@pytest.mark.filterwarnings("ignore:.* have no row")
@pytest.mark.parametrize("name", ALL)
def test_the_first_finding_names_the_cause(name: str) -> None:
    model, batch, kinds, words = seeded(ALL[name])
    found = sv.explain(model, batch).findings
    assert found[0].kind in kinds, found
    told = f"{found[0]} {found[0].place!r} {found[0].cause}"
    assert any(word in told for word in words), found[0]


def test_what_is_removed_is_measured_in_the_units_of_the_finding() -> None:
    model, batch, _, _ = seeded(ALL["gate bias 20"])
    first = sv.explain(model, batch).findings[0]
    model.g.bias.data.zero_()
    expected = float(torch.softmax(model.g(batch), -1).max(-1).values.mean().detach())
    assert first.value == pytest.approx(1, abs=1e-4)
    assert next(iter(first.removed.values())) == pytest.approx(expected, rel=0.05)
