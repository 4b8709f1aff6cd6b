"""Known faults, put in by hand, against the finding that comes first; and sound networks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from tests.models import gaussian

Made = tuple[nn.Module, Any]


class Hand(nn.Module):
    """RMSNorm written out, as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and a gated MLP on a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Hand(width), Hand(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = Hand(width), nn.Linear(width, 90)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Pooled(nn.Module):
    """A vision transformer in small: patches, a class token, its output."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Linear(12, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Residual(nn.Module):
    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(30, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            y = y + block(torch.relu(norm(y)))
        return self.last(y)


def linear_(model: nn.Module, deviation: float) -> nn.Module:
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, deviation, generator=generator)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    return model


def convolutional(batchnorm: bool = False) -> Made:
    return sv.networks.all_cnn_c(16, batchnorm=batchnorm, seed=0), gaussian(32, 3, 32, 32)


def mlp() -> Made:
    return sv.networks.mlp(30, width=128, depth=6, outputs=10, seed=0), gaussian(200, 30)


def residual() -> Made:
    return sv.networks.he_(Residual(), seed=0), gaussian(200, 30)


def transformer() -> Made:
    ids = torch.randint(90, (64, 12), generator=torch.Generator().manual_seed(0))
    return linear_(Transformer(), 0.1), ids


def vision() -> Made:
    return linear_(Pooled(), 0.2), gaussian(64, 9, 12)


SOUND: dict[str, Callable[[], Made]] = {
    "MLP": mlp,
    "convolutional": convolutional,
    "BatchNorm": lambda: convolutional(batchnorm=True),
    "residual": residual,
    "transformer": transformer,
    "vision": vision,
}
ALARMS = {"collapse", "explosion", "loss of scale", "dead units", "no signal", "saturation",
          "equal inputs", "padding", "input scale", "absolute scale"}  # fmt: skip


def first(model: nn.Module, batch: Any, **options: Any) -> str:
    return str(sv.explain(model, batch, **options).findings[0])


@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name: str, layers: str | None) -> None:
    found = sv.explain(*SOUND[name](), layers=layers).findings
    assert not {finding.kind for finding in found} & ALARMS, found
    assert len(found) <= 3


def weighted(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    kinds = (nn.Linear, nn.Conv2d)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def hidden(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """A layer on the way of the signal, not in a branch."""
    layers = dict(weighted(model))
    name = {"Residual": "first", "Transformer": "head", "Pooled": "head"}.get(type(model).__name__)
    return (name, layers[name]) if name else list(layers.items())[2]


Fault = Callable[[nn.Module, Any], tuple[nn.Module, Any, list[str]]]


def bias(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    name, layer = hidden(model)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(layer.bias, 0.0, 30.0, generator=generator)  # type: ignore[arg-type]
    return model, batch, [f"the bias of {name!r}"]


def mean(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    return model, batch + 30, ["the mean of the input"]


def large(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    return model, batch * 1e7, ["input scale"]


def dead(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    name, layer = weighted(model)[2]
    nn.init.constant_(layer.bias, -1000.0)  # type: ignore[arg-type]
    return model, batch, [f"100% of the units of {name!r}", f"of {name!r}"]


def scaled(factor: float, kind: str) -> Fault:
    def put(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
        with torch.no_grad():
            for _, layer in weighted(model):
                layer.weight.mul_(factor)
        return model, batch, [kind]

    return put


def equal(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    return model, batch[:1].expand_as(batch).clone(), ["equal inputs"]


def zero(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    name, layer = hidden(model)
    nn.init.zeros_(layer.weight)
    return model, batch, [f"σ² is 0 at {name!r}"]


def wrong_fan(model: nn.Module, batch: Any) -> tuple[nn.Module, Any, list[str]]:
    name, layer = hidden(model)
    with torch.no_grad():
        layer.weight.mul_(40.0)
    return model, batch, [f"change is at {name!r}"]


PLAIN = ("MLP", "convolutional")
CASES: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "bias": (bias, ("MLP", "convolutional", "residual", "transformer", "vision")),
    "input mean": (mean, ("MLP", "convolutional", "residual")),
    "input scale": (large, ("MLP", "convolutional", "BatchNorm", "residual", "vision")),
    "dead layer": (dead, ("MLP", "convolutional", "residual", "transformer", "vision")),
    "vanishing": (scaled(0.2, "loss of scale"), PLAIN),
    "exploding": (scaled(5.0, "explosion"), PLAIN),
    "equal inputs": (equal, tuple(SOUND)),
    "zero weights": (zero, (*PLAIN, "residual", "transformer", "vision")),
    "wrong fan": (wrong_fan, (*PLAIN, "transformer", "vision")),
}


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, (_, names) in CASES.items() for name in names]
)
def test_the_cause_comes_first(fault: str, name: str) -> None:
    model, batch, words = CASES[fault][0](*SOUND[name]())
    assert any(word in first(model, batch) for word in words), first(model, batch)


def test_one_bad_branch_is_named() -> None:
    model, x = residual()
    with torch.no_grad():
        model.blocks[3].weight.mul_(1e3)  # type: ignore[index, union-attr]
    assert "'blocks.3'" in first(model, x)
    with torch.no_grad():
        model.blocks[3].weight.zero_()  # type: ignore[index, union-attr]
    assert first(model, x).startswith("sound")  # a branch that starts at 0 is no fault


def test_a_missing_norm() -> None:
    model, x = residual()
    for block in model.blocks:  # type: ignore[union-attr]
        with torch.no_grad():
            block.weight.mul_(4.0)
    assert first(model, x).startswith("sound")
    model.norms = nn.ModuleList(nn.Identity() for _ in range(6))
    assert first(model, x).startswith("explosion")


@pytest.mark.parametrize("put", [bias, mean, dead, wrong_fan, scaled(0.2, ""), scaled(5.0, "")])
def test_what_batchnorm_takes_away_is_no_fault(put: Fault) -> None:
    model, batch, _ = put(*SOUND["BatchNorm"]())
    assert first(model, batch).startswith("sound")


def test_a_constant_token_that_outweighs_the_signal() -> None:
    model, x = vision()
    nn.init.normal_(model.token, 0.0, 50.0)  # type: ignore[arg-type]
    assert "constant that cat puts beside" in first(model, x)


def test_padding_is_named() -> None:
    model, ids = transformer()
    for row, length in enumerate(torch.arange(len(ids)) % 8 + 4):
        ids[row, length:] = 0
    assert first(model, ids).startswith("padding: 3")
    assert not first(*transformer()).startswith("padding")


class Net(nn.Module):
    """Layers and a function of one's own."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.function(self, *given, **named)


X = gaussian(100, 8, seed=5)


def small_(layer: nn.Linear, deviation: float) -> nn.Linear:
    nn.init.normal_(layer.weight, std=deviation, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    return layer


def test_a_tensor_that_is_returned_again_keeps_its_row() -> None:
    def both(s: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = s.norm(s.a(x))
        return {"logits": s.head(y), "hidden": y}

    model = Net(
        both, a=small_(nn.Linear(8, 64), 0.01), norm=nn.LayerNorm(64), head=nn.Linear(64, 4)
    )
    found = sv.explain(model, X, layers="all")
    assert not {finding.kind for finding in found.findings} & ALARMS
    lines = dict(zip(found.theory.name, found.theory.start, strict=True))
    assert lines["norm"] == ""
    assert ("norm", "['hidden']") in [call.rows for call in found.calls]


def test_branches_that_never_meet_are_not_compared() -> None:
    model = Net(
        lambda s, a, b: s.e(s.n1(a)) + s.d(s.n2(b)), n1=nn.LayerNorm(8), n2=nn.LayerNorm(8),
        e=nn.Linear(8, 8), d=small_(nn.Linear(8, 8), 0.001),
    )  # fmt: skip
    assert first(model, (X, X.flip(0))).startswith("sound")


def test_of_two_towers_the_input_at_fault_is_named() -> None:
    model = Net(
        lambda s, a, b: s.o(torch.cat([s.a(a), s.b(b)], 1)),
        a=nn.Linear(8, 64), b=nn.Linear(8, 64), o=nn.Linear(128, 2),
    )  # fmt: skip
    for layer in model.children():
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    assert "the mean of the input 'argument 1'" in first(model, (X, X + 100))


def test_a_constant_side_input_blames_no_data() -> None:
    model = Net(
        lambda s, x, t: s.o(torch.relu(s.t(torch.full((len(x), 4), 0.5) + 0 * t) + s.x(x))),
        t=nn.Linear(4, 16), x=nn.Linear(8, 16), o=nn.Linear(16, 8),
    )  # fmt: skip
    assert first(model, (X, torch.zeros(100, 4))).startswith("sound")


def test_bounded_outputs_and_small_branches_are_no_collapse() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    logits = nn.Sequential(*head, nn.LogSoftmax(1))
    found = {finding.kind for finding in sv.explain(logits, X, layers="all").findings}
    assert not found & ALARMS


def test_rmsnorm_by_hand_is_rmsnorm() -> None:
    layers = [small_(nn.Linear(8, 64), 0.01), nn.Linear(64, 64)]
    tables = []
    for norm in (Hand(64), nn.RMSNorm(64, eps=1e-6)):
        explanation = sv.explain(nn.Sequential(layers[0], norm, layers[1]), X)
        assert not {finding.kind for finding in explanation.findings} & ALARMS
        assert explanation.theory.start.tolist() == ["input", ""]
        tables.append(explanation.theory)
    torch.testing.assert_close(
        torch.tensor(tables[0].m2.to_numpy()), torch.tensor(tables[1].m2.to_numpy())
    )


def test_layernorm_by_hand_is_layernorm() -> None:
    def by_hand(s: Any, x: torch.Tensor) -> Any:
        y = torch.relu(s.a(x))
        centred = y - y.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return s.b(centred / torch.sqrt(variance + 1e-5))

    a, b = small_(nn.Linear(8, 256), 0.5), small_(nn.Linear(256, 256), 0.09)
    theory = sv.explain(Net(by_hand, a=a, b=b), X).theory
    module = nn.Sequential(a, nn.ReLU(), nn.LayerNorm(256, elementwise_affine=False), b)
    expected = sv.explain(module, X).theory
    assert theory.start.tolist() == ["input", ""]
    assert theory.fraction.iloc[1] == pytest.approx(expected.fraction.iloc[1], rel=1e-6)


def test_a_chaotic_network_is_not_called_sound() -> None:
    layers = [part for _ in range(20) for part in (nn.Linear(100, 100), nn.Tanh())]
    model = linear_(nn.Sequential(*layers), 0.5)
    found = sv.explain(model, gaussian(200, 100)).findings
    assert found[0].kind == "saturation"
    assert "sound" not in {finding.kind for finding in found}


class Sine(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 if n == 0 else width, width) for n in range(4))
        self.last = nn.Linear(width, 1)
        for n, layer in enumerate(self.layers):
            bound = 0.5 if n == 0 else math.sqrt(6 / width) / 30
            nn.init.uniform_(layer.weight, -bound, bound)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.uniform_(self.last.weight, -math.sqrt(6 / width) / 30, math.sqrt(6 / width) / 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.last(x)


def test_siren_as_its_authors_initialize_it_is_sound() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Sine()
    assert first(model, torch.rand(200, 2) * 2 - 1).startswith("sound")


@pytest.mark.parametrize(
    "rectifier",
    [
        F.relu6,
        lambda y: F.hardtanh(y, 0.0, 1.0),
        lambda y: F.threshold(y, 0.0, 0.0),
        lambda y: torch.clamp(y, min=0),
        lambda y: torch.maximum(y, torch.zeros(())),
        lambda y: y * (y > 0),
        lambda y: torch.relu(y[:, :20]),
    ],
)
def test_dead_units_before_any_rectifier(rectifier: Callable[..., Any]) -> None:
    a = nn.Linear(8, 30)
    nn.init.constant_(a.bias, -100.0)
    model = Net(lambda s, x: rectifier(s.a(x)), a=a)
    assert first(model, X).startswith("dead units: 100% of the units of 'a'")


def test_absolute_scale_has_a_word() -> None:
    layer = nn.Linear(8, 8, bias=False)
    assert first(layer, X * 1e15).startswith("input scale")
    nn.init.normal_(layer.weight, std=1e6)
    kinds = {finding.kind for finding in sv.explain(layer, X).findings}
    assert "absolute scale" in kinds


def test_nothing_is_said_of_relu_where_there_is_none() -> None:
    model = sv.networks.mlp(8, width=50, depth=4, outputs=5, batchnorm=True, seed=0)
    tanh = nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in model))
    assert "ReLU" not in str(sv.explain(tanh, X))


def test_a_collapse_of_directions_is_seen_where_lengths_keep_the_variance() -> None:
    deep = sv.networks.mlp(64, width=64, depth=100, outputs=10, seed=0)
    explanation = sv.explain(deep, gaussian(500, 64))
    assert explanation.table.fraction.iloc[40] > 0.1
    y = deep[:81](gaussian(500, 64)).detach().double()  # layer 40
    unit = y / y.norm(dim=1, keepdim=True)
    by_hand = float((unit @ unit.T).sum() - 500) / (500 * 499)
    assert explanation.table.cosine.iloc[40] == pytest.approx(by_hand, rel=1e-6)
    assert str(explanation.findings[0]).startswith("collapse: ")
    assert "ReLU" in str(explanation.findings[0])


class OfPoints(nn.Module):
    """A set network: the mean over points, between two parts."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.inner = sv.networks.mlp(3, width=128, depth=2, outputs=128, seed=0)
        self.outer = sv.networks.mlp(128, width=128, depth=2, outputs=10, seed=1)
        with torch.no_grad():
            next(iter(self.outer)).bias.fill_(bias)  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.outer(torch.relu(self.inner(x)).mean(1))
        return y


def test_an_average_over_positions_is_the_cause() -> None:
    points = gaussian(128, 32, 3)
    explanation = sv.explain(OfPoints(), points)
    found = explanation.findings[0]
    assert "The cause is the average before 'outer.0' (mean)" in found.text
    fraction = explanation.table.set_index("name").fraction["outer.0"]
    assert found.text.startswith(f"v²/σ² is {fraction:.2g} at 'outer.0'")
    assert "bias of 'outer.0'" in str(sv.explain(OfPoints(5.0), points).findings[0])


def test_biases_of_many_layers_are_one_cause() -> None:
    """torch's default, by which every layer's bias does a little."""
    generator = torch.Generator().manual_seed(0)
    deep = sv.networks.mlp(20, width=128, depth=30, outputs=10, seed=0)
    for layer in deep:
        if isinstance(layer, nn.Linear):
            for parameter in (layer.weight, layer.bias):
                bound = layer.in_features**-0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    found = str(sv.explain(deep, gaussian(128, 20)).findings[0])
    assert "The cause is the bias of" in found
    assert "and others" in found
