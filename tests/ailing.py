"""More networks as they go wrong in practice, and sound ones that look ill."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from tests.models import Net, gaussian, he_, resnet

Case = tuple[nn.Module, Any, set[str], tuple[str, ...]]
X = gaussian(100, 64)


def categories(samples: int = 100, columns: int = 30, values: int = 20) -> torch.Tensor:
    """One-hot columns, side by side."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(values, (samples, columns), generator=generator)
    return F.one_hot(chosen, values).flatten(1).float()


def smooth(samples: int, channels: int, side: int) -> torch.Tensor:
    """Pictures of unit deviation whose neighbouring pixels are alike."""
    coarse = gaussian(samples, channels, 4, 4, seed=3)
    pictures = F.interpolate(coarse, size=side, mode="bilinear")
    return (pictures - pictures.mean()) / pictures.std()


class Autoencoder(nn.Module):
    """The decoder is the encoder transposed, without a module for either."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(64, 64) * factor / 8)
        self.b = nn.Parameter(torch.randn(32, 64) * factor / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(F.linear(torch.sigmoid(F.linear(x, self.a)), self.b))
        return F.linear(torch.sigmoid(F.linear(x, self.b.t())), self.a.t())


class Mixture(nn.Module):
    """Four experts, weighted by a softmax or chosen by its largest entry."""

    def __init__(self, bias: float, *, sparse: bool) -> None:
        super().__init__()
        self.g, self.sparse = nn.Linear(64, 4), sparse
        self.e = nn.ModuleList(he_(nn.Linear(64, 64)) for _ in range(4))
        self.o = he_(nn.Linear(64, 9))
        self.g.bias.data = torch.tensor([bias, 0.0, 0.0, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.g(x), -1)
        if not self.sparse:
            y = sum(weights[:, i : i + 1] * e(x) for i, e in enumerate(self.e))
            return self.o(torch.relu(y))
        y, best = torch.zeros_like(x), weights.argmax(-1)
        for i, expert in enumerate(self.e):
            if (mine := best == i).any():
                y[mine] = expert(x[mine]) * weights[mine, i : i + 1]
        return self.o(torch.relu(y))


def language(kind: str, **changed: Any) -> Case:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(1, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=3, n_embd=48, n_head=3, vocab_size=64, n_positions=16, bos_token_id=0,
            eos_token_id=0, **changed,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=3, hidden_size=48, num_attention_heads=3, intermediate_size=96,
            vocab_size=64, max_position_embeddings=16, **changed,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            num_hidden_layers=3, hidden_size=48, num_attention_heads=3, intermediate_size=96,
            vocab_size=64, max_position_embeddings=16, **changed,
        )  # fmt: skip
        model = transformers.BertModel(config)
    return model.eval(), {"input_ids": ids}, {"saturation", "explosion"}, ("softmax", "weights")


def lenet(channels: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def defaults(depth: int = 12) -> nn.Sequential:
    """Layers by torch's own initialization: fan-in times mean square is 1/3, with biases."""
    parts = [part for _ in range(depth) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(64, 9))


def overflow() -> nn.Module:
    model = he_(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                              nn.Linear(64, 9)))  # fmt: skip
    with torch.no_grad():
        model[2].weight *= 1e5  # type: ignore[index]
    return model.half()


def shifted() -> nn.Module:
    """One layer whose biases are random and large."""
    model = sv.networks.mlp(64, width=100, depth=8, outputs=10, seed=0)
    with torch.no_grad():
        nn.init.normal_(model.get_parameter("4.bias"), std=30)
    return model


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(30 * x)


