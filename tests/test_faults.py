"""Planted faults in architectures that no rule was made for: the first finding names the cause.

Every fault is put into a network that is sound without it.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from tests.models import gaussian, he_

Made = tuple[Any, torch.Tensor]


class Sequence1d(nn.Module):
    """Convolutions in one dimension, BatchNorm, a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Conv1d(a, 24, 3, padding=1) for a in (4, 24, 24, 24))
        self.norms = nn.ModuleList(nn.BatchNorm1d(24) for _ in range(4))
        self.head = nn.Linear(24 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        return self.head(F.max_pool1d(x, 2).flatten(1))


class GraphNetwork(nn.Module):
    """Graphs of 8 nodes: own features and those of the neighbours, the first node is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.own = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.beside = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 5)
        ring = torch.eye(8).roll(1, 0)
        self.register_buffer("adjacency", (ring + ring.T) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for own, beside in zip(self.own, self.beside, strict=True):
            x = torch.relu(0.8 * own(x) + 0.6 * (self.adjacency @ beside(x)))
        return self.head(x[:, 0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Linear(6, 24), nn.LSTM(24, 24, batch_first=True)
        self.mid, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lstm(self.embed(x))[0][:, -1]
        return self.head(torch.relu(self.mid(4 * y)))


class Mixture(nn.Module):
    """Every input goes to one of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(10, 32), nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.mid, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        weights = self.gate(x).softmax(-1)
        chosen = weights.argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            held = (chosen == number).nonzero()[:, 0]
            y[held] = expert(x[held]) * weights[held, number : number + 1]
        return self.head(torch.relu(self.mid(torch.relu(x + y))))


class Decoder(nn.Module):
    """Rotary attention, RMSNorm, gated units; half of the layers attend by torch's function."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        names = ("q", "k", "v", "o", "gate", "up", "down")
        sizes = [(width, width)] * 4 + [(width, 2 * width)] * 2 + [(2 * width, width)]
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(a, b) for n, (a, b) in zip(names, sizes, strict=True)})
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(5))
        self.scale = 1 / math.sqrt(width)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1])[:, None] / 10 ** torch.arange(x.shape[2] // 2)
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        layer: Any
        for number, layer in enumerate(self.layers):
            y = self.norms[2 * number](x)
            q, k, v = self.turned(layer["q"](y)), self.turned(layer["k"](y)), layer["v"](y)
            if number:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            else:
                mask = torch.ones(x.shape[1], x.shape[1]).tril() == 0
                scores = (q @ k.mT * self.scale).masked_fill(mask, -torch.inf)
                y = scores.softmax(-1) @ v
            x = x + 0.5 * layer["o"](y)
            y = self.norms[2 * number + 1](x)
            x = x + 0.5 * layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return self.head(self.norms[4](x)[:, -1])


def small(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Weights of fan-in times variance ``gain``, biases 0."""
    for number, layer in enumerate(model.modules()):
        if isinstance(layer, nn.Linear):
            generator = torch.Generator().manual_seed(number)
            nn.init.normal_(layer.weight, 0, math.sqrt(gain / layer.in_features), generator)
            nn.init.zeros_(layer.bias)
    return model


def mixture() -> nn.Module:
    return he_(Mixture())


SOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "1-D CNN": (lambda: he_(Sequence1d()), (4, 16), "hidden.1"),
    "graph network": (lambda: he_(GraphNetwork()), (8, 6), "own.1"),
    "LSTM": (lambda: he_(Recurrent()), (9, 6), "mid"),
    "mixture of experts": (mixture, (10,), "mid"),
    "decoder": (lambda: small(Decoder()), (7, 6), "head"),
    "U-Net": (lambda: sv.networks.UNet(8, levels=2, seed=0), (1, 16, 16), "down.1.2"),
}


def made(name: str, inputs: int = 48) -> tuple[nn.Module, torch.Tensor, str]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        make, shape, layer = SOUND[name]
        return make(), gaussian(inputs, *shape, seed=3), layer


@pytest.mark.filterwarnings("ignore:.* have no row")  # experts, and what is mixed
@pytest.mark.parametrize("inputs", [4, 32, 256])
@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_sound_networks(name: str, inputs: int) -> None:
    model, x, _ = made(name, inputs)
    found = sv.explain(model, x).findings
    assert not [finding for finding in found if not finding.note][1:], found
    assert found[0].kind == "nothing found"


