"""Models of many kinds, small, each with a batch, to probe, explain and repair."""

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import svlib as sv

os.environ["HF_HUB_OFFLINE"] = "1"
WIDTH = 1200  # of wide networks


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def he_(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(
                parameter,
                nonlinearity="relu",
                generator=torch.Generator().manual_seed(parameter.numel()),
            )
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def wide(*layers: nn.Module, variance: float = 2 / WIDTH) -> nn.Sequential:
    model, generator = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, variance**0.5, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


class Net(nn.Module):
    """Layers, and a function of the module and its arguments."""

    def __init__(self, function_: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function_ = function_
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.function_(self, *given, **named)


class VGGLike(nn.Module):
    """Convolutions, functional ReLU and pooling, a linear layer on the flattened positions."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise([1, 12, 12, 24, 24])
        )
        self.scores = nn.Linear(24 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.hidden, 1):
            x = torch.relu(layer(x))
            x = nn.functional.max_pool2d(x, 2) if number % 2 == 0 else x
        return self.scores(x.flatten(1))


class Residual(nn.Module):
    """y + W relu(norm(y)), block by block."""

    def __init__(self, *, width: int = 48, depth: int = 6, normalized: bool) -> None:
        super().__init__()
        self.first = nn.Linear(20, width)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if normalized else nn.Identity() for _ in range(depth)
        )
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            y = y + block(torch.relu(norm(y)))
        return y


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make()


def resnet() -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck"
    )
    return _seeded(lambda: ResNetModel(config)), gaussian(12, 3, 32, 32)


def vit() -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }
    return _seeded(lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes))), gaussian(
        12, 3, 32, 32
    )


def gpt2() -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 48,
        "n_head": 3,
        "vocab_size": 100,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    ids = torch.randint(100, (12, 16), generator=torch.Generator().manual_seed(0))
    return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**sizes)).eval()), {"input_ids": ids}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "MLP": lambda: (sv.networks.mlp(20, width=200, depth=12, outputs=5, seed=0), gaussian(60, 20)),
    "VGG-like": lambda: (he_(VGGLike()), gaussian(16, 1, 16, 16)),
    "ALL-CNN-C": lambda: (sv.networks.all_cnn_c(6, channels=1, seed=0), gaussian(16, 1, 16, 16)),
    "U-Net": lambda: (sv.networks.UNet(4, levels=2, seed=0), gaussian(8, 1, 16, 16)),
    "residual": lambda: (he_(Residual(normalized=False)), gaussian(60, 20)),
    "residual, BatchNorm": lambda: (he_(Residual(normalized=True)), gaussian(60, 20)),
    "ResNet (transformers)": resnet,
    "ViT (transformers)": vit,
    "GPT-2 (transformers)": gpt2,
}