class Beside(nn.Module):
    """Columns of a table beside an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Sequential(nn.Linear(67, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, embedded: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return self.m(torch.cat([embedded, columns], -1))


def sines() -> nn.Sequential:
    widths = [2, *[128] * 6]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), Sine())]
    return nn.Sequential(*layers, nn.Linear(128, 10))


AILING: dict[str, Callable[[], Case]] = {
    "sines of large weights": lambda: (
        sines(), gaussian(256, 2), {"gradients"}, ("weights at which gradients keep",),
    ),
    "price beside an embedding": lambda: (
        Beside(), (X, gaussian(100, 3) * torch.tensor([1.0, 5000.0, 1.0])), {"inputs"},
        ("column 1 has",),
    ),
    "one-hot columns": lambda: (
        nn.Sequential(nn.Linear(600, 64), nn.ReLU(), *defaults(3)),
        categories(),
        {"collapse", "loss of scale"},
        ("bias",),
    ),
    "tied autoencoder, large weights": lambda: (
        Autoencoder(30.0), X, {"saturation", "explosion"}, ("sigmoid", "weights"),
    ),
    "gate bias 20": lambda: (
        Mixture(20.0, sparse=False), X, {"saturation"}, ("softmax", "'g'"),
    ),
    "experts that are never chosen": lambda: (
        Mixture(20.0, sparse=True), X, {"saturation"}, ("softmax", "'g'"),
    ),
    "GPT-2 of range 0.5": lambda: language("gpt2", initializer_range=0.5),
    "CNN by torch's defaults": lambda: (
        nn.Sequential(
            *[p for c in (3, 16, 16, 16, 16, 16) for p in (nn.Conv2d(c, 16, 3, padding=1),
              nn.ReLU())], nn.Flatten(), nn.Linear(1024, 10),
        ),
        gaussian(48, 3, 8, 8),
        {"collapse", "loss of scale"},
        ("bias", "He's rule"),
    ),
    "layers by torch's defaults": lambda: (
        defaults(), X, {"collapse", "loss of scale"}, ("bias", "He's rule"),
    ),
    "the same, DataParallel": lambda: (
        nn.DataParallel(defaults()), X, {"collapse", "loss of scale"}, ("bias", "He's rule"),
    ),
    "the same, double": lambda: (
        defaults().double(), X.double(), {"collapse", "loss of scale"}, ("bias", "He's rule"),
    ),
    "the same, bfloat16": lambda: (
        defaults().bfloat16(), X.bfloat16(), {"collapse", "loss of scale"}, ("bias", "He's rule"),
    ),
    "float16 overflows": lambda: (overflow(), X.half(), {"not finite"}, ("'2'",)),
    "large biases in one layer": lambda: (
        shifted(), X, {"collapse", "explosion"}, ("bias of '4'",),
    ),
}  # fmt: skip


def zero_batchnorm() -> nn.Module:
    """Residual blocks whose last BatchNorm starts at 0, and an average over positions."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(s.n(s.f(x)))
        for block in s.blocks:
            x = torch.relu(x + block(x))
        return s.o(x.mean((2, 3)))

    def block() -> nn.Module:
        end = nn.BatchNorm2d(16)
        nn.init.zeros_(end.weight)
        a, b = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        return nn.Sequential(a, nn.BatchNorm2d(16), nn.ReLU(), b, end)

    blocks = nn.ModuleList(block() for _ in range(4))
    f = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    return he_(Net(forward, f=f, n=nn.BatchNorm2d(16), blocks=blocks, o=nn.Linear(16, 9)))


def prior_head() -> nn.Module:
    parts = [p for _ in range(4) for p in (nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())]
    model = he_(nn.Sequential(*parts, nn.Conv2d(24, 18, 3, padding=1)))
    nn.init.normal_(model[-1].weight, std=0.01)  # type: ignore[index]
    nn.init.constant_(model[-1].bias, -4.6)  # type: ignore[index]
    return model


class Branch(nn.Module):
    """x + g f(x) with g = 0 at the start, as a factor or as that of a normalization."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(64, 64), nn.Linear(64, 64)
        norm = {"BatchNorm": nn.BatchNorm1d, "LayerNorm": nn.LayerNorm}.get(kind)
        self.n = norm(64) if norm else nn.Identity()
        self.g = nn.Parameter(torch.zeros(64 if kind == "LayerScale" else 1))
        if norm:
            nn.init.zeros_(next(self.n.parameters()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.n(self.b(torch.relu(self.a(x))))
        factor = {"tanh": torch.tanh(self.g), "LayerScale": self.g, "ReZero": self.g}
        return x + y * factor.get(self.kind, 1.0)


def zero_branches(kind: str) -> Case:
    return he_(nn.Sequential(*[Branch(kind) for _ in range(4)], nn.Linear(64, 9))), X, set(), ()


class ByHand(nn.Module):
    """GELU as several language models write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * x**3)))


def activation(make: Callable[[], nn.Module], size: float = 4.0) -> Case:
    parts = (nn.Linear(64, 100), make(), nn.Linear(100, 100), make(), nn.Linear(100, 9))
    model = he_(nn.Sequential(*parts))
    with torch.no_grad():
        next(model.parameters()).mul_(size)
    return model, X, set(), ()


def by_inputs(samples: int) -> Case:
    return sv.networks.mlp(64, width=200, depth=12, outputs=5, seed=0), X[:samples], set(), ()


SOUND: dict[str, Callable[[], Case]] = {
    "GPT-2": lambda: language("gpt2"),
    "Llama": lambda: language("llama"),
    "BERT": lambda: language("bert"),
    "ResNet on smooth pictures": lambda: (resnet()[0], smooth(12, 3, 64), set(), ()),
    "zero BatchNorm, smooth pictures": lambda: (zero_batchnorm(), smooth(24, 3, 16), set(), ()),
    "prior bias, convolution": lambda: (prior_head(), gaussian(12, 24, 8, 8), set(), ()),
    **{f"zero branch, {kind}": partial(zero_branches, kind)
       for kind in ("BatchNorm", "LayerNorm", "LayerScale", "ReZero", "tanh")},
    "GELU": lambda: activation(nn.GELU),
    "SiLU": lambda: activation(nn.SiLU),
    "GELU by hand": lambda: activation(ByHand),
    "2 inputs": lambda: by_inputs(2),
    "4 inputs": lambda: by_inputs(4),
    "8 inputs": lambda: by_inputs(8),
    "100 inputs": lambda: by_inputs(100),
}  # fmt: skip