def layer_of(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


Planted = tuple[nn.Module, torch.Tensor, set[str], list[str]]
Fault = Callable[[nn.Module, torch.Tensor, str], Planted]


def bias(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    layer = layer_of(model, name)
    nn.init.normal_(layer.bias, 0, 40, torch.Generator().manual_seed(1))
    return model, x, {"collapse", "explosion"}, [f"bias of {name!r}"]


def mean(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    return model, x + 8, {"inputs", "collapse", "saturation"}, ["mean", "centred", "standardized"]


def column(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    x = x.clone()
    (x[:, 0] if x.ndim != 3 or x.shape[1] == 4 else x[..., 0]).mul_(500)
    return model, x, {"inputs", "saturation"}, ["standardized"]


def bytes_(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    return model, (x.clamp(-2, 2) + 2) * 64, {"inputs", "saturation"}, ["standardized"]


def dead(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    nn.init.constant_(layer_of(model, name).bias, -1000.0)
    return model, x, {"dead units"}, [repr(name)]


def zero(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    for parameter in layer_of(model, name).parameters():
        nn.init.zeros_(parameter)
    return model, x, {"no signal", "dead units"}, [repr(name)]


def large(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    with torch.no_grad():
        layer_of(model, name).weight.mul_(100)
    return model, x, {"explosion"}, [repr(name), "weights"]


def tiny(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.weight.mul_(0.03)
    return model, x, {"loss of scale"}, ["weights"]


class Swapped(nn.Module):
    """A view that should have been a transpose, in front of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten().view(*x.shape[1:], len(x)).movedim(-1, 0))


def mixed(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    model.set_submodule(name, Swapped(model.get_submodule(name)))
    return model, x, {"mixing"}, ["other inputs"]


def detached(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    layer_of(model, name).register_forward_hook(lambda module, given, y: y.detach())
    return model, x, {"gradients"}, ["no gradient"]


def equal(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    return model, x[:1].expand_as(x).clone(), {"inputs"}, ["equal"]


def foreign(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    model.eval()
    norm: Any = model.get_submodule("norms.1")
    norm.running_mean += 60
    return model, x, {"statistics", "dead units"}, ["statistics in BatchNorm", "norms.1"]


def sharp(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    with torch.no_grad():
        layers: Any = model.get_submodule("layers")
        for layer in layers:
            layer["q"].weight.mul_(20)
            layer["k"].weight.mul_(20)
    return model, x, {"saturation"}, ["softmax", "attention"]


def shut(model: nn.Module, x: torch.Tensor, name: str) -> Planted:
    nn.init.constant_(model.lstm.bias_hh_l0[24:48], -9.0)  # type: ignore[index, union-attr]
    nn.init.constant_(model.lstm.bias_ih_l0[24:48], 0.0)  # type: ignore[index, union-attr]
    return model, x, {"saturation"}, ["forget gate"]


ALL = tuple(SOUND)
NORMALIZED = ("1-D CNN", "decoder")  # which takes these away
MATRIX: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "bias": (bias, tuple(x for x in ALL if x not in NORMALIZED)),
    "input mean": (mean, tuple(x for x in ALL if x not in ("LSTM",))),
    "column x 500": (column, tuple(x for x in ALL if x != "U-Net")),
    "bytes": (bytes_, ALL),
    "dead layer": (dead, ("graph network", "LSTM", "mixture of experts", "U-Net")),
    "zero weights": (zero, ("LSTM", "mixture of experts", "U-Net")),
    "one layer x 100": (large, ("graph network", "LSTM", "mixture of experts", "U-Net")),
    "small weights": (tiny, ("graph network", "mixture of experts", "U-Net")),
    "mixed inputs": (mixed, tuple(x for x in ALL)),
    "detached": (detached, ("1-D CNN", "LSTM", "U-Net")),
    "equal inputs": (equal, ALL),
    "foreign statistics": (foreign, ("1-D CNN",)),
    "sharp attention": (sharp, ("decoder",)),
    "shut gate": (shut, ("LSTM",)),
}


@pytest.mark.filterwarnings("ignore:.* have no row")  # experts, and what is mixed
@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, (_, names) in MATRIX.items() for name in names]
)
def test_the_planted_fault_comes_first(fault: str, name: str) -> None:
    model, x, layer = made(name)
    model, x, kinds, words = MATRIX[fault][0](model, x, layer)
    finding = sv.explain(model, x).findings[0]
    assert finding.kind in kinds, str(finding)
    assert any(word in f"{finding} {finding.cause} {finding.place!r}" for word in words), finding
